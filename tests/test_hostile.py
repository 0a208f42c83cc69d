"""Hostile files: none of the corpus, and none of some mutated snapshots, does anything when it is read."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = ROOT / "tests" / "data" / "hostile"
SCRIPTS = str(ROOT / "scripts")
NUM_MUTATIONS = 150


@pytest.fixture(scope="module")
def report() -> dict:
    """What the fuzzer prints, after reading the whole corpus and some mutated files."""
    command = [sys.executable, f"{SCRIPTS}/fuzz_pickles.py", "--mutations", str(NUM_MUTATIONS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="the fuzzer limits time and memory with POSIX calls")
def test_nothing_is_executed_and_nothing_escapes(report: dict) -> None:
    assert report["findings"] == []
    index = json.loads((HOSTILE / "index.json").read_text())
    assert report["corpus"] == {
        "refused": sum(not entry.get("loads") for entry in index.values()),
        "loaded": sum(entry.get("loads", False) for entry in index.values()),
    }
    assert sum(report["mutations"].values()) == NUM_MUTATIONS
    assert report["mutations"]["loaded"] > 0, "mutations so coarse that none loads test little"


def test_the_corpus_is_what_its_script_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import build_hostile

    cases = build_hostile.cases()
    index = json.loads((HOSTILE / "index.json").read_text())
    assert [name for name, *_ in cases] == list(index) and len(index) >= 60
    assert {kind for _, kind, _, _ in cases} == {"code", "exhaust", "lie", "broken"}
    for name, _, _, content in cases:
        stored = gzip.decompress((HOSTILE / f"{name}.gz").read_bytes())
        assert stored == content or name.startswith(("zip_", "gzip")), name  # those depend on the version of zlib


def test_the_control_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that refusals are the doing of what was changed in it."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import build_hostile

    from training import network_pickle

    path = tmp_path / "control.pkl"
    path.write_bytes(build_hostile.control())
    assert network_pickle.load(path).G_ema.img_resolution == 8
    tensor = build_hostile.tensor((4,), (1,))
    path.write_bytes(build_hostile.with_tensor(tensor))
    assert network_pickle.load(path).G_ema.mapping.w_avg.tolist() == [0, 0, 0, 0]


def test_mutations_are_of_every_format_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import fuzz_mutations

    from training import network_file, recognise

    one, two = fuzz_mutations.Mutator(5), fuzz_mutations.Mutator(5)
    assert one.files == two.files, "also those whose format holds addresses"
    assert {network_file.parse(data)["kind"] for data in one.files.values()} == set(recognise.READABLE)
    numbers = range(4 * len(one.files))
    made = [one[i] for i in numbers]
    assert made == [two[i] for i in reversed(numbers)][::-1]
    assert {name for name, _ in made} == {*one.files, "hostile corpus"}
    assert all(data != one.files.get(name) for name, data in made)


def test_the_guard_sees_an_ordinary_unpickler_act(tmp_path: Path) -> None:
    """The old bug, kept: what this family's loaders do with such a file."""
    program = (
        "import gzip, io, os, pickle, sys; sys.path.insert(0, sys.argv[1])\n"
        "import fuzz_pickles\n"
        "guard = fuzz_pickles.Guard(); guard.armed = True\n"
        "pickle.loads(fuzz_pickles.hostile()['call_builtins_exec'])\n"
        "guard.armed = False\n"
        "print([event.split()[0] for event in guard.caught])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, SCRIPTS], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "executed").exists(), done.stderr
    assert "'exec'" in done.stdout and "'pickle.find_class'" in done.stdout and "'open'" in done.stdout
