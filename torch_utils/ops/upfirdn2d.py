"""Upsample, filter, downsample: zero insertion, padding, FIR filter and decimation of images.

`_reference` is the specification. `_Resample` gives the same numbers several times faster and is its own derivative;
so is the compiled operator (native_cpu.cpp, cuda_ops.cpp), which is used where it is to be had and faster.
Spec: networks-and-pickles.md 1.1 to 1.3.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils import custom_ops

NATIVE_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}
NATIVE_MAX_TAPS = 32  # along an axis; longer filters are left to torch
NATIVE_MAX_BF16_ROW = 8192  # channels times width of bfloat16 images that are only filtered; above, torch is faster
NATIVE_MAX_PLANES = 16  # channels of images that are not channels-last; with more, torch is faster


def setup_filter(
    f: Any,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> torch.Tensor:
    """Prepare a FIR filter for the functions of this module; the caller's data stays as it is.

    Args:
        f: Taps as a tensor, array or list: 2-D [fh, fw], 1-D [taps], a number, or None for the identity.
        device: Where the result lives.
        normalize: Divide by the sum of the taps.
        flip_filter: Reverse the filter along all its axes.
        gain: Factor on the image that the filter is to have.
        separable: Keep a 1-D filter 1-D, to be applied along both axes; None = if it has at least 8 taps.

    Returns:
        float32 [fh, fw], or [taps] if separable.

    Raises:
        ValueError: Empty, of more than two axes, or 2-D where a separable one is asked for.
    """
    taps = torch.as_tensor(1.0 if f is None else f, dtype=torch.float32).detach()
    if taps.ndim > 2 or taps.numel() == 0:
        raise ValueError(f"filter has shape {tuple(taps.shape)}, wanted a number, [taps] or [fh, fw], not empty")
    if taps.ndim == 0:
        taps = taps[None]
    if separable is None:
        separable = taps.ndim == 1 and taps.numel() >= 8
    if separable and taps.ndim != 1:
        raise ValueError(f"filter has shape {tuple(taps.shape)}, but a separable filter is one row of taps")
    if taps.ndim == 1 and not separable:
        taps = torch.outer(taps, taps)
    if normalize:
        taps = taps / taps.sum()
    if flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    return (taps * gain ** (taps.ndim / 2)).to(device)


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> torch.Tensor:
    """Insert zeros, pad or crop, filter and decimate every channel of a batch of images.

    Args:
        x: Images [N, C, H, W].
        f: float32 filter [fh, fw], or [taps] to be applied along both axes, or None for the identity. No gradient.
        up: Zero-insertion factor, int or [x, y].
        down: Decimation factor, int or [x, y].
        padding: Zeros around the upsampled image, int, [x, y] or [x0, x1, y0, y1]; negative values crop.
        flip_filter: False = convolution, True = correlation.
        gain: Factor on the result.
        impl: `ref` = the plain definition; `cuda` = whatever is fastest.

    Returns:
        [N, C, H', W'] with W' = floor((W * up + x0 + x1 - fw) / down) + 1.

    Raises:
        ValueError: Arguments of the wrong form, or a padded image smaller than the filter.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted [N, C, H, W]")
    upx, upy = _pair(up, "up")
    downx, downy = _pair(down, "down")
    padx0, padx1, pady0, pady1 = _padding(padding)
    fw, fh = _filter_size(f)
    if x.shape[3] * upx + padx0 + padx1 < fw or x.shape[2] * upy + pady0 + pady1 < fh:
        raise ValueError(
            f"image {tuple(x.shape[2:])} with up {upx, upy} and padding {padx0, padx1, pady0, pady1} is smaller than "
            f"the filter {fh, fw}; give more padding"
        )
    if f is not None and f.requires_grad:
        raise ValueError("the filter requires a gradient, but none is defined; pass f.detach()")
    if f is None or not custom_ops.fast_paths(impl) or not x.shape[0]:  # no images make no groups for _resample
        return _reference(x, f, (upx, upy), (downx, downy), (padx0, padx1, pady0, pady1), flip_filter, gain)
    if _suits_native(x, f, upx * upy, downx * downy) and custom_ops.selected(x.device.type) == "native":
        return _native()(x, f, upx, upy, downx, downy, padx0, padx1, pady0, pady1, flip_filter, gain)
    return _Resample.apply(x, f, (upx, upy), (downx, downy), (padx0, padx1, pady0, pady1), flip_filter, gain)


def bound(
    like: torch.Tensor, f: torch.Tensor, padding: Sequence[int], gain: float = 1
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`upfirdn2d` without resampling for many calls: what depends on the kind of images alone is decided here, once.

    Args:
        like: Images of the kind that will come.
        f: As in `upfirdn2d`; `padding` and `gain` too.
    """
    if custom_ops.fast_paths() and _suits_native(like, f, 1, 1) and custom_ops.selected(like.device.type) == "native":
        run, pads = _native(), _padding(padding)
        return lambda x: run(x, f, 1, 1, 1, 1, *pads, False, gain)
    return functools.partial(upfirdn2d, f=f, padding=padding, gain=gain)


def bound_epilogue(
    like: torch.Tensor, f: torch.Tensor, padding: Sequence[int], gain: float, settings: tuple[float, float, float]
) -> Callable[..., torch.Tensor] | None:
    """`bound`, and what `epilogue` does after it, while a row is in the cache; None where that takes two calls.

    Args:
        like: As in `bound`; f, padding and gain too.
        settings: Of the activation, from `epilogue.native_settings`.

    Returns:
        Function of (x, scale, noise, strength, bias), noise and strength may be None. No gradient.
    """
    suits = _suits_native(like, f, 1, 1) and like.dtype != torch.float64 and not like.is_contiguous()
    if not (custom_ops.fast_paths() and suits and like.device.type == "cpu" and custom_ops.selected() == "native"):
        return None
    schema = (
        "(Tensor x, Tensor f, int pad_x0, int pad_x1, int pad_y0, int pad_y1, float gain, Tensor scale, Tensor? noise, "
        "Tensor? strength, Tensor bias, float alpha, float act_gain, float clamp) -> Tensor"
    )
    run, pads = custom_ops.declare("filter_epilogue", schema, _filter_epilogue_shape), _padding(padding)
    return lambda x, scale, noise, strength, bias: run(
        x, f, *pads, gain, scale.contiguous(), noise, strength, bias, *settings
    )


def _filter_epilogue_shape(
    x: torch.Tensor, f: torch.Tensor, px0: int, px1: int, py0: int, py1: int, *_: Any
) -> torch.Tensor:
    """Shape, type and layout of the compiled operator's result."""
    fw, fh = _filter_size(f)
    size = (*x.shape[:2], x.shape[2] + py0 + py1 - fh + 1, x.shape[3] + px0 + px1 - fw + 1)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def filter2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> torch.Tensor:
    """Filter images and keep their size; user padding comes on top. Arguments as in `upfirdn2d`."""
    fw, fh = _filter_size(f)
    px0, px1, py0, py1 = _padding(padding)
    pads = [px0 + fw // 2, px1 + (fw - 1) // 2, py0 + fh // 2, py1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> torch.Tensor:
    """Enlarge images by an integer factor, keeping their brightness. Arguments as in `upfirdn2d`."""
    upx, upy = _pair(up, "up")
    px0, px1, py0, py1 = _padding(padding)
    ux0, ux1, uy0, uy1 = upsample_padding(f, up)
    pads = [px0 + ux0, px1 + ux1, py0 + uy0, py1 + uy1]
    return upfirdn2d(x, f, up=up, padding=pads, flip_filter=flip_filter, gain=gain * upx * upy, impl=impl)


def downsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> torch.Tensor:
    """Shrink images by an integer factor. Arguments as in `upfirdn2d`."""
    px0, px1, py0, py1 = _padding(padding)
    dx0, dx1, dy0, dy1 = downsample_padding(f, down)
    pads = [px0 + dx0, px1 + dx1, py0 + dy0, py1 + dy1]
    return upfirdn2d(x, f, down=down, padding=pads, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample_padding(f: torch.Tensor | None, up: int | Sequence[int]) -> tuple[int, int, int, int]:
    """The padding (x0, x1, y0, y1) with which upsampling by `up` keeps the image in place."""
    fw, fh = _filter_size(f)
    upx, upy = _pair(up, "up")
    return (fw + upx - 1) // 2, (fw - upx) // 2, (fh + upy - 1) // 2, (fh - upy) // 2


def downsample_padding(f: torch.Tensor | None, down: int | Sequence[int]) -> tuple[int, int, int, int]:
    """The padding (x0, x1, y0, y1) with which downsampling by `down` keeps the image in place."""
    fw, fh = _filter_size(f)
    downx, downy = _pair(down, "down")
    return (fw - downx + 1) // 2, (fw - downx) // 2, (fh - downy + 1) // 2, (fh - downy) // 2


def parse_padding(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Write padding given as int, [x, y] or [x0, x1, y0, y1] in the last form."""
    return _padding(padding)


def _reference(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    """The definition, step by step. `up`, `down` are (x, y)."""
    n, c, h, w = x.shape
    # Zeros between the samples, and after the last one.
    if up != (1, 1):
        x = x.reshape(n, c, h, 1, w, 1)
        x = F.pad(x, [0, up[0] - 1, 0, 0, 0, up[1] - 1])
        x = x.reshape(n, c, h * up[1], w * up[0])
    # Zeros around; negative values crop.
    x = _pad(x, *padding)
    # Every channel by itself. torch's conv2d is a correlation, so a convolution needs the filter rotated.
    if f is None:
        x = x * gain
    else:
        for kernel in _kernels(f, not flip_filter, gain, x.dtype):
            x = F.conv2d(x, kernel.expand(c, 1, *kernel.shape), groups=c)
    return x[:, :, :: down[1], :: down[0]]


class _Resample(torch.autograd.Function):
    """`_reference` without inserted zeros, differentiable to any order: the adjoint of a resampling is a resampling."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        f: torch.Tensor,
        up: tuple[int, int],
        down: tuple[int, int],
        padding: tuple[int, int, int, int],
        flip_filter: bool,
        gain: float,
    ) -> torch.Tensor:
        y = _resample(x, f, up, down, padding, flip_filter, gain)
        ctx.save_for_backward(f)
        ctx.adjoint = (down, up, _adjoint_padding(x, f, y, up, down, padding), not flip_filter, gain)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:  # type: ignore[override]
        dx = _Resample.apply(dy, *ctx.saved_tensors, *ctx.adjoint) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None, None


def _adjoint_padding(
    x: torch.Tensor,
    f: torch.Tensor,
    y: torch.Tensor,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, ...],
) -> tuple[int, int, int, int]:
    """The padding with which resampling y with `up` and `down` exchanged and the filter flipped is the adjoint."""
    fw, fh = _filter_size(f)
    (h, w), (h_out, w_out) = x.shape[2:], y.shape[2:]
    return (
        fw - padding[0] - 1,
        w * up[0] - w_out * down[0] + padding[0] - up[0] + 1,
        fh - padding[2] - 1,
        h * up[1] - h_out * down[1] + padding[2] - up[1] + 1,
    )


def _suits_native(x: torch.Tensor, f: torch.Tensor, up: int, down: int) -> bool:
    """Whether the compiled operator takes this call and is faster (benchmarks/bench_ops.py)."""
    is_taken = (
        x.device == f.device
        and x.dtype in NATIVE_DTYPES.get(x.device.type, ())
        and f.dtype == torch.float32
        and max(f.shape) <= NATIVE_MAX_TAPS
    )
    if x.device.type != "cpu":
        return is_taken
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    is_slower = up > 1  # channels-last and many channels
    if x.dtype == torch.bfloat16:
        is_slower = up == down == 1 and x.shape[1] * x.shape[3] >= NATIVE_MAX_BF16_ROW
    return is_taken and (x.shape[1] < NATIVE_MAX_PLANES or is_last and not is_slower)


def _native() -> Any:
    """The compiled operator."""
    schema = (
        "(Tensor x, Tensor f, int up_x, int up_y, int down_x, int down_y, SymInt pad_x0, SymInt pad_x1, "
        "SymInt pad_y0, SymInt pad_y1, bool flip_filter, float gain) -> Tensor"
    )
    return custom_ops.declare("upfirdn2d", schema, _native_shape, _native_setup, _native_backward)


def _native_shape(
    x: torch.Tensor, f: torch.Tensor, ux: int, uy: int, dx: int, dy: int, px0: int, px1: int, py0: int, py1: int,
    flip_filter: bool, gain: float,
) -> torch.Tensor:  # fmt: skip
    """Shape, type and layout of the compiled operator's result."""
    (n, c, h, w), (fw, fh) = x.shape, _filter_size(f)
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    size = (n, c, (h * uy + py0 + py1 - fh) // dy + 1, (w * ux + px0 + px1 - fw) // dx + 1)
    return x.new_empty(size).contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def _native_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    """What the gradient needs: the filter, and the arguments of the adjoint call."""
    x, f, ux, uy, dx, dy, px0, px1, py0, py1, flip_filter, gain = inputs
    ctx.save_for_backward(f)
    padding = _adjoint_padding(x, f, output, (ux, uy), (dx, dy), (px0, px1, py0, py1))
    ctx.adjoint = (dx, dy, ux, uy, *padding, not flip_filter, gain)


def _native_backward(ctx: Any, dy: torch.Tensor) -> tuple:
    """The adjoint, by the same operator."""
    return (_native()(dy, *ctx.saved_tensors, *ctx.adjoint) if ctx.needs_input_grad[0] else None, *[None] * 11)


def _resample(
    x: torch.Tensor,
    f: torch.Tensor,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    """`_reference` by strided and transposed depthwise convolutions.

    The layout of x is kept. Measured on a CPU: channels-last images are best taken as they are, all others with the
    batch folded into the channels; products with resampling matrices are slower.
    """
    n, c, h, w = x.shape
    is_folded = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    x = x.reshape(1, n * c, h, w) if is_folded else x
    groups = x.shape[1]
    is_separable = f.ndim == 1
    for axis, kernel in enumerate(_kernels(f, not flip_filter, gain, x.dtype)):
        # A separable filter first works along x, then along y; a 2-D one does both at once.
        along = [not is_separable or axis == 0, not is_separable or axis == 1]  # x, y
        ux, uy = [u if a else 1 for u, a in zip(up, along)]
        dx, dy = [d if a else 1 for d, a in zip(down, along)]
        pads = [p if a else 0 for p, a in zip(padding, (along[0], along[0], along[1], along[1]))]
        kh, kw = kernel.shape
        if ux == uy == 1:
            same = max(min(pads[0], pads[1]), 0), max(min(pads[2], pads[3]), 0)  # what it can pad by itself
            x = _pad(x, pads[0] - same[0], pads[1] - same[0], pads[2] - same[1], pads[3] - same[1])
            weight = kernel.expand(groups, 1, kh, kw)
            x = F.conv2d(x, weight, stride=(dy, dx), padding=(same[1], same[0]), groups=groups)
        else:
            # The transposed convolution is the full one of the zero-inserted image up to its last sample: with kernel
            # width k there are k - 1 - pad0 columns too many before, and k - up - pad1 after.
            crop = [kw - 1 - pads[0], kw - ux - pads[1], kh - 1 - pads[2], kh - uy - pads[3]]
            same = max(min(crop[0], crop[1]), 0), max(min(crop[2], crop[3]), 0)  # what it can crop by itself
            weight = kernel.flip([0, 1]).expand(groups, 1, kh, kw)
            x = F.conv_transpose2d(x, weight, stride=(uy, ux), padding=(same[1], same[0]), groups=groups)
            x = _pad(x, same[0] - crop[0], same[0] - crop[1], same[1] - crop[2], same[1] - crop[3])
            x = x[:, :, ::dy, ::dx]
    if is_folded:
        return x.reshape(n, c, *x.shape[2:])
    return x.contiguous(memory_format=torch.channels_last)


def _kernels(f: torch.Tensor, flip: bool, gain: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """The 2-D kernels to correlate with, one after the other; together they have the gain."""
    taps = f.flip(list(range(f.ndim))) if flip else f
    if taps.ndim == 2:
        return [(taps * gain).to(dtype)]
    root = abs(gain) ** 0.5
    return [(taps[None, :] * math.copysign(root, gain)).to(dtype), (taps[:, None] * root).to(dtype)]


def _pad(x: torch.Tensor, x0: int, x1: int, y0: int, y1: int) -> torch.Tensor:
    """Zero-pad, then crop where negative; no copy where there is nothing to pad."""
    grow = [max(x0, 0), max(x1, 0), max(y0, 0), max(y1, 0)]
    x = F.pad(x, grow) if any(grow) else x
    height, width = x.shape[2:]
    return x[:, :, max(-y0, 0) : height - max(-y1, 0), max(-x0, 0) : width - max(-x1, 0)]


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """A factor as (x, y), both >= 1."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= 1 for v in pair):
        raise ValueError(f"{name} is {value!r}, wanted an int >= 1 or a pair [x, y] of them")
    return pair  # type: ignore[return-value]


def _padding(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Padding as (x0, x1, y0, y1)."""
    pads = tuple(padding) if isinstance(padding, Sequence) else (padding, padding)
    if len(pads) == 2:
        pads = (pads[0], pads[0], pads[1], pads[1])
    if len(pads) != 4 or not all(isinstance(p, int) for p in pads):
        raise ValueError(f"padding is {padding!r}, wanted an int, [x, y] or [x0, x1, y0, y1], all int")
    return pads  # type: ignore[return-value]


def _filter_size(f: torch.Tensor | None) -> tuple[int, int]:
    """(width, height) of a filter."""
    if f is None:
        return 1, 1
    if not isinstance(f, torch.Tensor) or f.ndim not in (1, 2) or f.numel() == 0:
        raise ValueError(f"filter is {type(f).__name__} {getattr(f, 'shape', '')}, wanted a tensor from setup_filter")
    return f.shape[-1], f.shape[0]
