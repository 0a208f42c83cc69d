"""The studies of networks: one cell trains one network once, with one objective, learning rate and seed.

A seed decides the split of what is not test data, the weights at the start, the order of samples and which labels are
wrong; none of it depends on the objective or the learning rate, so objectives are paired by seed. Every objective is
trained with every learning rate of one grid; for each seed the rate with the best accuracy on that seed's validation
data is reported, on test data. So the luck of the search is part of what varies between pairs.
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

NUM_POINTS = 12
NUM_CURVE_IMAGES = 200
"""The curve is measured on so many images, so that measuring takes less time than training."""


@dataclass(frozen=True)
class Size:
    """How much of a study.

    Attributes:
        settings: (data set, network) pairs.
        steps: Optimiser steps of each run.
        batch: Images per step.
        rates: Learning rates of Adam at the start; they fall to 0 along half a cosine.
        objectives: Names, cross-entropy among them.
    """

    settings: tuple[tuple[str, str], ...]
    steps: int
    batch: int
    rates: tuple[float, ...]
    objectives: tuple[str, ...] = NAMES


FINE = tuple(1e-4 * 10 ** (i / 4) for i in range(12))
MLP = Size((("digits", "mlp"), ("mnist", "mlp")), 400, 32, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
MLP_FULL = Size(MLP.settings, 3000, 32, FINE)
VISION = Size(
    (("mnist", "resnet"), ("mnist", "vit"), ("emoji", "resnet"), ("emoji", "vit")), 150, 32, (1e-3, 3e-3, 1e-2)
)
VISION_FULL = Size(tuple((d, n) for d in data.IMAGES for n in ("resnet", "vit")), 2000, 32, FINE)


def search_cells(size: Size, seeds: list[int]) -> list[Cell]:
    """Every objective with every learning rate and every seed."""
    return [
        run_cell(size, setting, name, rate, seed)
        for setting in size.settings
        for name in size.objectives
        for rate in size.rates
        for seed in seeds
    ]


def noisy_cells(size: Size, seeds: list[int], store: Cells) -> list[Cell]:
    """Every objective once more per seed, with wrong labels, at the learning rate chosen without."""
    return [
        run_cell(size, setting, name, chosen_rate(size, setting, name, seed, store), seed, noise=data.NOISE_SHARE)
        for setting in size.settings
        for name in size.objectives
        for seed in seeds
    ]


def run_cell(
    size: Size, setting: tuple[str, str], objective: str, rate: float, seed: int, *, noise: float = 0.0
) -> Cell:
    """One run's settings."""
    return {
        "study": "classifiers", "data": setting[0], "network": setting[1], "objective": objective, "rate": rate,
        "seed": seed, "noise": noise, "steps": size.steps, "batch": size.batch,
    }  # fmt: skip


def chosen_rate(size: Size, setting: tuple[str, str], objective: str, seed: int, store: Cells) -> float:
    """The learning rate with the best validation accuracy at the end; of equal ones the largest."""

    def merit(rate: float) -> tuple[float, float]:
        validation = store.result(run_cell(size, setting, objective, rate, seed))["validation"]
        return -1.0 if validation is None else validation, rate

    return max(size.rates, key=merit)


def compute(cell: Cell) -> Result:
    """Train one network.

    Returns:
        At the end: `validation`, accuracy on validation data; `accuracy` and the calibration error `ece` on test data;
        None where training diverged. On the way: `steps` [T], and accuracy on the first test images `curve` [T].
        `seconds`, processor time of the steps alone.
    """
    parts = data.split(cell["data"], cell["seed"], noise=cell["noise"])
    x, y = parts.train
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
            images, classes = (part[:NUM_CURVE_IMAGES] for part in parts.test)
            curve.append(accuracy(predict(net, images), classes) if finite else None)
    validation, test = predict(net, parts.validation[0]), predict(net, parts.test[0])
    finite = finite and bool(validation.isfinite().all() and test.isfinite().all())
    return {
        "validation": accuracy(validation, parts.validation[1]) if finite else None,
        "accuracy": accuracy(test, parts.test[1]) if finite else None,
        "ece": calibration_error(test, parts.test[1]) if finite else None,
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
