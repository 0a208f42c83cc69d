"""The studies of networks: one cell trains one network once, with one objective, learning rate and seed.

A seed decides the split of what is not test data, the weights at the start, the order of samples and which labels are
wrong; none of it depends on the objective or the learning rate, so objectives are paired by seed. The learning rate of
each objective is searched for on the same grid with seeds of its own, on validation data; test data see the final runs.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stylegan_rooted.study import data
from stylegan_rooted.study.cells import Cell, Cells, Result
from stylegan_rooted.study.measures import accuracy, calibration_error
from stylegan_rooted.study.networks import NETWORKS
from stylegan_rooted.study.objectives import NAMES, of_logits
from torch_utils import seeding

FIRST_SEARCH_SEED = 1_000_000
NUM_POINTS = 14
NUM_CURVE_IMAGES = 300
"""The curve is measured on so many images, so that measuring takes less time than training."""
NOISES = (0.0, data.NOISE_SHARE)


@dataclass(frozen=True)
class Size:
    """How much of a study.

    Attributes:
        settings: (data set, network) pairs.
        steps: Optimiser steps of each run.
        batch: Images per step.
        rates: Learning rates of Adam at the start; they fall to 0 along half a cosine.
        num_search_seeds: Runs per learning rate in the search.
        objectives: Names, cross-entropy among them.
    """

    settings: tuple[tuple[str, str], ...]
    steps: int
    batch: int
    rates: tuple[float, ...]
    num_search_seeds: int
    objectives: tuple[str, ...] = NAMES


FINE = tuple(1e-4 * 10 ** (i / 4) for i in range(12))
MLP = Size((("digits", "mlp"), ("mnist", "mlp")), 400, 32, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), 2)
MLP_FULL = Size(MLP.settings, 3000, 32, FINE, 3)
VISION = Size(
    (("mnist", "resnet"), ("mnist", "vit"), ("emoji", "resnet"), ("emoji", "vit")), 200, 32, (1e-3, 3e-3, 1e-2, 3e-2), 1
)
VISION_FULL = Size(tuple((d, n) for d in data.IMAGES for n in ("resnet", "vit")), 2000, 32, FINE, 3)


def search_cells(size: Size, setting: tuple[str, str], objective: str, rate: float) -> list[Cell]:
    """The runs that tell how good a learning rate is."""
    seeds = range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + size.num_search_seeds)
    return [_cell(size, setting, objective, rate, seed, 0.0, "validation") for seed in seeds]


def final_cells(
    size: Size, setting: tuple[str, str], objective: str, rate: float, seeds: list[int], noise: float
) -> list[Cell]:
    """The runs that are reported, one per seed."""
    return [_cell(size, setting, objective, rate, seed, noise, "test") for seed in seeds]


def chosen_rate(size: Size, setting: tuple[str, str], objective: str, store: Cells) -> float:
    """The learning rate with the best mean validation accuracy at the end; of equal ones, the best along the way."""

    def merit(rate: float) -> tuple[float, float]:
        results = [store.result(cell) for cell in search_cells(size, setting, objective, rate)]
        finals = [r["accuracy"] or 0.0 for r in results]
        on_the_way = [a or 0.0 for r in results for a in r["curve"]]
        return sum(finals) / len(finals), sum(on_the_way) / len(on_the_way)

    return max(size.rates, key=merit)


def all_search_cells(size: Size) -> list[Cell]:
    """Every objective's search, over the same rates and seeds."""
    return [
        cell
        for setting in size.settings
        for name in size.objectives
        for rate in size.rates
        for cell in search_cells(size, setting, name, rate)
    ]


def all_final_cells(size: Size, seeds: list[int], store: Cells) -> list[Cell]:
    """Every objective's final runs, at the learning rate that its search chose."""
    return [
        cell
        for setting in size.settings
        for name in size.objectives
        for noise in NOISES
        for cell in final_cells(size, setting, name, chosen_rate(size, setting, name, store), seeds, noise)
    ]


def compute(cell: Cell) -> Result:
    """Train one network.

    Returns:
        `accuracy` and calibration error `ece` at the end, on the part that the cell asks for, None where training
        diverged; `steps` [T] and `curve` [T], accuracy on the way on the part's first images; `seconds`, processor time
        of the steps alone.
    """
    parts = data.split(cell["data"], cell["seed"], noise=cell["noise"])
    x, y = parts.train
    judged = parts.validation if cell["judged_on"] == "validation" else parts.test
    with seeding.scoped(cell["seed"], "study", "weights"):
        net = NETWORKS[cell["network"]](x.shape[1], x.shape[2], parts.num_classes)
    objective = of_logits(cell["objective"])
    optimiser = torch.optim.Adam(net.parameters(), lr=cell["rate"], foreach=True)
    points = recorded(cell["steps"])
    curve: list[float | None] = []
    seconds, finite = 0.0, True
    for step in range(cell["steps"]):
        started = time.process_time()
        for group in optimiser.param_groups:
            group["lr"] = cell["rate"] * (1 + math.cos(math.pi * step / cell["steps"])) / 2
        index = batch_indices(len(y), cell["batch"], cell["seed"], step)
        loss = objective(net(x[index]), y[index])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        seconds += time.process_time() - started
        finite = finite and math.isfinite(loss.item())
        if step + 1 in points:
            images, classes = (part[:NUM_CURVE_IMAGES] for part in judged)
            curve.append(accuracy(predict(net, images), classes) if finite else None)
    logits = predict(net, judged[0])
    finite = finite and bool(logits.isfinite().all())
    return {
        "accuracy": accuracy(logits, judged[1]) if finite else None,
        "ece": calibration_error(logits, judged[1]) if finite else None,
        "steps": points,
        "curve": curve,
        "seconds": seconds,
    }


def batch_indices(num: int, batch: int, seed: int, step: int) -> Tensor:
    """Which samples a step sees: passes over all in an order of their own each, what is left of a pass unused."""
    per_pass = num // batch
    order = torch.randperm(num, generator=seeding.generator(seed, "study", "batches", step // per_pass))
    start = step % per_pass * batch
    return order[start : start + batch]


def predict(net: nn.Module, x: Tensor) -> Tensor:
    """Logits of images."""
    net.eval()
    with torch.inference_mode():
        logits = torch.cat([net(part) for part in x.split(256)])
    net.train()
    return logits


def recorded(steps: int) -> list[int]:
    """Steps after which accuracy is measured: geometric from a fortieth to the last."""
    return sorted({max(round(steps / 40 * 40 ** (i / (NUM_POINTS - 1))), 1) for i in range(NUM_POINTS)})


def _cell(
    size: Size, setting: tuple[str, str], objective: str, rate: float, seed: int, noise: float, judged_on: str
) -> Cell:
    return {
        "study": "classifiers", "data": setting[0], "network": setting[1], "objective": objective, "rate": rate,
        "seed": seed, "noise": noise, "judged_on": judged_on, "steps": size.steps, "batch": size.batch,
    }  # fmt: skip
