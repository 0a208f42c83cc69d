"""Training phases: which network steps when, and with what optimiser. Knows nothing of losses or data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass
class Phase:
    """One turn of an optimiser: its losses come from `GanLoss.accumulate_gradients(name, ...)`.

    Attributes:
        name: of the phase.
        parameters: of the network that it trains, those that get gradients.
        opt: turns the gradients into a step: an optimiser of the parameters, or of what they are made of.
        interval: it runs in every so many iterations.
    """

    name: str
    parameters: list[torch.nn.Parameter]
    opt: Any
    interval: int = 1

    def enable_gradients(self, wanted: bool) -> None:
        """Before and after the backward passes."""
        for parameter in self.parameters:
            parameter.requires_grad_(wanted)

    def due(self, step: int) -> bool:
        """Whether it runs in iteration `step` (the first is 0, in which every phase runs)."""
        return step % self.interval == 0


def build_phases(
    G: torch.nn.Module,
    D: torch.nn.Module,
    *,
    lr_g: float,
    lr_d: float,
    betas: tuple[float, float] = (0.0, 0.99),
    eps: float = 1e-8,
    g_reg_interval: int | None = 4,
    d_reg_interval: int | None = 16,
    g_parameters: list[torch.nn.Parameter] | None = None,
    g_optimizer: Callable[[Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer]], Any] | None = None,
) -> list[Phase]:
    """Phases in their order: G's, then D's; with lazy regularisation a main and a reg phase that share one Adam.

    With interval n the learning rate is multiplied by r = n / (n + 1) and each beta raised to r, because the optimiser
    takes n + 1 steps where it would take n (Karras et al. 2020, "Analyzing and improving ...", appendix B). The
    regulariser's gain of n is the caller's part. An interval of None makes one phase called Gboth or Dboth, without
    rescaling.

    Args:
        G, D: The networks.
        lr_g, lr_d, betas, eps: Of Adam.
        g_reg_interval, d_reg_interval: Of the regularisers.
        g_parameters: What of G learns; None is everything.
        g_optimizer: Makes G's optimiser, given a maker of Adams with G's rates; None is Adam of `g_parameters`.

    Raises:
        ValueError: An interval below 1.

    Source: spec training-and-metrics.md section 1 (lazy regularisation), section 8 (1).
    """
    phases = []
    chosen = list(G.parameters()) if g_parameters is None else g_parameters
    for letter, parameters, lr, interval in (
        ("G", chosen, lr_g, g_reg_interval), ("D", list(D.parameters()), lr_d, d_reg_interval)
    ):  # fmt: skip
        if interval is not None and interval < 1:
            raise ValueError(f"--{letter.lower()}-reg-interval {interval} is below 1; None is one common phase")
        ratio = 1 if interval is None else interval / (interval + 1)
        powers = (float(betas[0]) ** ratio, float(betas[1]) ** ratio)
        adam = partial(_adam, lr=lr * ratio, betas=powers, eps=eps)
        opt = g_optimizer(adam) if letter == "G" and g_optimizer else adam(parameters)
        if interval is None:
            phases.append(Phase(f"{letter}both", parameters, opt))
        else:
            phases += [Phase(f"{letter}main", parameters, opt), Phase(f"{letter}reg", parameters, opt, interval)]
    return phases


def gradient_norms(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of each gradient of the parameters, those that have one; no synchronisation."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    return torch.stack(torch._foreach_norm(gradients, 2)) if gradients else torch.zeros([0])


def count_nonfinite(parameters: Iterable[torch.Tensor], norms: torch.Tensor | None = None) -> int:
    """Number of gradient elements of these parameters that are not finite or whose square is not; 0 is good.

    The square counts because Adam keeps it: once infinite, it would hold the parameter where it is for ever.
    One synchronisation where all is well; counting happens only where it isn't.

    Args:
        parameters: Of a network.
        norms: What `gradient_norms` says of them, if it has been asked already.
    """
    parameters = list(parameters)
    norms = gradient_norms(parameters) if norms is None else norms
    # A finite sum of squares has finite summands; the largest magnitude would say it twenty times slower on a CPU.
    if bool(norms.square().isfinite().all()):
        return 0
    return sum(int(p.grad.numel() - p.grad.square().isfinite().sum()) for p in parameters if p.grad is not None)


def _adam(
    parameters: Sequence[torch.Tensor], lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Adam:
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps, fused=fused)
