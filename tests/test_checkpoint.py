"""Training states: their file, and the promise that a continued run is the same run to the last bit."""

import json
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close
from processes import run_processes
from runs import quiet, tiny, write_pictures

from stylegan_rooted import finetune
from training import checkpoint, network_pickle, run_dir
from training.config import (
    AugmentConfig,
    FinetuneConfig,
    LossConfig,
    MetricConfig,
    NetworkConfig,
    OptimConfig,
    ScheduleConfig,
)
from training.dataset import InfiniteSampler


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten 16x16 RGB images of two labelled classes: networks of more than one block."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 10, 16)


def config(pictures: Path, outdir: Path, **changes) -> FinetuneConfig:
    """Everything that has a state is on: ADA with a p that moves, style mixing, path length, chunks, read-ahead."""
    settings = tiny(
        pictures,
        outdir,
        data__mirror=True,
        loss=LossConfig(name="rooted", k="1.5:3@0.04", tail="linear", tail_at=4.0, pl_weight=2.0, style_mixing=0.9),
        augment=AugmentConfig(aug="ada", augpipe="bgc", target=0.1, ada_kimg=0.1),
        optim=OptimConfig(batch=4, batch_gpu=2, g_reg_interval=2, d_reg_interval=3),
        schedule=ScheduleConfig(kimg=0.048, tick=0.012, snap=2),
        metric=MetricConfig(metrics=("kid",), num=6),
    )
    return settings.replace(**changes)


class Killed(BaseException):
    """Stands for kill -9: nothing of the run's own code may catch it."""


def run_killed(settings: FinetuneConfig, monkeypatch, *, after_steps: int) -> None:
    """Train and drop dead in the middle of a step, without a word."""
    original, left = finetune.train.__globals__["step"], [after_steps]

    def step(run) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        original(run)

    with monkeypatch.context() as patch:
        patch.setitem(finetune.train.__globals__, "step", step)
        patch.setattr(finetune.resume, "log_event", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            finetune.run(settings, say=quiet)


def assert_same_run(path: Path, reference: Path) -> None:
    """Byte for byte: snapshots, images, statistics and metrics without their clock, and the training state."""
    names = {p.name for p in reference.iterdir() if not p.name.startswith("events.")}
    assert {p.name for p in path.iterdir() if not p.name.startswith("events.")} == names
    for name in sorted(names):
        ours, theirs = path / name, reference / name
        if name.endswith((".png", ".pkl", ".safetensors", ".config.json")):
            assert ours.read_bytes() == theirs.read_bytes(), name
        elif name.endswith(".jsonl") and name != "history.jsonl":
            lines = [[json.dumps(run_dir.without_timing(r)) for r in run_dir.read_jsonl(f)] for f in (ours, theirs)]
            assert lines[0] == lines[1] and lines[0], name
        elif name.endswith(".pt"):
            assert_same_state(checkpoint.read(ours), checkpoint.read(theirs))
    assert len((path / "log.txt").read_text().splitlines()) == len((reference / "log.txt").read_text().splitlines())


def assert_same_state(a: object, b: object, where: str = "state") -> None:
    if isinstance(a, dict):
        assert isinstance(b, dict) and list(a) == list(b), where
        for key in a:
            clock = str(key).endswith(("_sec", "outdir")) or str(key).startswith(("Timing/", "Resources/"))
            if not clock and key != "files":
                assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b or a != a, where


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": LossConfig(name="logistic"), "data__cond": True, "data__workers": 2, "optim__g_reg_interval": None},
    ],
    ids=["rooted", "logistic"],
)
def test_a_killed_and_continued_run_is_the_same_run(pictures, tmp_path, monkeypatch, changes) -> None:
    random.seed(1)  # as every process begins with streams of its own
    reference = finetune.run(config(pictures, tmp_path / "whole", **changes), say=quiet)
    random.seed(2)
    p = [row["Progress/augment"]["mean"] for row in run_dir.read_jsonl(reference / "stats.jsonl")]
    assert max(p) > 0  # ADA moves, or this proves little
    settings = config(pictures, tmp_path / "pieces", schedule__autosave_min=0.0, **changes)
    for steps in (1, 2, 4):  # in the first tick, at a tick, at a snapshot
        run_killed(settings, monkeypatch, after_steps=steps)
    said: list[str] = []
    path = finetune.run(settings.replace(schedule__autosave_min=10.0), say=said.append)
    assert any(line.startswith("Continuing at 0.028 kimg, exactly where training-state-000000028.pt") for line in said)
    # The states in between lie elsewhere; those of the ends are the same.
    for folder in (path, reference):
        checkpoint.prune(folder, keep=1)
    assert_same_run(path, reference)


def test_killed_before_anything_was_saved(pictures, tmp_path, monkeypatch) -> None:
    settings = config(pictures, tmp_path, schedule=ScheduleConfig(kimg=0.008, tick=1))
    run_killed(settings, monkeypatch, after_steps=0)
    (path,) = tmp_path.iterdir()
    assert finetune.run(settings, say=quiet) == path
    assert run_dir.read_jsonl(path / "history.jsonl")[0]["event"] == "started again"


def test_a_state_is_read_without_executing_anything_and_every_changed_byte_is_noticed(pictures, tmp_path) -> None:
    path = finetune.run(config(pictures, tmp_path, schedule=ScheduleConfig(kimg=0.008, tick=1)), say=quiet)
    newest, before = checkpoint.find(path)
    state = torch.load(newest, weights_only=True)
    assert set(state["networks"]) == {"G", "D", "G_ema"} and set(state["optimizers"]) == {"G", "D"}
    assert {"ada", "augment_p", "pl_mean", "objectives", "stats", "progress", "data", "random", "files"} <= set(state)
    assert zipfile.ZipFile(newest).testzip() is None
    good = newest.read_bytes()
    rng = np.random.RandomState(0)
    for position in (0, len(good) - 1, len(good) - 75, *rng.randint(len(good), size=20)):
        broken = bytearray(good)
        broken[position] ^= 0x10
        newest.write_bytes(broken)
        with pytest.raises(checkpoint.StateError, match="damaged"):
            checkpoint.read(newest)
    for length in (0, 10, len(good) // 2, len(good) - 1):
        newest.write_bytes(good[:length])
        with pytest.raises(checkpoint.StateError, match="damaged"):
            checkpoint.read(newest)
    newest.unlink()
    newest.mkdir()
    with pytest.raises(checkpoint.StateError, match="is a folder, not a training state"):
        checkpoint.read(newest)
    said: list[str] = []
    assert checkpoint.latest(path, said.append)[0] == before
    assert newest.name in said[0] and said[0].endswith(f"; taking {before.name}") and not newest.exists()


def test_a_damaged_newest_state_is_named_and_the_one_before_is_used(pictures, tmp_path, monkeypatch) -> None:
    reference = finetune.run(config(pictures, tmp_path / "whole"), say=quiet)
    settings = config(pictures, tmp_path / "damaged")
    run_killed(settings, monkeypatch, after_steps=11)
    (path,) = (tmp_path / "damaged").iterdir()
    newest = checkpoint.find(path)[0]
    newest.write_bytes(newest.read_bytes()[:-5000])
    said: list[str] = []
    finetune.run(settings, say=said.append)
    assert any(newest.name in line and "; taking training-state-" in line for line in said)
    newest.with_name(newest.name + ".damaged").unlink()
    assert_same_run(path, reference)


def test_only_damaged_states_are_an_error_that_touches_nothing(pictures, tmp_path, monkeypatch) -> None:
    settings = config(pictures, tmp_path)
    run_killed(settings, monkeypatch, after_steps=2)
    (path,) = tmp_path.iterdir()
    for state in checkpoint.find(path):
        state.write_bytes(b"")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    said: list[str] = []
    with pytest.raises(ValueError, match=r"no training state that can be read \(.* is damaged.*\); --restart"):
        finetune.run(settings, say=said.append)
    assert not said and {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert list(path.glob("network-snapshot-*.pkl")) and run_dir.read_jsonl(path / "stats.jsonl")


def test_a_longer_run_goes_on_from_a_finished_one(pictures, tmp_path) -> None:
    reference = finetune.run(config(pictures, tmp_path / "long"), say=quiet)
    short = config(pictures, tmp_path / "extended", schedule__kimg=0.020)
    path = finetune.run(short, say=quiet)
    metric = (path / "metric-kd.jsonl").read_text()
    said: list[str] = []
    assert finetune.run(short, say=said.append) == path and "Finished already" in said[-1]
    assert finetune.run(config(pictures, tmp_path / "extended"), say=quiet) == path
    a, b = (run_dir.read_jsonl(p / "stats.jsonl") for p in (path, reference))
    assert [run_dir.without_timing(row) for row in a] == [run_dir.without_timing(row) for row in b]
    snapshot = "network-snapshot-000000.pkl"
    assert (path / snapshot).read_bytes() == (reference / snapshot).read_bytes()
    assert (path / "metric-kd.jsonl").read_text().startswith(metric)  # the end of the short run stays on record
    assert network_pickle.load(path / snapshot).G_ema.z_dim == 8


def test_a_position_in_the_order_of_images_is_found_again() -> None:
    for rank in range(3):
        stream = iter(InfiniteSampler(7, rank, 3, seed=5))
        drawn = [next(stream) for _ in range(200)]
        late = iter(InfiniteSampler(7, rank, 3, seed=5, start=120))
        assert [next(late) for _ in range(80)] == drawn[120:]


def test_a_state_from_before_there_were_rollbacks_goes_on_and_a_lacking_one_is_named(pictures, tmp_path) -> None:
    settings = config(pictures, tmp_path, schedule=ScheduleConfig(kimg=0.004))
    state = checkpoint.read(checkpoint.find(finetune.run(settings, say=quiet))[0])
    del state["progress"]["num_rollbacks"]
    run = finetune.build_run(finetune.prepare(settings), tmp_path, state=state)
    assert run.progress.num_rollbacks == 0 and run.progress.cur_nimg == 4
    del state["progress"]["step"]
    with pytest.raises(checkpoint.StateError, match="does not fit this run: 'step'"):
        finetune.build_run(finetune.prepare(settings), tmp_path, state=state)


def test_a_restored_run_has_the_state_it_was_given(pictures, tmp_path) -> None:
    """Everything, ADA's open sums among it, which only rarely tip a scale."""
    settings = config(pictures, tmp_path, schedule__kimg=0.024, loss=LossConfig(name="rooted", k="1.5:3@0.04"))
    state = checkpoint.read(checkpoint.find(finetune.run(settings, say=quiet))[0])
    assert state["ada"]["sums"] and any(state["stats"]["sums"]) and state["data"]["drawn"] == 24
    run = finetune.build_run(finetune.prepare(settings), tmp_path, state=state)
    assert_same_state(checkpoint.capture(run), state)
    run.ada.load_state_dict(state["ada"], share=0.0)  # as processes but the first do
    assert run.ada.state_dict()["sums"] == [0, 0]


def test_several_processes_go_on_exactly_and_one_goes_on_for_them(pictures, tmp_path) -> None:
    def train(outdir: str, kimg: float):
        settings = config(pictures, tmp_path / outdir, schedule__kimg=kimg, metric=MetricConfig(metrics=("none",)))
        return lambda rank: finetune.run(settings, say=quiet)

    (reference,) = set(run_processes(tmp_path / "1", 2, train("whole", 0.036)))
    (path,) = set(run_processes(tmp_path / "2", 2, train("pieces", 0.020)))
    (alone,) = set(run_processes(tmp_path / "3", 2, train("alone", 0.020)))
    assert set(run_processes(tmp_path / "4", 2, train("pieces", 0.036))) == {path}
    assert train("alone", 0.036)(0) == alone
    snapshot = "network-snapshot-000000.pkl"
    assert (path / snapshot).read_bytes() == (reference / snapshot).read_bytes()
    # Sums of several processes are put together when a state is saved, so figures may differ in their last digit.
    rows = [run_dir.read_jsonl(p / "stats.jsonl") for p in (path, reference)]
    for ours, theirs in zip(*rows, strict=True):
        for name, figure in run_dir.without_timing(theirs).items():
            assert ours[name] == (pytest.approx(figure, rel=1e-12) if name != "state" else figure), name
    ours, theirs = (network_pickle.load(p / snapshot) for p in (alone, reference))
    for name in ("G", "D", "G_ema"):
        other = getattr(theirs, name).state_dict()
        for key, value in getattr(ours, name).state_dict().items():
            assert_close(value, other[key], 1e-5, f"{name}.{key}")


def test_a_state_of_other_networks_is_refused(pictures, tmp_path) -> None:
    path = finetune.run(config(pictures, tmp_path / "a", schedule=ScheduleConfig(kimg=0.004)), say=quiet)
    state = checkpoint.read(checkpoint.find(path)[0])
    wider = config(pictures, tmp_path / "b", network=NetworkConfig(channel_base=128, channel_max=16, z_dim=8, w_dim=8))
    with pytest.raises(checkpoint.StateError, match="does not fit this run"):
        finetune.build_run(finetune.prepare(wider), tmp_path, state=state)


def test_writing_is_atomic_and_flushed(tmp_path, monkeypatch) -> None:
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (order.append(name), original(*a))[1])
    checkpoint.write(tmp_path / "training-state-000000001.pt", {"format": 1})
    assert order == ["fsync", "replace", "fsync"]
    assert checkpoint.read(tmp_path / "training-state-000000001.pt") == {"format": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["training-state-000000001.pt"]
