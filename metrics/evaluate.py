"""Images in, `MetricResult` out: Fréchet and kernel distance between two streams of images, with where they come from.

Pure and seeded: nothing here draws from, or advances, the global random streams. Knows no data set class and no network
class; a folder, a data set and a generator are all iterables of uint8 batches.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from metrics.feature_stats import COVARIANCES, FeatureStats, Source, accumulate
from metrics.features import FeatureExtractor, MetricUnavailable
from metrics.frechet_inception_distance import frechet_distance
from metrics.kernel_inception_distance import kernel_distance
from torch_utils import images as image_utils
from torch_utils import seeding

METRICS = ("fid", "kid")

Images = Iterable[torch.Tensor | np.ndarray] | FeatureStats


@dataclass(frozen=True)
class MetricResult:
    """One figure and its provenance.

    Attributes:
        name: `fid` or `kid` for Inception features; `fd` or `kd` for those of any other network.
        value: The figure. Lower is better; KID and KD may be slightly negative.
        spread: KID and KD: standard deviation over subsets (see `KidResult.std`). None for FID and FD.
        num_real: Real images.
        num_fake: Generated images.
        extractor: Name of the feature extractor.
        digest: SHA-256 of its weights.
        resize: How images reached its input size.
        covariance: FID and FD: `nvidia` (divided by n) or `cleanfid` (by n - 1). None for KID and KD.
        num_subsets: KID and KD: number of subset pairs. None for FID and FD.
        subset_size: KID and KD: images in each. None for FID and FD.
        seed: Seed of the subset draws.
        seconds: Feature extraction (shared by all figures of one evaluation) plus this figure's own arithmetic.
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

    @property
    def label(self) -> str:
        """The name as people read it: FID, KID, FD or KD."""
        return self.name.upper()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


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
    max_rows: int = 50_000,
) -> list[MetricResult]:
    """Measure how far generated images are from real ones.

    Args:
        extractor: Where features come from; also decides whether the figures are called FID and KID or FD and KD.
        reals: Batches uint8 [N, 3 or 1, H, W], or statistics made earlier with the same extractor.
        fakes: The same for the generated images.
        metrics: Any of `fid` and `kid`, in the wanted order; with a network other than Inception they give `fd` and
            `kd`.
        seed: Seed of the kernel distance's subsets.
        covariance: `nvidia` (divide by n) or `cleanfid` (by n - 1); None takes `nvidia` for `legacy_tensorflow`
            resizing, for figures as in the ADA family, and `cleanfid` otherwise.
        num_subsets: Kernel distance: subset pairs.
        max_subset_size: Kernel distance: largest subset. None takes 1000, but at most half of the smaller side: subsets
            that are the whole set would all be equal and have no spread. 1000 reproduces the ADA family's subsets.
        max_rows: Most feature rows kept per side for the kernel distance.

    Raises:
        ValueError: For unknown metrics or conventions, images of another type, statistics of another extractor.
        MetricUnavailable: If there are too few images or the numbers do not allow a figure. Never fatal to training.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"got metric {metric!r}, wanted any of {', '.join(METRICS)}")
    if covariance is None:
        covariance = "nvidia" if extractor.resize == "legacy_tensorflow" else "cleanfid"
    if covariance not in COVARIANCES:
        raise ValueError(f"got covariance convention {covariance!r}, wanted one of {', '.join(COVARIANCES)}")
    start = time.perf_counter()
    real_stats = _stats_of(reals, extractor, "reals", max_rows)
    fake_stats = _stats_of(fakes, extractor, "fakes", max_rows)
    features_sec = time.perf_counter() - start
    common: dict[str, Any] = {
        "num_real": real_stats.num,
        "num_fake": fake_stats.num,
        "extractor": extractor.name,
        "digest": extractor.digest,
        "resize": extractor.resize,
        "seed": seed,
    }
    results = []
    for metric in metrics:
        start = time.perf_counter()
        try:
            row = (
                _frechet_row(real_stats, fake_stats, covariance)
                if metric == "fid"
                else _kernel_row(real_stats, fake_stats, num_subsets, max_subset_size, seed)
            )
        except np.linalg.LinAlgError as error:
            raise MetricUnavailable(f"{metric} cannot be computed from these features: {error}") from error
        name = metric if extractor.headline == "FID" else {"fid": "fd", "kid": "kd"}[metric]
        seconds = features_sec + time.perf_counter() - start
        results.append(MetricResult(name=name, seconds=seconds, **row, **common))
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


def dataset_images(dataset: Any, *, batch_size: int = 64, num: int | None = None) -> Iterator[np.ndarray]:
    """Batches uint8 [N, C, H, W] of a data set whose items start with a uint8 [C, H, W] image, in its own order.

    Args:
        dataset: Anything with `len()` and `dataset[i] -> (image, …)`.
        batch_size: Most images at once.
        num: Only the first so many; None takes all.
    """
    total = len(dataset) if num is None else min(num, len(dataset))
    for first in range(0, total, batch_size):
        yield np.stack([dataset[i][0] for i in range(first, min(first + batch_size, total))])


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
        with torch.no_grad(), _eval_mode(G), seeding.scoped(seed, "evaluate", "noise", first):
            x = G(z.to(device), c.to(device), truncation_psi=truncation_psi, noise_mode=noise_mode, **synthesis_kwargs)
        if not torch.isfinite(x).all():
            raise MetricUnavailable("the generator gives non-finite pixels, so there is nothing to measure")
        yield image_utils.to_uint8(x, rounding="truncate")


@contextlib.contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def _stats_of(images: Images, extractor: FeatureExtractor, what: str, max_rows: int) -> FeatureStats:
    if isinstance(images, FeatureStats):
        if images.source != Source.of(extractor):
            raise ValueError(f"the statistics of the {what} are of {images.source}, wanted {Source.of(extractor)}")
        stats = images
    else:
        stats = accumulate(images, extractor, max_rows=max_rows)
    if stats.num < 2:
        raise MetricUnavailable(f"got {stats.num} images as {what}, a distance needs at least 2")
    return stats


def _frechet_row(reals: FeatureStats, fakes: FeatureStats, covariance: str) -> dict[str, Any]:
    value = frechet_distance(fakes.mean, fakes.cov(covariance), reals.mean, reals.cov(covariance))
    return {"value": value, "spread": None, "covariance": covariance, "num_subsets": None, "subset_size": None}


def _kernel_row(
    reals: FeatureStats, fakes: FeatureStats, num_subsets: int, max_subset_size: int | None, seed: int
) -> dict[str, Any]:
    f1, f2 = reals.features(), fakes.features()
    if max_subset_size is None:
        max_subset_size = max(2, min(1000, len(f1) // 2, len(f2) // 2))
    kid = kernel_distance(f1, f2, num_subsets=num_subsets, max_subset_size=max_subset_size, seed=seed)
    return {
        "value": kid.mean,
        "spread": kid.std,
        "covariance": None,
        "num_subsets": kid.num_subsets,
        "subset_size": kid.subset_size,
    }
