"""Fully connected layers of few samples, and the demodulation that follows from their styles.

Torch's products are made for large matrices: with eight samples its call and its copies cost several times the
arithmetic, and a training step makes two hundred of them. The compiled operators (dense_cpu.cpp, derivatives_cpu.cpp)
have gain, bias and activation in the same call. Not operators that network sources call: `training.execution` does.
"""

from typing import Any

import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act

NATIVE_ACTS = ("linear", "lrelu")
NATIVE_DTYPES = (torch.float32, torch.float64)
NATIVE_MAX_SAMPLES = 16  # with more of them torch's products are as fast


def dense(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight_gain: float = 1,
    bias_gain: float = 1,
    act: str = "linear",
) -> torch.Tensor:
    """Compute act(weight_gain * x @ weight.t() + bias_gain * bias), times the activation's own gain.

    Args:
        x: Samples [N, I].
        weight: [O, I], of x's type.
        bias: [O], or None.
        weight_gain: Factor on the weight.
        bias_gain: Factor on the bias.
        act: A key of `bias_act.activation_funcs`.

    Returns:
        [N, O].
    """
    if act in NATIVE_ACTS and _suits_native(x, weight):
        spec = bias_act.activation_funcs[act]
        alpha = float(spec.def_alpha) if act == "lrelu" else 1.0
        return _operator("dense")(x, weight, bias, weight_gain, bias_gain, alpha, float(spec.def_gain))
    if bias is not None and bias_gain != 1:
        bias = bias * bias_gain
    if x.numel() <= weight.numel():  # the gain goes to the smaller factor of the product
        x = x * weight_gain
    else:
        weight = weight * weight_gain
    if bias is not None and act == "linear":
        return torch.addmm(bias, x, weight.t())
    return bias_act.bias_act(x @ weight.t(), bias, act=act)


def demodulation(styles: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What brings the outputs of a modulated convolution back to unit variance (Eq. 3, Karras et al. 2020).

    sum_{i,k} (W s)^2 = sum_i s_i^2 (sum_k W^2): a small matrix product instead of the tensor [N, O, I, k, k].

    Args:
        styles: [N, I].
        weight: [O, I, k, k], of their type.

    Returns:
        Factors [N, O].
    """
    if _suits_native(styles, weight):
        return _operator("demodulation")(styles, weight)[0]
    return demodulated(styles, weight.square().sum(dim=(2, 3)).t())


def demodulated(styles: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """`demodulation` from the sum over k alone; `energy` is [..., I, O]."""
    return (styles.square() @ energy + 1e-8).rsqrt()


def _suits_native(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in NATIVE_DTYPES
        and 0 < x.shape[0] <= NATIVE_MAX_SAMPLES
        and custom_ops.fast_paths()
        and custom_ops.selected() == "native"
    )


def _operator(name: str) -> Any:
    """One of the compiled operators; the first call declares them all, as gradients call others."""
    op = custom_ops.declared(name)
    if op is None:
        gains = "float weight_gain, float bias_gain, float alpha, float gain"
        parts = "Tensor styles, Tensor weight"
        for key, schema, shape in (
            ("dense", f"(Tensor x, Tensor weight, Tensor? bias, {gains}) -> Tensor", _dense_shape),
            (
                "dense_grad",
                f"(Tensor dy, Tensor x, Tensor y, Tensor weight, {gains}, bool of_x, bool of_weight, bool of_bias) "
                "-> (Tensor, Tensor, Tensor)",
                _dense_grad_shape,
            ),
            ("demodulation", f"({parts}) -> (Tensor scales, Tensor energy)", _demodulation_shape),
            (
                "demodulation_grad",
                f"(Tensor dscales, {parts}, Tensor scales, Tensor energy, bool of_styles, bool of_weight) "
                "-> (Tensor, Tensor)",
                _demodulation_grad_shape,
            ),
        ):
            custom_ops.declare(key, schema, shape)
        op = custom_ops.declared(name)
    return op


def _dense_shape(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _dense_grad_shape(dy: torch.Tensor, x: torch.Tensor, _y: Any, weight: torch.Tensor, *others: Any) -> tuple:
    """What is not asked for has no rows."""
    of_x, of_weight, of_bias = others[-3:]
    (num, size), outs = x.shape, weight.shape[0]
    new = x.new_empty
    return new(num if of_x else 0, size), new(outs if of_weight else 0, size), new(outs if of_bias else 0)


def _demodulation_shape(styles: torch.Tensor, weight: torch.Tensor) -> tuple:
    return styles.new_empty(styles.shape[0], weight.shape[0]), styles.new_empty(weight.shape[:2])


def _demodulation_grad_shape(
    _grad: Any, styles: torch.Tensor, weight: torch.Tensor, _scales: Any, _energy: Any, of_styles: bool, of_weight: bool
) -> tuple:
    num, size = styles.shape
    outs = weight.shape[0] if of_weight else 0
    return styles.new_empty(num if of_styles else 0, size), styles.new_empty(outs, *weight.shape[1:])
