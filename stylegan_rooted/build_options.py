"""What `dataset build` can be told. Pure: no torch, no Pillow, so that `--help` stays quick."""

import re
from dataclasses import dataclass
from typing import Any

TRANSFORMS = {
    "center-crop": "cut the largest centred square",
    "pad": "keep everything, fill up with the background",
    "stretch": "distort",
}
FITS = {"crop": "center-crop", "pad": "pad", "stretch": "stretch"}  # what --fit calls them
RESIZE_FILTERS = ("box", "lanczos")
LABELS = {
    "auto": "from-json where the source has labels, else none",
    "from-folders": "one class per top folder, numbered in alphabetical order",
    "from-json": "those of the source's dataset.json",
    "none": "none",
}
CHANNELS = ("auto", "rgb", "grey", "rgba")
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}


@dataclass(frozen=True)
class BuildOptions:
    """How images become a data set.

    Args:
        resolution: Side of the square images, a power of two from 4 up.
        transform: What happens to images that are not square; a key of TRANSFORMS.
        resize_filter: "box" or "lanczos".
        background: Colour behind transparent pixels and padding: white, black, grey or #rrggbb.
        channels: "rgb", "grey", "rgba" (transparency is kept), or "auto": grey if all images are, else rgb.
        labels: A key of LABELS.
        max_images: Stop after that many.
    Raises:
        ValueError: A value out of range; the message names the option.
    """

    resolution: int
    transform: str = "center-crop"
    resize_filter: str = "lanczos"
    background: str = "white"
    channels: str = "auto"
    labels: str = "auto"
    max_images: int | None = None

    def __post_init__(self) -> None:
        if self.resolution < 4 or self.resolution & (self.resolution - 1) or self.resolution > 1 << 16:
            raise ValueError(f"--resolution {self.resolution} is not a power of two from 4 up (…, 64, 128, 256, …)")
        choices: tuple[tuple[str, str, Any], ...] = (
            ("--transform", self.transform, TRANSFORMS),
            ("--resize-filter", self.resize_filter, RESIZE_FILTERS),
            ("--labels", self.labels, LABELS),
            ("--rgb/--grey/--rgba", self.channels, CHANNELS),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(allowed)}")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"--max-images {self.max_images}: keep at least one image")
        self.background_rgb()

    def background_rgb(self) -> tuple[int, int, int]:
        """The background as RGB [0, 255]."""
        if self.background in COLOURS:
            return COLOURS[self.background]
        if not re.fullmatch("#[0-9a-fA-F]{6}", self.background):
            raise ValueError(f"--background {self.background!r} is no colour; give {', '.join(COLOURS)} or #rrggbb")
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue
