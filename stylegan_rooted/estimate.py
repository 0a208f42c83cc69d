"""What a run will take, from its own first steps: time, memory, disk; and what would fit where memory ran out.

The first steps are the run's own, so that nothing is computed twice and no random stream is touched.
"""

import contextlib
import gc
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import format_time
from torch_utils.distributed import one_line
from training import checkpoint, run_dir, training_loop
from training.training_loop import Run

NUM_STEPS = 5  # the fifth has the second path length of the usual interval of four, which is past its warm-up
MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")


class OutOfMemory(MemoryError):
    """Memory ran out; the message says which --batch-gpu fits."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take from where it stands to its end, measurements not included.

    Attributes:
        sec_per_kimg: Seconds per thousand images.
        left_sec: Seconds to the end.
        peak_gib: Peak memory so far: of the GPU, or of this process.
        num_snapshots: Snapshots that are kept in the end.
        snapshot_gib: Size of one.
        disk_gib: Of all kept snapshots and training states.
        free_gib: Free disk where they go.
    """

    sec_per_kimg: float
    left_sec: float
    peak_gib: float
    num_snapshots: int
    snapshot_gib: float
    disk_gib: float
    free_gib: float

    def __str__(self) -> str:
        text = (
            f"Estimate: {self.sec_per_kimg:.1f} sec/kimg, {format_time(self.left_sec)} to the end (measurements not "
            f"included), peak memory {self.peak_gib:.2f} GiB, {self.num_snapshots} snapshots of "
            f"{self.snapshot_gib:.2f} GiB, with training states {self.disk_gib:.2f} GiB of disk "
            f"({self.free_gib:.1f} GiB free)"
        )
        return text if self.fits else f"{text}. Too little: --keep-last or a larger --snap writes less"

    @property
    def fits(self) -> bool:
        """Whether the disk has room for it."""
        return self.disk_gib < self.free_gib


@dataclass
class Stopwatch:
    """Watches a run's first steps in this process; `estimate` once `done`."""

    run: Run
    num_steps: int = 0
    peak_gib: float = 0.0
    outside_sec: float = 0.0
    _step_start: float = field(default_factory=time.perf_counter)

    @property
    def done(self) -> bool:
        """Enough steps have been seen, or there will be no more."""
        return self.num_steps >= NUM_STEPS or (self.num_steps > 0 and self.run.progress.finished)

    def after_step(self) -> None:
        """One more step is over. Of the time outside the phases, the least of all steps is typical: the others wait."""
        run = self.run
        ran = [phase.name for phase in run.phases if phase.due(run.progress.step - 1)]
        outside = time.perf_counter() - self._step_start - sum(run.phase_sec[name] for name in ran)
        self.outside_sec = min(outside, self.outside_sec) if self.num_steps else outside
        self.num_steps += 1
        on_gpu = run.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(run.device) / 2**30 if on_gpu else run_dir.cpu_mem_gib()
        self.peak_gib = max(self.peak_gib, peak)
        self._step_start = time.perf_counter()

    def estimate(self) -> Estimate:
        """What follows from the steps so far."""
        run, batch = self.run, self.run.config.optim.batch
        assert batch  # of a resolved configuration
        phases_sec = sum(run.phase_sec.get(phase.name, 0.0) / phase.interval for phase in run.phases)
        sec_per_kimg = (phases_sec + max(self.outside_sec, 0.0)) / batch * 1000
        left_nimg = max(run.progress.total_nimg - run.progress.cur_nimg, 0)
        snapshot, state = snapshot_bytes(run) / 2**30, state_bytes(run) / 2**30
        kept = num_snapshots(run, left_nimg)
        return Estimate(
            sec_per_kimg=sec_per_kimg,
            left_sec=sec_per_kimg * left_nimg / 1000,
            peak_gib=self.peak_gib,
            num_snapshots=kept,
            snapshot_gib=snapshot,
            disk_gib=snapshot * kept + state * (checkpoint.KEPT + 1),  # one more while a new one is written
            free_gib=free_disk_gib(run.path),
        )


def from_steps(run: Run) -> Estimate:
    """Take a run's first steps and return the estimate. Writes nothing; the run is not to be used afterwards."""
    stopwatch = Stopwatch(run)
    while not stopwatch.done:
        training_loop.step(run)
        stopwatch.after_step()
    return stopwatch.estimate()


def snapshot_bytes(run: Run) -> int:
    """Networks of one snapshot, its inference file, and its grid of images uncompressed, the most it can take."""
    columns, rows = run.grid.size
    pixels = columns * rows * run.dataset.resolution**2 * run.dataset.num_channels
    return pixels + sum(_tensor_bytes(net) for net in (run.G, run.D, run.G_ema, run.G_ema))


def state_bytes(run: Run) -> int:
    """One training state: the networks, and the optimisers' two moments per trained parameter."""
    networks = sum(_tensor_bytes(net) for net in (run.G, run.D, run.G_ema))
    optimisers = {id(phase.opt): phase.opt for phase in run.phases}.values()
    return networks + 2 * sum(p.nbytes for opt in optimisers for group in opt.param_groups for p in group["params"])


def num_snapshots(run: Run, left_nimg: int) -> int:
    """How many files of the snapshots to come are kept; the last one is made in any case.

    Those within one kimg have the same name and count once.
    """
    schedule = run.config.schedule
    end_nimg = run.progress.cur_nimg + left_nimg
    regular = range(end_nimg - left_nimg, end_nimg, max(run.snapshot_nimg, 1000))
    made = len({nimg // 1000 for nimg in (*regular, end_nimg)})
    if schedule.keep_last is None:
        return made
    spared = made // schedule.keep_every if schedule.keep_every else 0
    return min(made, schedule.keep_last + spared + 1)  # one more: the best


def free_disk_gib(path: Path) -> float:
    """Free disk where `path` is or will be."""
    existing = next(p for p in [path, *path.absolute().parents] if p.exists())
    return shutil.disk_usage(existing).free / 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that there was no memory, on whatever device."""
    if isinstance(error, OutOfMemory):
        return False  # said already
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MEMORY_WORDS)


@contextlib.contextmanager
def advice(run: Run) -> Iterator[None]:
    """Inside, memory that runs out becomes an `OutOfMemory` that says what fits."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(run, error) from None


def out_of_memory(run: Run, error: BaseException) -> OutOfMemory:
    """The same error with advice, from trying smaller micro-batches. The run is not to be used afterwards."""
    batch, batch_gpu = run.config.optim.batch, run.config.optim.batch_gpu
    reason = one_line(error)[:200]
    traceback.clear_frames(error.__traceback__)  # they hold the activations that did not fit
    assert batch and batch_gpu
    for candidate in smaller_batches(run):
        if fits(run, candidate):
            return OutOfMemory(
                f"out of memory with --batch-gpu {batch_gpu} ({reason}): --batch-gpu {candidate} fits; the batch stays "
                f"{batch}, computed {candidate} at a time"
            )
    return OutOfMemory(
        f"out of memory with --batch-gpu {batch_gpu} ({reason}), and no smaller one fits either: free memory, use "
        "fewer processes on this machine, or a smaller network"
    )


def smaller_batches(run: Run) -> list[int]:
    """Micro-batches below the configured one that divide the batch and suit D's groups, largest first."""
    batch, batch_gpu = run.config.optim.batch, run.config.optim.batch_gpu
    assert batch and batch_gpu
    mbstd: Any = getattr(run.D.b4, "mbstd", None)
    group = mbstd.group_size if mbstd else 1
    sizes = [n for n in range(batch_gpu - 1, 0, -1) if batch % n == 0]
    return [n for n in sizes if group is None or n % min(group, n) == 0]


def fits(run: Run, batch_gpu: int) -> bool:
    """Try one micro-batch of every phase. Gradients are thrown away, running means are not kept clean."""
    device = run.device
    images = torch.zeros([batch_gpu, *run.dataset.image_shape], device=device)
    labels = torch.zeros([batch_gpu, run.dataset.label_dim], device=device)
    latents = torch.randn([batch_gpu, run.grid.z.shape[1]], device=device)
    run.env.beat(f"trying --batch-gpu {batch_gpu}")
    try:
        for phase in run.phases:
            phase.enable_gradients(True)
            run.loss.accumulate_gradients(phase.name, images, labels, latents, labels, gain=0.0)
            phase.enable_gradients(False)
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    finally:
        for phase in run.phases:
            phase.enable_gradients(False)
            phase.opt.zero_grad(set_to_none=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _tensor_bytes(module: torch.nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())
