"""Where metrics meet data sets and generators: choose the extractor, cache the data's statistics, measure G_ema.

The figures of the embedded network are called FD and KD; only Inception features make an FID or KID.
"""

import time
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
FEATURE_NET = ASSETS / "feature-net.npz"
BATCH = 32


def extractor_for(config: MetricConfig, device: torch.device | str) -> FeatureExtractor:
    """The configured feature extractor.

    Raises:
        MetricUnavailable: Its weights are not here; the message says what to fetch and where to put it.
    """
    file = config.detector_file or (str(FEATURE_NET) if config.detector == "embedded" else None)
    return get_extractor(config.detector, mode=config.detector_mode, detector=file, device=device)


def label_rows(dataset: ImageDataset) -> torch.Tensor | None:
    """All labels of a data set [N, L], for conditional generators to draw from; None where there are none."""
    if not dataset.label_dim:
        return None
    return torch.stack([torch.as_tensor(dataset.get_label(i)) for i in range(len(dataset))])


@dataclass
class Evaluator:
    """Measures generators against one data set; the data's features are computed once and cached by content.

    The reference is every image of the data set once, whatever --subset and --mirror say, as in the family's `_full`
    metrics.
    """

    dataset: ImageDataset
    config: MetricConfig
    device: torch.device
    seed: int
    fingerprint: str | None = None
    """Of the images measured against, whole; known after the first measurement."""

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
        full = self.dataset.full()
        self.fingerprint = self.fingerprint or full.fingerprint()
        reals = feature_stats.dataset_stats(
            full.image_batches(BATCH),
            extractor,
            cache_dir=make_cache_dir_path("feature-stats"),
            content_key=self.fingerprint,
        )
        fakes = metrics_evaluate.generated_images(
            G, num=self.config.num, seed=self.seed, batch_size=BATCH, device=self.device, labels=label_rows(full)
        )
        return metrics_evaluate.evaluate(extractor, reals, fakes, metrics=self.config.metrics, seed=self.seed)


def for_run(run: Any) -> Evaluator | None:
    """The evaluator of a training run; None where `--metrics none`."""
    if run.config.metric.metrics == ("none",):
        return None
    return Evaluator(run.dataset, run.config.metric, run.device, run.config.runtime.seed)


def jsonl_record(
    row: MetricResult, *, snapshot: str, nimg: int, seconds: float, fingerprint: str | None
) -> dict[str, Any]:
    """One line of metric-NAME.jsonl: the family's fields, then the provenance, the data's fingerprint with it."""
    return {
        "results": {row.name: row.value},
        "metric": row.name,
        "total_time": seconds,
        "total_time_str": format_time(seconds),
        "num_gpus": 1,
        "snapshot_pkl": snapshot,
        "timestamp": time.time(),
        "kimg": nimg / 1000,
        "provenance": {**row.as_dict(), "data_fingerprint": fingerprint},
    }
