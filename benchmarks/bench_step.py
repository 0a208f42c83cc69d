"""One training step on this machine: plain, fast and compiled operators, interleaved in one process.

Prints one table (medians over repetitions; G and D main phases every step, regularisers at their intervals) and, with
--json FILE, the same as JSON. Usage: python benchmarks/bench_step.py [--quick] [--json FILE]
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dnnlib import EasyDict
from stylegan_rooted import losses
from torch_utils import custom_ops, misc
from training import run_dir
from training.augment import AUGMENT_PRESETS, AugmentPipe
from training.loss import GanLoss
from training.networks import Discriminator, Generator
from training.phases import Phase, build_phases

CASES = {  # name: (resolution, channel base, channel max, batch)
    "32 px, base 2048, max 128": (32, 2048, 128, 16),
    "64 px, base 4096, max 128": (64, 4096, 128, 8),
}
IMPLEMENTATIONS = ("ref", "torch", "native")


def build(resolution: int, base: int, cmax: int) -> tuple[GanLoss, list[Phase]]:
    """Networks, loss with bgc augmentation at p = 0.3, and phases of one case."""
    torch.manual_seed(0)
    width = {"channel_base": base, "channel_max": cmax}
    G = Generator(z_dim=128, w_dim=128, c_dim=0, img_resolution=resolution, img_channels=3,
                  mapping_kwargs=EasyDict(num_layers=2), synthesis_kwargs=EasyDict(width))  # fmt: skip
    D = Discriminator(c_dim=0, img_resolution=resolution, img_channels=3, **width)
    pipe = AugmentPipe(**AUGMENT_PRESETS["bgc"])
    pipe.p.fill_(0.3)
    G.train().requires_grad_(False)
    D.train().requires_grad_(False)
    return GanLoss(G, D, losses.build_loss("logistic"), augment_pipe=pipe), build_phases(G, D, lr_g=0.0025, lr_d=0.0025)


def run_phase(loss: GanLoss, phase: Phase, resolution: int, batch: int) -> float:
    """Seconds of one phase, optimiser step included."""
    real, z, c = torch.randn(batch, 3, resolution, resolution), torch.randn(batch, 128), torch.zeros(batch, 0)
    start = time.perf_counter()
    phase.opt.zero_grad(set_to_none=True)
    phase.module.requires_grad_(True)
    loss.accumulate_gradients(phase.name, real, c, z, c, gain=float(phase.interval))
    phase.module.requires_grad_(False)
    phase.opt.step()
    return time.perf_counter() - start


def measure(case: tuple[int, int, int, int], repetitions: int) -> dict[str, float]:
    """Images per second per implementation: median over interleaved repetitions."""
    resolution, base, cmax, batch = case
    loss, phases = build(resolution, base, cmax)
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for repetition in range(repetitions + 1):
        for name in IMPLEMENTATIONS:
            os.environ[custom_ops.VARIABLE] = name
            step = sum(run_phase(loss, phase, resolution, batch) / phase.interval for phase in phases)
            if repetition:  # the first warms up
                seconds[name].append(step)
    return {name: batch / statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    misc.keep_freed_memory()
    rows = {name: measure(case, 2 if args.quick else 7) for name, case in CASES.items()}
    print(f"training step, img/s, {args.threads} threads")
    print(f"{'':<27} {'ref':>8} {'torch':>8} {'native':>8} {'torch/ref':>9} {'native/torch':>12}")
    for name, row in rows.items():
        ref, plain, native = (row[key] for key in IMPLEMENTATIONS)
        print(f"{name:<27} {ref:8.2f} {plain:8.2f} {native:8.2f} {plain / ref:8.2f}x {native / plain:11.2f}x")
    if args.json:
        run_dir.write_json(args.json, {"environment": run_dir.environment("cpu"), "img_per_sec": rows})
        print(json.dumps({"written": str(args.json)}))


if __name__ == "__main__":
    main()
