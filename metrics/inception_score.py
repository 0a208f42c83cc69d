"""Inception score of class probabilities. Knows rows of probabilities; knows nothing of images or networks."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class InceptionScore:
    """exp of the mean divergence of images' class probabilities from their average; higher is better.

    Attributes:
        mean: Mean over splits.
        std: Population standard deviation over splits, as the ADA family reports it.
        std_error: Standard error of `mean`: the sample standard deviation over splits / √splits. 0 for one split.
        num_splits: How many.
    """

    mean: float
    std: float
    std_error: float
    num_splits: int


def inception_score(probabilities: np.ndarray, *, num_splits: int = 10) -> InceptionScore:
    """Inception score over consecutive splits.

    Args:
        probabilities: Rows [N, classes] that each sum to 1.
        num_splits: At least 1, at most N. Split i holds the rows from ⌊i N / splits⌋ to ⌊(i + 1) N / splits⌋.

    Raises:
        ValueError: For another shape, fewer rows than splits, or rows that are no probabilities.

    Source: Salimans et al. 2016, section 4; Barratt & Sharma 2018 for what it does not tell.
    """
    rows = np.asarray(probabilities, np.float64)
    if rows.ndim != 2 or not 1 <= num_splits <= len(rows):
        raise ValueError(f"got probabilities of shape {rows.shape} and {num_splits} splits, wanted [splits or more, C]")
    if not (np.isfinite(rows).all() and (rows >= 0).all() and np.allclose(rows.sum(1), 1, atol=1e-3)):
        raise ValueError("the rows are no probabilities: each must be non-negative and sum to 1")
    scores = []
    for i in range(num_splits):
        part = rows[i * len(rows) // num_splits : (i + 1) * len(rows) // num_splits]
        average = np.broadcast_to(part.mean(axis=0), part.shape)
        log_ratio = np.zeros_like(part)
        np.log(np.divide(part, average, out=np.ones_like(part), where=part > 0), out=log_ratio)
        scores.append(np.exp((part * log_ratio).sum(axis=1).mean()))
    std = float(np.std(scores))
    error = float(np.std(scores, ddof=1) / num_splits**0.5) if num_splits > 1 else 0.0
    return InceptionScore(float(np.mean(scores)), std, error, num_splits)
