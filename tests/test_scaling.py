"""One run on one, two and three processes: the same losses and weights; and the command as torchrun starts it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from helpers import assert_close
from processes import run_processes

from stylegan_rooted import evaluation, finetune
from torch_utils import distributed
from torch_utils.distributed import DistEnv
from training import network_pickle, run_dir
from training.config import (
    AugmentConfig,
    FinetuneConfig,
    LossConfig,
    MetricConfig,
    OptimConfig,
    ScheduleConfig,
)

ROUND_OFF = 1e-5  # of a tensor's largest value, after 8 steps of Adam: only the order of sums differs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Thirteen: no number of processes shares them evenly."""
    return runs.write_pictures(tmp_path_factory.mktemp("pictures"), 13)


def config_for(pictures: Path, outdir: Path, **changes) -> FinetuneConfig:
    """Eight steps of 12 images in micro-batches of 2, with everything on that could depend on the split."""
    settings = runs.tiny(
        pictures,
        outdir,
        data__mirror=True,
        loss=LossConfig(name="rooted"),
        augment=AugmentConfig(aug="ada", augpipe="bgc", target=0.0, ada_kimg=0.5),
        optim=OptimConfig(batch=12, batch_gpu=2, g_reg_interval=2, d_reg_interval=4, freezed=1),
        schedule=ScheduleConfig(kimg=0.096, tick=0.024, snap=100),
    )
    return settings.replace(**changes)


def run_on(world: int, config: FinetuneConfig, folder: Path) -> tuple[Path, list[list[str]]]:
    """The run's folder, and what each process said."""

    def member(rank: int) -> tuple[Path, list[str]]:
        said: list[str] = []
        return finetune.run(config, say=said.append), said

    results = run_processes(folder, world, member)
    assert all(isinstance(result, tuple) for result in results), results
    assert len({path for path, _ in results}) == 1
    return results[0][0], [said for _, said in results]


def weights(path: Path) -> dict[str, torch.Tensor]:
    networks = network_pickle.load(path / "network-snapshot-000000.pkl")
    names = ("G", "D", "G_ema", "augment_pipe")
    return {f"{n}.{key}": value for n in names for key, value in getattr(networks, n).state_dict().items()}


def files(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if not p.name.startswith("events.")}


def test_one_two_and_three_processes_train_the_same(pictures, tmp_path) -> None:
    alone = finetune.run(config_for(pictures, tmp_path / "1"), say=lambda text: None)
    expected, rows = weights(alone), run_dir.read_jsonl(alone / "stats.jsonl")
    for world in (2, 3):
        path, said = run_on(world, config_for(pictures, tmp_path / str(world)), tmp_path / f"results{world}")
        assert path.name == alone.name.replace("auto1", f"auto{world}") and files(path) == files(alone)
        assert any(f"{world} processes (gloo)" in line for line in said[0])
        assert not any(said[1:])
        actual = weights(path)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(actual[name], value, ROUND_OFF, f"{world} processes, {name}")
        others = run_dir.read_jsonl(path / "stats.jsonl")
        assert len(others) == len(rows)
        for row, other in zip(rows, others):
            for name in row:
                if name.startswith(("Loss/", "Progress/")) and "/max_slope/" not in name and "/top1_" not in name:
                    assert other[name]["mean"] == pytest.approx(row[name]["mean"], rel=ROUND_OFF, abs=ROUND_OFF), name
            assert other["Loss/scores/real"]["num"] == row["Loss/scores/real"]["num"]
    assert expected["augment_pipe.p"] > 0


def test_a_process_that_drifts_is_found_at_the_next_tick(pictures, tmp_path, monkeypatch) -> None:
    original = finetune.build_run

    def drifting(*args, **kwargs):
        run = original(*args, **kwargs)
        step = run.phases[0].opt.step

        def step_and_drift():
            step()
            if run.env.rank == 1 and run.progress.step == 3:
                run.G_ema.mapping.w_avg[0] += 1e-3
                run.D.b8.fromrgb.weight[0] += 1e-3  # frozen: a buffer

        run.phases[0].opt.step = step_and_drift
        return run

    monkeypatch.setattr(finetune, "build_run", drifting)
    config = config_for(pictures, tmp_path / "out")

    def member(rank: int):
        return finetune.run(config, say=lambda text: None)

    first, second = run_processes(tmp_path / "results", 2, member)
    assert isinstance(first, distributed.ProcessFailed) and str(second) == ""
    assert str(first).startswith("rank 1 differs from rank 0 at 0.06 kimg in 1 of ")
    assert str(first).endswith(": D.b8.fromrgb.weight")  # G_ema's buffers are copied from G's at every step


def test_processes_with_other_options_or_data_are_refused(pictures, tmp_path) -> None:
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for file in sorted(pictures.iterdir())[:9]:
        (fewer / file.name).write_bytes(file.read_bytes())

    def member(rank: int):
        config = config_for(fewer if rank else pictures, tmp_path / "out", runtime__seed=rank)
        return finetune.run(config, say=lambda text: None)

    first, second = run_processes(tmp_path / "results", 2, member)
    assert "rank 1 differs from rank 0 at the start" in str(first) and str(second) == ""
    assert "option runtime.seed" in str(first) and "number of images" in str(first)
    assert not (tmp_path / "out").exists()


def test_a_snapshot_that_cannot_be_written_ends_all_processes(pictures, tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "snapshot.pkl")

    monkeypatch.setattr(network_pickle, "save", full)
    config = config_for(pictures, tmp_path / "out")
    results = run_processes(tmp_path / "results", 2, lambda rank: finetune.run(config, say=lambda text: None))
    assert [type(result) for result in results] == [distributed.ProcessFailed] * 2
    assert [str(result) for result in results] == ["rank 0: snapshot.pkl: No space left on device", ""]


def test_a_batch_too_small_for_the_processes_names_the_options(pictures, tmp_path) -> None:
    config = config_for(pictures, tmp_path, optim__batch_gpu=6)
    with pytest.raises(ValueError, match="--batch 12 with --batch-gpu 6 is work for 2 of the 3 processes"):
        finetune.prepare(config, DistEnv("cpu", 0, 3, pulse=object()))


def test_the_command_under_torchrun(pictures, tmp_path) -> None:
    command = [
        *[sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"],
        *["stylegan_rooted", "finetune", "--resume", "none", "--data", str(pictures), "--outdir", str(tmp_path / "o")],
        *["--cbase", "64", "--cmax", "8", "--zdim", "8", "--wdim", "8", "--batch", "8", "--kimg", "0.016"],
        *["--metrics", "none", "--grid", "2x2", "--device", "cpu"],
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr.count("Run folder: ") == 1
    (path,) = (tmp_path / "o").iterdir()
    assert "auto2" in path.name and (path / "network-snapshot-000000.pkl").is_file()


def test_augmentation_follows_the_scores_of_all_processes(tmp_path) -> None:
    """Rank 0 sees positive scores only, the mean over both is negative: p falls for both."""

    def member(rank: int) -> float:
        with distributed.start(distributed.place(), torch.device("cpu"), timeout_sec=20) as env:
            _, ada = finetune.build_augmentation(AugmentConfig(target=0.0, ada_kimg=1.0), env.device, env)
            ada.p = 0.5
            ada.observe(torch.ones(2) if rank == 0 else -torch.ones(6))
            return ada.update(16, 4)

    assert run_processes(tmp_path, 2, member) == [pytest.approx(0.436)] * 2


def test_measurements_are_shared_and_do_not_depend_on_the_number_of_processes(pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluation, "BATCH", 4)
    counted = tmp_path / "counted"
    original = evaluation.extractor_for

    def counting(*args):
        extractor = original(*args)

        class Counting:
            name, digest, resize = extractor.name, extractor.digest, extractor.resize
            headline, num_features = extractor.headline, extractor.num_features

            def __call__(self, batch):
                with counted.open("a") as f:
                    f.write(f"{os.environ.get('RANK', 'alone')}:{len(batch)}\n")
                return extractor(batch)

        return Counting()

    monkeypatch.setattr(evaluation, "extractor_for", counting)
    figures = {}
    for world in (1, 3):
        if (tmp_path / "cache").exists():
            shutil.rmtree(tmp_path / "cache")
        counted.write_text("")
        config = config_for(
            pictures,
            tmp_path / str(world),
            metric=MetricConfig(num=14),
            schedule=ScheduleConfig(kimg=0.012, tick=0.012, snap=1),
        )
        path = run_on(world, config, tmp_path / f"results{world}")[0] if world > 1 else finetune.run(config, say=print)
        rows = [run_dir.read_jsonl(path / f"metric-{name}.jsonl")[-1] for name in ("fd", "kd")]
        assert [row["num_gpus"] for row in rows] == [world, world]
        assert [row["provenance"]["num_fake"] for row in rows] == [14, 14]
        figures[world] = [next(iter(row["results"].values())) for row in rows]
        shares = counted.read_text().split()
        if world == 3:  # 13 reals and 14 fakes in batches of 4: four batches each, in turn
            assert sorted(shares) == sorted(["0:4", "0:1", "1:4", "2:4"] + ["0:4", "0:2", "1:4", "2:4"])
    assert figures[3] == pytest.approx(figures[1], rel=1e-4)


def test_a_measurement_that_fails_in_one_process_ends_nothing(pictures, tmp_path, monkeypatch) -> None:
    original = evaluation.extractor_for

    def broken(*args):
        if os.environ.get("RANK") == "1":
            raise RuntimeError("no memory for the detector")
        return original(*args)

    monkeypatch.setattr(evaluation, "extractor_for", broken)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    path, said = run_on(2, config_for(pictures, tmp_path / "o", metric=MetricConfig(num=4)), tmp_path / "results")
    assert (path / "network-snapshot-000000.pkl").is_file() and not list(path.glob("metric-*"))
    assert any("Metrics left out: rank 1: RuntimeError: no memory for the detector" in line for line in said[0])
