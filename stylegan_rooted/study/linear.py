"""The linear study: which direction, and how fast, first-order methods take a linear classifier with each objective.

One cell is one data set x method x objective, for all learning rates and all seeds at once: weights [S, R, d] of S
seeds and R rates step together. A seed decides the draw of synthetic data, the start and the order of samples; nothing
of it depends on the objective, so objectives are paired by seed. Double precision.

Sources: Soudry et al. 2018 (direction of gradient descent on separable data); Nesterov 1983 (acceleration).
"""

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from stylegan_rooted.study import data
from stylegan_rooted.study.cells import Cell, Result
from stylegan_rooted.study.measures import angle_degrees
from stylegan_rooted.study.objectives import NAMES, OfMargin, of_margin
from torch_utils import seeding

METHODS = ("gradient descent", "accelerated", "stochastic")
BATCH = 16
EQUAL_RATE = 1.0
"""A rate at which all objectives are compared beside the ones that each prefers; part of every grid."""
START_STD = 0.01
NUM_STARTS = 5
STARTS_STD = 3.0
SAME_MINIMISER = 1e-3
"""Largest distance of minimisers, in units of the largest's norm, below which they are called one."""


@dataclass(frozen=True)
class Size:
    """How much of the linear study.

    Attributes:
        passes: Passes over the data; one iteration of the full-batch methods, as many steps as batches of stochastic.
        rates: Learning rates, in units of 1 / (largest eigenvalue of the mean of z z').
        data: Names of data sets.
        num_points: Points on the curves, spread geometrically.
        objectives: Names, cross-entropy among them.
    """

    passes: int
    rates: tuple[float, ...]
    data: tuple[str, ...] = tuple(data.BINARY)
    num_points: int = 20
    objectives: tuple[str, ...] = NAMES


DEFAULT = Size(passes=150, rates=tuple(2.0**i for i in range(-1, 11)), data=tuple(data.BINARY)[:-1])
FULL = Size(passes=3000, rates=tuple(2.0 ** (i / 2) for i in range(-4, 25)))


def cells(size: Size, seeds: list[int]) -> list[Cell]:
    """All cells of the study."""
    shape = {k: v for k, v in asdict(size).items() if k not in ("data", "objectives")}
    return [
        {"study": "linear", "data": d, "method": method, "objective": name, "seeds": seeds, **shape}
        for d in size.data
        for method in METHODS
        for name in size.objectives
    ]


def compute(cell: Cell) -> Result:
    """Train one cell.

    Returns:
        `separable`, `margin` [S]; `steps` [T]; `loss` [R], the mean over seeds of the final training loss less its
        infimum, relative to that at w = 0 (None where it is no number); on separable data `angle` [R], the mean final
        angle to the hard-margin direction in degrees, on others `minimisers` [S], see `minimisers`; and `choices`, what
        the rate with the smallest `loss` ("loss"), that with the smallest `angle` ("angle") and `EQUAL_RATE` ("equal")
        did.
    """
    objective = of_margin(cell["objective"])
    sets = [data.binary(cell["data"], seed) for seed in cell["seeds"]]
    z = torch.stack([s.z for s in sets])  # [S, n, d]
    separable = sets[0].direction is not None
    found = [] if separable else [_minimisers(cell["data"], cell["objective"], seed) for seed in cell["seeds"]]
    infimum = torch.tensor([f["least"] for f in found] or [0.0] * len(sets), dtype=torch.float64)
    at_zero = objective(torch.zeros([1], dtype=torch.float64))
    steps, ws = descend(objective, z, cell)  # [T], [T, S, R, d]
    losses = torch.stack([objective(w @ z.mT).mean(dim=-1) for w in ws])  # [T, S, R]
    curves = {"gap": (losses - infimum[:, None]) / (at_zero - infimum[:, None])}
    if separable:
        directions = torch.stack([s.direction for s in sets if s.direction is not None])  # [S, d]
        curves["angle"] = angle_degrees(ws, directions[:, None])
        curves["angle"][~curves["gap"].isfinite()] = math.nan
    errors = (ws[-1] @ z.mT <= 0).double().mean(dim=-1)  # [S, R]
    finals = {{"gap": "loss"}.get(name, name): values[-1].mean(dim=0) for name, values in curves.items()}  # [R] each
    chosen = {name: int(torch.where(f.isfinite(), f, math.inf).argmin()) for name, f in finals.items()}
    choices = {
        criterion: {
            "rate": cell["rates"][i],
            "error": errors[:, i].tolist(),
            **{name: values[:, :, i].T.tolist() for name, values in curves.items()},
        }
        for criterion, i in (chosen | {"equal": cell["rates"].index(EQUAL_RATE)}).items()
    }
    return {
        "separable": separable,
        "margin": [s.margin for s in sets],
        "minimisers": found,
        "steps": steps,
        **{name: final.tolist() for name, final in finals.items()},
        "choices": choices,
    }


@lru_cache(maxsize=1024)
def _minimisers(data_name: str, objective_name: str, seed: int) -> dict[str, Any]:
    """`minimisers`, once for all methods."""
    return minimisers(of_margin(objective_name), data.binary(data_name, seed).z, seed)


def descend(objective: OfMargin, z: Tensor, cell: Cell) -> tuple[list[int], Tensor]:
    """Weights on the way: passes done [T], weights [T, S, R, d].

    Args:
        objective: Of a margin, elementwise.
        z: Samples times their label in {-1, 1} [S, n, d]; the margin is z . w.
        cell: `method`, `passes`, `rates`, `seeds`, `num_points`.
    """
    num_seeds, n, d = z.shape
    largest = torch.linalg.eigvalsh(z.mT @ z / n)[:, -1]  # [S]
    rates = torch.tensor(cell["rates"], dtype=z.dtype) / largest[:, None]  # [S, R]
    starts = [
        torch.randn(d, dtype=z.dtype, generator=seeding.generator(s, "study", "start")) * START_STD
        for s in cell["seeds"]
    ]
    w = torch.stack(starts)[:, None].expand(-1, rates.shape[1], -1).clone()  # [S, R, d]
    previous = w
    points = recorded(cell["passes"], cell["num_points"])
    kept = [w.clone()]
    for done in range(cell["passes"]):
        if cell["method"] == "stochastic":
            for batch in batches(z, cell["seeds"], done):
                w = w - rates[..., None] * gradient(objective, batch, w)
        elif cell["method"] == "accelerated":
            ahead = w + done / (done + 3) * (w - previous)
            previous, w = w, ahead - rates[..., None] * gradient(objective, z, ahead)
        else:
            w = w - rates[..., None] * gradient(objective, z, w)
        if done + 1 in points:
            kept.append(w.clone())
    return [0, *sorted(points)], torch.stack(kept)


def gradient(objective: OfMargin, z: Tensor, w: Tensor) -> Tensor:
    """Gradient with respect to w [S, R, d] of the mean objective of z [S, n, d]."""
    margin = (w @ z.mT).requires_grad_(True)
    (slope,) = torch.autograd.grad(objective(margin).sum(), margin)
    return slope @ z / z.shape[1]


def batches(z: Tensor, seeds: list[int], done: int) -> list[Tensor]:
    """One pass over z [S, n, d] in random order, in batches [S, B, d]; the order depends on seed and pass only."""
    order = torch.stack(
        [torch.randperm(z.shape[1], generator=seeding.generator(s, "study", "order", done)) for s in seeds]
    )
    shuffled = z.gather(1, order[..., None].expand(-1, -1, z.shape[2]))
    return list(shuffled.split(BATCH, dim=1))


def recorded(passes: int, num: int) -> set[int]:
    """About `num` numbers of passes, spread geometrically from 1 to `passes`."""
    return {round(passes ** (i / (num - 1))) for i in range(num)}


def minimisers(objective: OfMargin, z: Tensor, seed: int) -> dict[str, Any]:
    """Where a second-order solver ends from several starts (overlapping data, where a minimiser exists).

    Args:
        objective: Of a margin, elementwise.
        z: Samples times labels [n, d].
        seed: Of the starts.

    Returns:
        `least`, the smallest mean objective; `spread`, the largest distance between the end points of all starts in
        units of the largest one's norm; `num_different`, end points that are not one within `SAME_MINIMISER`.
    """

    def value_and_gradient(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = (z @ torch.from_numpy(w)).requires_grad_(True)
        value = objective(margin).mean()
        (slope,) = torch.autograd.grad(value, margin)
        return value.item(), (slope @ z).numpy()

    def hessian(w: np.ndarray) -> np.ndarray:
        margin = (z @ torch.from_numpy(w)).requires_grad_(True)
        (slope,) = torch.autograd.grad(objective(margin).mean(), margin, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), margin)
        return (z.mT @ (curvature[:, None] * z)).numpy()

    generator = seeding.generator(seed, "study", "starts")
    scale = STARTS_STD / math.sqrt(z.shape[1])
    ends = []
    for _ in range(NUM_STARTS):
        start = (torch.randn(z.shape[1], dtype=z.dtype, generator=generator) * scale).numpy()
        ends.append(minimize(value_and_gradient, start, jac=True, hess=hessian, method="trust-exact",
                             options={"gtol": 1e-10, "maxiter": 500}))  # fmt: skip
    points = np.stack([end.x for end in ends])
    size = max(float(np.linalg.norm(points, axis=1).max()), 1e-300)
    distances = np.linalg.norm(points[:, None] - points, axis=2) / size
    different: list[int] = []
    for i in range(len(points)):
        if all(distances[i, j] > SAME_MINIMISER for j in different):
            different.append(i)
    return {
        "least": min(float(end.fun) for end in ends),
        "spread": float(distances.max()),
        "num_different": len(different),
    }
