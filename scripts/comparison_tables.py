"""Tables of docs/experiments.md from several comparisons, as Markdown; with --png a figure of all differences.

Usage: python scripts/comparison_tables.py FOLDER/*/compare.json [--png OUT.png]

Every comparison judges each arm by itself (see docs/compare.md). Beside that, arms are judged over all comparisons
together: the mean over comparisons of the mean logarithm of (arm's figure / baseline's). Its standard error comes from
the seeds within each comparison, with Welch and Satterthwaite's degrees of freedom: this is the expected change over
*these* data sets, not over others. It takes comparisons for independent; the last column does not (see `with_blocks`).
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from stylegan_rooted import paired
from stylegan_rooted.compare_results import FORMAT, label, lower_is_better

SHOWN = ("kd", "density", "coverage", "memorisation")


def table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def interval(row: dict[str, Any], show: str) -> str:
    """Ends of an interval; a single pair has none."""
    return "none" if row["low"] is None or row["high"] is None else f"{row['low']:{show}} to {row['high']:{show}}"


def spread(arm: dict[str, Any], figure: str) -> str:
    found = arm["final"].get(figure)
    return (
        ""
        if found is None
        else f"{found['mean']:.3g} ± {found['sd']:.2g}"
        if found["sd"] is not None
        else f"{found['mean']:.3g}"
    )


def arms_table(found: dict[str, Any]) -> str:
    """Means and standard deviations over seeds of every arm."""
    figures = [found["judged_by"], *(name for name in found["figures"] if name in SHOWN and name != found["judged_by"])]
    rows = [
        [arm["name"], f"{arm['num_finished']} of {len(found['seeds'])}", *(spread(arm, figure) for figure in figures)]
        for arm in found["arms"]
    ]
    return table(["arm", "finished", *(name.upper() if len(name) < 4 else name for name in figures)], rows)


def differences_table(found: dict[str, Any], against: str) -> str:
    """What the verdict goes by (ratios of distances, differences else), how long the way takes, ratios to `against`."""
    rows = []
    for verdict in found["verdicts"]:
        arm = verdict["arm"]
        row = next((d for d in found["differences"] if d["arm"] == arm and d["figure"] == found["judged_by"]), None)
        way = next((t for t in found["thresholds"] if t["arm"] == arm and t["share"] == 0.9), None)
        took = "" if way is None else f"{'≥ ' if way['censored'] else ''}{way['ratio']:.2f}, {way['censored']} never"
        judged, show = (row["ratio"], ".3g") if row is not None and row["ratio"] else (row, "+.3g")
        kinds = ("bootstrap", "student", "corrected")
        shown = ["", "", "", ""] if judged is None else [
            f"{judged['mean']:{show}}", *(interval(judged[kind], show) for kind in kinds)
        ]  # fmt: skip
        other = [] if against == found["baseline"] else [ratio(found, arm, against)]
        rows.append([arm, *shown, verdict["outcome"], took, *other])
    rows_judged = [d for d in found["differences"] if d["figure"] == found["judged_by"]]
    what = " or ".join(dict.fromkeys("over" if d["ratio"] else "less" for d in rows_judged)) or "against"
    names = [f"arm {what} {found['baseline']}", "mean", "bootstrap", "t", "t, corrected", "outcome"]
    other = [] if against == found["baseline"] else [f"over {against}'s (t)"]
    return table([*names, f"kimg to 90 %, over {found['baseline']}'s", *other], rows)


def ratio(found: dict[str, Any], arm: str, against: str) -> str:
    """Geometric mean ratio of two arms' last figures with Student's interval; "" where there is none."""
    logs = log_ratios(found, arm, against)
    if not logs or arm == against:
        return ""
    r = geometric_mean(logs)
    return f"{r.mean:.2f}" if r.n == 1 else f"{r.mean:.2f} ({r.low:.2f} to {r.high:.2f})"


def beside(found: dict[str, Any], other: dict[str, Any]) -> str:
    """Ratios of last figures here to those of another comparison with the same seeds: same arm's, baseline's."""
    theirs = [{**run, "arm": f"{run['arm']} there"} for run in other["runs"]]
    both = {**found, "runs": [*found["runs"], *theirs]}
    rows = [
        [arm["name"], *(ratio(both, arm["name"], f"{name} there") for name in (arm["name"], other["baseline"]))]
        for arm in found["arms"]
    ]
    return table(["arm here", "over the same arm there (t)", f"over {other['baseline']} there (t)"], rows)


def geometric_mean(logs: dict[int, float], level: float = paired.LEVEL) -> paired.Interval:
    """Of what has these logarithms, with Student's interval."""
    return paired.paired_ratio(np.exp([*logs.values()]), np.ones(len(logs)), method="t", level=level)


def log_ratios(found: dict[str, Any], arm: str, against: str) -> dict[int, float] | None:
    """Seed -> logarithm of (arm's last figure / the other's), where both have one; None if one of them isn't above 0.

    Such figures (KD and KID may be zero and below) have no ratios, and leaving out some pairs for what they show would
    bend the others'.
    """
    values: dict[tuple[str, int], float] = {}
    for run in found["runs"]:
        value = (run["final"].get(found["judged_by"]) or {}).get("value") if run["status"] == "finished" else None
        if value is not None:
            values[run["arm"], run["seed"]] = value
    seeds = [s for s in found["seeds"] if (arm, s) in values and (against, s) in values]
    pairs = {seed: (values[arm, seed], values[against, seed]) for seed in seeds}
    if any(value <= 0 for pair in pairs.values() for value in pair):
        return None
    return {seed: math.log(own) - math.log(theirs) for seed, (own, theirs) in pairs.items()}


def together(comparisons: list[dict[str, Any]], arm: str, num_arms: int) -> str:
    """Ratio of the last figure to the baseline's over all comparisons that have the arm; "" for fewer than two.

    Comparisons of one pair have no spread and are left out; the text says how many were used. Comparisons are taken for
    independent, though all of them share their seeds: where a seed is good or bad for an arm on all data, the interval
    is too narrow. `with_blocks` does without this.
    """
    found = [log_ratios(one, arm, one["baseline"]) for one in comparisons]
    groups = [np.array([*logs.values()]) for logs in found if logs is not None and len(logs) > 1]
    if len(groups) < 2 or None in found:
        return ""
    parts = np.array([np.var(d, ddof=1) / len(d) for d in groups]) / len(groups) ** 2
    mean, variance = float(np.mean([np.mean(d) for d in groups])), float(parts.sum())
    used = f"{sum(map(len, groups))} pairs of {len(groups)} comparisons"
    if variance <= paired.ROUNDING**2:
        return f"{math.exp(mean):.3f} (no spread), {used}"
    freedom = variance**2 / float(sum(p**2 / (len(d) - 1) for p, d in zip(parts, groups, strict=True)))

    def ends(level: float) -> str:
        half = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
        return f"{math.exp(mean - half):.3f} to {math.exp(mean + half):.3f}"

    corrected = ends(1 - 0.05 / num_arms)
    return f"{math.exp(mean):.3f} ({ends(0.95)}; corrected {corrected}), {used}"


def with_blocks(comparisons: list[dict[str, Any]], arm: str, num_arms: int) -> str:
    """As `together`, by Student's t over seeds of each seed's mean over comparisons, whatever these share in a seed.

    "" for fewer than two comparisons or seeds, or where some comparison lacks a pair of some seed.
    """
    found = [log_ratios(one, arm, one["baseline"]) for one in comparisons]
    seeds = {seed for one in comparisons for seed in one["seeds"]}
    logs = [one for one in found if one is not None and one.keys() == seeds]
    if min(len(logs), len(seeds)) < 2 or len(logs) < len(found):
        return ""
    means = {seed: float(np.mean([one[seed] for one in logs])) for seed in sorted(seeds)}
    single, corrected = geometric_mean(means), geometric_mean(means, 1 - 0.05 / num_arms)
    ends = "no spread"
    if single.low < single.high:
        ends = f"{interval(vars(single), '.3f')}; corrected {interval(vars(corrected), '.3f')}"
    return f"{single.mean:.3f} ({ends}), {len(seeds)} seeds of {len(logs)} comparisons"


def draw(comparisons: dict[str, dict[str, Any]], path: Path) -> None:
    """Mean differences with Student's intervals, as ratios to the baseline's figure; a colour per arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(dict.fromkeys(v["arm"] for found in comparisons.values() for v in found["verdicts"]))
    colours = dict(zip(arms, ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"), strict=False))
    figure, axes = pyplot.subplots(
        layout="constrained", figsize=(8, 1 + 0.16 * sum(len(f["verdicts"]) + 1 for f in comparisons.values()))
    )
    y, ticks, labels = 0.0, [], {arm: arm for arm in arms}
    for name, found in comparisons.items():
        first = y
        for verdict in found["verdicts"]:
            arm, logs = verdict["arm"], log_ratios(found, verdict["arm"], found["baseline"])
            if logs:
                r = geometric_mean(logs)
                ends = [r.low, r.high] if r.n > 1 else [r.mean, r.mean]
                axes.plot(ends, [y, y], color=colours[arm], linewidth=2, label=labels.pop(arm, None))
                axes.plot(r.mean, y, "o", color=colours[arm], markersize=5)
            y += 1
        ticks.append(((first + y - 1) / 2, name))
        y += 1
    axes.axvline(1, color="#555555", linewidth=1)
    axes.set_yticks([t for t, _ in ticks], [n for _, n in ticks])
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    shown = [tick for tick in (0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50) if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(axis_label(next(iter(comparisons.values()))))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"{path}: {path.stat().st_size:,} bytes")


def axis_label(found: dict[str, Any]) -> str:
    """What the figure shows, by the words of its first comparison."""
    figure = found["judged_by"]
    better = "left" if lower_is_better(figure) else "right"
    what = f"last {label(figure)} over {found['baseline']}'s, logarithmic"
    return f"{what} (mean of pairs, 95 % t interval); {better} is better"


def read(path: Path) -> dict[str, Any]:
    """compare.json; ends the program with one line where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}; wanted a compare.json that `compare` wrote") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise SystemExit(f"{path} is no comparison; wanted a compare.json that `compare` wrote")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--against", help="the arm of the ratios, instead of each comparison's baseline")
    parser.add_argument("--other", type=Path, help="compare.json of the same seeds: ratios to its last figures, too")
    args = parser.parse_args()
    comparisons = {path.parent.name: read(path) for path in args.files}
    for name, found in comparisons.items():
        differences = differences_table(found, args.against or found["baseline"])
        print(f"#### {name}\n\n{found['verdict']}\n\n{arms_table(found)}\n{differences}")
        if args.other:
            print(beside(found, read(args.other)))
        if found["tuning"]:
            chosen = found["tuning"]["chosen"]
            print("Chosen: " + "; ".join(f"{arm}: {c['setting']}{c['note']}" for arm, c in chosen.items()) + "\n")
    arms = list(dict.fromkeys(v["arm"] for found in comparisons.values() for v in found["verdicts"]))
    rows = []
    for arm in arms:
        own = [found for found in comparisons.values() if any(v["arm"] == arm for v in found["verdicts"])]
        outcomes = [v["outcome"] for found in own for v in found["verdicts"] if v["arm"] == arm]
        counted = [str(outcomes.count(word)) for word in ("better", "no difference seen", "worse")]
        rows.append([arm, *counted, str(len(own)), together(own, arm, len(arms)), with_blocks(own, arm, len(arms))])
    print("#### All together\n")
    names = ["arm", "better", "no difference seen", "worse", "of", "last figure over the baseline's (95 %)"]
    print(table([*names, "with seeds as blocks"], rows))
    if args.png:
        draw(comparisons, args.png)


if __name__ == "__main__":
    main()
