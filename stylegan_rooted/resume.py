"""Which run a command means: a new one, one to continue, or one that is finished. Knows run folders and options.

The same command in the same outdir continues its run. What makes it the same is the resolved configuration without the
fields of `MAY_CHANGE`, the content of the data, and the content of the network pickle it began with.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch_utils.distributed import DistEnv
from training import checkpoint, measured, run_dir
from training.config import FinetuneConfig
from training.dataset import DatasetError, ImageDataset
from training.run_lock import FolderLock
from training.watchdog import DIVERGING

OPTIONS_FILE = "training_options.json"
ENVIRONMENT_FILE = "environment.json"
HISTORY_FILE = "history.jsonl"
ROUND_OFF = "may change sums by round-off: the run goes on, but is no longer the same to the last bit"
MAY_CHANGE = {
    "schedule.kimg": "the new end; a finished run goes on when it is larger",
    "schedule.tick": "from the next tick on",
    "schedule.snap": "from the next snapshot on",
    "schedule.autosave_min": "at once",
    "schedule.keep_last": "from the next snapshot on",
    "schedule.keep_every": "from the next snapshot on",
    "schedule.keep_best": "from the next snapshot on",
    "metric.metrics": "from the next snapshot on",
    "metric.detector": "from the next snapshot on; other figures, in other files",
    "metric.detector_mode": "from the next snapshot on; figures of different modes do not compare",
    "metric.detector_file": "from the next snapshot on",
    "metric.num": "from the next snapshot on; figures of different numbers do not compare",
    "metric.max_minutes": "from the next snapshot on",
    "metric.vgg_file": "from the next snapshot on",
    "metric.repeats": "from the next snapshot on",
    "metric.reference": "from the next snapshot on; figures against different references do not compare",
    "metric.held_out": "from the next snapshot on",
    "metric.run_async": "from the next snapshot on",
    "metric.device": "from the next snapshot on",
    "metric.budget": "from the next snapshot on; figures of different numbers do not compare",
    "metric.patience": "from the next snapshot on",
    "data.path": "only the place: the images must be the same",
    "data.cache_gib": "at once",
    "data.workers": "at once; the order of images does not depend on it",
    "data.max_unreadable": "at once",
    "optim.batch_gpu": "changes the groups of the minibatch deviation and of the path length: not the same numbers",
    "optim.max_nonfinite": "at once",
    "optim.on_divergence": "at once",
    "runtime.outdir": "only the way it is written: it is where the run was found",
    "runtime.device": ROUND_OFF,
    "runtime.rank_timeout": "at once",
    "runtime.threads": ROUND_OFF,
    "runtime.tf32": ROUND_OFF,
    "runtime.nobench": ROUND_OFF,
    "runtime.wandb": "at once",
    "runtime.desc": "without effect: the folder keeps its name",
}
PATIENCE = "--patience"  # the reason of a stop in history.jsonl, where it is no signal's name
NEW, CONTINUED, BEGUN_AGAIN, FINISHED = "started", "continued", "started again", "finished"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a command asks for, resolved.

    Attributes:
        config: Every "auto" filled.
        dataset: The images.
        description: The run's name after its number.
        pickle_sha256: Digest of the network pickle to start from; None from scratch.
    """

    config: FinetuneConfig
    dataset: ImageDataset
    description: str
    pickle_sha256: str | None


@dataclass(frozen=True)
class Opened:
    """A run folder, held by this process until `lock.release()`.

    Attributes:
        how: `NEW`, `CONTINUED`, `BEGUN_AGAIN` (nothing had been saved yet) or `FINISHED` (nothing to do, not held).
        state, state_path: Where to go on from; None unless continued.
        note: What to say where there is nothing to do.
    """

    path: Path
    how: str
    lock: FolderLock | None = None
    state: dict[str, Any] | None = None
    state_path: Path | None = None
    note: str = ""


class ChangedOptions(ValueError):
    """The run in this outdir was started with other options."""


def open_run(wanted: Wanted, *, restart: bool, say: Say, flags: Mapping[str, str] | None = None) -> Opened:
    """Find the run that a command means, or make its folder; hold it.

    Args:
        restart: Make a new run whatever is there.
        say: Receives lines for people.
        flags: Names of the command line's options by field, for messages; a field without one goes by its own name.

    Raises:
        ChangedOptions: An unfinished run of the same data was started with other options.
        BlockingIOError: Another process trains this very run.
        ValueError, OSError: The folder's content cannot be used.
    """
    outdir = Path(wanted.config.runtime.outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    with FolderLock(outdir, wait=True):  # two that start at the same moment decide one after the other
        if not restart:
            runs = [run for path in _numbered(outdir) if (run := _Run.read(path)) is not None]
            matching = next((run for run in runs if not run.differences(wanted)), None)
            if matching is not None:
                return _reopen(matching, wanted, say)
            _refuse_changes(runs, wanted, flags or {})
            for run in runs:
                if run.same_command_but_data(wanted) and _waits(run):
                    say(
                        f"A new run: {run.path} is not finished, but was trained on other images "
                        f"({run.config.data.path}); it stays as it is"
                    )
        path = run_dir.create(outdir, wanted.description)
        lock = FolderLock(path, wait=False)
        run_dir.write_json(path / OPTIONS_FILE, wanted.config.to_dict())
        return Opened(path, NEW, lock)


def shared(opened: Opened | None, env: DistEnv) -> Opened:
    """What rank 0 opened, in every process; only rank 0 holds the folder."""
    found = env.broadcast(None if opened is None else replace(opened, lock=None))
    return opened or found


def last_good(path: Path) -> Opened | None:
    """The newest training state that is not younger than the last tick that was not diverging; None where none is.

    Younger states are removed, once that one has been read: they hold what diverged.
    """
    ticks = run_dir.read_jsonl(path / "stats.jsonl")
    good = [round(row["Progress/kimg"]["mean"] * 1000) for row in ticks if row.get("state", DIVERGING) != DIVERGING]
    younger: list[Path] = []
    for file in checkpoint.find(path):
        state = None
        if good and checkpoint.nimg_of(file) <= good[-1]:
            with contextlib.suppress(checkpoint.StateError):
                state = checkpoint.read(file)
        if state is not None:
            for later in younger:
                later.unlink()
            return Opened(path, CONTINUED, state=state, state_path=file)
        younger.append(file)
    return None


def log_event(path: Path, event: str, nimg: int, **facts: Any) -> None:
    """One line in a run's history.jsonl: when which process started, continued or ended it, and why."""
    record = {"event": event, "nimg": nimg, "pid": os.getpid(), "host": socket.gethostname(), "timestamp": time.time()}
    run_dir.append_jsonl(path / HISTORY_FILE, {**record, **facts})


def differing(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) of everything in which two nested dicts differ; lists and tuples are alike."""
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = f"{where}." if where else ""
        return [d for key in sorted({*old, *new}) for d in differing(old.get(key), new.get(key), f"{prefix}{key}")]
    plain_old, plain_new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    return [] if plain_old == plain_new else [(where, old, new)]


@dataclass(frozen=True)
class _Run:
    """A run folder as a command finds it; `note` says what was wrong with its files, if anything."""

    path: Path
    config: FinetuneConfig
    environment: dict[str, Any]
    history: list[dict[str, Any]]
    note: str = ""

    @classmethod
    def read(cls, path: Path) -> "_Run | None":
        """None for a folder that is no run of this kind.

        Where the file of options cannot be read, they come from the newest training state that can.

        Raises:
            ValueError: It is a run that is not finished, and its options cannot be had from anywhere.
        """
        history = [row for row in run_dir.read_jsonl(path / HISTORY_FILE) if isinstance(row, dict)]
        note = ""
        try:
            config = FinetuneConfig.from_dict(json.loads((path / OPTIONS_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError) as err:
            found = _options_in_states(path)
            if found is None:
                if not checkpoint.find(path) or (history and history[-1].get("event") == FINISHED):
                    return None
                raise ValueError(
                    f"{path} is not finished, but {OPTIONS_FILE} there is {_wrong(err)} and no training state can be "
                    "read in its place: put one of them back, or start a new run with --restart"
                ) from None
            config, state = found
            note = f"Warning: {path / OPTIONS_FILE} is {_wrong(err)}; the options in {state.name} count"
        try:
            environment = json.loads((path / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            environment = {}
        return cls(path, config, environment if isinstance(environment, dict) else {}, history, note)

    @property
    def has_state(self) -> bool:
        """Something was saved that can be gone on from."""
        return bool(checkpoint.find(self.path))

    def done(self, config: FinetuneConfig) -> str | None:
        """Why a command with this configuration has nothing more to do here, and what would go on; or None."""
        ends = [row for row in self.history if row.get("event") == FINISHED]
        if ends and int(ends[-1].get("nimg", 0)) >= round(config.schedule.kimg * 1000):
            return f"Finished already: {self.path}. A larger --kimg trains it longer"
        patience, last = config.metric.patience, self.history[-1] if self.history else {}
        if patience is None or (last.get("event"), last.get("reason")) != ("stopped", PATIENCE):
            return None
        best = measured.best_of(self.path, config.schedule.keep_best)
        if best is None or best.since < patience:
            return None
        return (
            f"Stopped already on its plateau: {self.path}. {best.plateau}. A larger --patience, or none, trains on"
        )

    def differences(self, wanted: Wanted) -> list[tuple[str, Any, Any]]:
        """Fields that differ and may not; the data's and the pickle's content under the option that names them."""
        found = differing(self.config.to_dict(), wanted.config.to_dict())
        found = [d for d in found if d[0] not in MAY_CHANGE and d[0] != "resume"]
        began_with = (self.environment.get("resume") or {}).get("sha256")
        if self.environment and began_with != wanted.pickle_sha256:
            found.append(("resume", self.config.resume, wanted.config.resume))
        elif not self.environment and self.config.resume != wanted.config.resume:
            found.append(("resume", self.config.resume, wanted.config.resume))
        if not found and not self.same_data(wanted):
            found.append(("data.path", self.config.data.path, wanted.config.data.path))
        return found

    def same_command_but_data(self, wanted: Wanted) -> bool:
        """Whether nothing but the images keeps this run from being the one that is wanted."""
        return {name for name, _, _ in self.differences(wanted)} == {"data.path"}

    def same_data(self, wanted: Wanted) -> bool:
        """Whether the images are those the run began with."""
        before = (self.environment.get("data") or {}).get("fingerprint")
        if before is None:
            return self.config.data.path == wanted.config.data.path
        try:
            return before == wanted.dataset.fingerprint()
        except DatasetError:  # an image that cannot be read any more: reading will name it, and count it
            return self.environment["data"].get("num_images") == wanted.dataset.num_source_images


def _options_in_states(path: Path) -> tuple[FinetuneConfig, Path] | None:
    """The options in the newest training state that can be read, and that state."""
    for file in checkpoint.find(path):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return FinetuneConfig.from_dict(checkpoint.read(file)["config"]), file
    return None


def _wrong(error: Exception) -> str:
    """What is wrong with a file, in words that follow "is"."""
    return "missing" if isinstance(error, FileNotFoundError) else f"damaged ({' '.join(str(error).split())[:200]})"


def _numbered(outdir: Path) -> list[Path]:
    """Folders whose name begins with a number, the largest first."""
    folders = [p for p in outdir.iterdir() if p.name.split("-")[0].isdecimal() and p.is_dir()]
    return sorted(folders, key=lambda p: (int(p.name.split("-")[0]), p.name), reverse=True)


def _reopen(run: _Run, wanted: Wanted, say: Say) -> Opened:
    """Hold a run that this command means, and find where it goes on."""
    lock = _hold(run)
    try:
        done = run.done(wanted.config)
        if done is not None:
            lock.release()
            return Opened(run.path, FINISHED, note=f"{done}; --restart starts a new run")
        found, damaged = None, ""
        try:
            found = checkpoint.latest(run.path, say)
        except checkpoint.StateError as err:
            damaged = f" ({err})"
        pickles = list(run.path.glob("network-snapshot-*.pkl"))
        if damaged or (found is None and (pickles or list(run.path.glob("*.damaged")))):
            warm = " (with --resume and the newest network-snapshot-*.pkl there as a warm start)" if pickles else ""
            raise ValueError(
                f"{run.path} has no training state that can be read{damaged}; --restart starts a new run{warm}"
            )
        if run.note:
            say(run.note)
        run_dir.remove_leftovers(run.path)
        run_dir.write_json(run.path / OPTIONS_FILE, wanted.config.to_dict())
        if found is None:
            return Opened(run.path, BEGUN_AGAIN, lock)
        return Opened(run.path, CONTINUED, lock, state=found[1], state_path=found[0])
    except BaseException:
        lock.release()
        raise


def _hold(run: _Run) -> FolderLock:
    try:
        return FolderLock(run.path, wait=False)
    except BlockingIOError as err:
        last = run.history[-1] if run.history else {}
        who = f"process {last['pid']} on {last['host']}" if {"pid", "host"} <= set(last) else "another process"
        raise BlockingIOError(
            err.errno, f"is being trained by {who}; wait for it, or start another run with --restart", str(run.path)
        ) from None


def _refuse_changes(runs: list[_Run], wanted: Wanted, flags: Mapping[str, str]) -> None:
    """Refuse if an unfinished run of the same data lies here that nobody is training."""
    name = wanted.dataset.name
    candidates = []
    for run in runs:
        same_name = Path(run.config.data.path).absolute().stem == name
        if same_name and _waits(run):
            candidates.append((len(run.differences(wanted)), run))
    if not candidates:
        return
    run = min(candidates, key=lambda candidate: candidate[0])[1]
    changes = "; ".join(_describe(change, flags) for change in run.differences(wanted))
    raise ChangedOptions(
        f"{run.path} is not finished, and this command differs from the one that began it: {changes}. Give these as "
        "they were to continue it, or add --restart to start a new run"
    )


def _waits(run: _Run) -> bool:
    """Whether a run is not finished, has something to go on from, and nobody trains it."""
    if run.done(run.config) or not run.has_state:
        return False
    try:
        FolderLock(run.path, wait=False).release()
    except BlockingIOError:
        return False
    return True


def _describe(change: tuple[str, Any, Any], flags: Mapping[str, str]) -> str:
    field, old, new = change
    name = flags.get(field, field)
    if field == "data.path" or (field == "resume" and old == new):
        return f"{name} {new} (its content was another)"
    return f"{name} {_text(old)}, now {_text(new)}"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)
