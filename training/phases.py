"""Training phases: which network steps when, and with what optimiser. Knows nothing of losses or data."""

from dataclasses import dataclass

import torch


@dataclass
class Phase:
    """One turn of an optimiser: its losses come from `GanLoss.accumulate_gradients(name, ...)`."""

    name: str
    module: torch.nn.Module
    opt: torch.optim.Optimizer
    interval: int = 1

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
) -> list[Phase]:
    """Phases in their order: G's, then D's; with lazy regularisation a main and a reg phase that share one Adam.

    With interval n the learning rate is multiplied by r = n / (n + 1) and each beta raised to r, because the optimiser
    takes n + 1 steps where it would take n (Karras et al. 2020, "Analyzing and improving ...", appendix B). The
    regulariser's gain of n is the caller's part. An interval of None makes one phase called Gboth or Dboth, without
    rescaling.

    Raises:
        ValueError: An interval below 1.

    Source: spec training-and-metrics.md section 1 (lazy regularisation), section 8 (1).
    """
    phases = []
    for letter, module, lr, interval in (("G", G, lr_g, g_reg_interval), ("D", D, lr_d, d_reg_interval)):
        if interval is None:
            phases.append(Phase(f"{letter}both", module, _adam(module, lr, (float(betas[0]), float(betas[1])), eps)))
            continue
        if interval < 1:
            raise ValueError(f"--{letter.lower()}-reg-interval {interval} is below 1; None is one common phase")
        ratio = interval / (interval + 1)
        opt = _adam(module, lr * ratio, (float(betas[0]) ** ratio, float(betas[1]) ** ratio), eps)
        phases.append(Phase(f"{letter}main", module, opt))
        phases.append(Phase(f"{letter}reg", module, opt, interval))
    return phases


def count_nonfinite(module: torch.nn.Module) -> int:
    """Number of gradient elements of a module's parameters that are not finite or whose square is not; 0 is good.

    The square counts because Adam keeps it: once infinite, it would hold the parameter where it is for ever.
    One pass over all gradients and one synchronisation where all is well; counting happens only where it isn't.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None and p.grad.numel()]
    if not gradients:
        return 0
    # A finite sum of squares has finite summands; the largest magnitude would say it twenty times slower on a CPU.
    if bool(torch.stack(torch._foreach_norm(gradients, 2)).square().isfinite().all()):
        return 0
    return sum(int(g.numel() - g.square().isfinite().sum()) for g in gradients)


def _adam(module: torch.nn.Module, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Adam:
    parameters = list(module.parameters())
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps, fused=fused)
