"""Figures of the studies as PNG and SVG: curves in panels, and intervals in panels. The door to matplotlib.

Colours say which family an objective belongs to, their depth its k. Nothing is drawn through pyplot's global state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stylegan_rooted.study.data import INSTALL_HINT
from stylegan_rooted.study.objectives import BASELINE, ROOTS

DPI = 80
PANEL_INCHES = (3.1, 2.3)
NUM_CUT = 2
"""So many of the longest bars of a panel may be cut off."""
RATIO_TICKS = (0.1, 0.2, 0.33, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10)
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "stylegan-rooted",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Curve:
    """One objective's curve; points whose value is None are left out."""

    objective: str
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True)
class Bar:
    """One objective's effect with its interval, None without one; `claimed` is drawn full, else hollow."""

    objective: str
    effect: float | None
    low: float | None
    high: float | None
    claimed: bool


@dataclass(frozen=True)
class Panel:
    """One small chart of curves or of bars."""

    title: str
    curves: Sequence[Curve] = ()
    bars: Sequence[Bar] = ()
    marks: Sequence[float] = field(default=())
    """Heights of horizontal lines."""


def draw(
    folder: Path,
    name: str,
    rows: Sequence[Sequence[Panel]],
    *,
    x_label: str,
    y_label: str = "",
    x_log: bool = False,
    y_log: bool = False,
    neutral: float = 0.0,
) -> None:
    """Write `folder/figures/NAME.png` and `.svg`.

    Args:
        folder: The report's.
        name: Of the files, without ending.
        rows: Panels in rows of equal length.
        x_label, y_label: Of the outer panels.
        x_log, y_log: Logarithmic axes.
        neutral: Where bars mean no effect.

    Raises:
        ValueError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        width, height = PANEL_INCHES
        figure = matplotlib.figure.Figure(
            figsize=(width * len(rows[0]) + 1.4, height * len(rows) + 0.3), layout="constrained"
        )
        grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        handles: dict[str, Any] = {}
        for i, (row, axes_row) in enumerate(zip(rows, grid)):
            for j, (panel, axes) in enumerate(zip(row, axes_row)):
                axes.set_title(panel.title)
                for curve in panel.curves:
                    handles.setdefault(curve.objective, _draw_curve(axes, curve, y_log))
                for mark in panel.marks:
                    axes.axhline(mark, color="0.75", linewidth=0.6, zorder=0)
                axes.set_xscale("log" if x_log else "linear")
                axes.set_yscale("log" if y_log else "linear")
                if panel.bars:
                    _draw_bars(axes, panel.bars, neutral, names=j == 0, ratio=x_log)
                axes.set_xlabel(x_label if i == len(rows) - 1 else "")
                axes.set_ylabel(y_label if j == 0 else "")
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
        target = folder / "figures"
        target.mkdir(parents=True, exist_ok=True)
        figure.savefig(target / f"{name}.png", dpi=DPI)
        figure.savefig(target / f"{name}.svg", metadata={"Date": None})


def look(objective: str) -> dict[str, Any]:
    """Colour, dashes and width of an objective's line."""
    form, _, k = objective.partition(":")
    if objective == BASELINE:
        return {"color": "black", "linewidth": 1.8, "zorder": 5}
    if form in ("inverse", "direct"):
        depth = 1 - 0.62 * math.log(float(k)) / math.log(max(ROOTS))
        map_name = "Blues" if form == "inverse" else "Oranges"
        return {"color": _matplotlib().colormaps[map_name](min(max(depth, 0.38), 1.0)), "linewidth": 1.1}
    return {"color": {"focal": "green", "mse": "purple"}.get(form, "0.5"), "linewidth": 1.1, "linestyle": "--"}


def _draw_curve(axes: Any, curve: Curve, y_log: bool) -> Any:
    points = [(x, y) for x, y in zip(curve.x, curve.y) if y is not None and math.isfinite(y) and (y > 0 or not y_log)]
    (line,) = axes.plot([x for x, _ in points], [y for _, y in points], **look(curve.objective))
    return line


def _draw_bars(axes: Any, bars: Sequence[Bar], neutral: float, *, names: bool, ratio: bool) -> None:
    """One line per objective, from the top; what reaches far beyond the others is cut off at the edge."""
    axes.axvline(neutral, color="0.6", linewidth=0.8)
    reach = [0.0]
    for place, bar in enumerate(bars):
        if bar.effect is None or bar.low is None or bar.high is None:
            continue
        color = look(bar.objective)["color"]
        axes.plot([bar.low, bar.high], [place, place], color=color, linewidth=1.2)
        axes.plot([bar.effect], [place], "o", color=color, markersize=4, fillstyle="full" if bar.claimed else "none")
        ends = [math.log(end) if ratio else end - neutral for end in (bar.low, bar.high)]
        reach.append(max(map(abs, ends)))
    farthest = 1.15 * (sorted(reach)[-1 - NUM_CUT] if len(reach) > 2 * NUM_CUT else max(reach)) or 1.0
    if ratio:
        axes.set_xlim(math.exp(-farthest), math.exp(farthest))
        ticks = [tick for tick in RATIO_TICKS if abs(math.log(tick)) <= farthest]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.set_xlim(neutral - farthest, neutral + farthest)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_yticks(range(len(bars)), [bar.objective for bar in bars] if names else [""] * len(bars))


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as e:
        raise ValueError(f"matplotlib is not installed; {INSTALL_HINT}") from e
    return matplotlib
