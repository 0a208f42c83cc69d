"""Where metrics meet data sets and generators: choose the extractor, cache the data's statistics, measure G_ema.

The figures of the embedded network are called FD and KD; only Inception features make an FID or KID.
"""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib import make_cache_dir_path
from dnnlib.util import format_time
from metrics import evaluate as metrics_evaluate
from metrics import feature_stats
from metrics.catalogue import CATALOGUE, Definition
from metrics.evaluate import MetricResult
from metrics.feature_stats import FeatureStats, Source
from metrics.features import FeatureExtractor, MetricUnavailable, get_extractor
from metrics.neighbours import MemorisationResult, memorisation
from metrics.perceptual_path_length import path_length
from torch_utils import images as image_utils
from torch_utils.distributed import DistEnv, ProcessFailed, one_line
from training import execution
from training.config import MetricConfig
from training.dataset import ImageDataset

ASSETS = Path(__file__).parent / "assets"
FEATURE_NET = ASSETS / "feature-net.npz"
BATCH = 32
PATH_BATCH = 2
"""Pairs of a path length at once: those that share a draw of the noise, as in the family."""

STATS_CACHE = "feature-stats"


def extractor_for(config: MetricConfig, device: torch.device | str, detector: str | None = None) -> FeatureExtractor:
    """The configured feature extractor, or the one that a name of the family demands.

    Raises:
        ValueError: A detector without its file.
        MetricUnavailable: Its weights are not here; the message says what to fetch and where to put it.
    """
    name = detector or config.detector
    own = config.detector_file if config.detector == name else None
    file = (config.vgg_file or own) if name == "vgg16" else own or (str(FEATURE_NET) if name == "embedded" else None)
    mode = "legacy_tensorflow" if detector else config.detector_mode
    return get_extractor(name, mode=mode, detector=file, device=device)


def label_rows(dataset: ImageDataset) -> torch.Tensor | None:
    """All labels of a data set [N, L], for conditional generators to draw from; None where there are none."""
    if not dataset.label_dim:
        return None
    return torch.stack([torch.as_tensor(dataset.get_label(i)) for i in range(len(dataset))])


@dataclass
class Evaluator:
    """Measures generators against one data set; the data's features are computed once and cached by content.

    The reference is every image of the data set once, whatever --subset and --mirror say, as in the family's `_full`
    metrics; the family's other names mirror it where the run does. Copies are looked for among the images trained on,
    and what --subset left out is the held-out split. Several processes share the work: all call `evaluate`, rank 0 asks
    the others for their part of each set of features and gets the figures, which do not depend on the number of
    processes. Transparent images are laid on white, generated and real ones.
    """

    dataset: ImageDataset
    config: MetricConfig
    device: torch.device
    seed: int
    env: DistEnv = field(default_factory=DistEnv)
    fingerprint: str | None = None
    """Of the images measured against, whole; known after the first measurement."""

    choose_num: "Callable[[Evaluator, torch.nn.Module], int] | None" = None
    """Says how many images to generate where `measure` is not told; None takes the configured number."""

    _full: ImageDataset | None = field(default=None, repr=False)
    _extractors: dict[str | None, FeatureExtractor] = field(default_factory=dict, repr=False)

    def evaluate(self, G: torch.nn.Module) -> tuple[list[MetricResult], str | None]:
        """(results, None), or ([], one line that says why there are none). Never raises for a missing detector.

        With several processes the results are rank 0's; the others get ([], None).
        """
        if not self.env.is_main:
            while (wanted := self.env.broadcast(None)) is not None:
                self.env.gather(self._part(wanted, G))
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

    def measure(self, G: torch.nn.Module, *, num: int | None = None) -> list[MetricResult]:
        """The configured figures of G, in the order in which they were asked for.

        Args:
            G: Generator on the device.
            num: Generated images for figures with a short name, instead of the configured number.

        Raises:
            MetricUnavailable: The detector's weights are missing, or the numbers allow no figure.
            ValueError, OSError: A file that was named is unusable.
        """
        if num is None and self.choose_num is not None:
            num = self.choose_num(self, G)
        self.fingerprint = self.fingerprint or self._whole().fingerprint()
        definitions = [CATALOGUE[name] for name in self.config.metrics]
        with execution.frozen(G):
            repeats = [self._measure_once(G, definitions, num, self.seed + i) for i in range(self.config.repeats)]
        return metrics_evaluate.combine(repeats)

    def check(self) -> dict[str, str]:
        """Open what a measurement will need beside the data: detectors, reference, held-out images.

        Returns:
            Content digests of those that were named by a file (`detector_file`, `reference`, `held_out`).

        Raises:
            MetricUnavailable: Weights of a detector are missing.
            ValueError, OSError: A file that was named is unusable.
        """
        found: dict[str, str] = {}
        for definition in (CATALOGUE[name] for name in self.config.metrics):
            extractor = self.extractor(definition.detector)
            if definition.detector is None and self.config.detector_file is not None:
                found["detector_file"] = Source.of(extractor).digest
            if self.config.reference is not None and not definition.fixed and definition.figure != "ppl":
                feature_stats.read_reference(self.config.reference, extractor)
                found["reference"] = hashlib.sha256(Path(self.config.reference).read_bytes()).hexdigest()
        if self.config.held_out is not None:
            found["held_out"] = ImageDataset(self.config.held_out).fingerprint()
        return found

    def nearest(self, images: torch.Tensor, *, most: int) -> MemorisationResult:
        """How close images uint8 [N, C, H, W] come to those trained on, or to the first `most` of these.

        Raises:
            MetricUnavailable: The detector's weights are missing, or there are too few images.
        """
        extractor: Any = self.extractor()
        train = self._real_features(ImageSet("trained on", None, most), torch.nn.Identity()).features()
        rows = [torch.as_tensor(extractor(image_utils.opaque(part))).cpu() for part in images.split(BATCH)]
        try:
            return memorisation(train, torch.cat(rows), device=self.device)
        except ValueError as error:
            raise MetricUnavailable(str(error)) from error

    def extractor(self, detector: str | None = None) -> FeatureExtractor:
        """See `extractor_for`; loaded once."""
        if detector not in self._extractors:
            self._extractors[detector] = extractor_for(self.config, self.device, detector)
        return self._extractors[detector]

    def _measure_once(
        self, G: torch.nn.Module, definitions: Sequence[Definition], num: int | None, seed: int
    ) -> list[MetricResult]:
        groups: dict[Any, list[Definition]] = {}
        for definition in definitions:
            key = definition.figure == "ppl" and definition.name, definition.detector, definition.num
            groups.setdefault((*key, definition.max_real, definition.mirrored), []).append(definition)
        rows: dict[str, list[MetricResult]] = {}
        for group in groups.values():
            measure = self._path_length if group[0].figure == "ppl" else self._distances
            for definition, row in measure(G, group, group[0].num or num or self.config.num, seed):
                details = row.details | ({"background": "white"} if self.dataset.num_channels == 4 else {})
                name = definition.result_name(row.name)
                row = dataclasses.replace(row, name=name, metric=definition.name, details=details)
                rows.setdefault(definition.name, []).append(row)
        return [row for definition in definitions for row in rows[definition.name]]

    def _distances(
        self, G: torch.nn.Module, group: Sequence[Definition], num: int, seed: int
    ) -> Iterator[tuple[Definition, MetricResult]]:
        """Figures that share their detector, their images and one pass over the features."""
        first, figures = group[0], [definition.figure for definition in group]
        detector = first.detector
        wanted = ImageSet("generated", detector, num, seed=seed, random_noise=first.fixed, classes="is" in figures)
        reals = self._reference(first, G)
        copies = "memorisation" in figures
        train = self._real_features(ImageSet("trained on", detector), G) if copies else None
        held_out = self._real_features(ImageSet("held out", detector), G) if copies and self._has_held_out() else None
        fakes, probabilities = self._features(wanted, G)
        results = metrics_evaluate.evaluate(
            self.extractor(detector),
            reals,
            fakes,
            metrics=figures,
            seed=seed,
            max_subset_size=1000 if first.fixed else None,
            probabilities=probabilities,
            train=train,
            held_out=held_out,
            device=self.device,
        )
        by_figure = {definition.figure: definition for definition in group}
        for row in results:
            yield by_figure[row.metric], row

    def _path_length(
        self, G: torch.nn.Module, group: Sequence[Definition], num: int, seed: int
    ) -> Iterator[tuple[Definition, MetricResult]]:
        """Path length with VGG16's LPIPS; with any other network, of that network's features, as `fpl`."""
        definition, start = group[0], time.perf_counter()
        extractor: Any = self.extractor(definition.detector)
        perceive = getattr(extractor, "perceive", extractor)

        def watched(images: torch.Tensor) -> torch.Tensor:
            self.env.beat("measuring (path length)")
            return perceive(images)

        result = path_length(
            G,
            watched,
            num=num,
            space=definition.space,
            sampling=definition.sampling,
            crop=definition.crop,
            labels=label_rows(self._whole()),
            seed=seed,
            batch_size=PATH_BATCH,
            device=self.device,
        )
        few = num < 1000
        yield (
            definition,
            MetricResult(
                name="ppl" if perceive is not extractor else "fpl",
                value=result.mean,
                spread=None,
                num_real=0,
                num_fake=num,
                **vars(Source.of(extractor)),
                covariance=None,
                num_subsets=None,
                subset_size=None,
                seed=seed,
                seconds=time.perf_counter() - start,
                std_error=result.std_error,
                warning=f"{num} pairs are few (under 1000): the tail that dominates a path length is missed"
                if few
                else None,
                details={"num_kept": result.num_kept},
            ),
        )

    def _reference(self, definition: Definition, G: torch.nn.Module) -> FeatureStats:
        if self.config.reference is not None and not definition.fixed:
            return feature_stats.read_reference(self.config.reference, self.extractor(definition.detector))
        mirror = definition.mirrored and bool(self.dataset.flips.any())
        return self._real_features(ImageSet("real", definition.detector, definition.max_real, mirrored=mirror), G)

    def _real_features(self, wanted: "ImageSet", G: torch.nn.Module) -> FeatureStats:
        """Features of real images, from the cache where these very images were seen before."""
        dataset = self._dataset(wanted)
        content = [dataset.fingerprint()]
        if wanted.num is not None and wanted.num < len(dataset):
            content.append(f"the first {wanted.num}")
        return feature_stats.dataset_stats(
            (),
            self.extractor(wanted.detector),
            cache_dir=make_cache_dir_path(STATS_CACHE),
            content_key=content,
            max_rows=self._max_rows(wanted),
            compute=lambda: self._features(wanted, G)[0],
        )

    def _features(self, wanted: "ImageSet", G: torch.nn.Module) -> tuple[FeatureStats, np.ndarray | None]:
        """Rank 0: the features of one set, every process's part in its place; class probabilities where asked for."""
        extractor: Any = self.extractor(wanted.detector)
        stats = FeatureStats(extractor.num_features, source=Source.of(extractor), max_rows=self._max_rows(wanted))
        if self.env.world == 1:
            batches = self._batches(wanted, G)
        else:
            self.env.broadcast(wanted)
            parts = self.env.gather(self._part(wanted, G)) or []
            for rank, part in enumerate(parts):
                if isinstance(part, str):
                    raise MetricUnavailable(f"rank {rank}: {part}")
            batches = (rows for turn in itertools.zip_longest(*parts) for rows in turn if rows is not None)
        probabilities = []
        for rows, classes in batches:
            stats.append(rows)
            if classes is not None:
                probabilities.append(classes)
        return stats, np.concatenate(probabilities) if probabilities else None

    def _part(self, wanted: "ImageSet", G: torch.nn.Module) -> list[tuple[np.ndarray, np.ndarray | None]] | str:
        """This process's batches of features of one set; where they cannot be had, one line that says why."""
        try:
            return list(self._batches(wanted, G))
        except Exception as e:  # a measurement never ends the training, whichever process it fails in
            return f"{type(e).__name__}: {one_line(e)}"

    def _batches(self, wanted: "ImageSet", G: torch.nn.Module) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """(features, class probabilities or None) of this process's share of the batches."""
        extractor: Any = self.extractor(wanted.detector)
        for batch in self._images(wanted, G):
            self.env.beat(f"measuring ({wanted.kind})")
            rows = torch.as_tensor(extractor(batch)).cpu().numpy()
            yield rows, extractor.probabilities(batch).cpu().numpy() if wanted.classes else None

    def _images(self, wanted: "ImageSet", G: torch.nn.Module) -> Iterator[torch.Tensor]:
        """This process's share of the batches: every n-th one."""
        batches = slice(self.env.rank, None, self.env.world)
        if wanted.kind != "generated":
            dataset = self._dataset(wanted)
            most = len(dataset) if wanted.num is None else min(wanted.num, len(dataset))
            return map(image_utils.opaque, dataset.image_batches(BATCH, batches=batches, num=most))
        return metrics_evaluate.generated_images(
            G,
            num=wanted.num or self.config.num,
            seed=wanted.seed,
            batch_size=BATCH,
            device=self.device,
            labels=label_rows(self._whole()),
            noise_mode="random" if wanted.random_noise else "const",
            batches=batches,
        )

    def _dataset(self, wanted: "ImageSet") -> ImageDataset:
        if wanted.kind == "trained on":
            return self.dataset
        if wanted.kind == "held out":
            held_out = ImageDataset(self.config.held_out) if self.config.held_out else self.dataset.left_out()
            assert held_out is not None
            return held_out
        return self.dataset.full(xflip=True) if wanted.mirrored else self._whole()

    def _has_held_out(self) -> bool:
        return self.config.held_out is not None or self.dataset.left_out() is not None

    def _whole(self) -> ImageDataset:
        """The data without subset and mirroring; one object, as its fingerprint is costly."""
        self._full = self._full or self.dataset.full()
        return self._full

    def _max_rows(self, wanted: "ImageSet") -> int:
        """All rows that a name of the family wants; otherwise the usual limit."""
        if wanted.num is None or wanted.kind == "generated":
            return max(feature_stats.MAX_ROWS, wanted.num or 0)
        return max(feature_stats.MAX_ROWS, min(wanted.num, len(self._dataset(wanted))))


@dataclass(frozen=True)
class ImageSet:
    """A set of images whose features are wanted; rank 0 sends it to the others.

    Attributes:
        kind: `real`, `trained on`, `held out` or `generated`.
        detector: See `extractor_for`.
        num: Most images; None takes all.
        mirrored: Real images: with their mirrored copies.
        seed: Generated images: see `generated_images`.
        random_noise: Generated images: fresh noise instead of the network's own.
        classes: Class probabilities too.
    """

    kind: str
    detector: str | None
    num: int | None = None
    mirrored: bool = False
    seed: int = 0
    random_noise: bool = False
    classes: bool = False


def for_run(run: Any) -> Evaluator | None:
    """The evaluator of a training run; None where `--metrics none`."""
    if run.config.metric.metrics == ("none",):
        return None
    return Evaluator(run.dataset, run.config.metric, run.device, run.config.runtime.seed, run.env)


def records(
    rows: Sequence[MetricResult],
    *,
    snapshot: str | None,
    nimg: int | None,
    seconds: float,
    fingerprint: str | None,
    num_processes: int = 1,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(NAME, line) for every metric-NAME.jsonl: the family's fields, then errors and provenance.

    A short name of several figures makes one file for each; a name of the family keeps its figures together.
    """
    files: dict[str, list[MetricResult]] = {}
    for row in rows:
        family = row.metric in CATALOGUE and CATALOGUE[row.metric].fixed
        files.setdefault(row.metric if family else row.name, []).append(row)
    for name, together in files.items():
        results = {row.name: row.value for row in together}
        for row in together:
            if row.name == "is50k_mean" and row.spread is not None:
                results["is50k_std"] = row.spread
        yield (
            name,
            {
                "results": results,
                "metric": name,
                "total_time": seconds,
                "total_time_str": format_time(seconds),
                "num_gpus": num_processes,
                "snapshot_pkl": snapshot,
                "timestamp": time.time(),
                "kimg": None if nimg is None else nimg / 1000,
                "errors": {row.name: row.std_error for row in together},
                "warnings": [f"{row.name}: {row.warning}" for row in together if row.warning],
                "provenance": {**together[0].as_dict(), "data_fingerprint": fingerprint},
            },
        )
