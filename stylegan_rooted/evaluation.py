"""Where metrics meet data sets and generators: choose the extractor, cache the data's statistics, measure G_ema.

The figures of the embedded network are called FD and KD; only Inception features make an FID or KID.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dnnlib import make_cache_dir_path
from dnnlib.util import format_time
from metrics import evaluate as metrics_evaluate
from metrics import feature_stats
from metrics.evaluate import MetricResult
from metrics.features import FeatureExtractor, MetricUnavailable, get_extractor
from training.config import MetricConfig
from training.dataset import ImageDataset

ASSETS = Path(__file__).parent / "assets"
FEATURE_NET = ASSETS / "feature-net.pt"
BATCH = 32


def extractor_for(config: MetricConfig, device: torch.device | str) -> FeatureExtractor:
    """The configured feature extractor.

    Raises:
        MetricUnavailable: Its weights are not here; the message says what to fetch and where to put it.
    """
    file = config.detector_file or (str(FEATURE_NET) if config.detector == "embedded" else None)
    return get_extractor(config.detector, mode=config.detector_mode, detector=file, device=device)


def dataset_images(dataset: ImageDataset, batch_size: int = BATCH) -> Iterator[torch.Tensor]:
    """All images of a data set as uint8 [N, C, H, W] batches, in order."""
    for start in range(0, len(dataset), batch_size):
        yield torch.stack([torch.from_numpy(dataset[i][0]) for i in range(start, min(start + batch_size, len(dataset)))])


def dataset_labels(dataset: ImageDataset, num: int, seed: int) -> torch.Tensor | None:
    """Labels of `num` uniformly drawn items [num, L]; None for an unlabelled data set."""
    if not dataset.label_dim:
        return None
    index = torch.randint(len(dataset), [num], generator=torch.Generator().manual_seed(seed))
    return torch.stack([torch.as_tensor(dataset.get_label(int(i))) for i in index])


@dataclass
class Evaluator:
    """Measures generators against one data set; the data's features are computed once and cached by content."""

    dataset: ImageDataset
    config: MetricConfig
    device: torch.device
    seed: int

    def evaluate(self, G: torch.nn.Module) -> tuple[list[MetricResult], str | None]:
        """(results, None), or ([], one line that says why there are none). Never raises for a missing detector."""
        try:
            return self.measure(G), None
        except MetricUnavailable as e:
            return [], str(e)

    def measure(self, G: torch.nn.Module) -> list[MetricResult]:
        """FID/KID (or FD/KD) of `config.num` images of G against all images of the data set.

        Raises:
            MetricUnavailable: The detector's weights are missing.
        """
        extractor = extractor_for(self.config, self.device)
        reals = feature_stats.dataset_stats(
            dataset_images(self.dataset), extractor, cache_dir=make_cache_dir_path("feature-stats"),
            content_key=self.dataset.fingerprint())
        fakes = metrics_evaluate.generated_images(
            G, num=self.config.num, seed=self.seed, batch_size=BATCH, device=self.device, noise_mode="const",
            labels=dataset_labels(self.dataset, self.config.num, self.seed))
        return metrics_evaluate.evaluate(extractor, reals, fakes, metrics=self.config.metrics, seed=self.seed)


def for_run(run: Any) -> Evaluator | None:
    """The evaluator of a training run; None where `--metrics none`."""
    if run.config.metric.metrics == ("none",):
        return None
    return Evaluator(run.dataset, run.config.metric, run.device, run.config.runtime.seed)


def jsonl_record(row: MetricResult, *, snapshot: str, nimg: int, seconds: float) -> dict[str, Any]:
    """One line of metric-NAME.jsonl: the family's fields, then the provenance."""
    return {
        "results": {row.name: row.value}, "metric": row.name, "total_time": seconds, "total_time_str": format_time(seconds),
        "num_gpus": 1, "snapshot_pkl": snapshot, "timestamp": time.time(), "kimg": nimg / 1000, "provenance": row.as_dict(),
    }
