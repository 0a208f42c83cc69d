"""Fréchet distance between two Gaussians, its error and its limit. Knows rows of numbers; nothing of images."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class InfinityResult:
    """A Fréchet distance extrapolated to infinitely many generated images.

    Attributes:
        value: Intercept of the line through the distances at several N over 1/N. Can be slightly negative.
        std_error: Root of the sum of squares of the fit's error of the intercept and `FrechetReference.std_error` of
            all rows: the subsets share rows, so that the fit alone would be too sure.
        sizes: The N that were used.
        distances: The distance at each.
    """

    value: float
    std_error: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance ‖μ₁-μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½) of two Gaussians.

    tr (Σ₁Σ₂)^½ is the sum of the singular values of Σ₁^½ Σ₂^½, and the symmetric roots come from eigenvalues. No root
    of a non-symmetric product is taken, so the result is real and stays accurate where a covariance is singular
    (fewer images than features), without any offset on the diagonal.

    Args:
        mu1: Mean [D].
        sigma1: Covariance [D, D], symmetric, positive semi-definite.
        mu2: Mean [D].
        sigma2: Covariance [D, D].

    Returns:
        The distance, never below 0 (what round-off leaves below 0 is cut).

    Raises:
        ValueError: For shapes that do not fit, non-finite numbers, or a matrix that is no covariance.

    Source: Dowson & Landau 1982; Heusel et al. 2017, Eq. 6.
    """
    mu1, mu2 = np.atleast_1d(np.asarray(mu1, np.float64)), np.atleast_1d(np.asarray(mu2, np.float64))
    sigma1, sigma2 = np.atleast_2d(np.asarray(sigma1, np.float64)), np.atleast_2d(np.asarray(sigma2, np.float64))
    num_features = mu1.size
    for what, got, wanted in (
        ("mu2", mu2.shape, (num_features,)),
        ("sigma1", sigma1.shape, (num_features, num_features)),
        ("sigma2", sigma2.shape, (num_features, num_features)),
    ):
        if got != wanted:
            raise ValueError(f"got {what} of shape {got}, wanted {wanted} as mu1 has {num_features} features")
    if not all(np.isfinite(array).all() for array in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold non-finite numbers; look for NaN in the images or the network")
    root1, root2 = _scaled_eigenvectors(sigma1, "sigma1"), _scaled_eigenvectors(sigma2, "sigma2")
    singular_values = np.linalg.svd(root1.T @ root2, compute_uv=False)
    diff = mu1 - mu2
    distance = diff @ diff + np.trace(sigma1) + np.trace(sigma2) - 2 * singular_values.sum()
    return max(float(distance), 0.0)


def is_covariance(sigma: np.ndarray) -> bool:
    """A quick look: symmetric and, but for a millionth of its trace, positive semi-definite."""
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-6 * np.abs(sigma).max(initial=0)):
        return False
    shift = 1e-6 * max(float(np.trace(sigma)), 0) + np.finfo(np.float64).tiny
    try:
        np.linalg.cholesky((sigma.astype(np.float64) + sigma.T) / 2 + shift * np.eye(len(sigma)))
    except np.linalg.LinAlgError:
        return False
    return True


class FrechetReference:
    """One Gaussian whose symmetric root is taken once, so that many distances to it cost little each.

    Args:
        mu: Mean [D].
        sigma: Covariance [D, D], symmetric, positive semi-definite.

    Raises:
        ValueError: For a matrix that is no covariance.
    """

    def __init__(self, mu: np.ndarray, sigma: np.ndarray) -> None:
        self.mu = np.asarray(mu, np.float64)
        self.trace = float(np.trace(sigma))
        self.root = _scaled_eigenvectors(np.asarray(sigma, np.float64), "sigma")  # [D, rank], root rootᵀ = sigma

    def distance(self, rows: np.ndarray, *, ddof: int = 1) -> float:
        """Squared Fréchet distance to the Gaussian of feature rows [N, D], whose covariance divides by N - `ddof`.

        With A = (rows - mean) / √(N - ddof), tr (Σ₁Σ₂)^½ is the sum of the singular values of A root: those are roots
        of the eigenvalues of the smaller of its two Gram matrices. Equal to `frechet_distance` up to about 1e-7.

        Raises:
            ValueError: For another number of features, or no more than `ddof` rows.
        """
        offsets, projected = self._projected(rows, ddof)
        return self._distance(offsets, projected, ddof)

    def _distance(self, offsets: np.ndarray, projected: np.ndarray, ddof: int) -> float:
        mean, scale = offsets.mean(axis=0), len(offsets) - ddof
        along = projected - projected.mean(axis=0)
        gram = along.T @ along if along.shape[1] <= len(along) else along @ along.T
        singular_values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0) / scale)
        energy = ((offsets - mean) ** 2).sum() / scale
        return max(float(mean @ mean + self.trace + energy - 2 * singular_values.sum()), 0.0)

    def std_error(self, rows: np.ndarray, *, ddof: int = 1) -> float:
        """Standard error of `distance(rows)` over other draws of the rows, with this Gaussian as it is.

        The infinitesimal jackknife: the derivative of the distance in the direction of each row,
        2 (μ - μ₁)·x + xᵀ (1 - T) x with x centred and T = Σ₁^½ (Σ₁^½ Σ Σ₁^½)^-½ Σ₁^½, has the variance N · error².
        Right to a few percent where the distributions differ and rows outnumber features; up to 1.7 times too large
        elsewhere (`scripts/parity_metrics.py`), where a bootstrap of 20 draws was 2 to 5.5 times too large.

        Source: Jaeckel 1972; the derivative is that of the Bures distance (Bhatia et al. 2019).
        """
        offsets, projected = self._projected(rows, ddof)
        num, scale, mean = len(offsets), len(offsets) - ddof, offsets.mean(axis=0)
        along = projected - projected.mean(axis=0)
        variances, directions = np.linalg.eigh(along.T @ along / scale)
        kept = variances > max(variances[-1], 0.0) * 1e-13
        moved = ((along @ directions[:, kept]) ** 2 / np.sqrt(variances[kept])).sum(axis=1)
        centred = offsets - mean
        influence = 2 * centred @ mean + (centred * centred).sum(axis=1) - moved
        return float(np.sqrt(influence.var(ddof=1) / num))

    def infinity(self, rows: np.ndarray, *, num_sizes: int = 15, seed: int = 0, ddof: int = 1) -> InfinityResult:
        """The distance for infinitely many rows, which a distance from N rows overstates by about a constant / N.

        Args:
            rows: Feature rows [N, D] of the generator; at least 20.
            num_sizes: Distances at so many sizes, evenly from N / 10 (at least 10) to N, each a random subset.
            seed: Of the subsets.
            ddof: See `distance`.

        Raises:
            ValueError: Fewer than 20 rows.

        Source: Chong & Forsyth 2020, section 4.1, with plain random subsets.
        """
        rows = np.asarray(rows, np.float64)
        if len(rows) < 20:
            raise ValueError(f"got {len(rows)} images, an extrapolation over their number needs at least 20")
        rng = np.random.RandomState(seed)
        sizes = np.unique(np.linspace(max(len(rows) // 10, 10), len(rows), num_sizes).astype(int))
        offsets, projected = self._projected(rows, ddof)
        subsets = [rng.permutation(len(rows))[:size] for size in sizes]
        values = np.array([self._distance(offsets[subset], projected[subset], ddof) for subset in subsets])
        design = np.stack([np.ones(len(sizes)), 1 / sizes], axis=1)
        # A distance from N rows varies like 1/√N or less, so its weight in the fit is N.
        weight = np.sqrt(sizes)[:, None]
        (intercept, slope), *_ = np.linalg.lstsq(design * weight, values * weight[:, 0], rcond=None)
        residuals = (values - design @ [intercept, slope]) * weight[:, 0]
        spread = residuals @ residuals / max(len(sizes) - 2, 1)
        fit_error = np.sqrt(spread * np.linalg.inv((design * weight).T @ (design * weight))[0, 0])
        return InfinityResult(
            float(intercept),
            float(np.hypot(fit_error, self.std_error(rows, ddof=ddof))),
            tuple(int(size) for size in sizes),
            tuple(float(value) for value in values),
        )

    def _projected(self, rows: np.ndarray, ddof: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows less this mean, float64 [N, D], and those times the root, [N, rank]."""
        rows = np.asarray(rows, np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.mu.size or len(rows) <= ddof:
            raise ValueError(f"got rows of shape {rows.shape}, wanted [more than {ddof}, {self.mu.size}]")
        offsets = rows - self.mu
        return offsets, offsets @ self.root


def _scaled_eigenvectors(sigma: np.ndarray, what: str) -> np.ndarray:
    """R [D, rank] with R Rᵀ = sigma, leaving out directions whose variance is nothing but round-off."""
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-6 * np.abs(sigma).max(initial=0)):
        raise ValueError(f"{what} is not symmetric, so it is no covariance matrix")
    variances, directions = np.linalg.eigh((sigma + sigma.T) / 2)
    largest = max(variances[-1], 0.0)
    if variances[0] < -1e-6 * largest or variances[-1] < 0:
        raise ValueError(f"{what} has the negative eigenvalue {variances[0]:.3g}, so it is no covariance matrix")
    kept = variances > largest * len(variances) * np.finfo(np.float64).eps
    return directions[:, kept] * np.sqrt(variances[kept])
