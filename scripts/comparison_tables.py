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

SHOWN = ("kd", "density", "coverage", "memorisation")


def table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def interval(row: dict[str, Any]) -> str:
    return f"{row['low']:+.3g} to {row['high']:+.3g}"


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


def differences_table(found: dict[str, Any]) -> str:
    """Paired differences of the figure that decides, and how long the way takes."""
    rows = []
    for verdict in found["verdicts"]:
        arm = verdict["arm"]
        row = next((d for d in found["differences"] if d["arm"] == arm and d["figure"] == found["judged_by"]), None)
        way = next((t for t in found["thresholds"] if t["arm"] == arm and t["share"] == 0.9), None)
        took = "" if way is None else f"{'≥ ' if way['censored'] else ''}{way['ratio']:.2f}, {way['censored']} never"
        shown = ["", "", "", ""] if row is None else [
            f"{row['mean']:+.3g}", interval(row["bootstrap"]), interval(row["student"]), interval(row["corrected"])
        ]  # fmt: skip
        rows.append([arm, *shown, verdict["outcome"], took])
    names = ["arm less logistic", "mean", "bootstrap", "t", "t, corrected", "outcome", "kimg to 90 %, over logistic's"]
    return table(names, rows)


def log_ratios(found: dict[str, Any], arm: str) -> list[float]:
    """Logarithms of (arm's last figure / baseline's), one per pair."""
    values: dict[tuple[str, int], float] = {}
    for run in found["runs"]:
        value = (run["final"].get(found["judged_by"]) or {}).get("value") if run["status"] == "finished" else None
        if value is not None:
            values[run["arm"], run["seed"]] = value
    pairs = [(values.get((arm, s)), values.get((found["baseline"], s))) for s in found["seeds"]]
    return [math.log(a / b) for a, b in pairs if a and b]


def together(comparisons: list[dict[str, Any]], arm: str) -> tuple[float, float, float, int, int] | None:
    """Ratio of the figure over all comparisons that have the arm: (geometric mean, low, high, comparisons, pairs)."""
    groups = [d for found in comparisons if len(d := log_ratios(found, arm)) > 1]
    if len(groups) < 2:
        return None
    parts = np.array([np.var(d, ddof=1) / len(d) for d in groups]) / len(groups) ** 2
    mean, variance = float(np.mean([np.mean(d) for d in groups])), float(parts.sum())
    freedom = variance**2 / float(sum(p**2 / (len(d) - 1) for p, d in zip(parts, groups, strict=True)))
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    ends = (math.exp(mean), math.exp(mean - half), math.exp(mean + half))
    return *ends, len(groups), sum(map(len, groups))


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
            d = log_ratios(found, verdict["arm"])
            half = stats.t.ppf(0.975, len(d) - 1) * np.std(d, ddof=1) / math.sqrt(len(d)) if len(d) > 1 else 0
            ends = np.exp([np.mean(d) - half, np.mean(d), np.mean(d) + half]) if d else [math.nan] * 3
            axes.plot(
                ends[::2],
                [y, y],
                color=colours[verdict["arm"]],
                linewidth=2,
                label=labels.pop(verdict["arm"], None),
            )
            axes.plot(ends[1], y, "o", color=colours[verdict["arm"]], markersize=5)
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
    args = parser.parse_args()
    comparisons = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in args.files}
    for name, found in comparisons.items():
        print(f"#### {name}\n\n{found['verdict']}\n\n{arms_table(found)}\n{differences_table(found)}")
        if found["tuning"]:
            chosen = found["tuning"]["chosen"]
            print("Chosen: " + "; ".join(f"{arm}: {c['setting']}{c['note']}" for arm, c in chosen.items()) + "\n")
    arms = list(dict.fromkeys(v["arm"] for found in comparisons.values() for v in found["verdicts"]))
    rows = []
    for arm in arms:
        outcomes = [v["outcome"] for f in comparisons.values() for v in f["verdicts"] if v["arm"] == arm]
        all_of_them = together([f for f in comparisons.values() if any(a["name"] == arm for a in f["arms"])], arm)
        ratio = (
            "" if all_of_them is None else "{:.3f} ({:.3f} to {:.3f}), {} comparisons, {} pairs".format(*all_of_them)
        )
        counted = [str(outcomes.count(word)) for word in ("better", "no difference seen", "worse")]
        rows.append([arm, *counted, str(len(outcomes)), ratio])
    print("#### All together\n")
    print(table(["arm", "better", "no difference seen", "worse", "of", "FD over logistic's (95 %)"], rows))
    if args.png:
        draw(comparisons, args.png)


if __name__ == "__main__":
    main()
