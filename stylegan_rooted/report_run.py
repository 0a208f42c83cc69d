"""A run folder as a report reads it: its own, or one of the StyleGAN2-ADA family, whole, unfinished or damaged.

Reads only regular files that lie inside the folder: a link that leads out of it is named, not followed. What is
missing or cannot be read becomes a line in `missing`, never an error. Knows nothing of charts and pages.
"""

import contextlib
import json
import math
import os
import re
import socket
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.util import is_url
from training import measured, watchdog
from training.config import FinetuneConfig
from training.measured import BOTH, FRECHET
from training.watchdog import Figures, Verdict

MAX_FILE_BYTES = 64 << 20
STILL_SEC = 600  # of silence after which a run on another machine counts as interrupted
MAX_JUDGED = 400  # ticks without a recorded state that are judged again; it takes the square of their number
BEST_FILE = "best-snapshot.json"
OPTIONS_FILE, STATS_FILE, ENVIRONMENT_FILE = "training_options.json", "stats.jsonl", "environment.json"
SNAPSHOT = re.compile(r"network-snapshot-(\d+)\.pkl")
FAKES = re.compile(r"fakes(\d+)\.png")


@dataclass(frozen=True)
class MetricRow:
    """One figure in a line of a metric-*.jsonl.

    Attributes:
        kimg: When its snapshot was taken.
        value: The figure.
        error: Its standard error; None if unknown.
        snapshot: File name of the pickle.
        warnings: What stands beside the figure.
        provenance: What it was computed from and with.
        added: Whether it came later, from the command `metrics`.
    """

    kimg: float
    value: float
    error: float | None
    snapshot: str
    warnings: list[str]
    provenance: dict[str, Any]
    added: bool = False


@dataclass
class RunRecord:
    """What a run folder tells. Folders of the StyleGAN2-ADA family serve too; what they lack is left out.

    `metrics` holds, by name and in order of kimg, what was measured alike; `apart` what was measured otherwise.
    """

    path: Path
    options: dict[str, Any] = field(default_factory=dict)
    config: FinetuneConfig | None = None
    stats: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[MetricRow]] = field(default_factory=dict)
    apart: dict[str, list[MetricRow]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)

    @property
    def kimg(self) -> float:
        """Where the run stands; a run that finished may say more in history.jsonl than is left of stats.jsonl."""
        return max(self.last_tick, self.finished_at)

    @property
    def last_tick(self) -> float:
        """kimg of the last line of stats.jsonl."""
        return next((k for row in reversed(self.stats) if (k := mean_of(row, "Progress/kimg")) is not None), 0.0)

    @property
    def finished_at(self) -> float:
        """kimg at the end, as history.jsonl says; 0 where the run has not finished."""
        last = self.history[-1] if self.history else {}
        nimg = last.get("nimg")
        return nimg / 1000 if last.get("event") == "finished" and isinstance(nimg, int | float) else 0.0

    @property
    def total_kimg(self) -> float | None:
        """How long it was meant to be."""
        if self.config is not None:
            return self.config.schedule.kimg
        total = self.options.get("total_kimg")
        return float(total) if isinstance(total, int | float) else None

    @property
    def snapshots(self) -> dict[int, Path]:
        """The exchange pickles that are there and not known to be damaged, by whole kimg."""
        found = numbered(self.path, SNAPSHOT)
        return {kimg: file for kimg, file in found.items() if file.name not in self.unreadable}

    def curve(self, key: str) -> list[tuple[float, float | None]]:
        """(kimg, mean) of one statistic at every tick."""
        points = [(mean_of(row, "Progress/kimg"), mean_of(row, key)) for row in self.stats]
        return [(x, y) for x, y in points if x is not None]

    def headline(self) -> tuple[str, list[MetricRow]]:
        """Name and measurements of the figure to go by, by the rule of `training.measured`; ("", []) where none is."""
        for name in self._in_use(BOTH):
            rows = [row for row in self.metrics[name] if not (name in FRECHET and row.warnings)]
            if rows:
                return name, rows
        return "", []

    def still_there(self, rows: Sequence[MetricRow]) -> list[MetricRow]:
        """Those whose pickle lies in the folder, undamaged as far as known, and is not by now a later snapshot's."""
        last = {row.snapshot: row for row in rows if SNAPSHOT.fullmatch(row.snapshot)}
        usable = {name for name in last if name not in self.unreadable and (self.path / name).is_file()}
        return [row for name, row in last.items() if name in usable]

    def figures_of(self, snapshot: str) -> dict[str, MetricRow]:
        """The newest recorded figures of one snapshot, by name; those of the run's series where it has any."""
        both = (self.apart, self.metrics)
        return {name: row for part in both for name, rows in part.items() for row in rows if row.snapshot == snapshot}

    def status(self) -> str:
        """finished, stopped, failed, running or interrupted, by history.jsonl; unknown where that is silent."""
        last = self.history[-1] if self.history else {}
        event = str(last.get("event", ""))
        if event in ("finished", "stopped", "failed"):
            return event
        if not event:
            return "unknown"
        if last.get("host") == socket.gethostname() and os.name == "posix":
            return "running" if _alive(last.get("pid")) else "interrupted"
        newest = max((t for row in [*self.stats[-1:], last] if isinstance(t := row.get("timestamp"), float)), default=0)
        return "running" if time.time() - newest < STILL_SEC else "interrupted"

    def signs(self) -> dict[str, str]:
        """Evidence of every state of the watchdog that applies at the last tick."""
        if not self.stats:
            return {}
        history = [Figures.of_row(row) for row in self.stats]
        figure, distances = self.distances(self.kimg)
        return watchdog.signs(history, p_max=self._p_max(), distances=distances, figure=measured.label(figure))

    def verdict(self) -> Verdict:
        """The state at the last tick; its evidence is found anew, as stats.jsonl holds the name only."""
        recorded = self.stats[-1].get("state") if self.stats else None
        signs = self.signs()
        if recorded in signs:
            return Verdict(str(recorded), signs[str(recorded)])
        state, evidence = next(iter(signs.items()), (watchdog.HEALTHY, ""))
        return Verdict(state, evidence)

    def states(self) -> list[tuple[float, str]]:
        """(kimg, state) wherever the state changes, the first tick included."""
        changes: list[tuple[float, str]] = []
        history: list[Figures] = []
        for index, row in enumerate(self.stats):
            history.append(Figures.of_row(row))
            state = row.get("state")
            if state not in watchdog.ADVICE and index < MAX_JUDGED:
                _, distances = self.distances(history[-1].kimg)
                state = watchdog.judge(history, p_max=self._p_max(), distances=distances).state
            if state in watchdog.ADVICE and (not changes or changes[-1][1] != state):
                changes.append((history[-1].kimg, state))
        return changes

    def distances(self, kimg: float) -> tuple[str, list[float]]:
        """Name and values of the Fréchet distance that the watchdog goes by, measured up to `kimg`."""
        name = next(iter(self._in_use(FRECHET)), "")
        return name, [row.value for row in self.metrics.get(name, []) if row.kimg <= kimg]

    def _p_max(self) -> float | None:
        adaptive = self.config is not None and self.config.augment.aug == "ada"
        return self.config.augment.p_max if adaptive and self.config is not None else None

    def _in_use(self, names: tuple[str, ...]) -> list[str]:
        """Those that the newest measurement of any of them holds."""
        series = {name: self.metrics[name] for name in names if name in self.metrics}
        return measured.newest_of({name: [(row.kimg, row.added) for row in rows] for name, rows in series.items()})


def find_run(network: str | Path) -> Path | None:
    """The run folder that a pickle lies in, if it lies in one."""
    if is_url(str(network)):
        return None
    folder = Path(network).parent
    return folder if (folder / STATS_FILE).is_file() and (folder / OPTIONS_FILE).is_file() else None


def is_run(path: str | Path) -> bool:
    """Whether a path is a folder in which training left something."""
    folder = Path(path)
    if is_url(str(path)) or not folder.is_dir():
        return False
    return any((folder / name).exists() for name in (OPTIONS_FILE, STATS_FILE)) or bool(numbered(folder, SNAPSHOT))


def read_run(path: Path) -> RunRecord:
    """Everything small that a run folder holds.

    Raises:
        ValueError: Not a run folder.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; name a run folder, e.g. runs/00000-cats")
    if not is_run(path):
        raise ValueError(f"{path} is no run folder: it has neither {OPTIONS_FILE} nor {STATS_FILE} nor snapshots")
    run = RunRecord(path.resolve())
    run.options = _object(run, OPTIONS_FILE, "no options")
    run.environment = _object(run, ENVIRONMENT_FILE, "no versions, no fingerprints, no base model")
    with contextlib.suppress(ValueError, TypeError):
        run.config = FinetuneConfig.from_dict(run.options) if run.options else None
    run.stats = [row for row in _lines(run, STATS_FILE, "no curves and no state") if isinstance(row, dict)]
    run.history = [row for row in _lines(run, "history.jsonl", None) if isinstance(row, dict)]
    for file in sorted(run.path.glob("metric-*.jsonl")):
        lines = _lines(run, file.name, None)
        num_useless = sum(not _add_metric(run.metrics, line) for line in lines)
        if num_useless:
            useless = f"{num_useless} of {len(lines)} lines hold no figure of a snapshot"
            run.missing.append(f"{file.name}: {useless}, left out")
    for name, rows in run.metrics.items():
        keys = [measured.conditions(row.provenance) for row in rows]
        wanted = measured.in_series([(key, row.added) for key, row in zip(keys, rows)])
        newest = {row.kimg: row for key, row in zip(keys, rows) if key == wanted}  # again: the later line counts
        run.metrics[name] = [newest[kimg] for kimg in sorted(newest)]
        if others := [row for key, row in zip(keys, rows) if key != wanted]:
            run.apart[name] = others
    if os.path.lexists(run.path / BEST_FILE):
        _object(run, BEST_FILE, "the best snapshot is told from the figures")
    if run.finished_at > run.last_tick * 1.001 and run.stats:
        lost = f"ends at {run.last_tick:.4g} kimg, the run at {run.finished_at:.4g}: its last lines are lost"
        run.missing.append(f"{STATS_FILE} {lost}")
    if not run.snapshots:
        run.missing.append("network-snapshot-*.pkl: none is there, so that nothing can be generated")
    return run


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} where there is none or it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Files of a folder whose whole name matches, by the number in it, in order."""
    try:
        found = {int(match[1]): folder / name for name in os.listdir(folder) if (match := pattern.fullmatch(name))}
    except OSError:
        return {}
    return dict(sorted(found.items()))


def read_inside(folder: Path, name: str) -> bytes:
    """Content of a regular file of a folder.

    Args:
        folder: Resolved.
        name: A plain file name.

    Raises:
        OSError: There is none, or it cannot be read.
        ValueError: It leads out of the folder, is no regular file, or is too large to be what it should be.
    """
    path = folder / name
    if path.name != name or path.resolve().parent != folder:
        raise ValueError("leads out of the folder, not followed")
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:  # a pipe would wait for ever
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"is larger than {MAX_FILE_BYTES >> 20} MiB")
        return file.read()


def mean_of(row: dict[str, Any], key: str) -> float | None:
    """The mean of one statistic in a line of stats.jsonl; None where it is missing or not a finite number."""
    value = row.get(key)
    value = value.get("mean") if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _object(run: RunRecord, name: str, lost: str) -> dict[str, Any]:
    try:
        value = json.loads(read_inside(run.path, name))
    except FileNotFoundError:
        run.missing.append(f"{name} is missing: {lost}")
    except (OSError, ValueError, RecursionError) as error:
        run.missing.append(f"{name} cannot be read ({one_line(error)}): {lost}")
    else:
        if isinstance(value, dict):
            return value
        run.missing.append(f"{name} is no JSON object: {lost}")
    return {}


def _lines(run: RunRecord, name: str, lost: str | None) -> list[Any]:
    """Lines of a JSON-lines file; a torn last one is what a run that writes, or was killed, leaves."""
    try:
        text = read_inside(run.path, name).decode("utf-8", "replace")
    except FileNotFoundError:
        if lost:
            run.missing.append(f"{name} is missing: {lost}")
        return []
    except (OSError, ValueError) as error:
        run.missing.append(f"{name} cannot be read ({one_line(error)})" + (f": {lost}" if lost else ""))
        return []
    rows, lines, num_bad = [], text.splitlines(), 0
    for index, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            num_bad += bool(line.strip()) and (index < len(lines) - 1 or text.endswith("\n"))
    if num_bad:
        run.missing.append(f"{name}: {num_bad} of {len(lines)} lines are damaged and left out")
    return rows


def _add_metric(metrics: dict[str, list[MetricRow]], row: Any) -> bool:
    """Sort one line of a metric file in; False for one that lacks what is needed."""
    if not isinstance(row, dict) or not isinstance(row.get("results"), dict):
        return False
    snapshot = str(row.get("snapshot_pkl") or "")
    kimg = row.get("kimg")
    if kimg is None and (match := re.search(r"(\d+)\.pkl$", snapshot)):
        kimg = int(match[1])
    if not isinstance(kimg, int | float) or not math.isfinite(kimg):
        return False
    found = False
    provenance: Any = row.get("provenance")
    errors: Any = row.get("errors")
    warnings = [str(w) for w in row["warnings"]] if isinstance(row.get("warnings"), list) else []
    for name, value in row["results"].items():
        if isinstance(value, int | float) and math.isfinite(value):
            error: Any = errors.get(name) if isinstance(errors, dict) else None
            known, found = isinstance(error, int | float) and math.isfinite(error), True
            metrics.setdefault(str(name), []).append(
                MetricRow(
                    float(kimg),
                    float(value),
                    float(error) if known else None,
                    snapshot,
                    warnings,
                    provenance if isinstance(provenance, dict) else {},
                    measured.ADDED in row,
                )
            )
    return found


def _alive(pid: Any) -> bool:
    """Whether a process of that number is there; POSIX only, as elsewhere signal 0 is a real one."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def one_line(error: BaseException) -> str:
    """What went wrong, as a piece of a sentence."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
