"""The pictures of a report: grids tiled, reduced and encoded within a budget of bytes. Knows pixels, and where a run
keeps its grids; knows no network and no page."""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylegan_rooted.report_run import FAKES, numbered, read_inside
from torch_utils import images

BUDGET_BYTES = 6 << 20  # of all pictures of a page; base64 makes four thirds of it
NUM_EXPECTED = 24  # pictures of one subject that share the budget
GRID = (6, 4)
MAX_CELL_PX = 128  # larger images are shown reduced
MAX_WIDTH_PX = 768
SMALL_CELL_PX = 64  # up to here an image is shown without losses, its pixels enlarged
QUALITIES = (88, 75, 60)
MAX_STAGES = 12


@dataclass(frozen=True)
class Picture:
    """An encoded picture; `cell` is the side of one of its images in pixels, 0 where that is unknown."""

    alt: str
    data: bytes
    mime: str
    width: int
    height: int
    cell: int

    @property
    def uri(self) -> str:
        """For the `src` of an image."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pixels, for JSON."""
        record = {key: value for key, value in vars(self).items() if key != "data"}
        return {**record, "num_bytes": len(self.data), "sha256": hashlib.sha256(self.data).hexdigest()}


@dataclass
class Album:
    """The pictures of one report by name, within `BUDGET_BYTES`."""

    num_subjects: int = 1
    pictures: dict[str, Picture] = field(default_factory=dict)
    num_left_out: int = 0

    @property
    def num_bytes(self) -> int:
        """Of all pictures, encoded."""
        return sum(len(picture.data) for picture in self.pictures.values())

    def add(self, name: str, tiles: torch.Tensor | np.ndarray, size: tuple[int, int], alt: str) -> str | None:
        """Tile uint8 images [cols * rows, C, H, W] and keep them; the name, or None where the budget is spent."""
        image = images.draw_grid(images.opaque(torch.as_tensor(np.asarray(tiles))), size)
        cell = int(tiles.shape[-1])
        factor = math.ceil(cell / MAX_CELL_PX)
        return self._keep(name, image, factor, cell, alt)

    def add_whole(self, name: str, data: bytes, alt: str) -> str | None:
        """Keep an image file whose parts are unknown, reduced.

        Raises:
            ValueError: It is no image.
        """
        image = images.to_grey_or_rgb(images.open_image(data))
        return self._keep(name, image, math.ceil(image.width / MAX_WIDTH_PX), 0, alt)

    def _keep(self, name: str, image: Any, factor: int, cell: int, alt: str) -> str | None:
        if factor > 1:
            image = image.reduce(factor)
        limit = BUDGET_BYTES // (NUM_EXPECTED * self.num_subjects)
        data, mime = _encode(image, limit, lossless=0 < cell // factor <= SMALL_CELL_PX)
        while len(data) > limit and min(image.size) > 64:
            image, cell = image.reduce(2), cell // 2
            data, mime = _encode(image, limit, lossless=False)
        if self.num_bytes + len(data) > BUDGET_BYTES:
            self.num_left_out += 1
            return None
        self.pictures[name] = Picture(alt, data, mime, image.width, image.height, cell // factor)
        return name


def crop_grid(data: bytes, resolution: int, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """The upper left images [N, C, R, R] of a grid file, and how many (columns, rows) that are.

    Raises:
        ValueError: Not an image, or not a grid of that resolution.
    """
    array = images.from_pil(images.to_grey_or_rgb(images.open_image(data)))
    channels, height, width = array.shape
    if height % resolution or width % resolution:
        raise ValueError(f"is {width}x{height}, no grid of {resolution}x{resolution} images")
    cols, rows = min(size[0], width // resolution), min(size[1], height // resolution)
    part = array[:, : rows * resolution, : cols * resolution].reshape(channels, rows, resolution, cols, resolution)
    return part.transpose(1, 3, 0, 2, 4).reshape(rows * cols, channels, resolution, resolution), (cols, rows)


def add_file(album: Album, name: str, path: Path, resolution: int | None, alt: str) -> str | None:
    """Keep the upper left part of a run's grid file, or all of it where the resolution is unknown.

    Raises:
        OSError, ValueError: It cannot be read, or is no such grid.
    """
    data = read_inside(path.parent, path.name)
    if resolution is None:
        return album.add_whole(name, data, alt)
    return album.add(name, *crop_grid(data, resolution, GRID), alt)


def stages(album: Album, folder: Path, resolution: int | None, prefix: str, missing: list[str]) -> list[dict[str, Any]]:
    """The run's fixed-seed grids in order: `kimg`, `label`, `file`, `picture`; what cannot be shown joins `missing`."""
    files = numbered(folder, FAKES)
    start = folder / "fakes_init.png"
    # The grid of 0 kimg is a step after fakes_init.png, unless the whole run is shorter than 1 kimg.
    kimgs = [kimg for kimg in files if kimg or len(files) == 1 or not start.exists()]
    wanted = [(0, "at the start", start)] if start.exists() else []
    wanted += [(kimg, f"after {kimg or 'less than 1'} kimg", files[kimg]) for kimg in spaced(kimgs, MAX_STAGES)]
    if not wanted:
        missing.append("fakes*.png: none is there, so that no images over time can be shown")
    found = []
    for kimg, label, path in wanted:
        alt = f"Generated images {label}, from the same latents at every stage"
        try:
            picture = add_file(album, f"{prefix}-stage-{path.stem}", path, resolution, alt)
        except (OSError, ValueError) as error:
            missing.append(f"{path.name}: {' '.join(str(getattr(error, 'strerror', None) or error).split())}")
            continue
        if picture is not None:
            found.append({"kimg": kimg, "label": label, "file": path.name, "picture": picture})
    return found


def spaced(kimgs: Sequence[int], most: int) -> list[int]:
    """At most so many of the positions, as evenly as can be, the first and the last among them."""
    if len(kimgs) <= most:
        return list(kimgs)
    low, high = kimgs[0], kimgs[-1]
    left, chosen = list(kimgs), []
    for i in range(most):
        nearest = min(left, key=lambda kimg: abs(kimg - low - (high - low) * i / (most - 1)))
        left.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen)


def _encode(image: Any, limit: int, *, lossless: bool) -> tuple[bytes, str]:
    """PNG where that is wanted and fits, else the best JPEG that fits, else the smallest one."""
    if lossless:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= limit:
            return buffer.getvalue(), "image/png"
    for quality in QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality, optimize=True)
        if buffer.tell() <= limit:
            break
    return buffer.getvalue(), "image/jpeg"
