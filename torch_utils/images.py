"""Pictures: the only uint8 <-> float conversion, odd file formats, grids, PNG files. Knows nothing of data sets."""

import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dnnlib.util import naming

WHITE = (255, 255, 255)

# Pillow knows these formats but decodes them through another program, only sketches them, or cannot decode them at all.
_UNWANTED_FORMATS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, EOFError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}


class GridLabels(NamedTuple):
    """Captions of a grid: one text per row and per column; None leaves that side without captions."""

    rows: Sequence[str] | None = None
    cols: Sequence[str] | None = None


# --- the border between uint8 and float


def to_uint8(x: torch.Tensor, *, range: tuple[float, float] = (-1, 1), rounding: str = "round") -> torch.Tensor:
    """Convert values in `range` to uint8 [0, 255]; what lies outside is clipped, NaN becomes 0.

    Args:
        x: Tensor of any shape.
        range: Values that become 0 and 255.
        rounding: "round" (half to even; grids) or "truncate" (add a half and cut; for (-1, 1) this is
            clamp(127.5 x + 128, 0, 255) cut to an integer; single images and metrics).
    Raises:
        ValueError: Unknown rounding or an empty range.
    Source: spec training-and-metrics sections 2 "Grid", 6 "Fakes" and 8.13.
    """
    lo, hi = float(range[0]), float(range[1])
    if not hi > lo:
        raise ValueError(f"range is ({lo}, {hi}); the second value must be greater than the first")
    if not x.is_floating_point() or x.dtype in (torch.float16, torch.bfloat16):
        x = x.to(torch.float32)
    scale = 255 / (hi - lo)
    if rounding == "round":
        x = ((x - lo) * scale).round()
    elif rounding == "truncate":
        x = x * scale + (0.5 - lo * scale)
    else:
        raise ValueError(f'rounding is {rounding!r}; choose "round" or "truncate"')
    return x.nan_to_num(nan=0.0, posinf=255.0, neginf=0.0).clamp(0, 255).to(torch.uint8)


def from_uint8(x: torch.Tensor) -> torch.Tensor:
    """Convert uint8 [0, 255] to float32 [-1, 1]: x / 127.5 - 1."""
    if x.dtype != torch.uint8:
        raise ValueError(f"from_uint8 got {x.dtype}; it takes uint8 images")
    return x.to(torch.float32) / 127.5 - 1


# --- Pillow images


def to_pil(img: torch.Tensor | np.ndarray | Image.Image) -> Image.Image:
    """Turn one uint8 image, [C, H, W] with 1, 3 or 4 channels or [H, W], into a Pillow image of mode L, RGB or RGBA.

    Raises:
        ValueError: Wrong shape or type; floats must pass through `to_uint8` first.
    """
    if isinstance(img, Image.Image):
        return img
    array = img.detach().cpu().numpy() if isinstance(img, torch.Tensor) else np.asarray(img)
    if array.dtype != np.uint8:
        raise ValueError(f"an image of type {array.dtype} can't be drawn; convert it with to_uint8 first")
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    elif array.ndim == 3 and array.shape[0] in (3, 4):
        array = array.transpose(1, 2, 0)
    elif array.ndim != 2:
        raise ValueError(
            f"an image of shape {list(array.shape)} can't be drawn; wanted [1, H, W], [3, H, W], [4, H, W] or [H, W]"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def opaque(imgs: torch.Tensor, *, background: int = 255) -> torch.Tensor:
    """Lay uint8 images [N, 4, H, W] over a grey background [0, 255]: [N, 3, H, W]; others stay as they are."""
    if imgs.shape[1] != 4:
        return imgs
    alpha = imgs[:, 3:].to(torch.int32)
    mixed = imgs[:, :3].to(torch.int32) * alpha + background * (255 - alpha)
    return ((mixed + 127) // 255).to(torch.uint8)


def from_pil(image: Image.Image) -> np.ndarray:
    """Turn a Pillow image of mode L, RGB or RGBA into a uint8 array [C, H, W] of its own."""
    if image.mode not in ("L", "RGB", "RGBA"):
        raise ValueError(f"a Pillow image of mode {image.mode} must pass through to_grey_or_rgb first")
    array = np.array(image, dtype=np.uint8)
    return array[np.newaxis] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def readable_extensions() -> frozenset[str]:
    """Lower-case file extensions, dot included, of the formats that Pillow can read by itself."""
    registered = Image.registered_extensions()  # loads Pillow's plugins
    return frozenset(ext for ext, name in registered.items() if name in Image.OPEN and name not in _UNWANTED_FORMATS)


def open_image(file: IO[bytes] | bytes | str | os.PathLike) -> Image.Image:
    """Open an image without decoding its pixels; its size and mode are known afterwards.

    Raises:
        ValueError: Not an image, with the reason.
    """
    try:
        Image.init()
        formats = [name for name in Image.OPEN if name not in _UNWANTED_FORMATS]
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Image.UnidentifiedImageError:
        raise ValueError("not an image that Pillow knows") from None
    except _DECODE_ERRORS as err:
        raise ValueError(f"not a readable image ({_one_line(err)})") from err


def num_channels(image: Image.Image) -> int:
    """Channels that `to_grey_or_rgb` on white will give: 1 for grey, 3 for everything else."""
    return 1 if image.mode in _GREY_MODES else 3


def to_grey_or_rgb(image: Image.Image, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Decode a Pillow image of whatever mode into 8 bits per channel, mode L or RGB.

    The EXIF orientation is applied; palettes, CMYK and the like become RGB; 16-bit grey is scaled by 255/65535;
    transparency is laid over the background. Colour profiles are not applied.

    Args:
        image: As `open_image` gave it.
        background: RGB [0, 255] behind transparent pixels. Grey with alpha stays grey if the background is grey.
    Raises:
        ValueError: The pixels can't be decoded, or have no defined range (floating point).
    """
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("L", "RGB") and "transparency" not in image.info:
            return image
        if image.mode == "F":
            raise ValueError("floating-point pixels have no defined range")
        if image.mode == "I" or image.mode.startswith("I;16"):
            array = np.asarray(image).astype(np.float64).clip(0, 65535)
            return Image.fromarray(np.rint(array * (255 / 65535)).astype(np.uint8))
        if has_alpha(image):
            grey = image.mode in ("L", "LA", "La") and len(set(background)) == 1
            image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
            return image.getchannel(0) if grey else image
        return image.convert("L" if image.mode == "1" else "RGB")
    except _DECODE_ERRORS as err:
        raise ValueError(f"can't be decoded ({_one_line(err)})") from err


def has_alpha(image: Image.Image) -> bool:
    """Whether an image says anything of transparency."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def to_rgba(image: Image.Image) -> Image.Image:
    """Decode a Pillow image of whatever mode into 8 bits per channel, mode RGBA; opaque where it has no transparency.

    Raises:
        ValueError: As `to_grey_or_rgb`.
    """
    if not has_alpha(image):
        return to_grey_or_rgb(image).convert("RGBA")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        return image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
    except _DECODE_ERRORS as err:
        raise ValueError(f"can't be decoded ({_one_line(err)})") from err


# --- files


def save_png(path: str | os.PathLike, img: torch.Tensor | np.ndarray | Image.Image) -> None:
    """Write one image (see `to_pil`) as PNG; the file appears complete or not at all.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    image = to_pil(img)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            image.save(tmp, format="PNG", compress_level=6)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def save_grid(
    path: str | os.PathLike,
    imgs: torch.Tensor | np.ndarray,
    grid_size: tuple[int, int],
    labels: GridLabels | tuple[Sequence[str] | None, Sequence[str] | None] | None = None,
) -> None:
    """Tile uint8 images row by row and write them as one PNG.

    Args:
        path: File to write.
        imgs: uint8 [N, C, H, W], N = columns * rows, C = 1 or 3.
        grid_size: (columns, rows).
        labels: Captions (one per row, one per column), drawn in a white margin.
    Raises:
        ValueError: Wrong number of images or captions.
    """
    save_png(path, draw_grid(imgs, grid_size, labels))


def draw_grid(
    imgs: torch.Tensor | np.ndarray,
    grid_size: tuple[int, int],
    labels: GridLabels | tuple[Sequence[str] | None, Sequence[str] | None] | None = None,
) -> Image.Image:
    """Tile uint8 images row by row; arguments as in `save_grid`."""
    array = imgs.detach().cpu().numpy() if isinstance(imgs, torch.Tensor) else np.asarray(imgs)
    cols, rows = grid_size
    if array.ndim != 4 or array.shape[0] != cols * rows:
        raise ValueError(f"a grid of {cols} columns and {rows} rows got images of shape {list(array.shape)}")
    _, channels, height, width = array.shape
    tiled = array.reshape(rows, cols, channels, height, width).transpose(2, 0, 3, 1, 4)
    grid = to_pil(tiled.reshape(channels, rows * height, cols * width))
    return grid if labels is None else _add_captions(grid, grid_size, GridLabels(*labels))


def _add_captions(grid: Image.Image, grid_size: tuple[int, int], labels: GridLabels) -> Image.Image:
    for side, texts, count in (("row", labels.rows, grid_size[1]), ("column", labels.cols, grid_size[0])):
        if texts is not None and len(texts) != count:
            raise ValueError(f"{len(texts)} {side} labels for {count} {side}s")
    font = ImageFont.load_default()
    pad = 3
    extents = [font.getbbox(text)[2:] for text in (*(labels.rows or ()), *(labels.cols or ()))]
    line = max((height for _, height in extents), default=0) + 2 * pad
    left = max(font.getbbox(text)[2] for text in labels.rows) + 2 * pad if labels.rows else 0
    top = line if labels.cols else 0
    out = Image.new("RGB", (grid.width + int(left), grid.height + int(top)), WHITE)
    out.paste(grid, (int(left), int(top)))
    draw = ImageDraw.Draw(out)
    cell_w, cell_h = grid.width / grid_size[0], grid.height / grid_size[1]
    for i, text in enumerate(labels.cols or ()):
        width = font.getbbox(text)[2]
        draw.text((left + i * cell_w + max((cell_w - width) / 2, 0), pad), text, fill="black", font=font)
    for i, text in enumerate(labels.rows or ()):
        height = font.getbbox(text)[3]
        draw.text((pad, top + i * cell_h + max((cell_h - height) / 2, 0)), text, fill="black", font=font)
    return out


def _one_line(err: BaseException) -> str:
    return " ".join(str(err).split()) or type(err).__name__
