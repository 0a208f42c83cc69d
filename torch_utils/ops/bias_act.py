"""Bias, activation, gain and clamp in one call. Knows the activation table; knows nothing of layers."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from dnnlib import EasyDict
from torch_utils import custom_ops

NATIVE_ACTS = ("linear", "relu", "lrelu")  # by native_cpu.cpp; torch's own vector functions serve the others as well
NATIVE_MIN_NUMEL = 1 << 19  # with fewer elements the compiled operator's call costs what it saves

# Spec: networks-and-pickles.md 1.4. cuda_idx, ref and has_2nd_grad are part of the family's interface.
activation_funcs = {
    "linear": EasyDict(
        func=lambda x, **_: x, def_alpha=0, def_gain=1, cuda_idx=1, ref="", has_2nd_grad=False
    ),
    "relu": EasyDict(
        func=lambda x, **_: F.relu(x), def_alpha=0, def_gain=math.sqrt(2), cuda_idx=2, ref="y", has_2nd_grad=False
    ),
    "lrelu": EasyDict(
        func=lambda x, alpha, **_: F.leaky_relu(x, alpha),
        def_alpha=0.2, def_gain=math.sqrt(2), cuda_idx=3, ref="y", has_2nd_grad=False,
    ),
    "tanh": EasyDict(
        func=lambda x, **_: torch.tanh(x), def_alpha=0, def_gain=1, cuda_idx=4, ref="y", has_2nd_grad=True
    ),
    "sigmoid": EasyDict(
        func=lambda x, **_: torch.sigmoid(x), def_alpha=0, def_gain=1, cuda_idx=5, ref="y", has_2nd_grad=True
    ),
    "elu": EasyDict(
        func=lambda x, **_: F.elu(x), def_alpha=0, def_gain=1, cuda_idx=6, ref="y", has_2nd_grad=True
    ),
    "selu": EasyDict(
        func=lambda x, **_: F.selu(x), def_alpha=0, def_gain=1, cuda_idx=7, ref="y", has_2nd_grad=True
    ),
    "softplus": EasyDict(
        func=lambda x, **_: F.softplus(x), def_alpha=0, def_gain=1, cuda_idx=8, ref="y", has_2nd_grad=True
    ),
    "swish": EasyDict(
        func=lambda x, **_: torch.sigmoid(x) * x,
        def_alpha=0, def_gain=math.sqrt(2), cuda_idx=9, ref="x", has_2nd_grad=True,
    ),
}  # fmt: skip


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "cuda",
) -> torch.Tensor:
    """Compute clip(gain * act(x + b), -clamp, +clamp).

    Args:
        x: Any shape.
        b: Bias [x.shape[dim]], or None.
        dim: The axis of x that b belongs to.
        act: A key of `activation_funcs`.
        alpha: Slope of `lrelu` for negative values; None = the table's.
        gain: Factor after the activation; None = the table's.
        clamp: Limit of the absolute value, >= 0; None = no limit. At exactly +-clamp the gradient passes.
        impl: `cuda` or `ref`; both give the same numbers.

    Raises:
        ValueError: Unknown activation, negative clamp, or a bias that does not fit x.

    Source: spec networks-and-pickles 1.4.
    """
    if act not in activation_funcs:
        raise ValueError(f"act is {act!r}, wanted one of {', '.join(activation_funcs)}")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"clamp is {clamp}, wanted a number >= 0, or None for no limit")
    if b is not None and (not -x.ndim <= dim < x.ndim or b.ndim != 1 or b.shape[0] != x.shape[dim]):
        raise ValueError(f"bias {tuple(b.shape)} does not fit axis {dim} of x {tuple(x.shape)}; wanted one value each")
    spec = activation_funcs[act]
    alpha = float(spec.def_alpha if alpha is None else alpha)
    gain = float(spec.def_gain if gain is None else gain)
    if custom_ops.fast_paths(impl) and _suits_native(x, b, act, alpha, gain, clamp):
        limit = -1.0 if clamp is None else float(clamp)
        return _native()(x, b, None, None, None, 0, dim % x.ndim, spec.cuda_idx, alpha, gain, limit)
    if b is not None:
        shape = [1] * x.ndim
        shape[dim] = -1
        b = b.reshape(shape)

    slope = {"relu": 0.0, "lrelu": alpha}.get(act, -1.0)
    if custom_ops.fast_paths(impl) and slope >= 0 and gain > 0 and x.dtype in (torch.float32, torch.float64):
        x = _Rectify.apply(x, x.new_zeros([]) if b is None else b, slope, gain)
    else:
        x = spec.func(x if b is None else x + b, alpha=alpha)
        x = x * gain if gain != 1 else x
    return x if clamp is None else x.clamp(-float(clamp), float(clamp))


class _Rectify(torch.autograd.Function):
    """gain * leaky_relu(x + b) in two passes over memory and one allocation; gain > 0, slope >= 0.

    leaky_relu is positively homogeneous, so the gain can go first; the sign of the result tells the sign of the input,
    so only the result is kept for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, b: torch.Tensor, slope: float, gain: float) -> torch.Tensor:
        y = torch.empty_like(x)
        torch.add(b * gain, x, alpha=gain, out=y)
        F.leaky_relu_(y, slope)
        ctx.save_for_backward(y)
        ctx.slope, ctx.gain, ctx.bias_shape = slope, gain, b.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        dx = _RectifyGrad.apply(dy, y.detach(), ctx.slope, ctx.gain)
        db = dx.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[1] else None
        return dx if ctx.needs_input_grad[0] else None, db, None, None


class _RectifyGrad(torch.autograd.Function):
    """dy times the slope of `_Rectify` where its result is y. Linear in dy, so it is its own derivative; none wrt y."""

    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, y: torch.Tensor, slope: float, gain: float) -> torch.Tensor:
        ctx.save_for_backward(y)
        ctx.slope, ctx.gain = slope, gain
        return torch.ops.aten.leaky_relu_backward(dy, y, slope, True).mul_(gain)

    @staticmethod
    def backward(ctx: Any, ddx: torch.Tensor) -> tuple:  # type: ignore[override]
        return _RectifyGrad.apply(ddx, *ctx.saved_tensors, ctx.slope, ctx.gain), None, None, None


def _suits_native(
    x: torch.Tensor, b: torch.Tensor | None, act: str, alpha: float, gain: float, clamp: float | None
) -> bool:
    """Whether the compiled operator is asked for, takes this call and saves a pass over memory."""
    return (
        act in NATIVE_ACTS
        and gain > 0
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and (b is None or b.dtype == x.dtype)
        and (act != "lrelu" or alpha >= 0)
        and (act != "linear" or clamp is not None or gain != 1)
        and x.numel() >= NATIVE_MIN_NUMEL
        and custom_ops.selected(x.device.type) == "native"
    )


def _native() -> Any:
    """The compiled operator, `order` 0 for values and 1 for the slope; CUDA kernels know 2 and use `dy`."""
    schema = (
        "(Tensor x, Tensor? b, Tensor? xref, Tensor? yref, Tensor? dy, int order, int dim, int act, float alpha, "
        "float gain, float clamp) -> Tensor"
    )
    return custom_ops.declare("bias_act", schema, _native_shape, _native_setup, _native_backward)


def _native_shape(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """Shape, type and layout of the compiled operator's result."""
    is_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return x.new_empty(x.shape).contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def _native_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    """What the gradient needs: the result, whose sign is the input's; with a clamp the input, to see what it cut."""
    x, b, xref, yref, _, order, *settings = inputs
    if order == 0 and settings[-1] < 0:
        b, yref = None, output
    elif order == 0:
        xref = x
    ctx.save_for_backward(b, xref, yref)
    ctx.settings = settings


def _native_backward(ctx: Any, dy: torch.Tensor) -> tuple:
    """The slope times dy. It is linear in dy and piecewise constant in the rest, so it is its own derivative."""
    refs = [None if t is None else t.detach() for t in ctx.saved_tensors]
    dx = _native()(dy, *refs, None, 1, *ctx.settings)
    shape = [n if i == ctx.settings[0] else 1 for i, n in enumerate(dx.shape)]
    db = dx.sum_to_size(shape).reshape(-1) if ctx.needs_input_grad[1] else None
    return (dx if ctx.needs_input_grad[0] else None, db, *[None] * 9)
