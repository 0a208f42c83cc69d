"""Measurements of a run in training: how many images they may take, beside the loop in a process of their own, and the
best snapshot on record. Knows run folders and evaluators; knows nothing of the loop.

`python -m stylegan_rooted.measuring JOB.json RESULT.json` is that other process.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metrics.evaluate import MetricResult
from metrics.features import MetricUnavailable
from stylegan_rooted.evaluation import Evaluator
from training import measured, run_dir
from training.config import SHORT_METRICS, FinetuneConfig
from training.dataset import ImageDataset

BEST_FILE = "best-snapshot.json"
TOO_EARLY = "--metrics-budget knows how long training takes from the next snapshot on"
MIN_NUM = 100
PROBE_NUM = 32
MODULE = ("-m", "stylegan_rooted.measuring")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measurement:
    """What came of one snapshot: figures, or one line that says why there are none."""

    snapshot: str
    nimg: int
    rows: list[MetricResult]
    problem: str | None
    seconds: float
    fingerprint: str | None


# --- the best snapshot


def record_best(path: Path, kind: str) -> measured.Best | None:
    """`measured.best_of`, also written to the run folder; where there is none, none is on record."""
    best = measured.best_of(path, kind)
    if best is not None:
        run_dir.write_json(path / BEST_FILE, dataclasses.asdict(best))
    else:
        (path / BEST_FILE).unlink(missing_ok=True)
    return best


# --- how many images


@dataclass
class Budget:
    """Keeps measurements within a share of the training time by choosing the number of generated images.

    The number is chosen once, as figures of different numbers do not compare. Where even `MIN_NUM` images take too
    long, snapshots are left out until the share allows one; the last snapshot is always measured.

    Attributes:
        share: Of the training time, in (0, 1].
        interval_nimg: Training images between two snapshots.
        most: Most generated images: `--metric-num`.
        say: Receives the line that tells the choice.
        num: What was chosen.
        spent_sec: Seconds that measurements have taken so far.
        beside: Measurements run beside training, which goes on meanwhile.
    """

    share: float
    interval_nimg: int
    most: int
    say: Say
    num: int | None = None
    spent_sec: float = 0.0
    beside: bool = False
    start: float = field(default_factory=time.monotonic)

    def choose(self, evaluator: Evaluator, G: torch.nn.Module, *, seen_nimg: int, last: bool) -> int:
        """How many images to generate now.

        Args:
            evaluator: Measures a probe, if nothing has been chosen yet.
            G: Generator to be measured.
            seen_nimg: Training images since the start of this process.
            last: This is the run's last snapshot.

        Raises:
            MetricUnavailable: Not this time; the message says why.
        """
        self.allow(seen_nimg, last=last)
        if self.num is None:
            interval_sec = self.interval_sec(seen_nimg)
            self.num = self.num_for(self.share * interval_sec, probe(evaluator, G), interval_sec)
        return self.num

    def allow(self, seen_nimg: int, *, last: bool) -> None:
        """Whether a snapshot may be measured now.

        Raises:
            MetricUnavailable: Not this time; the message says why.
        """
        if self.too_early(seen_nimg, last=last):
            raise MetricUnavailable(TOO_EARLY)
        trained_sec = self.trained_sec
        if not last and self.spent_sec > self.share * (trained_sec + (0 if self.beside else self.spent_sec)):
            raise MetricUnavailable(
                f"--metrics-budget {self.share:.3g} of the time is used up ({self.spent_sec:.1f} s of measuring "
                f"{'beside' if self.beside else 'after'} {trained_sec:.1f} s of training)"
            )

    def too_early(self, seen_nimg: int, *, last: bool) -> bool:
        """Whether too little has been trained to know how long it takes."""
        return self.num is None and seen_nimg < self.interval_nimg and not last

    @property
    def trained_sec(self) -> float:
        """Seconds of this process without the measurements that training waited for."""
        return time.monotonic() - self.start - (0 if self.beside else self.spent_sec)

    def interval_sec(self, seen_nimg: int) -> float:
        """Seconds of training between two snapshots, from what has been seen so far."""
        return self.trained_sec / max(seen_nimg, 1) * self.interval_nimg

    def num_for(self, budget_sec: float, sec_per_image: float, interval_sec: float, *, loading_sec: float = 0.0) -> int:
        """The number that takes `budget_sec` with loading, within [MIN_NUM, most]; says what it is."""
        fits = max(int((budget_sec - loading_sec) / max(sec_per_image, 1e-9)), 0)
        num = min(max(fits, MIN_NUM), max(self.most, MIN_NUM))
        loading = f"{loading_sec:.3g} s of loading, " if loading_sec else ""
        times = f"{loading}{sec_per_image:.3g} s each, {interval_sec:.3g} s of training between snapshots"
        if fits < MIN_NUM:
            self.say(f"Metrics: even {num} images exceed {self.share:.3g} of the time ({times}): some are left out")
        else:
            self.say(f"Metrics: {num} generated images keep within {self.share:.3g} of the training time ({times})")
        return num


def probe(evaluator: Evaluator, G: torch.nn.Module) -> float:
    """Seconds per generated image of the figures whose number of images is free, the data's own features not counted.

    Raises:
        MetricUnavailable: There are no such figures, or they cannot be had.
    """
    free = tuple(name for name in evaluator.config.metrics if name in SHORT_METRICS)
    if not free:
        raise MetricUnavailable(
            "--metrics-budget chooses the number of images, which the family's names fix: use fid, kid"
        )
    config = dataclasses.replace(evaluator.config, metrics=free, repeats=1)
    small = dataclasses.replace(evaluator, config=config, choose_num=None)
    small.measure(G, num=PROBE_NUM)  # loads the detector and the features of the data
    start = time.perf_counter()
    small.measure(G, num=PROBE_NUM)
    return (time.perf_counter() - start) / PROBE_NUM * evaluator.config.repeats


# --- in a process of its own


def forget(path: Path, spared: Container[Path] = ()) -> None:
    """Remove what measuring beside left in a run folder."""
    for file in path.glob(".measuring*"):
        if file not in spared:
            file.unlink(missing_ok=True)


class Beside:
    """Measures snapshots one after another in a process of its own, so that training does not wait.

    With a budget, the process's seconds count from its start to its end, loading included.

    On a CPU that process takes one thread at low priority. Its results come back through files, and everything that
    can happen to it ends in a line, never in the training.

    Args:
        config: The run's.
        path: The run folder; jobs lie in it while they last.
        budget: Chooses the number of images; None takes the configured one.
    """

    def __init__(self, config: FinetuneConfig, path: Path, budget: Budget | None) -> None:
        self._config = config
        self._path = path
        self._budget = budget
        self._waiting: list[tuple[Path, int, float | None]] = []
        self._process: subprocess.Popen | None = None
        self._started = 0.0
        self._files = [path / f".measuring-{what}.json" for what in ("job", "result")] + [path / ".measuring.log"]

    def submit(self, snapshot: Path, nimg: int, *, budget_sec: float | None = None) -> None:
        """Measure a snapshot when its turn comes; `budget_sec` are the seconds it may take, where there is a budget.

        The file is kept under another name meanwhile: it may be replaced or removed as training goes on.
        """
        kept = self._path / f".measuring-{nimg}.pkl"
        kept.unlink(missing_ok=True)
        try:
            os.link(snapshot, kept)
        except OSError:  # a file system without links
            shutil.copyfile(snapshot, kept)
        self._waiting.append((snapshot, nimg, budget_sec))
        if self._process is None:
            self._begin()

    def collect(self, *, wait: bool = False, beat: Callable[[str], None] | None = None) -> list[Measurement]:
        """What has been measured since the last call; with `wait`, everything submitted.

        Args:
            wait: Until nothing is left; what takes longer than --metric-minutes is ended and says so.
            beat: Called about once a second while waiting.
        """
        done = []
        while self._process is not None:
            left = self._config.metric.max_minutes * 60 - (time.monotonic() - self._started)
            try:
                self._process.wait(min(max(left, 0), 1) if wait else 0)
            except subprocess.TimeoutExpired:
                if left > 0:
                    if not wait:
                        break
                    if beat is not None:
                        beat("waiting for the process that measures")
                    continue
                self._process.kill()
                self._process.wait()
            done.append(self._end(timed_out=left <= 0 and self._process.returncode != 0))
        return done

    def take_up(self, nimg: int) -> None:
        """Measure what an earlier process of this run left, snapshots of up to `nimg` images; later ones come again.

        With a budget, which leaves out snapshots anyway, they are left out.
        """
        for number, kept in measured.waiting_in(self._path):
            if number > nimg or self._budget is not None:
                kept.unlink()
            else:
                self._waiting.append((self._path / f"network-snapshot-{number // 1000:06d}.pkl", number, None))
        if self._waiting:
            self._begin()

    def close(self, *, keep_waiting: bool = False) -> None:
        """End the process, whatever it does; what is waiting is dropped, or kept for `take_up`."""
        self._waiting.clear()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        spared = {file for _, file in measured.waiting_in(self._path)} if keep_waiting else set()
        forget(self._path, spared)

    @property
    def num_pending(self) -> int:
        """Snapshots that have no result yet."""
        return len(self._waiting)

    def _begin(self) -> None:
        _, nimg, budget_sec = self._waiting[0]
        job, result, log = self._files
        result.unlink(missing_ok=True)
        num = self._budget.num if self._budget else None
        run_dir.write_json(
            job,
            {
                "config": self._config.to_dict(),
                "snapshot": str(self._path / f".measuring-{nimg}.pkl"),
                "num": num,
                "budget_sec": budget_sec if self._budget and num is None else None,
                "started": time.time(),
            },
        )
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)  # it is no part of a run of several processes
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *MODULE, str(job), str(result)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        self._started = time.monotonic()

    def _end(self, *, timed_out: bool) -> Measurement:
        assert self._process is not None
        snapshot, nimg, _ = self._waiting.pop(0)
        seconds, code = time.monotonic() - self._started, self._process.returncode
        _, result, log = self._files
        self._process = None
        (self._path / f".measuring-{nimg}.pkl").unlink(missing_ok=True)
        try:
            found = json.loads(result.read_text(encoding="utf-8"))
            rows = [MetricResult(**row) for row in found["rows"]]
            problem, fingerprint = found["problem"], found["fingerprint"]
            if self._budget is not None:
                self._budget.num = self._budget.num or found["num"]
                for line in found["said"]:
                    self._budget.say(line)
        except (OSError, ValueError, TypeError, KeyError):
            rows, fingerprint = [], None
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            reason = f"took longer than --metric-minutes {self._config.metric.max_minutes:g}" if timed_out else None
            problem = f"the process that measures {snapshot.name} {reason or f'ended with code {code}'}"
            if lines and not timed_out:
                problem += f": {lines[-1]}"
        if self._budget is not None:
            self._budget.spent_sec += seconds
        if self._waiting:
            self._begin()
        return Measurement(snapshot.name, nimg, rows, problem, seconds, fingerprint)


def measure_job(job_file: Path, result_file: Path) -> None:
    """The other process: measure the snapshot that a job names, write the figures or why there are none."""
    from stylegan_rooted import generate  # it imports what imports this module

    job = json.loads(job_file.read_text(encoding="utf-8"))
    config = FinetuneConfig.from_dict(job["config"])
    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    said: list[str] = []
    result: dict[str, Any] = {"rows": [], "problem": None, "fingerprint": None, "num": job["num"], "said": said}
    try:
        loaded = generate.open_network(job["snapshot"], config.metric.device or config.runtime.device)
        dataset = ImageDataset(
            config.data.path,
            use_labels=config.data.cond,
            max_size=config.data.subset,
            xflip=config.data.mirror,
            random_seed=config.runtime.seed,
        )
        evaluator = Evaluator(dataset, config.metric, loaded.device, config.runtime.seed)
        if job["budget_sec"] is not None:
            share = config.metric.budget_share or 1.0
            budget = Budget(share, 0, config.metric.num, said.append)
            seconds, loading = job["budget_sec"], time.time() - job["started"]
            each = probe(evaluator, loaded.G)
            result["num"] = budget.num_for(seconds, each, seconds / share, loading_sec=loading)
        rows = evaluator.measure(loaded.G, num=result["num"])
        result |= {"rows": [row.as_dict() for row in rows], "fingerprint": evaluator.fingerprint}
    except (MetricUnavailable, ValueError, OSError) as error:
        result["problem"] = " ".join(str(error).split())
    run_dir.write_json(result_file, result)


if __name__ == "__main__":
    measure_job(Path(sys.argv[1]), Path(sys.argv[2]))
