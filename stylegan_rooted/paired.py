"""Statistics of paired runs: differences and ratios with intervals, and what may be said of them. Pure; knows no files.

Two runs are a pair if they differ in one thing only, here the loss, and share seed, data and draws. What a pair's
difference (or ratio, see `compare_pairs`) tells is freed of what the seed did to both. With few pairs every interval is
coarse: the bootstrap's is then too narrow (`tests/test_paired.py` measures by how much), Student's needs differences
that are about normal. So both are given, and `verdict` claims a difference only where all of them exclude equality, and
once more at a level that counts how many comparisons were made.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95
EXACT_UP_TO = 8  # pairs; 6,435 different resamples, all of which are counted
NUM_RESAMPLES = 9999
COARSE_BELOW = 10
"""Pairs below which an interval is called coarse."""

METHODS = ("bca", "percentile", "t")
BETTER, WORSE, NONE_SEEN, TOO_FEW = "better", "worse", "no difference seen", "too few pairs"
LEFT_OPEN = "left open by failed runs"
ROUNDING = 1e-12
"""Differences that spread by less, relative to the values they are of, differ by rounding alone; so do logarithms."""
MAX_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Interval:
    """A mean of paired differences (or a geometric mean of ratios) and where it may lie.

    Attributes:
        mean: What was found.
        low, high: Ends; infinite where there are too few pairs for an interval.
        n: Pairs.
        method: `bca`, `percentile` or `t`.
        level: Nominal probability that the interval covers the truth.
    """

    mean: float
    low: float
    high: float
    n: int
    method: str
    level: float = LEVEL

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside."""
        return value < self.low or value > self.high


@dataclass(frozen=True)
class Comparison:
    """One paired comparison, seen in three ways.

    Attributes:
        bootstrap: BCa interval.
        student: Student's t interval.
        corrected: Student's at the level 1 - (1 - level) / num_comparisons (Bonferroni).
        num_comparisons: How many comparisons this one was made among.
        of_ratios: Whether the intervals are of a / b instead of a - b.
    """

    bootstrap: Interval
    student: Interval
    corrected: Interval
    num_comparisons: int
    of_ratios: bool = False

    @property
    def n(self) -> int:
        """Pairs."""
        return self.bootstrap.n

    @property
    def neutral(self) -> float:
        """What two equal arms give: a difference of 0, or a ratio of 1."""
        return 1.0 if self.of_ratios else 0.0


@dataclass(frozen=True)
class Verdict:
    """What the intervals allow to be said: BETTER, WORSE, NONE_SEEN, TOO_FEW or LEFT_OPEN; `text` is one line."""

    outcome: str
    text: str


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, method: str = "bca", level: float = LEVEL, seed: int = 0
) -> Interval:
    """Mean of a - b over pairs, with an interval.

    The bootstrap counts every possible resample up to 8 pairs, and draws 9,999 with `seed` beyond.

    Args:
        a, b: One value per pair, in the same order.
        method: `bca` (Efron 1987, bias-corrected and accelerated), `percentile` or `t`.
        level: In (0, 1).
        seed: Of the resamples.

    Raises:
        ValueError: Lengths differ, there is no pair, a value is not finite, or an unknown method.
    """
    first, second = _pairs(a, b)
    noise = ROUNDING * max(np.abs(first).max(initial=0.0), np.abs(second).max(initial=0.0))
    return _interval(_without_rounding(first - second, noise), method, level, seed)


def paired_ratio(a: ArrayLike, b: ArrayLike, *, method: str = "bca", level: float = LEVEL, seed: int = 0) -> Interval:
    """Geometric mean of a / b over pairs, with an interval: that of logarithms' differences, put back; an end that is
    too large for a float is infinite.

    Raises:
        ValueError: As `paired_difference`, or a value that is not positive.
    """
    first, second = _pairs(a, b)
    if not (first > 0).all() or not (second > 0).all():
        raise ValueError("ratios need positive values")
    # What is relative in a value is absolute in its logarithm.
    found = _interval(_without_rounding(np.log(first) - np.log(second), ROUNDING), method, level, seed)
    mean, low, high = (math.exp(x) if x <= MAX_EXPONENT else math.inf for x in (found.mean, found.low, found.high))
    return Interval(mean, low, high, found.n, method, level)


def compare_pairs(
    a: ArrayLike, b: ArrayLike, *, of_ratios: bool = False, num_comparisons: int = 1, level: float = LEVEL
) -> Comparison:
    """All intervals of a - b, or of a / b.

    Ratios are for positive figures whose spread grows with their size, as distances between distributions do: of runs
    that end at twice, five and twenty times the baseline's figure the differences spread as far as they are large.

    Args:
        a, b: One value per pair, in the same order.
        of_ratios: Whether to look at a / b, by logarithms.
        num_comparisons: How many such comparisons are looked at together.

    Raises:
        ValueError: See `paired_difference` and `paired_ratio`.
    """
    if num_comparisons < 1:
        raise ValueError(f"num_comparisons {num_comparisons} is below 1")
    interval = paired_ratio if of_ratios else paired_difference
    return Comparison(
        bootstrap=interval(a, b, level=level),
        student=interval(a, b, method="t", level=level),
        corrected=interval(a, b, method="t", level=1 - (1 - level) / num_comparisons),
        num_comparisons=num_comparisons,
        of_ratios=of_ratios,
    )


def verdict(
    name: str,
    baseline: str,
    found: Comparison,
    *,
    what: str,
    lower_is_better: bool = True,
    num_failed: int = 0,
    num_failed_baseline: int = 0,
) -> Verdict:
    """One line about `name` against `baseline`; `found` is of name's values less (or over) baseline's.

    A difference is claimed only where the bootstrap's, Student's and the corrected interval exclude equality.
    Differences that are all equal have no spread to make an interval of: then their common sign must do (an exact sign
    test at the corrected level). What failed more often is never the better one: pairs that are left are those it
    survived.

    Args:
        what: What was measured, e.g. "final FD".
        lower_is_better: Whether small values are good.
        num_failed, num_failed_baseline: Runs of either that are in no pair because they have no figure.
    """
    both = (found.bootstrap, found.student)
    head = f"{name} against {baseline}, {what}"
    mean, neutral = found.student.mean, found.neutral
    kind, show = ("ratio", _plain) if found.of_ratios else ("difference", _signed)
    if found.n < 2:
        return Verdict(TOO_FEW, f"{head}: one pair ({kind} {show(mean)}) shows no spread, so nothing can be said")
    note = coarse_note(found.n)
    ending = f"; {note}" if note else ""
    if found.student.low == found.student.high:
        equal = f"all {found.n} {kind}s are {show(mean)}"
        if mean == neutral:
            return Verdict(NONE_SEEN, f"{head}: {NONE_SEEN} ({equal}){ending}")
        if 2.0 ** (1 - found.n) > 1 - found.corrected.level:
            return Verdict(TOO_FEW, f"{head}: {equal} and show no spread, so nothing can be said")
    low, high = min(i.low for i in both), max(i.high for i in both)
    numbers = (
        f"mean {kind} {show(mean)}, {found.student.level:.0%} interval {show(found.bootstrap.low)} to "
        f"{show(found.bootstrap.high)} (bootstrap), {show(found.student.low)} to {show(found.student.high)} "
        f"(t), n = {found.n}"
    )
    if all(i.excludes(neutral) for i in (*both, found.corrected)):
        outcome = BETTER if (mean < neutral) == lower_is_better else WORSE
        winner, failures, others = name, num_failed, num_failed_baseline
        if outcome == WORSE:
            winner, failures, others = baseline, num_failed_baseline, num_failed
        if failures > others:
            why = f"{outcome} in the pairs that are left, but {winner} failed more often"
            return Verdict(LEFT_OPEN, f"{head}: {LEFT_OPEN}, {why} ({numbers}){ending}")
        return Verdict(outcome, f"{head}: {outcome} ({numbers}){ending}")
    why = f"anything from {show(low)} to {show(high)} is not excluded"
    if all(i.excludes(neutral) for i in both):
        why = (
            f"a single comparison would show one, but this is one of {found.num_comparisons}, and the interval "
            f"corrected for that is {show(found.corrected.low)} to {show(found.corrected.high)}"
        )
    elif any(i.excludes(neutral) for i in both):
        why = f"only one of the two intervals excludes {neutral:g}; {why}"
    return Verdict(NONE_SEEN, f"{head}: {NONE_SEEN} ({numbers}; {why}){ending}")


def coarse_note(n: int) -> str:
    """What to say beside an interval of so few pairs; "" where they are enough."""
    if n >= COARSE_BELOW:
        return ""
    if n == 1:
        return "one pair has no interval"
    least = 2.0 ** (1 - n)
    beyond = f" (an exact sign test cannot fall below p = {least:.2g})" if least > 0.05 else ""
    return f"{n} pairs are few and the intervals coarse{beyond}"


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [n]."""
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"pairs need two lists of one length, got {first.shape} and {second.shape}")
    return first, second


def _without_rounding(d: np.ndarray, noise: float) -> np.ndarray:
    """Differences `d`, all of them their mean where they spread by `noise` alone, and 0 where that is noise, too."""
    if not d.size or not np.ptp(d) <= noise < math.inf:
        return d
    mean = float(d.mean())
    return np.full_like(d, mean if abs(mean) > noise else 0.0)


def _interval(d: np.ndarray, method: str, level: float, seed: int) -> Interval:
    """Interval of the mean of `d` [n]."""
    if method not in METHODS:
        raise ValueError(f"method {method} is unknown; one of {', '.join(METHODS)}")
    if not 0 < level < 1:
        raise ValueError(f"level {level} is outside (0, 1)")
    if not d.size:
        raise ValueError("there is no pair")
    if not np.isfinite(d).all():
        raise ValueError("pairs need finite values; leave out the pairs in which a run failed, and say so")
    n, mean = d.size, float(d.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n, method, level)
    tail = (1 - level) / 2
    if np.ptp(d) == 0:
        low = high = mean
    elif method == "t":
        half = float(stats.t.ppf(1 - tail, n - 1) * d.std(ddof=1) / math.sqrt(n))
        low, high = mean - half, mean + half
    else:
        values, weights = _resampled_means(d, seed)
        below, above = (tail, tail) if method == "percentile" else _bca_tails(d, values, weights, tail)
        order = np.argsort(values, kind="stable")
        low = _lower_quantile(values[order], weights[order], below)
        high = -_lower_quantile(-values[order[::-1]], weights[order[::-1]], above)
    return Interval(mean, low, high, n, method, level)


def _resampled_means(d: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(means, probabilities) of resamples of `d` with replacement: all different ones, or drawn with `seed`."""
    n = d.size
    if n <= EXACT_UP_TO:
        counts, weights = _all_resamples(n)
        return counts @ d / n, weights
    drawn = np.random.default_rng(seed).integers(n, size=[NUM_RESAMPLES, n])
    return d[drawn].mean(axis=1), np.full(NUM_RESAMPLES, 1 / NUM_RESAMPLES)


@lru_cache(maxsize=EXACT_UP_TO)
def _all_resamples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(how often each of n is drawn [R, n], multinomial probability [R]) of all resamples of size n, unordered."""
    chosen = itertools.combinations_with_replacement(range(n), n)
    counts = np.stack([np.bincount(c, minlength=n) for c in chosen])
    ways = [math.factorial(n) / math.prod(map(math.factorial, row)) for row in counts.tolist()]
    return counts, np.asarray(ways) / float(n) ** n


def _bca_tails(d: np.ndarray, values: np.ndarray, weights: np.ndarray, tail: float) -> tuple[float, float]:
    """(probability below the low end, above the high end): Efron & Tibshirani 1993, eqs. 14.10, 14.14 and 14.15."""
    mean = d.mean()
    slack = 1e-12 * np.abs(d).max()
    bias = stats.norm.ppf(weights[values < mean - slack].sum() + weights[np.abs(values - mean) <= slack].sum() / 2)
    left_out = mean - d  # jackknife means less the mean, up to a factor, which cancels as the scale does
    left_out /= np.abs(left_out).max()
    acceleration = -(left_out**3).sum() / (6 * (left_out**2).sum() ** 1.5)

    def moved(z: float) -> float:
        return float(stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))))

    z = float(stats.norm.ppf(tail))
    return moved(z), 1 - moved(-z)


def _lower_quantile(values: np.ndarray, weights: np.ndarray, probability: float) -> float:
    """The smallest of ascending `values` at or below which at least `probability` lies."""
    reached = np.cumsum(weights) >= probability * (1 - 1e-12)
    return float(values[int(np.argmax(reached)) if reached.any() else -1])


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _plain(value: float) -> str:
    return f"{value:.3g}"
