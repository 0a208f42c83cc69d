"""What the metric-*.jsonl of a run folder say of its snapshots: figures in order, the best one, measurements since.

The one definition of the best snapshot: of best-snapshot.json, of --patience, and of what --keep-last spares. A file's
name holds whole kimg, so a later snapshot may replace an earlier one: a file has the figures of its last measurement.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import run_dir

FRECHET = ("fid", "fd", "fid50k_full", "fid50k")
KERNEL = ("kid", "kd", "kid50k_full", "kid50k")
BOTH = FRECHET + KERNEL
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


def distances(path: Path) -> list[float]:
    """The Fréchet distances of a run's snapshots by the detector in use, in order."""
    for metric in in_use(path, FRECHET):
        return [row["results"][metric] for row in rows_of(path, metric)]
    return []


def in_use(path: Path, metrics: tuple[str, ...]) -> list[str]:
    """Those of `metrics` that the newest measurement of any of them holds."""
    newest = {metric: rows[-1]["kimg"] for metric in metrics if (rows := rows_of(path, metric))}
    return [metric for metric, kimg in newest.items() if kimg == max(newest.values())]


def rows_of(path: Path, metric: str) -> list[dict[str, Any]]:
    """The lines of metric-METRIC.jsonl that hold a number for a snapshot, by kimg."""
    rows = [row for row in run_dir.read_jsonl(path / f"metric-{metric}.jsonl") if _usable(row, metric)]
    return sorted(rows, key=lambda row: row["kimg"])


def pending(path: Path) -> set[str]:
    """Pickles of the snapshots that a process beside the run has still to measure: one of them may be the best."""
    kept = (re.fullmatch(r"\.measuring-(\d+)\.pkl", file.name) for file in path.glob(".measuring-*.pkl"))
    return {f"network-snapshot-{int(match[1]) // 1000:06d}.pkl" for match in kept if match}


def _replaced(path: Path, row: dict[str, Any]) -> bool:
    """Whether the file that a measurement names holds a later snapshot by now, as its configuration beside it says."""
    file = path / f"{Path(row['snapshot_pkl']).stem}.config.json"
    try:
        kimg = json.loads(file.read_text(encoding="utf-8"))["training"]["kimg"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(kimg != row["kimg"])


def _usable(row: Any, metric: str) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("results"), dict):
        return False
    numbers = (row["results"].get(metric), row.get("kimg"))
    return all(isinstance(number, int | float) for number in numbers) and bool(row.get("snapshot_pkl"))
