"""Measurements of a run: the best snapshot, patience, the time budget, the process beside training."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import quiet
from test_finetune import tiny

from metrics.evaluate import MetricResult
from metrics.features import MetricUnavailable
from stylegan_rooted import evaluation, finetune, measuring
from training import measured, run_dir
from training.config import FinetuneConfig, MetricConfig, ScheduleConfig


def row(name: str, value: float, warning: str | None = None, **changes) -> MetricResult:
    base = MetricResult(name, value, None, 100, 100, "embedded", "d", "r", None, None, None, 0, 1.0, 0.1, warning, name)
    return dataclasses.replace(base, **changes)


def write(path: Path, rows: list[MetricResult], nimg: int) -> None:
    records = evaluation.records(
        rows, snapshot=f"network-snapshot-{nimg // 1000:06d}.pkl", nimg=nimg, seconds=1.0, fingerprint="f"
    )
    for name, record in records:
        run_dir.append_jsonl(path / f"metric-{name}.jsonl", record)


# --- the best snapshot


def test_best_snapshot_and_measurements_since(tmp_path):
    assert measuring.record_best(tmp_path, "auto") is None and not list(tmp_path.iterdir())
    for nimg, fd, kd in ((0, 9.0, 0.5), (4000, 3.0, 0.9), (8000, 4.0, 0.1), (12000, 3.5, 0.2)):
        write(tmp_path, [row("fd", fd), row("kd", kd)], nimg)
    best = measuring.record_best(tmp_path, "auto")
    assert best == measured.Best("fd", 3.0, 0.1, "network-snapshot-000004.pkl", 4.0, 4, 2, 3.0, 4.0)
    assert json.loads((tmp_path / measuring.BEST_FILE).read_text()) == dataclasses.asdict(best)


def test_a_replaced_snapshot_is_not_the_best_but_patience_counts_it(tmp_path):
    for nimg, fd in ((1040, 1.0), (1080, 4.0), (2000, 3.0), (2040, 5.0)):
        write(tmp_path, [row("fd", fd)], nimg)
    best = measured.best_of(tmp_path)
    assert (best.snapshot, best.kimg, best.value) == ("network-snapshot-000001.pkl", 1.08, 4.0)
    assert (best.num_measured, best.since, best.lowest, best.lowest_kimg) == (4, 3, 1.0, 1.04)
    # A snapshot that was replaced by one without figures has none, either.
    run_dir.write_json(tmp_path / "network-snapshot-000001.config.json", {"training": {"kimg": 1.12}})
    assert measuring.record_best(tmp_path, "auto").snapshot == "network-snapshot-000002.pkl"
    run_dir.write_json(tmp_path / "network-snapshot-000002.config.json", {"training": {"kimg": 2.08}})
    assert measuring.record_best(tmp_path, "auto") is None and not (tmp_path / measuring.BEST_FILE).exists()


def test_kernel_distance_leads_where_images_are_few(tmp_path):
    for nimg, fd, kd in ((0, 9.0, 0.5), (4000, 3.0, 0.9)):
        write(tmp_path, [row("fd", fd, "too few"), row("kd", kd)], nimg)
    best = measured.best_of(tmp_path)
    assert best is not None and (best.metric, best.snapshot, best.since) == ("kd", "network-snapshot-000000.pkl", 1)
    assert measured.best_of(tmp_path, "fid").snapshot == "network-snapshot-000004.pkl"  # asked for in spite of that
    write(tmp_path, [row("fid", 1.0)], 8000)
    with open(tmp_path / "metric-fid.jsonl", "a") as f:
        f.write('{"results": {"fid": "x"}}\n[1]\n{"results": {"fid": null}, "kimg": 1}\n')
    assert measured.best_of(tmp_path).metric == "fid" and measured.distances(tmp_path) == ("fid", [1.0])
    write(tmp_path, [row("fd", 5.0), row("kd", 0.7)], 12000)  # back to the other detector: its figures decide
    assert (measured.best_of(tmp_path).metric, measured.best_of(tmp_path).num_measured) == ("fd", 1)
    assert measured.distances(tmp_path) == ("fd", [9.0, 3.0, 5.0])


def test_a_snapshot_whose_figures_are_still_to_come_is_spared(tmp_path):
    for number in (0, 4, 8):
        for ending in ("pkl", "safetensors", "config.json"):
            (tmp_path / f"network-snapshot-{number:06d}.{ending}").write_bytes(b"")
        (tmp_path / f"adapter-{number:06d}.safetensors").write_bytes(b"")
    (tmp_path / ".measuring-4012.pkl").write_bytes(b"")
    assert measured.pending(tmp_path) == {"network-snapshot-000004.pkl"}
    run_dir.prune_snapshots(tmp_path, 1, measured.pending(tmp_path))
    assert len(list(tmp_path.glob("*00004.*"))) == len(list(tmp_path.glob("*00008.*"))) == 4
    assert not list(tmp_path.glob("*00000.*"))


def test_records_keep_the_familys_figures_together():
    pr = [row("pr50k3_full_precision", 0.7, metric="pr50k3_full"), row("pr50k3_full_recall", 0.4, metric="pr50k3_full")]
    score = row("is50k_mean", 9.0, metric="is50k", spread=0.2)
    records = dict(
        evaluation.records([*pr, score, row("fd", 1.0)], snapshot="s", nimg=4000, seconds=61, fingerprint="f")
    )
    assert set(records) == {"pr50k3_full", "is50k", "fd"}
    assert records["pr50k3_full"]["results"] == {"pr50k3_full_precision": 0.7, "pr50k3_full_recall": 0.4}
    assert records["is50k"]["results"] == {"is50k_mean": 9.0, "is50k_std": 0.2}
    assert {"metric", "total_time", "total_time_str", "num_gpus", "snapshot_pkl", "timestamp"} <= set(records["fd"])
    assert records["fd"]["errors"] == {"fd": 0.1} and records["fd"]["total_time_str"] == "1m 01s"


# --- the budget


def budget(said: list[str], **changes) -> measuring.Budget:
    return measuring.Budget(**{"share": 0.05, "interval_nimg": 4000, "most": 1000, "say": said.append, **changes})


def test_budget_chooses_the_number_and_says_so():
    said: list[str] = []
    assert budget(said).num_for(20, 0.05, 400) == 400
    assert said == [
        "Metrics: 400 generated images keep within 0.05 of the training time (0.05 s each, 400 s of training between "
        "snapshots)"
    ]
    assert budget(said).num_for(1000, 0.05, 400) == 1000  # --metric-num is the most
    assert budget(said).num_for(1, 0.05, 20) == measuring.MIN_NUM and "even 100 images exceed" in said[-1]


def test_budget_waits_for_a_snapshot_interval_then_keeps_its_number(monkeypatch):
    said: list[str] = []
    b = budget(said, start=time.monotonic() - 400)
    with pytest.raises(MetricUnavailable, match="from the next snapshot on"):
        b.choose(None, None, seen_nimg=4, last=False)
    monkeypatch.setattr(measuring, "probe", lambda evaluator, G: 0.05)
    assert b.choose(None, None, seen_nimg=4000, last=False) == pytest.approx(400, abs=2)
    chosen, b.spent_sec = b.num, 10.0
    assert b.choose(None, None, seen_nimg=8000, last=False) == chosen and len(said) == 1
    b.spent_sec = 30.0
    with pytest.raises(MetricUnavailable, match="is used up"):
        b.choose(None, None, seen_nimg=8000, last=False)
    assert b.choose(None, None, seen_nimg=8000, last=True) == chosen


def test_budget_cannot_choose_what_a_name_fixes():
    evaluator = SimpleNamespace(config=MetricConfig(metrics=("fid50k_full",)))
    with pytest.raises(MetricUnavailable, match="the family's names fix"):
        measuring.probe(evaluator, torch.nn.Identity())


@pytest.mark.parametrize("text, share", [("5%", 0.05), ("0.05", 0.05), (" 100 % ", None), ("0", None), ("x", None)])
def test_budget_option(text, share):
    if share is None and text.strip() != "100 %":
        with pytest.raises(ValueError, match="--metrics-budget"):
            MetricConfig(budget=text)
    else:
        assert MetricConfig(budget=text).budget_share == pytest.approx(share or 1.0)


@pytest.mark.parametrize(
    "metric, keep_best, message",
    [
        ({"metrics": ("none",), "budget": "5%"}, "auto", "--metrics-budget 5% is for measuring, not --metrics none"),
        ({"metrics": ("pr",)}, "fid", "--keep-best fid goes by measurements, and --metrics pr has none"),
        ({"metrics": ("fid", "fid")}, "auto", "--metrics names fid more than once"),
        ({"held_out": "x.zip"}, "auto", "--held-out x.zip is for --metrics memorisation"),
    ],
)
def test_options_without_effect_are_refused(metric, keep_best, message):
    config = FinetuneConfig(metric=MetricConfig(**metric)).replace(schedule__keep_best=keep_best)
    with pytest.raises(ValueError, match=message):
        finetune.check_options(config)


# --- in a run


def network_kimg(snapshot: Path) -> float:
    """When the network in a snapshot's file was taken."""
    return json.loads(snapshot.with_suffix(".config.json").read_text())["training"]["kimg"]


def test_patience_stops_a_run_without_progress(pictures, tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 1.5, 0.5])
    monkeypatch.setattr(evaluation.Evaluator, "measure", lambda self, G: [row("fd", next(values))])
    said: list[str] = []
    config = tiny(
        pictures,
        tmp_path,
        metric=MetricConfig(metrics=("fid",), num=4, patience=2),
        schedule=ScheduleConfig(kimg=0.1, tick=0.004, snap=1),
    )
    path = finetune.run(config, say=said.append)
    assert len(run_dir.read_jsonl(path / "metric-fd.jsonl")) == 4
    assert any(line.startswith("No better fd in 2 measurements since 0.008 kimg (1): stopping") for line in said)
    assert sum(line.startswith("A snapshot every 0.004 kimg: ") for line in said) == 1
    (line,) = [line for line in said if line.startswith("Stopped by --patience at ")]
    assert line.endswith(" kimg; a larger --patience, or none, trains on")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert finetune.run(config, say=said.append) == path  # the same command: nothing is trained, and why is said
    assert said[-1] == (
        f"Stopped already on its plateau: {path}. No better fd in 2 measurements since 0.008 kimg (1). "
        "A larger --patience, or none, trains on; --restart starts a new run"
    )
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    best = json.loads((path / measuring.BEST_FILE).read_text())
    assert (best["value"], best["since"], best["num_measured"]) == (1.5, 2, 4)  # of the file that is there
    assert best["kimg"] == network_kimg(path / best["snapshot"])
    # Another command is not held up by it, as by any run that came to its end; a larger --patience measures on.
    assert finetune.run(config.replace(runtime__seed=1, metric=MetricConfig(metrics=("none",))), say=quiet) != path
    again, values = config.replace(metric__patience=3), iter([1.5, 0.5, 0.6, 0.6, 0.6])
    assert finetune.run(again, say=said.append) == path
    assert [r["results"]["fd"] for r in run_dir.read_jsonl(path / "metric-fd.jsonl")][2:] == [2.0, 1.5, 0.5] + [0.6] * 3


@pytest.mark.parametrize("metrics, keep_best", [("none", "auto"), ("pr", "none"), ("kid", "fid")])
def test_patience_needs_what_it_counts(tmp_path, metrics, keep_best):
    config = FinetuneConfig(metric=MetricConfig(metrics=(metrics,), patience=2)).replace(schedule__keep_best=keep_best)
    with pytest.raises(ValueError, match=f"--patience 2 counts measurements of fid.* --metrics {metrics} has none"):
        finetune.check_options(config)
    finetune.check_options(config.replace(metric__metrics=(metrics, "fid50k_full") if metrics != "none" else ("fid",)))


def test_budget_in_a_run(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "probe", lambda evaluator, G: 1e-5)
    said: list[str] = []
    metric = MetricConfig(metrics=("fid",), num=120, budget="50%")
    path = finetune.run(tiny(pictures, tmp_path, metric=metric), say=said.append)
    assert any(line.startswith(f"Metrics left out: {measuring.TOO_EARLY}") for line in said)
    measured = run_dir.read_jsonl(path / "metric-fd.jsonl")
    assert measured and {line["provenance"]["num_fake"] for line in measured} == {120}


def test_budget_beside_training_is_said_and_kept(pictures, tmp_path, monkeypatch):
    """The process is played by one that takes half a second and brings its line; a hundredth of the time allows it
    once, and the last snapshot is measured whatever it takes."""
    play = (
        "import json, sys, time; time.sleep(0.5); "
        "json.dump({'rows': [], 'problem': 'played', 'fingerprint': None, 'num': 100, 'said': ['Metrics: 100 images'] "
        "if json.load(open(sys.argv[1]))['num'] is None else []}, open(sys.argv[2], 'w'))"
    )
    monkeypatch.setattr(measuring, "MODULE", ("-c", play))
    said: list[str] = []
    metric = MetricConfig(metrics=("fid",), num=120, budget="1%", run_async=True)
    config = tiny(pictures, tmp_path, metric=metric, schedule=ScheduleConfig(kimg=0.08, tick=0.004, snap=1))
    finetune.run(config, say=said.append)
    assert said.count("Metrics: 100 images") == 1
    reasons = ("0.01 of the time is used up", "keeps no queue")
    assert sum(any(reason in line for reason in reasons) for line in said) >= 15
    assert sum(line.startswith("Metrics left out: played") for line in said) == 2


def test_the_process_beside_tells_its_choice_and_counts_its_loading(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "probe", lambda evaluator, G: 0.1)
    monkeypatch.setattr(os, "nice", lambda by: by)
    monkeypatch.setattr(torch, "set_num_threads", lambda num: None)
    monkeypatch.setattr(evaluation.Evaluator, "measure", lambda self, G, num: [row("fd", num)])
    metric = MetricConfig(metrics=("fid",), num=1000, budget="50%", run_async=True)
    config = tiny(pictures, tmp_path, metric=metric, schedule=ScheduleConfig(kimg=0.004, tick=0.004, snap=1))
    path = finetune.run(config.replace(metric=MetricConfig(metrics=("none",))), say=quiet)
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    for started, num in ((time.time(), 400), (time.time() - 20, 200)):
        run_dir.write_json(
            job,
            {
                "config": config.to_dict(),
                "snapshot": str(path / "network-snapshot-000000.pkl"),
                "num": None,
                "budget_sec": 40,
                "started": started,
            },
        )
        measuring.measure_job(job, result)
        found = json.loads(result.read_text())
        assert found["problem"] is None and found["num"] == pytest.approx(num, abs=30)
        (line,) = found["said"]
        assert line.startswith(f"Metrics: {found['num']} generated images keep within 0.5") and " of loading, " in line


def test_measuring_beside_gives_the_same_figures(pictures, tmp_path):
    metric = MetricConfig(metrics=("fid", "kid"), num=8)
    inside = finetune.run(tiny(pictures, tmp_path / "a", metric=metric), say=quiet)
    said: list[str] = []
    config = tiny(pictures, tmp_path / "b", metric=dataclasses.replace(metric, run_async=True))
    beside = finetune.run(config, say=said.append)
    for name in ("fd", "kd"):
        a, b = (
            [
                (r["kimg"], pytest.approx(r["results"][name], rel=1e-4))
                for r in run_dir.read_jsonl(p / f"metric-{name}.jsonl")
            ]
            for p in (inside, beside)
        )
        assert a == b and len(a) == 3
    assert not list(beside.glob(".measuring*")) and any(line.startswith("Waiting for ") for line in said)
    assert (beside / measuring.BEST_FILE).exists()


def test_snapshots_left_without_figures_are_measured_by_the_next_process(pictures, tmp_path):
    config = tiny(
        pictures,
        tmp_path,
        metric=MetricConfig(metrics=("fid",), num=8, run_async=True),
        schedule=ScheduleConfig(kimg=0.016, tick=0.008, snap=1),
    )

    def interrupt(text: str) -> None:
        if text.startswith("tick 1"):
            os.kill(os.getpid(), signal.SIGINT)

    path = finetune.run(config, say=interrupt)
    left = [nimg for nimg, _ in measured.waiting_in(path)]
    assert left and not list(path.glob("metric-*"))  # stopped before the first figures could come
    said: list[str] = []
    assert finetune.run(config, say=said.append) == path and "Finished already" not in said[-1]
    assert any(line.startswith("Measuring ") and "left without figures" in line for line in said)
    kimg = [r["kimg"] for r in run_dir.read_jsonl(path / "metric-fd.jsonl")]
    ticks = [row["Progress/kimg"]["mean"] for row in run_dir.read_jsonl(path / "stats.jsonl")]
    assert kimg == pytest.approx(ticks, rel=1e-6)
    assert not list(path.glob(".measuring*"))


def test_figures_that_came_after_the_state_stay(tmp_path):
    for nimg in (1000, 2000, 3000):
        write(tmp_path, [row("fd", float(nimg))], nimg)
    run_dir.drop_metrics(tmp_path, 3000)
    assert [r["kimg"] for r in run_dir.read_jsonl(tmp_path / "metric-fd.jsonl")] == [1.0, 2.0]
    run_dir.drop_metrics(tmp_path, 1000)
    assert not (tmp_path / "metric-fd.jsonl").exists()


def test_a_broken_detector_beside_is_said_and_the_run_finishes(pictures, tmp_path):
    said: list[str] = []
    metric = MetricConfig(detector="torchscript", detector_file=str(tmp_path / "absent.pt"), run_async=True)
    schedule = ScheduleConfig(kimg=0.004, tick=0.004, snap=1)
    path = finetune.run(tiny(pictures, tmp_path, metric=metric, schedule=schedule), say=said.append)
    assert any(line.startswith("Metrics left out: ") and "absent.pt is no file" in line for line in said)
    assert (path / "network-snapshot-000000.pkl").exists() and not list(path.glob("metric-*"))


def test_a_process_that_dies_or_hangs_is_one_line(pictures, tmp_path, monkeypatch):
    config = tiny(pictures, tmp_path, metric=MetricConfig(max_minutes=0.3 / 60, run_async=True))
    for command, message in (
        ("import sys; print('no\\nmemory'); sys.exit(3)", "ended with code 3: memory"),
        ("import time; time.sleep(60)", "took longer than --metric-minutes"),
    ):
        monkeypatch.setattr(measuring, "sys", SimpleNamespace(executable="python3"))
        monkeypatch.setattr(measuring, "MODULE", ["-c", command])
        beside = measuring.Beside(config, tmp_path, None)
        (tmp_path / "network-snapshot-000001.pkl").write_bytes(b"x")
        beside.submit(tmp_path / "network-snapshot-000001.pkl", 1000)
        (done,) = beside.collect(wait=True)
        beside.close()
        assert done.rows == [] and message in done.problem and "network-snapshot-000001.pkl" in done.problem
        assert beside.num_pending == 0 and not list(tmp_path.glob(".measuring*"))
