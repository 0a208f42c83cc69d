"""Augmentation-strength controller. Knows p and its target; knows nothing of images.

The heuristic of Karras et al. 2020 ("Training GANs with limited data"): the mean sign of D's logits on augmented reals
says how much D overfits; p moves at a fixed rate, up where it is above the target and down where it is below.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class AdaController:
    """Adjusts the augmentation probability p every `interval` iterations.

    Args:
        target: Wanted mean sign, in [-1, 1] (0.6 is usual). For r above it p grows, below it p shrinks.
        interval: Iterations between two changes.
        ada_kimg: Thousand images in which p would move from 0 to 1.
        p_init: First p, in [0, p_max].
        p_max: Upper clamp in [0, 1]; `binding` is true while it holds p back.
        reduce: Sums a float64 vector over all processes; None for a single process.

    Raises:
        ValueError: A value out of its range.

    Source: spec training-and-metrics.md section 2 (6), section 8 (4); clarifications 11 (the upper clamp).
    """

    def __init__(
        self,
        target: float,
        interval: int = 4,
        ada_kimg: float = 500,
        p_init: float = 0.0,
        p_max: float = 0.85,
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not -1 <= target <= 1:
            raise ValueError(f"--target {target} is outside [-1, 1], the range of a mean sign")
        if interval < 1:
            raise ValueError(f"the augmentation strength is adjusted every {interval} iterations; at least 1")
        if not 0 < ada_kimg < math.inf:
            raise ValueError(f"the speed of the augmentation strength, {ada_kimg} kimg, is not a positive number")
        if not 0 <= p_max <= 1:
            raise ValueError(f"--p-max {p_max} is outside [0, 1]")
        if not 0 <= p_init <= p_max:
            raise ValueError(f"--p {p_init} is outside [0, {p_max}], the range that --p-max leaves")
        self.target = target
        self.interval = interval
        self.ada_kimg = ada_kimg
        self.p_max = p_max
        self.p = float(p_init)
        self.binding = False
        self.num_nonfinite = 0
        self._reduce = reduce
        self._sums: Tensor | None = None  # [2]: sum of signs, their number

    def observe(self, signs: Tensor) -> None:
        """Add signs of D's logits on augmented reals, any shape; stays on their device, no synchronisation."""
        signs = signs.detach().flatten().to(torch.float64)
        sums = torch.stack([signs.sum(), torch.full([], signs.numel(), dtype=torch.float64, device=signs.device)])
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums

    def update(self, batch_size: int, step: int) -> float:
        """Return p for the next iteration; changes it when `step` is a multiple of the interval.

        A non-finite mean (a logit went bad) leaves p as it is and counts in `num_nonfinite`; no signs leave p as it is.

        Args:
            batch_size: Images per iteration over all processes.
            step: Iterations finished so far, the current one included (the first is 1).
        """
        if step % self.interval:
            return self.p
        sums = torch.zeros([2], dtype=torch.float64) if self._sums is None else self._sums
        self._sums = None
        total, count = (self._reduce(sums) if self._reduce else sums).tolist()
        if not count:
            return self.p
        mean = total / count
        if not math.isfinite(mean):
            self.num_nonfinite += 1
            return self.p
        change = batch_size * self.interval / (self.ada_kimg * 1000)
        wanted = self.p + change * ((mean > self.target) - (mean < self.target))
        self.binding = wanted > self.p_max
        self.p = min(max(wanted, 0.0), self.p_max)
        return self.p

    def state_dict(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """What a resumed run needs to go on unchanged; `reduce` as in the constructor."""
        sums = self._sums
        if reduce and sums is not None:
            sums = reduce(sums.cpu())
        state = {"p": self.p, "binding": self.binding, "num_nonfinite": self.num_nonfinite}
        return {**state, "sums": None if sums is None else sums.tolist()}

    def load_state_dict(self, state: dict[str, Any], *, share: float = 1.0) -> None:
        """Take over what `state_dict` returned, the open sums times `share`."""
        self.p = float(state["p"])
        self.binding = bool(state["binding"])
        self.num_nonfinite = int(state["num_nonfinite"])
        self._sums = None if state["sums"] is None else torch.tensor(state["sums"], dtype=torch.float64) * share
