"""The objectives that a study compares, by name, in two shapes: of several classes' logits, and of a binary margin.

Names: `cross-entropy`, `focal`, `mse`, `inverse:K` and `direct:K`, the rooted objective with k = K. All are means over
the batch, and centred: 0 is a perfect score.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stylegan_rooted.losses import check_k, logistic, rooted_cross_entropy, rooted_logistic

BASELINE = "cross-entropy"
ROOTS = (1, 2, 3, 5, 8, 20)
NAMES = (BASELINE, "focal", "mse", *(f"inverse:{k}" for k in ROOTS), *(f"direct:{k}" for k in ROOTS))
FOCAL_GAMMA, FOCAL_ALPHA = 3.0, 0.25  # the baseline of arXiv:2310.03890

OfLogits = Callable[[Tensor, Tensor], Tensor]
OfMargin = Callable[[Tensor], Tensor]


def of_logits(name: str) -> OfLogits:
    """The objective as a function of logits [N, C] and class numbers [N], a scalar.

    `mse` is the squared distance between the softmax probabilities and the one-hot target (Brier's score), so that its
    probabilities can be judged beside the others'. `focal` is alpha (1 - p)^gamma nll with the same alpha for every
    class (Lin et al. 2017).

    Raises:
        ValueError: Unknown name, or k out of range.
    """
    form, k = _parsed(name)
    if form == "cross-entropy":
        return F.cross_entropy
    if form == "focal":
        return lambda logits, target: _focal(F.cross_entropy(logits, target, reduction="none")).mean()
    if form == "mse":
        return lambda logits, target: (
            (logits.softmax(dim=1) - F.one_hot(target, logits.shape[1])).square().sum(dim=1).mean()
        )
    return lambda logits, target: rooted_cross_entropy(logits, target, k=k, form=form, centred=form == "inverse")


def of_margin(name: str) -> OfMargin:
    """The objective of two classes with logits (0, m), elementwise: margins of any shape -> the same shape.

    Raises:
        ValueError: As `of_logits`.
    """
    form, k = _parsed(name)
    if form == "cross-entropy":
        return logistic
    if form == "focal":
        return lambda margin: _focal(logistic(margin))
    if form == "mse":
        return lambda margin: 2 * torch.sigmoid(-margin).square()
    if form == "inverse":
        return lambda margin: rooted_logistic(margin, k, centred=True)
    return lambda margin: -k * torch.expm1(-logistic(margin) / k)


def _focal(nll: Tensor) -> Tensor:
    return FOCAL_ALPHA * (-torch.expm1(-nll)) ** FOCAL_GAMMA * nll


def _parsed(name: str) -> tuple[str, float]:
    """(form, k); k is infinite where there is none."""
    form, colon, k = name.partition(":")
    known = form in ("inverse", "direct") if colon else form in (BASELINE, "focal", "mse")
    if not known:
        raise ValueError(f"objective {name!r} is unknown; one of {', '.join(NAMES[:3])}, inverse:K, direct:K")
    return form, check_k(k) if colon else math.inf  # type: ignore[arg-type]
