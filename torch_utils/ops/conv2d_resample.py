"""2-D convolution with up- or downsampling through a FIR filter.

`conv2d_resample_ref` is the definition; `conv2d_resample` chooses an equal, cheaper order of operations.
Spec: networks-and-pickles.md 1.5.
"""

from collections.abc import Sequence

import torch

from torch_utils import custom_ops
from torch_utils.ops import conv2d_gradfix, upfirdn2d


def conv2d_resample(
    x: torch.Tensor,
    w: torch.Tensor,
    f: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> torch.Tensor:
    """Upsample, convolve and downsample images.

    Args:
        x: Images [N, C, H, W].
        w: Weights [O, C/groups, kh, kw], of x's dtype.
        f: float32 filter from `upfirdn2d.setup_filter`, or None for the identity.
        up: Upsampling factor.
        down: Downsampling factor.
        padding: Of the upsampled image: int, [x, y] or [x0, x1, y0, y1]; negative values crop.
        groups: Number of groups of channels, as in torch's conv2d.
        flip_weight: True = correlation (torch's conv2d), False = convolution.
        flip_filter: The same for f.

    Returns:
        [N, O, H', W'].

    Raises:
        ValueError: Arguments that don't fit together.
    """
    px0, px1, py0, py1 = _checked(x, w, up, down, padding, groups)
    if not custom_ops.fast_paths():
        return conv2d_resample_ref(x, w, f, up, down, padding, groups, flip_weight, flip_filter)
    # On a CPU convolutions are up to three times faster on channels-last images; what comes out is channels-last, too,
    # so in a network only the first layer pays for the conversion. Grouped ones (fused modulation) gain nothing.
    if x.device.type == "cpu" and groups == 1:
        x = x.contiguous(memory_format=torch.channels_last)
    kh, kw = w.shape[2:]
    if up > 1:
        ux0, ux1, uy0, uy1 = upfirdn2d.upsample_padding(f, up)
        px0, px1, py0, py1 = px0 + ux0, px1 + ux1, py0 + uy0, py1 + uy1
    if down > 1:
        dx0, dx1, dy0, dy1 = upfirdn2d.downsample_padding(f, down)
        px0, px1, py0, py1 = px0 + dx0, px1 + dx1, py0 + dy0, py1 + dy1
    pads = [px0, px1, py0, py1]

    # A 1x1 convolution commutes with filters, so it runs where the image is smallest.
    if kh == kw == 1 and down > 1 and up == 1:
        x = upfirdn2d.upfirdn2d(x, f, down=down, padding=pads, flip_filter=flip_filter)
        return _conv(x, w, groups=groups, flip_weight=flip_weight)
    if kh == kw == 1 and up > 1 and down == 1:
        x = _conv(x, w, groups=groups, flip_weight=flip_weight)
        return upfirdn2d.upfirdn2d(x, f, up=up, padding=pads, gain=up**2, flip_filter=flip_filter)

    # Convolution and decimation in one: only the samples that are kept are computed.
    if down > 1 and up == 1:
        x = upfirdn2d.upfirdn2d(x, f, padding=pads, flip_filter=flip_filter)
        return _conv(x, w, stride=down, groups=groups, flip_weight=flip_weight)

    # Zero insertion and convolution in one: a transposed convolution skips the zeros. Convolution and filter commute.
    if up > 1:
        px0, px1, py0, py1 = px0 - (kw - 1), px1 - (kw - up), py0 - (kh - 1), py1 - (kh - up)
        tx, ty = max(min(-px0, -px1), 0), max(min(-py0, -py1), 0)
        x = _conv_transpose(x, w, stride=up, padding=(ty, tx), groups=groups, flip_weight=flip_weight)
        pads = [px0 + tx, px1 + tx, py0 + ty, py1 + ty]
        x = upfirdn2d.upfirdn2d(x, f, padding=pads, gain=up**2, flip_filter=flip_filter)
        return x if down == 1 else upfirdn2d.upfirdn2d(x, f, down=down, flip_filter=flip_filter)

    # No resampling: torch pads by itself where the padding is symmetric.
    if px0 == px1 >= 0 and py0 == py1 >= 0:
        return _conv(x, w, padding=(py0, px0), groups=groups, flip_weight=flip_weight)
    x = upfirdn2d.upfirdn2d(x, None, padding=pads)
    return _conv(x, w, groups=groups, flip_weight=flip_weight)


def conv2d_resample_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    f: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> torch.Tensor:
    """The definition of `conv2d_resample`: upsample and filter, convolve, filter and decimate. Same arguments."""
    pads = list(_checked(x, w, up, down, padding, groups))
    if up > 1:
        pads = [p + q for p, q in zip(pads, upfirdn2d.upsample_padding(f, up))]
    if down > 1:
        pads = [p + q for p, q in zip(pads, upfirdn2d.downsample_padding(f, down))]
    first = f if up > 1 else None
    x = upfirdn2d.upfirdn2d(x, first, up=up, padding=pads, gain=up**2, flip_filter=flip_filter, impl="ref")
    x = _conv(x, w, groups=groups, flip_weight=flip_weight)
    if down > 1:
        x = upfirdn2d.upfirdn2d(x, f, down=down, flip_filter=flip_filter, impl="ref")
    return x


def _conv(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    groups: int,
    flip_weight: bool,
) -> torch.Tensor:
    """Correlation if `flip_weight`, else convolution. `padding` is (y, x)."""
    if not flip_weight and w.shape[2:].numel() > 1:
        w = w.flip([2, 3])
    return conv2d_gradfix.conv2d(x, w, stride=stride, padding=padding, groups=groups)


def _conv_transpose(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    stride: int,
    padding: tuple[int, int],
    groups: int,
    flip_weight: bool,
) -> torch.Tensor:
    """The convolution of the zero-inserted image. `padding` (y, x) is cut off on every side."""
    if flip_weight and w.shape[2:].numel() > 1:  # torch's transposed convolution is a convolution, not a correlation
        w = w.flip([2, 3])
    o, i, kh, kw = w.shape
    w = w.reshape(groups, o // groups, i, kh, kw).transpose(1, 2).reshape(groups * i, o // groups, kh, kw)
    return conv2d_gradfix.conv_transpose2d(x, w, stride=stride, padding=padding, groups=groups)


def _checked(
    x: torch.Tensor, w: torch.Tensor, up: int, down: int, padding: int | Sequence[int], groups: int
) -> tuple[int, int, int, int]:
    """Raise ValueError for arguments that don't fit together; return the padding as (x0, x1, y0, y1)."""
    if x.ndim != 4 or w.ndim != 4:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w.shape)}: wanted [N, C, H, W] and [O, C/groups, kh, kw]")
    if w.dtype != x.dtype:
        raise ValueError(f"w is {w.dtype} but x is {x.dtype}; convert w first")
    for name, factor in (("up", up), ("down", down), ("groups", groups)):
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"{name} is {factor!r}, wanted an int >= 1")
    if x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise ValueError(f"weights {tuple(w.shape)} in {groups} groups don't fit images of {x.shape[1]} channels")
    return upfirdn2d.parse_padding(padding)
