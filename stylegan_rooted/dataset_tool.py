"""Turn a folder or zip of images of any size and format into a zip that training takes as it is.

The same source and options give the same bytes. The file appears complete or not at all.
"""

import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from stylegan_rooted.build_options import COLOURS, BuildOptions
from torch_utils import images
from training.dataset import LABELS_FILE, DatasetError, Source, labels_by_name, open_source, parse_labels, read_meta

_FILTERS = {"box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that zip knows
_MAX_LISTED_REASONS = 3


@dataclass(frozen=True)
class BuildResult:
    """What was built: the file, its contents, and what had to be left out."""

    dest: str
    num_written: int
    resolution: int
    num_channels: int
    classes: list[str] | None
    num_enlarged: int
    skipped: list[tuple[str, str]]


def build(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    *,
    resolution: int,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> BuildResult:
    """Crop or pad every image of a folder (recursive) or zip to a square, resize it and store it in a new zip.

    Args:
        source: Folder or .zip with images; its dataset.json may hold labels.
        dest: .zip to write; its folder is made if need be.
        resolution: Side of the images.
        overwrite: Replace `dest` if it exists.
        progress: Called with (files done, files to do) after every file.
        options: See `BuildOptions`.
    Raises:
        ValueError: An option out of range, or `dest` exists or has another extension.
        DatasetError: Nothing usable in `source`, or its labels don't fit.
        OSError: `dest` can't be written.
    """
    opts = BuildOptions(resolution=resolution, **options)
    dest = os.path.abspath(dest)
    _check_dest(dest, overwrite)
    origin = open_source(source)
    labels = _Labels(origin, opts.labels)
    skipped = [(name, _why_not(name)) for name in origin.others if name != LABELS_FILE]
    mode = _mode(origin, opts.channels)
    written: list[str] = []
    num_enlarged = 0
    total = min(len(origin.names), opts.max_images or len(origin.names))
    with _atomic_zip(dest) as archive:
        for done, name in enumerate(origin.names):
            if len(written) == opts.max_images:
                break
            try:
                image, enlarged = _convert(origin.read(name), opts, mode)
            except DatasetError as err:
                skipped.append((name, str(err).removeprefix(f"{name} in {origin.path} ")))
            except ValueError as err:
                skipped.append((name, str(err)))
            else:
                number = f"{len(written):08d}"
                _add(archive, f"{number[:5]}/img{number}.png", _png(image))
                written.append(name)
                num_enlarged += enlarged
            if progress:
                progress(min(done + 1, total), total)
        if not written:
            reasons = "; ".join(f"{name}: {why}" for name, why in skipped[:_MAX_LISTED_REASONS])
            raise DatasetError(f"none of the {len(skipped)} files in {origin.path} can be used ({reasons})")
        values, classes = labels.of(written)
        _add(archive, LABELS_FILE, _meta(opts, values, classes, num_channels=len(mode), num_skipped=len(skipped)))
    return BuildResult(
        dest=dest,
        num_written=len(written),
        resolution=resolution,
        num_channels=len(mode),
        classes=classes,
        num_enlarged=num_enlarged,
        skipped=sorted(skipped),
    )


class _Labels:
    """Where labels come from; complains before any image is touched."""

    def __init__(self, source: Source, mode: str) -> None:
        self.table: dict[str, Any] | None = None
        self.by_folder = mode == "from-folders"
        if self.by_folder:
            loose = [name for name in source.names if "/" not in name]
            if loose:
                raise DatasetError(
                    f"{loose[0]} lies directly in {source.path}, so --labels from-folders knows no class for it;"
                    " put every image into a folder named after its class"
                )
        elif mode in ("auto", "from-json"):
            meta = read_meta(source)
            if parse_labels(meta, source.names, source.path) is not None:
                self.table = labels_by_name(meta, source.path)
            elif mode == "from-json":
                raise DatasetError(f"{source.path} has no {LABELS_FILE} with labels; --labels from-json needs one")

    def of(self, names: list[str]) -> tuple[list[Any] | None, list[str] | None]:
        """(label of every image or None, class names or None)."""
        if self.table is not None:
            return [self.table[name] for name in names], None
        if not self.by_folder:
            return None, None
        folders = [name.split("/", 1)[0] for name in names]
        classes = sorted(set(folders))
        number = {folder: i for i, folder in enumerate(classes)}
        return [number[folder] for folder in folders], classes


def _check_dest(dest: str, overwrite: bool) -> None:
    if not dest.lower().endswith(".zip"):
        raise ValueError(f"{dest} does not end in .zip; training reads data sets from .zip files")
    if os.path.isdir(dest):
        raise ValueError(f"{dest} is a folder; name the .zip file to write")
    if os.path.exists(dest) and not overwrite:
        raise ValueError(f"{dest} exists; add --overwrite to replace it")


def _mode(source: Source, channels: str) -> str:
    """Pillow's mode of the images to write, a letter per channel; "auto" looks at every file's header."""
    if channels != "auto":
        return {"grey": "L", "rgb": "RGB", "rgba": "RGBA"}[channels]
    found = False
    for name in source.names:
        try:
            with _quiet(), source.open(name) as file, images.open_image(file) as image:
                if images.num_channels(image) == 3:
                    return "RGB"
                found = True
        except (ValueError, RuntimeError, OSError, zipfile.BadZipFile):
            continue  # reported when its turn comes
    return "L" if found else "RGB"


def _convert(data: bytes, opts: BuildOptions, mode: str) -> tuple[Image.Image, bool]:
    """(square image of the wanted side, whether it had to be enlarged)."""
    side = opts.resolution
    with _quiet():
        image = images.open_image(data)
        if mode == "RGBA":
            image = images.to_rgba(image)
        else:
            image = images.to_grey_or_rgb(image, background=opts.background_rgb()).convert(mode)
    width, height = image.size
    if not width or not height:
        raise ValueError("has no pixels")
    enlarged = {"stretch": min, "center-crop": min, "pad": max}[opts.transform](width, height) < side
    square = fit(image, side, opts.transform, resize_filter=opts.resize_filter, background=opts.background_rgb())
    return square, enlarged


def fit(
    image: Image.Image,
    side: int,
    transform: str,
    *,
    resize_filter: str = BuildOptions.resize_filter,
    background: tuple[int, int, int] = COLOURS["white"],
) -> Image.Image:
    """Make an image square, side x side, in its own mode (L, RGB or RGBA); a transform as in `BuildOptions`."""
    width, height = image.size
    resample = _FILTERS[resize_filter]
    if transform == "stretch":
        return image.resize((side, side), resample)
    if transform == "center-crop":
        edge = min(width, height)
        left, top = (width - edge) // 2, (height - edge) // 2
        return image.crop((left, top, left + edge, top + edge)).resize((side, side), resample)
    scale = side / max(width, height)
    fitted = image.resize((max(round(width * scale), 1), max(round(height * scale), 1)), resample)
    if image.mode == "RGBA":
        canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    else:
        canvas = Image.new("RGB", (side, side), background).convert(image.mode)
    canvas.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    return canvas


def _png(image: Image.Image) -> bytes:
    """Uncompressed PNG without metadata: quick to read, and the same bytes whatever zlib is installed."""
    out = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(out, format="PNG", compress_level=0)
    return out.getvalue()


def _meta(
    opts: BuildOptions, values: list[Any] | None, classes: list[str] | None, *, num_channels: int, num_skipped: int
) -> bytes:
    """dataset.json: the labels by new name, and under "build", which loaders ignore, how the file was made."""
    labels = None
    if values is not None:
        numbers = (f"{i:08d}" for i in range(len(values)))
        labels = [[f"{n[:5]}/img{n}.png", value] for n, value in zip(numbers, values)]
    record = {**asdict(opts), "channels": num_channels, "classes": classes, "num_skipped": num_skipped}
    return json.dumps({"labels": labels, "build": record}).encode()


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = 0o644 << 16
    info.create_system = 3
    archive.writestr(info, data, zipfile.ZIP_STORED)


@contextmanager
def _atomic_zip(dest: str) -> Iterator[zipfile.ZipFile]:
    """A zip that takes its name only when it is complete."""
    folder, name = os.path.split(dest)
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as err:
        raise ValueError(f"{dest} can't be written: a part of its folder's name, {err.filename}, is a file") from err
    tmp = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(tmp, "w", zipfile.ZIP_STORED) as archive:
            yield archive
        os.replace(tmp, dest)
    except OSError as err:
        if err.filename in (tmp, None):
            err.filename = dest  # the name that the user knows
        raise
    finally:
        if os.path.exists(tmp):
            os.unlink(tmp)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings about odd metadata and large images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _why_not(name: str) -> str:
    if name.startswith("__MACOSX/") or os.path.basename(name).startswith("._"):
        return "shadow file of macOS"
    extension = os.path.splitext(name)[1].lower()
    return f"{extension} is not an image format we read" if extension else "no image extension"
