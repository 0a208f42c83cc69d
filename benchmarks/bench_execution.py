"""What `training.execution` gains: plain networks, accelerated ones and, for images, frozen ones, interleaved.

Everything else, convolutions above all, is the same in all of them. Prints medians of a training step by phase and of
images in batches of 8 and 1. Usage: python benchmarks/bench_execution.py [--config s64] [--repeats 3] [--threads N]
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.subjects import PHASES, SIZES, TrainingSubject, Variant
from training import execution


def plain(network: torch.nn.Module) -> None:
    """Undo `execution.accelerate`."""
    for module in network.modules():
        if type(module).__name__ == type(module).__mro__[1].__name__:
            module.__class__ = type(module).__mro__[1]


def images(subject: TrainingSubject, batch: int) -> Callable[[], None]:
    """What makes so many images."""
    z = torch.randn(batch, subject.run.G.z_dim)

    @torch.inference_mode()
    def call() -> None:
        subject.run.G_ema(z, torch.zeros(batch, 0), noise_mode="const")

    return call


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds per call, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repeats + 1):
        for name, call in calls.items():
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - start < 0.1:
                call()
                count += 1
            if repetition:
                times[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=tuple(SIZES), default="s64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subjects = {}
        for name in ("plain", "accelerated", "frozen"):
            variant = Variant(size=args.config, threads=args.threads)
            subjects[name] = TrainingSubject(variant, Path(folder, name))
            subjects[name].run.G_ema.eval()
        for network in (subjects["plain"].run.G, subjects["plain"].run.D, subjects["plain"].run.G_ema):
            plain(network)
        execution.freeze(subjects["frozen"].run.G_ema)
        print(f"{args.config}, batch 8, {args.threads} threads; milliseconds, and plain / each")
        for phase in PHASES:
            trained = {k: functools.partial(s, phase) for k, s in subjects.items() if k != "frozen"}
            show(phase, medians(trained, args.repeats))
        for batch in (8, 1):
            show(f"images, {batch}", medians({k: images(s, batch) for k, s in subjects.items()}, 2 * args.repeats))


def show(label: str, seconds: dict[str, float]) -> None:
    """One line."""
    cells = (f"{name} {sec * 1e3:8.2f} {seconds['plain'] / sec:5.2f}x" for name, sec in seconds.items())
    print(f"{label:<10} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
