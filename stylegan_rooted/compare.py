"""Runs that differ in the loss only: plan them, train them one after the other, keep what came of each.

Owns the plan and its folders; trains through `finetune`, which continues what was interrupted; what the runs show is
`compare_results`' to say. Layout of the folder:

    runs/<arm>-s<seed>/run.json      what makes this run itself: settings, images, network, how it is judged
    runs/<arm>-s<seed>/00000-…/      the run, as `finetune` leaves it
    runs/<arm>-s<seed>/result.json   what came of it; a run that failed has one, too
    tune/<arm>-<setting>-s<seed>/    the same for runs that choose settings
    compare.json, compare.md, compare.html
"""

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import format_time
from metrics.evaluate import MetricResult, headline
from metrics.features import MetricUnavailable
from stylegan_rooted import __version__, compare_results, finetune, generate, report_compare, resume
from stylegan_rooted.arms import Arm, Point
from stylegan_rooted.evaluation import Evaluator, records
from torch_utils import distributed
from training import measured, run_dir
from training.config import FinetuneConfig

RUN_FILE, RESULT_FILE = "run.json", "result.json"
TO_DO, FINISHED, FAILED = "to do", "finished", "failed"
EVALUATION_SEED = 0
BESIDE = ("dc", "memorisation")
"""Measured at the end beside what was asked for: variety and copies."""

NOT_COUNTED = (
    *finetune.MACHINE_OPTIONS,
    *("resume", "data.max_unreadable", "runtime.rank_timeout", "runtime.desc", "runtime.nobench"),
    *("schedule.autosave_min", "schedule.keep_last", "schedule.keep_every", "schedule.keep_best"),
    *("metric.max_minutes", "metric.detector_file", "metric.vgg_file"),
)
"""Settings in which a run may differ and still be the same; of the network file and the images the content counts."""

PER_RUN = ("runtime.seed", "runtime.outdir")
TUNED = ("optim.glr", "optim.dlr")
UNFAIR = {
    "metric.patience": "runs must see equally many images",
    "metric.budget": "every measurement must take equally many images",
    "metric.run_async": "runs are timed, and nothing may run beside them",
    "runtime.desc": "folders are named after arm and seed",
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is compared.

    Attributes:
        config: Shared by all runs; `runtime.outdir` is the comparison's folder. Its objective and seed are not used.
        arms: The first one is the baseline.
        seeds: Every arm gets each of them.
        grid: Settings to choose from for every arm; () takes the shared ones.
        tune_seed: The seed on which the choice is made.
        tune_kimg: Length of the runs that choose; None takes that of the others.
    """

    config: FinetuneConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    grid: tuple[Point, ...] = ()
    tune_seed: int = 1_000_000
    tune_kimg: float | None = None

    def __post_init__(self) -> None:
        if len(self.arms) < 2:
            raise ValueError("--losses names one arm; a comparison needs two, the first of which is the baseline")
        if self.grid and self.tune_seed in self.seeds:
            raise ValueError(
                f"--tune-seed {self.tune_seed} is one of --seeds; choosing on it would favour what it chose"
            )
        if self.grid and self.grid[0].gamma is not None:
            own = next((arm.name for arm in self.arms if "gamma" in arm.given), None)
            if own is not None:
                raise ValueError(f"--tune chooses gamma for every arm, but {own} sets its own; drop one of the two")
        if self.config.metric.metrics == ("none",):
            raise ValueError("--metrics none measures nothing, so nothing could be compared")
        for field, why in UNFAIR.items():
            if _get(self.config, field):
                raise ValueError(f"{field} is not for a comparison: {why}")
        for arm in self.arms:
            try:
                finetune.check_options(_with_arm(self.config, arm, 0))
            except ValueError as error:
                raise ValueError(f"--losses, {arm.name}: {error}") from None

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.config.runtime.outdir)


@dataclass(frozen=True)
class Job:
    """One run: an arm, a seed, and where it is trained; `point` is the setting of the grid, if any."""

    arm: Arm
    seed: int
    folder: Path
    config: FinetuneConfig
    point: Point | None = None

    @property
    def name(self) -> str:
        """For people."""
        setting = f", {self.point.name}" if self.point else ""
        return f"{self.arm.name}{setting}, seed {self.seed}"

    @property
    def nimg(self) -> int:
        """Images to show."""
        return round(self.config.schedule.kimg * 1000)


@dataclass(frozen=True)
class Outcome:
    """How `run` ended.

    Attributes:
        folder: The comparison's.
        results: What `compare.json` holds; None where runs are left to do.
        stopped_by: Name of the signal that stopped it.
    """

    folder: Path
    results: dict[str, Any] | None = None
    stopped_by: str | None = None


class Stopped(Exception):
    """A signal stopped a run; everything is saved."""


def run(
    request: Request,
    *,
    say: Say,
    progress_bar: Callable[..., Any] | None = None,
    only: tuple[int, int] | None = None,
    retry_failed: bool = False,
    flags: Mapping[str, str] | None = None,
) -> Outcome:
    """Do what is left to do of a comparison, and write its results once all runs are there.

    Args:
        request: What is compared.
        say: Receives lines for people.
        progress_bar: Factory `progress_bar(num_images)` of one bar for all runs; see `finetune.execute`.
        only: (i, n): do the i-th of n shares of the runs and write no results.
        retry_failed: Train runs that failed once more, from their last state.
        flags: Names of the command line's options by field, for messages.

    Raises:
        ValueError, OSError: Something the user can mend; nothing that was done is lost.
    """
    plan = Planned.of(request, flags or {})
    tuned: dict[str, Any] | None = None
    try:
        if request.grid:
            tuned = plan.tune(plan.train(plan.tuning_jobs(), say, progress_bar, only, retry_failed))
            if tuned is None:
                say("Settings are not all tried yet: run the other shares, then this command again")
                return Outcome(request.folder)
            for name, row in tuned["chosen"].items():
                say(f"Chosen for {name}: {row['setting']}{row['note']}")
        records = plan.train(plan.jobs(tuned), say, progress_bar, only, retry_failed)
    except Stopped as stop:
        return Outcome(request.folder, stopped_by=str(stop))
    if only is not None or any(record is None for record in records):
        left = sum(record is None for record in records)
        say(f"{left} of {len(records)} runs are left to do; without --only, the same command does them and compares")
        return Outcome(request.folder)
    results = compare_results.summarise(
        _present(records),
        arms=[{"name": arm.name, "loss": vars(arm.loss)} for arm in request.arms],
        seeds=request.seeds,
        judged_by=judge(records),
        tuning=tuned,
    )
    results |= plan.provenance()
    report_compare.write(request.folder, results)
    say(results["verdict"])
    say(f"Written: {request.folder / 'compare.json'}, compare.md, compare.html")
    return Outcome(request.folder, results)


def outline(request: Request, *, flags: Mapping[str, str] | None = None) -> str:
    """What `run` would do, with an estimate of its time, as a table of arms and seeds. Writes nothing.

    Raises:
        ValueError, OSError: See `run`.
    """
    plan = Planned.of(request, flags or {})
    tuning = plan.tuning_jobs()
    tuned = plan.tune([plan.record(job) for job in tuning]) if tuning else None
    jobs = plan.jobs(tuned)
    known = tuned is not None or not tuning  # until settings are chosen, the runs that use them have none
    status = {job.folder: plan.status(job) for job in (*tuning, *(jobs if known else ()))}
    width = max(len(arm.name) for arm in request.arms) + 2
    lines = ["arm".ljust(width) + "".join(f"seed {seed}".ljust(11) for seed in request.seeds).rstrip()]
    for arm in request.arms:
        cells = [status.get(job.folder, TO_DO).ljust(11) for job in jobs if job.arm == arm]
        lines.append(arm.name.ljust(width) + "".join(cells).rstrip())
    left = [job for job in (*tuning, *jobs) if status.get(job.folder, TO_DO) == TO_DO]
    runs = f"{len(request.arms)} arms x {len(request.seeds)} seeds = {len(jobs)} runs"
    if tuning:
        runs += f", after {len(request.arms)} arms x {len(request.grid)} settings = {len(tuning)} runs that choose"
    lines.append(f"{runs}; {len(left)} to do")
    if left:
        estimate = finetune.forecast(left[0].config)
        sec = estimate.sec_per_kimg * sum(job.nimg for job in left) / 1000
        lines.append(
            f"Estimate: {estimate.sec_per_kimg:.1f} sec/kimg, {format_time(sec)} of training (measurements not "
            f"included), {estimate.disk_gib * len(left):.2f} GiB of disk ({estimate.free_gib:.1f} GiB free)"
        )
    return "\n".join(lines)


def check_fair(configs: Sequence[FinetuneConfig], *, tuned: bool = False) -> None:
    """Refuse runs that differ in anything but loss, seed and folder (and, where settings were tuned, learning rates).

    Args:
        configs: Resolved ones.

    Raises:
        ValueError: Names the first difference.
    """
    allowed = (*PER_RUN, *(TUNED if tuned else ()))
    for config in configs[1:]:
        for field, old, new in resume.differing(configs[0].to_dict(), config.to_dict()):
            if not field.startswith("loss.") and field not in allowed:
                raise ValueError(f"arms may differ in the loss only, but {field} is {old} in one and {new} in another")


def judge(records: Sequence[dict[str, Any] | None]) -> str:
    """Name of the figure that decides: of the first run that has one, as `metrics` recommends for so many images."""
    return next((record["headline"] for record in records if record and record["headline"]), "fd")


@dataclass(frozen=True)
class Planned:
    """A request with its settings resolved and its files known."""

    request: Request
    resolved: FinetuneConfig
    device: str
    num_images: int
    data_fingerprint: str
    pickle_sha256: str | None
    measured_with: Mapping[str, str]
    flags: Mapping[str, str]

    @classmethod
    def of(cls, request: Request, flags: Mapping[str, str]) -> "Planned":
        """Open checkpoint, data and detectors once and check fairness: nothing is trained that cannot be measured."""
        if distributed.place().world > 1:
            raise ValueError("compare trains in one process; spread it over several with --only 1/n, 2/n, …")
        configs = [_with_arm(request.config, arm, request.seeds[0]) for arm in request.arms]
        check_fair([finetune.prepare(config).config for config in configs])
        plan = finetune.prepare(configs[0].replace(loss__gamma=request.config.loss.gamma))  # shared, not the arm's own
        whole = plan.dataset.full()
        sha256 = plan.checkpoint.sha256 if plan.checkpoint else None
        try:
            files = Evaluator(plan.dataset, plan.config.metric, plan.device, EVALUATION_SEED).check()
        except MetricUnavailable as error:
            raise ValueError(f"nothing could be measured: {error}") from None
        return cls(request, plan.config, plan.device.type, len(whole), whole.fingerprint(), sha256, files, flags)

    def tune(self, records: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
        """The settings chosen (see `compare_results.choose`); None where not all have been tried."""
        if any(record is None for record in records):
            return None
        return compare_results.choose(_present(records), [arm.name for arm in self.request.arms], judge(records))

    def jobs(self, tuned: dict[str, Any] | None) -> list[Job]:
        """The runs that are compared: all arms of a seed before the next seed, so that pairs are complete early."""
        points = {point.name: point for point in self.request.grid}
        chosen = {arm: points[row["setting"]] for arm, row in tuned["chosen"].items()} if tuned else {}
        found = [self._job(arm, seed, chosen.get(arm.name)) for seed in self.request.seeds for arm in self.request.arms]
        check_fair([self._resolved(job.config) for job in found], tuned=bool(chosen))
        return found

    def tuning_jobs(self) -> list[Job]:
        """Every arm with every setting of the grid, on the seed for choosing."""
        request = self.request
        return [self._job(arm, request.tune_seed, point, tune=True) for point in request.grid for arm in request.arms]

    def train(
        self,
        jobs: Sequence[Job],
        say: Say,
        progress_bar: Callable[..., Any] | None,
        only: tuple[int, int] | None,
        retry_failed: bool,
    ) -> list[dict[str, Any] | None]:
        """Do what is not done of `jobs`, or of a share of them; the records of all, None where there is none yet.

        Raises:
            Stopped: A signal came.
            ValueError, OSError: See `run`.
        """
        records = [self.record(job) for job in jobs]
        mine = share(len(jobs), only)
        again = (TO_DO, FAILED) if retry_failed else (TO_DO,)
        left = [i for i in mine if self.status(jobs[i]) in again]
        if records and len(left) < len(mine):
            say(f"{len(mine) - len(left)} of {len(mine)} runs are done already")
        bar = (progress_bar or (lambda length: nullcontext()))(sum(jobs[i].nimg for i in left))
        with bar as shown:
            for number, i in enumerate(left):
                say(f"[{number + 1}/{len(left)}] {jobs[i].name}")
                records[i] = self._do(jobs[i], say, shown)
                say(f"[{number + 1}/{len(left)}] {jobs[i].name}: {compare_results.describe(records[i])}")
        return records

    def status(self, job: Job) -> str:
        """FINISHED, FAILED or TO_DO."""
        record = self.record(job)
        return TO_DO if record is None else record["status"]

    def record(self, job: Job) -> dict[str, Any] | None:
        """What came of a run; None where it is still to do.

        Raises:
            ValueError: Another run lies in its place.
        """
        known = _read(job.folder / RUN_FILE)
        if known is None:
            # hidden files are being written: another share's run.json at this moment
            if job.folder.is_dir() and any(not path.name.startswith(".") for path in job.folder.iterdir()):
                raise ValueError(
                    f"{job.folder} holds something else than a run of this comparison; name another --outdir"
                )
            return None
        differences = resume.differing(known.get("fingerprint"), self.fingerprint(job))
        if differences:
            told = "; ".join(self._describe(job, difference) for difference in differences)
            raise ValueError(
                f"{job.folder} holds another run: {told}. Give these as they were, or name another --outdir"
            )
        return _read(job.folder / RESULT_FILE)

    def fingerprint(self, job: Job) -> dict[str, Any]:
        """What makes a run itself, in JSON's types."""
        settings = self._resolved(job.config).to_dict()
        for field in NOT_COUNTED:
            section, _, name = field.rpartition(".")
            (settings[section] if section else settings).pop(name, None)
        return run_dir.plain(
            {
                "settings": settings,
                "data": self.data_fingerprint,
                "resume": self.pickle_sha256,
                "judged": {"seed": EVALUATION_SEED, "beside": list(BESIDE), **self.measured_with},
            }
        )

    def provenance(self) -> dict[str, Any]:
        """What compare.json says of where its numbers come from."""
        shared = self.resolved.to_dict()
        return {
            "version": __version__,
            "evaluation_seed": EVALUATION_SEED,
            "shared": run_dir.plain(shared),
            "data": {"path": self.resolved.data.path, "num_images": self.num_images, "sha256": self.data_fingerprint},
            "resume": {"path": self.resolved.resume, "sha256": self.pickle_sha256},
            "environment": run_dir.environment(self.device),
        }

    def _do(self, job: Job, say: Say, bar: Any) -> dict[str, Any]:
        """Train one run to its end, judge it, and record what came of it."""
        job.folder.mkdir(parents=True, exist_ok=True)
        run_dir.write_json(job.folder / RUN_FILE, {"fingerprint": self.fingerprint(job), "version": __version__})
        gc.collect()
        measured = _reset_peak_memory()
        reason: str | None = None
        results: list[MetricResult] = []
        try:
            with _part_of(bar, job.nimg) as part:
                ended = finetune.execute(job.config, say=_only_news(say), progress_bar=part, flags=self.flags)
            if ended.signal:
                raise Stopped(ended.signal)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno,
                "is being trained by another process; wait for it, or give each process its share (--only i/n)",
                str(job.folder),
            ) from None
        except (torch.AcceleratorError, torch.OutOfMemoryError):  # the machine's, not the arm's
            raise
        except RuntimeError as error:  # diverged, or what else this run's numbers caused
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        path = run_path(job.folder) or job.folder
        if reason is None:
            results, reason = measure(job, path)
        record = {
            "arm": job.arm.name,
            "seed": job.seed,
            "setting": job.point.name if job.point else None,
            "status": FINISHED if reason is None else FAILED,
            "reason": reason,
            "headline": row.name if (row := headline(results)) else None,
            "final": {row.name: {"value": row.value, "std_error": row.std_error} for row in results},
            "warnings": [row.warning for row in results if row.warning],
            **compare_results.read_run(path, with_memory=measured or self.device == "cuda"),
            "folder": str(path.relative_to(self.request.folder)),
            "version": __version__,
        }
        record = run_dir.plain(record)
        run_dir.write_json(job.folder / RESULT_FILE, record)
        return record

    def _job(self, arm: Arm, seed: int, point: Point | None, *, tune: bool = False) -> Job:
        config, request = _with_arm(self.request.config, arm, seed), self.request
        name = f"{arm.slug}-s{seed}"
        if point is not None:
            config = _with_point(config, point)
        if tune and point is not None:
            name = f"{arm.slug}-{point.slug}-s{seed}"
            config = config.replace(schedule__kimg=request.tune_kimg or config.schedule.kimg)
        folder = request.folder / ("tune" if tune else "runs") / name
        return Job(arm, seed, folder, config.replace(runtime__outdir=str(folder)), point)

    def _resolved(self, config: FinetuneConfig) -> FinetuneConfig:
        """Every "auto" filled, without opening the files again: what they decide does not depend on loss or seed."""
        shared = self.resolved
        loss = replace(
            config.loss,
            **{
                name: getattr(shared.loss, name)
                for name in ("gamma", "pl_weight", "style_mixing")
                if getattr(config.loss, name) is None
            },
        )
        optim = replace(
            shared.optim, glr=config.optim.glr or shared.optim.glr, dlr=config.optim.dlr or shared.optim.dlr
        )
        return replace(shared, loss=loss, optim=optim, schedule=config.schedule, runtime=config.runtime)

    def _describe(self, job: Job, difference: tuple[str, Any, Any]) -> str:
        field, old, new = difference
        field = field.removeprefix("settings.")
        if field == "schedule.kimg" and self.request.grid and job.seed == self.request.tune_seed:
            return f"--tune-kimg {old}, now {new}"
        if field in ("data", "resume"):
            return f"--{field}: its content was another"
        if field.startswith("judged."):
            option = field.replace("judged.", "metric.")
            return f"{self.flags.get(option, option)}: its content was another"
        return f"{self.flags.get(field, field)} {old}, now {new}"


def measure(job: Job, path: Path) -> tuple[list[MetricResult], str | None]:
    """(figures of a run's last snapshot with the seed all runs are judged with, None), or ([], why there are none)."""
    snapshots = sorted(path.glob("network-snapshot-*.pkl"), key=lambda p: (len(p.name), p.name))
    plan = finetune.prepare(job.config)
    G = generate.open_network(snapshots[-1], plan.device).G
    _complete_curve(Evaluator(plan.dataset, plan.config.metric, plan.device, job.seed), G, snapshots[-1])
    asked = plan.config.metric.metrics
    problem = ""
    for names in ((*asked, *(name for name in BESIDE if name not in asked)), asked):
        evaluator = Evaluator(plan.dataset, replace(plan.config.metric, metrics=names), plan.device, EVALUATION_SEED)
        try:
            return evaluator.measure(G), None
        except MetricUnavailable as error:
            problem = f"nothing could be measured: {' '.join(str(error).split())}"
    return [], problem


def _complete_curve(evaluator: Evaluator, G: torch.nn.Module, snapshot: Path) -> None:
    """Measure a run's last snapshot as the run itself does, where a signal or a time limit kept it from doing so."""
    kimg = measured.kimg_in(snapshot.parent, snapshot.name)
    rows = [row for file in snapshot.parent.glob("metric-*.jsonl") for row in run_dir.read_jsonl(file)]
    if kimg is None or any(row["kimg"] == kimg for row in rows):
        return
    start = time.time()
    results, _ = evaluator.evaluate(G)
    for name, record in records(
        results,
        snapshot=snapshot.name,
        nimg=round(kimg * 1000),
        seconds=time.time() - start,
        fingerprint=evaluator.fingerprint,
    ):
        run_dir.append_jsonl(snapshot.parent / f"metric-{name}.jsonl", record)


def run_path(folder: Path) -> Path | None:
    """The newest run that `finetune` left in `folder`; None where it failed before its first step."""
    return max((p for p in folder.iterdir() if p.is_dir() and p.name.split("-")[0].isdecimal()), default=None)


def share(num_jobs: int, only: tuple[int, int] | None) -> range:
    """Which jobs a process does: all, or the i-th of n neighbouring parts, so that few pairs are torn apart."""
    i, n = only or (1, 1)
    return range((i - 1) * num_jobs // n, i * num_jobs // n)


def _with_arm(config: FinetuneConfig, arm: Arm, seed: int) -> FinetuneConfig:
    return config.replace(loss=arm.loss, runtime__seed=seed)


def _with_point(config: FinetuneConfig, point: Point) -> FinetuneConfig:
    if point.gamma is not None:
        config = config.replace(loss__gamma=point.gamma)
    return config if point.lr is None else config.replace(optim__glr=point.lr, optim__dlr=point.lr)


def _get(config: FinetuneConfig, field: str) -> Any:
    section, _, name = field.partition(".")
    return getattr(getattr(config, section), name)


def _present(records: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    return [record for record in records if record is not None]


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none that can be read (they are written whole or not at all)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _only_news(say: Say) -> Say:
    """Of what a run says, only what a comparison's reader must know."""

    def pass_on(text: str) -> None:
        if text.startswith(("Warning", "State:", "Training diverged", "Metrics left out", "Continuing", "Saved up to")):
            say(f"    {text}")

    return pass_on


@contextlib.contextmanager
def _part_of(bar: Any, nimg: int) -> Iterator[Callable[..., Any]]:
    """A factory of bars for one run that move the bar of all; images that the run does not show leave its length."""
    seen = 0

    class Part:
        def __enter__(self) -> "Part":
            return self

        def __exit__(self, *exc: Any) -> None:
            return None

        def update(self, num: int) -> None:
            nonlocal seen
            seen += num
            if bar is not None:
                bar.update(num)

    try:
        yield lambda length: Part()
    finally:
        if bar is not None:
            bar.length = max(bar.length - max(nimg - seen, 0), 1)


def _reset_peak_memory() -> bool:
    """Let the system forget how much memory this process took at most; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
