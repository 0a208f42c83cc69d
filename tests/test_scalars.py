"""`stylegan_rooted.scalars`: one table for TensorBoard and Weights & Biases; none of them ends a run."""

import builtins
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from stylegan_rooted import scalars
from training.config import FinetuneConfig
from training.stats import Scalar

MEANS = {"Loss/G/loss": Scalar(3, 1.5, 0.1), "Progress/kimg": Scalar(1, 2.25, 0.0)}


class Recorder:
    """A stand-in for the package wandb: keeps what it is told."""

    def __init__(self) -> None:
        self.started: dict[str, Any] = {}
        self.rows: list[dict[str, float]] = []
        self.axes: list[tuple[str, str]] = []
        self.broken = self.finished = False

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    def init(self, **values: Any) -> "Recorder":
        if self.broken:
            raise RuntimeError("no\nservice")
        self.started = values
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        if self.broken:
            raise OSError("disk full")
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)  # type: ignore[arg-type]
    monkeypatch.setattr(scalars.TensorBoard, "open", lambda path: None)
    return recorder


def test_wandb_gets_the_table_offline(wandb: Recorder, tmp_path: Path) -> None:
    said: list[str] = []
    options = FinetuneConfig().to_dict()
    writers = scalars.open_writers(tmp_path / "00000-x", wandb="offline", options=options, say=said.append)
    assert wandb.started["mode"] == "offline" and wandb.started["dir"] == str(tmp_path / "00000-x")
    assert wandb.started["config"] == options and wandb.axes == [("*", "Progress/kimg")]
    writers.write(scalars.tick_row(MEANS), nimg=2250, seconds=7.0)
    writers.write({"Metrics/FD": 3.0}, nimg=1000, seconds=9.0)  # of an earlier snapshot, measured beside training
    assert wandb.rows == [{"Loss/G/loss": 1.5, "Progress/kimg": 2.25}, {"Metrics/FD": 3.0, "Progress/kimg": 1.0}]
    writers.close()
    assert wandb.finished and said == []


def test_it_is_not_even_looked_for_where_nobody_asked(wandb: Recorder, tmp_path: Path) -> None:
    assert FinetuneConfig().runtime.wandb == "none"
    scalars.open_writers(tmp_path, wandb="none", options={}, say=lambda text: None)
    assert wandb.started == {}
    with pytest.raises(ValueError, match="--wandb yes is unknown; one of none, offline, online"):
        FinetuneConfig().replace(runtime__wandb="yes")


def test_failures_are_said_once_and_end_nothing(wandb: Recorder, tmp_path: Path) -> None:
    said: list[str] = []
    writers = scalars.open_writers(tmp_path, wandb="offline", options={}, say=said.append)
    wandb.broken = True
    for _ in range(3):
        writers.write({"a": 1.0}, nimg=0, seconds=0.0)
    writers.close()
    assert said == ["Weights & Biases left out from now on: disk full (training goes on)"] and not wandb.finished
    scalars.open_writers(tmp_path, wandb="online", options={}, say=said.append).write({}, nimg=0, seconds=0.0)
    assert said[1:] == ["Weights & Biases left out: no service (training goes on)"]


def test_a_missing_package_names_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> types.ModuleType:
        if name in ("wandb", "torch.utils.tensorboard"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    said: list[str] = []
    scalars.open_writers(tmp_path, wandb="offline", options={}, say=said.append).close()
    (line,) = said
    assert "pip install 'stylegan-rooted[wandb]'" in line and "training goes on" in line


def test_tensorboard_gets_the_table(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    writers = scalars.open_writers(tmp_path, wandb="none", options={}, say=lambda text: None)
    writers.write(scalars.tick_row(MEANS), nimg=2250, seconds=7.0)
    writers.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"Loss/G/loss" in events.read_bytes() and b"Progress/kimg" in events.read_bytes()
