"""kill -9 at random moments, during saves too. `python scripts/kill_test.py --kills 50` prints the docs' table."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import forked
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "kill_test.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_test"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kills, kimg", [(4, 0.056), pytest.param(50, 0.24, marks=pytest.mark.slow)])
def test_kills_lose_nothing_and_change_nothing(script, tmp_path, kills, kimg) -> None:
    report = script.torment(tmp_path, kills, kimg, seed=2, say=lambda text: None)
    assert len(report.lines) == kills
    written = [line for line in report.lines if "within the training state" in line]  # half of it
    assert report.in_save >= kills // 2 and len(written) >= kills // 4, report.lines
    assert not report.problems


def test_the_comparison_sees_what_differs(script, tmp_path) -> None:
    """The script can fail: another seed's run is another run, and a file that was cut short is none."""
    script.write_pictures(tmp_path / "pictures")
    command = ["finetune", "--data", str(tmp_path / "pictures"), "--kimg", "0.008", *script.OPTIONS]
    for seed in ("0", "1"):
        assert forked.run(*command, "--seed", seed, "--outdir", tmp_path / seed).code == 0
    found = script.differences(script.only(tmp_path / "1"), script.only(tmp_path / "0"))
    snapshot = "network-snapshot-000000"
    networks = (f"{snapshot}.pkl", f"{snapshot}.safetensors", "training-state-000000008.pt")
    wanted = ("stats.jsonl", "metric-kd.jsonl", *networks)
    assert {f"{name} differs" for name in wanted} <= set(found)
    assert not script.unreadable(tmp_path / "0")
    for ending in ("pt", "pkl", "safetensors", "png"):
        file = max(script.only(tmp_path / "0").glob(f"*.{ending}"))
        file.write_bytes(file.read_bytes()[:-100])
    assert len(script.unreadable(tmp_path / "0")) == 4
