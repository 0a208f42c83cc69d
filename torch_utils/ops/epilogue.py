"""What follows a convolution, in one call: scale per sample and channel, noise, bias, activation, gain and clamp.

`reference` is the specification; the compiled operator of epilogue_cpu.cpp gives the same numbers in one pass over
memory, and its gradients, to second order, in one pass each. Not one of the operators that network sources call:
`training.execution` does.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act, fma

NATIVE_ACTS = ("linear", "lrelu")
NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

_keeps_inputs = False  # set inside `inputs_kept`


@contextlib.contextmanager
def inputs_kept() -> Iterator[None]:
    """Declare that what is computed inside the block will be differentiated twice: it takes more memory, less time."""
    global _keeps_inputs
    before, _keeps_inputs = _keeps_inputs, True
    try:
        yield
    finally:
        _keeps_inputs = before


def epilogue(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "cuda",
) -> torch.Tensor:
    """Compute clip(gain * act(x * scale + noise * strength + bias), -clamp, +clamp).

    Args:
        x: Images [N, C, H, W].
        scale: Factor per sample and channel [N, C], or None.
        noise: One value per pixel, [H, W] or [N, 1, H, W], or None.
        strength: Factor on the noise, []; given where noise is.
        bias: One value per channel [C], or None.
        act: A key of `bias_act.activation_funcs`.
        gain: Factor after the activation; None = the table's.
        clamp: Limit of the absolute value, >= 0; None = no limit. At exactly +-clamp the gradient passes.
        impl: `ref` = the plain definition; `cuda` = whatever is fastest.

    Returns:
        [N, C, H, W] of x's dtype. Where x is bfloat16, parameters and arithmetic are float32 all the same.

    Raises:
        ValueError: Noise without a strength, or what `bias_act` refuses.
    """
    if (noise is None) != (strength is None):
        raise ValueError("noise and its strength come together; give both or neither")
    gain = float(bias_act.activation_funcs[act].def_gain) if gain is None and act in bias_act.activation_funcs else gain
    if not custom_ops.fast_paths(impl):
        return reference(x, scale, noise, strength, bias, act, gain, clamp)
    if _suits_native(x, noise, act, gain, clamp) and custom_ops.selected() == "native":
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        tensors = [None if t is None else t.to(kind) for t in (scale, noise, strength, bias)]
        alpha = float(bias_act.activation_funcs[act].def_alpha) if act == "lrelu" else 1.0
        return _forward()(x, *tensors, alpha, float(gain or 0), -1.0 if clamp is None else float(clamp))
    return _by_torch(x, scale, noise, strength, bias, act, gain, clamp)


def bound(
    like: torch.Tensor, act: str = "linear", gain: float | None = None, clamp: float | None = None
) -> Callable[..., torch.Tensor]:
    """`epilogue` for many calls without gradient: what depends on the kind of images alone is decided here, once.

    Args:
        like: Images of the kind that will come.
        act: As in `epilogue`; `gain` and `clamp` too.

    Returns:
        Function of (x, scale, noise, strength, bias), None where there is none; all but x in float32.
    """
    gain = float(bias_act.activation_funcs[act].def_gain) if gain is None else gain
    if custom_ops.fast_paths() and _suits_native(like, None, act, gain, clamp) and custom_ops.selected() == "native":
        if like.dtype != torch.float64:
            alpha = float(bias_act.activation_funcs[act].def_alpha) if act == "lrelu" else 1.0
            settings = (alpha, float(gain), -1.0 if clamp is None else float(clamp))
            run = _forward()
            return lambda x, scale, noise, strength, bias: run(x, scale, noise, strength, bias, *settings)
    return functools.partial(epilogue, act=act, gain=gain, clamp=clamp)


def reference(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    noise: torch.Tensor | None,
    strength: torch.Tensor | None,
    bias: torch.Tensor | None,
    act: str,
    gain: float | None,
    clamp: float | None,
) -> torch.Tensor:
    """The definition of `epilogue`, step by step. Same arguments."""
    y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if scale is not None:
        y = y * scale[:, :, None, None]
    if noise is not None and strength is not None:
        y = y + noise * strength
    return bias_act.bias_act(y, bias, act=act, gain=gain, clamp=clamp, impl="ref").to(x.dtype)


def _by_torch(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    noise: torch.Tensor | None,
    strength: torch.Tensor | None,
    bias: torch.Tensor | None,
    act: str,
    gain: float | None,
    clamp: float | None,
) -> torch.Tensor:
    """The same in x's own precision, with the family's operators."""
    amount = None if noise is None or strength is None else (noise * strength).to(x.dtype)
    if scale is not None:
        factor = scale.to(x.dtype)[:, :, None, None]
        x = x * factor if amount is None else fma.fma(x, factor, amount)
    elif amount is not None:
        x = x + amount
    return bias_act.bias_act(x, None if bias is None else bias.to(x.dtype), act=act, gain=gain, clamp=clamp)


def _suits_native(
    x: torch.Tensor, noise: torch.Tensor | None, act: str, gain: float | None, clamp: float | None
) -> bool:
    """Whether the compiled operator takes this call; it has no gradient with respect to the noise map itself."""
    return (
        act in NATIVE_ACTS
        and gain is not None
        and gain > 0
        and (clamp is None or clamp >= 0)
        and x.device.type == "cpu"
        and x.ndim == 4
        and x.numel() > 0
        and x.dtype in NATIVE_DTYPES
        and (noise is None or not noise.requires_grad)
    )


_PARAMETERS = "Tensor? scale, Tensor? noise, Tensor? strength, Tensor? bias, float alpha, float gain, float clamp"


def _forward() -> Any:
    """The compiled operator."""
    return custom_ops.declare(
        "epilogue", f"(Tensor x, {_PARAMETERS}) -> Tensor", _forward_shape, _forward_setup, _forward_backward
    )


def _forward_shape(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _forward_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, scale, noise, strength, bias, alpha, _, clamp = inputs
    ctx.settings = inputs[5:]
    # The result tells the gradient all that x would, and what comes next keeps it anyway, so x is free. Not so at a
    # clamp, which hides what was larger, nor where there is no more than a scale: it may be 0.
    ctx.has_result = clamp < 0 and (scale is None or (alpha != 1 and not _keeps_inputs))
    ctx.save_for_backward(output if ctx.has_result else x, scale, noise, strength, bias)


def _forward_backward(ctx: Any, dy: torch.Tensor) -> tuple:
    images, scale, noise, strength, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad
    with_sums = needs[1] or needs[3] or needs[4]
    parameters = scale, noise, strength, bias
    if ctx.has_result and scale is None:  # images are asked for their slope alone, and y has the sign of what had it
        nothing = None if strength is None else torch.zeros_like(strength)
        grads = _grad()(dy, images.detach(), None, noise, nothing, None, *ctx.settings, with_sums)
    elif ctx.has_result and not torch.is_grad_enabled():
        grads = _result_grad()(dy, images, *parameters, *ctx.settings, with_sums)
    else:
        x = _inputs(images, *parameters, *ctx.settings[:2]) if ctx.has_result else images
        grads = _grad()(dy, x, *parameters, *ctx.settings, with_sums)
    dx, dscale, dstrength, dbias = grads
    return (
        dx if needs[0] else None,
        dscale if needs[1] else None,
        None,
        dstrength.reshape(strength.shape) if needs[3] else None,
        dbias if needs[4] else None,
        *[None] * 3,
    )


def _inputs(
    y: torch.Tensor, scale: Any, noise: Any, strength: Any, bias: Any, alpha: float, gain: float
) -> torch.Tensor:
    """The x that the operator without a clamp made y of; differentiable."""
    u = y.to(torch.float64 if y.dtype == torch.float64 else torch.float32)
    u = u * torch.where(u > 0, u.new_tensor(1 / gain), 1 / (gain * alpha))
    u = u if noise is None else u - noise * strength
    u = u if bias is None else u - bias[:, None, None]
    return (u if scale is None else u / scale[:, :, None, None]).to(y.dtype)


def _result_grad() -> Any:
    """`_grad` from the result y instead of x, for an operator without a clamp; it has no gradient itself."""
    schema = f"(Tensor dy, Tensor y, {_PARAMETERS}, bool with_sums) -> (Tensor, Tensor, Tensor, Tensor)"
    return custom_ops.declare("epilogue_result_grad", schema, _grad_shape)


def _grad() -> Any:
    """The compiled gradient: dx, and the sums dscale, dstrength and dbias, which are zeros unless asked for."""
    schema = f"(Tensor dy, Tensor x, {_PARAMETERS}, bool with_sums) -> (Tensor, Tensor, Tensor, Tensor)"
    return custom_ops.declare("epilogue_grad", schema, _grad_shape, _grad_setup, _grad_backward)


def _grad_shape(dy: torch.Tensor, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    num, channels = x.shape[:2]
    sums = (x.new_empty([num, channels], dtype=kind), x.new_empty([], dtype=kind), x.new_empty([channels], dtype=kind))
    return (torch.empty_like(x, memory_format=torch.channels_last), *sums)


def _grad_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    dy, x, scale, *others = inputs[:6]
    ctx.save_for_backward(None if scale is None else dy, x, scale, *others)  # linear in dy: only for the scale's sake
    ctx.settings = inputs[6:9]


def _grad_backward(ctx: Any, ddx: Any, ddscale: Any, ddstrength: Any, ddbias: Any) -> tuple:
    """The second derivative. The activation is piecewise linear, so the gradient is linear in dy, x and scale each."""
    dy, x, scale, noise, strength, bias = ctx.saved_tensors
    if all(t is None for t in (ddx, ddscale, ddstrength, ddbias)):
        return (None,) * 10
    if scale is None:
        dy, ddscale = x, None  # any images: what they are for is not asked for
    cotangents, saved = (ddx, ddscale, ddstrength, ddbias), (dy, x, scale, noise, strength, bias)
    if torch.is_grad_enabled():  # a third derivative is wanted: torch knows those of its own operators
        ddy, by_x, dscale = _second_by_torch(*cotangents, *saved, *ctx.settings)
    else:
        ddx = torch.zeros_like(x) if ddx is None else ddx
        ddy, by_x, dscale = _grad_grad()(ddx, *cotangents[1:], *saved, *ctx.settings)
    needs = ctx.needs_input_grad
    return (
        ddy if needs[0] else None,
        by_x if needs[1] and ddscale is not None else None,
        dscale if needs[2] else None,
        *[None] * 7,
    )


def _grad_grad() -> Any:
    """The compiled second derivative: with respect to dy, x and scale."""
    schema = (
        "(Tensor ddx, Tensor? ddscale, Tensor? ddstrength, Tensor? ddbias, Tensor dy, Tensor x, "
        f"{_PARAMETERS}) -> (Tensor, Tensor, Tensor)"
    )
    return custom_ops.declare("epilogue_grad_grad", schema, _second_shape)


def _second_shape(ddx: torch.Tensor, _p: Any, _q: Any, _r: Any, _dy: Any, x: torch.Tensor, *_: Any) -> tuple:
    images = [torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2)]
    return (*images, x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32))


def _second_by_torch(
    ddx: Any, ddscale: Any, ddstrength: Any, ddbias: Any, dy: torch.Tensor, x: torch.Tensor, scale: Any, noise: Any,
    strength: Any, bias: Any, alpha: float, gain: float, clamp: float,
) -> tuple:  # fmt: skip
    """What the compiled second derivative computes, in torch's operators."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(kind)
    factor = torch.ones_like(wide[:, :, :1, :1]) if scale is None else scale[:, :, None, None]
    with torch.no_grad():  # piecewise constant
        u = wide * factor
        u = u if noise is None else u + noise * strength
        u = u if bias is None else u + bias[:, None, None]
        slope = torch.where(u > 0, u.new_tensor(gain), gain * alpha)
        slope = slope * ((slope * u).abs() <= clamp) if clamp >= 0 else slope
    du = slope * dy.to(kind)
    inner = torch.zeros_like(wide) if ddx is None else ddx.to(kind) * factor
    inner = inner if ddscale is None else inner + ddscale[:, :, None, None] * wide
    inner = inner if ddstrength is None or noise is None else inner + ddstrength * noise
    inner = inner if ddbias is None else inner + ddbias[:, None, None]
    by_x = None if ddscale is None else (du * ddscale[:, :, None, None]).to(x.dtype)
    dscale = None if ddx is None else (ddx.to(kind) * du).sum(dim=(2, 3))
    return (slope * inner).to(dy.dtype), by_x, dscale
