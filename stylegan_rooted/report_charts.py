"""Line charts as geometry: scales, ticks and SVG path strings. Knows numbers only; the report's template draws them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 34
NUM_STYLES = 6  # colours, each with a dash pattern of its own
MAX_COLUMNS = 300  # more points than twice this are thinned to the extremes of so many columns
MAX_DOTS = 60
LOG_SPAN = 40  # a largest value this many times the median asks for a logarithmic axis

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: For the legend.
        points: (x, y) in order of x; y None is a gap.
        style: Number of colour and dash pattern, 1 to `NUM_STYLES`.
        reference: Something to compare with (a floor, a limit) rather than something measured.
        errors: Half widths of the band around the points, one per point; () for none.
    """

    name: str
    points: Sequence[Point]
    style: int = 1
    reference: bool = False
    errors: Sequence[float | None] = ()


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
    """A series in picture coordinates; `band` is the outline of its errors, "" without."""

    name: str
    style: int
    reference: bool
    path: str
    band: str
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


def chart(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    x_label: str = "kimg",
    log: bool | None = None,
    lowest: float | None = None,
) -> Chart | None:
    """Lay out a chart; None where no series has a finite point.

    Args:
        title: Of the picture's description.
        series: At most `NUM_STYLES` measured ones can be told apart.
        note: Kept as it is, but for a word on the axis.
        x_label: What runs to the right.
        log: Whether the vertical axis is logarithmic; None decides by the values: it is where positive ones span so
            much that a straight one would hide most of them. Where it is asked for, other values are gaps.
        lowest: What the values can't go below, nor the axis; None where they can go anywhere.
    """
    least = 0.0 if log else -math.inf
    series = [
        Series(s.name, [(x, _above(y, least)) for x, y in s.points], s.style, s.reference, s.errors) for s in series
    ]
    xs = [x for s in series for x, y in s.points if y is not None]
    values = [y for s in series for _, y in s.points if y is not None]
    if not values:
        return None
    spans = max(values) > LOG_SPAN * sorted(values)[len(values) // 2]
    log = min(values) > 0 and (spans if log is None else log)
    ends = [end for s in series for point, half in _with_errors(s) for end in _ends(point[1], half)]
    low, high = min(values), max(values)
    if not log:
        low, high = min([low, *ends]), max([high, *ends])
    if lowest is not None:
        low = max(low, min(lowest, *values))
    scale = _axis(low, high, log)
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, max(xs) + 0.5)

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    curves = []
    for s in series:
        points = thinned([(across(x), None if y is None else scale.down(y)) for x, y in s.points])
        band = _band([(across(x), [scale.down(e) for e in _ends(y, half)]) for (x, y), half in _with_errors(s)])
        curves.append(Curve(s.name, s.style, s.reference, _path(points), band, _dots(s, across, scale, x_label)))
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
        x_ticks=[Tick(across(x), number(x)) for x in nice_ticks(min(xs), max(xs), within=True)],
        y_ticks=[Tick(scale.down(y), number(y)) for y in scale.ticks],
        x_label=x_label,
    )


@dataclass(frozen=True)
class _Scale:
    """The vertical axis."""

    ticks: list[float]
    low: float
    high: float
    log: bool

    def down(self, y: float) -> float:
        """Picture coordinate of a value; what a logarithm does not have lies at the lower end."""
        position = math.log10(max(y, 1e-300)) if self.log else y
        share = min(max((position - self.low) / (self.high - self.low), 0.0), 1.0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _axis(low: float, high: float, log: bool) -> _Scale:
    ticks = _log_ticks(low, high) if log else nice_ticks(low, high)
    ends = [low, high, ticks[0], ticks[-1]]
    if log:
        ends = [math.log10(end) for end in ends]
    return _Scale(ticks, min(ends), max(ends) if max(ends) > min(ends) else min(ends) + 1, log)


def _with_errors(s: Series) -> list[tuple[Point, float | None]]:
    return list(zip(s.points, [*s.errors, *[None] * (len(s.points) - len(s.errors))]))


def _ends(y: float | None, half: float | None) -> list[float]:
    return [] if y is None or half is None or not math.isfinite(half) else [y - half, y + half]


def _band(points: Sequence[tuple[float, list[float]]]) -> str:
    """Outline around the points that have errors; a single one gets a bar of its own in `_dots`."""
    known = [(x, ends) for x, ends in points if ends]
    if len(known) < 2:
        return ""
    outline = [(x, ends[0]) for x, ends in known] + [(x, ends[1]) for x, ends in reversed(known)]
    return _path(outline) + "Z"


def _dots(s: Series, across: Callable[[float], float], scale: _Scale, x_label: str) -> list[Dot]:
    """Marks with a reading each, where they are few enough to be told apart."""
    marked = [(x, y, half) for (x, y), half in _with_errors(s) if y is not None]
    if s.reference or len(marked) > MAX_DOTS:
        return []
    dots = []
    for x, y, half in marked:
        reading = f"{s.name} {number(y)}" + (f" ({number(y - half)} to {number(y + half)})" if half is not None else "")
        ends: Sequence[float | None] = [scale.down(end) for end in _ends(y, half)] or (None, None)
        dots.append(Dot(across(x), scale.down(y), f"{reading} at {number(x)} {x_label}", *ends))
    return dots


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


def _above(y: float | None, least: float) -> float | None:
    return y if y is not None and math.isfinite(y) and y > least else None


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high]; within two of them also 2 and 5 times those."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(math.ceil((last - first) / 6), 1)
    if last - first > 2:
        return [10.0**i for i in range(first, last + step, step)]
    ticks = [float(f"{m * 10.0**i:.6g}") for i in range(first, last + 1) for m in (1, 2, 5)]
    below, above = [t for t in ticks if t <= low], [t for t in ticks if t >= high]
    return [t for t in ticks if below[-1] <= t <= above[0]]


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    parts, drawing = [], False
    for x, y in points:
        if y is None:
            drawing = False
            continue
        parts.append(f"{'L' if drawing else 'M'}{x:g} {y:g}")
        drawing = True
    return "".join(parts)
