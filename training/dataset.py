"""Data sets: a folder or zip of square images of one size, labels, mirroring, subsets, and the order of drawing.

Knows files, pixels and labels; knows nothing of networks. Nothing is ever extracted from a zip.
"""

import copy
import hashlib
import json
import os
import re
import shlex
import stat
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, Protocol

import numpy as np
import torch

from torch_utils import images

CACHE_LIMIT_BYTES = 1 << 30
MAX_FILE_BYTES = 1 << 29  # one image or dataset.json; protects against zip bombs
MAX_CLASSES = 1 << 20
LABELS_FILE = "dataset.json"
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)  # RuntimeError: encrypted
BUILD_COMMAND = "stylegan-rooted dataset build"
SURGERY_COMMAND = "stylegan-rooted surgery"


class DatasetError(ValueError):
    """The data can't be used; the message is one line that says what is wrong and what would help."""


# --- where the files are


class Source(Protocol):
    """A place with image files: `names` are relative paths with '/', sorted; `others` what else lies there."""

    path: str
    names: list[str]
    others: list[str]

    def open(self, name: str) -> IO[bytes]:
        """One file, to be closed by the caller; DatasetError naming it if that fails."""

    def read(self, name: str) -> bytes:
        """Content of one file; DatasetError naming it if that fails."""

    def read_labels_file(self) -> bytes | None:
        """Content of dataset.json at the root, None if there is none."""


class FolderSource:
    """Image files of a folder and its sub-folders."""

    def __init__(self, path: str) -> None:
        self.path = path
        found: list[str] = []
        for root, _, files in os.walk(path, onerror=_raise):
            base = os.path.relpath(root, path)
            found.extend(f if base == "." else f"{base}/{f}".replace(os.sep, "/") for f in files)
        self.names, self.others = _sort_out(found)

    def open(self, name: str) -> IO[bytes]:
        file = os.path.join(self.path, name)
        try:
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                raise DatasetError(f"{name} in {self.path} is not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise DatasetError(f"{name} in {self.path} is larger than {MAX_FILE_BYTES >> 20} MiB")
            return open(file, "rb")
        except OSError as err:
            raise DatasetError(f"{name} in {self.path} can't be read: {err.strerror or err}") from err

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def read_labels_file(self) -> bytes | None:
        return self.read(LABELS_FILE) if os.path.isfile(os.path.join(self.path, LABELS_FILE)) else None


_NOT_ZIPS = (
    (rb"\Z", "it is empty; download it anew"),
    (rb"PK", "it is damaged or not whole ({}); download or make it anew"),
    (rb"\s*<(!doctype|html|\?xml|head|body)", "it is a web page, e.g. that of a login; download it from a direct link"),
    (rb"\x1f\x8b|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "it is no zip but another archive; unpack it"),
)


def _no_zip(path: str, err: Exception) -> str:
    """What a file is that no zip reader can read, told by its first bytes, and what to do."""
    with open(path, "rb") as file:
        head = file.read(64)
    found = (words for pattern, words in _NOT_ZIPS if re.match(pattern, head, re.IGNORECASE))
    return next(found, "{}").format(err)


class ZipSource:
    """Image files inside a zip; each process opens it for itself, so workers and threads may share the object."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        entries = [info.filename for info in self._open().infolist() if not info.is_dir()]
        self.names, self.others = _sort_out(entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _open(self) -> zipfile.ZipFile:
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = os.getpid(), zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as err:
                raise DatasetError(f"{self.path} is not a readable zip file: {_no_zip(self.path, err)}") from err
        return self._handle[1]

    def open(self, name: str) -> IO[bytes]:
        try:
            file = self._open()
            if file.getinfo(name).file_size > MAX_FILE_BYTES:
                raise DatasetError(f"{name} in {self.path} is larger than {MAX_FILE_BYTES >> 20} MiB")
            return file.open(name)
        except ZIP_ERRORS as err:
            raise DatasetError(f"{name} in {self.path} can't be read: {' '.join(str(err).split())}") from err

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            try:
                return file.read()
            except ZIP_ERRORS as err:
                raise DatasetError(f"{name} in {self.path} can't be read: {' '.join(str(err).split())}") from err

    def read_labels_file(self) -> bytes | None:
        return self.read(LABELS_FILE) if LABELS_FILE in self.others else None


def open_source(path: str | os.PathLike) -> Source:
    """Find the images of a folder (recursive) or a .zip file.

    Raises:
        DatasetError: No such path, another kind of file, a broken zip, or no image in it.
    """
    path = os.fspath(path)
    source: Source
    if os.path.isdir(path):
        source = FolderSource(path)
    elif not os.path.exists(path):
        raise DatasetError(f"{path}: no such folder or zip file; give a folder with images or a .zip")
    elif not os.path.isfile(path):  # a pipe would be waited for
        raise DatasetError(f"{path} is not a regular file; give a folder with images or a .zip")
    elif os.path.splitext(path)[1].lower() == ".zip":
        source = ZipSource(path)
    else:
        raise DatasetError(f"{path} is neither a folder nor a .zip file; give a folder with images or a .zip")
    if not source.names:
        raise DatasetError(f"{path} holds no image files (png, jpg, webp, …); give a folder or zip that does")
    return source


def read_meta(source: Source) -> dict[str, Any]:
    """The object in dataset.json; empty if there is no such file.

    Raises:
        DatasetError: dataset.json can't be read or is no JSON object.
    """
    text = source.read_labels_file()
    if text is None:
        return {}
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise DatasetError(f"{LABELS_FILE} in {source.path} is not valid JSON ({err})") from err
    if not isinstance(meta, dict):
        raise DatasetError(f'{LABELS_FILE} in {source.path} must be an object with the key "labels"')
    return meta


def labels_by_name(meta: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """The list `labels` of dataset.json as a dictionary from relative path to label; None if there are none."""
    pairs = meta.get("labels")
    if pairs is None:
        return None
    well_formed = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    )
    if not well_formed:
        raise DatasetError(f'"labels" in {LABELS_FILE} of {path} must be a list of [relative path, label]')
    return {name.replace("\\", "/"): label for name, label in pairs}


def parse_labels(meta: Mapping[str, Any], names: Sequence[str], path: str) -> np.ndarray | None:
    """Labels in the order of `names`: int64 [N] class ids or float32 [N, L] vectors; None if there are none.

    Raises:
        DatasetError: Malformed labels, or an image without one.
    Source: spec training-and-metrics section 5.
    """
    table = labels_by_name(meta, path)
    if table is None:
        return None
    missing = [name for name in names if name not in table]
    if missing:
        raise DatasetError(
            f"{LABELS_FILE} of {path} has no label for {missing[0]} ({len(missing)} of {len(names)} images miss one);"
            " label every image or none"
        )
    values = [table[name] for name in names]
    where = f"{LABELS_FILE} of {path}"
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        wrong = next((v for v in values if not 0 <= v < MAX_CLASSES), None)
        if wrong is not None:
            raise DatasetError(f"class id {wrong} in {where}; ids count from 0 and stay below {MAX_CLASSES}")
        return np.array(values, dtype=np.int64)
    try:
        vectors = np.array(values, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        vectors = np.empty(0, np.float32)
    if vectors.ndim != 2 or not vectors.shape[1] or not np.isfinite(vectors).all():
        raise DatasetError(f"labels in {where} must be all whole class ids or all number vectors of one length")
    return vectors


# --- the data set


class ImageDataset:
    """Square images of one size from a folder or zip.

    Files in odd formats are converted as `torch_utils.images.to_grey_or_rgb` does it, transparency laid over white.
    Where grey and colour are mixed, everything is RGB.

    Args:
        path: Folder (searched recursively) or .zip file, with an optional dataset.json at its root.
        resolution: Side that the images must have; None takes what is there.
        use_labels: Read the labels of dataset.json.
        max_size: Keep that many images, drawn with `random_seed`.
        xflip: Append a mirrored copy of every image; doubles the length.
        random_seed: Seed of the subset.
        cache: Keep decoded images in memory if all of them together stay below the limit; mirroring takes none.
        cache_bytes: That limit; None is `CACHE_LIMIT_BYTES`.
    Raises:
        DatasetError: The data can't be used; one line.
    Source: spec training-and-metrics section 5.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        resolution: int | None = None,
        use_labels: bool = False,
        max_size: int | None = None,
        xflip: bool = False,
        random_seed: int = 0,
        cache: bool = True,
        cache_bytes: int | None = None,
    ) -> None:
        if max_size is not None and max_size < 1:
            raise DatasetError(f"max_size is {max_size}; keep at least one image")
        self.path = os.fspath(path)
        self.name = os.path.splitext(os.path.basename(os.path.abspath(self.path)))[0]
        self._source = open_source(self.path)
        self._names = self._source.names
        self.num_source_images = len(self._names)
        meta = read_meta(self._source)
        self._labels = self._read_labels(meta) if use_labels else None
        side, self.num_channels = self._read_shape(meta, resolution)
        self.resolution = side
        self.image_shape = (self.num_channels, side, side)
        self.raw_indices, self.flips = select_subset(self.num_source_images, max_size, random_seed, xflip)
        self._cache: dict[int, np.ndarray] = {}
        self._want_cache = cache
        self._cache_bytes = CACHE_LIMIT_BYTES if cache_bytes is None else cache_bytes
        self._num_decoded = int((~self.flips).sum())  # images without their mirrored copies
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.raw_indices)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 image [C, H, W], float32 label [L]), both the caller's own."""
        index = range(len(self))[index]
        image = self._source_image(int(self.raw_indices[index]))
        return (image[:, :, ::-1] if self.flips[index] else image).copy(), self.get_label(index)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self[i] for i in range(len(self)))

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(uint8 images [B, C, H, W], float32 labels [B, L]) of the given items."""
        return _stack([self[int(i)] for i in indices])

    def file_name(self, index: int) -> str:
        """Relative path of the file behind an item."""
        return self._names[int(self.raw_indices[index])]

    def image_batches(
        self, batch_size: int = 64, *, rgb: bool = False, batches: slice = slice(None), num: int | None = None
    ) -> Iterator[torch.Tensor]:
        """All images in order, or the first `num`, as uint8 [N, C, H, W]; with `rgb`, grey is repeated thrice.

        Only those of the batches that `batches` names are read, e.g. every second one.
        """
        num = len(self) if num is None else min(num, len(self))
        for start in range(0, num, batch_size)[batches]:
            batch, _ = self.batch(range(start, min(start + batch_size, num)))
            yield images.opaque(batch).expand(-1, 3, -1, -1).contiguous() if rgb else batch

    def full(self, *, xflip: bool = False) -> "ImageDataset":
        """The same data without subset and, unless asked for, mirroring: what evaluation calls the real images."""
        return self._with_items(*select_subset(self.num_source_images, None, 0, xflip))

    def left_out(self) -> "ImageDataset | None":
        """The images that the subset leaves out, none of them mirrored; None where it is no subset."""
        raw = np.setdiff1d(np.arange(self.num_source_images), self.raw_indices)
        return self._with_items(raw, np.zeros(len(raw), dtype=bool)) if len(raw) else None

    def _with_items(self, raw_indices: np.ndarray, flips: np.ndarray) -> "ImageDataset":
        other = copy.copy(self)
        other.raw_indices, other.flips = raw_indices, flips
        other._fingerprint = None
        return other

    def uncached(self) -> "ImageDataset":
        """The same data, read from its files at every access: what looks at it beside training leaves no trace."""
        other = copy.copy(self)
        other._cache, other._want_cache = {}, False
        return other

    def source_images(self, batch_size: int = 64) -> Iterator[torch.Tensor]:
        """All images of the source, without subset and mirroring, as uint8 [N, 3, H, W] batches."""
        return self.full().image_batches(batch_size, rgb=True)

    @property
    def has_labels(self) -> bool:
        """Whether items carry labels."""
        return self._labels is not None

    @property
    def label_dim(self) -> int:
        """Length of a label: largest class id of the *whole* set + 1, or the vectors' length; 0 without labels."""
        if self._labels is None:
            return 0
        return int(self._labels.max()) + 1 if self._labels.ndim == 1 else int(self._labels.shape[1])

    @property
    def label_shape(self) -> tuple[int]:
        """Shape of one label."""
        return (self.label_dim,)

    def raw_label(self, index: int) -> tuple[float, ...] | int | None:
        """Label as stored: a class id, a vector, or None."""
        if self._labels is None:
            return None
        label = self._labels[self.raw_indices[index]]
        return int(label) if self._labels.ndim == 1 else tuple(float(v) for v in label)

    def get_label(self, index: int) -> np.ndarray:
        """float32 [L]: one-hot for class ids, vectors unchanged, empty without labels."""
        if self._labels is None:
            return np.zeros(0, np.float32)
        label = self._labels[self.raw_indices[index]]
        if self._labels.ndim == 2:
            return label.copy()
        onehot = np.zeros(self.label_dim, np.float32)
        onehot[label] = 1
        return onehot

    def fingerprint(self) -> str:
        """SHA-256 (hex) of shape, pixels in order, labels and mirroring; path, names and container don't count."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            kept = self.raw_indices[~self.flips]
            mirrored = bool(self.flips.any())
            digest.update(json.dumps([list(self.image_shape), len(kept), self.label_dim, mirrored]).encode())
            for raw in kept:
                digest.update(self._source_image(int(raw)).tobytes())
            if self._labels is not None:
                digest.update(np.ascontiguousarray(self._labels[kept]).tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _source_image(self, raw: int) -> np.ndarray:
        """uint8 [C, H, W] of one file, not to be written to."""
        if raw in self._cache:
            return self._cache[raw]
        name = self._names[raw]
        try:
            image = images.open_image(self._source.read(name))
            image = images.to_rgba(image) if self.num_channels == 4 else images.to_grey_or_rgb(image)
            if self.num_channels == 3:
                image = image.convert("RGB")
        except DatasetError:
            raise
        except ValueError as err:
            raise DatasetError(self._unreadable(name, err)) from err
        array = images.from_pil(image)
        if array.shape != self.image_shape:
            raise DatasetError(self._mismatch(name, array.shape, self._names[0], self.image_shape))
        if self._want_cache and self._num_decoded * array.nbytes < self._cache_bytes:
            self._cache[raw] = array
        return array

    def _read_labels(self, meta: Mapping[str, Any]) -> np.ndarray:
        labels = parse_labels(meta, self._names, self.path)
        if labels is None:
            raise DatasetError(
                f"{self.path} has no labels; put images into one folder per class and run"
                f" `{BUILD_COMMAND} {shlex.quote(self.path)} DEST.zip --resolution N --labels from-folders`,"
                f' or list them in {LABELS_FILE} as {{"labels": [["a.png", 0], …]}}'
            )
        return labels

    def _read_shape(self, meta: Mapping[str, Any], wanted: int | None) -> tuple[int, int]:
        """(side, channels), from every file's header; our own builder's word is taken for all but the first file."""
        first = self._names[0]
        width, height, channels = self._header(first)
        if width != height:
            raise DatasetError(
                f"{first} in {self.path} is {width}x{height}, not square;"
                f" `{self._build_hint(wanted or min(width, height))}` makes it so"
            )
        if not (isinstance(self._source, ZipSource) and isinstance(meta.get("build"), dict)):
            for name in self._names[1:]:
                w, h, c = self._header(name)
                if (w, h) != (width, height):
                    raise DatasetError(self._mismatch(name, (c, h, w), first, (channels, height, width)))
                channels = max(channels, c)
        if wanted is not None and wanted != width:
            raise DatasetError(
                f"{self.path} holds {width}x{width} images, wanted {wanted}x{wanted};"
                f" `{self._build_hint(wanted)}` makes them"
            )
        if isinstance(meta.get("build"), dict) and meta["build"].get("channels") == 4:
            channels = 4  # only where it was asked for: elsewhere transparency is laid on white
        return width, channels

    def _header(self, name: str) -> tuple[int, int, int]:
        try:
            with self._source.open(name) as file, images.open_image(file) as image:
                return (*image.size, images.num_channels(image))
        except DatasetError:
            raise
        except (ValueError, *ZIP_ERRORS) as err:
            raise DatasetError(self._unreadable(name, err)) from err

    def _build_hint(self, resolution: int) -> str:
        return build_command(self.path, resolution)

    def _unreadable(self, name: str, err: Exception) -> str:
        return (
            f"{name} in {self.path}: {err}; remove it, or `{BUILD_COMMAND} {shlex.quote(self.path)} DEST.zip"
            " --resolution N` leaves it out"
        )

    def _mismatch(self, name: str, got: Sequence[int], first: str, expected: Sequence[int]) -> str:
        def describe(shape: Sequence[int]) -> str:
            return f"{shape[2]}x{shape[1]} {_CHANNELS[shape[0]]}"

        return (
            f"{name} in {self.path} is {describe(got)} but {first} is {describe(expected)};"
            f" `{self._build_hint(min(expected[1:]))}` makes all alike"
        )


_CHANNELS = {1: "grey", 3: "RGB"}


def select_subset(num: int, max_size: int | None, random_seed: int, xflip: bool) -> tuple[np.ndarray, np.ndarray]:
    """(source index, mirrored or not) of every item.

    Source: spec training-and-metrics section 5 (RandomState shuffle, first max_size, sorted; mirrored copies appended).
    """
    indices = np.arange(num, dtype=np.int64)
    if max_size is not None and max_size < num:
        np.random.RandomState(random_seed % (1 << 31)).shuffle(indices)
        indices = np.sort(indices[:max_size])
    flips = np.zeros(len(indices), dtype=bool)
    if xflip:
        indices, flips = np.tile(indices, 2), np.concatenate([flips, ~flips])
    return indices, flips


def build_command(path: str, resolution: int, *options: str) -> str:
    """The command line that turns `path` into a usable data set; the side is rounded down to a power of two >= 4."""
    side = 1 << max(resolution.bit_length() - 1, 2)
    return " ".join([BUILD_COMMAND, shlex.quote(os.fspath(path)), "DEST.zip", "--resolution", str(side), *options])


def check_fits(
    *,
    resolution: int,
    num_channels: int,
    label_dim: int,
    want_resolution: int,
    want_channels: int,
    want_label_dim: int,
    data: str | os.PathLike,
    network: str | os.PathLike = "the network",
) -> None:
    """Refuse data that does not fit a network, before any work.

    Args:
        resolution, num_channels, label_dim: What the data set has.
        want_resolution, want_channels, want_label_dim: What the network was made for.
        data, network: How the two sides are called in the message.
    Raises:
        DatasetError: They differ; one line with both sides and what would fix it.
    """
    have, want = (resolution, num_channels, label_dim), (want_resolution, want_channels, want_label_dim)
    if have == want:
        return
    remedies, options = [], []
    if num_channels != want_channels:
        options.append({1: "--grey", 4: "--rgba"}.get(want_channels, "--rgb"))
    if label_dim != want_label_dim:
        if want_label_dim == 0:
            remedies.append("leave out --cond")
        elif label_dim == 0:
            remedies.append("add --cond true if the data has labels (from one folder per class: --labels from-folders)")
        else:
            remedies.append(f"use labels of {want_label_dim} numbers, or train from scratch (--resume none)")
        if label_dim != 1:
            classes = f"--classes {label_dim}" if label_dim else "--classes 0 --keep-class K"
            command = f"{SURGERY_COMMAND} {shlex.quote(os.fspath(network))} NEW.pkl {classes}"
            remedies.append(f"or change the network: `{command}` and --resume NEW.pkl")
    if resolution != want_resolution or options:
        remedies.insert(0, f"run `{build_command(os.fspath(data), want_resolution, *options)}` and train on DEST.zip")
    raise DatasetError(f"{data} has {_describe(*have)}, but {network} wants {_describe(*want)}; {'; '.join(remedies)}")


def _describe(resolution: int, num_channels: int, label_dim: int) -> str:
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}.get(num_channels, f"{num_channels}-channel")
    labels = f"with labels of {label_dim} numbers" if label_dim else "without labels"
    return f"{resolution}x{resolution} {kind} images {labels}"


# --- the order of things


class InfiniteSampler:
    """Endless stream of indices: a shuffled order, swapped a little after every draw; every rank gets every n-th.

    Args:
        size: Number of items, or something with a length.
        rank, num_replicas: This process and how many there are; all run the same stream.
        shuffle: False gives 0, 1, 2, … over and over.
        seed: Seed of the order.
        window_size: How far back a swap may reach, as a fraction of the size.
        start: How many indices of this rank to leave out at the beginning (a resumed run).
    Raises:
        ValueError: A size or rank out of range.
    Source: spec training-and-metrics section 5.
    """

    def __init__(
        self,
        size: "int | ImageDataset",
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        window_size: float = 0.5,
        *,
        start: int = 0,
    ) -> None:
        self.size = size if isinstance(size, int) else len(size)
        if self.size < 1:
            raise ValueError("nothing to draw from: the data set is empty")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} of {num_replicas} replicas; ranks count from 0")
        if not 0 <= window_size <= 1:
            raise ValueError(f"window_size is {window_size}; it lies in [0, 1]")
        self.rank, self.num_replicas, self.shuffle = rank, num_replicas, shuffle
        self.seed, self.window_size, self.start = seed, window_size, start

    def __iter__(self) -> Iterator[int]:
        rng = np.random.RandomState(self.seed % (1 << 31))
        shuffled, window = np.arange(self.size), 0
        if self.shuffle:
            rng.shuffle(shuffled)
            window = round(self.size * self.window_size)  # Python rounds half to even
        order: list[int] = shuffled.tolist()
        back = _draws(rng, window)
        skip, step = self.start, 0
        while True:
            i = step % self.size
            if step % self.num_replicas == self.rank:
                if skip:
                    skip -= 1
                else:
                    yield order[i]
            if window >= 2:
                j = (i - next(back)) % self.size
                order[i], order[j] = order[j], order[i]
            step += 1


def _draws(rng: np.random.RandomState, below: int) -> Iterator[int]:
    """What `rng.randint(below)` gives, call by call, drawn many at a time: a resumed run skips millions of them."""
    while True:
        yield from rng.randint(below, size=4096).tolist()


class UnreadableImages:
    """Counts the images that a run could not read, up to a limit, and finds each a neighbour in the data set.

    Threads may share one.

    Args:
        limit: Different images that may fail.
        say: Receives one line per image that fails for the first time; called from the reading thread.
    """

    def __init__(self, limit: int, say: Callable[[str], None]) -> None:
        self.limit = limit
        self.names: list[str] = []
        self._say = say
        self._lock = threading.Lock()

    def item(self, dataset: ImageDataset, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The item, or the next one that can be read.

        Raises:
            DatasetError: More images than the limit can't be read; the message names the last.
        """
        for offset in range(len(dataset)):
            try:
                return dataset[(index + offset) % len(dataset)]
            except DatasetError as err:
                self._note(dataset.file_name((index + offset) % len(dataset)), err)
        raise DatasetError(f"no image of {dataset.path} can be read any more; is the folder or disk still there?")

    def _note(self, name: str, err: DatasetError) -> None:
        with self._lock:
            if name in self.names:
                return
            if len(self.names) >= self.limit:
                raise DatasetError(f"{err} (image {len(self.names) + 1} of them; --max-unreadable is {self.limit})")
            self.names.append(name)
            self._say(f"Warning: {err}; left out (image {len(self.names)} of at most {self.limit} that may fail)")


def iterate_batches(
    dataset: ImageDataset,
    sampler: Iterable[int],
    batch_size: int,
    num_workers: int = 0,
    unreadable: UnreadableImages | None = None,
    *,
    part: slice = slice(None),
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches in the sampler's order: (uint8 images [B, C, H, W], float32 labels [B, L]).

    The result does not depend on `num_workers`, the number of threads that read ahead. Closing the iterator ends them.
    A thread that fails has its batch read once more in step. A finite sampler's last batch may be smaller.

    Args:
        unreadable: Stands in for images that can't be read; None raises at the first.
        part: Of every batch only the positions in it are read and returned: several processes that follow one order
            share it so.
    """

    def read(chunk: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if unreadable is None:
            return dataset.batch(chunk)
        return _stack([unreadable.item(dataset, index) for index in chunk])

    def result(future: Future, chunk: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return future.result()
        except DatasetError:
            raise
        except Exception:
            return read(chunk)

    chunks = (chunk[part] for chunk in _chunks(sampler, batch_size))
    if num_workers < 1:
        yield from (read(chunk) for chunk in chunks)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="dataset")
    try:
        ahead: deque[tuple[Future, list[int]]] = deque()
        for chunk in chunks:
            ahead.append((pool.submit(read, chunk), chunk))
            if len(ahead) > num_workers:
                yield result(*ahead.popleft())
        while ahead:
            yield result(*ahead.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stack(items: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.stack([i for i, _ in items])), torch.from_numpy(np.stack([c for _, c in items]))


def _chunks(indices: Iterable[int], size: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for index in indices:
        chunk.append(index)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def grid_indices(
    dataset: ImageDataset, size: tuple[int, int] | None = None, *, random_seed: int = 0
) -> tuple[tuple[int, int], list[int]]:
    """((columns, rows), indices row by row) of the images in reals.png; with labels, every row shows one label.

    Args:
        size: (columns, rows); None fits an 8K screen: 32x32 at 64-128 pixels, 7x4 at 1024.
    Source: spec training-and-metrics section 2 "Grid".
    """
    _, height, width = dataset.image_shape
    cols, rows = size or (int(np.clip(7680 // width, 7, 32)), int(np.clip(4320 // height, 4, 32)))
    rng = np.random.RandomState(random_seed % (1 << 31))
    if not dataset.has_labels:
        order = list(range(len(dataset)))
        rng.shuffle(order)
        return (cols, rows), [order[i % len(order)] for i in range(cols * rows)]
    groups: dict[tuple[float, ...], list[int]] = {}
    for index in range(len(dataset)):
        label = dataset.raw_label(index)
        groups.setdefault(label[::-1] if isinstance(label, tuple) else (float(label or 0),), []).append(index)
    members = [groups[key] for key in sorted(groups)]
    for group in members:
        rng.shuffle(group)
    indices: list[int] = []
    for row in range(rows):
        group = members[row % len(members)]
        first = row // len(members) * cols
        indices.extend(group[(first + i) % len(group)] for i in range(cols))
    return (cols, rows), indices


def _sort_out(files: Iterable[str]) -> tuple[list[str], list[str]]:
    """(files with an extension that Pillow reads, all others), sorted; shadow files of macOS are no images."""
    extensions = images.readable_extensions()
    names: list[str] = []
    others: list[str] = []
    for name in sorted(set(files)):
        shadow = name.startswith("__MACOSX/") or name.rsplit("/", 1)[-1].startswith("._")
        readable = os.path.splitext(name)[1].lower() in extensions and not shadow
        (names if readable else others).append(name)
    return names, others


def _raise(err: OSError) -> None:
    raise DatasetError(f"{err.filename}: {err.strerror}") from err
