"""The command `compare`, end to end on networks of 8x8 pixels: fairness, resuming, sharing, failures, its files."""

import dataclasses
import gc
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import quiet
from test_finetune import SCRATCH, run_cli, tiny, weights

from stylegan_rooted import arms, compare, finetune
from training import run_dir
from training.config import AugmentConfig, MetricConfig
from training.loss import GanLoss
from training.training_loop import TrainingDiverged

METRIC = MetricConfig(metrics=("fid", "kid"), num=8)


def request(pictures: Path, outdir: Path, losses: str = "logistic,rooted:k=2", seeds: str = "0-1", **changes):
    grid = changes.pop("grid", ())
    config = tiny(pictures, outdir, metric=METRIC, schedule__kimg=0.008).replace(**changes)
    return compare.Request(config, arms.parse_losses(losses, config.loss), arms.parse_seeds(seeds), grid=grid)


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """A comparison collects garbage before every run; what other tests have left is not to be looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def compared(pictures, tmp_path_factory) -> Path:
    """The folder of a comparison of two arms on two seeds, made by the command."""
    folder = tmp_path_factory.mktemp("compare") / "c"
    assert run_cli("compare", *options(pictures, folder)) == 0
    return folder


def options(pictures: Path, folder: Path) -> list[object]:
    schedule = ["--kimg", "0.016", "--tick", "0.008", "--snap", "1", "--metric-num", "8", "--grid", "2x2"]
    return [
        "--losses",
        "logistic,rooted:k=2",
        "--seeds",
        "0-1",
        "--data",
        pictures,
        "--outdir",
        folder,
        *SCRATCH,
        *schedule,
    ]


def files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*.*")
        if p.is_file()
    }


def test_what_it_leaves(compared) -> None:
    assert {p.name for p in compared.iterdir()} == {"runs", "compare.json", "compare.md", "compare.html"}
    assert {p.name for p in (compared / "runs").iterdir()} == {
        "logistic-s0",
        "logistic-s1",
        "rooted-k2-s0",
        "rooted-k2-s1",
    }
    results = json.loads((compared / "compare.json").read_text())
    assert results["baseline"] == "logistic" and results["seeds"] == [0, 1] and results["judged_by"] in ("fd", "kd")
    assert [run["status"] for run in results["runs"]] == ["finished"] * 4
    assert {"fd", "kd", "density", "coverage", "memorisation"} <= set(results["figures"])
    for run in results["runs"]:
        assert [kimg for kimg, _ in run["curves"]["fd"]] == [0.004, 0.012, 0.016]
        assert run["sec_per_kimg"] > 0 and 0.05 < run["peak_gib"] < 8
    # Last snapshots are measured with one seed, which is that of run 0; on the way with the run's own.
    like_the_run = [run["final"]["fd"]["value"] == run["curves"]["fd"][-1][1] for run in results["runs"]]
    assert like_the_run == [True, True, False, False]
    (row,) = [row for row in results["differences"] if row["figure"] == results["judged_by"]]
    final = {(r["arm"], r["seed"]): r["final"][results["judged_by"]]["value"] for r in results["runs"]}
    wanted = [final["rooted:k=2", seed] - final["logistic", seed] for seed in (0, 1)]
    assert list(row["per_seed"].values()) == wanted and row["n"] == 2 and row["mean"] == pytest.approx(sum(wanted) / 2)
    assert results["verdict"].startswith("Verdict (final ") and "2 pairs are few" in results["verdict"]
    assert results["shared"]["loss"]["gamma"] is not None and len(results["data"]["sha256"]) == 64


def test_its_pages(compared) -> None:
    results = json.loads((compared / "compare.json").read_text())
    text, page = (compared / "compare.md").read_text(), (compared / "compare.html").read_text()
    assert f"**{results['verdict']}**" in text and "## Paired differences" in text
    rows = [line for line in text.splitlines() if line.startswith("| logistic ") or line.startswith("| rooted:k=2 ")]
    assert len(rows) >= 4
    assert results["verdict"] in page and page.count("<svg") == 2 and "<polygon" in page
    assert "<script" not in page and "http://" not in page and "https://" not in page and "src=" not in page


def test_the_same_command_repeats_nothing(compared, pictures, capsys) -> None:
    before = {k: v for k, v in files(compared).items() if not k.startswith("compare.")}
    assert run_cli("compare", *options(pictures, compared)) == 0
    assert "4 of 4 runs are done already" in capsys.readouterr().err
    assert {k: v for k, v in files(compared).items() if not k.startswith("compare.")} == before


def test_other_settings_in_its_place_are_refused_by_name(compared, pictures, capsys) -> None:
    before = files(compared)
    assert run_cli("compare", *options(pictures, compared), "--kimg", "0.02", "--gamma", "3") == 1
    error = capsys.readouterr().err
    assert "logistic-s0 holds another run" in error and "--kimg 0.016, now 0.02" in error and "--gamma" in error
    assert files(compared) == before


def test_dry_run(compared, pictures, tmp_path, capsys) -> None:
    assert run_cli("compare", *options(pictures, compared), "--seeds", "0-2", "--dry-run") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == ["arm", "seed", "0", "seed", "1", "seed", "2"]
    assert lines[1].split() == ["logistic", "finished", "finished", "to", "do"]
    assert "2 arms x 3 seeds = 6 runs; 2 to do" in out and "sec/kimg" in out
    assert not (compared / "runs" / "logistic-s2").exists()
    grid = ["--tune", "gamma=1,2", "--outdir", tmp_path / "new"]
    assert run_cli("compare", *options(pictures, compared), *grid, "-n") == 0
    assert "after 2 arms x 2 settings = 4 runs that choose; 8 to do" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--losses", "logistic"], "names one arm"),
        (["--losses", "logistic,hinge"], "'hinge' is no arm"),
        (["--losses", "logistic,rooted:tail=500"], "--tail-at 500.0 is out of range"),
        (["--seeds", "x"], "--seeds"),
        (["--metrics", "none"], "nothing could be compared"),
        (["--tune-kimg", "1"], "--tune-kimg is for --tune"),
        (["--tune", "gamma=1,2", "--losses", "logistic,rooted:gamma=3"], "rooted:k=2,gamma=3 sets its own"),
        (["--tune", "gamma=1,2", "--tune-seed", "1"], "is one of --seeds"),
        (["--only", "3/2"], "--only 3/2"),
        (["--seed", "1"], "No such option"),
    ],
)
def test_wrong_usage(pictures, tmp_path, capsys, extra, message) -> None:
    assert run_cli("compare", *options(pictures, tmp_path / "o"), *extra) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_arms_see_equal_draws(pictures, tmp_path, monkeypatch) -> None:
    """Images, labels, latents and the state of the generator behind noise and augmentation, step by step."""
    seen: dict[str, list[str]] = {}
    original = GanLoss.accumulate_gradients

    def record(self, phase, real_img, real_c, gen_z, gen_c, *, gain):
        digest = hashlib.sha256(phase.encode())
        for value in (real_img, real_c, gen_z, gen_c, torch.get_rng_state()):
            digest.update(value.numpy().tobytes())
        seen.setdefault(type(self.adversarial).__name__, []).append(digest.hexdigest())
        return original(self, phase, real_img, real_c, gen_z, gen_c, gain=gain)

    monkeypatch.setattr(GanLoss, "accumulate_gradients", record)
    compare.run(
        request(pictures, tmp_path, seeds="3", augment=AugmentConfig(aug="fixed", p=0.5), schedule__kimg=0.016),
        say=quiet,
    )
    logistic, rooted = seen["LogisticLoss"], seen["RootedLogisticLoss"]
    assert logistic == rooted and len(set(logistic)) == len(logistic) >= 8


class Bar:
    def __init__(self, length: int) -> None:
        self.length, self.done = length, 0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, num: int) -> None:
        self.done += num


def test_arms_with_one_loss_end_in_equal_bytes(pictures, tmp_path) -> None:
    """A schedule from 2 to 2 is k = 2; and what ends equal started from equal weights."""
    asked = request(pictures, tmp_path, "rooted:k=2,rooted:k=2:2@1", seeds="0")
    bars: list[Bar] = []
    compare.run(asked, say=quiet, progress_bar=lambda length: bars.append(Bar(length)) or bars[0])
    assert [(bar.length, bar.done) for bar in bars] == [(16, 16)]
    one, two = (compare.run_path(tmp_path / "runs" / f"rooted-k2{x}-s0") for x in ("", "-2-1"))
    assert one.name != two.name
    a, b = (weights(path / "network-snapshot-000000.pkl") for path in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)
    results = json.loads((tmp_path / "compare.json").read_text())
    assert {row["mean"] for row in results["differences"]} == {0.0}


def test_a_stopped_comparison_goes_on_and_ends_the_same(compared, pictures, tmp_path, monkeypatch) -> None:
    original, steps = finetune.RunHooks.should_stop, 0

    def stop(self, run):
        nonlocal steps
        steps += 1
        if steps == 6:  # in the second run
            self.stop_requested = "SIGTERM"
        return original(self, run)

    monkeypatch.setattr(finetune.RunHooks, "should_stop", stop)
    command = ["compare", *options(pictures, tmp_path), "--seeds", "0"]
    assert run_cli(*command) == 143 and not (tmp_path / "compare.json").exists()
    assert run_cli(*command) == 0
    ours, theirs = (json.loads((folder / "compare.json").read_text()) for folder in (tmp_path, compared))
    assert [run["final"] for run in ours["runs"]] == [run["final"] for run in theirs["runs"][:2]]
    assert [run["curves"] for run in ours["runs"]] == [run["curves"] for run in theirs["runs"][:2]]


def test_a_stop_while_the_last_snapshot_is_measured_stops_all_and_loses_no_point(
    compared, pictures, tmp_path, monkeypatch
) -> None:
    """Training was over by then, so the signal was taken for done with: the next run began, a figure short."""
    original = finetune.RunHooks._measure

    def measure(self, evaluator, run):
        if run.progress.finished:
            self.stop_requested = "SIGTERM"
        return original(self, evaluator, run)

    command = ["compare", *options(pictures, tmp_path), "--seeds", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(finetune.RunHooks, "_measure", measure)
        assert run_cli(*command) == 143
        assert [p.name for p in (tmp_path / "runs").iterdir()] == ["logistic-s0"]
    assert run_cli(*command) == 0
    ours, theirs = (json.loads((folder / "compare.json").read_text()) for folder in (tmp_path, compared))
    assert [run["curves"] for run in ours["runs"]] == [run["curves"] for run in theirs["runs"][:2]]
    assert [run["final"] for run in ours["runs"]] == [run["final"] for run in theirs["runs"][:2]]


def test_what_cannot_be_measured_is_not_trained(pictures, tmp_path, capsys) -> None:
    """All runs were trained first, and then counted as failures of their arms."""
    for extra, message in (
        (["--detector", "torchscript", "--detector-file", tmp_path / "no.pt"], "no.pt is no file"),
        (["--reference", tmp_path / "no.npz"], "no.npz: No such file"),
        (["--metrics", "fid,memorisation", "--held-out", tmp_path / "no"], "no such folder"),
    ):
        assert run_cli("compare", *options(pictures, tmp_path / "o"), *extra) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_the_content_of_images_and_network_makes_another_run(pictures, tmp_path) -> None:
    """Not their path: moved images are the same run, changed ones in the same place are not."""
    mine = Path(shutil.copytree(pictures, tmp_path / "mine"))
    plan = compare.Planned.of(request(mine, tmp_path / "o", seeds="0"), {})
    job = plan.jobs(None)[0]
    job.folder.mkdir(parents=True)
    run_dir.write_json(job.folder / compare.RUN_FILE, {"fingerprint": plan.fingerprint(job)})
    moved = compare.Planned.of(request(pictures, tmp_path / "o", seeds="0"), {})
    assert moved.record(moved.jobs(None)[0]) is None
    with pytest.raises(ValueError, match="--resume: its content was another"):
        dataclasses.replace(plan, pickle_sha256="0" * 64).record(job)
    shutil.copy(mine / "00.png", mine / "01.png")
    changed = compare.Planned.of(request(mine, tmp_path / "o", seeds="0"), {})
    with pytest.raises(ValueError, match="logistic-s0 holds another run: --data: its content was another"):
        changed.record(changed.jobs(None)[0])


def test_the_content_of_a_reference_makes_another_run(pictures, tmp_path) -> None:
    file, asked = tmp_path / "r.npz", request(pictures, tmp_path / "o", seeds="0")
    asked = dataclasses.replace(asked, config=asked.config.replace(metric__reference=str(file)))
    for scale in (1.0, 2.0):
        np.savez(file, mu=np.zeros(96), sigma=scale * np.eye(96))
        plan = compare.Planned.of(asked, {})
        job = plan.jobs(None)[0]
        if scale == 1.0:
            job.folder.mkdir(parents=True)
            run_dir.write_json(job.folder / compare.RUN_FILE, {"fingerprint": plan.fingerprint(job)})
            assert plan.record(job) is None
    with pytest.raises(ValueError, match="holds another run: metric.reference: its content was another"):
        plan.record(job)


def test_a_run_in_other_hands_is_said(pictures, tmp_path, monkeypatch) -> None:
    def busy(config, **options):
        raise BlockingIOError(11, "is being trained by process 1 on x; or start another run with --restart", "folder")

    monkeypatch.setattr(finetune, "execute", busy)
    with pytest.raises(BlockingIOError, match=r"give each process its share \(--only i/n\): .*logistic-s0"):
        compare.run(request(pictures, tmp_path, seeds="0"), say=quiet)


def test_shares_are_merged(pictures, tmp_path) -> None:
    said: list[str] = []
    asked = request(pictures, tmp_path, seeds="0")
    assert compare.run(asked, say=said.append, only=(1, 2)).results is None
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"logistic-s0"}
    assert said[-1].startswith("1 of 2 runs are left to do") and not (tmp_path / "compare.json").exists()
    assert compare.run(asked, say=said.append, only=(2, 2)).results is None
    said.clear()
    assert compare.run(asked, say=said.append).results is not None
    assert said[0] == "2 of 2 runs are done already"


def test_shares_are_whole_and_keep_seeds_together() -> None:
    for num, n in ((9, 3), (9, 2), (4, 7), (0, 2)):
        parts = [compare.share(num, (i, n)) for i in range(1, n + 1)]
        assert [i for part in parts for i in part] == list(range(num)) == list(compare.share(num, None))
    assert list(compare.share(9, (2, 3))) == [3, 4, 5]  # with three arms: the second seed, all arms


def test_shares_of_tuning_wait_for_each_other(pictures, tmp_path, monkeypatch) -> None:
    done: list[str] = []

    def pretend(self, job, say, bar):
        job.folder.mkdir(parents=True)
        value = {"logistic": {"gamma=1": 3.0, "gamma=2": 2.0}}.get(job.arm.name, {}).get(job.point.name, 1.0)
        record = {"arm": job.arm.name, "seed": job.seed, "setting": job.point.name, "status": "finished", "kimg": 1.0}
        record |= {"reason": None, "headline": "fd", "final": {"fd": {"value": value}}, "sec_per_kimg": 1.0}
        run_dir.write_json(job.folder / compare.RUN_FILE, {"fingerprint": self.fingerprint(job)})
        run_dir.write_json(job.folder / compare.RESULT_FILE, record)
        done.append(
            f"{job.arm.name} {job.point.name} {job.seed} {job.config.loss.gamma:g} {job.config.schedule.kimg:g}"
        )
        return record

    monkeypatch.setattr(compare.Planned, "_do", pretend)
    asked = request(pictures, tmp_path, seeds="0", grid=arms.parse_grid("gamma=1,2"))
    asked = dataclasses.replace(asked, tune_kimg=0.004)
    said: list[str] = []
    compare.run(asked, say=said.append, only=(2, 2))
    assert done == ["logistic gamma=2 1000000 2 0.004", "rooted:k=2 gamma=2 1000000 2 0.004"]
    assert said[-1].startswith("Settings are not all tried yet")
    assert "8 to do" not in compare.outline(asked) and "4 to do" in compare.outline(asked)
    compare.run(asked, say=said.append, only=(1, 2))
    edge = " (gamma at the grid's edge: a better one may lie beyond)"
    assert f"Chosen for logistic: gamma=2{edge}" in said and f"Chosen for rooted:k=2: gamma=1{edge}" in said
    assert done[-1] == "logistic gamma=2 0 2 0.008" and len(done) == 5
    assert "2 runs, after 2 arms x 2 settings = 4 runs that choose; 1 to do" in compare.outline(asked)


def test_a_run_that_never_began_is_a_failure(pictures, tmp_path, monkeypatch) -> None:
    def fail(config, **options):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(finetune, "execute", fail)
    results = compare.run(request(pictures, tmp_path, seeds="0"), say=quiet).results
    assert [run["reason"] for run in results["runs"]] == ["RuntimeError: no kernel for this"] * 2
    assert results["verdicts"][0]["outcome"] == "no pair"

    def break_down(config, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(finetune, "execute", break_down)
    with pytest.raises(torch.OutOfMemoryError):  # the machine's fault says nothing of the arm
        compare.run(request(pictures, tmp_path / "b", seeds="0"), say=quiet)
    assert not list(tmp_path.glob("b/runs/*/result.json"))


def test_failures_are_results(pictures, tmp_path, monkeypatch) -> None:
    original = finetune.execute

    def fail(config, **options):
        if config.loss.name == "rooted" and config.runtime.seed == 1:
            original(config.replace(schedule__kimg=0.004), **options)
            raise TrainingDiverged("weights are not finite any more")
        return original(config, **options)

    monkeypatch.setattr(finetune, "execute", fail)
    results = compare.run(request(pictures, tmp_path, seeds="0-1"), say=quiet).results
    assert results is not None
    (failed,) = [run for run in results["runs"] if run["status"] == "failed"]
    assert (failed["arm"], failed["seed"], failed["final"]) == ("rooted:k=2", 1, {})
    assert failed["reason"] == "TrainingDiverged: weights are not finite any more" and failed["kimg"] == 0.004
    assert results["arms"][1]["num_finished"] == 1 and results["differences"][0]["n"] == 1
    (told,) = results["verdicts"]
    assert "1 of 2 of rooted:k=2 and 0 of logistic" in told["text"] and "flatters" in told["text"]
    assert "| rooted:k=2 | 1 | TrainingDiverged" in (tmp_path / "compare.md").read_text()
    monkeypatch.setattr(finetune, "execute", original)
    asked = request(pictures, tmp_path, seeds="0-1")
    assert compare.run(asked, say=quiet).results["runs"][3]["status"] == "failed"  # a result, not repeated
    assert compare.run(asked, say=quiet, retry_failed=True).results["runs"][3]["status"] == "finished"


def test_equal_tuning(pictures, tmp_path) -> None:
    said: list[str] = []
    asked = request(pictures, tmp_path, seeds="0", grid=arms.parse_grid("lr=0.0001,0.05;gamma=1"))
    results = compare.run(asked, say=said.append).results
    assert results is not None
    tuning = results["tuning"]
    assert len(tuning["runs"]) == 4 and {run["seed"] for run in tuning["runs"]} == {1_000_000}
    for arm in ("logistic", "rooted:k=2"):
        own = [run for run in tuning["runs"] if run["arm"] == arm]
        assert tuning["chosen"][arm]["setting"] == min(own, key=lambda run: run["value"])["setting"]
    (path,) = (tmp_path / "runs" / "rooted-k2-s0").glob("0*")
    trained = json.loads((path / "training_options.json").read_text())
    setting = f"lr={trained['optim']['glr']:g},gamma={trained['loss']['gamma']:g}"
    assert setting == tuning["chosen"]["rooted:k=2"]["setting"] and trained["optim"]["glr"] == trained["optim"]["dlr"]
    assert (tmp_path / "compare.md").read_text().count("| chosen (lr at the grid's edge") == 2


def test_another_length_of_tuning_is_refused_by_its_own_option(pictures, tmp_path) -> None:
    asked = request(pictures, tmp_path, seeds="0", grid=arms.parse_grid("gamma=1,2"))
    plan = compare.Planned.of(asked, {"schedule.kimg": "--kimg"})
    job = plan.tuning_jobs()[0]
    job.folder.mkdir(parents=True)
    run_dir.write_json(job.folder / "run.json", {"fingerprint": plan.fingerprint(job)})
    longer = dataclasses.replace(plan, request=dataclasses.replace(asked, tune_kimg=0.016))
    with pytest.raises(ValueError, match="another run: --tune-kimg 0.008, now 0.016. Give"):
        longer.record(longer.tuning_jobs()[0])


def test_differences_outside_the_loss_are_refused(pictures, tmp_path) -> None:
    config = tiny(pictures, tmp_path)
    other = config.replace(loss__name="rooted", runtime__seed=1, runtime__outdir="x")
    compare.check_fair([config, other])
    with pytest.raises(ValueError, match="optim.batch is 4 in one and 8 in another"):
        compare.check_fair([config, other.replace(optim__batch=8)])
    faster = other.replace(optim__glr=1.0)
    compare.check_fair([config, faster], tuned=True)
    with pytest.raises(ValueError, match="optim.glr"):
        compare.check_fair([config, faster])
    with pytest.raises(ValueError, match="metric.patience is not for a comparison"):
        request(pictures, tmp_path, metric=MetricConfig(patience=2))


def test_settings_resolved_once_are_those_of_every_run(pictures, tmp_path) -> None:
    asked = request(pictures, tmp_path, "logistic:gamma=5,rooted:gamma=7,rooted:k=3", seeds="5")
    plan = compare.Planned.of(asked, {})
    for job in plan.jobs(None):
        assert plan.fingerprint(job)["settings"] == json.loads(
            json.dumps(strip(finetune.prepare(job.config).config.to_dict()))
        )


def strip(settings: dict) -> dict:
    for field in compare.NOT_COUNTED:
        section, _, name = field.rpartition(".")
        (settings[section] if section else settings).pop(name, None)
    return settings


def test_something_else_in_a_runs_place_is_left_alone(pictures, tmp_path) -> None:
    (tmp_path / "runs" / "logistic-s0").mkdir(parents=True)
    (tmp_path / "runs" / "logistic-s0" / ".run.json.tmp").write_text("another share's, half written")
    assert compare.outline(request(pictures, tmp_path)).count("to do") == 5
    (tmp_path / "runs" / "logistic-s0" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        compare.run(request(pictures, tmp_path), say=quiet)
