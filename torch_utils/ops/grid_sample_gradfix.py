"""Bilinear grid sampling, differentiable twice with respect to image and grid, whatever the version of torch."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

enabled = False  # kept for sources that set it; changes nothing


def grid_sample(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample images at given places: bilinear, zeros outside, `align_corners=False`.

    Args:
        input: Images [N, C, H, W].
        grid: Places [N, H', W', 2] as (x, y); -1 and +1 are the outer edges of the border pixels.

    Returns:
        Samples [N, C, H', W'].
    """
    needs_grad = torch.is_grad_enabled() and (input.requires_grad or grid.requires_grad)
    if needs_grad and not torch_differentiates_twice():
        return TwiceDifferentiable.apply(input, grid)
    return _sample(input, grid)


@functools.cache
def torch_differentiates_twice() -> bool:
    """Whether this version of torch has second derivatives of its own (older ones raise); tried out once."""
    with torch.inference_mode(False), torch.enable_grad():
        image = torch.ones(1, 1, 2, 2, requires_grad=True)
        grid = torch.zeros(1, 1, 1, 2, requires_grad=True)
        try:
            first = torch.autograd.grad(_sample(image, grid).square().sum(), [image, grid], create_graph=True)
            torch.autograd.grad([g.sum() for g in first], [image, grid])
        except (RuntimeError, NotImplementedError):
            return False
    return True


class TwiceDifferentiable(torch.autograd.Function):
    """Torch's sampling and its gradient; the second derivative through sums of weighted neighbours."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input, grid)
        return _sample(input, grid)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:  # type: ignore[override]
        return _Gradient.apply(dy, *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """Gradient of the sampling with respect to image and grid, as a function of dy, image and grid."""

    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, input: torch.Tensor, grid: torch.Tensor) -> tuple:
        ctx.save_for_backward(dy, input, grid)
        modes = dict(interpolation_mode=0, padding_mode=0, align_corners=False, output_mask=[True, True])
        return torch.ops.aten.grid_sampler_2d_backward(dy, input, grid, **modes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddinput: torch.Tensor, ddgrid: torch.Tensor) -> tuple:  # type: ignore[override]
        with torch.enable_grad():
            dy, input, grid = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            first = torch.autograd.grad(sample_by_neighbours(input, grid), [input, grid], dy, create_graph=True)
            return torch.autograd.grad(first, [dy, input, grid], [ddinput, ddgrid], allow_unused=True)


def sample_by_neighbours(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The definition of `grid_sample`: the four pixels around each place, weighted; differentiable to any order."""
    n, c, h, w = input.shape
    pixels = input.flatten(2)  # [N, C, H * W]
    x = ((grid[..., 0] + 1) * w - 1) / 2  # [N, H', W'], in pixels
    y = ((grid[..., 1] + 1) * h - 1) / 2
    left, top = x.detach().floor(), y.detach().floor()
    total = torch.zeros([], dtype=input.dtype, device=input.device)
    for dx in (0, 1):
        for dy in (0, 1):
            column, row = left + dx, top + dy
            is_inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            index = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).long()
            values = pixels.gather(2, index.flatten(1)[:, None, :].expand(n, c, -1)).reshape(n, c, *index.shape[1:])
            weight = (x - left if dx else column + 1 - x) * (y - top if dy else row + 1 - y) * is_inside
            total = total + values * weight[:, None]
    return total


def _sample(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return F.grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
