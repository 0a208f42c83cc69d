"""The cache on disk: what lies there, and how to be rid of it. Knows folders and the statistics' own record."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dnnlib import make_cache_dir_path
from metrics.feature_stats import describe_file
from stylegan_rooted.evaluation import STATS_CACHE


@dataclass(frozen=True)
class Entry:
    """One file of the cache.

    Attributes:
        path: Where it is.
        part: Folder of the cache: `feature-stats`, `downloads`, `detectors`, ...
        num_bytes: Its size.
        age_days: Since it was written.
        what: Statistics: detector, images and data; otherwise the file's name.
    """

    path: str
    part: str
    num_bytes: int
    age_days: float
    what: str


def root() -> Path:
    """The cache folder; it need not exist."""
    return Path(make_cache_dir_path())


def entries() -> list[Entry]:
    """Everything in the cache, statistics first; files that vanish meanwhile are left out."""
    found = []
    for path in _files(root()):
        try:
            stat = path.stat()
        except OSError:
            continue
        part = path.relative_to(root()).parts[0] if path.parent != root() else ""
        what = describe_file(path) if part == STATS_CACHE else path.relative_to(root()).as_posix()
        found.append(Entry(str(path), part, stat.st_size, (time.time() - stat.st_mtime) / 86400, what))
    return sorted(found, key=lambda entry: (entry.part != STATS_CACHE, entry.part, entry.path))


def clear(*, everything: bool = False) -> tuple[int, int]:
    """Remove the statistics, or everything; a run that needs them computes them anew.

    Returns:
        (files, bytes) removed.
    """
    num_files = num_bytes = 0
    for entry in entries():
        if everything or entry.part == STATS_CACHE:
            Path(entry.path).unlink(missing_ok=True)
            num_files, num_bytes = num_files + 1, num_bytes + entry.num_bytes
    return num_files, num_bytes


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
