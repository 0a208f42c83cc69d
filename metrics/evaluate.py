"""Images in, `MetricResult` out: distances, overlap and copies between two streams of images, and their provenance.

Pure and seeded: nothing here draws from, or advances, the global random streams. Knows no data set class and no network
class; a folder, a data set and a generator are all iterables of uint8 batches.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from metrics import feature_stats
from metrics.feature_stats import COVARIANCES, FeatureStats, Source
from metrics.features import FeatureExtractor, MetricUnavailable
from metrics.frechet_inception_distance import FrechetReference, frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel_inception_distance import kernel_distance
from metrics.neighbours import ManifoldResult, manifolds, memorisation
from torch_utils import images as image_utils
from torch_utils import seeding

METRICS = ("fid", "kid")
FIGURES = ("fid", "kid", "fid_inf", "pr", "dc", "is", "memorisation")
"""All that `evaluate` computes from one pass over the features."""

FEW = {"kid": 50, "pr": 1000, "dc": 1000, "is": 5000, "memorisation": 100}
"""Below so many images a figure carries a warning; FID's limit is the number of features."""

MAX_ERROR_ROWS = 10_000
"""Generated rows that the standard error of FID is estimated from."""

HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage", "is", "is50k_mean")

Images = Iterable[torch.Tensor | np.ndarray] | FeatureStats


@dataclass(frozen=True)
class MetricResult:
    """One figure and its provenance.

    Attributes:
        name: `fid`, `kid`, `fid_inf` for Inception features; `fd`, `kd`, `fd_inf` for those of any other network;
            `precision`, `recall`, `density`, `coverage`, `is`, `memorisation`, `ppl`; or a name of the family such as
            `fid50k_full`.
        value: The figure. KID and KD may be slightly negative.
        spread: KID and KD: standard deviation over subsets (see `KidResult.std`); Inception score: over splits. None
            otherwise.
        num_real: Real images; 0 where precomputed statistics do not tell.
        num_fake: Generated images.
        extractor: Name of the feature extractor.
        digest: SHA-256 of its weights.
        resize: How images reached its input size.
        covariance: Fréchet distances: `nvidia` (divided by n) or `cleanfid` (by n - 1). None for others.
        num_subsets: KID and KD: number of subset pairs; Inception score: splits. None for others.
        subset_size: KID and KD: images in each. None for others.
        seed: Seed of the generated images and of the subset draws.
        seconds: Feature extraction (shared by all figures of one evaluation) plus this figure's own arithmetic.
        std_error: How much `value` would move with other generated images against the same real ones; None if unknown.
        warning: One line where there are too few images for what the figure claims.
        metric: What was asked for; one metric can give several figures.
        details: More numbers of this figure.
    """

    name: str
    value: float
    spread: float | None
    num_real: int
    num_fake: int
    extractor: str
    digest: str
    resize: str
    covariance: str | None
    num_subsets: int | None
    subset_size: int | None
    seed: int
    seconds: float
    std_error: float | None = None
    warning: str | None = None
    metric: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name as people read it: FID, KID, FD, KD, precision, …"""
        short = {"fid_inf": "FID∞", "fd_inf": "FD∞", "is": "Inception score", "ppl": "PPL", "fpl": "FPL"}
        return short.get(self.name, self.name.upper() if self.name in ("fid", "kid", "fd", "kd") else self.name)

    @property
    def lower_is_better(self) -> bool:
        """Which way is better."""
        return not self.name.endswith(HIGHER_IS_BETTER)

    @property
    def text(self) -> str:
        """Label, value and standard error as one short text: `KD 0.1234 ± 0.0021`."""
        error = f" ± {self.std_error:.2g}" if self.std_error is not None else ""
        return f"{self.label} {self.value:.4g}{error}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def headline(results: Sequence[MetricResult]) -> MetricResult | None:
    """The figure to go by: the Fréchet distance, but the kernel distance where there are too few images for that."""
    for names, sure in ((("fid", "fd"), True), (("kid", "kd"), False), (("fid", "fd"), False)):
        for row in results:
            short = row.name.split("50k")[0]
            if short in names and not (sure and row.warning):
                return row
    return next((row for row in results if row.name != "memorisation"), None)


def combine(repeats: Sequence[Sequence[MetricResult]]) -> list[MetricResult]:
    """One list of results from several of the same figures over different generator seeds.

    Value: the mean; `std_error`: sample standard deviation over the repeats / √repeats, which assumes nothing.
    """
    if len(repeats) == 1:
        return list(repeats[0])
    rows = []
    for same in zip(*repeats):
        values = np.array([row.value for row in same])
        details = {**same[0].details, "repeats": values.tolist(), "seeds": [row.seed for row in same]}
        error = float(values.std(ddof=1) / len(values) ** 0.5)
        seconds = sum(row.seconds for row in same)
        rows.append(
            dataclasses.replace(same[0], value=float(values.mean()), std_error=error, details=details, seconds=seconds)
        )
    return rows


def evaluate(
    extractor: FeatureExtractor,
    reals: Images,
    fakes: Images,
    *,
    metrics: Sequence[str] = METRICS,
    seed: int = 0,
    covariance: str | None = None,
    num_subsets: int = 100,
    max_subset_size: int | None = None,
    max_rows: int = feature_stats.MAX_ROWS,
    k: int = 3,
    density_k: int = 5,
    num_splits: int = 10,
    probabilities: np.ndarray | None = None,
    train: FeatureStats | None = None,
    held_out: FeatureStats | None = None,
    device: torch.device | str = "cpu",
) -> list[MetricResult]:
    """Measure how far generated images are from real ones, all figures from one pass over the features.

    Memory: D² numbers and at most `max_rows` feature rows per side, however many images there are.

    Args:
        extractor: Where features come from; also decides whether the figures are called FID and KID or FD and KD.
        reals: Batches uint8 [N, 3 or 1, H, W], or statistics made earlier with the same extractor.
        fakes: The same for the generated images.
        metrics: Any of `FIGURES`, in the wanted order; with a network other than Inception `fid` and `kid` give `fd`
            and `kd`.
        seed: Seed of the kernel distance's subsets.
        covariance: `nvidia` (divide by n) or `cleanfid` (by n - 1); None takes `nvidia` for `legacy_tensorflow`
            resizing, for figures as in the ADA family, and `cleanfid` otherwise.
        num_subsets: Kernel distance: subset pairs.
        max_subset_size: Kernel distance: largest subset. None takes 1000, but at most half of the smaller side: subsets
            that are the whole set would all be equal and have no spread. 1000 reproduces the ADA family's subsets.
        max_rows: Most feature rows kept per side.
        k: Neighbours of precision and recall.
        density_k: Neighbours of density and coverage.
        num_splits: Splits of the Inception score.
        probabilities: Inception score: class probabilities of the generated images; None asks the extractor for them.
        train: Memorisation: what the generator was trained on; None takes `reals`.
        held_out: Memorisation: images of the same kind that it was not trained on.
        device: Where distances and kernels are computed; it must know float64.

    Raises:
        ValueError: For unknown metrics or conventions, images of another type, statistics of another extractor.
        MetricUnavailable: If there are too few images or the numbers do not allow a figure. Never fatal to training.
    """
    for metric in metrics:
        if metric not in FIGURES:
            raise ValueError(f"got metric {metric!r}, wanted any of {', '.join(FIGURES)}")
    if covariance is None:
        covariance = "nvidia" if extractor.resize == "legacy_tensorflow" else "cleanfid"
    if covariance not in COVARIANCES:
        raise ValueError(f"got covariance convention {covariance!r}, wanted one of {', '.join(COVARIANCES)}")
    classes = _class_probabilities(extractor) if "is" in metrics and probabilities is None else None
    start = time.perf_counter()
    real_stats = _stats_of(reals, extractor, "reals", max_rows)
    fake_stats = _stats_of(fakes, extractor, "fakes", max_rows, classes.append if classes else None)
    features_sec = time.perf_counter() - start
    balls = k if "pr" in metrics else density_k, density_k if "dc" in metrics else k
    work = _Work(real_stats, fake_stats, covariance, seed, torch.device(device), balls)
    computations: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "fid": work.frechet,
        "kid": lambda: work.kernel(num_subsets, max_subset_size),
        "fid_inf": work.infinity,
        "pr": work.precision_recall,
        "dc": work.density_coverage,
        "is": lambda: work.inception_score(classes.rows() if classes else probabilities, num_splits),
        "memorisation": lambda: work.memorisation(train, held_out),
    }
    results = []
    for metric in metrics:
        start = time.perf_counter()
        try:
            rows = computations[metric]()
        except np.linalg.LinAlgError as error:
            raise MetricUnavailable(f"{metric} cannot be computed from these features: {error}") from error
        seconds = features_sec + time.perf_counter() - start
        for row in rows:
            if extractor.headline != "FID":
                row["name"] = {"fid": "fd", "kid": "kd", "fid_inf": "fd_inf"}.get(row["name"], row["name"])
            blank = {"spread": None, "covariance": None, "num_subsets": None, "subset_size": None, "metric": metric}
            results.append(
                MetricResult(
                    **{
                        **blank,
                        "num_real": real_stats.num,
                        "num_fake": fake_stats.num,
                        **vars(Source.of(extractor)),
                        "seed": seed,
                        "seconds": seconds,
                        **row,
                    }
                )
            )
    return results


def generated_images(
    G: torch.nn.Module,
    *,
    num: int,
    seed: int,
    batch_size: int = 32,
    labels: np.ndarray | torch.Tensor | None = None,
    truncation_psi: float = 1.0,
    noise_mode: str = "const",
    device: torch.device | str = "cpu",
    batches: slice = slice(None),
    **synthesis_kwargs: Any,
) -> Iterator[torch.Tensor]:
    """Images of a generator, batch by batch, from random streams of their own.

    Latent and label of image i depend on (seed, i) alone, so another batch size gives the same images (up to the
    rounding of other matrix sizes); with `noise_mode="random"` the noise depends on the batch as well. The generator
    is put into evaluation mode for each batch and left as it was; the global random state is the same afterwards.

    Args:
        G: Module with `z_dim` and `c_dim`, called as `G(z, c, truncation_psi=…, noise_mode=…)`, giving [N, C, H, W]
            in about [-1, 1]. It must already be on `device`.
        num: How many images.
        seed: Seed of latents, labels and noise.
        batch_size: Most images at once.
        labels: Conditional networks: rows [M, c_dim] from which labels are drawn uniformly, e.g. those of the data set.
        truncation_psi: 1 shows the network's whole distribution.
        noise_mode: `const` or `random`.
        device: Where `G` is.
        batches: Which of the batches to make, e.g. every second one where two processes share the work.
        synthesis_kwargs: Passed on to `G`, for instance `force_fp32=True`.

    Yields:
        uint8 [N, C, H, W] on `device`, truncated as metrics of this family do: ⌊clamp(127.5 x + 128, 0, 255)⌋.

    Raises:
        ValueError: For an unknown noise mode, or labels that do not fit the network.
        MetricUnavailable: If the generator gives non-finite pixels.
    """
    c_dim = int(G.c_dim)  # type: ignore[arg-type]
    if noise_mode not in ("const", "random"):
        raise ValueError(f"got noise_mode {noise_mode!r}, wanted 'const' or 'random'")
    if num < 0 or batch_size < 1:
        raise ValueError(f"got num {num} and batch_size {batch_size}, wanted at least 0 and 1")
    if c_dim and (labels is None or len(labels) == 0 or labels.shape[1] != c_dim):
        got = "none" if labels is None else f"shape {tuple(labels.shape)}"
        raise ValueError(f"the network wants labels of {c_dim} numbers, got {got}; pass the data set's label rows")
    pool = torch.as_tensor(labels, dtype=torch.float32) if c_dim else torch.zeros(1, 0)
    firsts = range(0, num, batch_size)[batches]
    return _generate(G, num, seed, batch_size, firsts, pool, noise_mode, device, truncation_psi, synthesis_kwargs)


def _generate(
    G: torch.nn.Module,
    num: int,
    seed: int,
    batch_size: int,
    firsts: range,
    pool: torch.Tensor,
    noise_mode: str,
    device: torch.device | str,
    truncation_psi: float,
    synthesis_kwargs: dict[str, Any],
) -> Iterator[torch.Tensor]:
    for first in firsts:
        streams = [
            seeding.generator(seed, "evaluate", "latents", i) for i in range(first, min(first + batch_size, num))
        ]
        z = torch.stack([torch.randn(int(G.z_dim), generator=stream) for stream in streams])  # type: ignore[arg-type]
        c = torch.stack([pool[int(torch.randint(len(pool), (1,), generator=stream))] for stream in streams])
        # Every context ends before the yield: what the caller does between two batches must not run under them.
        with torch.inference_mode(), _eval_mode(G), seeding.scoped(seed, "evaluate", "noise", first):
            x = G(z.to(device), c.to(device), truncation_psi=truncation_psi, noise_mode=noise_mode, **synthesis_kwargs)
        if not torch.isfinite(x).all():
            raise MetricUnavailable("the generator gives non-finite pixels, so there is nothing to measure")
        yield image_utils.opaque(image_utils.to_uint8(x, rounding="truncate"))


@contextlib.contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


class _ClassProbabilities:
    """Collects the class probabilities of the images that pass by."""

    def __init__(self, probabilities: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._probabilities = probabilities
        self._rows: list[np.ndarray] = []

    def append(self, images: torch.Tensor) -> None:
        self._rows.append(self._probabilities(images).cpu().numpy())

    def rows(self) -> np.ndarray:
        return np.concatenate(self._rows)


def _class_probabilities(extractor: FeatureExtractor) -> _ClassProbabilities:
    probabilities = getattr(extractor, "probabilities", None)
    if probabilities is None:
        raise MetricUnavailable(
            f"the Inception score needs class probabilities, which {extractor.name} does not give: "
            "use --detector inception with --detector-mode clean or legacy_tensorflow"
        )
    return _ClassProbabilities(probabilities)


def _stats_of(
    images: Images,
    extractor: FeatureExtractor,
    what: str,
    max_rows: int,
    also: Callable[[torch.Tensor], None] | None = None,
) -> FeatureStats:
    if isinstance(images, FeatureStats):
        if images.source != Source.of(extractor):
            raise ValueError(f"the statistics of the {what} are of {images.source}, wanted {Source.of(extractor)}")
        if also is not None:
            raise ValueError("the Inception score needs the generated images, not their statistics")
        stats = images
    else:
        stats = feature_stats.accumulate(images, extractor, max_rows=max_rows, also=also)
    if stats.num < 2 and not isinstance(stats, feature_stats.Precomputed):
        raise MetricUnavailable(f"got {stats.num} images as {what}, a distance needs at least 2")
    return stats


@dataclass
class _Work:
    """Two sets of statistics and every figure of them, as rows for `MetricResult`."""

    reals: FeatureStats
    fakes: FeatureStats
    covariance: str
    seed: int
    device: torch.device
    balls: tuple[int, int]
    """Neighbours of precision and recall, and of density and coverage."""

    def frechet(self) -> list[dict[str, Any]]:
        mu, sigma = self.reals.mean, self.reals.cov(self.covariance)
        value = frechet_distance(self.fakes.mean, self.fakes.cov(self.covariance), mu, sigma)
        return [
            {
                "name": "fid",
                "value": value,
                "std_error": self._frechet_error(FrechetReference(mu, sigma)),
                "covariance": self.covariance,
                "warning": self._rank_warning(),
            }
        ]

    def infinity(self) -> list[dict[str, Any]]:
        reference = FrechetReference(self.reals.mean, self.reals.cov(self.covariance))
        try:
            result = reference.infinity(self.fakes.features(), seed=self.seed, ddof=self._ddof)
        except ValueError as error:
            raise MetricUnavailable(str(error)) from error
        row = {"name": "fid_inf", "value": result.value, "std_error": result.std_error, "covariance": self.covariance}
        return [{**row, "warning": self._rank_warning(), "details": {"sizes": list(result.sizes)}}]

    def kernel(self, num_subsets: int, max_subset_size: int | None) -> list[dict[str, Any]]:
        f1, f2 = self._rows(self.reals), self.fakes.features()
        if max_subset_size is None:
            max_subset_size = max(2, min(1000, len(f1) // 2, len(f2) // 2))
        kid = kernel_distance(
            f1, f2, num_subsets=num_subsets, max_subset_size=max_subset_size, seed=self.seed, device=self.device
        )
        return [
            {
                "name": "kid",
                "value": kid.mean,
                "spread": kid.std if np.isfinite(kid.std) else None,
                "std_error": kid.std_error if np.isfinite(kid.std_error) else None,  # of two images there is none
                "num_subsets": kid.num_subsets,
                "subset_size": kid.subset_size,
                "warning": self._few("kid", "its standard error is rough itself"),
            }
        ]

    def precision_recall(self) -> list[dict[str, Any]]:
        m = self._manifolds
        warning = self._few("pr", "precision and recall depend on the number: compare at equal numbers only")
        return [
            {"name": "precision", "value": m.precision, "std_error": m.precision_error, "warning": warning},
            {"name": "recall", "value": m.recall, "std_error": m.recall_error, "warning": warning},
        ]

    def density_coverage(self) -> list[dict[str, Any]]:
        m = self._manifolds
        warning = self._few("dc", "density and coverage depend on the number: compare at equal numbers only")
        return [
            {"name": "density", "value": m.density, "std_error": m.density_error, "warning": warning},
            {"name": "coverage", "value": m.coverage, "std_error": m.coverage_error, "warning": warning},
        ]

    def inception_score(self, probabilities: np.ndarray | None, num_splits: int) -> list[dict[str, Any]]:
        assert probabilities is not None
        score = inception_score(probabilities, num_splits=min(num_splits, len(probabilities)))
        return [
            {
                "name": "is",
                "value": score.mean,
                "spread": score.std,
                "std_error": score.std_error,
                "num_subsets": score.num_splits,
                "warning": self._few("is", "small splits bias it low: compare at equal numbers only", reals=False),
            }
        ]

    def memorisation(self, train: FeatureStats | None, held_out: FeatureStats | None) -> list[dict[str, Any]]:
        rows = self._rows(train or self.reals)
        fakes = self.fakes.features()
        others = held_out.features() if held_out is not None else None
        result = memorisation(rows, fakes, held_out=others, device=self.device)
        order = np.argsort(result.distances, kind="stable")[:20]
        details = {
            "num_train": len(rows),
            "threshold": result.threshold,
            "expected_share": result.quantile,
            "median_ratio": result.median_ratio,
            "held_out_share": result.held_out_share,
            "held_out_error": result.held_out_error,
            "num_held_out": 0 if others is None else len(others),
            "closest": [
                {"fake": int(i), "train": int(result.nearest[i]), "distance": float(result.distances[i])} for i in order
            ],
        }
        warning = self._few("memorisation", "shares of few images are rough")
        return [
            {
                "name": "memorisation",
                "value": result.share,
                "std_error": result.std_error,
                "details": details,
                "warning": warning,
            }
        ]

    @property
    def _ddof(self) -> int:
        return 0 if self.covariance == "nvidia" else 1

    def _frechet_error(self, reference: FrechetReference) -> float | None:
        rows = self.fakes.features()[:MAX_ERROR_ROWS]
        if len(rows) < 3:
            return None
        return reference.std_error(rows, ddof=self._ddof) * (len(rows) / self.fakes.num) ** 0.5

    @functools.cached_property
    def _manifolds(self) -> ManifoldResult:
        k, density_k = self.balls
        rows, fakes = self._rows(self.reals), self.fakes.features()
        try:
            return manifolds(rows, fakes, k=k, density_k=density_k, device=self.device)
        except ValueError as error:
            raise MetricUnavailable(str(error)) from error

    def _rows(self, stats: FeatureStats) -> np.ndarray:
        rows = stats.features()
        if not len(rows):
            raise MetricUnavailable(
                "the reference holds a mean and a covariance but no features: FID can be measured against it, "
                "other figures need the images (--data)"
            )
        return rows

    def _rank_warning(self) -> str | None:
        need = self.fakes.num_features
        few = [f"{self.fakes.num} generated"] if self.fakes.num <= need else []
        if self.reals.num <= need and not isinstance(self.reals, feature_stats.Precomputed):
            few.append(f"{self.reals.num} real")
        if not few:
            return None
        return (
            f"{' and '.join(few)} images with {need} features: the covariance is rank-deficient and the figure biased "
            "upwards; go by the kernel distance (--metrics kid), which has no such bias"
        )

    def _few(self, figure: str, why: str, *, reals: bool = True) -> str | None:
        smaller = min(self.fakes.num, len(self.reals.features())) if reals else self.fakes.num
        return f"{smaller} images are few (under {FEW[figure]}): {why}" if smaller < FEW[figure] else None
