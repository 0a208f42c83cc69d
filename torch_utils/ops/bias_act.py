"""Bias, activation, gain and clamp in one call. Knows the activation table; knows nothing of layers."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from dnnlib import EasyDict
from torch_utils import custom_ops

CURVED_ACTS = ("tanh", "sigmoid", "elu", "selu", "softplus", "swish")
NATIVE_ACTS = {  # on a CPU torch's own vector functions serve the curved ones as well
    "cpu": ("linear", "relu", "lrelu"),
    "cuda": ("linear", "relu", "lrelu", *CURVED_ACTS),
}
NATIVE_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}
NATIVE_MIN_NUMEL = {"cpu": 1 << 19, "cuda": 0}  # with fewer elements the compiled operator's call costs what it saves

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
    # torch.compile fuses the definition by itself, and does not take the writing into a tensor of a given layout.
    is_eager = custom_ops.fast_paths(impl) and not torch.compiler.is_compiling()
    if is_eager and slope >= 0 and gain > 0 and x.dtype in (torch.float32, torch.float64):
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
    device = x.device.type
    return (
        device in NATIVE_ACTS
        and act in NATIVE_ACTS[device]
        and x.dtype in NATIVE_DTYPES[device]
        and (b is None or b.dtype == x.dtype and b.device == x.device)
        and gain > 0
        and (act != "lrelu" or alpha >= 0)
        and (act != "linear" or clamp is not None or gain != 1)
        and x.numel() >= NATIVE_MIN_NUMEL[device]
        and custom_ops.selected(device) == "native"
    )


def _native() -> Any:
    """The compiled operator: `order` 0 for values, 1 for the slope times x, 2 for the curvature times x times dy."""
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
    """What the gradient needs: the input; for straight activations the result will do, as its sign is the input's.

    With a clamp it won't: at exactly +-clamp the gradient passes, and the result does not tell.
    """
    x, b, xref, yref, dy, order, *settings = inputs
    act, clamp = settings[1], settings[-1]
    ctx.is_curved = act >= activation_funcs[CURVED_ACTS[0]].cuda_idx
    if order == 0 and not ctx.is_curved and clamp < 0:
        b, yref = None, output
    elif order == 0:
        xref = x
    ctx.save_for_backward(x if order and ctx.is_curved else None, b, xref, yref, dy)
    ctx.order, ctx.settings = order, settings


def _native_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    """Gradients by the operator itself, one order up. Of orders 1 and 2, which are linear in x (and dy), also in these.

    A straight activation has no curvature, so its slope is constant in b and xref.
    """
    x, b, xref, yref, dy = ctx.saved_tensors
    if not ctx.is_curved:
        b, xref, yref = (None if t is None else t.detach() for t in (b, xref, yref))
    of_x, of_b, of_xref, _, of_dy = ctx.needs_input_grad[:5]

    def run(dy: torch.Tensor | None, order: int) -> torch.Tensor:
        return _native()(grad, b, xref, yref, dy, order, *ctx.settings)

    def summed(du: torch.Tensor | None) -> torch.Tensor | None:
        if du is None or not of_b:
            return None
        shape = [n if i == ctx.settings[0] else 1 for i, n in enumerate(du.shape)]
        return du.sum_to_size(shape).reshape(-1)

    rest = [None] * 6
    if ctx.order == 0:
        dx = run(None, 1)
        return (dx if of_x else None, summed(dx), None, None, None, *rest)
    if ctx.order == 1:
        du = run(x, 2) if ctx.is_curved and (of_b or of_xref) else None
        return (run(None, 1) if of_x else None, summed(du), du, None, None, *rest)
    if of_b or of_xref:
        raise RuntimeError("bias_act: the third derivative of a curved activation is not defined; use impl='ref'")
    return (run(dy, 2) if of_x else None, None, None, None, run(x, 2) if of_dy else None, *rest)
