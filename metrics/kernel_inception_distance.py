"""Kernel distance between two sets of features. Knows rows of numbers; knows nothing of images or networks."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class KidResult:
    """Kernel distance with its spread.

    Attributes:
        mean: Average over subsets of the unbiased squared MMD; can be slightly negative for equal distributions.
        std: Population standard deviation of the single subsets' values around `mean`. It shows how much one subset's
            figure varies; it is no standard error of `mean`, as subsets share images, and it is 0 up to round-off where
            every subset is the whole set.
        num_subsets: How many pairs of subsets were drawn.
        subset_size: Rows in each.
    """

    mean: float
    std: float
    num_subsets: int
    subset_size: int


def kernel_distance(
    f1: np.ndarray, f2: np.ndarray, *, num_subsets: int = 100, max_subset_size: int = 1000, seed: int = 0
) -> KidResult:
    """Squared MMD of two feature sets under the kernel (a·b/d + 1)³, averaged over random subsets.

    Each subset draws m = min(N1, N2, max_subset_size) rows without replacement, from `f2` first, then from `f1`, out of
    one stream that belongs to this call. `kernel_distance(real, gen)` thus draws the fakes first, as the ADA family
    does, and equals clean-fid's function of the same name after `np.random.seed(seed)`, with equal argument order.
    Computed in float64; there is no factor of 1000.

    Args:
        f1: Features [N1, D].
        f2: Features [N2, D].
        num_subsets: At least 1.
        max_subset_size: At least 2.
        seed: In [0, 2^32).

    Raises:
        ValueError: For shapes that do not fit, fewer than two rows, or non-finite numbers.

    Source: Bińkowski et al. 2018, section 4; unbiased estimator: Gretton et al. 2012, Eq. 3.
    """
    f1, f2 = np.asarray(f1, np.float64), np.asarray(f2, np.float64)
    if f1.ndim != 2 or f2.ndim != 2 or f1.shape[1] != f2.shape[1]:
        raise ValueError(f"got features of shapes {f1.shape} and {f2.shape}, wanted [N1, D] and [N2, D]")
    size = min(len(f1), len(f2), max_subset_size)
    if size < 2 or num_subsets < 1:
        raise ValueError(f"got {num_subsets} subsets of {size} rows, wanted at least 1 subset of at least 2 rows")
    if not (np.isfinite(f1).all() and np.isfinite(f2).all()):
        raise ValueError("the features hold non-finite numbers; look for NaN in the images or the network")
    rng = np.random.RandomState(seed)  # this legacy generator, because published figures were drawn with it
    values = np.empty(num_subsets)
    for i in range(num_subsets):
        x = f2[rng.choice(len(f2), size, replace=False)]
        y = f1[rng.choice(len(f1), size, replace=False)]
        within = _off_diagonal_sum(_kernel(x, x)) + _off_diagonal_sum(_kernel(y, y))
        values[i] = within / (size * (size - 1)) - 2 * _kernel(x, y).sum() / size**2
    return KidResult(float(values.mean()), float(values.std()), num_subsets, size)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a·b/d + 1)³ for all pairs of rows, [len(a), len(b)]."""
    base = a @ b.T / a.shape[1] + 1
    return base * base * base


def _off_diagonal_sum(matrix: np.ndarray) -> float:
    return float(matrix.sum() - np.trace(matrix))
