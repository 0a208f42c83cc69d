"""Objectives against the baseline, paired by seed: one entry per objective and setting. Knows statistics, no files."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stylegan_rooted import paired
from stylegan_rooted.study.objectives import BASELINE

BASE, FAILED = "baseline", "all failed"


@dataclass(frozen=True)
class Entry:
    """One objective's figure in one setting beside the baseline's.

    Attributes:
        mean: Over the runs that have the figure (geometric for ratios); None where none has.
        num_runs, num_failed: Runs, and those without the figure.
        effect, low, high: Mean paired difference (or ratio) to the baseline with Student's 95 % interval, if any.
        outcome: One of paired's, or BASE, or FAILED.
    """

    mean: float | None
    num_runs: int
    num_failed: int
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    outcome: str = BASE

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def entry(
    values: Sequence[float | None],
    baseline: Sequence[float | None] | None,
    *,
    lower_is_better: bool,
    ratio: bool = False,
    num_comparisons: int = 1,
) -> Entry:
    """Compare one value per seed with the baseline's.

    Args:
        values: None or NaN where a run has no figure: it diverged, or never got there.
        baseline: The baseline's, in the same order of seeds; None for the baseline itself.
        lower_is_better: Whether small values are good.
        ratio: Compare by ratio; values are positive then.
        num_comparisons: How many comparisons are looked at together.

    An objective with more failures than the baseline is never called better, and one with fewer never worse.
    """
    found = [_finite(v) for v in values]
    kept = [v for v in found if v is not None]
    num_failed = len(found) - len(kept)
    if not kept:
        return Entry(None, len(found), num_failed, outcome=BASE if baseline is None else FAILED)
    log = math.log if ratio else float
    mean = sum(map(log, kept)) / len(kept)
    mean = math.exp(mean) if ratio else mean
    if baseline is None:
        return Entry(mean, len(found), num_failed)
    base = [_finite(v) for v in baseline]
    pairs = [(log(a), log(b)) for a, b in zip(found, base) if a is not None and b is not None]
    if not pairs:
        return Entry(mean, len(found), num_failed, outcome=paired.TOO_FEW)
    compared = paired.compare_pairs(*zip(*pairs), num_comparisons=num_comparisons)
    outcome = paired.verdict(
        "", "", compared, what="", lower_is_better=lower_is_better, num_failed=num_failed,
        num_failed_baseline=base.count(None),
    ).outcome  # fmt: skip
    if outcome == paired.LEFT_OPEN:
        outcome = paired.NONE_SEEN
    back = math.exp if ratio else float
    interval = compared.student
    low, high = (back(end) if math.isfinite(end) else None for end in (interval.low, interval.high))
    return Entry(mean, len(found), num_failed, back(interval.mean), low, high, outcome)


def column(
    values: Mapping[str, Sequence[float | None]], *, lower_is_better: bool, ratio: bool = False
) -> dict[str, Entry]:
    """Entries of all objectives in one setting; the comparisons of a column are counted together."""
    base = values[BASELINE]
    return {
        name: entry(
            row,
            None if name == BASELINE else base,
            lower_is_better=lower_is_better,
            ratio=ratio,
            num_comparisons=max(len(values) - 1, 1),
        )
        for name, row in values.items()
    }


def tally(columns: Iterable[dict[str, Entry]]) -> Counter[str]:
    """How often each outcome occurs, the baseline's own entries aside."""
    return Counter(e.outcome for entries in columns for e in entries.values() if e.outcome != BASE)


def tally_text(counts: Counter[str]) -> str:
    """`12 comparisons: 3 better, 2 worse, 7 no difference seen`."""
    parts = [f"{counts[k]} {k}" for k in (paired.BETTER, paired.WORSE, paired.NONE_SEEN, FAILED, paired.TOO_FEW)
             if counts[k] or k in (paired.BETTER, paired.WORSE)]  # fmt: skip
    return f"{counts.total()} comparisons: {', '.join(parts)}"


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
