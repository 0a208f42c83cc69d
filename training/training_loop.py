"""The order of events of training, nothing else (spec: training-and-metrics.md section 2).

What a run is made of comes in as a `Run`; what happens beside training (progress bar, metrics, TensorBoard) as `Hooks`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from dnnlib.util import format_time, naming
from torch_utils import images, seeding
from torch_utils.distributed import DistEnv
from training import checkpoint, execution, measured, network_pickle, run_dir, watchdog, weights_file
from training.ada import AdaController
from training.adapters import LowRankAdapters
from training.config import FinetuneConfig
from training.dataset import DatasetError, ImageDataset, UnreadableImages
from training.diversity import MAX_RENDERED, Comparison
from training.ema import ema_beta, update_ema
from training.loss import GanLoss
from training.phases import Phase, count_nonfinite, gradient_norms
from training.stats import Scalar, StatsCollector
from training.watchdog import Figures, Verdict

ADA_INTERVAL = 4


class TrainingDiverged(RuntimeError):
    """More non-finite gradients than the run allows, or diverging figures where the run is to stop at them."""


class RollBack(Exception):
    """Training has diverged for the first time and is to go on from its last good state; all processes raise it."""


@dataclass
class Progress:
    """Where the run stands. A tick ends after the first step, then every `tick_nimg` images."""

    total_nimg: int
    tick_nimg: int
    cur_nimg: int = 0
    step: int = 0
    tick: int = 0
    tick_start_nimg: int = 0
    start_time: float = field(default_factory=time.time)
    tick_start_time: float = field(default_factory=time.time)
    tick_end_time: float = field(default_factory=time.time)
    maintenance_sec: float = 0.0
    num_nonfinite: int = 0
    num_rollbacks: int = 0
    stopped: bool = False
    settled: bool = True
    """What follows the last step (tick, snapshot) has been done. A restored run may have it still to do."""
    saved_time: float = field(default_factory=time.monotonic)
    milestones: list[str] = field(default_factory=list)
    """Snapshots that `keep_every` keeps for good."""

    @property
    def finished(self) -> bool:
        """All images have been shown, or somebody asked to stop."""
        return self.stopped or self.cur_nimg >= self.total_nimg

    @property
    def tick_due(self) -> bool:
        """A tick ends here."""
        return self.finished or self.tick == 0 or self.cur_nimg >= self.tick_start_nimg + self.tick_nimg

    def snapshot_due(self, snap: int) -> bool:
        """A snapshot belongs here; `snap` is in ticks."""
        return self.tick_due and (self.finished or self.tick % snap == 0)

    @property
    def kimg_name(self) -> str:
        """Six digits for file names: whole thousands of images."""
        return f"{self.cur_nimg // 1000:06d}"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on unchanged; times as durations up to now."""
        now = time.time()
        return {
            **{name: getattr(self, name) for name in self._COUNTERS},
            "elapsed_sec": now - self.start_time,
            "tick_elapsed_sec": now - self.tick_start_time,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned: the clock goes on as if the run had not been away."""
        for name in self._COUNTERS:
            setattr(self, name, {"num_rollbacks": 0, **state}[name])  # from before there were rollbacks
        now = time.time()
        self.start_time = now - state["elapsed_sec"]
        self.tick_start_time = self.tick_end_time = now - state["tick_elapsed_sec"]

    _COUNTERS = (
        *("cur_nimg", "step", "tick", "tick_start_nimg", "maintenance_sec"),
        *("num_nonfinite", "num_rollbacks", "settled", "milestones"),
    )


@dataclass
class Grid:
    """The fixed latents and labels behind every fakes*.png."""

    size: tuple[int, int]
    z: torch.Tensor
    c: torch.Tensor
    indices: list[int]


@dataclass
class Run:
    """Everything one training run works on."""

    config: FinetuneConfig
    path: Path
    device: torch.device
    dataset: ImageDataset
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]]
    G: torch.nn.Module
    D: torch.nn.Module
    G_ema: torch.nn.Module
    augment_pipe: torch.nn.Module | None
    adversarial: Any
    loss: GanLoss
    phases: list[Phase]
    ada: AdaController | None
    stats: StatsCollector
    grid: Grid
    progress: Progress
    training_set_kwargs: dict[str, Any]
    unreadable: UnreadableImages
    adapters: LowRankAdapters | None = None
    phase_sec: dict[str, float] = field(default_factory=dict)
    """Seconds that each phase took when it ran last."""
    verdict: Verdict = field(default_factory=Verdict)
    """Of the last tick."""
    comparison: Comparison | None = None
    """What the grid is compared with at ticks; None compares with nothing."""
    env: DistEnv = field(default_factory=DistEnv)

    @property
    def snapshot_nimg(self) -> int:
        """Images between two snapshots."""
        return self.progress.tick_nimg * self.config.schedule.snap


class Hooks(Protocol):
    """What may happen beside training. Hooks must leave torch's global random generator as it was.

    With several processes every one of them calls the hooks, and `should_stop` answers alike in all.
    """

    def on_step(self, run: Run) -> None: ...
    def on_tick(self, run: Run, scalars: dict[str, Scalar], status: str) -> None: ...
    def on_snapshot(self, run: Run, path: Path) -> None: ...
    def should_stop(self, run: Run) -> bool: ...


def train(run: Run, hooks: Hooks) -> None:
    """Train until the configured number of real images has been shown or a hook says stop.

    The training state is saved before what follows a step (tick, snapshot, metrics), so a run that is killed anywhere
    in there does all of it again, and one that was only stopped there leaves no trace in its numbers.

    Raises:
        TrainingDiverged: Too many steps had non-finite gradients, or weights are non-finite; the last good networks
            have been saved.
        DatasetError: Images cannot be read any more; the state has been saved.
    """
    progress, snap = run.progress, run.config.schedule.snap
    if progress.step == 0:
        progress.tick_start_time = time.time()
        progress.maintenance_sec = progress.tick_start_time - progress.start_time
    while True:
        on_disk = not progress.settled  # a restored state, of a run that still has to do what follows its last step
        if progress.settled:
            try:
                step(run)
            except DatasetError:  # the batch comes first: nothing of this step has happened
                if run.env.world == 1:  # other processes are in the step already
                    save_state(run)
                raise
            hooks.on_step(run)
        progress.settled = False
        progress.stopped = progress.stopped or hooks.should_stop(run)
        diverged = progress.num_nonfinite > run.config.optim.max_nonfinite
        snapshot = diverged or progress.snapshot_due(snap)
        overdue = time.monotonic() - progress.saved_time >= run.config.schedule.autosave_min * 60
        if not on_disk and (snapshot or run.env.max(overdue)):
            save_state(run)
        progress.settled = True
        if not (progress.tick_due or diverged):
            continue
        scalars, status = finish_tick(run)
        run.env.require_equal(shared_state(run), f"at {progress.cur_nimg / 1000:g} kimg")
        hooks.on_tick(run, scalars, status)
        if snapshot:
            hooks.on_snapshot(run, save_snapshot(run))
            keep_to_budget(run)
            progress.stopped = progress.stopped or hooks.should_stop(run)  # asked for while measuring
        if diverged:
            roll_back_once(run, f"{progress.num_nonfinite} steps had non-finite gradients")
            error = TrainingDiverged(
                f"{progress.num_nonfinite} steps had non-finite gradients and were left out (limit --max-nonfinite "
                f"{run.config.optim.max_nonfinite}); last state: {checkpoint.path_of(run.path, progress.cur_nimg)}. "
                "The same command would end here again: a larger --max-nonfinite goes on from there, --restart with a "
                "larger --gamma, a smaller --glr/--dlr (--loss rooted: or --tail linear) starts anew"
            )
            raise run.env.everywhere(error)
        if run.verdict.state == watchdog.DIVERGING and run.config.optim.on_divergence != "warn":
            roll_back_once(run, run.verdict.evidence)
            raise run.env.everywhere(TrainingDiverged(f"stopped by --on-divergence: {run.verdict}"))
        if progress.finished:
            return
        start_tick(progress)


def roll_back_once(run: Run, reason: str) -> None:
    """Raise `RollBack` where the run is to go back and has not done so before."""
    if run.config.optim.on_divergence == "rollback" and run.progress.num_rollbacks == 0:
        raise RollBack(reason)


def save_state(run: Run) -> None:
    """Write the training state of this moment and remove all but the newest two.

    Raises:
        TrainingDiverged: A weight is not finite: the states saved before stay as they are.
        OSError: It could not be written: the states saved before stay as they are.
    """
    bad = checkpoint.nonfinite_weight(run)
    if bad is not None:
        good = next(iter(checkpoint.find(run.path)), None) if run.env.is_main else None
        error = TrainingDiverged(
            f"{bad} is not finite any more; nothing was saved over the last good state, "
            f"{good if good else 'of which there is none yet'}. The same command goes on from there"
        )
        raise run.env.everywhere(error)
    state = checkpoint.capture(run)
    with run.env.together("saving the training state"):
        if run.env.is_main:
            state["files"] = run_dir.measure_files(run.path)
            checkpoint.write(checkpoint.path_of(run.path, run.progress.cur_nimg), state)
            checkpoint.prune(run.path)
    run.progress.saved_time = time.monotonic()


def step(run: Run) -> None:
    """One turn: every due phase, the moving average, the augmentation strength."""
    progress, config = run.progress, run.config
    run.env.beat(f"reading data at {progress.cur_nimg / 1000:.3f} kimg")
    real_u8, real_c = next(run.batches)
    real_img = images.from_uint8(real_u8.to(run.device))
    real_c = real_c.to(run.device)
    run.adversarial.advance(progress.cur_nimg)
    for phase in run.phases:
        if phase.due(progress.step):
            step_phase(run, phase, real_img, real_c)
    beta = ema_beta(config.optim.batch, progress.cur_nimg, config.optim.ema_kimg, config.optim.ema_rampup)
    update_ema(run.G_ema, run.G, beta)
    if run.adapters is not None:
        run.adapters.update_average(beta)
    progress.cur_nimg += config.optim.batch
    progress.step += 1
    if run.ada is not None and run.augment_pipe is not None:
        run.augment_pipe.p.fill_(run.ada.update(config.optim.batch, progress.step))


def step_phase(run: Run, phase: Phase, real_img: torch.Tensor, real_c: torch.Tensor) -> None:
    """Accumulate one phase's gradients over the micro-batches of a batch, then step its optimiser.

    A micro-batch is the unit of the result: its place in the global batch decides its draws, and gradients and running
    means are averages over all of them, whichever process computes which. A step with a non-finite gradient is left out
    and counted: it never reaches the weights.

    Args:
        real_img: This process's images of the batch (see `shared_images`), [n, C, H, W] in [-1, 1].
        real_c: Their labels.
    """
    start = time.perf_counter()
    progress, seed, optim = run.progress, run.config.runtime.seed, run.config.optim
    run.env.beat(f"in {phase.name} at {progress.cur_nimg / 1000:.3f} kimg")
    # No rank: every process draws for all and takes its part. A run that went back goes on with other draws.
    key = (progress.num_rollbacks, progress.cur_nimg, phase.name)
    latents = seeding.generator(seed, "latents", *key)
    gen_z = torch.randn([optim.batch, run.G.z_dim], generator=latents)
    gen_c = random_labels(run.dataset, optim.batch, latents)
    mine = shared_images(run.env, optim.batch, optim.batch_gpu)
    num_chunks = optim.batch // optim.batch_gpu
    chunks = zip(
        run.env.share(num_chunks),
        real_img.split(optim.batch_gpu),
        real_c.split(optim.batch_gpu),
        gen_z[mine].to(run.device).split(optim.batch_gpu),
        gen_c[mine].to(run.device).split(optim.batch_gpu),
    )
    means = RunningMeans(run.loss, run.G)
    phase.opt.zero_grad(set_to_none=True)
    phase.enable_gradients(True)
    for index, x, c, z, zc in chunks:
        with seeding.scoped(seed, "phase", *key, index), means.of_one():
            run.loss.accumulate_gradients(phase.name, x, c, z, zc, gain=phase.interval / num_chunks)
    phase.enable_gradients(False)
    run.env.sum_gradients(phase.parameters)
    means.average(run.env, num_chunks)
    norms = gradient_norms(phase.parameters)
    if count_nonfinite(phase.parameters, norms):
        progress.num_nonfinite += 1
    else:
        run.stats.report(f"Gradient/{phase.name}", norms.norm())
        phase.opt.step()
    phase.opt.zero_grad(set_to_none=True)  # the other network's phases can use the memory
    run.phase_sec[phase.name] = time.perf_counter() - start
    run.stats.report(f"Timing/{phase.name}", run.phase_sec[phase.name] * 1000)


def shared_images(env: DistEnv, batch: int, batch_gpu: int) -> slice:
    """Which images of the global batch this process computes: those of its share of the micro-batches."""
    chunks = env.share(batch // batch_gpu)
    return slice(chunks.start * batch_gpu, chunks.stop * batch_gpu)


class RunningMeans:
    """The averages that a forward pass moves, `pl_mean` and `w_avg`, independent of how a batch is split.

    Each micro-batch moves them from where they stood before the phase; afterwards they become the mean of what the
    micro-batches of all processes made of them.
    """

    def __init__(self, loss: GanLoss, G: torch.nn.Module) -> None:
        self._loss = loss
        self._w_avg = getattr(G.mapping, "w_avg", None) if G.mapping.training else None  # a frozen one has no news
        self._before = self._get()
        self._total = torch.zeros_like(self._before)

    @contextlib.contextmanager
    def of_one(self) -> Iterator[None]:
        """Around one micro-batch."""
        self._set(self._before)
        yield
        self._total += self._get()

    def average(self, env: DistEnv, num_chunks: int) -> None:
        """Once all micro-batches are through: take over the mean."""
        total = env.sum(self._total)
        self._set(total / num_chunks if num_chunks > 1 else total)

    def _get(self) -> torch.Tensor:
        means = [self._loss.pl_mean.reshape(1)] + ([] if self._w_avg is None else [self._w_avg])
        return torch.cat(means)

    def _set(self, means: torch.Tensor) -> None:
        self._loss.pl_mean = means[0].clone()
        if self._w_avg is not None:
            self._w_avg.copy_(means[1:])


def random_labels(dataset: ImageDataset, num: int, generator: torch.Generator) -> torch.Tensor:
    """Labels of `num` uniformly drawn items, [num, label_dim] float32."""
    index = torch.randint(len(dataset), [num], generator=generator)
    if not dataset.label_dim:
        return torch.zeros([num, 0])
    return torch.stack([torch.as_tensor(dataset.get_label(int(i))) for i in index])


def shared_state(run: Run) -> dict[str, torch.Tensor]:
    """Everything that is equal in all processes at any time: parameters and buffers, frozen layers among them."""
    modules = {"G": run.G, "D": run.D, "G_ema": run.G_ema, "augment_pipe": run.augment_pipe}
    state = {"pl_mean": run.loss.pl_mean}
    for name, module in modules.items():
        if module is not None:
            state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    return state


def start_tick(progress: Progress) -> None:
    """Begin the next tick's clock."""
    progress.tick += 1
    progress.tick_start_nimg = progress.cur_nimg
    progress.tick_start_time = time.time()
    progress.maintenance_sec = progress.tick_start_time - progress.tick_end_time


def finish_tick(run: Run) -> tuple[dict[str, Scalar], str]:
    """Close the tick's books: returns its scalars and status line; writes stats.jsonl and log.txt."""
    progress = run.progress
    progress.tick_end_time = now = time.time()
    sec_per_tick = now - progress.tick_start_time
    kimg_done = max(progress.cur_nimg - progress.tick_start_nimg, 1) / 1000
    cpu_gib = run_dir.cpu_mem_gib()
    gpu_gib = torch.cuda.max_memory_allocated(run.device) / 2**30 if run.device.type == "cuda" else 0.0
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    augment_p = float(run.augment_pipe.p) if run.augment_pipe is not None else 0.0
    total_sec = now - progress.start_time
    for name, value in {
        "Progress/tick": progress.tick,
        "Progress/kimg": progress.cur_nimg / 1000,
        "Progress/augment": augment_p,
        "Progress/nonfinite": progress.num_nonfinite,
        "Progress/unreadable": len(run.unreadable.names),
        "Timing/total_sec": total_sec,
        "Timing/sec_per_tick": sec_per_tick,
        "Timing/sec_per_kimg": sec_per_tick / kimg_done,
        "Timing/maintenance_sec": progress.maintenance_sec,
        "Timing/total_hours": total_sec / 3600,
        "Timing/total_days": total_sec / 86400,
        "Resources/cpu_mem_gb": cpu_gib,
        "Resources/peak_gpu_mem_gb": gpu_gib,
    }.items():
        run.stats.report(name, float(value))
    for name, value in run.adversarial.drain().items():
        run.stats.report(name, value)
    scalars = run.stats.collect(run.env.sum if run.env.world > 1 else None)
    scalars |= look(run)
    row: dict[str, Any] = {name: scalar.as_dict() for name, scalar in sorted(scalars.items())}
    run.verdict = run.env.broadcast(judge(run, row) if run.env.is_main else None)
    if not run.env.is_main:
        return scalars, ""
    status = " ".join(
        [
            f"tick {progress.tick:<5d}",
            f"kimg {progress.cur_nimg / 1000:<8.1f}",
            f"time {format_time(total_sec):<12s}",
            f"sec/tick {sec_per_tick:<7.1f}",
            f"sec/kimg {sec_per_tick / kimg_done:<7.2f}",
            f"maintenance {progress.maintenance_sec:<6.1f}",
            f"cpumem {cpu_gib:<6.2f}",
            f"gpumem {gpu_gib:<6.2f}",
            f"augment {augment_p:.3f}",
        ]
    )
    run_dir.append_jsonl(run.path / "stats.jsonl", {**row, "state": run.verdict.state, "timestamp": now})
    with naming(run.path / "log.txt"), open(run.path / "log.txt", "a", encoding="utf-8") as f:
        f.write(status + "\n" + (f"{run.verdict}\n" if run.verdict.evidence else ""))
    return scalars, status


def look(run: Run) -> dict[str, Scalar]:
    """Rank 0: how different the first images of the fixed grid are, and how near to training images."""
    if run.comparison is None or not run.env.is_main:
        return {}
    run.env.beat("looking at the grid")
    figures = run.comparison.figures(render_grid(run, MAX_RENDERED))
    return {f"Watch/{name}": Scalar(1, value, 0.0) for name, value in figures.items()}


def judge(run: Run, row: dict[str, Any]) -> Verdict:
    """The run's state, from the ticks in its folder and this one."""
    history = [Figures.of_row(before) for before in run_dir.read_jsonl(run.path / "stats.jsonl")]
    p_max = run.ada.p_max if run.ada is not None else None
    name, distances = measured.distances(run.path)
    history.append(Figures.of_row(row))
    return watchdog.judge(history, p_max=p_max, distances=distances, figure=measured.label(name))


def save_snapshot(run: Run) -> Path:
    """Write the image grid, the exchange pickle and the inference file of this moment; returns the pickle's path."""
    name = run.progress.kimg_name
    path = run.path / f"network-snapshot-{name}.pkl"
    with run.env.together("saving a snapshot"):
        if run.env.is_main:
            write_snapshot(run, name, path)
    return path


def write_snapshot(run: Run, name: str, path: Path) -> None:
    """The files of `save_snapshot`."""
    images.save_grid(run.path / f"fakes{name}.png", render_grid(run), grid_size=run.grid.size)
    network_pickle.save(
        path,
        G=run.G,
        D=run.D,
        G_ema=run.G_ema,
        augment_pipe=run.augment_pipe,
        training_set_kwargs=run.training_set_kwargs,
    )
    config = weights_file.save(path.with_suffix(".safetensors"), G_ema=run.G_ema, about=origin(run))
    run_dir.write_json(path.with_suffix(".config.json"), config)
    if run.adapters is not None:
        path = run.path / f"adapter-{name}.safetensors"
        weights_file.save_adapter(path, run.adapters.averaged, base=run.adapters.base_fingerprint)


def origin(run: Run) -> dict[str, Any]:
    """What an inference file says of its origin; no paths, as such files are given away."""
    options = {"loss": dataclasses.asdict(run.config.loss)}
    data = {"path": run.dataset.name, "num_images": run.dataset.num_source_images, "resolution": run.dataset.resolution}
    return {"training": {"kimg": run.progress.cur_nimg / 1000, "options": options}, "data": data}


def keep_to_budget(run: Run) -> None:
    """Remove the snapshots that the schedule's `keep_last`, `keep_every` and `keep_best` do not keep."""
    schedule, progress = run.config.schedule, run.progress
    if schedule.keep_last is None:
        return
    newest = f"network-snapshot-{progress.kimg_name}.pkl"
    if schedule.keep_every and progress.tick // schedule.snap % schedule.keep_every == 0:
        progress.milestones = [*(name for name in progress.milestones if name != newest), newest]
    if run.env.is_main:
        best = None if schedule.keep_best == "none" else measured.best_of(run.path, schedule.keep_best)
        spared = {*progress.milestones, *measured.pending(run.path), best.snapshot if best else None}
        run_dir.prune_snapshots(run.path, schedule.keep_last, spared)


@torch.inference_mode()
def render_grid(run: Run, num: int | None = None) -> torch.Tensor:
    """The fixed grid, or its first `num` images, through G_ema with constant noise: uint8 [N, C, H, W]."""
    chunk = run.config.optim.batch_gpu
    with execution.frozen(run.G_ema):
        parts = [
            run.G_ema(z.to(run.device), c.to(run.device), noise_mode="const").cpu()
            for z, c in zip(run.grid.z[:num].split(chunk), run.grid.c[:num].split(chunk))
        ]
    return images.to_uint8(torch.cat(parts))
