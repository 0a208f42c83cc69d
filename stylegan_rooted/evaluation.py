"""Where metrics meet data sets and generators: choose the extractor, cache the data's statistics, measure G_ema.

The figures of the embedded network are called FD and KD; only Inception features make an FID or KID.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib import make_cache_dir_path
from dnnlib.util import format_time
from metrics import evaluate as metrics_evaluate
from metrics import feature_stats
from metrics.evaluate import MetricResult
from metrics.feature_stats import FeatureStats, Source
from metrics.features import FeatureExtractor, MetricUnavailable, get_extractor
from torch_utils.distributed import DistEnv, ProcessFailed, one_line
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
    metrics. Several processes share the work: all call `evaluate`, rank 0 asks the others for their part of each set of
    features and gets the figures, which do not depend on the number of processes.
    """

    dataset: ImageDataset
    config: MetricConfig
    device: torch.device
    seed: int
    env: DistEnv = field(default_factory=DistEnv)
    fingerprint: str | None = None
    """Of the images measured against, whole; known after the first measurement."""

    def evaluate(self, G: torch.nn.Module) -> tuple[list[MetricResult], str | None]:
        """(results, None), or ([], one line that says why there are none). Never raises for a missing detector.

        With several processes the results are rank 0's; the others get ([], None).
        """
        if not self.env.is_main:
            while (what := self.env.broadcast(None)) is not None:
                self.env.gather(self._part(what, G))
            return [], None
        try:
            results, problem = self.measure(G), None
        except MetricUnavailable as e:
            results, problem = [], str(e)
        except ProcessFailed:
            raise
        except Exception:
            self.env.broadcast(None)
            raise
        self.env.broadcast(None)
        return results, problem

    def measure(self, G: torch.nn.Module) -> list[MetricResult]:
        """FID/KID (or FD/KD) of `config.num` images of G against all images of the data set.

        Raises:
            MetricUnavailable: The detector's weights are missing.
        """
        extractor = extractor_for(self.config, self.device)
        self.fingerprint = self.fingerprint or self.dataset.full().fingerprint()
        reals = feature_stats.dataset_stats(
            (),
            extractor,
            cache_dir=make_cache_dir_path("feature-stats"),
            content_key=self.fingerprint,
            compute=lambda: self._features("reals", extractor, G),
        )
        fakes = self._features("fakes", extractor, G)
        return metrics_evaluate.evaluate(extractor, reals, fakes, metrics=self.config.metrics, seed=self.seed)


    def _features(self, what: str, extractor: FeatureExtractor, G: torch.nn.Module) -> FeatureStats:
        """Rank 0: the features of one set, every process's part in its place."""
        if self.env.world == 1:
            return feature_stats.accumulate(self._images(what, G), extractor)
        self.env.broadcast(what)
        parts = self.env.gather(self._part(what, G)) or []
        for rank, part in enumerate(parts):
            if isinstance(part, str):
                raise MetricUnavailable(f"rank {rank}: {part}")
        stats = FeatureStats(extractor.num_features, source=Source.of(extractor))
        for rows in (rows for turn in itertools.zip_longest(*parts) for rows in turn if rows is not None):
            stats.append(rows)
        return stats

    def _part(self, what: str, G: torch.nn.Module) -> list[np.ndarray] | str:
        """This process's batches of features of one set; where they cannot be had, one line that says why."""
        try:
            extractor = extractor_for(self.config, self.device)
            rows = []
            for batch in self._images(what, G):
                self.env.beat(f"measuring ({what})")
                rows.append(torch.as_tensor(extractor(batch)).cpu().numpy())
            return rows
        except Exception as e:  # a measurement never ends the training, whichever process it fails in
            return f"{type(e).__name__}: {one_line(e)}"

    def _images(self, what: str, G: torch.nn.Module) -> Iterator[torch.Tensor]:
        """This process's share of the batches: every n-th one."""
        batches = slice(self.env.rank, None, self.env.world)
        full = self.dataset.full()
        if what == "reals":
            return full.image_batches(BATCH, batches=batches)
        return metrics_evaluate.generated_images(
            G,
            num=self.config.num,
            seed=self.seed,
            batch_size=BATCH,
            device=self.device,
            labels=label_rows(full),
            batches=batches,
        )


def for_run(run: Any) -> Evaluator | None:
    """The evaluator of a training run; None where `--metrics none`."""
    if run.config.metric.metrics == ("none",):
        return None
    return Evaluator(run.dataset, run.config.metric, run.device, run.config.runtime.seed, run.env)


def jsonl_record(
    row: MetricResult, *, snapshot: str, nimg: int, seconds: float, fingerprint: str | None, num_processes: int = 1
) -> dict[str, Any]:
    """One line of metric-NAME.jsonl: the family's fields, then the provenance, the data's fingerprint with it."""
    return {
        "results": {row.name: row.value},
        "metric": row.name,
        "total_time": seconds,
        "total_time_str": format_time(seconds),
        "num_gpus": num_processes,
        "snapshot_pkl": snapshot,
        "timestamp": time.time(),
        "kimg": nimg / 1000,
        "provenance": {**row.as_dict(), "data_fingerprint": fingerprint},
    }
