"""Our 3x3 convolutions against torch's, forward and both gradients, and whether `conv2d_cpu.pays` chose the faster one.

`prepared` is inference with weights that stay: both sides have them in their own best form before; at stride 2 it is
the transposed convolution.
Prints one line per shape: GFLOP/s of the direct sum, ratio to torch's, `!` where the choice costs more than a tenth,
and last how much of the fastest possible time the choices lose in all. `--json FILE` keeps the seconds.
Usage: python benchmarks/bench_conv.py [--quick] [--threads N] [--dtype float32|bfloat16] [--json FILE]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from torch_utils import custom_ops, misc
from torch_utils.ops import conv2d_cpu, packed_conv2d
from training import run_dir

KINDS = ("conv2d", "conv2d_input", "conv2d_weight", "prepared")
QUICK = [(8, 64, 64, 64, 1), (8, 256, 256, 16, 1), (1, 128, 128, 64, 1), (8, 128, 256, 16, 2)]
SHAPES = [  # images, channels in and out, side of the output, stride
    *[(8, c, c, side, 1) for c, side in ((512, 4), (512, 8), (512, 16), (512, 32), (256, 64), (128, 128), (64, 256))],
    *[(8, c, c, side, 1) for c, side in ((128, 4), (128, 8), (128, 16), (128, 32), (64, 64), (32, 128))],
    *[(1, c, c, side, 1) for c, side in ((512, 4), (512, 8), (512, 16), (512, 32), (256, 64), (128, 128), (64, 256))],
    *[(1, c, c, side, 1) for c, side in ((128, 8), (128, 16), (128, 32), (64, 64))],
    *[(8, i, o, side, 2) for i, o, side in ((512, 512, 4), (512, 512, 8), (512, 512, 16), (256, 512, 32))],
    *[(8, i, o, side, 2) for i, o, side in ((128, 256, 64), (64, 128, 128))],
    *[(8, i, o, side, 2) for i, o, side in ((128, 128, 4), (128, 128, 8), (128, 128, 16), (64, 128, 32), (32, 64, 64))],
    *[(1, i, o, side, 2) for i, o, side in ((512, 512, 4), (512, 512, 8), (512, 512, 16), (256, 512, 32))],
    *[(1, i, o, side, 2) for i, o, side in ((128, 256, 64), (64, 128, 128), (128, 128, 16), (64, 128, 32))],
]  # fmt: skip


def seconds(call: Callable[[], object], least: float) -> float:
    """Seconds per call, over at least `least` seconds."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < least:
        call()
        count += 1
    return (time.perf_counter() - start) / count


def cases(n: int, c: int, o: int, side: int, stride: int, dtype: torch.dtype) -> dict[str, tuple]:
    """kind: (torch's, ours, whether ours is chosen)."""
    pad = 1 if stride == 1 else 0
    size = side if stride == 1 else 2 * side + 1
    last = {"dtype": dtype, "memory_format": torch.channels_last}
    x, dy = torch.randn(n, c, size, size).to(**last), torch.randn(n, o, side, side).to(**last)
    w = torch.randn(o, c, 3, 3).to(dtype)
    settings = stride, (pad, pad)

    def torch_grad(*mask: bool) -> Callable[[], object]:
        same = ([stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1, [*mask, False])
        return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *same)

    ours = {
        "conv2d": lambda: conv2d_cpu.conv2d(x, w, *settings),
        "conv2d_input": lambda: conv2d_cpu.conv2d_input(dy, w, (size, size), *settings),
        "conv2d_weight": lambda: conv2d_cpu.conv2d_weight(x, dy, *settings),
    }
    theirs = {
        "conv2d": lambda: F.conv2d(x, w, None, *settings),
        "conv2d_input": torch_grad(True, False),
        "conv2d_weight": torch_grad(False, True),
    }
    choose = conv2d_cpu.pays
    out = {kind: (theirs[kind], ours[kind], choose(kind, n, c, o, side, side, stride, dtype)) for kind in KINDS[:3]}
    if stride == 1 and packed_conv2d.has_packed():
        u, ops, ones = conv2d_cpu.prepare(w), torch.ops.mkldnn, [1, 1]
        packed = ops._reorder_convolution_weight(w, ones, ones, ones, 1, list(x.shape))
        out["prepared"] = (
            lambda: ops._convolution_pointwise(x, packed, None, ones, ones, ones, 1, "none", [], ""),
            lambda: conv2d_cpu.conv2d_prepared(x, u, o), conv2d_cpu.prepared_pays(n, c, o, side, side, dtype),
        )  # fmt: skip
    elif dtype == torch.float32 and packed_conv2d.has_packed():
        v, ops, zeros, ones, twos = conv2d_cpu.prepare(w, transposed=True), torch.ops.mkldnn, [0, 0], [1, 1], [2, 2]
        packed = ops._reorder_convolution_transpose_weight(w, zeros, zeros, twos, ones, 1, list(dy.shape))
        chosen = conv2d_cpu.prepared_pays(n, o, c, side, side, dtype, transposed=True)
        out["prepared"] = (
            lambda: ops._convolution_transpose_pointwise(
                dy, packed, None, zeros, zeros, twos, ones, 1, "none", [], ""
            ),
            lambda: conv2d_cpu.conv2d_prepared(dy, v, c, transposed=True), chosen,
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    misc.keep_freed_memory()
    torch.manual_seed(0)
    if custom_ops.selected() != "native":
        sys.exit("there is nothing to compare")
    rows, chosen_sec, best_sec = {}, 0.0, 0.0
    for shape in QUICK if args.quick else SHAPES:
        n, c, o, side, stride = shape
        cells = []
        everything = cases(*shape, getattr(torch, args.dtype))
        choose, conv2d_cpu.pays = conv2d_cpu.pays, lambda *_: True  # ours is asked for below, whatever was chosen
        for kind, (torchs, ours, is_ours) in everything.items():
            pairs = [(seconds(torchs, 0.01), seconds(ours, 0.01)) for _ in range(4)][1:]
            theirs, mine = (statistics.median(times) for times in zip(*pairs))
            chosen_sec, best_sec = chosen_sec + (mine if is_ours else theirs), best_sec + min(mine, theirs)
            rows[f"{kind} {shape} {args.dtype}"] = {"torch": theirs, "ours": mine, "chosen": is_ours}
            is_wrong = (mine if is_ours else theirs) > 1.1 * min(mine, theirs)
            mark = "!" if is_wrong else " "
            rate = 18 * n * side**2 * c * o / mine / 1e9
            cells.append(f"{rate:5.0f} {theirs / mine:5.2f}x {'ours ' if is_ours else 'torch'}{mark}")
        conv2d_cpu.pays = choose
        print(f"{n} x {c:>3} -> {o:>3}, {side:>3} px, stride {stride}   {'   '.join(cells)}", flush=True)
    print(f"what is chosen takes {chosen_sec / best_sec:.3f} of the fastest time")
    if args.json:
        run_dir.write_json(args.json, {"environment": run_dir.environment("cpu"), "sec": rows})
        print(json.dumps({"written": str(args.json)}))


if __name__ == "__main__":
    main()
