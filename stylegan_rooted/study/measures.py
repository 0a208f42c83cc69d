"""What is measured of a classifier or of a direction: pure functions of tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NUM_BINS = 15


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of [N, C] whose largest logit is the target's; logits that are not numbers are wrong."""
    right = (logits.argmax(dim=1) == target) & logits.isfinite().all(dim=1)
    return right.double().mean().item()


def calibration_error(logits: Tensor, target: Tensor, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error: mean |accuracy - confidence| over bins of equal width, weighted by their samples.

    Confidence is the largest softmax probability (Guo et al. 2017, eq. 5). In [0, 1]; NaN where a logit is not finite.
    """
    confidence, guess = logits.double().softmax(dim=1).max(dim=1)
    if not confidence.isfinite().all():
        return math.nan
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    surplus = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, (guess == target).double() - confidence)
    return (surplus.abs().sum() / len(target)).item()


def angle_degrees(w: Tensor, reference: Tensor) -> Tensor:
    """Angle between vectors [..., d], in degrees; by the half-angle formula, which is exact for small ones too."""
    a = w / w.norm(dim=-1, keepdim=True)
    b = reference / reference.norm(dim=-1, keepdim=True)
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)))


def first_reaching(steps: Sequence[int], values: Sequence[float], bound: float, *, rising: bool) -> float | None:
    """The step from which on a curve is at or beyond `bound`, linear between its points; None if it never gets there.

    Args:
        steps: Ascending.
        values: The curve there.
        bound: What to reach.
        rising: Whether large values are good.
    """
    sign = 1.0 if rising else -1.0
    before: tuple[int, float] | None = None
    for step, value in zip(steps, values):
        gain = math.nan if value is None else sign * (value - bound)
        if gain >= 0:
            if before is None or not before[1] < 0:
                return float(step)
            share = -before[1] / (gain - before[1])
            return before[0] + share * (step - before[0])
        before = (step, gain)
    return None
