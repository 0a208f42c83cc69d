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
        return _forward()(x, *tensors, *native_settings(act, gain or 0, clamp), _keeps_inputs)
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
            settings, run = native_settings(act, gain, clamp), _forward()
            return lambda x, scale, noise, strength, bias: run(x, scale, noise, strength, bias, *settings)
    return functools.partial(epilogue, act=act, gain=gain, clamp=clamp)


def native_settings(act: str, gain: float, clamp: float | None) -> tuple[float, float, float]:
    """Slope below zero, gain and limit (-1: none) as compiled operators take them, for an act of NATIVE_ACTS."""
    alpha = float(bias_act.activation_funcs[act].def_alpha) if act == "lrelu" else 1.0
    return alpha, float(gain), -1.0 if clamp is None else float(clamp)


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
    """The compiled operator; its gradient calls the next one, and that one's the third (derivatives_cpu.cpp)."""
    op = custom_ops.declared("epilogue")
    if op is None:
        _grad(), _result_grad(), _grad_grad()
        schema = f"(Tensor x, {_PARAMETERS}, bool keeps_input=False) -> Tensor"
        op = custom_ops.declare("epilogue", schema, _forward_shape)
    return op


def _forward_shape(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _grad() -> Any:
    """The compiled gradient: dx, and the sums dscale, dstrength and dbias, which are zeros unless asked for."""
    schema = f"(Tensor dy, Tensor x, {_PARAMETERS}, bool with_sums) -> (Tensor, Tensor, Tensor, Tensor)"
    return custom_ops.declare("epilogue_grad", schema, _grad_shape)


def _result_grad() -> Any:
    """`_grad` from the result y instead of x, for an operator without a clamp; it has no gradient itself."""
    schema = f"(Tensor dy, Tensor y, {_PARAMETERS}, bool with_sums) -> (Tensor, Tensor, Tensor, Tensor)"
    return custom_ops.declare("epilogue_result_grad", schema, _grad_shape)


def _grad_shape(dy: torch.Tensor, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    num, channels = x.shape[:2]
    sums = (x.new_empty([num, channels], dtype=kind), x.new_empty([], dtype=kind), x.new_empty([channels], dtype=kind))
    return (torch.empty_like(x, memory_format=torch.channels_last), *sums)


def _grad_grad() -> Any:
    """The compiled second derivative: with respect to dy, x and scale."""
    schema = (
        "(Tensor ddx, Tensor? ddscale, Tensor? ddstrength, Tensor? ddbias, Tensor dy, Tensor x, "
        f"{_PARAMETERS}) -> (Tensor, Tensor, Tensor)"
    )
    return custom_ops.declare("epilogue_grad_grad", schema, _second_shape, _second_setup, _second_backward)


def _second_shape(ddx: torch.Tensor, _p: Any, _q: Any, _r: Any, _dy: Any, x: torch.Tensor, *_: Any) -> tuple:
    images = [torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2)]
    return (*images, x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32))


def _second_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10])
    ctx.settings = inputs[10:]


def _second_backward(ctx: Any, *grads: Any) -> tuple:
    """The third derivative: torch knows those of its own operators."""
    inputs = ctx.saved_tensors
    with torch.enable_grad():
        outputs = _second_by_torch(*inputs, *ctx.settings)
    pairs = [(out, grad) for out, grad in zip(outputs, grads) if grad is not None and out is not None]
    pairs = [(out, grad) for out, grad in pairs if out.requires_grad]
    learning = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]
    found: list[Any] = [None] * 13
    if pairs and learning:
        outs, given = zip(*pairs)
        wanted = [inputs[i] for i in learning]
        for i, gradient in zip(learning, torch.autograd.grad(
            outs, wanted, given, create_graph=torch.is_grad_enabled(), allow_unused=True
        )):  # fmt: skip
            found[i] = gradient
    return tuple(found)


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
