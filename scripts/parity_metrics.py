"""Our metrics against clean-fid, torch-fidelity, scikit-learn and closed forms, on the same features, as a table.

Prints two Markdown tables: agreement, and how well the standard errors foretell what other draws show. With --write
FILE they replace what stands between the file's markers. What is not installed is left out and named.
Usage: python scripts/parity_metrics.py [--write docs/metrics.md]
"""

import argparse
import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from metrics.feature_stats import FeatureStats
from metrics.features import MetricUnavailable, cleanfid_module, torch_fidelity_module
from metrics.frechet_inception_distance import FrechetReference, frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel_inception_distance import kernel_distance
from metrics.neighbours import manifolds, memorisation

Row = tuple[str, str, float, float, float]  # figure, against, ours, theirs, bound of the relative difference


def features(num_features: int = 128, num_real: int = 900, num_fake: int = 700) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of non-negative, correlated rows, as pooled features are; float32."""
    rng = np.random.RandomState(0)
    mix = rng.randn(num_features, num_features) / num_features**0.5
    real = np.maximum(rng.randn(num_real, num_features) @ mix + 0.3, 0)
    fake = np.maximum(rng.randn(num_fake, num_features) @ mix * 1.1 + 0.35, 0)
    return real.astype(np.float32), fake.astype(np.float32)


def statistics(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased covariance, streamed in batches."""
    stats = FeatureStats(rows.shape[1])
    for part in np.array_split(rows, 7):
        stats.append(part)
    return stats.mean, stats.cov("cleanfid")


def clean_fid_rows(real: np.ndarray, fake: np.ndarray) -> Iterator[Row]:
    """FID and KID by clean-fid's own functions."""
    theirs = cleanfid_module("fid")
    (mu1, sigma1), (mu2, sigma2) = statistics(fake), statistics(real)
    ours = frechet_distance(mu1, sigma1, mu2, sigma2)
    yield "FID", "clean-fid", ours, float(theirs.frechet_distance(mu1, sigma1, mu2, sigma2)), 1e-6
    for subsets, size in ((100, 1000), (20, 100)):
        np.random.seed(3)
        expected = theirs.kernel_distance(real, fake, num_subsets=subsets, max_subset_size=size)
        value = kernel_distance(real, fake, num_subsets=subsets, max_subset_size=size, seed=3).mean
        yield f"KID, {subsets} subsets of at most {size}", "clean-fid, float32", value, float(expected), 1e-4
        np.random.seed(3)
        exact = [rows.astype(np.float64) for rows in (real, fake)]
        expected = theirs.kernel_distance(*exact, num_subsets=subsets, max_subset_size=size)
        yield f"KID, {subsets} subsets of at most {size}", "clean-fid, float64", value, float(expected), 1e-9


def torch_fidelity_rows(real: np.ndarray, fake: np.ndarray) -> Iterator[Row]:
    """The same, precision and recall, and the Inception score by torch-fidelity's functions."""
    tensors = [torch.from_numpy(rows.astype(np.float64)) for rows in (fake, real)]
    fid = torch_fidelity_module("metric_fid")
    moments = [fid.fid_features_to_statistics(rows) for rows in tensors]
    expected = fid.fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    yield "FID", "torch-fidelity", frechet_distance(*statistics(fake), *statistics(real)), float(expected), 1e-5
    kid = torch_fidelity_module("metric_kid").kid_features_to_metric(
        *tensors, kid_subsets=30, kid_subset_size=200, rng_seed=5, verbose=False
    )
    ours = kernel_distance(real, fake, num_subsets=30, max_subset_size=200, seed=5)
    yield "KID, 30 subsets of 200", "torch-fidelity", ours.mean, kid["kernel_inception_distance_mean"], 1e-9
    yield "spread of KID", "torch-fidelity", ours.std, kid["kernel_inception_distance_std"], 1e-7
    prc = torch_fidelity_module("metric_prc").prc_features_to_metric(
        *tensors, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, verbose=False
    )
    balls = manifolds(real, fake)
    yield "precision, k = 3", "torch-fidelity", balls.precision, prc["precision"], 1e-6
    yield "recall, k = 3", "torch-fidelity", balls.recall, prc["recall"], 1e-6
    logits = np.random.RandomState(1).randn(700, 40) * 2
    isc = torch_fidelity_module("metric_isc").isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    score = inception_score(torch.from_numpy(logits).softmax(1).numpy())
    yield "Inception score", "torch-fidelity", score.mean, isc["inception_score_mean"], 1e-9
    yield "its spread over splits", "torch-fidelity", score.std, isc["inception_score_std"], 1e-7


def scikit_learn_rows(real: np.ndarray, fake: np.ndarray) -> Iterator[Row]:
    """Kernel sums and nearest neighbours by scikit-learn."""
    from sklearn.metrics.pairwise import polynomial_kernel
    from sklearn.neighbors import NearestNeighbors

    x, y = real[:700].astype(np.float64), fake.astype(np.float64)
    xx, yy, xy = (polynomial_kernel(a, b, degree=3, gamma=1 / a.shape[1], coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    expected = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (len(x) * (len(x) - 1)) - 2 * xy.mean()
    yield "squared MMD of all rows", "scikit-learn's kernel", kernel_distance(x, y, num_subsets=1).mean, expected, 1e-9
    x = real.astype(np.float64)
    found = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(x)
    copies, (nearest, _) = memorisation(real, fake), found.kneighbors(y, 1)
    yield "mean distance to the nearest", "scikit-learn", float(copies.distances.mean()), float(nearest.mean()), 1e-7
    own = found.kneighbors(x, 6)[0]
    yield "threshold of copies", "scikit-learn", copies.threshold, float(np.quantile(own[:, 1], 0.05)), 1e-7
    across = np.sqrt(np.maximum(((x[:, None] - y[None, :, :]) ** 2).sum(2), 0))
    inside, balls = across <= own[:, 5:6], manifolds(real, fake)
    yield "density, k = 5", "definition, with its radii", balls.density, float(inside.sum(0).mean() / 5), 1e-9
    yield "coverage, k = 5", "definition, with its radii", balls.coverage, float(inside.any(1).mean()), 1e-9


def closed_form_rows() -> Iterator[Row]:
    """Gaussians that commute, and the limit of infinitely many rows."""
    rng = np.random.RandomState(2)
    basis, _ = np.linalg.qr(rng.randn(64, 64))
    var1, var2, mu = rng.rand(64) * 4, rng.rand(64) * 9, rng.randn(64)
    expected = mu @ mu + ((np.sqrt(var1) - np.sqrt(var2)) ** 2).sum()
    first, second = basis * var1 @ basis.T, basis * var2 @ basis.T
    yield "FID of Gaussians that commute", "closed form", frechet_distance(mu, first, 0 * mu, second), expected, 1e-12
    rows = mu + rng.randn(3000, 64) * np.sqrt(var1) @ basis.T
    limit = FrechetReference(0 * mu, second).infinity(rows)
    yield "FID∞ from 3000 rows", "closed form", limit.value, expected, 0.05


def agreement() -> tuple[list[str], bool]:
    """The table's lines, and whether every difference keeps to its bound."""
    real, fake = features()
    lines = ["| figure | against | ours | theirs | relative difference | bound |", "|---|---|---|---|---|---|"]
    good = True
    sources: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        ("clean-fid", lambda: clean_fid_rows(real, fake)),
        ("torch-fidelity", lambda: torch_fidelity_rows(real, fake)),
        ("scikit-learn", lambda: scikit_learn_rows(real, fake)),
        ("closed forms", closed_form_rows),
    ]
    for name, rows in sources:
        try:
            for figure, against, ours, theirs, bound in rows():
                difference = abs(ours - theirs) / abs(theirs)
                good = good and difference <= bound
                lines.append(f"| {figure} | {against} | {ours:.8g} | {theirs:.8g} | {difference:.1e} | {bound:.0e} |")
        except (ImportError, MetricUnavailable, TypeError) as error:
            lines.append(f"| not compared: {' '.join(str(error).split())} | {name} | | | | |")
    return lines, good


def errors(num_draws: int = 100) -> list[str]:
    """How the standard errors compare with the standard deviation of the figures over independent draws."""
    lines = ["| figure | D | N | generated | told / seen |", "|---|---|---|---|---|"]
    for num_features, num, shift in ((16, 400, 0.3), (16, 400, 0.0), (64, 1000, 0.0), (64, 40, 0.3), (64, 40, 0.0)):
        rng = np.random.RandomState(0)
        mix = (
            rng.randn(num_features, num_features)
            / num_features**0.5
            * np.exp(-3 * np.arange(num_features) / num_features)
        )
        other = mix + shift * rng.randn(num_features, num_features) / num_features**0.5
        real = rng.randn(600, num_features) @ mix.T
        reference = FrechetReference(np.zeros(num_features), mix @ mix.T)
        frechet, told, kernel, kernel_told = [], [], [], []
        for seed in range(num_draws):
            rows = rng.randn(num, num_features) @ other.T + shift / num_features**0.5
            frechet.append(reference.distance(rows))
            told.append(reference.std_error(rows))
            kid = kernel_distance(real, rows, num_subsets=20, max_subset_size=min(100, num // 2), seed=seed)
            kernel.append(kid.mean)
            kernel_told.append(kid.std_error)
        what = "other distribution" if shift else "same distribution"
        for name, values, guess in (("FID", frechet, told), ("KID", kernel, kernel_told)):
            ratio = float(np.sqrt(np.mean(np.square(guess))) / np.std(values))
            lines.append(f"| {name} | {num_features} | {num} | {what} | {ratio:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", type=Path, help="Markdown file with the markers <!-- parity --> and <!-- errors -->."
    )
    arguments = parser.parse_args()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        table, good = agreement()
        guesses = errors()
    print("\n".join([*table, "", *guesses]))
    if arguments.write:
        text = arguments.write.read_text(encoding="utf-8")
        for name, lines in (("parity", table), ("errors", guesses)):
            start, _, rest = text.partition(f"<!-- {name} -->\n")
            text = f"{start}<!-- {name} -->\n" + "\n".join(lines) + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
        arguments.write.write_text(text, encoding="utf-8")
    if not good:
        sys.exit("a difference exceeds its bound")


if __name__ == "__main__":
    main()
