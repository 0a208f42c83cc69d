"""Objectives: the logistic loss and the Rooted Logistic Objective, two siblings behind one protocol for GANs, and the
rooted objective for classifiers, with the interfaces of torch's own losses.

To put in place of torch's losses, take the modules `RootedBCEWithLogitsLoss` and `RootedCrossEntropyLoss`;
`RootedLogisticLoss` is no module but a GAN's objective, with a schedule of k, a tail and a scale.

Owns the mathematics of margins and logits (spec: rooted-objective.md; Wang, Veluswami, Mishra, Ravi, arXiv:2310.03890).
Knows nothing of networks, phases or images: `training.loss.GanLoss` calls `generator`, `discriminator_fake` and
`discriminator_real` on raw logits [N, 1] and gets per-sample losses [N, 1].

The margin m is +logit where the logit should be positive (real images for D, fakes for G) and -logit where it should be
negative (fakes for D); sp(x) = ln(1 + e^x).
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TAILS = ("none", "linear")
SCALES = ("paper", "calibrated")
ACTS_ON = ("both", "D", "G")
FORMS = ("inverse", "direct")
REDUCTIONS = ("none", "mean", "sum")
PARTS = ("generator", "discriminator_fake", "discriminator_real")

# Here the centred loss is off the logistic one by sp / 2k of it, about what float32 rounds away, and of k (...)^(1/k)
# float32 keeps one decimal: a larger k could only lose digits, and would end in inf.
MAX_K = 1e6
# exp overflows float32 at 88.72; the tail may start no later than where the loss itself is comfortably finite.
MAX_TAIL_PER_K = 80.0
# Where the classifiers' losses turn into their tangent unless told otherwise: e^60 leaves room to sum a batch. The
# gradients of float16 logits come back in float16, which ends at e^11.
GUARD_PER_K, GUARD_PER_K_FLOAT16 = 60.0, 10.0
# From here on ln(1 + e^x) = x to the last bit, in float64 too.
LINEAR_FROM = 40.0
# Micro-batches remembered between two calls of `drain`; bounds memory where nobody drains.
MAX_REMEMBERED = 8192


def logistic(margin: Tensor) -> Tensor:
    """sp(-m), the logistic loss of a margin of any shape; half-precision margins are evaluated in float32."""
    return _softplus(-_at_least_float32(margin))


def rooted_logistic(
    margin: Tensor, k: float, *, centred: bool = False, tail_at: float | None = None, calibrated: bool = False
) -> Tensor:
    """Rooted logistic objective L_k(m) = k (1 + e^-m)^(1/k), evaluated as k exp(sp(-m) / k).

    That form is finite in float32 for -m up to 88.7 k; the literal power form overflows at -m = 88.7 whatever k is.

    Args:
        margin: Margins of any shape; float16 and bfloat16 are evaluated, and returned, in float32.
        k: Root, a number in [1, 1e6]. k -> infinity tends (centred) to the logistic loss.
        centred: Subtract the floor: k expm1(sp(-m) / k), which is 0 for m -> infinity. Same gradient.
        tail_at: T > 0: below margin -T go on along the tangent, so that |slope| never exceeds its value at -T.
        calibrated: Divide by 2^(1/k), so that the slope at m = 0 is -1/2 for every k, as for the logistic loss.

    Raises:
        ValueError: k or tail_at out of range.

    Source: spec rooted-objective.md section 1.
    """
    check_k(k)
    margin = _at_least_float32(margin)
    body = margin
    if tail_at is not None:
        check_tail_at(tail_at, k)
        # The clamped margin is all that meets exp: nothing can overflow, so no inf * 0 in any derivative.
        body = margin.clamp(min=-tail_at)
    exponent = _softplus(-body) / k
    value = k * (exponent.expm1() if centred else exponent.exp())
    if tail_at is not None:
        value = value + _slope_magnitude(-tail_at, k) * F.relu(-tail_at - margin)
    return value * 2 ** (-1 / k) if calibrated else value


def check_k(k: float) -> float:
    """Return k as a float.

    Raises:
        ValueError: Not a number in [1, 1e6], or a tensor, which torch's losses take in k's place.
    """
    if isinstance(k, Tensor):
        raise ValueError(f"--k is a tensor, {_described(k)}, but the root k is a plain number, e.g. 2; "
                         "weights have names here: weight=..., pos_weight=...")
    try:
        number = float(k)
    except (TypeError, ValueError):
        number = math.nan
    if not 1 <= number <= MAX_K:
        raise ValueError(f"--k {k} is out of range: the root k is a finite number >= 1 and <= 1e6 "
                         "(2 is the usual one; --loss logistic is the limit of large k)")
    return number


def check_tail_at(tail_at: float, k: float) -> float:
    """Return T as a float.

    Raises:
        ValueError: Not in (0, 80 k], the range in which the tangent's slope is finite in float32.
    """
    try:
        number = float(tail_at)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number <= MAX_TAIL_PER_K * k:
        raise ValueError(f"--tail-at {tail_at} is out of range: the margin T where the linear tail starts lies in "
                         f"(0, {MAX_TAIL_PER_K * k:g}] for k = {k:g}")
    return number


@dataclass(frozen=True)
class KSchedule:
    """Root as a function of images shown: geometric from `start` to `end` over the first `kimg`, then constant."""

    start: float
    end: float
    kimg: float = 0.0

    def __post_init__(self) -> None:
        check_k(self.start)
        check_k(self.end)
        if not 0 <= self.kimg < math.inf or (self.start != self.end and self.kimg == 0):
            raise ValueError(f"--k {self}: the length of the schedule is a positive, finite number of kimg")

    def at(self, cur_nimg: float) -> float:
        """k after `cur_nimg` real images."""
        if self.kimg == 0 or cur_nimg >= self.kimg * 1000:
            return self.end
        if cur_nimg <= 0:
            return self.start
        return self.start * (self.end / self.start) ** (cur_nimg / (self.kimg * 1000))

    @property
    def smallest(self) -> float:
        """The smallest k it passes through."""
        return min(self.start, self.end)

    def __str__(self) -> str:
        start, end, kimg = map(exact_text, (self.start, self.end, self.kimg))
        return end if self.kimg == 0 else f"{start}:{end}@{kimg}"


def exact_text(value: float) -> str:
    """A number as short as it can be written and read back unchanged: `2`, `0.5`, `2.0000001`."""
    text = f"{value:g}"
    return text if float(text) == value else repr(float(value))


def parse_k(text: str | float | KSchedule) -> KSchedule:
    """Read `2` (constant) or `2:64@20` (geometric from 2 to 64 over the first 20 kimg).

    Raises:
        ValueError: Unreadable, or a root that `check_k` refuses.
    """
    if isinstance(text, KSchedule):
        return text
    if isinstance(text, (int, float, Tensor)):
        return KSchedule(check_k(text), check_k(text))
    roots, at, kimg = str(text).partition("@")
    start, colon, end = roots.partition(":")
    if bool(at) != bool(colon):
        raise ValueError(f"--k {text} is neither a number >= 1 nor a schedule START:END@KIMG such as 2:64@20")
    if not colon:
        return KSchedule(check_k(start), check_k(start))  # type: ignore[arg-type]
    try:
        length = float(kimg)
    except ValueError:
        length = math.nan
    if not 0 < length < math.inf:
        raise ValueError(f"--k {text}: the length after @ is a positive, finite number of kimg")
    return KSchedule(check_k(start), check_k(end), length)  # type: ignore[arg-type]


class LogisticLoss:
    """Non-saturating logistic GAN loss (Goodfellow et al. 2014): sp(-s) for G and on reals, sp(s) on fakes for D."""

    floor_generator = 0.0
    floor_discriminator = 0.0

    def advance(self, cur_nimg: int) -> None:
        """Nothing depends on the images shown so far."""

    def generator(self, fake_logits: Tensor) -> Tensor:
        """G's loss of fakes: [N, 1] -> [N, 1]."""
        return logistic(fake_logits)

    def discriminator_fake(self, fake_logits: Tensor) -> Tensor:
        """D's loss of fakes: [N, 1] -> [N, 1]."""
        return logistic(-fake_logits)

    def discriminator_real(self, real_logits: Tensor) -> Tensor:
        """D's loss of reals: [N, 1] -> [N, 1]."""
        return logistic(real_logits)

    def centred(self, part: str, logits: Tensor) -> Tensor:
        """Loss of one of `PARTS` minus its floor; here the floor is 0."""
        return getattr(self, _known_part(part))(logits)

    def drain(self) -> dict[str, float]:
        """No figures of its own: the slope of the logistic loss never exceeds 1."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it remembers nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""

    def __repr__(self) -> str:
        return "LogisticLoss()"


class RootedLogisticLoss:
    """Rooted Logistic Objective as a GAN loss (arXiv:2310.03890, spec rooted-objective.md sections 1 and 2).

    The modules to put in place of torch's are `RootedBCEWithLogitsLoss` and `RootedCrossEntropyLoss`; this is the GAN's
    objective with schedule, tail and scale, which the training asks part by part.

    L_k(s) for G's fakes and D's reals, L_k(-s) for D's fakes. Values are the paper's, so G never goes below k and D
    never below 2 k (times the scale); `centred` gives the values that can be compared between different k.

    Args:
        k: Root in [1, 1e6], a number or the text of a schedule (`parse_k`).
        tail: `none` is the paper; `linear` continues along the tangent below margin -tail_at.
        tail_at: T in (0, 80 k]; required by `tail='linear'`, refused with `tail='none'`.
        scale: `paper` (k (...)^(1/k)), `calibrated` (that divided by 2^(1/k)) or a positive number, the factor before
            (...)^(1/k).
        acts_on: Which network gets the rooted loss; the other one gets the logistic loss.
        k_schedule: A schedule; replaces `k` if given.

    Raises:
        ValueError: A value out of its range, named as the command line's option.
    """

    def __init__(
        self,
        k: float | str | KSchedule = 2.0,
        tail: str = "none",
        tail_at: float | None = None,
        scale: str | float = "paper",
        acts_on: str = "both",
        k_schedule: KSchedule | str | None = None,
    ) -> None:
        self.schedule = parse_k(k if k_schedule is None else k_schedule)
        if tail not in TAILS:
            raise ValueError(f"--tail {tail} is unknown; one of {', '.join(TAILS)}")
        if tail == "linear" and tail_at is None:
            raise ValueError("--tail linear needs --tail-at T, the margin in "
                             f"(0, {MAX_TAIL_PER_K * self.schedule.smallest:g}] where the linear tail starts")
        if tail == "none" and tail_at is not None:
            raise ValueError(f"--tail-at {tail_at} is for --tail linear only; add that or drop --tail-at")
        if acts_on not in ACTS_ON:
            raise ValueError(f"--acts-on {acts_on} is unknown; one of {', '.join(ACTS_ON)}")
        self.tail = tail
        self.tail_at = None if tail_at is None else check_tail_at(tail_at, self.schedule.smallest)
        self.scale = _check_scale(scale)
        self.acts_on = acts_on
        self.k = self.schedule.at(0)
        self._remembered: dict[str, deque[Tensor]] = {}

    def advance(self, cur_nimg: int) -> None:
        """Take the schedule's k for `cur_nimg` real images shown so far."""
        self.k = self.schedule.at(cur_nimg)

    @property
    def multiplier(self) -> float:
        """What L_k is multiplied with, from `scale`."""
        if self.scale == "paper":
            return 1.0
        return 2 ** (-1 / self.k) if self.scale == "calibrated" else float(self.scale) / self.k

    @property
    def floor_generator(self) -> float:
        """What G's loss never goes below: k times the multiplier, 0 where G has the logistic loss."""
        return self.k * self.multiplier if self.acts_on != "D" else 0.0

    @property
    def floor_discriminator(self) -> float:
        """What D's loss (fake + real) never goes below: 2 k times the multiplier, 0 where D has the logistic loss."""
        return 2 * self.k * self.multiplier if self.acts_on != "G" else 0.0

    def generator(self, fake_logits: Tensor) -> Tensor:
        """G's loss of fakes: [N, 1] -> [N, 1]."""
        return self._loss("generator", fake_logits, centred=False)

    def discriminator_fake(self, fake_logits: Tensor) -> Tensor:
        """D's loss of fakes: [N, 1] -> [N, 1]."""
        return self._loss("discriminator_fake", fake_logits, centred=False)

    def discriminator_real(self, real_logits: Tensor) -> Tensor:
        """D's loss of reals: [N, 1] -> [N, 1]."""
        return self._loss("discriminator_real", real_logits, centred=False)

    def centred(self, part: str, logits: Tensor) -> Tensor:
        """Loss of one of `PARTS` minus its floor, without cancellation: comparable between different k."""
        return self._loss(_known_part(part), logits, centred=True)

    def tail_share(self, margin: Tensor) -> Tensor:
        """Share of the margins that lie in the linear tail, a scalar in [0, 1]; 0 without a tail."""
        if self.tail_at is None:
            return torch.zeros([], device=margin.device)
        return (margin < -self.tail_at).float().mean()

    def slopes(self, margin: Tensor) -> Tensor:
        """|derivative| of the loss at each margin, tail and scale included, in closed form."""
        margin = _at_least_float32(margin)
        body = margin if self.tail_at is None else margin.clamp(min=-self.tail_at)
        return (_softplus(-body) / self.k).exp() * torch.sigmoid(-body) * self.multiplier

    def diagnostics(self, margin: Tensor) -> dict[str, Tensor]:
        """How unevenly a set of margins shares the gradient.

        Returns:
            `tail_share`; `max_slope`, the largest |slope|; `top1_share`, the part of the summed |slope| that belongs to
            the steepest 1 % of the samples (at least one sample). All scalars.
        """
        slopes = self.slopes(margin).flatten()
        top = slopes.topk(math.ceil(slopes.numel() / 100)).values
        return {
            "tail_share": self.tail_share(margin),
            "max_slope": slopes.max(),
            "top1_share": top.sum() / slopes.sum(),
        }

    def observe(self, part: str, logits: Tensor) -> None:
        """Remember the margins of a micro-batch for `drain`; parts with the logistic loss are ignored."""
        if self._is_rooted(_known_part(part)):
            kept = self._remembered.setdefault(part, deque(maxlen=MAX_REMEMBERED))
            kept.append(_margin(part, logits).detach().flatten())

    def drain(self) -> dict[str, float]:
        """`diagnostics` over everything observed since the last call, as `Loss/<figure>/<part>`; then forget it."""
        result = {}
        for part, kept in self._remembered.items():
            if kept:
                for name, value in self.diagnostics(torch.cat(list(kept))).items():
                    result[f"Loss/{name}/{part}"] = float(value)
        self._remembered.clear()
        return result

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on unchanged: the schedule's k and the margins not drained yet."""
        return {"k": self.k, "remembered": {part: [m.cpu() for m in kept] for part, kept in self._remembered.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.k = float(state["k"])
        self._remembered = {
            part: deque(kept, maxlen=MAX_REMEMBERED) for part, kept in state["remembered"].items()
        }

    def __repr__(self) -> str:
        return (f"RootedLogisticLoss(k={str(self.schedule)!r}, tail={self.tail!r}, tail_at={self.tail_at}, "
                f"scale={self.scale!r}, acts_on={self.acts_on!r})")

    def _is_rooted(self, part: str) -> bool:
        return self.acts_on in ("both", "G" if part == "generator" else "D")

    def _loss(self, part: str, logits: Tensor, *, centred: bool) -> Tensor:
        margin = _margin(part, logits)
        if not self._is_rooted(part):
            return logistic(margin)
        value = rooted_logistic(margin, self.k, centred=centred, tail_at=self.tail_at)
        return value if self.multiplier == 1.0 else value * self.multiplier


def rooted_binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    k: float = 2.0,
    reduction: str = "mean",
    centred: bool = False,
    tail_at: float | None = None,
    calibrated: bool = False,
) -> Tensor:
    """Drop-in for `F.binary_cross_entropy_with_logits`: y L_k(x) + (1 - y) L_k(-x).

    Args:
        input: Logits x of any shape, any floating dtype; evaluated and returned in at least float32.
        target: y in [0, 1], same shape; between 0 and 1 it is a soft target.
        weight: Factor per element, broadcastable.
        pos_weight: Factor of the y term, broadcastable (per class in the last axis, as in torch).
        k: Root, a number in [1, 1e6].
        reduction: `none`, `mean` or `sum`.
        centred: Subtract the floor k, so that k -> infinity is the binary cross-entropy.
        tail_at: As in `rooted_logistic`. None is 60 k: the tangent beyond, where float32 would soon overflow; 10 k for
            float16 logits, whose gradients would.
        calibrated: As in `rooted_logistic`.

    Raises:
        ValueError: Differing shapes, or an option out of range.

    Source: spec rooted-objective.md section 1.
    """
    if input.shape != target.shape:
        raise ValueError(f"target of shape {list(target.shape)} for logits of shape {list(input.shape)}; use the same")
    tail_at = _guard(input, check_k(k)) if tail_at is None else tail_at
    options: dict[str, Any] = {"centred": centred, "tail_at": tail_at, "calibrated": calibrated}
    positive = _weighed(rooted_logistic(input, k, **options), target)
    if pos_weight is not None:
        positive = positive * pos_weight
    loss = positive + _weighed(rooted_logistic(-input, k, **options), 1 - target)
    return _reduce(loss if weight is None else loss * weight, reduction)


def rooted_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    k: float = 3.0,
    m: float | None = None,
    form: str = "inverse",
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    centred: bool = False,
    tail_at: float | None = None,
) -> Tensor:
    """Drop-in for `F.cross_entropy` with the rooted objective for several classes, p the true class's probability.

    `inverse`: m p^(-1/k) = m exp(nll / k), convex in the logits; the alpha-loss of Sypherd et al. with
    alpha = k / (k + 1). With two classes and logits (0, x) it is `rooted_logistic(x)`.
    `direct`: m (1 - p^(1/k)) = -m expm1(-nll / k), the authors' released code; bounded by m, not convex; for m = k the
    generalised cross-entropy of Zhang & Sabuncu (2018) with q = 1/k; the alpha-loss with alpha = k / (k - 1).
    Both, centred and with m = k, tend to the cross-entropy as k -> infinity.

    Soft targets (probabilities, or smoothed labels) give the expectation sum_c q_c L(-ln p_c), which is where the
    cross-entropy's own definition goes for k -> infinity.

    Args:
        input: Logits [C], [N, C] or [N, C, d1, ...]; evaluated and returned in at least float32.
        target: Class numbers (integers) of that shape without C, or probabilities of that very shape.
        weight: Factor per class [C]; the mean over class numbers is weighted by it, as in torch.
        k: Root, a number in [1, 1e6]. The authors use 3 (CIFAR-10, ViT) and 8 (CIFAR-100, Swin).
        m: The factor in front, a positive number; None is k.
        form: One of `FORMS`.
        reduction: `none`, `mean` or `sum`.
        ignore_index: Class number that counts for nothing, whatever the logits are; for class numbers only.
        label_smoothing: Share in [0, 1] of the target spread evenly over the classes.
        centred: `inverse` only: subtract the floor m. `direct` has floor 0.
        tail_at: T in (0, 80 k]: where nll exceeds T, `inverse` goes on along the tangent. None is 60 k, since float32
            would overflow at 88 k; 10 k for float16 logits, whose gradients would.

    Raises:
        ValueError: An option out of range, or shapes or types that do not fit.

    Source: spec rooted-objective.md section 3.
    """
    k, m = _check_classes(k, m, form, label_smoothing)
    tail_at = check_tail_at(_guard(input, k) if tail_at is None else tail_at, k)
    axis = 0 if input.ndim == 1 else 1
    soft = target.is_floating_point()
    _check_target(input, target, weight, axis, ignore_index)
    num_classes = input.shape[axis]
    nll = -F.log_softmax(_at_least_float32(input), dim=axis)
    factors = None
    if weight is not None:
        factors = weight.to(nll.dtype).reshape([num_classes, *[1] * (input.ndim - axis - 1)])

    def per_class(nll: Tensor) -> Tensor:
        return _rooted_nll(nll, k, m, direct=form == "direct", centred=centred, tail_at=tail_at)

    if soft:
        share = target.to(nll.dtype) * (1 - label_smoothing) + label_smoothing / num_classes
        loss = _weighed(per_class(nll), share if factors is None else share * factors).sum(dim=axis)
        return _reduce(loss, reduction)

    kept = target != ignore_index
    index = torch.where(kept, target, 0).long().unsqueeze(axis)
    weights = kept.to(nll.dtype)
    if factors is not None:
        weights = weights * factors.expand_as(nll).gather(axis, index).squeeze(axis)
    nll_true = torch.where(kept, nll.gather(axis, index).squeeze(axis), 0)
    loss = _weighed(per_class(nll_true), weights) * (1 - label_smoothing)
    if label_smoothing:
        every = per_class(nll) if factors is None else _weighed(per_class(nll), factors)
        loss = loss + torch.where(kept, every.mean(dim=axis), 0) * label_smoothing
    return loss.sum() / weights.sum() if reduction == "mean" else _reduce(loss, reduction)


class RootedBCEWithLogitsLoss(torch.nn.Module):
    """`rooted_binary_cross_entropy_with_logits` as a module, a drop-in for `torch.nn.BCEWithLogitsLoss`."""

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        k: float = 2.0,
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
        centred: bool = False,
        tail_at: float | None = None,
        calibrated: bool = False,
    ) -> None:
        """Take the function's options.

        Raises:
            ValueError: One of them is out of range.
        """
        super().__init__()
        k = check_k(k)
        if tail_at is not None:
            check_tail_at(tail_at, k)
        _reduce(torch.zeros([1]), reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.options: dict[str, Any] = {
            "k": k, "reduction": reduction, "centred": centred, "tail_at": tail_at, "calibrated": calibrated
        }  # fmt: skip

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits and targets of equal shape."""
        return rooted_binary_cross_entropy_with_logits(input, target, self.weight, self.pos_weight, **self.options)

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class RootedCrossEntropyLoss(torch.nn.Module):
    """`rooted_cross_entropy` as a module, a drop-in for `torch.nn.CrossEntropyLoss`."""

    weight: Tensor | None

    def __init__(
        self,
        k: float = 3.0,
        m: float | None = None,
        form: str = "inverse",
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        centred: bool = False,
        tail_at: float | None = None,
    ) -> None:
        """Take the function's options.

        Raises:
            ValueError: One of them is out of range.
        """
        super().__init__()
        k, m = _check_classes(k, m, form, label_smoothing)
        if tail_at is not None:
            check_tail_at(tail_at, k)
        _reduce(torch.zeros([1]), reduction)
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = {
            "k": k, "m": m, "form": form, "reduction": reduction, "ignore_index": ignore_index,
            "label_smoothing": label_smoothing, "centred": centred, "tail_at": tail_at,
        }  # fmt: skip

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits [N, C, ...] and class numbers [N, ...] or probabilities [N, C, ...]."""
        return rooted_cross_entropy(input, target, self.weight, **self.options)

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


LOSSES: dict[str, Callable[..., LogisticLoss | RootedLogisticLoss]] = {
    "logistic": LogisticLoss,
    "rooted": RootedLogisticLoss,
}


def build_loss(name: str, **options: Any) -> LogisticLoss | RootedLogisticLoss:
    """Make the adversarial loss called `name` with its options.

    Raises:
        ValueError: Unknown name, options of another loss, or option values out of range.
    """
    if name not in LOSSES:
        raise ValueError(f"--loss {name} is unknown; one of {', '.join(LOSSES)}")
    if name == "logistic" and options:
        names = ", ".join("--" + option.replace("_", "-") for option in options)
        raise ValueError(f"{names}: for --loss rooted only; the logistic loss has no options")
    return LOSSES[name](**options)


def _margin(part: str, logits: Tensor) -> Tensor:
    return -logits if part == "discriminator_fake" else logits


def _known_part(part: str) -> str:
    if part not in PARTS:
        raise ValueError(f"unknown part of the loss {part!r}; one of {', '.join(PARTS)}")
    return part


def _softplus(x: Tensor) -> Tensor:
    # To full precision in float64 (torch's own threshold is 20), and without a second derivative where it is linear:
    # where exp(sp / k) overflows, inf * sigma'(x) = inf * 0 would be NaN.
    body = F.softplus(x.clamp(max=LINEAR_FROM), threshold=LINEAR_FROM)
    return torch.where(x > LINEAR_FROM, x, body)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _slope_magnitude(margin: float, k: float) -> float:
    """|L_k'(m)| = exp(sp(-m) / k) sigma(-m) in Python floats, for m <= 0."""
    softplus = -margin + math.log1p(math.exp(margin))
    return math.exp(softplus / k) / (1 + math.exp(margin))


def _rooted_nll(nll: Tensor, k: float, m: float, *, direct: bool, centred: bool, tail_at: float) -> Tensor:
    """Rooted objective of negative log-likelihoods >= 0, elementwise; see `rooted_cross_entropy`."""
    if direct:
        return -m * torch.expm1(-nll / k)
    # As in rooted_logistic: the clamped value is all that meets exp, so no derivative has an inf * 0.
    exponent = nll.clamp(max=tail_at) / k
    value = m * (exponent.expm1() if centred else exponent.exp())
    return value + m / k * math.exp(tail_at / k) * F.relu(nll - tail_at)


def _check_classes(k: float, m: float | None, form: str, label_smoothing: float) -> tuple[float, float]:
    """Return k and m as floats, m's default filled in."""
    k = check_k(k)
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; one of {', '.join(FORMS)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing {label_smoothing} is out of range: a share in [0, 1]")
    if m is None:
        return k, k
    if not 0 < m < math.inf:
        raise ValueError(f"m {m} is out of range: a positive, finite number, or None for k")
    return k, float(m)


def _check_target(input: Tensor, target: Tensor, weight: Tensor | None, axis: int, ignore_index: int) -> None:
    """Refuse a target or class weights that do not fit logits [C], [N, C] or [N, C, d1, ...]."""
    soft = target.is_floating_point()
    if not input.is_floating_point() or input.ndim == 0:
        raise ValueError(f"logits are floating-point numbers [C], [N, C] or [N, C, ...], not {_described(input)}")
    if target.dtype == torch.bool:
        raise ValueError(f"target is {_described(target)}: give class numbers, or probabilities as logits are")
    wanted = [*input.shape] if soft else [*input.shape[:axis], *input.shape[axis + 1 :]]
    if [*target.shape] != wanted:
        raise ValueError(f"target of shape {list(target.shape)} for logits of shape {list(input.shape)}; use {wanted}")
    if soft and ignore_index >= 0:
        raise ValueError(f"ignore_index {ignore_index} is for class numbers, but the target holds probabilities")
    if weight is not None and [*weight.shape] != [input.shape[axis]]:
        raise ValueError(f"weight of shape {list(weight.shape)} for {input.shape[axis]} classes; use one per class")


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _guard(logits: Tensor, k: float) -> float:
    """Where the classifiers' losses of such logits turn into their tangent unless told otherwise."""
    return k * (GUARD_PER_K_FLOAT16 if logits.dtype == torch.float16 else GUARD_PER_K)


def _weighed(loss: Tensor, factor: Tensor) -> Tensor:
    """loss * factor, where a loss too large for its type times 0 is 0; what is no number stays that."""
    return loss.masked_fill((factor == 0) & loss.isinf(), 0) * factor


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown; one of {', '.join(REDUCTIONS)}")
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _check_scale(scale: str | float) -> str | float:
    if scale in SCALES:
        return scale
    try:
        number = float(scale)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"--scale {scale} is none of {', '.join(SCALES)} or a positive, finite number")
    return number
