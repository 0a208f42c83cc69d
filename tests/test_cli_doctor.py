"""`doctor`: answers everything, whatever breaks; names strangers on the path; remedies stand beside what they mend."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stylegan_rooted import cli, doctor
from torch_utils.ops import grid_sample_gradfix


def run_cli(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
        raise SystemExit(0)
    return int(stop.value.code or 0)


def of(topic: str) -> list[doctor.Finding]:
    return list(doctor.QUESTIONS[topic](topic))


def test_text_and_json_say_the_same(capsys) -> None:
    code = run_cli("doctor", "--json")
    record = json.loads(capsys.readouterr().out)
    assert record["healthy"] is True and code == 0, record
    assert {finding["topic"] for finding in record["findings"]} == set(doctor.QUESTIONS)
    assert run_cli("doctor") == 0
    text = capsys.readouterr().out
    assert text.startswith("```\n") and text.endswith("```\n") and " 0 problems\n" in text
    assert all(finding["text"] in text for finding in record["findings"] if finding["topic"] in ("torch", "python"))


def test_a_question_that_breaks_hides_no_other_answer(monkeypatch, capsys) -> None:
    def broken(topic):
        yield doctor.Finding(topic, "ok", "first half")
        raise OSError("the driver\nfell over")

    monkeypatch.setitem(doctor.QUESTIONS, "gpu", broken)
    assert run_cli("doctor", "--json") == 1
    record = json.loads(capsys.readouterr().out)
    assert {finding["topic"] for finding in record["findings"]} == set(doctor.QUESTIONS)
    (problem,) = [finding for finding in record["findings"] if finding["state"] == "problem"]
    assert problem["text"] == "could not be found out: OSError: the driver fell over"


def test_without_torch_it_answers_all_the_same(tmp_path) -> None:
    """A torch that cannot be imported is a finding."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.99 is missing')")
    code = "import sys; sys.path[:0] = sys.argv[1:]\nfrom stylegan_rooted.cli import main; main(['doctor', '--json'])"
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root, timeout=60
    )
    record = json.loads(result.stdout)
    assert result.returncode == 1 and not record["healthy"]
    problems = {f["topic"]: f["text"] for f in record["findings"] if f["state"] == "problem"}
    assert "libcudart.so.99 is missing" in problems["torch"] and "packages" not in problems
    assert {finding["topic"] for finding in record["findings"]} == set(doctor.QUESTIONS)


def test_another_repository_on_the_path_is_named(monkeypatch, tmp_path) -> None:
    assert [f.state for f in of("modules found")] == ["ok"]
    find = importlib.util.find_spec
    foreign = SimpleNamespace(submodule_search_locations=[str(tmp_path / "torch_utils")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: foreign if name == "torch_utils" else find(name))
    (finding,) = of("modules found")
    assert finding.state == "problem" and finding.text == f"torch_utils from {tmp_path / 'torch_utils'}"
    assert "PYTHONPATH" in finding.remedy

    def broken(topic):
        raise ImportError("cannot import name 'images'")

    questions = {"modules found": doctor.QUESTIONS["modules found"], "processor": broken, "detectors": broken}
    monkeypatch.setattr(doctor, "QUESTIONS", questions)
    named, rest = doctor.examine()  # the cause once, and one line for all that it keeps from being asked
    assert named == finding and rest.state == "note" and rest.text.startswith("processor, detectors: ")


def test_a_command_that_finds_another_repositorys_modules_says_so_in_one_line(tmp_path) -> None:
    (tmp_path / "torch_utils").mkdir()
    for name in ("__init__", "images", "misc", "persistence"):  # an editable install finds what is not there
        (tmp_path / "torch_utils" / f"{name}.py").write_text("")
    root = Path(__file__).resolve().parent.parent
    ended = subprocess.run(
        [sys.executable, "-m", "stylegan_rooted", "finetune", "--data", "d", "--resume", "none", "--outdir", "o"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"Error: found torch_utils from {tmp_path / 'torch_utils'}; ")
    assert "unset PYTHONPATH" in ended.stderr


def test_wrong_second_derivatives_are_seen(monkeypatch) -> None:
    assert [f.state for f in of("second derivatives")] == ["ok"]
    monkeypatch.setattr(
        grid_sample_gradfix, "grid_sample", lambda x, grid: x.detach() * x + x[:, :, :1, :1].expand_as(x)
    )
    (finding,) = of("second derivatives")
    assert finding.state == "problem" and "--augpipe color" in finding.remedy


@pytest.mark.parametrize(
    "driver, cuda, state, wanted",
    [(None, None, "ok", None), ("550.54", None, "note", "CUDA build"), ("450.1", "12.8", "problem", "as new as CUDA")],
)
def test_gpus_that_torch_does_not_see(monkeypatch, driver, cuda, state, wanted) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (finding,) = of("gpu")
    assert finding.state == state and (wanted is None) == (finding.remedy is None)
    assert wanted is None or wanted in finding.remedy


def test_a_gpu_is_described(monkeypatch) -> None:
    properties = SimpleNamespace(name="Imaginary 9000", major=9, minor=0)
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1 << 30, 80 << 30))
    (finding,) = of("gpu")
    assert "Imaginary 9000, compute capability 9.0, 1.0 of 80.0 GiB free, driver 570.1" in finding.text
    assert finding.state == "note"
    assert of("precisions")[1].text == "GPU 0: float16 fast, bfloat16 fast, TF32 yes"


def test_missing_packages_are_listed_with_their_remedy(monkeypatch) -> None:
    version = doctor._version_of
    monkeypatch.setattr(doctor, "_version_of", lambda n: None if n in ("scipy", "clean-fid") else version(n))
    required, *optional = of("packages")
    assert required.state == "problem" and "missing: scipy" in required.text
    assert any(f.text == "not installed: clean-fid" and "[fid]" in f.remedy for f in optional)


def test_a_full_disk_and_a_missing_detector_are_notes(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    assert [f.state for f in of("disk")] == ["note", "note"]
    from metrics import features

    monkeypatch.setattr(features, "inception_home", lambda: tmp_path)
    embedded, inception = of("detectors")
    assert embedded.state == "ok" and inception.state == "note" and "--detector-file" in inception.remedy
