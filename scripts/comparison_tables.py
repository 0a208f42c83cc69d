"""Tables of docs/experiments.md from several comparisons, as Markdown; with --png a figure of all differences.

Usage: python scripts/comparison_tables.py FOLDER/*/compare.json [--png OUT.png]

Every comparison judges each arm by itself (see docs/compare.md). Beside that, arms are judged over all comparisons
together: the mean over comparisons of the mean logarithm of (arm's figure / baseline's). Its standard error comes from
the seeds within each comparison, with Welch and Satterthwaite's degrees of freedom: this is the expected change over
*these* data sets, not over others.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from stylegan_rooted import paired

SHOWN = ("kd", "density", "coverage", "memorisation")


def table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def interval(row: dict[str, Any], show: str) -> str:
    return f"{row['low']:{show}} to {row['high']:{show}}"


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
    what = "over" if any(d["ratio"] for d in found["differences"]) else "less"
    names = [f"arm {what} {found['baseline']}", "mean", "bootstrap", "t", "t, corrected", "outcome"]
    other = [] if against == found["baseline"] else [f"over {against}'s (t)"]
    return table([*names, f"kimg to 90 %, over {found['baseline']}'s", *other], rows)


def ratio(found: dict[str, Any], arm: str, against: str) -> str:
    """Geometric mean ratio of two arms' last figures with Student's interval."""
    own, theirs = figures_of(found, arm, against)
    if not own or arm == against:
        return ""
    r = paired.paired_ratio(own, theirs, method="t")
    return f"{r.mean:.2f} ({r.low:.2f} to {r.high:.2f})"


def figures_of(found: dict[str, Any], arm: str, against: str) -> tuple[list[float], list[float]]:
    """Last figures of two arms, in the seeds in which both have one."""
    values: dict[tuple[str, int], float] = {}
    for run in found["runs"]:
        value = (run["final"].get(found["judged_by"]) or {}).get("value") if run["status"] == "finished" else None
        if value is not None:
            values[run["arm"], run["seed"]] = value
    seeds = [s for s in found["seeds"] if (arm, s) in values and (against, s) in values]
    return [values[arm, s] for s in seeds], [values[against, s] for s in seeds]


def together(comparisons: list[dict[str, Any]], arm: str, num_arms: int) -> str:
    """Ratio of the last figure to the baseline's over all comparisons that have the arm; "" for fewer than two."""
    pairs = [figures_of(found, arm, found["baseline"]) for found in comparisons]
    groups = [np.log(own) - np.log(theirs) for own, theirs in pairs if len(own) > 1]
    if len(groups) < 2:
        return ""
    parts = np.array([np.var(d, ddof=1) / len(d) for d in groups]) / len(groups) ** 2
    mean, variance = float(np.mean([np.mean(d) for d in groups])), float(parts.sum())
    freedom = variance**2 / float(sum(p**2 / (len(d) - 1) for p, d in zip(parts, groups, strict=True)))

    def ends(level: float) -> str:
        half = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
        return f"{math.exp(mean - half):.3f} to {math.exp(mean + half):.3f}"

    corrected = ends(1 - 0.05 / num_arms)
    return f"{math.exp(mean):.3f} ({ends(0.95)}; corrected {corrected}), {sum(map(len, groups))} pairs"


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
            arm, (own, theirs) = verdict["arm"], figures_of(found, verdict["arm"], found["baseline"])
            if own:
                r = paired.paired_ratio(own, theirs, method="t")
                axes.plot([r.low, r.high], [y, y], color=colours[arm], linewidth=2, label=labels.pop(arm, None))
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
    axes.set_xlabel("last FD over the logistic loss's, logarithmic (mean of pairs, 95 % t interval); left is better")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--against", help="the arm of the ratios, instead of each comparison's baseline")
    args = parser.parse_args()
    comparisons = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in args.files}
    for name, found in comparisons.items():
        differences = differences_table(found, args.against or found["baseline"])
        print(f"#### {name}\n\n{found['verdict']}\n\n{arms_table(found)}\n{differences}")
        if found["tuning"]:
            chosen = found["tuning"]["chosen"]
            print("Chosen: " + "; ".join(f"{arm}: {c['setting']}{c['note']}" for arm, c in chosen.items()) + "\n")
    arms = list(dict.fromkeys(v["arm"] for found in comparisons.values() for v in found["verdicts"]))
    rows = []
    for arm in arms:
        own = [found for found in comparisons.values() if any(v["arm"] == arm for v in found["verdicts"])]
        outcomes = [v["outcome"] for found in own for v in found["verdicts"] if v["arm"] == arm]
        counted = [str(outcomes.count(word)) for word in ("better", "no difference seen", "worse")]
        rows.append([arm, *counted, str(len(own)), together(own, arm, len(arms))])
    print("#### All together\n")
    print(table(["arm", "better", "no difference seen", "worse", "of", "last figure over the baseline's (95 %)"], rows))
    if args.png:
        draw(comparisons, args.png)


if __name__ == "__main__":
    main()
