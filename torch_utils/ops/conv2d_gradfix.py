"""Convolutions under the names that network sources call; torch's own are already differentiable to any order."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

enabled = False  # kept for sources that set it; changes nothing
weight_gradients_disabled = False  # set inside `no_weight_gradients`; informative only


@contextlib.contextmanager
def no_weight_gradients(disable: bool = True) -> Iterator[None]:
    """Declare that convolution-weight gradients are not needed inside the block.

    They are computed all the same where someone asks for them: this is a declaration, not a promise of speed.
    """
    global weight_gradients_disabled
    before = weight_gradients_disabled
    weight_gradients_disabled = before or disable
    try:
        yield
    finally:
        weight_gradients_disabled = before


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Exactly `torch.nn.functional.conv2d`: correlation of [N, C, H, W] with [O, C/groups, kh, kw]."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> torch.Tensor:
    """Exactly `torch.nn.functional.conv_transpose2d`: [N, C, H, W] with [C, O/groups, kh, kw]."""
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
