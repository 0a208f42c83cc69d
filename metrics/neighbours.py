"""Figures about nearest neighbours between two sets of features: precision and recall, density and coverage, copies.

All come from the same three sets of distances, computed block by block. Knows rows of numbers; nothing of images.

Exact at the speed of float32: distances are compared in float32 around a common centre, and every comparison that
float32 could get wrong (the error bound of its matrix product) is made again in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 2048
"""Rows of a block of distances: 2048² float32 are 16 MiB, and a few such arrays live at once."""

_EXTRA = 8  # candidates beyond k that are ranked again in float64


@dataclass(frozen=True)
class ManifoldResult:
    """How two sets cover each other.

    Attributes:
        precision: Share of generated rows within some real row's ball (k nearest real neighbours): quality.
        recall: Share of real rows within some generated row's ball: variety.
        density: Mean number of real balls around a generated row, divided by k; can exceed 1. Robust to outliers.
        coverage: Share of real balls that hold a generated row.
        precision_error: Standard error given the balls: that of a share, √(p (1 - p) / n).
        recall_error: The same.
        density_error: Standard deviation over generated rows / √n, given the balls.
        coverage_error: That of a share over real rows.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    precision_error: float
    recall_error: float
    density_error: float
    coverage_error: float


@dataclass(frozen=True)
class MemorisationResult:
    """How close generated rows lie to training rows.

    Attributes:
        share: Share of generated rows whose nearest training row is closer than `threshold`.
        std_error: That of a share.
        threshold: The `quantile` of the distances from training rows to their nearest other training row: by
            construction that share of the training set itself is closer.
        quantile: See `threshold`.
        median_ratio: Median nearest distance of generated rows / that of training rows among themselves; about 1 for
            fresh draws from the data's distribution, near 0 for copies.
        held_out_share: The same share for held-out rows: what images never trained on score. None without any.
        held_out_error: Its standard error.
        nearest: Index of the nearest training row of each generated row, int64 [N].
        distances: The distance to it, float64 [N].
    """

    share: float
    std_error: float
    threshold: float
    quantile: float
    median_ratio: float
    held_out_share: float | None
    held_out_error: float | None
    nearest: np.ndarray
    distances: np.ndarray


def manifolds(
    real: np.ndarray | torch.Tensor,
    fake: np.ndarray | torch.Tensor,
    *,
    k: int = 3,
    density_k: int = 5,
    device: torch.device | str = "cpu",
) -> ManifoldResult:
    """Precision and recall with balls of `k` neighbours, density and coverage with balls of `density_k`.

    A row's ball reaches to its k-th nearest other row of its own set; a row on the rim is inside.

    Args:
        real: Features [N, D].
        fake: Features [M, D].
        k: Neighbours for precision and recall (3 in the ADA family).
        density_k: Neighbours for density and coverage (5 in their paper).
        device: Where the blocks are computed.

    Raises:
        ValueError: For shapes that do not fit, non-finite numbers, or no more rows than neighbours.

    Source: Kynkäänniemi et al. 2019, Eq. 1-2; Naeem et al. 2020, Eq. 5-6.
    """
    pair = _Pair(real, fake, device)
    for what, rows, most in (("real", pair.a, max(k, density_k)), ("generated", pair.b, k)):
        if len(rows) <= most:
            raise ValueError(f"got {len(rows)} {what} images, balls of {most} neighbours need at least {most + 1}")
    real_radii = pair.radii(pair.a, sorted({k, density_k}))
    fake_radii = pair.radii(pair.b, [k])
    num_real, num_fake = len(pair.a), len(pair.b)
    within_real = torch.zeros(num_fake, dtype=torch.bool)
    within_fake = torch.zeros(num_real, dtype=torch.bool)
    counts = torch.zeros(num_fake, dtype=torch.int64)
    covered = torch.zeros(num_real, dtype=torch.bool)
    for here, there, squares, slack in pair.blocks(pair.a, pair.b):
        by_real = pair.inside(here, there, squares, slack, real_radii[k][here][:, None])
        within_real[there] |= by_real.any(0).cpu()
        by_fake = pair.inside(here, there, squares, slack, fake_radii[k][there][None, :])
        within_fake[here] |= by_fake.any(1).cpu()
        if density_k != k:
            by_real = pair.inside(here, there, squares, slack, real_radii[density_k][here][:, None])
        counts[there] += by_real.sum(0).cpu()
        covered[here] |= by_real.any(1).cpu()
    density = counts.double() / density_k
    precision, recall, coverage = (float(flags.double().mean()) for flags in (within_real, within_fake, covered))
    return ManifoldResult(
        precision,
        recall,
        float(density.mean()),
        coverage,
        share_error(precision, num_fake),
        share_error(recall, num_real),
        float(density.std() / num_fake**0.5) if num_fake > 1 else 0.0,
        share_error(coverage, num_real),
    )


def memorisation(
    train: np.ndarray | torch.Tensor,
    fake: np.ndarray | torch.Tensor,
    *,
    held_out: np.ndarray | torch.Tensor | None = None,
    quantile: float = 0.05,
    device: torch.device | str = "cpu",
) -> MemorisationResult:
    """Whether generated rows are closer to training rows than the training set is to itself.

    Exact copies inside the training set count as one another's nearest rows, so a set with many duplicates has a small
    threshold: remove duplicates first.

    Args:
        train: Features [N, D] that the generator was trained on.
        fake: Generated features [M, D].
        held_out: Features of images of the same kind that were not trained on; their share is what honest images score.
        quantile: Of the training set's own nearest distances, in (0, 1).
        device: Where the blocks are computed.

    Raises:
        ValueError: For shapes that do not fit, fewer than 2 training rows, or non-finite numbers.
    """
    pair = _Pair(train, fake, device)
    if len(pair.a) < 2:
        raise ValueError(f"got {len(pair.a)} training images, wanted at least 2 to compare among themselves")
    own = pair.radii(pair.a, [1])[1].sqrt().numpy()
    threshold = float(np.quantile(own, quantile))
    nearest, distances = pair.nearest()
    share = float((distances < threshold).mean())
    held_share = None
    if held_out is not None and len(held_out):
        held_share = float((_Pair(train, held_out, device).nearest()[1] < threshold).mean())
    return MemorisationResult(
        share=share,
        std_error=share_error(share, len(distances)),
        threshold=threshold,
        quantile=quantile,
        median_ratio=float(np.median(distances) / max(np.median(own), np.finfo(np.float64).tiny)),
        held_out_share=held_share,
        held_out_error=None if held_share is None else share_error(held_share, len(held_out)),  # type: ignore[arg-type]
        nearest=nearest,
        distances=distances,
    )


def share_error(share: float, num: int) -> float:
    """Standard error of a share of `num` independent draws; never 0: 0 of 50 is no proof of 0 (Agresti & Coull)."""
    moved = (share * num + 2) / (num + 4)
    return float((moved * (1 - moved) / (num + 4)) ** 0.5)


class _Pair:
    """Two feature sets around a common centre: float32 on the device for the products, float64 for what is close."""

    def __init__(self, a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor, device: torch.device | str) -> None:
        exact = [torch.as_tensor(rows).detach().cpu() for rows in (a, b)]
        if any(rows.ndim != 2 for rows in exact) or exact[0].shape[1] != exact[1].shape[1]:
            raise ValueError(
                f"got features of shapes {tuple(exact[0].shape)} and {tuple(exact[1].shape)}, wanted [N, D]"
            )
        if not all(len(rows) and torch.isfinite(rows).all() for rows in exact):
            raise ValueError("a feature set is empty or holds non-finite numbers; look for NaN in the images")
        self.centre = exact[0].double().mean(0)
        self.a, self.b = exact
        self.device = torch.device(device)
        self.near = {id(rows): (rows.double() - self.centre).float().to(self.device) for rows in exact}
        # |error| of a float32 product of D terms is about √D · 2⁻²⁴ of the lengths; 8 times that is allowed.
        self.slack = 8 * 2.0**-24 * exact[0].shape[1] ** 0.5

    def blocks(
        self, left: torch.Tensor, right: torch.Tensor
    ) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
        """(rows, columns, squared distances, bound of their error) of every block of `left` against `right`."""
        x, y = self.near[id(left)], self.near[id(right)]
        xx, yy = x.square().sum(1), y.square().sum(1)
        for first in range(0, len(x), BLOCK):
            rows = slice(first, min(first + BLOCK, len(x)))
            for other in range(0, len(y), BLOCK):
                cols = slice(other, min(other + BLOCK, len(y)))
                lengths = xx[rows, None] + yy[None, cols]
                yield rows, cols, torch.addmm(lengths, x[rows], y[cols].T, alpha=-2), lengths * self.slack

    def exact(self, left: torch.Tensor, i: torch.Tensor, right: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Squared distances of rows left[i], right[j], float64 [len(i)], by differences."""
        parts = [(left[p].double() - right[q].double()).square().sum(1) for p, q in zip(i.split(BLOCK), j.split(BLOCK))]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def inside(
        self, rows: slice, cols: slice, squares: torch.Tensor, slack: torch.Tensor, radii: torch.Tensor
    ) -> torch.Tensor:
        """Which squared distances between a and b are at most `radii` (float64, squared): bool like `squares`."""
        limit = radii.to(self.device, torch.float32)
        gap = squares - limit
        result = gap <= 0
        i, j = (gap.abs() <= slack).nonzero(as_tuple=True)
        if len(i):
            i, j = i.cpu(), j.cpu()
            truth = self.exact(self.a, i + rows.start, self.b, j + cols.start) <= radii.expand(squares.shape)[i, j]
            result[i, j] = truth.to(self.device)
        return result

    def radii(self, rows: torch.Tensor, ks: list[int]) -> dict[int, torch.Tensor]:
        """Squared distance, float64 [N], of every row to its k-th nearest other row, for every k."""
        # The nearest of all, number 0, is the row itself or a copy of it.
        return {k: squares for k, (squares, _) in self._nearest(rows, rows, ks).items()}

    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """For every row of b the index of its nearest row of a and the distance."""
        squares, index = self._nearest(self.b, self.a, [0])[0]
        return index.numpy(), squares.sqrt().numpy()

    def _nearest(
        self, left: torch.Tensor, right: torch.Tensor, ks: list[int]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """For every k the exact squared distance, float64 [N], of each row of `left` to the row of `right` with k
        nearer ones, and that row's index.

        Where float32 leaves no doubt which row that is, only its distance is computed in float64; else those of all
        candidates, or of all rows.
        """
        wanted = max(ks) + 1
        best, index, widest = self._candidates(left, right, wanted)
        unsure = torch.zeros(len(left), dtype=torch.bool)
        if best.shape[1] < len(right):
            unsure = best[:, -1] <= best[:, wanted - 1] + 2 * widest
        found = {}
        for k in ks:
            doubtful = unsure.clone()
            if k > 0:
                doubtful |= best[:, k] - best[:, k - 1] <= 2 * widest
            if k + 1 < best.shape[1]:
                doubtful |= best[:, k + 1] - best[:, k] <= 2 * widest
            chosen = index[:, k].clone()
            squares = self.exact(left, torch.arange(len(left)), right, chosen)
            for row in doubtful.nonzero().flatten():
                others = torch.arange(len(right)) if unsure[row] else index[row]
                exact, order = self.exact(left, row.expand(len(others)), right, others).sort(stable=True)
                squares[row], chosen[row] = exact[k], others[order[k]]
            found[k] = squares, chosen
        return found

    def _candidates(
        self, left: torch.Tensor, right: torch.Tensor, wanted: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the rows of `right` nearest to each of `left`, a few more than `wanted`, in float32's order: squared
        distances and indices, [N, few], and a bound of the error of all distances of that row, [N]."""
        keep = min(wanted + _EXTRA, len(right))
        best = torch.full((len(left), keep), torch.inf)
        index = torch.zeros((len(left), keep), dtype=torch.int64)
        widest = torch.zeros(len(left))
        for rows, cols, squares, slack in self.blocks(left, right):
            here = squares.topk(min(keep, squares.shape[1]), dim=1, largest=False)
            values = torch.cat([best[rows], here.values.cpu()], 1)
            merged = torch.cat([index[rows], here.indices.cpu() + cols.start], 1)
            best[rows], order = values.topk(keep, dim=1, largest=False)
            index[rows] = merged.gather(1, order)
            widest[rows] = torch.maximum(widest[rows], slack.amax(1).cpu())
        return best, index, widest
