"""Exponential moving average of the generator. Knows two modules of the same structure and one factor."""

import torch


def ema_beta(batch_size: int, cur_nimg: int, ema_kimg: float, rampup: float | None = None) -> float:
    """Decay of the average per iteration: 0.5^(batch / half-life).

    Args:
        batch_size: Images per iteration.
        cur_nimg: Images shown before this iteration.
        ema_kimg: Half-life in thousand images; 0 is no averaging.
        rampup: The half-life is at most this fraction of the images shown (0.05 is usual); None: constant.

    Source: spec training-and-metrics.md section 2 (4), section 8 (3).
    """
    halflife_nimg = ema_kimg * 1000
    if rampup is not None:
        halflife_nimg = min(halflife_nimg, cur_nimg * rampup)
    return 0.5 ** (batch_size / max(halflife_nimg, 1e-8))


@torch.no_grad()
def update_ema(G_ema: torch.nn.Module, G: torch.nn.Module, beta: float) -> None:
    """Move G_ema's parameters to G + (G_ema - G) * beta and copy G's buffers outright.

    Args:
        G_ema: The average, changed in place.
        G: The network in training, same structure.
        beta: Decay in [0, 1] (`ema_beta`); 0 copies.

    Raises:
        ValueError: The two networks differ in structure.
    """
    averages, parameters = dict(G_ema.named_parameters()), dict(G.named_parameters())
    copies, buffers = dict(G_ema.named_buffers()), dict(G.named_buffers())
    if averages.keys() != parameters.keys() or copies.keys() != buffers.keys():
        differing = sorted((averages.keys() ^ parameters.keys()) | (copies.keys() ^ buffers.keys()))
        raise ValueError(f"G_ema and G differ in structure: only one has {differing[0]}; make G_ema a copy of G")
    if averages:
        torch._foreach_lerp_(list(averages.values()), [parameters[name] for name in averages], 1 - beta)
    if copies:
        torch._foreach_copy_(list(copies.values()), [buffers[name] for name in copies])
