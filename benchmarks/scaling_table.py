"""Print how sec/kimg grows from 1 to 1024 processes, on paper: bytes, operations and assumed rates, nothing measured.

    python benchmarks/scaling_table.py --resolution 256
    python benchmarks/scaling_table.py --resolution 1024 --tflops 60 --network-gbit 10

The formula is explained in docs/scaling.md. Replace the assumed compute time by a measured one with --sec-per-kimg, as
`stylegan-rooted finetune --estimate` prints it for one process.
"""

import argparse
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stylegan_rooted.presets import auto_preset  # noqa: E402
from training.networks import Discriminator, Generator  # noqa: E402

PROCESSES = [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
KIMG_PER_SNAPSHOT = 40.0  # --tick 4 --snap 10
PNG_BYTES_PER_PIXEL = 1.5
DECODE_MPIX_PER_SEC = 30.0  # per reading thread
WORKERS = 3


@dataclass(frozen=True)
class Network:
    """Parameters, and multiply-adds of one forward pass of one image."""

    parameters: int
    macs: float


@dataclass(frozen=True)
class Machine:
    """What the estimate assumes; every number is an option."""

    tflops: float
    step_overhead_ms: float
    nvlink_gbyte: float
    network_gbit: float
    latency_us: float
    disk_gbyte: float
    metric_images: int
    metric_serial_sec: float
    gpus_per_machine: int


@functools.cache
def networks(resolution: int) -> tuple[Network, Network]:
    """G and D of --cfg auto."""
    base = int(auto_preset(resolution).fmaps * 32768)
    G = Generator(512, 0, 512, resolution, 3, synthesis_kwargs={"channel_base": base})
    D = Discriminator(0, resolution, 3, channel_base=base)
    return Network(num_parameters(G), convolution_macs(G)), Network(num_parameters(D), convolution_macs(D))


def num_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def convolution_macs(module: torch.nn.Module) -> float:
    """Every kernel times the pixels that it is applied to: the smaller ones where a layer changes the resolution."""
    total = 0.0
    for block in module.modules():
        side = getattr(block, "resolution", None)
        if side is None or hasattr(block, "affine"):
            continue
        for layer in block.children():
            weight = getattr(layer, "weight", None)
            if weight is not None and weight.ndim == 4:
                total += weight.numel() * (side / max(getattr(layer, "down", 1), getattr(layer, "up", 1))) ** 2
    return total


def flops_per_image(G: Network, D: Network) -> float:
    """Floating-point operations per real image shown, every phase with its share (docs/scaling.md)."""
    return 2 * ((3 + 1 + 6 / 2 / 4) * G.macs + (2 + 6 + 6 / 16) * D.macs)


def allreduce_sec(num_bytes: float, processes: int, machine: Machine) -> float:
    """Rings within a machine and between machines, 2 (n - 1) / n of the bytes each; a latency per hop of a tree."""
    inside = min(processes, machine.gpus_per_machine)
    machines = math.ceil(processes / machine.gpus_per_machine)
    seconds = 2 * (inside - 1) / inside * num_bytes / (machine.nvlink_gbyte * 1e9)
    seconds += 2 * (machines - 1) / machines * num_bytes / (machine.network_gbit / 8 * 1e9)
    return seconds + 2 * math.ceil(math.log2(processes)) * machine.latency_us * 1e-6 if processes > 1 else 0.0


def row(resolution: int, processes: int, machine: Machine, sec_per_kimg: float | None) -> dict[str, float]:
    """One line of the table; seconds per thousand images."""
    G, D = networks(resolution)
    batch = auto_preset(resolution, processes).batch
    steps = 1000 / batch
    compute_1 = sec_per_kimg if sec_per_kimg else flops_per_image(G, D) / (machine.tflops * 1e12) * 1000
    compute = compute_1 * math.ceil(batch / processes) / batch + steps * machine.step_overhead_ms / 1000
    gradients = [(1 + 1 / 4, 4 * G.parameters), (1 + 1 / 16, 4 * D.parameters)]
    exchange = steps * sum(share * allreduce_sec(size, processes, machine) for share, size in gradients)
    exchange += steps * 6 * allreduce_sec(4096, processes, machine)  # running means, signs, whether to stop
    reading = 1000 / processes * resolution**2 / (DECODE_MPIX_PER_SEC * 1e6) / WORKERS
    saved = 4 * (3 * G.parameters + 2 * D.parameters + 2 * (G.parameters + D.parameters) + G.parameters + D.parameters)
    serial = saved / (machine.disk_gbyte * 1e9) + machine.metric_serial_sec
    shared = machine.metric_images * 2 * G.macs / (machine.tflops * 1e12) / processes
    aside = (serial + shared) / KIMG_PER_SNAPSHOT
    total = max(compute + exchange, reading) + aside
    return {
        "batch": batch,
        "compute": compute,
        "exchange": exchange,
        "reading": reading,
        "aside": aside,
        "total": total,
        "sent_mb": sum(share * size for share, size in gradients) * 2 * (processes - 1) / processes / 1e6,
        "read_mb": batch / processes * PNG_BYTES_PER_PIXEL * resolution**2 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, choices=(64, 128, 256, 512, 1024), default=256)
    parser.add_argument("--sec-per-kimg", type=float, help="measured on one process; else from --tflops")
    parser.add_argument("--tflops", type=float, default=30.0, help="sustained, of one GPU")
    parser.add_argument("--step-overhead-ms", type=float, default=60.0, help="launching kernels, whatever the batch")
    parser.add_argument("--nvlink-gbyte", type=float, default=150.0, help="GB/s of one GPU within a machine")
    parser.add_argument("--network-gbit", type=float, default=200.0, help="Gbit/s per machine")
    parser.add_argument("--latency-us", type=float, default=20.0, help="of one hop")
    parser.add_argument("--disk-gbyte", type=float, default=0.5, help="GB/s that one process writes")
    parser.add_argument("--metric-images", type=int, default=50_000, help="generated per measurement")
    parser.add_argument("--metric-serial-sec", type=float, default=30.0, help="arithmetic of rank 0 per measurement")
    parser.add_argument("--gpus-per-machine", type=int, default=8)
    options = vars(parser.parse_args())
    resolution, sec_per_kimg = options.pop("resolution"), options.pop("sec_per_kimg")
    machine = Machine(**options)
    G, D = networks(resolution)
    print(
        f"{resolution}x{resolution}, --cfg auto: G has {G.parameters / 1e6:.1f} M parameters, {G.macs / 1e9:.0f} GMAC "
        f"forward, D {D.parameters / 1e6:.1f} M and {D.macs / 1e9:.0f}; a real image shown costs "
        f"{flops_per_image(G, D) / 1e12:.2f} TFLOP"
    )
    header = ("processes", "batch", "compute", "exchange", "reading", "aside", "sec/kimg", "speed-up", "efficiency")
    print("| " + " | ".join((*header, "MB sent", "MB read")) + " |")
    print("|" + " ---: |" * (len(header) + 2))
    first = row(resolution, 1, machine, sec_per_kimg)["total"]
    for processes in PROCESSES:
        r = row(resolution, processes, machine, sec_per_kimg)
        speed = first / r["total"]
        print(
            f"| {processes} | {r['batch']:.0f} | {r['compute']:.2f} | {r['exchange']:.2f} | {r['reading']:.2f} | "
            f"{r['aside']:.2f} | {r['total']:.2f} | {speed:.1f} | {speed / processes:.0%} | {r['sent_mb']:.0f} | "
            f"{r['read_mb']:.1f} |"
        )


if __name__ == "__main__":
    main()
