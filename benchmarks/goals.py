"""What the project wants to reach, cell by cell, and how a measured value compares. Knows no measurement."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """A bound on one figure.

    Args:
        name: Of the figure; `bench.py` computes figures under these names.
        bound: The value to reach.
        is_least: Whether larger is better.
        unit: Shown after the value.
    """

    name: str
    bound: float
    is_least: bool = True
    unit: str = "x"

    def verdict(self, value: float | None) -> str:
        """`met`, `missed by N %`, or `not measured`."""
        if value is None:
            return "not measured"
        gap = (self.bound - value if self.is_least else value - self.bound) / self.bound
        return "met" if gap <= 0 else f"missed by {gap * 100:.0f} %"


TRAIN = {  # precision: s64, m64, l256
    "fp32": (2.5, 3.0, 4.5),
    "bf16": (3.2, 4.0, 6.5),
}
TRAIN_STRICT = {"fp32": (2.2, 2.2, 2.0), "bf16": (2.8, 2.8, 2.8)}
INFER = {  # (precision, batch): s64, m64, l256
    ("fp32", 8): (3, 5, 6),
    ("bf16", 8): (3.5, 6, 8),
    ("fp32", 1): (2, 1.4, 1.8),
    ("bf16", 1): (2.2, 1.8, 2.5),
}
SIZES = ("s64", "m64", "l256")


def all_goals() -> list[Goal]:
    """Every cell of the table, in the order of printing."""
    goals = []
    for precision in ("fp32", "bf16"):
        for size, bound in zip(SIZES, TRAIN[precision]):
            goals.append(Goal(f"train {size} {precision}", bound))
        for size, bound in zip(SIZES, TRAIN_STRICT[precision]):
            goals.append(Goal(f"train {size} {precision} strict", bound))
        for batch in (8, 1):
            for size, bound in zip(SIZES, INFER[precision, batch]):
                goals.append(Goal(f"infer b{batch} {size} {precision}", bound))
    for size in SIZES:
        for batch in (8, 1):
            goals.append(Goal(f"over onnxruntime b{batch} {size}", 1.2))
            goals.append(Goal(f"over onnxruntime b{batch} {size} bf16", 1.2))
    goals.append(Goal("peak memory l256 fp32", 0.7, is_least=False))
    for size in SIZES:
        goals.append(Goal(f"ADA share {size}", 8.0, is_least=False, unit=" %"))
    goals.append(Goal("loop overhead s64", 3.0, is_least=False, unit=" %"))
    return goals
