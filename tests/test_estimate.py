"""What a run will take, and what would fit: timed on its own first steps, without changing what they compute."""

from pathlib import Path

import pytest
import runs
import torch
from processes import run_processes

from stylegan_rooted import cli, estimate, finetune
from training import network_pickle, training_loop
from training.config import FinetuneConfig, OptimConfig, ScheduleConfig


def tiny(pictures: Path, outdir: Path, **changes) -> FinetuneConfig:
    settings = runs.tiny(pictures, outdir, optim=OptimConfig(batch=8, batch_gpu=8))
    return settings.replace(schedule=ScheduleConfig(kimg=0.048, tick=0.016, snap=1)).replace(**changes)


def build(config: FinetuneConfig, path: Path):
    return finetune.build_run(finetune.prepare(config), path)


def run_cli(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
        raise SystemExit(0)
    return int(stop.value.code or 0)


def test_a_run_says_once_what_it_will_take(pictures, tmp_path) -> None:
    said: list[str] = []
    finetune.run(tiny(pictures, tmp_path), say=said.append)
    assert sum(line.startswith("Estimate: ") for line in said) == 1


def test_the_estimate_of_time_is_the_phases_weighted_by_how_often_they_run(pictures, tmp_path) -> None:
    run = build(tiny(pictures, tmp_path, schedule__kimg=1.0), tmp_path)
    stopwatch = estimate.Stopwatch(run)
    training_loop.step(run)
    stopwatch.after_step()
    run.phase_sec.update(Gmain=1.0, Greg=4.0, Dmain=2.0, Dreg=16.0)
    stopwatch.outside_sec = 0.5
    found = stopwatch.estimate()
    assert found.sec_per_kimg == pytest.approx((1 + 4 / 4 + 2 + 16 / 16 + 0.5) / 8 * 1000)
    assert found.left_sec == pytest.approx(found.sec_per_kimg * 0.992)
    assert 0.05 < found.peak_gib < 64 and found.free_gib > 0


def test_sizes_of_files_are_those_that_appear(pictures, tmp_path) -> None:
    path = finetune.run(tiny(pictures, tmp_path, network__channel_max=64, network__channel_base=2048), say=print)
    run = build(tiny(pictures, tmp_path, network__channel_max=64, network__channel_base=2048), tmp_path)
    (snapshot,) = path.glob("network-snapshot-*.pkl")
    (state, *_) = path.glob("training-state-*.pt")
    files = (snapshot, snapshot.with_suffix(".safetensors"))
    assert estimate.snapshot_bytes(run) == pytest.approx(sum(file.stat().st_size for file in files), rel=0.15)
    assert estimate.state_bytes(run) == pytest.approx(state.stat().st_size, rel=0.15)


@pytest.mark.parametrize("keep, wanted", [({}, 4), ({"keep_last": 1}, 2), ({"keep_last": 1, "keep_every": 2}, 4)])
def test_snapshots_are_counted_by_what_is_kept(pictures, tmp_path, keep, wanted) -> None:
    run = build(tiny(pictures, tmp_path, schedule=ScheduleConfig(kimg=48, tick=16, snap=1, **keep)), tmp_path)
    assert estimate.num_snapshots(run, 48_000) == wanted


def test_snapshots_within_one_kimg_are_one_file(pictures, tmp_path) -> None:
    run = build(tiny(pictures, tmp_path, schedule=ScheduleConfig(kimg=2.5, tick=0.016, snap=1)), tmp_path)
    assert [estimate.num_snapshots(run, nimg) for nimg in (0, 48, 1000, 2500)] == [1, 1, 2, 3]
    run = build(tiny(pictures, tmp_path, schedule=ScheduleConfig(kimg=8.2, tick=4, snap=1)), tmp_path)
    assert estimate.num_snapshots(run, 8200) == 3  # 0, 4, and 8.2, which replaces 8


def test_only_the_estimate(pictures, tmp_path, capsys) -> None:
    arguments = ["--resume", "none", "--data", pictures, "--outdir", tmp_path / "o", "--batch", 4, "--device", "cpu"]
    sizes = ["--cbase", 64, "--cmax", 8, "--zdim", 8, "--wdim", 8]
    assert run_cli("finetune", *arguments, *sizes, "--estimate") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Estimate: ") and captured.out.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_an_estimate_before_changes_nothing_of_the_run(pictures, tmp_path) -> None:
    def weights(path: Path) -> list[torch.Tensor]:
        return list(network_pickle.load(path / "network-snapshot-000000.pkl").G.state_dict().values())

    first = weights(finetune.run(tiny(pictures, tmp_path / "a"), say=print))
    finetune.forecast(tiny(pictures, tmp_path / "b"))
    second = weights(finetune.run(tiny(pictures, tmp_path / "b"), say=print))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def limited(loss, most: int, error: Exception):
    """`loss` that has memory for `most` images."""
    original = loss.accumulate_gradients

    def accumulate(phase, real_img, *args, **kwargs):
        if len(real_img) > most:
            raise error
        return original(phase, real_img, *args, **kwargs)

    loss.accumulate_gradients = accumulate


ERRORS = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
]


@pytest.mark.parametrize(
    "error, most, wanted",
    [
        *[(error, 3, "--batch-gpu 2 fits; the batch stays 8") for error in ERRORS],
        (ERRORS[1], 0, "no smaller one fits"),
    ],
)
def test_out_of_memory_says_what_fits(pictures, tmp_path, monkeypatch, error, most, wanted) -> None:
    original = finetune.build_run

    def build_limited(*args, **kwargs):
        run = original(*args, **kwargs)
        limited(run.loss, most, error)
        return run

    monkeypatch.setattr(finetune, "build_run", build_limited)
    attempt = finetune.forecast if most else (lambda config: finetune.run(config, say=print))
    with pytest.raises(estimate.OutOfMemory, match=wanted) as caught:
        attempt(tiny(pictures, tmp_path))
    assert "out of memory with --batch-gpu 8" in str(caught.value)


def test_other_errors_are_left_alone(pictures, tmp_path) -> None:
    run = build(tiny(pictures, tmp_path), tmp_path)
    with pytest.raises(RuntimeError, match="shapes"), estimate.advice(run):
        raise RuntimeError("shapes do not fit")


def test_smaller_micro_batches_suit_the_groups_of_the_discriminator(pictures, tmp_path) -> None:
    run = build(tiny(pictures, tmp_path, optim=OptimConfig(batch=24, batch_gpu=24)), tmp_path)
    assert run.D.b4.mbstd.group_size == 4
    assert estimate.smaller_batches(run) == [12, 8, 4, 3, 2, 1]


def test_what_was_tried_leaves_no_gradients(pictures, tmp_path) -> None:
    run = build(tiny(pictures, tmp_path), tmp_path)
    limited(run.loss, 4, MemoryError())
    assert not estimate.fits(run, 8) and estimate.fits(run, 4)
    assert all(p.grad is None and not p.requires_grad for net in (run.G, run.D) for p in net.parameters())


def test_out_of_memory_in_one_process_ends_all_and_names_it(pictures, tmp_path, monkeypatch) -> None:
    original = finetune.build_run

    def build_limited(*args, **kwargs):
        run = original(*args, **kwargs)
        if run.env.rank == 1:
            limited(run.loss, 2, ERRORS[2])
        return run

    monkeypatch.setattr(finetune, "build_run", build_limited)
    config = tiny(pictures, tmp_path / "o", optim__batch_gpu=4)
    first, second = run_processes(tmp_path / "results", 2, lambda rank: finetune.run(config, say=print))
    assert str(first) == "" and str(second).startswith("rank 1: out of memory with --batch-gpu 4")
    assert "--batch-gpu 2 fits" in str(second)
