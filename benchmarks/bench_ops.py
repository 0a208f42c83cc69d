"""The compiled operators against the fast paths made of torch calls, on the shapes of a training step, interleaved.

Prints one table (medians of interleaved repetitions, forward and forward + backward, and the ratio) and, with --json
FILE, the same as JSON. Usage: python benchmarks/bench_ops.py [--quick] [--threads N] [--cpu-time] [--json FILE]
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from torch_utils import custom_ops, misc
from torch_utils.ops import bias_act, upfirdn2d
from training import run_dir

IMPLEMENTATIONS = ("torch", "native")
CLOCK = time.perf_counter


def cases(batch: int) -> dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
    """name: (function of the images, images) as they occur in networks of 32, 64 and 256 pixels."""
    short, long = upfirdn2d.setup_filter([1, 3, 3, 1]), upfirdn2d.setup_filter([1.0 + i % 5 for i in range(12)])
    out = {}
    for channels, size, layout in (
        (128, 8, "last"), (128, 16, "last"), (128, 32, "last"), (64, 64, "last"), (64, 32, "nchw"), (64, 256, "last"),
    ):  # fmt: skip
        x = torch.randn(batch, channels, size, size)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "last" else x
        b = torch.randn(channels)
        name = f"{channels}x{size}x{size} {layout}"
        out[f"filter 4 {name}"] = (lambda x: upfirdn2d.upfirdn2d(x, short, padding=[1, 1, 1, 1], gain=4), x)
        out[f"down 2   {name}"] = (lambda x: upfirdn2d.downsample2d(x, short), x)
        out[f"lrelu    {name}"] = (lambda x, b=b: bias_act.bias_act(x, b, act="lrelu"), x)
        if size < 256:
            out[f"up 2     {name}"] = (lambda x: upfirdn2d.upsample2d(x, short), x)
    for size in (32, 64, 256):
        x = torch.randn(batch, 3, size, size)
        for name, y in (("nchw", x), ("last", x.contiguous(memory_format=torch.channels_last))):
            out[f"up 2     3x{size}x{size} {name}"] = (lambda x: upfirdn2d.upsample2d(x, short), y)
        out[f"up 2, 12 taps   3x{size}x{size} nchw"] = (lambda x: upfirdn2d.upsample2d(x, long), x)
        wide = torch.randn(batch, 3, 2 * size, 2 * size)
        out[f"down 2, 12 taps 3x{2 * size}x{2 * size} nchw"] = (lambda x: upfirdn2d.downsample2d(x, long), wide)
    return out


def seconds(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, with_gradient: bool, least: float) -> float:
    """Seconds per call, over at least `least` seconds."""
    x = x.detach().requires_grad_(with_gradient)
    dy = torch.randn_like(call(x)) if with_gradient else None
    count, start = 0, CLOCK()
    while CLOCK() - start < least:
        y = call(x)
        if with_gradient:
            torch.autograd.grad(y, x, dy)
        count += 1
    return (CLOCK() - start) / count


def compare(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, with_gradient: bool, reps: int) -> dict:
    """Median seconds per implementation."""
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(reps):
        for name in IMPLEMENTATIONS:
            os.environ[custom_ops.VARIABLE] = name
            times[name].append(seconds(call, x, with_gradient, 0.03))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time of all threads: for a busy machine")
    args = parser.parse_args()
    if args.cpu_time:
        global CLOCK
        CLOCK = time.process_time
    torch.set_num_threads(args.threads)
    misc.keep_freed_memory()
    torch.manual_seed(0)
    os.environ[custom_ops.VARIABLE] = "native"
    if not custom_ops.available():
        sys.exit("there is nothing to compare")
    rows = {}
    print(f"{'microseconds':<34} {'torch':>9} {'native':>9} {'ratio':>7}   {'torch f+b':>9} {'native':>9} {'ratio':>7}")
    for name, (call, x) in cases(args.batch).items():
        x = x.to(getattr(torch, args.dtype))
        if args.dtype != "float32" and "lrelu" in name:
            continue  # the bias has to have the type of the images
        pair = [compare(call, x, with_gradient, 3 if args.quick else 9) for with_gradient in (False, True)]
        rows[name] = {"forward": pair[0], "forward and backward": pair[1]}
        cells = (f"{p['torch'] * 1e6:9.0f} {p['native'] * 1e6:9.0f} {p['torch'] / p['native']:6.2f}x" for p in pair)
        print(f"{name:<34} {'   '.join(cells)}", flush=True)
    if args.json:
        run_dir.write_json(args.json, {"environment": run_dir.environment("cpu"), "sec": rows})
        print(json.dumps({"written": str(args.json)}))


if __name__ == "__main__":
    main()
