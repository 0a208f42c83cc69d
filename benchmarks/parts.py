"""Subjects beside whole steps and images: single operators, peaks, the loop's own cost, augmentation, growth."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import reference
from benchmarks.report import BATCH, COPIED, PEAK_FLOPS
from benchmarks.subjects import PHASES, TrainingSubject, Variant
from metrics import features
from metrics.frechet_inception_distance import frechet_distance
from metrics.kernel_inception_distance import kernel_distance
from stylegan_rooted import evaluation, finetune
from torch_utils.ops import bias_act, conv2d_resample, upfirdn2d
from training import execution, training_loop
from training.augment import AUGMENT_PRESETS, AugmentPipe

SHAPES = ((512, 16), (256, 32), (128, 64), (64, 256))  # channels, pixels per side, as they occur in m64 and l256


class OpsSubject:
    """Pieces `OPERATOR SHAPE`: forward and backward of the operators of a step on its shapes, batch 8."""

    def __init__(self, variant: Variant, root: Path) -> None:
        prepare(variant)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[variant.precision]
        is_ours = variant.path == "ours"
        self.calls: dict[str, Callable[[], Any]] = {}
        taps, long = upfirdn2d.setup_filter([1, 3, 3, 1]), upfirdn2d.setup_filter([1.0 + i % 5 for i in range(12)])
        for channels, side in SHAPES:
            x = torch.randn(variant.batch, channels, side, side).to(dtype)
            half = torch.randn(variant.batch, channels, side // 2, side // 2).to(dtype)
            if is_ours:  # the layout that the networks hand on
                x, half = (t.contiguous(memory_format=torch.channels_last) for t in (x, half))
            weight = torch.randn(channels, channels, 3, 3).to(dtype)
            bias = torch.randn(channels).to(dtype)
            shape = f"{channels}x{side}x{side}"
            for name, image, ours, slow in (
                ("bias, lrelu", x, lambda x, b=bias: bias_act.bias_act(x, b, act="lrelu"),
                 lambda x, b=bias: reference.activate(x, b)),
                ("filter", x, lambda x: upfirdn2d.upfirdn2d(x, taps, padding=[1, 2, 1, 2]),
                 lambda x: reference.upfirdn(x, taps, pad=(1, 2))),
                ("conv 3x3", x, lambda x, w=weight: conv2d_resample.conv2d_resample(x, w, padding=1),
                 lambda x, w=weight: reference.resampled_conv(x, w, taps)),
                ("conv 3x3 up", half, lambda x, w=weight: conv2d_resample.conv2d_resample(
                    x, w, f=taps, up=2, padding=1, flip_weight=False),
                 lambda x, w=weight: reference.resampled_conv(x, w, taps, up=2)),
                ("conv 3x3 down", x, lambda x, w=weight: conv2d_resample.conv2d_resample(
                    x, w, f=taps, down=2, padding=1),
                 lambda x, w=weight: reference.resampled_conv(x, w, taps, down=2)),
            ):  # fmt: skip
                self.add(f"{name} {shape}", ours if is_ours else slow, image, [weight] if "conv" in name else [])
        img = torch.randn(variant.batch, 3, 256, 256)
        if variant.precision == "fp32":
            for name, ours, slow in (
                ("up 2, 4 taps", lambda x: upfirdn2d.upsample2d(x, taps),
                 lambda x: reference.upfirdn(x, taps, up=2, pad=(2, 1), gain=4)),
                ("up 2, 12 taps", lambda x: upfirdn2d.upsample2d(x, long),
                 lambda x: reference.upfirdn(x, long, up=2, pad=(6, 5), gain=4)),
                ("down 2, 12 taps", lambda x: upfirdn2d.downsample2d(x, long),
                 lambda x: reference.upfirdn(x, long, down=2, pad=(5, 5))),
            ):  # fmt: skip
                self.add(f"{name} 3x256x256", ours if is_ours else slow, img, [])
        self.names = tuple(self.calls)

    def add(self, name: str, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, weights: list) -> None:
        """A piece: `call` on x and the gradients by x and weights."""
        leaves = [x.requires_grad_(True), *[w.requires_grad_(True) for w in weights]]
        dy = torch.randn_like(call(x))
        self.calls[name] = lambda: torch.autograd.grad(call(x), leaves, dy)

    def __call__(self, name: str) -> None:
        """Forward and backward once."""
        self.calls[name]()


class PeakSubject:
    """Pieces `conv 3x3 ...`: torch's own convolution, forward, channels-last; `copy`: 256 MiB from here to there."""

    names = (*PEAK_FLOPS, "copy")

    def __init__(self, variant: Variant, root: Path) -> None:
        prepare(variant)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[variant.precision]
        self.calls: dict[str, Callable[[], Any]] = {}
        for name in PEAK_FLOPS:
            channels, side = [int(v) for v in name.split()[-1].split("x")[:2]]
            x = torch.randn(BATCH, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
            w = torch.randn(channels, channels, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
            self.calls[name] = lambda x=x, w=w: F.conv2d(x, w, padding=1)
        source, target = torch.ones(COPIED, dtype=torch.uint8), torch.zeros(COPIED, dtype=torch.uint8)
        self.calls["copy"] = lambda: target.copy_(source)

    @torch.inference_mode()
    def __call__(self, name: str) -> None:
        """Once."""
        self.calls[name]()


class FlopsSubject:
    """Piece `count`: floating-point operations of every phase per image, counted on the reference path."""

    names = ("count",)
    BATCH = 2  # they are proportional to the batch, and counting costs a step

    def __init__(self, variant: Variant, root: Path) -> None:
        variant = Variant(
            path="reference", allocator="project", size=variant.size, batch=self.BATCH, threads=variant.threads
        )
        self.training = TrainingSubject(variant, root)
        self.facts: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        """Count."""
        from torch.utils.flop_counter import FlopCounterMode

        for phase in PHASES:
            with FlopCounterMode(display=False) as counter:
                self.training(phase)
            self.facts[phase] = counter.get_total_flops() / self.BATCH


class LoopSubject:
    """Piece `loop`: 16 iterations as they ship, one tick and one snapshot; `facts` says where the time went.

    A bare step is gradients, their check, optimiser and average, as in the reference. Data, latents, statistics and the
    controller come on top, and ticks and snapshots, spread over the iterations between two of them.
    """

    names = ("loop",)

    def __init__(self, variant: Variant, root: Path) -> None:
        self.run = TrainingSubject(variant, root).run
        self.clocks = {"bare": 0.0, "report": 0.0}
        self.facts: dict[str, float] = {}
        self.run.loss.accumulate_gradients = self._clocked("bare", self.run.loss.accumulate_gradients)
        self.run.loss._report = self._clocked("report", self.run.loss._report)
        for opt in {id(phase.opt): phase.opt for phase in self.run.phases}.values():
            opt.step = self._clocked("bare", opt.step)
        training_loop.gradient_norms = self._clocked("bare", training_loop.gradient_norms)
        training_loop.count_nonfinite = self._clocked("bare", training_loop.count_nonfinite)
        training_loop.update_ema = self._clocked("bare", training_loop.update_ema)

    def _clocked(self, clock: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.clocks[clock] += time.perf_counter() - start

        return wrapper

    def __call__(self, name: str) -> None:
        """Run a lazy period, a tick, a snapshot."""
        self.clocks.update(bare=0.0, report=0.0)
        num, schedule, batch = max(PHASES.values()), self.run.config.schedule, self.run.config.optim.batch
        start = time.perf_counter()
        for _ in range(num):
            training_loop.step(self.run)
        steps = (time.perf_counter() - start) / num
        start = time.perf_counter()
        training_loop.finish_tick(self.run)
        tick = time.perf_counter() - start
        start = time.perf_counter()
        training_loop.save_snapshot(self.run)
        snapshot = time.perf_counter() - start
        bare = (self.clocks["bare"] - self.clocks["report"]) / num
        tick_steps = schedule.tick * 1000 / batch
        amortised = (tick + snapshot / schedule.snap) / tick_steps
        self.facts = {"bare": bare, "loop": steps + amortised, "tick": tick, "snapshot": snapshot}


class AugmentSubject:
    """Pieces of the augmentation pipe, bgc at p = 0.5: `forward`, `gradient` by the images, `second` derivatives."""

    names = ("forward", "gradient", "second")

    def __init__(self, variant: Variant, root: Path) -> None:
        prepare(variant)
        pipe = AugmentPipe(**AUGMENT_PRESETS["bgc"]).train().requires_grad_(False)
        pipe.p.fill_(0.5)
        self.pipe = pipe if variant.path == "ours" else lambda images: reference.augmented(pipe, images)
        self.img = torch.rand(variant.batch, 3, variant.network.resolution, variant.network.resolution) * 2 - 1

    def __call__(self, name: str) -> None:
        """Once; the derivatives include the forward pass."""
        img = self.img.clone().requires_grad_(name != "forward")
        out = self.pipe(img)
        if name == "gradient":
            torch.autograd.grad(out.sum(), img)
        elif name == "second":  # as in R1: a gradient by the images, its square, and back through both
            (gradient,) = torch.autograd.grad(out.square().sum(), img, create_graph=True)
            torch.autograd.grad(gradient.square().sum(), img)


class ScalingSubject:
    """Pieces `AXIS VALUE`: Gmain and Dmain of this project while one thing grows from a small network."""

    AXES = {
        "resolution": (32, 64, 128, 256),
        "batch": (4, 8, 16, 32),
        "channels": (64, 128, 256, 512),
    }

    def __init__(self, variant: Variant, root: Path) -> None:
        self.root, self.variant = root, variant
        self.built: dict[str, TrainingSubject] = {}
        threads = [n for n in (1, 2, 4, 8, 16, 32) if n <= variant.threads]
        self.names = tuple(f"{axis} {v}" for axis, values in {**self.AXES, "threads": threads}.items() for v in values)

    def __call__(self, name: str) -> None:
        """One main phase of either network."""
        axis, value = name.split()[0], int(name.split()[1])
        if name not in self.built:
            self.built[name] = TrainingSubject(self.scaled(axis, value), self.root / name.replace(" ", "-"))
        torch.set_num_threads(value if axis == "threads" else self.variant.threads)
        self.built[name]("Gmain")
        self.built[name]("Dmain")

    def scaled(self, axis: str, value: int) -> Variant:
        """32 channels everywhere and 64 pixels for the resolution; 64 pixels for batch and threads; 16 for channels."""
        common: dict[str, Any] = {"size": "s64", "threads": self.variant.threads, "precision": self.variant.precision}
        if axis == "resolution":
            return Variant(channel_base=1 << 20, channel_max=32, resolution=value, **common)
        if axis == "channels":
            return Variant(channel_base=1 << 20, channel_max=value, resolution=16, **common)
        return Variant(batch=value if axis == "batch" else 8, **common)


class MetricsSubject:
    """Pieces: distances of 2048 features of 2000 images a side, and the embedded features of 64 images of 64 pixels."""

    names = ("frechet 2048", "kernel 2048", "embedded features, 64 images")

    def __init__(self, variant: Variant, root: Path) -> None:
        torch.set_num_threads(variant.threads)
        rng = np.random.default_rng(0)
        self.rows = [rng.standard_normal((2000, 2048)) + shift for shift in (0.0, 0.1)]
        self.moments = [(rows.mean(0), np.cov(rows, rowvar=False)) for rows in self.rows]
        self.extractor = features.get_extractor("embedded", detector=evaluation.FEATURE_NET)
        self.img = torch.from_numpy(rng.integers(0, 256, (64, 3, 64, 64), dtype=np.uint8))

    def __call__(self, name: str) -> None:
        """Once."""
        if name.startswith("frechet"):
            frechet_distance(*self.moments[0], *self.moments[1])
        elif name.startswith("kernel"):
            kernel_distance(*self.rows)
        else:
            self.extractor(self.img)


def prepare(variant: Variant) -> None:
    """Threads and allocator of this process."""
    torch.set_num_threads(variant.threads)
    if variant.allocator == "project":
        finetune.configure_torch(finetune.FinetuneConfig(), torch.device("cpu"))
    execution.check_precision(variant.precision, torch.device("cpu"))


SUBJECTS: dict[str, Any] = {
    "ops": OpsSubject,
    "peak": PeakSubject,
    "flops": FlopsSubject,
    "loop": LoopSubject,
    "augment": AugmentSubject,
    "scaling": ScalingSubject,
    "metrics": MetricsSubject,
}
