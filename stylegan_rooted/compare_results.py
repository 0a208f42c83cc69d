"""What the runs of a comparison show: per seed, paired differences, time to thresholds, failures, a verdict.

Pure: takes records of runs (see `compare`) and returns what `compare.json` holds. A run that failed is a result: it is
counted and named, and its pair is left out of the differences, which are then said to flatter the arm that fails.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from metrics.evaluate import HIGHER_IS_BETTER
from stylegan_rooted import paired
from training import run_dir, watchdog

FORMAT = "stylegan-rooted comparison 1"
SHARES = (1.0, 0.9, 0.5)
"""Thresholds: these shares of the way from the baseline's first figure to its last, for every seed its own."""

NO_PAIR = "no pair"
OVERALL = {
    paired.BETTER: "better than {baseline}",
    paired.WORSE: "worse than {baseline}",
    paired.NONE_SEEN: "no difference seen from {baseline}",
    paired.LEFT_OPEN: "left open by failed runs",
    paired.TOO_FEW: "nothing can be said of",
    NO_PAIR: "no pair of finished runs",
}
"""Outcomes in the order of the verdict, and how it says them of arms."""

Curve = Sequence[Sequence[float]]
Record = dict[str, Any]


def read_run(path: Path, *, with_memory: bool) -> Record:
    """What a run folder tells: figures over kimg, seconds, memory, state.

    Args:
        path: As `finetune` leaves it; a run that failed may lack anything.
        with_memory: Whether the recorded peak is this run's own.
    """
    ticks = [row for row in run_dir.read_jsonl(path / "stats.jsonl") if isinstance(row, dict)]
    curves: dict[str, list[list[float]]] = {}
    for file in sorted(path.glob("metric-*.jsonl")):
        for row in run_dir.read_jsonl(file):
            for name, value in row["results"].items():
                if value is not None:
                    curves.setdefault(name, []).append([row["kimg"], value])
    environment = run_dir.read_jsonl(path / "history.jsonl")[:1]
    machine = (environment[0].get("environment") or {}) if environment else {}
    timed = ticks[1:] or ticks  # the first tick is one step, and the slowest
    kimg = [_mean(row, "Progress/kimg") for row in ticks]
    shown = kimg[-1] - kimg[0] if len(ticks) > 1 else sum(kimg)
    sec = sum(_mean(row, "Timing/sec_per_tick") for row in timed)
    on_gpu = max((_mean(row, "Resources/peak_gpu_mem_gb") for row in ticks), default=0.0)  # each tick's own peak
    peak = on_gpu or (_mean(ticks[-1], "Resources/cpu_mem_gb") if ticks else 0.0)
    return {
        "kimg": round(kimg[-1], 6) if kimg else 0.0,
        "curves": curves,
        "sec_per_kimg": sec / shown if shown else None,
        "peak_gib": peak if with_memory and peak else None,
        "nonfinite": round(_mean(ticks[-1], "Progress/nonfinite")) if ticks else 0,
        "state": ticks[-1].get("state") if ticks else None,
        "machine": {key: machine.get(key) for key in ("device_name", "num_threads", "torch", "python")},
    }


def describe(record: Record | None) -> str:
    """One line of what came of a run."""
    assert record is not None
    if record["status"] != "finished":
        return f"failed at {record['kimg']:g} kimg: {record['reason']}"
    name = record["headline"]
    found = _value(record, name) if name else None
    value = f"{label(name)} {'none' if found is None else f'{found:.4g}'}, " if name else ""
    return f"{value}{record['sec_per_kimg'] or math.nan:.3g} sec/kimg"


def label(figure: str) -> str:
    """FD for fd, fid50k_full as it is, recall for recall."""
    return figure.upper() if figure in ("fd", "kd", "fid", "kid", "is") else figure


def lower_is_better(figure: str) -> bool:
    """Whether small values of a figure are good."""
    return figure not in HIGHER_IS_BETTER and not figure.endswith(("_precision", "_recall"))


def judged_as_ratios(figure: str) -> bool:
    """Whether the verdict goes by ratios: of Fréchet distances, which are positive and spread as they grow.

    The others may be zero or below (KD and KID are unbiased) or end at 1, and are judged as differences.
    """
    return figure.startswith(("fd", "fid"))


def choose(records: Sequence[Record], arms: Sequence[str], judged_by: str) -> dict[str, Any]:
    """For every arm the setting whose run has the best last figure; all of them are reported.

    A choice at the grid's edge, or of a run that ended diverging, says so in its note.

    Returns:
        `chosen` (arm -> setting, note), `runs` (one row per arm and setting), `judged_by`.
    """
    sign = 1 if lower_is_better(judged_by) else -1
    rows = [{**_short(record, judged_by), "setting": record["setting"]} for record in records]
    chosen: dict[str, dict[str, str]] = {}
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        valid = [row for row in own if row["value"] is not None]
        best = min(valid, key=lambda row: sign * row["value"]) if valid else own[0]
        remarks = [] if valid else ["every setting failed: the first is taken"]
        if valid and len(valid) < len(own):
            remarks.append(f"{len(own) - len(valid)} of {len(own)} settings failed")
        if edges := _edges(best["setting"], settings):
            remarks.append(f"{' and '.join(edges)} at the grid's edge: a better one may lie beyond")
        if best["state"] == watchdog.DIVERGING:
            remarks.append("its last state was diverging")
        chosen[arm] = {"setting": best["setting"], "note": f" ({'; '.join(remarks)})" if remarks else ""}
    return {"judged_by": judged_by, "settings": settings, "chosen": chosen, "runs": rows}


def summarise(
    records: Sequence[Record],
    *,
    arms: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    judged_by: str,
    tuning: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything compare.json says of the runs.

    Args:
        records: One per arm and seed.
        arms: `name` and `loss` of each; the first is the baseline.
        seeds: In their order.
        judged_by: The figure that the verdict goes by, chosen before looking at differences.
        tuning: See `choose`.
    """
    names = [arm["name"] for arm in arms]
    by_run = {(record["arm"], record["seed"]): record for record in records}
    baseline, others = names[0], names[1:]
    figures = list(dict.fromkeys(name for record in records for name in record["final"]))
    figures.sort(key=lambda name: name != judged_by)
    differences = [
        row
        for figure in figures
        for arm in others
        if (row := difference(by_run, arm, baseline, seeds, figure, num_comparisons=len(others))) is not None
    ]
    verdicts = [judge(by_run, arm, baseline, seeds, judged_by, num_comparisons=len(others)) for arm in others]
    return {
        "format": FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "verdict": overall(verdicts, baseline, judged_by, len(seeds)),
        "verdicts": verdicts,
        "baseline": baseline,
        "judged_by": judged_by,
        "seeds": list(seeds),
        "arms": [{**arm, **arm_facts(by_run, arm["name"], seeds, figures)} for arm in arms],
        "figures": figures,
        "differences": differences,
        "thresholds": [
            row
            for share in SHARES
            for arm in others
            if (row := time_ratio(by_run, arm, baseline, seeds, judged_by, share)) is not None
        ],
        "bands": [
            band for arm in others if (band := difference_band(by_run, arm, baseline, seeds, judged_by)) is not None
        ],
        "tuning": tuning,
        "notes": notes(records),
        "runs": list(records),
    }


def difference(
    by_run: dict[tuple[str, int], Record],
    arm: str,
    baseline: str,
    seeds: Sequence[int],
    figure: str,
    *,
    num_comparisons: int,
) -> dict[str, Any] | None:
    """Paired difference of a final figure, arm less baseline, over the seeds in which both finished; None without.

    `ratio` holds the same of arm over baseline, where the figure is judged as ratios.
    """
    pairs = _pairs(by_run, arm, baseline, seeds, figure)
    if not pairs:
        return None
    values, base = [a for _, a, _ in pairs], [b for _, _, b in pairs]
    found = paired.compare_pairs(values, base, num_comparisons=num_comparisons)
    row = {
        "arm": arm,
        "figure": figure,
        "n": found.n,
        "mean": found.student.mean,
        "per_seed": {str(seed): a - b for seed, a, b in pairs},
        **_intervals(found),
        "ratio": None,
    }
    if _as_ratios(figure, pairs):
        ratio = paired.compare_pairs(values, base, of_ratios=True, num_comparisons=num_comparisons)
        row["ratio"] = {"mean": ratio.student.mean, **_intervals(ratio)}
    return row


def judge(
    by_run: dict[tuple[str, int], Record],
    arm: str,
    baseline: str,
    seeds: Sequence[int],
    figure: str,
    *,
    num_comparisons: int,
) -> dict[str, Any]:
    """Outcome and line for one arm, its pairs `n`, and its runs `without` the figure, which the intervals leave out."""
    pairs = _pairs(by_run, arm, baseline, seeds, figure)
    without, without_baseline = (_without(by_run, name, seeds, figure) for name in (arm, baseline))
    lost = ""
    if len(pairs) < len(seeds):
        lost = f"; failed or unmeasured runs: {without} of {len(seeds)} of {arm} and {without_baseline} of {baseline}"
    what = f"final {label(figure)}"
    if not pairs:
        text = f"{arm} against {baseline}, {what}: no pair of finished runs is left"
        return {"arm": arm, "outcome": NO_PAIR, "text": text + lost, "n": 0, "without": without}
    found = paired.compare_pairs(
        [a for _, a, _ in pairs],
        [b for _, _, b in pairs],
        of_ratios=_as_ratios(figure, pairs),
        num_comparisons=num_comparisons,
    )
    told = paired.verdict(
        arm,
        baseline,
        found,
        what=what,
        lower_is_better=lower_is_better(figure),
        num_failed=without,
        num_failed_baseline=without_baseline,
    )
    if lost:
        lost += ", whose pairs are left out, which flatters what fails more often"
    return {"arm": arm, "outcome": told.outcome, "text": told.text + lost, "n": len(pairs), "without": without}


def overall(verdicts: Sequence[dict[str, Any]], baseline: str, judged_by: str, num_seeds: int) -> str:
    """One line from the outcomes of all arms (see `judge`); pairs that failures cost are part of it."""
    parts = []
    for outcome, words in OVERALL.items():
        arms = ", ".join(v["arm"] for v in verdicts if v["outcome"] == outcome)
        if arms:
            parts.append(f"{words.format(baseline=baseline)}: {arms}")
    lost = ", ".join(f"{num_seeds - v['n']} of {num_seeds} ({v['arm']})" for v in verdicts if v["n"] < num_seeds)
    if lost:
        parts.append(f"pairs lost to failed runs: {lost}")
    note = paired.coarse_note(min((v["n"] for v in verdicts if v["n"]), default=num_seeds))
    ending = f" {note[0].upper()}{note[1:]}." if note else ""
    what = f"final {label(judged_by)}, {num_seeds} seed{'s' if num_seeds > 1 else ''}"
    return f"Verdict ({what}): {'; '.join(parts)}.{ending}"


def arm_facts(
    by_run: dict[tuple[str, int], Record], arm: str, seeds: Sequence[int], figures: Sequence[str]
) -> dict[str, Any]:
    """Failures, time, memory, and mean and spread over seeds of every final figure of one arm."""
    own = [by_run[arm, seed] for seed in seeds]
    finished = [record for record in own if record["status"] == "finished"]

    def mean_of(name: str) -> float | None:
        values = [record[name] for record in own if record[name] is not None]
        return float(np.mean(values)) if values else None

    final = {}
    for figure in figures:
        values = [value for record in finished if (value := _value(record, figure)) is not None]
        if values:
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            final[figure] = {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}
    return {
        "num_finished": len(finished),
        "failures": [{"seed": r["seed"], "reason": r["reason"]} for r in own if r["status"] != "finished"],
        "diverging": [r["seed"] for r in finished if r["state"] == watchdog.DIVERGING],
        "nonfinite": sum(record["nonfinite"] for record in own),
        "sec_per_kimg": mean_of("sec_per_kimg"),
        "peak_gib": max((r["peak_gib"] for r in own if r["peak_gib"] is not None), default=None),
        "final": final,
    }


def time_ratio(
    by_run: dict[tuple[str, int], Record],
    arm: str,
    baseline: str,
    seeds: Sequence[int],
    figure: str,
    share: float,
) -> dict[str, Any] | None:
    """How many times the baseline's images an arm needs to come as far as a share of the baseline's way.

    A pair whose arm never gets there is censored: its ratio is at least (all images shown) / (the baseline's). With
    such pairs the geometric mean is a lower bound, and there is no interval. Seeds in which the baseline failed or did
    not improve set no threshold. None where no seed does.
    """
    sign = 1 if lower_is_better(figure) else -1
    needed: list[tuple[float, float, bool]] = []
    without = 0
    for seed in seeds:
        base, own = by_run[baseline, seed], by_run[arm, seed]
        curve = [(kimg, sign * value) for kimg, value in base["curves"].get(figure, [])]
        if base["status"] != "finished" or len(curve) < 2 or curve[-1][1] >= curve[0][1]:
            without += 1
            continue
        # Never beyond the last figure, which rounding could do: the baseline has reached what it ended with.
        threshold = max(curve[0][1] + share * (curve[-1][1] - curve[0][1]), curve[-1][1])
        reached = kimg_to(curve, threshold)
        ours = kimg_to([(kimg, sign * value) for kimg, value in own["curves"].get(figure, [])], threshold)
        assert reached is not None  # the curve ends at or beyond its threshold
        needed.append((base["kimg"] if ours is None else ours, reached, ours is None))
    if not needed:
        return None
    censored = sum(late for _, _, late in needed)
    times, base_times = [a for a, _, _ in needed], [b for _, b, _ in needed]
    row = {
        "arm": arm,
        "share": share,
        "n": len(needed),
        "censored": censored,
        "without_threshold": without,
        "ratio": paired.paired_ratio(times, base_times).mean,
        "first": sum(not late and a < b for a, b, late in needed),
        "bootstrap": None,
        "student": None,
    }
    if not censored:
        row["bootstrap"] = asdict(paired.paired_ratio(times, base_times))
        row["student"] = asdict(paired.paired_ratio(times, base_times, method="t"))
    return row


def kimg_to(curve: Iterable[Sequence[float]], threshold: float) -> float | None:
    """kimg at which a curve first falls to `threshold`, straight between measurements; None where it never does."""
    before: Sequence[float] | None = None
    for point in curve:
        kimg, value = point
        if value <= threshold:
            if before is None:
                return float(kimg)
            share = (before[1] - threshold) / (before[1] - value)
            return float(before[0] + share * (kimg - before[0]))
        before = point
    return None


def difference_band(
    by_run: dict[tuple[str, int], Record], arm: str, baseline: str, seeds: Sequence[int], figure: str
) -> dict[str, Any] | None:
    """Paired differences along the way: mean and t interval at every measurement that all pairs have."""
    both = [
        (dict(map(tuple, by_run[arm, s]["curves"].get(figure, []))), dict(map(tuple, base)))  # type: ignore[arg-type]
        for s in seeds
        if by_run[arm, s]["status"] == by_run[baseline, s]["status"] == "finished"
        if (base := by_run[baseline, s]["curves"].get(figure, []))
    ]
    shared = sorted(set.intersection(*({*a} & {*b} for a, b in both))) if both else []
    if not shared:
        return None
    points = []
    for kimg in shared:
        found = paired.paired_difference([a[kimg] for a, _ in both], [b[kimg] for _, b in both], method="t")
        points.append([kimg, found.mean, found.low, found.high])
    return {"arm": arm, "figure": figure, "n": len(both), "points": points}


def notes(records: Sequence[Record]) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = list(dict.fromkeys(text for record in records for text in record["warnings"]))
    finished = [record for record in records if record["status"] == "finished"]
    most = max((_num_measured(record) for record in finished), default=0)
    gaps = [f"{r['arm']}, seed {r['seed']}" for r in finished if _num_measured(r) < most]
    if gaps:
        found.append(
            f"Measurements on the way are missing, as after an interruption: {'; '.join(gaps)}. Across such a gap a "
            "curve is straight, and so is the way to its thresholds; bands leave these points out."
        )
    machines = {tuple(sorted((k, str(v)) for k, v in record["machine"].items())) for record in records}
    if len(machines) > 1:
        found.append("Runs were made on different machines or versions: their seconds and memory do not compare.")
    places: dict[int, set[str]] = {}
    for record in records:
        places.setdefault(record["seed"], set()).add(str(record["machine"].get("device_name")))
    torn = [str(seed) for seed, names in places.items() if len(names) > 1]
    if torn:
        found.append(
            f"Arms of one seed ran on different devices (seeds {', '.join(torn)}): their differences are also those of "
            "the devices, which draw noise and augmentation each in its own way."
        )
    if len({record["version"] for record in records}) > 1:
        found.append("Runs were made by different versions of this software.")
    return found


def _num_measured(record: Record) -> int:
    return max((len(curve) for curve in record["curves"].values()), default=0)


def _pairs(
    by_run: dict[tuple[str, int], Record], arm: str, baseline: str, seeds: Sequence[int], figure: str
) -> list[tuple[int, float, float]]:
    """(seed, arm's value, baseline's value) of the seeds in which both have a finite one."""
    found = []
    for seed in seeds:
        values = [_value(by_run[name, seed], figure) for name in (arm, baseline)]
        if values[0] is not None and values[1] is not None:
            found.append((seed, values[0], values[1]))
    return found


def _as_ratios(figure: str, pairs: Sequence[tuple[int, float, float]]) -> bool:
    """Whether these pairs are judged as ratios; a distance that rounds to zero leaves differences alone."""
    return judged_as_ratios(figure) and all(a > 0 and b > 0 for _, a, b in pairs)


def _intervals(found: paired.Comparison) -> dict[str, Any]:
    return {name: asdict(getattr(found, name)) for name in ("bootstrap", "student", "corrected")}


def _value(record: Record, figure: str) -> float | None:
    if record["status"] != "finished":
        return None
    value = (record["final"].get(figure) or {}).get("value")
    return float(value) if value is not None and math.isfinite(value) else None


def _without(by_run: dict[tuple[str, int], Record], arm: str, seeds: Sequence[int], figure: str) -> int:
    """Runs of an arm without a finite figure: failed, or not measurable."""
    return sum(_value(by_run[arm, seed], figure) is None for seed in seeds)


def _short(record: Record, figure: str) -> dict[str, Any]:
    reason = {"reason": record["reason"]} if record["reason"] else {}
    facts = {"arm": record["arm"], "seed": record["seed"], "state": record.get("state")}
    return {**facts, "value": _value(record, figure), **reason}


def _edges(setting: str, settings: Sequence[str]) -> list[str]:
    """Keys of a setting (`lr=0.002,gamma=0.5`) whose value is the smallest or largest of several tried."""
    found = []
    for part in setting.split(","):
        key, _, value = part.partition("=")
        tried = {float(other.partition("=")[2]) for text in settings for other in text.split(",")
                 if other.partition("=")[0] == key}  # fmt: skip
        if len(tried) > 1 and float(value) in (min(tried), max(tried)):
            found.append(key)
    return found


def _mean(row: dict[str, Any], name: str) -> float:
    return float((row.get(name) or {}).get("mean") or 0.0)
