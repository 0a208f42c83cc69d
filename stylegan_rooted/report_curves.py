"""What the curves of a run show: the series of every chart, and one sentence each that says what to see in it.

The sentences come from the watchdog's signs and the run's own figures. Plain values, no drawing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metrics.evaluate import HIGHER_IS_BETTER
from stylegan_rooted import losses
from stylegan_rooted.finetune import loss_options
from stylegan_rooted.report_charts import Point, Series, number, thinned
from stylegan_rooted.report_run import MetricRow, RunRecord, mean_of
from training import watchdog
from training.measured import ALIKE
from training.watchdog import Figures

INTERVAL = "95 % interval (1.96 standard errors); ± is one standard error"
SURE = 2.0  # standard errors of a difference that count as a change
LABELS = {"fid_inf": "FID∞", "fd_inf": "FD∞", "is": "Inception score", "ppl": "PPL", "fpl": "FPL"}
MAX_APART = 3  # figures measured otherwise that are named one by one
WORDS = {"num_fake": "generated images:", "num_real": "real images:", "data_fingerprint": "data"}
PHASES = ("Gmain", "Greg", "Gboth", "Dmain", "Dreg", "Dboth")
PARTS = {"generator": "G", "discriminator_fake": "D, generated", "discriminator_real": "D, real"}


@dataclass(frozen=True)
class Plot:
    """One chart as facts.

    Attributes:
        title: What is plotted.
        about: How to read it: units, what is better.
        sentence: What it shows here.
        series: The curves.
        state: A state of the watchdog that speaks in the sentence; "healthy" where none does.
        log, lowest: See `report_charts.chart`.
    """

    title: str
    about: str
    sentence: str
    series: Sequence[Series]
    state: str = watchdog.HEALTHY
    log: bool | None = None
    lowest: float | None = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; long curves keep their extremes."""
        series = [
            {
                "name": s.name,
                "style": s.style,
                "reference": s.reference,
                "points": [list(point) for point in thinned(s.points)],
                "errors": list(s.errors) if len(s.points) == len(thinned(s.points)) else [],
            }
            for s in self.series
        ]
        return {**vars(self), "series": series}


def plots(run: RunRecord) -> list[Plot]:
    """All charts that have something to show: first those in which the watchdog sees something, then the figures."""
    signs = run.signs()
    wanted = [
        *(_figure(run, name, signs) for name in _in_order(run)),
        _losses(run, signs),
        _scores(run, signs),
        _augmentation(run, signs),
        _tail(run, signs),
        _steepness(run),
        _gradients(run, signs),
        _looks(run, signs),
        _speed(run),
        _memory(run),
    ]
    shown = [plot for plot in wanted if plot is not None and any(_finite(s.points) for s in plot.series)]
    return sorted(shown, key=lambda plot: plot.state == watchdog.HEALTHY)


def label_of(name: str) -> str:
    """The name of a figure as people read it."""
    return LABELS.get(name, name.upper() if name in ("fid", "kid", "fd", "kd") else name)


def change_of(before: MetricRow, after: MetricRow) -> str:
    """`lower`, `higher`, or `same` where the errors allow for the difference."""
    error = math.hypot(before.error or 0.0, after.error or 0.0)
    if abs(after.value - before.value) <= SURE * error:
        return "same"
    return "lower" if after.value < before.value else "higher"


def with_error(row: MetricRow) -> str:
    """Value ± standard error."""
    return number(row.value) + (f" ± {row.error:.2g}" if row.error is not None else "")


def floors(run: RunRecord) -> tuple[list[Point], list[Point]]:
    """What the losses of G and D can't go below, tick by tick; ([], []) where the run's options don't tell the loss.

    Within a tick a scheduled k moves; the lower of its two ends holds for the tick's mean.
    """
    loss = _loss_of(run)
    if loss is None:
        return [], []
    lower: tuple[list[Point], list[Point]] = ([], [])
    previous = 0.0
    for kimg, _ in run.curve("Progress/kimg"):
        ends = []
        for position in (previous, kimg):
            loss.advance(int(position * 1000))
            ends.append((loss.floor_generator, loss.floor_discriminator))
        for points, values in zip(lower, zip(*ends)):
            points.append((kimg, min(values)))
        previous = kimg
    return lower


# --- the figures


def _in_order(run: RunRecord) -> list[str]:
    """Names of the measured figures, the one to go by first."""
    leading, _ = run.headline()
    return sorted(run.metrics, key=lambda name: (name != leading, list(run.metrics).index(name)))


def _figure(run: RunRecord, name: str, signs: dict[str, str]) -> Plot:
    rows, label = run.metrics[name], label_of(name)
    higher = name.endswith(HIGHER_IS_BETTER)
    low_end = "" if name == "memorisation" else f"{'Higher' if higher else 'Lower'} is better."
    about = f"{low_end} Band, and in brackets: {INTERVAL}." if any(r.error for r in rows) else low_end
    errors = [None if row.error is None else 1.96 * row.error for row in rows]
    series = [Series(label, [(row.kimg, row.value) for row in rows], errors=errors)]
    state = watchdog.HEALTHY
    if name == run.distances(run.kimg)[0] and "measurements of" in signs.get(watchdog.OVERFITTING, ""):
        state = watchdog.OVERFITTING
        sentence = f"Overfitting: {signs[state]}."
    else:
        sentence = _figure_sentence(rows, name, label, higher)
    if rows[-1].warnings:
        sentence += " A warning stands beside it: " + rows[-1].warnings[0].split(": ", 1)[-1] + "."
    if name in run.apart:
        sentence += f" {_apart(run.apart[name], rows[-1])}"
    return Plot(label, about.strip(), sentence, series, state, lowest=None if name in ("kid", "kd") else 0.0)


def _apart(others: Sequence[MetricRow], alike: MetricRow) -> str:
    """What is left out of a curve because it was measured otherwise."""
    shown = []
    for row in others[-MAX_APART:]:
        keys = [key for key in (*ALIKE, "seed") if row.provenance.get(key) != alike.provenance.get(key)]
        differing = ", ".join(f"{WORDS.get(key, key)} {row.provenance.get(key, 'unknown')}" for key in keys)
        shown.append(f"{with_error(row)} at {number(row.kimg)} kimg ({differing})")
    more = f" and {len(others) - MAX_APART} earlier ones" if len(others) > MAX_APART else ""
    return f"Not in the curve, as measured otherwise: {'; '.join(shown)}{more}."


def _figure_sentence(rows: Sequence[MetricRow], name: str, label: str, higher: bool) -> str:
    first, last = rows[0], rows[-1]
    if name == "memorisation":
        expected = last.provenance.get("details", {}) if isinstance(last.provenance.get("details"), dict) else {}
        share = expected.get("expected_share")
        usual = f"; {share:.0%} is what the data itself shows" if isinstance(share, float) else ""
        return f"{last.value:.1%} of generated images lie closer to a training image than most of these do{usual}."
    if len(rows) == 1:
        return f"One measurement, at {number(last.kimg)} kimg: {with_error(last)}."
    best = (max if higher else min)(rows, key=lambda row: row.value)
    change = change_of(first, last)
    moved = {"same": "has not moved beyond its error", "lower": "fell", "higher": "rose"}[change]
    text = f"{label[:1].upper()}{label[1:]} {moved}: {with_error(first)} at {number(first.kimg)} kimg, "
    text += f"{with_error(last)} at the end"
    if best is last:
        return f"{text}, the best so far."
    where = f"the best, {with_error(best)}, was at {number(best.kimg)} kimg"
    return f"{text}; {where}{', within the error' if change_of(best, last) == 'same' else ''}."


# --- the curves of training


def _losses(run: RunRecord, signs: dict[str, str]) -> Plot:
    series = [Series("G", run.curve("Loss/G/loss"), 1), Series("D", run.curve("Loss/D/loss"), 2)]
    last = {s.name: (_finite(s.points) or [math.nan])[-1] for s in series}
    above = []
    for name, style, points in zip("GD", (1, 2), floors(run)):
        values = _finite(points)
        if values:
            low, high = min(values), max(values)
            shown = number(low) if low == high else f"{number(low)} to {number(high)}"
            series.append(Series(f"floor of {name} ({shown})", points, style, reference=True))
            above.append(f"{name} {number(last[name] - values[-1])} above its floor of {number(values[-1])}")
    state, sentence = _divergence(signs, ("scores", "gradient", "steps"))
    if not sentence:
        ends = f"They end with {' and '.join(above)}." if above else ""
        sentence = f"No sign of divergence. {ends} Their height alone says nothing of quality."
    return Plot("Losses", "Means per tick, regularisers not included.", sentence, series, state)


def _scores(run: RunRecord, signs: dict[str, str]) -> Plot:
    series = [
        Series("real", run.curve("Loss/scores/real"), 1),
        Series("generated", run.curve("Loss/scores/fake"), 2),
    ]
    state, sentence = _divergence(signs, ("scores",))
    evidence = signs.get(watchdog.OVERFITTING, "")
    if not sentence and evidence.startswith("the discriminator"):
        state, sentence = watchdog.OVERFITTING, f"Overfitting: {evidence}."
    if not sentence:
        confusion = Figures.of_row(run.stats[-1]).confusion if run.stats else None
        told = (
            f"D takes about {confusion:.0%} of generated images for more real than a real one: 50 % is chance, at 0 % "
            "D has won and G learns nothing from it."
            if confusion is not None
            else "What D gives to reals and to generated images."
        )
        sentence = told
    about = "Means per tick, of augmented images."
    return Plot("Discriminator scores", about, sentence, series, state, lowest=None)


def _augmentation(run: RunRecord, signs: dict[str, str]) -> Plot | None:
    points = run.curve("Progress/augment")
    values = _finite(points)
    if not values or max(values) == 0:
        return None
    series, state = [Series("p", points)], watchdog.HEALTHY
    ada = run.config is not None and run.config.augment.aug == "ada"
    if ada and run.config is not None:
        limit = run.config.augment.p_max
        if max(values) > limit / 2:
            series.append(Series(f"limit ({number(limit)})", [(x, limit) for x, _ in points], 3, reference=True))
        sentence = f"ADA ended at {number(values[-1])}, below its limit of {number(limit)}."
        if watchdog.SATURATED in signs:
            state, sentence = watchdog.SATURATED, f"Saturated: {signs[watchdog.SATURATED]}."
    else:
        sentence = f"Fixed: {number(values[-1])} throughout." if len(set(values)) == 1 else "Fixed by the options."
    return Plot("Augmentation strength p", "Probability of each augmentation, 0 to 1.", sentence, series, state)


def _tail(run: RunRecord, signs: dict[str, str]) -> Plot | None:
    """Shares of a part's gradient and margins, of the rooted loss."""
    series = [
        Series(f"top 1 %: {words}", run.curve(f"Loss/top1_share/{part}"), style)
        for style, (part, words) in enumerate(PARTS.items(), 1)
    ]
    tails = [(words, run.curve(f"Loss/tail_share/{part}")) for part, words in PARTS.items()]
    if any(value for _, points in tails for value in _finite(points)):
        series += [Series(f"tail: {words}", points, style) for style, (words, points) in enumerate(tails, 4)]
    if not any(_finite(s.points) for s in series):
        return None
    state = watchdog.HEALTHY
    largest = max((values[-1] for s in series if (values := _finite(s.points))), default=0.0)
    sentence = f"The gradient is shared out: no part above {largest:.0%} at the end."
    if watchdog.TAIL_DOMINATED in signs:
        state, sentence = watchdog.TAIL_DOMINATED, f"Tail-dominated: {signs[watchdog.TAIL_DOMINATED]}."
    about = (
        f"Top 1 %: share of the gradient held by the steepest 1 % of samples; tail: share of margins in the linear "
        f"tail, where the watchdog speaks above {watchdog.TAIL_SHARE:.0%}."
    )
    return Plot("Tail share", about, sentence, series, state)


def _steepness(run: RunRecord) -> Plot | None:
    """k of the rooted loss where it follows a schedule."""
    loss: Any = _loss_of(run)
    if loss is None or not hasattr(loss, "k"):
        return None
    points: list[Point] = []
    for kimg, _ in run.curve("Progress/kimg"):
        loss.advance(int(kimg * 1000))
        points.append((kimg, float(loss.k)))
    values = _finite(points)
    if not values or min(values) == max(values):
        return None
    sentence = f"k went from {number(values[0])} to {number(values[-1])}, as its schedule says."
    return Plot(
        "Root k", "Of the rooted loss; towards infinity it becomes the logistic loss.", sentence, [Series("k", points)]
    )


def _gradients(run: RunRecord, signs: dict[str, str]) -> Plot:
    series, rises = [], []
    for style, name in enumerate(PHASES, 1):
        points = run.curve(f"Gradient/{name}")
        values = _finite(points)
        if any(values):
            series.append(Series(name, points, style))
            rises.append((values[-1] / (sorted(values)[len(values) // 2] or 1.0), name))
    nonfinite = mean_of(run.stats[-1], "Progress/nonfinite") if run.stats else None
    state, sentence = _divergence(signs, ("gradient", "steps"))
    if not sentence and rises:
        most, name = max(rises)
        sentence = (
            f"No phase blows up: the last norm is at most {most:.2g} times its median ({name}); "
            f"{watchdog.GRADIENT_RISE:.0f} times would be divergence."
        )
    if nonfinite:
        sentence += f" {nonfinite:.0f} steps were left out for non-finite gradients."
    return Plot("Gradient norms", "Mean over the steps of a tick, per phase.", sentence, series, state, log=True)


def _looks(run: RunRecord, signs: dict[str, str]) -> Plot:
    diversity, nearest = run.curve("Watch/diversity"), run.curve("Watch/nearest")
    series = [Series("variety", diversity, 1), Series("distance to training images", nearest, 2)]
    state, parts = watchdog.HEALTHY, []
    if _finite(diversity):
        now, top = _finite(diversity)[-1], max(_finite(diversity))
        parts.append(
            f"Images differ {now:.0%} as much as the reals (at most {top:.0%}); below half of that would be collapse."
        )
    if _finite(nearest):
        now = _finite(nearest)[-1]
        parts.append(
            f"They keep {number(now)} times the distance that training images keep from each other; below "
            f"{watchdog.COPIES:g} would be copies."
        )
    evidence = signs.get(watchdog.OVERFITTING, "")
    if evidence.startswith("generated images"):
        state, parts = watchdog.OVERFITTING, [f"Overfitting: {evidence}."]
    if watchdog.COLLAPSING in signs:
        state, parts = watchdog.COLLAPSING, [f"Collapsing: {signs[watchdog.COLLAPSING]}."]
    about = "Of the first 64 images of the fixed grid, as thumbnails; the real images being 1."
    return Plot("Variety and distance", about, " ".join(parts), series, state)


def _speed(run: RunRecord) -> Plot:
    points = run.curve("Timing/sec_per_kimg")
    values = _finite(points)
    total = mean_of(run.stats[-1], "Timing/total_sec") if run.stats else None
    sentence = f"{number(sorted(values)[len(values) // 2])} s per kimg (median)" if values else ""
    if total is not None:
        sentence += f"; {_duration(total)} in all, measurements included"
    return Plot("Speed", "Seconds per thousand images, less is faster.", sentence + ".", [Series("sec/kimg", points)])


def _memory(run: RunRecord) -> Plot:
    cpu, gpu = run.curve("Resources/cpu_mem_gb"), run.curve("Resources/peak_gpu_mem_gb")
    series, words = [Series("main memory", cpu, 1)], []
    if any(_finite(gpu)):
        series.append(Series("GPU", gpu, 2))
    for s in series:
        if values := _finite(s.points):
            words.append(f"{s.name} {number(max(values))} GiB")
    sentence = f"At most: {', '.join(words)}." if words else ""
    values = _finite(cpu)
    if len(values) > 4 and values[-1] > 1.5 * values[len(values) // 2]:
        sentence += " It is still growing."
    return Plot("Memory", "GiB, highest so far (main memory) or of the tick (GPU).", sentence, series)


def _divergence(signs: dict[str, str], words: tuple[str, ...]) -> tuple[str, str]:
    """(state, sentence) where the watchdog calls the run diverging for a reason in which one of the words stands."""
    evidence = signs.get(watchdog.DIVERGING, "")
    if any(word in evidence for word in words):
        return watchdog.DIVERGING, f"Diverging: {evidence}."
    return watchdog.HEALTHY, ""


def _loss_of(run: RunRecord) -> Any:
    if run.config is None:
        return None
    try:
        return losses.build_loss(run.config.loss.name, **loss_options(run.config))
    except (ValueError, TypeError):
        return None


def _finite(points: Sequence[Point]) -> list[float]:
    return [y for _, y in points if y is not None and math.isfinite(y)]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
