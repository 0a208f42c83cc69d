"""Kernel distance between two sets of features and its error. Knows rows of numbers; nothing of images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 2048
"""Rows of a block of kernel values: 2048² float64 are 32 MiB, and a few such arrays live at once."""

MAX_ERROR_ROWS = 4000
"""Rows of each side that the standard error is estimated from where the value needs no pass over all pairs."""


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
        std_error: Standard error of `mean` over other draws of the generated rows and subsets, with the real rows as
            they are. See `kernel_distance`.
        full: The unbiased squared MMD of all rows, which has no noise of subsets; None where not all pairs were needed.
    """

    mean: float
    std: float
    num_subsets: int
    subset_size: int
    std_error: float = 0.0
    full: float | None = None


def kernel_distance(
    f1: np.ndarray,
    f2: np.ndarray,
    *,
    num_subsets: int = 100,
    max_subset_size: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> KidResult:
    """Squared MMD of two feature sets under the kernel (a·b/d + 1)³, averaged over random subsets.

    Each subset draws m = min(N1, N2, max_subset_size) rows without replacement, from `f2` first, then from `f1`, out of
    one stream that belongs to this call. `kernel_distance(real, gen)` thus draws the fakes first, as the ADA family
    does, and equals clean-fid's function of the same name after `np.random.seed(seed)`, with equal argument order.
    Computed in float64; there is no factor of 1000.

    Where all pairs of rows are fewer than those of all subsets, every kernel value is computed once, block by block,
    and the sums of all subsets are quadratic forms vᵀKv with their indicator vectors; otherwise subset by subset.

    The standard error is that of the U-statistic of all rows, plus std²/(num_subsets - 1) for the draw of subsets. With
    g(y) = 2 (E k(y, y') - E k(x, y)), its square is Var g / N2 + 2 τ² / N2²; Var g is the covariance of two estimates
    of g from disjoint halves of the rows, so that their noise does not count, and τ² comes from their difference.

    Args:
        f1: Features [N1, D], real.
        f2: Features [N2, D], generated.
        num_subsets: At least 1.
        max_subset_size: At least 2.
        seed: In [0, 2^32).
        device: Where the kernel is computed; it must know float64.

    Raises:
        ValueError: For shapes that do not fit, fewer than two rows, or non-finite numbers.

    Source: Bińkowski et al. 2018, section 4; unbiased estimator: Gretton et al. 2012, Eq. 3; variance: ibid. section 5.
    """
    f1, f2 = np.asarray(f1), np.asarray(f2)
    if f1.ndim != 2 or f2.ndim != 2 or f1.shape[1] != f2.shape[1]:
        raise ValueError(f"got features of shapes {f1.shape} and {f2.shape}, wanted [N1, D] and [N2, D]")
    size = min(len(f1), len(f2), max_subset_size)
    if size < 2 or num_subsets < 1:
        raise ValueError(f"got {num_subsets} subsets of {size} rows, wanted at least 1 subset of at least 2 rows")
    if not (np.isfinite(f1).all() and np.isfinite(f2).all()):
        raise ValueError("the features hold non-finite numbers; look for NaN in the images or the network")
    draws = _draws(len(f1), len(f2), num_subsets, size, seed)
    x, y = (torch.as_tensor(np.asarray(rows, np.float64), device=device) for rows in (f1, f2))
    all_pairs = (len(f1) ** 2 + len(f2) ** 2) / 2 + len(f1) * len(f2)
    if all_pairs * (1 + num_subsets / f1.shape[1]) <= 3 * num_subsets * size**2:
        values, full, variance = _all_pairs(x, y, draws)
    else:
        values = np.array([_subset_value(x[real], y[fake]) for fake, real in draws])
        full, variance = None, _variance_of_some(x, y, seed)
    std = float(values.std())
    error = float(np.sqrt(variance + std**2 / max(num_subsets - 1, 1)))
    return KidResult(float(values.mean()), std, num_subsets, size, error, full)


def _draws(num1: int, num2: int, num_subsets: int, size: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows of f2, rows of f1) of every subset."""
    rng = np.random.RandomState(seed)  # this legacy generator, because published figures were drawn with it
    return [(rng.choice(num2, size, replace=False), rng.choice(num1, size, replace=False)) for _ in range(num_subsets)]


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(a·b/d + 1)³ for all pairs of rows, [len(a), len(b)]."""
    base = torch.addmm(a.new_ones(1, 1), a, b.T, alpha=1 / a.shape[1])
    return base.square().mul_(base)


def _subset_value(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased squared MMD of two sets of equally many rows."""
    size = len(x)
    within = 0.0
    for rows in (x, y):
        kernel = _kernel(rows, rows)
        within += float(kernel.sum() - kernel.trace())
    return within / (size * (size - 1)) - 2 * float(_kernel(x, y).sum()) / size**2


def _all_pairs(
    x: torch.Tensor, y: torch.Tensor, draws: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, float, float]:
    """Values of all subsets, the value of all rows, and the variance of the latter, from each kernel value once."""
    size = len(draws[0][0])
    in_x, in_y = _indicators(x, [real for _, real in draws]), _indicators(y, [fake for fake, _ in draws])
    xx, own_x = _within(x, in_x)
    yy, own_y = _within(y, in_y)
    xy = _across(x, in_x, y)  # [N2, …]
    values = ((in_x * (xx - own_x * in_x)).sum(0) + (in_y * (yy - own_y * in_y)).sum(0)) / (size * (size - 1))
    values -= 2 * (in_y * xy).sum(0) / size**2
    ones, num_x, num_y = -3, len(x), len(y)
    full = (xx[:, ones].sum() - own_x.sum()) / (num_x * (num_x - 1)) - 2 * xy[:, ones].sum() / (num_x * num_y)
    full += (yy[:, ones].sum() - own_y.sum()) / (num_y * (num_y - 1))
    halves_y = (yy[:, -2:] - own_y * in_y[:, -2:]) / (in_y[:, -2:].sum(0) - in_y[:, -2:])
    halves = 2 * (halves_y - xy[:, ones, None] / num_x)
    return values[:ones].cpu().numpy(), float(full), _variance(halves, num_y, num_y)


def _variance_of_some(x: torch.Tensor, y: torch.Tensor, seed: int) -> float:
    """`_variance` with the means of the kernel taken over at most `MAX_ERROR_ROWS` rows of each side."""
    rng = np.random.RandomState(seed)
    some_x, some_y = (rows[rng.permutation(len(rows))[:MAX_ERROR_ROWS]] for rows in (x, y))
    in_x, in_y = _indicators(some_x, []), _indicators(some_y, [])
    yy, own_y = _within(some_y, in_y)
    xy = _across(some_x, in_x, some_y)
    halves_y = (yy[:, -2:] - own_y * in_y[:, -2:]) / (in_y[:, -2:].sum(0) - in_y[:, -2:])
    return _variance(2 * (halves_y - xy[:, -2:] / in_x[:, -2:].sum(0)), len(some_y), len(y))


def _variance(halves: torch.Tensor, num_means: int, num: int) -> float:
    """Variance of the distance over other draws of `num` generated rows.

    Args:
        halves: Two estimates of g at each of some rows, [rows, 2], from disjoint halves of `num_means` rows.
        num_means: See `halves`.
        num: N2.
    """
    first, second = halves.T - halves.mean(0)[:, None]
    covariance = float((first * second).mean())
    noise = float((first - second).square().mean()) * num_means / 16  # τ²
    return max(covariance, 0.0) / num + 2 * noise / num**2


def _indicators(rows: torch.Tensor, subsets: list[np.ndarray]) -> torch.Tensor:
    """Which rows are in which subset, then in all, in the even and in the odd ones: float64 [N, subsets + 3]."""
    matrix = rows.new_zeros(len(rows), len(subsets) + 3)
    for i, subset in enumerate(subsets):
        matrix[subset, i] = 1
    matrix[:, -3] = 1
    matrix[0::2, -2] = 1
    matrix[1::2, -1] = 1
    return matrix


def _blocks(num: int) -> Iterator[slice]:
    for first in range(0, num, BLOCK):
        yield slice(first, min(first + BLOCK, num))


def _within(rows: torch.Tensor, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K(rows, rows) members [N, S], and K's diagonal [N, 1]; each block above the diagonal serves the one below it."""
    product = torch.zeros_like(members)
    for above in _blocks(len(rows)):
        for right in _blocks(len(rows)):
            if right.start < above.start:
                continue
            kernel = _kernel(rows[above], rows[right])
            product[above] += kernel @ members[right]
            if right != above:
                product[right] += kernel.T @ members[above]
    base = rows.square().sum(1, keepdim=True) / rows.shape[1] + 1
    return product, base**3


def _across(x: torch.Tensor, members: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """K(y, x) members, [len(y), S]."""
    product = members.new_zeros(len(y), members.shape[1])
    for here in _blocks(len(y)):
        for there in _blocks(len(x)):
            product[here] += _kernel(y[here], x[there]) @ members[there]
    return product
