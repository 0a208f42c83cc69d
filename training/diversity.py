"""How different images are, from thumbnails: cheap figures for every tick. Knows pixels, nothing of networks."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 16
MAX_RENDERED = 64  # of a run's fixed grid
MAX_IMAGES = 1000
MAX_PIXELS = 64 << 20  # of all images read for comparison: a second or two


def thumbnails(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to float32 [N, C·s·s] in [0, 255], each side s at most 16, by averaging."""
    small = F.adaptive_avg_pool2d(images.float(), min(SIDE, images.shape[-1]))
    return small.flatten(1)


def spread(rows: Tensor) -> float:
    """Root mean square distance of the rows [N, P] from their mean, per number."""
    return float((rows - rows.mean(dim=0)).square().mean().sqrt())


def nearest(rows: Tensor, others: Tensor, *, ignore_self: bool = False) -> float:
    """Median over the rows [N, P] of the distance to the nearest of `others` [M, P].

    Args:
        ignore_self: `rows` are `others`: row i is not compared with itself.
    """
    distances = torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
    if ignore_self:
        distances.fill_diagonal_(float("inf"))
    return float(distances.min(dim=1).values.median())


class Comparison:
    """Compares generated images with a data set's, by thumbnails of at most a thousand of them, read once.

    Args:
        dataset: Items start with a uint8 image [C, H, W]; those that cannot be read are passed over.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._reals: Tensor | None = None
        self._spread = 0.0
        self._nearest = 0.0

    def figures(self, images: Tensor) -> dict[str, float]:
        """`diversity` and `nearest` of generated images uint8 [N, C, H, W], those of the reals being 1.

        A figure is missing where the reals are too few or too alike to compare with.
        """
        reals = self._read()
        rows = thumbnails(images)
        result = {}
        if len(rows) > 1 and self._spread > 0:
            result["diversity"] = spread(rows) / self._spread
        if self._nearest > 0:
            result["nearest"] = nearest(rows, reals) / self._nearest
        return result

    def _read(self) -> Tensor:
        if self._reals is None:
            rows = [thumbnails(torch.as_tensor(image)[None]) for image in self._images()]
            self._reals = torch.cat(rows) if rows else torch.zeros([0, 1])
            if len(rows) > 1:
                self._spread = spread(self._reals)
                self._nearest = nearest(self._reals, self._reals, ignore_self=True)
        return self._reals

    def _images(self) -> Iterator[Any]:
        side = self._dataset.resolution
        num = max(min(len(self._dataset), MAX_IMAGES, MAX_PIXELS // side**2), 1)
        for i in range(num):
            try:
                yield self._dataset[i * len(self._dataset) // num][0]
            except (ValueError, OSError):  # whoever trains on it says so
                continue
