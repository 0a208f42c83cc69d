"""Line charts as geometry: scales, ticks and SVG path strings. Knows numbers only; the report's template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 34
MAX_COLUMNS = 300  # more points than twice this are thinned to the extremes of so many columns
MAX_DOTS = 60
LOG_SPAN = 100  # a largest value this many times the median asks for a logarithmic axis

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: For the legend.
        points: (x, y) in order of x; y None is a gap.
        color: Number of the colour, 1 or 2.
        dashed: A reference line (a floor) rather than something measured.
        spread: Half lengths of error bars, one per point; () for none.
    """

    name: str
    points: Sequence[Point]
    color: int = 1
    dashed: bool = False
    spread: Sequence[float | None] = ()


@dataclass(frozen=True)
class Dot:
    """A marked point with its reading; the bar is an error bar from y0 to y1."""

    x: float
    y: float
    text: str
    y0: float | None = None
    y1: float | None = None


@dataclass(frozen=True)
class Curve:
    """A series in picture coordinates."""

    name: str
    color: int
    dashed: bool
    path: str
    dots: list[Dot]


@dataclass(frozen=True)
class Tick:
    """A tick in picture coordinates."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """All that the template needs to draw one chart."""

    title: str
    note: str
    description: str
    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str
    width: int = WIDTH
    height: int = HEIGHT
    box: tuple[int, int, int, int] = field(default=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM))


def chart(title: str, series: Sequence[Series], *, note: str = "", x_label: str = "kimg") -> Chart | None:
    """Lay out a chart; None where no series has a finite point.

    The vertical axis is logarithmic where positive values span so much that a straight one would hide most of them.
    """
    series = [Series(s.name, [(x, _finite(y)) for x, y in s.points], s.color, s.dashed, s.spread) for s in series]
    xs = [x for s in series for x, y in s.points if y is not None]
    values = [y for s in series for _, y in s.points if y is not None]
    if not values:
        return None
    ends = [
        y + sign * half
        for s in series
        for (_, y), half in zip(s.points, s.spread)
        if y is not None and half is not None
        for sign in (-1, 1)
    ]
    log = min(values + ends) > 0 and max(values) > LOG_SPAN * sorted(values)[len(values) // 2]
    scale = math.log10 if log else float
    y_numbers = _decades(min(values), max(values)) if log else nice_ticks(min(values + ends), max(values + ends))
    x_numbers = nice_ticks(min(xs), max(xs), within=True)
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, max(xs) + 0.5)
    y_low, y_high = scale(min(y_numbers[0], *values)), scale(max(y_numbers[-1], *values))

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - (scale(y) - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    curves = []
    for s in series:
        spread = [*s.spread, *[None] * (len(s.points) - len(s.spread))]
        marked = [(x, y, half) for (x, y), half in zip(s.points, spread) if y is not None]
        dots = []
        for x, y, half in marked if not s.dashed and len(marked) <= MAX_DOTS else []:
            reading = f"{s.name} {number(y)}" + (f" ± {number(half)}" if half is not None else "")
            bar = (down(y - half), down(y + half)) if half is not None and not log else (None, None)
            dots.append(Dot(across(x), down(y), f"{reading} at {number(x)} {x_label}", *bar))
        path = _path([(across(x), None if y is None else down(y)) for x, y in thinned(s.points)])
        curves.append(Curve(s.name, s.color, s.dashed, path, dots))
    described = "; ".join(
        f"{s.name} from {number(ends[0])} to {number(ends[-1])}"
        for s in series
        if (ends := [y for _, y in s.points if y is not None])
    )
    return Chart(
        title=title,
        note=f"{note} Logarithmic axis.".strip() if log else note,
        description=f"{title} over {x_label}: {described}",
        curves=curves,
        x_ticks=[Tick(across(x), number(x)) for x in x_numbers],
        y_ticks=[Tick(down(y), number(y)) for y in y_numbers],
        x_label=x_label,
    )


def nice_ticks(low: float, high: float, *, within: bool = False, num: int = 5) -> list[float]:
    """About `num` round numbers (1, 2 or 5 times a power of ten apart) around [low, high], or inside it."""
    if not high > low:
        if within:
            return [low]
        half = abs(low) / 2 or 1.0
        low, high = low - half, high + half
    raw = (high - low) / num
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999), 10 * power)
    slack = 1e-9
    first = math.ceil(low / step - slack) if within else math.floor(low / step + slack)
    last = math.floor(high / step + slack) if within else math.ceil(high / step - slack)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """Up to four significant digits, without exponent where it can be read without."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """The points, or where there are too many for the picture the lowest and highest of each column, in order."""
    if len(points) <= 2 * MAX_COLUMNS:
        return list(points)
    kept: list[Point] = []
    for column in range(MAX_COLUMNS):
        part = points[column * len(points) // MAX_COLUMNS : (column + 1) * len(points) // MAX_COLUMNS]
        finite = [i for i, (_, y) in enumerate(part) if y is not None]
        if not finite:
            kept.append(part[0])
            continue
        lowest = min(finite, key=lambda i: part[i][1] or 0.0)
        highest = max(finite, key=lambda i: part[i][1] or 0.0)
        kept.extend(part[i] for i in sorted({lowest, highest}))
    return kept


def _finite(y: float | None) -> float | None:
    return y if y is not None and math.isfinite(y) else None


def _decades(low: float, high: float) -> list[float]:
    return [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    parts, drawing = [], False
    for x, y in points:
        if y is None:
            drawing = False
            continue
        parts.append(f"{'L' if drawing else 'M'}{x:g} {y:g}")
        drawing = True
    return "".join(parts)
