"""Timings of the CUDA operators and of training steps on a GPU, as tables. `scripts/gpu_check.sh` runs it.

Operators: achieved bandwidth (bytes that must be read and written over time) as a share of what copying a large tensor
achieves, and the time of the same call made of torch calls. Steps: seconds per iteration with all four phases amortised
over their intervals, peak memory, and seconds per thousand images, beside 12.5 s/kimg, published for 256 x 256 pixels
on an A100 in mixed precision.

Usage: python scripts/gpu_table.py [--quick] [--json FILE]
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from stylegan_rooted.losses import LOSSES
from torch_utils import custom_ops
from torch_utils.ops import bias_act, upfirdn2d
from training import execution, loss, networks, phases, run_dir

COPY_BYTES = 1 << 30
SHAPES = [(16, 512, 64, 64), (16, 128, 256, 256), (8, 32, 1024, 1024)]
LAYOUTS = {"nchw": torch.contiguous_format, "last": torch.channels_last}
BASE = {256: 16384, 1024: 32768}
STEPS = [("native", "fp32"), ("native", "fp16"), ("native", "bf16"), ("torch", "fp32"), ("torch", "fp16")]


def milliseconds(call: Callable[[], object], reps: int) -> float:
    """Median over calls by the device's own clock."""
    for _ in range(3):
        call()
    times = []
    for _ in range(reps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_ceiling(reps: int) -> float:
    """Bytes per second of a copy, reads and writes counted."""
    x = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * COPY_BYTES / (milliseconds(lambda: y.copy_(x), reps) * 1e-3)


def operators(x: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[str, Callable[[], torch.Tensor], int]]:
    """Name, call, and tensors of x's size that are read besides x."""
    short = upfirdn2d.setup_filter([1, 3, 3, 1], device="cuda")
    long = upfirdn2d.setup_filter([1.0 + i % 5 for i in range(12)], device="cuda")
    yield "bias_act lrelu", lambda: bias_act.bias_act(x, b, act="lrelu", clamp=256), 0
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    half, few = (t.contiguous(memory_format=layout) for t in (x[:, :, ::2, ::2], x[:, :3]))
    dy = torch.ones_like(x)
    u = x.detach().requires_grad_()
    y = bias_act.bias_act(u, b, act="lrelu", clamp=256)
    yield "bias_act gradient", lambda: torch.autograd.grad(y, u, dy, retain_graph=True)[0], 1
    yield "upfirdn2d 4 taps", lambda: upfirdn2d.upfirdn2d(x, short, padding=[2, 1, 2, 1]), 0
    yield "upfirdn2d up 2", lambda: upfirdn2d.upsample2d(half, short), 0
    yield "upfirdn2d down 2", lambda: upfirdn2d.downsample2d(x, short), 0
    yield "upfirdn2d 12 taps, down 2", lambda: upfirdn2d.downsample2d(few, long), 0


def time_operators(reps: int) -> list[dict]:
    ceiling = copy_ceiling(reps)
    print(f"copy: {ceiling * 1e-9:.0f} GB/s\n{'operator':<58} {'ms':>8} {'of copy':>8} {'torch ms':>9} {'ratio':>6}")
    rows = []
    for shape in SHAPES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for layout, format in LAYOUTS.items():
                x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=format)
                b = torch.randn(shape[1], device="cuda").to(dtype)
                for name, _, _ in operators(x, b):
                    times = {}
                    for ops in ("native", "torch"):
                        os.environ[custom_ops.VARIABLE] = ops
                        call, extra = next((c, e) for n, c, e in operators(x, b) if n == name)
                        times[ops] = milliseconds(call, reps)
                    y = call()
                    read = {"upfirdn2d up 2": x.numel() // 4, "upfirdn2d 12 taps, down 2": x.numel() // shape[1] * 3}
                    moved = (read.get(name, x.numel()) + y.numel() + extra * x.numel()) * x.element_size()
                    share = moved / (times["native"] * 1e-3) / ceiling
                    label = f"{name:<26} {'x'.join(map(str, shape)):<17} {str(dtype)[6:]:<8} {layout}"
                    ratio = times["torch"] / times["native"]
                    print(
                        f"{label:<58} {times['native']:8.3f} {share:8.0%} {times['torch']:9.3f} {ratio:5.1f}x",
                        flush=True,
                    )
                    rows.append({"what": label, "ms": times, "share_of_copy": share})
    return rows


class Step:
    """One training iteration on random images, phase by phase."""

    def __init__(self, resolution: int, batch: int, precision: str) -> None:
        torch.manual_seed(0)
        num_fp16_res = 4 if precision == "fp16" else 0
        clamp = 256 if num_fp16_res else None
        width = {
            "channel_base": BASE[resolution],
            "channel_max": 512,
            "num_fp16_res": num_fp16_res,
            "conv_clamp": clamp,
        }
        G = networks.Generator(512, 0, 512, resolution, 3, mapping_kwargs={"num_layers": 8}, synthesis_kwargs=width)
        D = networks.Discriminator(0, resolution, 3, **width)
        G, D = (execution.accelerate(net.cuda().requires_grad_(False), precision) for net in (G, D))
        self.loss = loss.GanLoss(G, D, LOSSES["logistic"](), r1_gamma=1.0)
        self.phases = phases.build_phases(G, D, lr_g=0.0025, lr_d=0.0025)
        self.real = torch.randn(batch, 3, resolution, resolution, device="cuda")
        self.c = torch.zeros(batch, 0, device="cuda")
        self.z = torch.randn(batch, 512, device="cuda")

    def run(self, phase: phases.Phase) -> None:
        phase.opt.zero_grad(set_to_none=True)
        phase.module.requires_grad_(True)
        self.loss.accumulate_gradients(phase.name, self.real, self.c, self.z, self.c, gain=float(phase.interval))
        phase.module.requires_grad_(False)
        phase.opt.step()


def time_steps(reps: int) -> list[dict]:
    print(f"\n{'training step':<36} {'ms':>9} {'s/kimg':>8} {'peak GiB':>9}   (published: 12.5 s/kimg, A100, 256)")
    rows = []
    for resolution in BASE:
        for batch in (16, 32):
            for ops, precision in STEPS:
                os.environ[custom_ops.VARIABLE] = ops
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                label = f"{resolution} px, batch {batch}, {precision}, {ops}"
                try:
                    step = Step(resolution, batch, precision)
                    ms = sum(milliseconds(lambda s=step, p=p: s.run(p), reps) / p.interval for p in step.phases)
                except torch.cuda.OutOfMemoryError:
                    print(f"{label:<36} out of memory", flush=True)
                    continue
                finally:
                    step = None
                peak = torch.cuda.max_memory_allocated() / 2**30
                print(f"{label:<36} {ms:9.1f} {ms / batch:8.2f} {peak:9.2f}", flush=True)
                rows.append({"what": label, "ms": ms, "sec_per_kimg": ms / batch, "peak_gib": peak})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    os.environ[custom_ops.VARIABLE] = "native"
    if custom_ops.selected("cuda") != "native":
        sys.exit(custom_ops.problem("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    reps = 5 if args.quick else 20
    tables = {"operators": time_operators(reps), "steps": time_steps(max(reps // 4, 2))}
    if args.json:
        run_dir.write_json(args.json, {"environment": run_dir.environment("cuda"), **tables})
        print(json.dumps({"written": str(args.json)}))


if __name__ == "__main__":
    main()
