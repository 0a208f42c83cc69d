"""Products per pixel between features of many channels and a few colours: what reads a picture and what writes one.

Three operators, closed under differentiation (derivatives_cpu.cpp): features to colours, its adjoint from colours to
features, and the one to kernels. The compiled ones (colours_cpu.cpp) do with one pass over memory what torch's products
need conversions of layout for; sums along channels are torch's. Not operators that network sources call:
`training.execution` does.
"""

from typing import Any

import torch

from torch_utils import custom_ops

MAX_COLOURS = 4
NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def few(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Colours of features: y[n, o] = sum over c of kernels[n, o, c] * x[n, c] at every pixel.

    Args:
        x: Features [N, C, H, W].
        kernels: [N, O, C], float32 (float64 with float64).

    Returns:
        [N, O, H, W] of the kernels' type, contiguous.
    """
    if suits(x.device, x.dtype, kernels.shape[1]):
        return _operator("colours_few")(x, kernels)
    num, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(num, height * width, channels)
    y = torch.bmm(kernels.to(x.dtype), pixels.transpose(1, 2))
    return y.reshape(num, -1, height, width).to(kernels.dtype)


def many(y: torch.Tensor, kernels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Features of colours, the adjoint of `few`: x[n, c] = sum over o of kernels[n, o, c] * y[n, o] at every pixel.

    Args:
        y: Colours [N, O, H, W], of the kernels' type.
        kernels: [N, O, C].
        dtype: Of the features.

    Returns:
        [N, C, H, W].
    """
    if suits(y.device, dtype, kernels.shape[1]):
        return _operator("colours_many")(y, kernels, dtype)
    x = torch.bmm(kernels.transpose(1, 2), y.flatten(2))
    return x.reshape(len(y), -1, *y.shape[2:]).to(dtype)


def suits(device: torch.device, dtype: torch.dtype, num_colours: int) -> bool:
    """Whether the compiled operators take features of this kind."""
    return (
        device.type == "cpu"
        and dtype in NATIVE_DTYPES
        and 0 < num_colours <= MAX_COLOURS
        and custom_ops.fast_paths()
        and custom_ops.selected() == "native"
    )


def _operator(name: str) -> Any:
    """One of the compiled operators; the first call declares them all, as each is in another's gradient."""
    op = custom_ops.declared(name)
    if op is None:
        custom_ops.declare("colours_few", "(Tensor x, Tensor kernels) -> Tensor", _few_shape)
        custom_ops.declare("colours_many", "(Tensor y, Tensor kernels, ScalarType dtype) -> Tensor", _many_shape)
        custom_ops.declare("colours_kernels", "(Tensor x, Tensor y) -> Tensor", _kernels_shape)
        op = custom_ops.declared(name)
    return op


def _few_shape(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    return kernels.new_empty(x.shape[0], kernels.shape[1], *x.shape[2:])


def _many_shape(y: torch.Tensor, kernels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    shape = (y.shape[0], kernels.shape[2], *y.shape[2:])
    return torch.empty(shape, dtype=dtype, device=y.device, memory_format=torch.channels_last)


def _kernels_shape(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y.new_empty(x.shape[0], y.shape[1], x.shape[1])
