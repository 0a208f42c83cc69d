"""The pages of a comparison: compare.json, compare.md, and one self-contained compare.html. Computes nothing.

The page holds no script and fetches nothing; every string in it is escaped.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from stylegan_rooted.compare_results import label, lower_is_better
from stylegan_rooted.evaluation import ASSETS
from stylegan_rooted.report_charts import nice_ticks, number
from training import run_dir

TEMPLATE = "compare.html.jinja"
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 36
NUM_COLORS = 8


@dataclass(frozen=True)
class Table:
    """A table for people; cells are text."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Line:
    """One curve: (x, y) in order of x, its colour's number, and a band of (x, low, high) around it."""

    name: str
    color: int
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Picture:
    """A drawn chart."""

    title: str
    note: str
    svg: str
    legend: list[tuple[str, int]]


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write the three files into `folder`, each whole or not at all."""
    results = run_dir.plain(results)
    run_dir.write_json(folder / "compare.json", results)
    run_dir.write_atomic(folder / "compare.md", markdown(results))
    run_dir.write_atomic(folder / "compare.html", page(results).encode("utf-8", "replace"))


def markdown(results: dict[str, Any]) -> str:
    """compare.md."""
    parts = ["# Comparison of losses", f"**{results['verdict']}**", _bullets(v["text"] for v in results["verdicts"])]
    for table in tables(results):
        parts.append(f"## {table.title}")
        if table.note:
            parts.append(table.note)
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append("\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines))
    if results["notes"]:
        parts += ["## Notes", _bullets(results["notes"])]
    parts += ["## Where this comes from", _bullets(f"{name}: {value}" for name, value in facts(results))]
    return "\n\n".join(parts) + "\n"


def page(results: dict[str, Any]) -> str:
    """compare.html."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((ASSETS / TEMPLATE).read_text(encoding="utf-8"))
    return template.render(results=results, tables=tables(results), pictures=pictures(results), facts=facts(results))


def tables(results: dict[str, Any]) -> list[Table]:
    """All tables, in order."""
    found = [_arms(results), _per_seed(results), _differences(results)]
    found += [table for table in (_thresholds(results), _failures(results), _tuning(results)) if table is not None]
    return found


def pictures(results: dict[str, Any]) -> list[Picture]:
    """Curves of the figure that decides, and paired differences from the baseline, both over kimg."""
    figure, names = results["judged_by"], [arm["name"] for arm in results["arms"]]
    colors = {name: 1 + i % NUM_COLORS for i, name in enumerate(names)}
    lines = [line for name in names if (line := _mean_line(results, name, colors[name])) is not None]
    found = []
    if lines:
        note = "Mean over the runs that finished; the band goes from the lowest seed to the highest."
        found.append(Picture(label(figure), note, draw(label(figure), lines), [(x.name, x.color) for x in lines]))
    bands = [
        Line(
            band["arm"],
            colors[band["arm"]],
            [(kimg, mean) for kimg, mean, _, _ in band["points"]],
            [(kimg, low, high) for kimg, _, low, high in band["points"] if low is not None and high is not None],
        )
        for band in results["bands"]
    ]
    if bands:
        title = f"{label(figure)} less that of {results['baseline']}"
        better = "below" if lower_is_better(figure) else "above"
        note = (
            f"Mean of paired differences; {better} zero is better than the baseline. Bands are 95 % t intervals of the "
            "differences at each point by itself; the verdict goes by the table of paired differences."
        )
        svg = draw(title, bands, zero=True)
        found.append(Picture(title, note, svg, [(x.name, x.color) for x in bands]))
    return found


def draw(title: str, lines: Sequence[Line], *, zero: bool = False) -> str:
    """An SVG of curves with bands over kimg.

    Args:
        title: For those who hear the picture.
        lines: At least one, with at least one point.
        zero: Draw, and keep in view, a line at 0.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([0.0] if zero else [])
    span = max(ys) - min(ys) or abs(ys[0]) or 1.0
    ends = [y for line in lines for _, low, high in line.band for y in (low, high)]
    low, high = (  # a band of very few runs can be so wide that it would hide the curves
        max(min([*ys, *ends]), min(ys) - 2 * span),
        min(max([*ys, *ends]), max(ys) + 2 * span),
    )
    y_ticks = nice_ticks(low, high)
    low, high = min(y_ticks), max(y_ticks)
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, max(xs) + 0.5)

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        y = min(max(y, low), high)
        return round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)} over kimg">']
    for y in y_ticks:
        kind = "axis" if zero and y == 0 else "line"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y)}" y2="{down(y)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(y) + 4}" text-anchor="end">{number(y)}</text>')
    for x in nice_ticks(x_low, x_high, within=True):
        parts.append(f'<text x="{across(x)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">kimg</text>')
    for line in lines:
        if len(line.band) > 1:
            there = [f"{across(x)},{down(top)}" for x, _, top in line.band]
            back = [f"{across(x)},{down(bottom)}" for x, bottom, _ in reversed(line.band)]
            parts.append(f'<polygon class="f{line.color}" points="{" ".join(there + back)}"/>')
    for line in lines:
        points = " ".join(f"{across(x)},{down(y)}" for x, y in line.points)
        parts.append(f'<polyline class="s{line.color}" points="{points}"/>')
        parts += [
            f'<circle class="d{line.color}" cx="{across(x)}" cy="{down(y)}" r="3">'
            f"<title>{html.escape(line.name)} {number(y)} at {number(x)} kimg</title></circle>"
            for x, y in line.points
        ]
    return "".join(parts) + "</svg>"


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what the numbers come from."""
    shared, data, start = results["shared"], results["data"], results["resume"]
    environment = results["environment"]
    objective = ", ".join(f"{name} {shared['loss'][name]:g}" for name in ("pl_weight", "style_mixing"))
    return [
        ("made", results["created"]),
        ("command", " ".join(environment["command"])),
        ("data", f"{Path(data['path']).name}, {data['num_images']} images, SHA-256 {data['sha256'][:12]}…"),
        ("network", f"{Path(start['path']).name}" + (f", SHA-256 {start['sha256'][:12]}…" if start["sha256"] else "")),
        ("seeds", ", ".join(map(str, results["seeds"]))),
        ("length", f"{shared['schedule']['kimg']:g} kimg, batch {shared['optim']['batch']}"),
        ("rates", f"{shared['optim']['glr']:g} and {shared['optim']['dlr']:g}, gamma {shared['loss']['gamma']:g}"),
        ("regularisers", objective),
        ("augmentation", shared["augment"]["aug"]),
        (
            "figures",
            f"detector {shared['metric']['detector']}, {shared['metric']['num']} generated images, last snapshots all "
            f"with seed {results['evaluation_seed']}",
        ),
        ("machine", "; ".join(dict.fromkeys(map(_machine, results["runs"])))),
        ("software", f"stylegan-rooted {results['version']}, torch {environment['torch']}"),
    ]


def _arms(results: dict[str, Any]) -> Table:
    figures = results["figures"]
    rows = []
    for arm in results["arms"]:
        cells = [arm["name"], f"{arm['num_finished']} of {len(results['seeds'])}"]
        for figure in figures:
            found = arm["final"].get(figure)
            cells.append("-" if found is None else _plus_minus(found["mean"], found["sd"]))
        rows.append([*cells, _number(arm["sec_per_kimg"]), _number(arm["peak_gib"]), str(arm["nonfinite"])])
    note = (
        "Last snapshots, mean ± standard deviation over seeds; seconds include nothing but training. Differences are "
        "to be read from the paired table, not from these."
    )
    names = [label(figure) for figure in figures]
    return Table("Arms", note, ["arm", "finished", *names, "sec/kimg", "peak GiB", "non-finite steps"], rows)


def _per_seed(results: dict[str, Any]) -> Table:
    figure = results["judged_by"]
    values = {(run["arm"], run["seed"]): run for run in results["runs"]}

    def cell(arm: str, seed: int) -> str:
        run = values[arm, seed]
        return "failed" if run["status"] != "finished" else _number((run["final"].get(figure) or {}).get("value"))

    rows = [[arm["name"], *(cell(arm["name"], seed) for seed in results["seeds"])] for arm in results["arms"]]
    return Table(f"Final {label(figure)} per seed", "", ["arm", *(f"seed {s}" for s in results["seeds"])], rows)


def _differences(results: dict[str, Any]) -> Table:
    rows = [
        [
            label(row["figure"]),
            row["arm"],
            _signed(row["mean"]),
            _interval(row["bootstrap"]),
            _interval(row["student"]),
            *_ratio(row.get("ratio")),
            _corrected(row) if row["figure"] == results["judged_by"] else "",
            str(row["n"]),
        ]
        for row in results["differences"]
    ]
    note = (
        f"Arm less {results['baseline']}, seed by seed; ratios are arm over {results['baseline']}, as geometric means. "
        f"The verdict goes by {label(results['judged_by'])} alone (by its ratios, if there are any) and asks that both "
        "intervals exclude equality, and Student's also at the level that counts all arms (corrected); other figures "
        "are shown for what they are, without such a correction."
    )
    header = ["figure", "arm", "mean", "95 % bootstrap (BCa)", "95 % t", "ratio", "bootstrap", "t", "corrected", "n"]
    return Table("Paired differences", note, header, rows)


def _thresholds(results: dict[str, Any]) -> Table | None:
    if not results["thresholds"]:
        return None
    rows = []
    for row in results["thresholds"]:
        bound = "≥ " if row["censored"] else ""
        never = f"{row['censored']} of {row['n']} never" if row["censored"] else "all reached it"
        rows.append(
            [
                f"{row['share']:.0%}",
                row["arm"],
                f"{bound}{row['ratio']:.3g}",
                _interval(row["bootstrap"], plus=False),
                _interval(row["student"], plus=False),
                f"{row['first']} of {row['n']}",
                never,
            ]
        )
    note = (
        f"kimg that an arm needs over kimg that {results['baseline']} needs, geometric mean over seeds, to come as far "
        "as that share of the baseline's way from its first figure to its last. Below 1 is faster. An arm that never "
        "gets there gives a lower bound."
    )
    header = ["share", "arm", "ratio", "95 % bootstrap (BCa)", "95 % t", "arm first", "reached"]
    return Table("kimg to a threshold", note, header, rows)


def _failures(results: dict[str, Any]) -> Table | None:
    rows = [
        [arm["name"], str(failure["seed"]), failure["reason"]] for arm in results["arms"] for failure in arm["failures"]
    ]
    rows += [
        [arm["name"], str(seed), "finished, but its last state was diverging"]
        for arm in results["arms"]
        for seed in arm["diverging"]
    ]
    return Table("Failures", "", ["arm", "seed", "what happened"], rows) if rows else None


def _tuning(results: dict[str, Any]) -> Table | None:
    tuning = results["tuning"]
    if tuning is None:
        return None
    rows = [
        [
            run["arm"],
            run["setting"],
            str(run["seed"]),
            _number(run["value"]) if run["value"] is not None else f"failed: {run.get('reason', '')}",
            "chosen" + choice["note"] if (choice := tuning["chosen"][run["arm"]])["setting"] == run["setting"] else "",
        ]
        for run in tuning["runs"]
    ]
    note = "Every arm was tried with every setting on a seed that is not compared; its best one was taken."
    return Table("Choice of settings", note, ["arm", "setting", "seed", label(tuning["judged_by"]), ""], rows)


def _mean_line(results: dict[str, Any], arm: str, color: int) -> Line | None:
    """Mean curve of an arm at the measurements that all its finished runs have."""
    curves = [
        dict(map(tuple, run["curves"].get(results["judged_by"], [])))  # type: ignore[arg-type]
        for run in results["runs"]
        if run["arm"] == arm and run["status"] == "finished"
    ]
    shared = sorted(set.intersection(*({*curve} for curve in curves))) if curves else []
    if not shared:
        return None
    values = [(kimg, [curve[kimg] for curve in curves]) for kimg in shared]
    return Line(
        arm,
        color,
        [(kimg, sum(v) / len(v)) for kimg, v in values],
        [(kimg, min(v), max(v)) for kimg, v in values] if len(curves) > 1 else (),
    )


def _machine(run: dict[str, Any]) -> str:
    """Where a run was trained; the process that writes the report may have trained none."""
    return f"{run['machine'].get('device_name')}, {run['machine'].get('num_threads')} threads"


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else number(value)


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def _plus_minus(mean: float, sd: float | None) -> str:
    return number(mean) if sd is None else f"{number(mean)} ± {number(sd)}"


def _ratio(found: dict[str, Any] | None) -> list[str]:
    """Cells of a geometric mean ratio and its two intervals; empty for a figure that has none."""
    if found is None:
        return ["", "", ""]
    return [_number(found["mean"]), *(_interval(found[name], plus=False) for name in ("bootstrap", "student"))]


def _corrected(row: dict[str, Any]) -> str:
    """Cell of the interval that counts all arms: of the ratio where there is one, else of the difference."""
    return _interval((row.get("ratio") or row)["corrected"], plus=not row.get("ratio"))


def _interval(found: dict[str, Any] | None, *, plus: bool = True) -> str:
    if found is None or found["low"] is None or found["high"] is None:
        return "none"
    show = _signed if plus else number
    return f"{show(found['low'])} to {show(found['high'])}"
