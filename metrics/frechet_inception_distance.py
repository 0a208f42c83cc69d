"""Fréchet distance between two Gaussians. Knows means and covariances; knows nothing of images or networks."""

import numpy as np


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
