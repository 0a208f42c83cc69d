"""Which run a command means: matching, refusal of changed options, warm starts, locks, the table of the docs."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import runs
from PIL import Image

from stylegan_rooted import finetune, resume
from stylegan_rooted.cli.finetune import FIELDS
from training import run_dir
from training.config import FinetuneConfig, LossConfig
from training.run_lock import FolderLock

ROOT = Path(__file__).resolve().parent.parent


def tiny(pictures: Path, outdir: Path, **changes) -> FinetuneConfig:
    settings = runs.tiny(pictures, outdir, loss=LossConfig(name="rooted"), schedule__kimg=0.008, schedule__tick=1)
    return settings.replace(**changes)


def train(config: FinetuneConfig, *, restart: bool = False) -> tuple[Path, list[str]]:
    said: list[str] = []
    return finetune.run(config, say=said.append, restart=restart), said


def unfinish(path: Path) -> None:
    """As if the run had been killed before its end was noted."""
    rows = [row for row in run_dir.read_jsonl(path / "history.jsonl") if row["event"] != "finished"]
    (path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_same_command_restart_and_a_new_command(pictures, tmp_path) -> None:
    config = tiny(pictures, tmp_path)
    first, said = train(config)
    assert "New networks, from scratch" in said
    again, said = train(config)
    assert again == first and said == [
        f"Finished already: {first}. A larger --kimg trains it longer; --restart starts a new run"
    ]
    second, _ = train(config, restart=True)
    assert second.name.startswith("00001-")
    assert train(config)[0] == second  # the newest counts
    third, _ = train(config.replace(runtime__seed=1))  # nothing unfinished lies there: another run
    assert third.name.startswith("00002-")


def test_changed_options_are_listed_and_refused(pictures, tmp_path) -> None:
    config = tiny(pictures, tmp_path)
    path, _ = train(config)
    unfinish(path)
    flags = {f.target: f.flag for f in FIELDS}
    changed = config.replace(loss__k="3", optim__glr=0.01, metric__num=50, schedule__snap=7)
    with pytest.raises(resume.ChangedOptions) as refusal:
        finetune.execute(changed, say=lambda text: None, flags=flags)
    text = str(refusal.value)
    assert "--k 2, now 3" in text and "--glr 0.0025, now 0.01" in text and "--restart" in text and "\n" not in text
    assert "metric" not in text and "snap" not in text and str(path) in text
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert train(changed, restart=True)[0] != path


def test_options_that_may_change_do(pictures, tmp_path) -> None:
    config = tiny(pictures, tmp_path)
    path, _ = train(config)
    unfinish(path)
    moved = tmp_path / "elsewhere" / pictures.name
    moved.mkdir(parents=True)
    for file in pictures.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    changed = config.replace(
        data__path=str(moved), schedule__kimg=0.012, schedule__snap=3, data__workers=1, runtime__desc="x"
    )
    continued, said = train(changed)
    assert continued == path and any(line.startswith("Continuing at 0.008 kimg") for line in said)
    assert json.loads((path / "training_options.json").read_text())["schedule"]["kimg"] == 0.012
    events = [row["event"] for row in run_dir.read_jsonl(path / "history.jsonl")]
    assert events == ["started", "continued", "finished"]


def test_a_snapshot_is_a_warm_start_and_called_so(pictures, tmp_path) -> None:
    path, _ = train(tiny(pictures, tmp_path / "a"))
    warm = tiny(pictures, tmp_path / "b", resume=str(path / "network-snapshot-000000.pkl"))
    _, said = train(warm)
    assert any(line.startswith("Warm start: networks from ") and "optimiser" in line for line in said)
    # Out of habit, in the outdir of the interrupted run itself: that would forget Adam, ADA and the clock.
    unfinish(path)
    with pytest.raises(resume.ChangedOptions, match="resume none, now .*network-snapshot"):
        train(tiny(pictures, tmp_path / "a", resume=str(path / "network-snapshot-000000.pkl")))


def test_another_pickle_under_the_same_name_is_another_run(pictures, tmp_path) -> None:
    one, _ = train(tiny(pictures, tmp_path / "one"))
    two, _ = train(tiny(pictures, tmp_path / "two", runtime__seed=1))
    pickle = tmp_path / "start.pkl"
    pickle.write_bytes((one / "network-snapshot-000000.pkl").read_bytes())
    path, _ = train(tiny(pictures, tmp_path / "runs", resume=str(pickle)))
    unfinish(path)
    pickle.write_bytes((two / "network-snapshot-000000.pkl").read_bytes())
    with pytest.raises(resume.ChangedOptions, match="content was another"):
        train(tiny(pictures, tmp_path / "runs", resume=str(pickle)))


def test_other_data_beside_an_unfinished_run_is_a_run_of_its_own(pictures, tmp_path) -> None:
    path, _ = train(tiny(pictures, tmp_path))
    unfinish(path)
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (8, 8), "red").save(other / "a.png")
    assert train(tiny(other, tmp_path, loss__k="3"))[0].name.startswith("00001-other")


def test_the_same_command_on_other_images_says_which_run_it_leaves(pictures, tmp_path) -> None:
    path, _ = train(tiny(pictures, tmp_path))
    other = tmp_path / "copy"
    shutil.copytree(pictures, other)
    Image.new("RGB", (8, 8), "red").save(other / "00.png")
    line = f"A new run: {path} is not finished, but was trained on other images ({pictures}); it stays as it is"
    assert line not in train(tiny(other, tmp_path))[1]  # a finished one is in nobody's way
    (second,) = tmp_path.glob("00001-*")
    shutil.rmtree(second)
    unfinish(path)
    assert line in train(tiny(other, tmp_path))[1]


@pytest.mark.parametrize("damage, wrong", [(lambda file: file.write_text("{"), "damaged ("), (Path.unlink, "missing")])
def test_a_run_whose_options_are_lost_goes_on_with_those_of_its_state(pictures, tmp_path, damage, wrong) -> None:
    config = tiny(pictures, tmp_path)
    path, _ = train(config)
    unfinish(path)
    options = (path / resume.OPTIONS_FILE).read_text()
    damage(path / resume.OPTIONS_FILE)
    continued, said = train(config)
    assert continued == path and any(line.startswith("Continuing at 0.008 kimg") for line in said)
    (line,) = [line for line in said if line.startswith("Warning: ")]
    assert f"{resume.OPTIONS_FILE} is {wrong}" in line and "; the options in training-state-" in line
    assert (path / resume.OPTIONS_FILE).read_text() == options


def test_a_run_without_options_and_states_is_named_and_nothing_begins(pictures, tmp_path) -> None:
    config = tiny(pictures, tmp_path)
    path, _ = train(config)
    (path / resume.OPTIONS_FILE).write_text("{")
    for state in path.glob("training-state-*"):
        state.write_bytes(b"")
    assert train(config)[0] != path  # finished: in nobody's way
    unfinish(path)
    with pytest.raises(ValueError, match="is not finished, but training_options.json there is damaged .*--restart"):
        train(config.replace(runtime__seed=1))
    assert train(config.replace(runtime__seed=1), restart=True)[0].name.startswith("00002-")


def test_a_held_run_is_not_touched(pictures, tmp_path) -> None:
    config = tiny(pictures, tmp_path)
    path, _ = train(config)
    unfinish(path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with FolderLock(path, wait=False):
        with pytest.raises(BlockingIOError, match="is being trained by process"):
            train(config)
        assert {p.name: p.read_bytes() for p in path.iterdir()} == before
        assert train(config.replace(loss__k="3"))[0] != path  # another run beside one in training
    with pytest.raises(BlockingIOError), FolderLock(path, wait=False), FolderLock(path, wait=False):
        pass


def test_runs_of_a_version_without_states_are_left_alone(pictures, tmp_path) -> None:
    config = tiny(pictures, tmp_path)
    path, _ = train(config)
    for file in [*path.glob("training-state-*"), path / "history.jsonl"]:
        file.unlink()
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(ValueError, match="no training state that can be read; --restart"):
        train(config)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_differing() -> None:
    old = {"a": 1, "b": {"c": (1, 2), "d": None}, "e": 0.5}
    assert not resume.differing(old, {"a": 1, "b": {"c": [1, 2], "d": None}, "e": 0.5})
    found = resume.differing(old, {"a": 2, "b": {"c": [1, 3]}, "f": 1})
    assert [name for name, _, _ in found] == ["a", "b.c", "e", "f"]


def test_every_option_that_may_change_exists_and_stands_in_the_docs() -> None:
    fields = {
        f"{section.name}.{f.name}"
        for section in dataclasses.fields(FinetuneConfig)
        if dataclasses.is_dataclass(section.default_factory)
        for f in dataclasses.fields(section.default_factory)
    }
    assert set(resume.MAY_CHANGE) <= fields
    flags = {f.target: f.flag for f in FIELDS}
    text = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(--[a-z0-9-]+)` \| (.+) \|$", text, re.M))
    documented = {flags[name]: effect for name, effect in resume.MAY_CHANGE.items() if not name.startswith("metric.")}
    assert rows == documented


def test_the_docs_table_of_faults_names_tests_that_exist_and_all_of_test_faults() -> None:
    text = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", text)
    tests = {file: set(re.findall(r"^def (test_\w+)\(", (ROOT / file).read_text(), re.M)) for file, _ in named}
    assert len(named) > 30 and not [f"{file}::{test}" for file, test in named if test not in tests[file]]
    about_files = {"test_snapshot_budget", "test_keep_every_needs_keep_last"}  # no faults
    assert tests["tests/test_faults.py"] - about_files <= {test for _, test in named}
    rows = [row for row in text.splitlines() if row.startswith("| ") and "`tests/" in row]
    codes = re.findall(r"^\| (\d+) \|", text, re.M)
    assert all(set(re.findall(r"\d+", row.split(" | ")[2])) <= {*codes, "137"} for row in rows)


def test_the_docs_name_every_exit_code() -> None:
    text = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)] == [0, 1, 2, 3, 130, 143]
