"""What the metric-*.jsonl of a run folder say of its snapshots: figures in order, the best one, measurements since.

The one definition of the best snapshot: of best-snapshot.json, of --patience, and of what --keep-last spares. A file's
name holds whole kimg, so a later snapshot may replace an earlier one: a file has the figures of its last measurement.

Only figures measured alike make a series. The command `metrics` marks the lines that it adds: they belong to the run's
series where they were measured as the run measures, and never decide which series that is.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import run_dir

FRECHET = ("fid", "fd", "fid50k_full", "fid50k")
KERNEL = ("kid", "kd", "kid50k_full", "kid50k")
BOTH = FRECHET + KERNEL
ALIKE = ("extractor", "digest", "resize", "num_real", "num_fake", "covariance", "data_fingerprint")
"""What two figures must share to compare."""

ADDED = "added_by"
"""Key of the lines that did not come from the training itself."""

Conditions = tuple[str, ...]
KINDS: Mapping[str, tuple[str, ...]] = {"auto": BOTH, "fid": FRECHET, "kid": KERNEL, "none": BOTH}


@dataclass(frozen=True)
class Best:
    """The best snapshot of a run by its headline figure.

    Attributes:
        metric: Name of the figure; lower is better for all of them.
        value: The figure.
        std_error: See `MetricResult`.
        snapshot: File name of the snapshot.
        kimg: When it was taken.
        num_measured: Measurements of this figure, of replaced files, too.
        since: How many of them came after the lowest of all.
        lowest: That figure; `value` unless its file was replaced.
        lowest_kimg: When it was measured.
    """

    metric: str
    value: float
    std_error: float | None
    snapshot: str
    kimg: float
    num_measured: int
    since: int
    lowest: float
    lowest_kimg: float

    @property
    def plateau(self) -> str:
        """How long there was nothing better, in words."""
        return (
            f"No better {self.metric} in {self.since} measurements since {self.lowest_kimg:g} kimg ({self.lowest:.4g})"
        )


def best_of(path: Path, kind: str = "auto") -> Best | None:
    """The best snapshot of a run; None where nothing was measured that could say so.

    Of the figures of the newest measurement, that is of the detector in use, the first of `KINDS[kind]` decides. A
    Fréchet distance that carries a warning (too few images) is passed over, as `metrics.evaluate.headline` does, unless
    `kind` is `fid`.

    Args:
        path: The run folder.
        kind: `--keep-best`; `none` keeps no best one, but it can be told all the same.
    """
    for metric in in_use(path, KINDS[kind]):
        only_sure = kind != "fid" and metric in FRECHET
        rows = [row for row in rows_of(path, metric) if not (only_sure and row.get("warnings"))]
        values = [row["results"][metric] for row in rows]
        in_files = {row["snapshot_pkl"]: row for row in rows}.values()
        candidates = [row for row in in_files if not _replaced(path, row)]
        if not candidates:
            continue
        best = min(candidates, key=lambda row: row["results"][metric])
        index = values.index(min(values))
        return Best(
            metric=metric,
            value=best["results"][metric],
            std_error=(best.get("errors") or {}).get(metric),
            snapshot=best["snapshot_pkl"],
            kimg=best["kimg"],
            num_measured=len(rows),
            since=len(rows) - 1 - index,
            lowest=values[index],
            lowest_kimg=rows[index]["kimg"],
        )
    return None


def distances(path: Path) -> tuple[str, list[float]]:
    """Name and values of the Fréchet distance of a run's snapshots by the detector in use, in order."""
    for metric in in_use(path, FRECHET):
        return metric, [row["results"][metric] for row in rows_of(path, metric)]
    return "", []


def label(name: str) -> str:
    """A distance as people read it: FD, KID; names of the family as they are."""
    return name if "50k" in name else name.upper()


def in_use(path: Path, metrics: tuple[str, ...]) -> list[str]:
    """Those of `metrics` that the newest measurement of any of them holds."""
    series = {metric: rows for metric in metrics if (rows := rows_of(path, metric))}
    return newest_of({metric: [(row["kimg"], ADDED in row) for row in rows] for metric, rows in series.items()})


def newest_of(series: Mapping[str, Sequence[tuple[float, bool]]]) -> list[str]:
    """Names whose last measurement is the newest of all; the training's own decide where there are any.

    Args:
        series: (kimg, whether it was added later) of each figure's measurements, by kimg; none is empty.
    """
    own = {name: kimgs for name, rows in series.items() if (kimgs := [kimg for kimg, added in rows if not added])}
    last = {name: kimgs[-1] for name, kimgs in (own or {n: [k for k, _ in r] for n, r in series.items()}).items()}
    return [name for name, kimg in last.items() if kimg == max(last.values())]


def rows_of(path: Path, metric: str) -> list[dict[str, Any]]:
    """The lines of metric-METRIC.jsonl that hold a number for a snapshot and were measured alike, by kimg."""
    rows = [row for row in run_dir.read_jsonl(path / f"metric-{metric}.jsonl") if _usable(row, metric)]
    keys = [conditions(row.get("provenance")) for row in rows]
    wanted = in_series([(key, ADDED in row) for key, row in zip(keys, rows)])
    return sorted((row for key, row in zip(keys, rows) if key == wanted), key=lambda row: row["kimg"])


def conditions(provenance: Any) -> Conditions:
    """What figures of one series share: `ALIKE` and the seed."""
    known = provenance if isinstance(provenance, Mapping) else {}
    return tuple(str(known.get(key)) for key in (*ALIKE, "seed"))


def in_series(lines: Sequence[tuple[Conditions, bool]]) -> Conditions | None:
    """The conditions of a figure's series: the training's latest; where all were added later, the most frequent.

    Args:
        lines: (conditions, whether it was added later) in the order in which they were written.
    """
    own = [key for key, added in lines if not added]
    if own:
        return own[-1]
    return Counter(key for key, _ in reversed(lines)).most_common(1)[0][0] if lines else None


def kimg_in(path: Path, snapshot: str) -> float | None:
    """When the snapshot that a file of a run folder holds was taken, as its configuration beside it says."""
    try:
        text = (path / f"{Path(snapshot).stem}.config.json").read_text(encoding="utf-8")
        kimg = json.loads(text)["training"]["kimg"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kimg if isinstance(kimg, int | float) else None


def waiting_in(path: Path) -> list[tuple[int, Path]]:
    """(images shown, pickle) of the snapshots in a run folder that a process beside the run has still to measure."""
    found = ((re.fullmatch(r"\.measuring-(\d+)\.pkl", file.name), file) for file in path.glob(".measuring-*.pkl"))
    return sorted((int(match[1]), file) for match, file in found if match)


def pending(path: Path) -> set[str]:
    """Names of the snapshots that wait: one of them may be the best."""
    return {f"network-snapshot-{nimg // 1000:06d}.pkl" for nimg, _ in waiting_in(path)}


def _replaced(path: Path, row: dict[str, Any]) -> bool:
    """Whether the file that a measurement names holds a later snapshot by now."""
    kimg = kimg_in(path, row["snapshot_pkl"])
    return kimg is not None and bool(kimg != row["kimg"])


def _usable(row: Any, metric: str) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("results"), dict):
        return False
    numbers = (row["results"].get(metric), row.get("kimg"))
    return all(isinstance(number, int | float) for number in numbers) and bool(row.get("snapshot_pkl"))
