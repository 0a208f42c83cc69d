"""Statistics of a stream of features, and their cache on disk, keyed by content.

Owns means, covariances, kept feature rows and their file format. Knows extractors by protocol only; knows no data sets.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.util import open_regular
from metrics.features import FeatureExtractor, MetricUnavailable
from metrics.frechet_inception_distance import is_covariance

COVARIANCES = ("nvidia", "cleanfid")
"""Conventions of the covariance: divided by n (biased, the ADA family) or by n - 1 (unbiased, clean-fid)."""

MAX_ROWS = 50_000
"""Feature rows kept by default."""

_FORMAT = "stylegan-rooted feature stats 1"
_RESERVOIR_SEED = 20240229


@dataclass(frozen=True)
class Source:
    """Where features come from; only features of equal sources may be compared.

    Attributes:
        extractor: Name of the extractor.
        digest: SHA-256 of its weights.
        resize: How images reach its input size.
    """

    extractor: str
    digest: str
    resize: str

    @classmethod
    def of(cls, extractor: FeatureExtractor) -> "Source":
        return cls(extractor.name, extractor.digest, extractor.resize)


class FeatureStats:
    """Running count, mean and scatter of feature rows in float64, and the rows themselves up to a limit.

    Mean and scatter are updated batch by batch around the running mean, which avoids the cancellation of E[xxᵀ] - μμᵀ
    (Chan et al. 1983). Beyond `max_rows` rows the kept ones are a uniform random sample (reservoir, own seeded
    stream), so memory is bounded by D² + max_rows · D.

    Args:
        num_features: D.
        source: Origin of the features, if known.
        max_rows: How many rows to keep for the kernel distance; 0 keeps none.
    """

    def __init__(self, num_features: int, *, source: Source | None = None, max_rows: int = MAX_ROWS) -> None:
        self.num_features = num_features
        self.source = source
        self.max_rows = max_rows
        self.num = 0
        self._mean = np.zeros(num_features)
        self._scatter = np.zeros((num_features, num_features))  # sum over rows of (x - mean)(x - mean)ᵀ
        self._rows: list[np.ndarray] = []
        self._num_rows = 0
        self._rng = np.random.RandomState(_RESERVOIR_SEED)

    def append(self, rows: np.ndarray | torch.Tensor) -> None:
        """Add feature rows, float [N, D].

        Raises:
            ValueError: If the shape does not fit.
            MetricUnavailable: If a number is not finite.
        """
        if isinstance(rows, torch.Tensor):
            rows = rows.detach().cpu().numpy()
        if rows.ndim != 2 or rows.shape[1] != self.num_features:
            raise ValueError(f"got feature rows of shape {rows.shape}, wanted [N, {self.num_features}]")
        if not np.isfinite(rows).all():
            raise MetricUnavailable("the extractor returned non-finite features, so there is nothing to measure")
        if not len(rows):
            return
        exact = rows.astype(np.float64)
        mean = exact.mean(axis=0)
        centred = exact - mean
        self._absorb(len(rows), mean, centred.T @ centred)
        self._keep(np.asarray(rows, dtype=np.float32), self.num - len(rows))

    def merge(self, other: "FeatureStats") -> None:
        """Add what another accumulator saw, for instance on another rank.

        Raises:
            ValueError: If the two come from different sources, or the kept rows do not fit under `max_rows`.
        """
        if (other.num_features, other.source) != (self.num_features, self.source):
            raise ValueError(f"cannot merge features of {other.source} into those of {self.source}")
        if self.max_rows and self.num + other.num > self.max_rows:
            raise ValueError(f"{self.num} + {other.num} rows exceed max_rows = {self.max_rows}; raise max_rows")
        self._absorb(other.num, other._mean, other._scatter)
        if self.max_rows:
            self._rows += [rows.copy() for rows in other._rows]
            self._num_rows += other._num_rows

    @property
    def mean(self) -> np.ndarray:
        """Mean, float64 [D]."""
        return self._mean.copy()

    def cov(self, convention: str) -> np.ndarray:
        """Covariance, float64 [D, D].

        Args:
            convention: `nvidia` divides by n (biased), `cleanfid` by n - 1 (unbiased).

        Raises:
            ValueError: For another convention or too few rows.
        """
        if convention not in COVARIANCES:
            raise ValueError(f"got covariance convention {convention!r}, wanted one of {', '.join(COVARIANCES)}")
        divisor = self.num if convention == "nvidia" else self.num - 1
        if divisor < 1:
            raise ValueError(f"got {self.num} images, wanted at least 2 for a covariance")
        return self._scatter / divisor

    def features(self) -> np.ndarray:
        """The kept rows, float32 [min(num, max_rows), D]; in order of arrival unless the limit was exceeded."""
        if not self._rows:
            return np.zeros((0, self.num_features), np.float32)
        if len(self._rows) > 1:
            self._rows = [np.concatenate(self._rows)]
        return self._rows[0]

    def save(self, path: str | Path, key: dict[str, Any]) -> None:
        """Write all of it to an npz file without pickles, atomically."""
        meta = {"format": _FORMAT, "key": key, "num": self.num, "max_rows": self.max_rows}
        meta["source"] = None if self.source is None else vars(self.source)
        buffer = io.BytesIO()
        arrays = {"mean": self._mean, "scatter": self._scatter, "features": self.features()}
        arrays["check"] = np.array(_checksum(arrays))
        np.savez(buffer, allow_pickle=False, meta=np.array(json.dumps(meta, sort_keys=True)), **arrays)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(buffer.getvalue())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | Path, key: dict[str, Any]) -> "FeatureStats":
        """Read a file written by `save`.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is damaged or was written for another key.
        """
        with open_regular(path) as file:
            data = file.read()
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in ("mean", "scatter", "features", "check", "meta")}
            meta = json.loads(str(arrays.pop("meta")))
            num, max_rows = int(meta["num"]), int(meta["max_rows"])
            if meta["format"] != _FORMAT or meta["key"] != json.loads(json.dumps(key)):
                raise ValueError("written for something else")
            if str(arrays.pop("check")) != _checksum(arrays):
                raise ValueError("checksum differs")
            stats = cls(arrays["mean"].shape[0], max_rows=max_rows)
            if arrays["scatter"].shape != stats._scatter.shape or len(arrays["features"]) != min(num, max_rows):
                raise ValueError("arrays do not fit together")
            stats.source = None if meta["source"] is None else Source(**meta["source"])
        except Exception as error:  # a damaged zip raises many kinds
            raise ValueError(f"{path} is not a usable cache file ({error})") from error
        stats.num, stats._mean, stats._scatter = num, arrays["mean"], arrays["scatter"]
        stats._rows, stats._num_rows = [arrays["features"]], len(arrays["features"])
        return stats

    def _absorb(self, num: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not num:
            return
        total = self.num + num
        delta = mean - self._mean
        self._scatter += scatter + np.outer(delta, delta) * (self.num * num / total)
        self._mean += delta * (num / total)
        self.num = total

    def _keep(self, rows: np.ndarray, num_before: int) -> None:
        num_fit = min(max(self.max_rows - self._num_rows, 0), len(rows))
        if num_fit:
            self._rows.append(rows[:num_fit].copy())
            self._num_rows += num_fit
        if num_fit == len(rows) or not self.max_rows:
            return
        kept = self.features()
        for i in range(num_fit, len(rows)):  # algorithm R: row number k is kept with probability max_rows / k
            slot = self._rng.randint(num_before + i + 1)
            if slot < self.max_rows:
                kept[slot] = rows[i]


class Precomputed(FeatureStats):
    """A mean and a covariance that somebody else computed, perhaps with the features; the number of images is unknown.

    Its covariance is taken as it is stored, whatever convention is asked for.
    """

    def __init__(self, mean: np.ndarray, sigma: np.ndarray | None, features: np.ndarray | None, source: Source) -> None:
        super().__init__(len(mean), source=source)
        self._mean = mean
        self._sigma = sigma
        if features is not None:
            self._rows, self.num = [np.asarray(features, np.float32)], len(features)

    def cov(self, convention: str) -> np.ndarray:
        """The covariance as stored."""
        if self._sigma is None:
            raise MetricUnavailable("the reference holds features of KID only; FID needs its mu and sigma")
        return self._sigma


def read_reference(path: str | Path, extractor: FeatureExtractor) -> Precomputed:
    """Precomputed statistics of real images: clean-fid's files and those of NVIDIA's later repositories.

    Both are npz archives with `mu` [D] and `sigma` [D, D]; clean-fid's files for KID hold `feats` [N, D]. Such a file
    does not say which network made it: that it fits the extractor is up to whoever names it.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is something else, or of another number of features.
    """
    with open_regular(path) as file:
        data = file.read()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in ("mu", "sigma", "feats") if name in archive.files}
    except Exception as error:  # a damaged zip raises many kinds
        raise ValueError(f"{path} is not an npz file of arrays ({type(error).__name__})") from error
    feats, size = arrays.get("feats"), extractor.num_features
    shapes = {"mu": (size,), "sigma": (size, size), "feats": (len(feats), size) if feats is not None else None}
    if not {"mu", "sigma"} <= set(arrays) and feats is None:
        raise ValueError(
            f"{path} holds neither mu and sigma nor feats: it is no reference of clean-fid or NVIDIA's kind"
        )
    for name, array in arrays.items():
        if array.dtype.kind != "f" or array.shape != shapes[name] or not np.isfinite(array).all():
            raise ValueError(
                f"{path}: {name} is {array.dtype} {list(array.shape)}, the {extractor.name} detector wants finite "
                f"numbers {list(shapes[name] or ())}"
            )
    if "sigma" in arrays and not is_covariance(arrays["sigma"]):
        raise ValueError(f"{path}: sigma is no covariance: it is not symmetric, or has negative eigenvalues")
    mean = arrays.get("mu", feats.mean(0) if feats is not None else None)
    sigma = arrays.get("sigma")
    return Precomputed(
        np.asarray(mean, np.float64),
        None if sigma is None else sigma.astype(np.float64),
        feats,
        Source.of(extractor),
    )


def accumulate(
    images: Iterable[torch.Tensor | np.ndarray],
    extractor: FeatureExtractor,
    *,
    num: int | None = None,
    max_rows: int = MAX_ROWS,
    also: Callable[[torch.Tensor], None] | None = None,
) -> FeatureStats:
    """Statistics of a stream of image batches.

    Args:
        images: Batches, uint8 [N, 3 or 1, H, W].
        extractor: What turns them into features.
        num: Stop after so many images; None takes all.
        max_rows: See `FeatureStats`.
        also: Is shown every batch too.

    Raises:
        ValueError: If a batch is not of that type and shape.
    """
    stats = FeatureStats(extractor.num_features, source=Source.of(extractor), max_rows=max_rows)
    for batch in images:
        batch = torch.as_tensor(batch)
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] not in (1, 3):
            raise ValueError(f"got images {batch.dtype} {list(batch.shape)}, wanted uint8 [N, 3, H, W] or [N, 1, H, W]")
        if num is not None:
            batch = batch[: num - stats.num]
        if len(batch):
            stats.append(extractor(batch))
            if also is not None:
                also(batch)
        if num is not None and stats.num >= num:
            break
    return stats


def dataset_stats(
    images: Iterable[torch.Tensor | np.ndarray],
    extractor: FeatureExtractor,
    *,
    cache_dir: str | Path | None = None,
    content_key: str | Sequence[str] | None = None,
    num: int | None = None,
    max_rows: int = MAX_ROWS,
    compute: Callable[[], FeatureStats] | None = None,
) -> FeatureStats:
    """Statistics of a data set, read from the cache when these very images were seen before by this very extractor.

    The file name is a digest of content key, extractor, digest of its weights, resize mode and count; no path is part
    of it. A file that is damaged or belongs to something else is computed anew and replaced. A cache that cannot be
    written is no error: the figures do not depend on it.

    Args:
        images: Batches, uint8 [N, 3 or 1, H, W]; not touched when the cache answers, so a lazy iterable costs nothing.
        extractor: What turns them into features.
        cache_dir: Folder of the cache; None caches nothing.
        content_key: Fingerprint of the images (and of anything that changes them, such as mirroring); None caches
            nothing.
        num: Stop after so many images; None takes all.
        max_rows: See `FeatureStats`.
        compute: Called in place of `accumulate` where the cache has no answer, for work that several processes share.
    """
    if compute is None:
        compute = functools.partial(accumulate, images, extractor, num=num, max_rows=max_rows)
    if cache_dir is None or content_key is None:
        return compute()
    content = [content_key] if isinstance(content_key, str) else list(content_key)
    key = {"content": content, "num": num, "max_rows": max_rows, **vars(Source.of(extractor))}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = Path(cache_dir) / f"features-{extractor.name}-{digest[:32]}.npz"
    with contextlib.suppress(OSError, ValueError):
        return FeatureStats.load(path, key)
    stats = compute()
    with contextlib.suppress(OSError):
        stats.save(path, key)
    return stats


def describe_file(path: str | Path) -> str:
    """What a cache file holds, in a few words for people; reads its record only."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            meta = json.loads(str(archive["meta"]))
        source, content = meta["source"], meta["key"]["content"]
        data = ", ".join([str(content[0])[:12], *map(str, content[1:])])
        return f"{source['extractor']} ({source['resize']}), {meta['num']} images of data {data}"
    except Exception:  # a damaged zip raises many kinds
        return "damaged, or of another version: it will be computed anew"


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in ("mean", "scatter", "features"):
        digest.update(f"{name}{arrays[name].dtype.str}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
