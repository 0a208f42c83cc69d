"""Draw the figures of docs/theory.md, from the product's own loss functions. Needs the extra `study`.

Usage: python scripts/draw_theory.py [FOLDER]      (default: docs, as seen from the repository's root)
"""

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from stylegan_rooted.losses import logistic, rooted_cross_entropy, rooted_logistic
from stylegan_rooted.study.figures import STYLE, look

ROOTS = (1, 2, 3, 8, 20)


def derivatives(f, m):
    """f, |f'| and f'' at the margins m [M]."""
    m = m.clone().requires_grad_(True)
    value = f(m)
    (first,) = torch.autograd.grad(value.sum(), m, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), m)
    return value.detach(), first.detach().abs(), second


def draw_losses(path):
    """Value, slope and curvature of the centred objective; the slope of both forms; the tail."""
    m = torch.linspace(-10, 6, 400, dtype=torch.float64)
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    (value, steep, curved), (direct, tail, share) = figure.subplots(2, 3)
    curves = {"cross-entropy": logistic} | {
        f"inverse:{k}": lambda x, k=k: rooted_logistic(x, k, centred=True) for k in ROOTS
    }
    for name, f in curves.items():
        label = "logistic" if name == "cross-entropy" else name.replace("inverse:", "k = ")
        for axes, row in zip((value, steep, curved), derivatives(f, m)):
            axes.plot(m, row, label=label, **look(name))
    value.set(title="centred loss", ylim=(0, 12))
    steep.set(title="|slope|", yscale="log", ylim=(1e-3, 1e4))
    curved.set(title="curvature", yscale="log", ylim=(1e-3, 1e4))
    value.legend(frameon=False)
    logits = torch.stack([torch.zeros_like(m), m], dim=1)
    target = torch.ones(len(m), dtype=torch.int64)
    direct.plot(m, derivatives(logistic, m)[1], **look("cross-entropy"))
    for k in ROOTS:
        x = logits.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(rooted_cross_entropy(x, target, k=k, form="direct", reduction="sum"), x)
        direct.plot(m, g[:, 1].abs(), label=f"k = {k}", **look(f"direct:{k}"))
    direct.set(title="|slope| of the direct form", xlabel="margin")
    direct.legend(frameon=False)
    for at, dashes in ((None, "-"), (6.0, "--"), (4.0, ":")):
        style = look("inverse:2") | {"linestyle": dashes}
        row = derivatives(lambda x, at=at: rooted_logistic(x, 2, tail_at=at), m)[1]
        tail.plot(m, row, label="no tail" if at is None else f"T = {at:g}", **style)
    tail.set(title="|slope| with a linear tail, k = 2", xlabel="margin", yscale="log", ylim=(1e-3, 1e3))
    tail.legend(frameon=False)
    for name, f in curves.items():
        slopes = derivatives(f, torch.cat([m, torch.zeros(1, dtype=torch.float64)]))[1]
        share.plot(m, 100 * slopes[:-1] / (slopes[:-1] + 255 * slopes[-1]), **look(name))
    share.set(title="gradient of one sample of 256,\nthe others at 0, percent", xlabel="margin of that one")
    figure.savefig(path, dpi=80)


def draw_optimum(path):
    """Best logit, divergence and R1's effect over k."""
    figure = Figure(figsize=(9.5, 2.8), layout="constrained")
    logit, divergence, weight = figure.subplots(1, 3)
    ratio = np.logspace(-4, 4, 200)
    p = np.linspace(1e-4, 1 - 1e-4, 300)
    for k in (*ROOTS, math.inf):
        name, label = ("cross-entropy", "logistic") if k == math.inf else (f"inverse:{k}", f"k = {k}")
        a = 1.0 if k == math.inf else k / (k + 1)
        logit.plot(ratio, a * np.log(ratio), label=label, **look(name))
        size = 1e6 if k == math.inf else k
        b = size / (size + 1)
        first, second = np.stack([p, 1 - p]), np.array([[0.5], [0.5]])
        distance = size * (2 ** (1 / b) - ((first**b + second**b) ** (1 / b)).sum(axis=0))
        divergence.plot(p, distance / distance[0], **look(name))
    logit.set(title="best logit of D", xscale="log", xlabel="p / q")
    logit.legend(frameon=False)
    divergence.set(title="divergence of (x, 1 - x) from (½, ½),\nrelative to that at x = 0", xlabel="x")
    k = np.logspace(0, 2, 100)
    a = k / (k + 1)
    weight.plot(k, a**2, label="penalty of the best logits", color="black")
    weight.plot(k, a / 2 ** (1 / k), label="effective gamma, scale paper", **look("inverse:2"))
    weight.plot(k, a, label="effective gamma, scale calibrated", **look("direct:2"))
    weight.set(title="R1 beside the logistic loss", xscale="log", xlabel="k", ylim=(0, 1.05))
    weight.legend(frameon=False)
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs"))
    folder = parser.parse_args().folder
    with matplotlib.rc_context(STYLE):
        draw_losses(folder / "theory-losses.png")
        draw_optimum(folder / "theory-optimum.png")


if __name__ == "__main__":
    main()
