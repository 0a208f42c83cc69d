"""Two records of bench.py cell by cell: B over A, with a mark where the change is larger than the spread.

Usage: python benchmarks/compare.py A.json B.json [--all]
A cell is marked `slower` or `faster` (`more` or `less` memory) if the quartiles of the two do not overlap and the
medians are more than 3 % apart; with fewer than three samples on a side, 15 %.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure, report

LEAST_CHANGE, LEAST_CHANGE_OF_FEW = 0.03, 0.15
FEW = 3


def verdict(before: Sequence[float], after: Sequence[float]) -> tuple[float, int]:
    """Ratio of the medians, after over before, and its sign: -1 smaller, 1 larger, 0 within the spread."""
    a, b = measure.spread(before), measure.spread(after)
    ratio = b.median / a.median
    least = LEAST_CHANGE if min(a.num, b.num) >= FEW else LEAST_CHANGE_OF_FEW
    if b.low > a.high and ratio > 1 + least:
        return ratio, 1
    if b.high < a.low and ratio < 1 - least:
        return ratio, -1
    return ratio, 0


def compare(before: report.Record, after: report.Record, *, show_all: bool = False) -> str:
    """A table of the cells that both have; only the marked ones unless `show_all`."""
    lines, num = [], 0
    for cell, value in before["cells"].items():
        other = after["cells"].get(cell)
        if other is None or "samples" not in value:
            continue
        num += 1
        ratio, sign = verdict(value["samples"], other["samples"])
        if not sign and not show_all:
            continue
        words = ("less", "", "more") if value["unit"] in ("MiB", "flop") else ("faster", "", "slower")
        medians = [measure.spread(v["samples"]).median for v in (value, other)]
        lines.append(f"{cell:<44} {medians[0]:11.5g} {medians[1]:11.5g} {ratio:7.3f}x  {words[sign + 1]}")
    sides = [f"{r['environment']['revision']} ({r['environment']['started']})" for r in (before, after)]
    head = f"A {sides[0]}, B {sides[1]}\n{'cell':<44} {'A':>11} {'B':>11} {'B / A':>8}"
    same = f"{num - len(lines)} of {num} cells within their spread" if not show_all else f"{num} cells"
    notes = [
        f"Careful: {key} differs: {before['environment'].get(key)!r}, {after['environment'].get(key)!r}"
        for key in ("processor", "torch", "threads")
        if before["environment"].get(key) != after["environment"].get(key)
    ]
    return "\n".join([*notes, head, *lines, same])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--all", action="store_true", help="also cells without a change")
    options = parser.parse_args()
    try:
        print(compare(report.load(options.before), report.load(options.after), show_all=options.all))
    except (OSError, ValueError) as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
