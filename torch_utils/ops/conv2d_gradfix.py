"""Convolutions under the names that network sources call: torch's own, or on a CPU compiled ones that are faster."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils.ops import conv2d_cpu

enabled = False  # kept for sources that set it; changes nothing
weight_gradients_disabled = False  # set inside `no_weight_gradients`, for sources that look at it


@contextlib.contextmanager
def no_weight_gradients(disable: bool = True) -> Iterator[None]:
    """Declare that convolution-weight gradients are not needed inside the block.

    Nothing more than a declaration: autograd leaves out what nobody asks for by itself.
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
    """`torch.nn.functional.conv2d`: correlation of [N, C, H, W] with [O, C/groups, kh, kw]."""
    steps, pads = _pair(stride), _pair(padding)
    if groups == 1 and _pair(dilation) == (1, 1) and steps is not None and pads is not None and steps[0] == steps[1]:
        if conv2d_cpu.takes(input, weight, steps[0], pads, transposed=False):
            y = conv2d_cpu.conv2d(input, weight, steps[0], pads)
            return y if bias is None else y + bias[:, None, None]
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
    """`torch.nn.functional.conv_transpose2d`: [N, C, H, W] with [C, O/groups, kh, kw]."""
    steps, pads = _pair(stride), _pair(padding)
    is_plain = groups == 1 and _pair(dilation) == (1, 1) and _pair(output_padding) == (0, 0)
    if is_plain and steps is not None and pads is not None and steps[0] == steps[1]:
        if conv2d_cpu.takes(input, weight, steps[0], pads, transposed=True):
            h, w = [(n - 1) * steps[0] + 3 - 2 * pad for n, pad in zip(input.shape[2:], pads)]
            y = conv2d_cpu.conv2d_input(input, weight, (h, w), steps[0], pads)
            return y if bias is None else y + bias[:, None, None]
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _pair(value: Any) -> tuple[int, int] | None:
    """A setting along y and x, or None for what is neither a number nor two (torch knows more forms)."""
    if isinstance(value, int):
        return value, value
    values = tuple(value) if isinstance(value, (tuple, list)) else ()
    return values if len(values) == 2 and all(isinstance(v, int) for v in values) else None
