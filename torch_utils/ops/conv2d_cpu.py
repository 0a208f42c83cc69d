"""3x3 convolutions by the compiled operators of conv2d_cpu.cpp where they beat torch's own on a CPU.

Three operators, closed under differentiation (derivatives_cpu.cpp): the convolution, and its gradients to the images
(which is also the transposed convolution) and to the weights. Each is done by our code or by torch's, whichever `pays`
says. Ours are Winograd's at stride 1, in float32 whatever the images are; at stride 2 Winograd's for float32, and
gradients to weights by products for bfloat16 or few tiles.
"""

from collections.abc import Callable
from typing import Any

import torch

from torch_utils import custom_ops

KINDS = ("conv2d", "conv2d_input", "conv2d_weight")


def conv2d(x: torch.Tensor, w: torch.Tensor, stride: int, padding: tuple[int, int]) -> torch.Tensor:
    """The correlation of x [N, I, H, W] with w [O, I, 3, 3]; `takes` has said yes. `padding` is (y, x)."""
    n, c, h, wide = x.shape
    out = (h + 2 * padding[0] - 3) // stride + 1, (wide + 2 * padding[1] - 3) // stride + 1
    return _operator("conv2d")(x, w, stride, *padding, own(n, c, w.shape[0], *out, stride, x.dtype))


def conv2d_input(
    dy: torch.Tensor, w: torch.Tensor, size: tuple[int, int], stride: int, padding: tuple[int, int]
) -> torch.Tensor:
    """The adjoint of `conv2d` in its images: from dy [N, O, H', W'] to [N, I, *size]."""
    n, o, h, wide = dy.shape
    ours = own(n, w.shape[1], o, h, wide, stride, dy.dtype)
    return _operator("conv2d_input")(dy, w, *size, stride, *padding, ours)


def conv2d_weight(x: torch.Tensor, dy: torch.Tensor, stride: int, padding: tuple[int, int]) -> torch.Tensor:
    """The adjoint of `conv2d` in its weights: from images x and dy [N, O, H', W'] to [O, I, 3, 3]."""
    n, o, h, wide = dy.shape
    return _operator("conv2d_weight")(x, dy, stride, *padding, own(n, x.shape[1], o, h, wide, stride, dy.dtype))


def prepare(w: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """Weights in the form in which Winograd's algorithm needs them; no gradient.

    Args:
        w: [O, I, 3, 3]; of a transposed convolution of stride 2 [I, O, 3, 3].
        transposed: Whether it is one. Its prepared weights are five times as large, those of others four times.
    """
    return _operator("conv2d_prepare")(w, transposed)


def conv2d_prepared(
    x: torch.Tensor, prepared: torch.Tensor, channels: int, *, transposed: bool = False
) -> torch.Tensor:
    """With the weights that were prepared, which give so many channels; no gradient.

    It is `conv2d` of stride 1 and padding 1, or the transposed convolution of stride 2 without padding.
    """
    return bound_prepared(prepared, channels, transposed=transposed)(x)


def bound_prepared(
    prepared: torch.Tensor, channels: int, *, transposed: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`conv2d_prepared` for many calls with the same weights."""
    run = _operator("conv2d_prepared")
    return lambda x: run(x, prepared, channels, transposed)


def bound_modulated(
    prepared: torch.Tensor, channels: int, *, transposed: bool = False
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`bound_prepared` of images times styles [N, I], in one pass over the images."""
    run = _operator("conv2d_prepared")
    return lambda x, styles: run(x, prepared, channels, transposed, styles.contiguous())


def bound_layer(
    prepared: torch.Tensor, channels: int, alpha: float, gain: float, clamp: float
) -> Callable[..., torch.Tensor]:
    """`bound_modulated` at stride 1, and what `epilogue` does, in the same pass.

    Returns:
        Function of (x, styles, scale, noise, strength, bias); noise and strength may be None.
    """
    run = _operator("conv2d_prepared")

    def layer(
        x: torch.Tensor, styles: torch.Tensor, scale: torch.Tensor, noise: Any, strength: Any, bias: torch.Tensor
    ) -> torch.Tensor:
        parameters = styles.contiguous(), scale.contiguous(), noise, strength, bias
        return run(x, prepared, channels, False, *parameters, alpha, gain, clamp)

    return layer


def prepared_pays(n: int, c: int, o: int, h: int, w: int, dtype: torch.dtype, *, transposed: bool = False) -> bool:
    """Whether `conv2d_prepared` is faster than torch's convolution with weights in its own best layout; see `pays`.

    h and w are of the images that go in.
    """
    tiles = n * -(-h // 4) * -(-w // 4)
    if transposed:  # many weights to be read: few tiles are not worth them
        return dtype == torch.float32 and min(c, o) >= 64 and tiles >= (16 if max(c, o) > 256 else 8)
    if dtype == torch.bfloat16:
        return min(c, o) >= 64 and tiles >= (32 if max(c, o) > 128 else 4)
    return dtype == torch.float32 and min(c, o) >= 64 and tiles >= 4


def takes(x: torch.Tensor, w: torch.Tensor, stride: int, padding: tuple[int, int], *, transposed: bool) -> bool:
    """Whether the operators here can do this convolution, and some part of it or of its gradients better than torch.

    Args:
        x: Images [N, C, H, W].
        w: Weights [O, C, 3, 3]; of a transposed convolution [C, O, 3, 3].
        stride: 1 or 2; anything else is torch's.
        padding: (y, x); for a transposed convolution what is cut off.
        transposed: Whether it is one.
    """
    if not (
        x.device.type == w.device.type == "cpu"
        and x.dtype == w.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.ndim == 4
        and w.shape[2:] == (3, 3)
        and x.shape[1] == w.shape[0 if transposed else 1]
        and ((stride == 1 and max(padding) <= 2) or (stride == 2 and padding == (0, 0)))
        and min(x.shape[2:]) >= (1 if transposed else 3 - 2 * min(padding))
        and custom_ops.fast_paths()
        and custom_ops.selected() == "native"
    ):
        return False
    o, c = w.shape[:2]
    n, _, h, wide = x.shape
    if not transposed:
        h, wide = (h + 2 * padding[0] - 3) // stride + 1, (wide + 2 * padding[1] - 3) // stride + 1
    forward, backward = ("conv2d_input", "conv2d") if transposed else ("conv2d", "conv2d_input")
    kinds = [forward]
    if torch.is_grad_enabled():
        kinds += [backward] * x.requires_grad + ["conv2d_weight"] * w.requires_grad
    return any(pays(kind, n, c, o, h, wide, stride, x.dtype) for kind in kinds)


def pays(kind: str, n: int, c: int, o: int, h: int, w: int, stride: int, dtype: torch.dtype) -> bool:
    """Whether our code is faster than torch's; `python benchmarks/bench_conv.py` prints the times that it rests on.

    Args:
        kind: The operator: conv2d, conv2d_input or conv2d_weight.
        n: Images.
        c: Channels of the convolution's input.
        o: Channels of its output.
        h: Height of its output.
        w: Width of its output.
        stride: 1 or 2.
        dtype: float32 or bfloat16.
    """
    tiles = n * -(-h // 4) * -(-w // 4)
    if stride == 2 and kind == "conv2d_weight":
        return min(c, o) >= 32 and n * h * w >= 16
    if stride == 2:
        return dtype == torch.float32 and min(c, o) >= 64 and tiles >= (64 if max(c, o) > 256 else 32)
    if dtype == torch.bfloat16:
        return min(c, o) >= 64 and tiles >= (128 if max(c, o) > 128 else 32)
    return min(c, o) >= 64 and tiles >= (32 if max(c, o) > 128 else 4)


def own(n: int, c: int, o: int, h: int, w: int, stride: int, dtype: torch.dtype) -> int:
    """Which of a convolution and its gradients our code does, a bit for each of `KINDS`; arguments as in `pays`."""
    return sum(1 << i for i, kind in enumerate(KINDS) if pays(kind, n, c, o, h, w, stride, dtype))


def _operator(name: str) -> Any:
    """One of the compiled operators; the first call declares them all, as each is in another's gradient."""
    op = custom_ops.declared(name)
    if op is None:
        for key, declaration in _DECLARATIONS.items():
            custom_ops.declare(key, *declaration)
        op = custom_ops.declared(name)
    return op


def _conv2d_shape(x: torch.Tensor, w: torch.Tensor, stride: int, pad_y: int, pad_x: int, own: int) -> torch.Tensor:
    """Shape and layout of the convolution's result."""
    h, wide = (x.shape[2] + 2 * pad_y - 3) // stride + 1, (x.shape[3] + 2 * pad_x - 3) // stride + 1
    return _empty(x, x.shape[0], w.shape[0], h, wide)


def _conv2d_input_shape(
    dy: torch.Tensor, w: torch.Tensor, h: int, wide: int, stride: int, pad_y: int, pad_x: int, own: int
) -> torch.Tensor:
    """Shape and layout of the gradient to images."""
    return _empty(dy, dy.shape[0], w.shape[1], h, wide)


def _conv2d_weight_shape(
    x: torch.Tensor, dy: torch.Tensor, stride: int, pad_y: int, pad_x: int, own: int
) -> torch.Tensor:
    """Shape and layout of the gradient to weights."""
    return x.new_empty(dy.shape[1], x.shape[1], 3, 3)


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _prepare_shape(w: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """How large prepared weights are depends on the processor; nothing but `conv2d_prepared` looks at them."""
    size = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(size, dtype=torch.float32)


def _prepared_shape(
    x: torch.Tensor, prepared: torch.Tensor, channels: int, transposed: bool = False, *_: Any
) -> torch.Tensor:
    return _empty(x, x.shape[0], channels, *[2 * side + 1 if transposed else side for side in x.shape[2:]])


_DECLARATIONS: dict[str, tuple] = {
    "conv2d": (
        "(Tensor x, Tensor w, int stride, int pad_y, int pad_x, int own) -> Tensor", _conv2d_shape,
    ),
    "conv2d_input": (
        "(Tensor dy, Tensor w, SymInt h, SymInt wide, int stride, int pad_y, int pad_x, int own) -> Tensor",
        _conv2d_input_shape,
    ),
    "conv2d_weight": (
        "(Tensor x, Tensor dy, int stride, int pad_y, int pad_x, int own) -> Tensor", _conv2d_weight_shape,
    ),
    "conv2d_prepare": ("(Tensor w, bool transposed=False) -> Tensor", _prepare_shape),
    "conv2d_prepared": (
        "(Tensor x, Tensor prepared, int channels, bool transposed=False, Tensor? styles=None, Tensor? scale=None, "
        "Tensor? noise=None, Tensor? strength=None, Tensor? bias=None, float alpha=1, float gain=1, float clamp=-1) "
        "-> Tensor",
        _prepared_shape,
    ),
}  # fmt: skip
