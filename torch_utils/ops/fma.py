"""Fused multiply-add with broadcasting."""

import torch


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Compute a * b + c.

    Args:
        a, b, c: Tensors whose shapes broadcast.
    """
    return torch.addcmul(c, a, b) if a.dtype == b.dtype == c.dtype else a * b + c
