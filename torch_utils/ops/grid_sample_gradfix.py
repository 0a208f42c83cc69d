"""Bilinear grid sampling, differentiable twice with respect to image and grid."""

import torch
import torch.nn.functional as F

enabled = False  # kept for sources that set it; changes nothing


def grid_sample(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample images at given places: bilinear, zeros outside, `align_corners=False`.

    Args:
        input: Images [N, C, H, W].
        grid: Places [N, H', W', 2] as (x, y); -1 and +1 are the outer edges of the border pixels.

    Returns:
        Samples [N, C, H', W'].
    """
    return F.grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
