"""Names the state of a run from the figures of its ticks: pure arithmetic on numbers, which decides nothing.

The figures are those of stats.jsonl, so the verdict of any run can be had again from its files. Thresholds are far from
what healthy runs show rather than close to where trouble begins: a name should mean something.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEALTHY = "healthy"
SATURATED = "augment-saturated"
OVERFITTING = "overfitting"
COLLAPSING = "collapsing"
DIVERGING = "diverging"
TAIL_DOMINATED = "tail-dominated"
ADVICE = {
    HEALTHY: "go on",
    SATURATED: "D wants more augmentation than --p-max: more data, --mirror true or a larger --gamma help",
    OVERFITTING: "take the best snapshot so far; more data, augmentation or --freezed delays this",
    COLLAPSING: "images become alike: go back to an earlier snapshot, with a larger --gamma or a smaller --glr",
    DIVERGING: "go back to the last good state, larger --gamma, smaller --glr and --dlr (--loss rooted: a --tail)",
    TAIL_DOMINATED: "few far-off samples steer the rooted loss: a larger --k or --tail linear bounds their share",
}

NONFINITE_STEPS = 5  # left out in one tick
LARGE_SCORE = 100.0  # |mean| + spread of D's logits; R1 keeps them within about ten
GRADIENT_RISE = 30.0  # times the median of the ticks before
NUM_BEFORE = 3  # ticks, for a median to be one
LARGE_GRADIENT = 1e6  # at any tick, the first ones too; healthy runs stay below a hundredth of it
LOST_DIVERSITY = 0.5  # of the most that the run had, and of the reals'
NUM_WORSE = 3  # measurements in a row ...
WORSE = 1.1  # ... above the best by this factor
COPIES = 0.35  # of the distance from one training image to the next
ALL_REAL = 0.9  # mean sign of D on reals ...
SEPARATED = 0.05  # ... and how often a fake is taken for more real than a real
TAIL_SHARE = 0.25
TOP_SHARE = 0.5  # of the gradient, in 1 % of the samples ...
NUM_SAMPLES = 300  # ... of at least so many


@dataclass(frozen=True)
class Figures:
    """What one tick says; None where it says nothing.

    Attributes:
        kimg: Real images shown, in thousands.
        num_nonfinite: Steps left out so far for non-finite gradients.
        real_score, real_spread, fake_score, fake_spread: Mean and standard deviation of D's logits.
        num_scores: Logits of fakes in this tick.
        real_sign: Mean sign of D's logits of reals.
        gradients: Mean norm of the gradient per phase.
        augment_p: Augmentation probability.
        diversity: Spread of the fixed grid's images, that of the reals being 1.
        nearest: Distance of the grid's images to the nearest training image; between training images it is 1.
        tail_share: Largest share of margins in the rooted loss's linear tail.
        top_share: Largest share of the gradient in the steepest 1 % of the samples.
    """

    kimg: float
    num_nonfinite: float = 0.0
    real_score: float | None = None
    real_spread: float | None = None
    fake_score: float | None = None
    fake_spread: float | None = None
    num_scores: float = 0.0
    real_sign: float | None = None
    gradients: Mapping[str, float | None] | None = None
    augment_p: float | None = None
    diversity: float | None = None
    nearest: float | None = None
    tail_share: float | None = None
    top_share: float | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Figures":
        """Those of a line of stats.jsonl."""

        def get(name: str, key: str = "mean") -> float | None:
            value = row.get(name)
            value = value.get(key) if isinstance(value, Mapping) else None
            return float(value) if isinstance(value, int | float) else None

        def largest(prefix: str) -> float | None:
            found = [value for name in row if name.startswith(prefix) if (value := get(name)) is not None]
            return max(found, default=None)

        return cls(
            kimg=get("Progress/kimg") or 0.0,
            num_nonfinite=get("Progress/nonfinite") or 0.0,
            real_score=get("Loss/scores/real"),
            real_spread=get("Loss/scores/real", "std"),
            fake_score=get("Loss/scores/fake"),
            fake_spread=get("Loss/scores/fake", "std"),
            num_scores=get("Loss/scores/fake", "num") or 0.0,
            real_sign=get("Loss/signs/real"),
            gradients={name: get(name) for name in row if name.startswith("Gradient/")},
            augment_p=get("Progress/augment"),
            diversity=get("Watch/diversity"),
            nearest=get("Watch/nearest"),
            tail_share=largest("Loss/tail_share/"),
            top_share=largest("Loss/top1_share/"),
        )

    @property
    def confusion(self) -> float | None:
        """How often a fake gets a higher logit than a real, if both were normally distributed; 0.5 is chance."""
        if None in (self.real_score, self.real_spread, self.fake_score, self.fake_spread):
            return None
        assert self.real_score is not None and self.fake_score is not None
        width = math.hypot(self.real_spread or 0.0, self.fake_spread or 0.0)
        gap = self.real_score - self.fake_score
        return 0.5 * math.erfc(gap / (width * math.sqrt(2))) if width else 0.5 * (1 - math.copysign(gap != 0, gap))


@dataclass(frozen=True)
class Verdict:
    """A state with what speaks for it; `advice` is one sentence."""

    state: str = HEALTHY
    evidence: str = ""

    @property
    def advice(self) -> str:
        return ADVICE[self.state]

    def __str__(self) -> str:
        return f"{self.state}: {self.evidence}; {self.advice}" if self.evidence else self.state


def judge(
    history: Sequence[Figures], *, p_max: float | None = None, distances: Sequence[float] = (), figure: str = "distance"
) -> Verdict:
    """The state at the last of a run's ticks; the gravest one that applies. See `signs`."""
    for state, evidence in signs(history, p_max=p_max, distances=distances, figure=figure).items():
        return Verdict(state, evidence)
    return Verdict()


def signs(
    history: Sequence[Figures], *, p_max: float | None = None, distances: Sequence[float] = (), figure: str = "distance"
) -> dict[str, str]:
    """Every state but the healthy one that applies at the last of a run's ticks, the gravest first: its evidence.

    Args:
        history: The ticks so far, at least one.
        p_max: ADA's upper clamp; None where the strength is not adaptive.
        distances: FID or FD of all measurements so far, in order.
        figure: Which of them it is, as people read it.
    """
    found = {
        DIVERGING: _diverging(history),
        COLLAPSING: _collapsing(history),
        OVERFITTING: _overfitting(history[-1], p_max, distances, figure),
        SATURATED: _saturated(history[-1], p_max),
        TAIL_DOMINATED: _tail_dominated(history[-1]),
    }
    return {state: evidence for state, evidence in found.items() if evidence}


def _diverging(history: Sequence[Figures]) -> str | None:
    now = history[-1]
    left_out = now.num_nonfinite - (history[-2].num_nonfinite if len(history) > 1 else 0.0)
    if left_out >= NONFINITE_STEPS:
        return f"{left_out:.0f} steps of this tick had non-finite gradients"
    for kind, score, spread in (
        ("reals", now.real_score, now.real_spread),
        ("fakes", now.fake_score, now.fake_spread),
    ):
        if now.num_scores and score is None:
            return f"scores of {kind} are not finite"
        if score is not None and abs(score) + (spread or 0.0) > LARGE_SCORE:
            return f"scores of {kind} are {score:.3g} ± {spread or 0.0:.2g}"
    for name, norm in (now.gradients or {}).items():
        if norm is not None and norm > LARGE_GRADIENT:
            return f"the gradient of {name.split('/')[-1]} is {norm:.3g}"
        before = sorted(x for f in history[:-1] if (x := (f.gradients or {}).get(name)) is not None)
        if len(before) >= NUM_BEFORE and norm is not None and norm > GRADIENT_RISE * before[len(before) // 2] > 0:
            rise = norm / before[len(before) // 2]
            return f"the gradient of {name.split('/')[-1]} is {norm:.3g}, {rise:.0f} times the usual"
    return None


def _collapsing(history: Sequence[Figures]) -> str | None:
    now, before = history[-1].diversity, [f.diversity for f in history[:-1] if f.diversity is not None]
    if now is None or not before or now >= LOST_DIVERSITY * min(max(before), 1.0):
        return None
    return f"the grid's images differ {now:.0%} as much as the reals, after {max(before):.0%} before"


def _overfitting(now: Figures, p_max: float | None, distances: Sequence[float], figure: str) -> str | None:
    if len(distances) > NUM_WORSE and min(distances[-NUM_WORSE:]) > WORSE * min(distances):
        least = f"the best {figure}, {min(distances):.3g}"
        return f"the last {NUM_WORSE} measurements of {figure} are {WORSE - 1:.0%} or more above {least}"
    if now.nearest is not None and now.nearest < COPIES:
        return f"generated images are {now.nearest:.0%} as far from training images as these from each other"
    confusion = now.confusion
    if p_max is None and confusion is not None and confusion < SEPARATED and (now.real_sign or 0.0) > ALL_REAL:
        return f"the discriminator takes {confusion:.1%} of fakes for more real than a real"
    return None


def _saturated(now: Figures, p_max: float | None) -> str | None:
    if p_max is None or now.augment_p is None or now.augment_p < 0.999 * p_max:
        return None
    return f"augmentation stands at its limit, {p_max:g}, at a mean sign of {now.real_sign or 0.0:.2f}"


def _tail_dominated(now: Figures) -> str | None:
    if now.tail_share is not None and now.tail_share > TAIL_SHARE:
        return f"{now.tail_share:.0%} of a part's margins lie in the linear tail"
    if now.top_share is not None and now.top_share > TOP_SHARE and now.num_scores >= NUM_SAMPLES:
        return f"1 % of the samples hold {now.top_share:.0%} of a part's gradient"
    return None
