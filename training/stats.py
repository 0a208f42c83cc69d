"""Scalar collector. Sums what is reported between two ticks; knows nothing of files or networks.

The numbers per name are count, sum and sum of squares in float64 (spec: training-and-metrics.md section 2). Unlike the
original's cumulative counters, every tick starts from zero, so one non-finite value spoils one tick and not the rest of
the run.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Scalar:
    """What one name collected since the last reset."""

    num: int
    mean: float
    std: float

    def as_dict(self) -> dict[str, float]:
        """The object written to stats.jsonl."""
        return {"num": self.num, "mean": self.mean, "std": self.std}


class StatsCollector:
    """Collects tensors and numbers by name; `report` is what losses call."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._last: dict[str, Scalar] = {}

    def report(self, name: str, value: torch.Tensor | float) -> None:
        """Add all elements of `value` to `name`. Stays on the value's device: no synchronisation."""
        x = torch.as_tensor(value).detach().flatten().to(torch.float64)
        moments = torch.stack([torch.full_like(x.sum(), x.numel()), x.sum(), x.square().sum()])
        self._sums[name] = self._sums[name] + moments if name in self._sums else moments

    def collect(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, Scalar]:
        """Every name's scalar since the last call; names that got nothing keep their last value. Then start anew.

        Args:
            reduce: Sums a float64 tensor over all processes, which have reported under the same names; None for one.
        """
        names = sorted(self._sums)
        table = torch.stack([self._sums[name].cpu() for name in names]) if names else torch.zeros([0, 3])
        for name, (num, total, squares) in zip(names, (reduce(table) if reduce else table).tolist()):
            mean = total / num if num else math.nan
            variance = max(squares / num - mean * mean, 0.0) if num and math.isfinite(squares) else math.nan
            self._last[name] = Scalar(int(num), mean, math.sqrt(variance) if num > 1 else 0.0 if num else math.nan)
        self._sums.clear()
        return dict(self._last)

    def state_dict(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, Any]:
        """What a resumed run needs to go on unchanged: open sums (of all processes, see `collect`) and last values."""
        sums = {name: moments.cpu() for name, moments in sorted(self._sums.items())}
        if reduce and sums:
            sums = dict(zip(sums, reduce(torch.stack(list(sums.values())))))
        return {
            "sums": {name: moments.clone() for name, moments in sums.items()},
            "last": {name: list(astuple(scalar)) for name, scalar in self._last.items()},
        }

    def load_state_dict(
        self, state: dict[str, Any], device: torch.device | str = "cpu", *, share: float = 1.0
    ) -> None:
        """Take over what `state_dict` returned; open sums, times `share`, move to `device`."""
        self._sums = {name: (moments * share).to(device) for name, moments in state["sums"].items()}
        self._last = {name: Scalar(*values) for name, values in state["last"].items()}
