"""What each choice of `--train` saves: time of a step, peak memory, optimiser state, and the files it leaves.

Every choice fine-tunes the same snapshot in a process of its own; repetitions are interleaved. A step is Gmain, Dmain,
and Greg and Dreg over their intervals, Adam and the moving average; batch 8, no augmentation, float32. Prints Markdown.

  python benchmarks/bench_train.py [--config m64] [--choice all --choice lora:4 ...] [--repeats 3]
  python benchmarks/bench_train.py --files --config l256       only the sizes of files, in seconds
"""

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import measure, subjects
from benchmarks.subjects import PHASES, SIZES, Variant
from benchmarks.worker import Worker
from training import network_file, weights_file
from training.adapters import LowRankAdapters

MIB = 1 << 20
BATCH = 8
RANKS = (1, 4, 16)


def choices(size: str) -> list[str]:
    """One of every kind; `freeze-synthesis` at a quarter of the resolution, so that two blocks learn besides it."""
    quarter = SIZES[size].resolution // 4
    frozen = f"freeze-synthesis:{quarter}"
    return ["all", "freezed:4", "freeze-mapping", frozen, f"freeze-mapping,{frozen},freezed:4", "affines", "lora:4"]


def rows(size: str, chosen: list[str], repeats: int, threads: int) -> list[str]:
    """Lines of the table of steps, the first choice's time being 1."""
    variants = {name: Variant(size=size, batch=BATCH, threads=threads, train=name) for name in chosen}
    pieces = subjects.TrainingSubject.names
    lines, whole = [], 0.0
    with measure.started({name: Worker("choice", variant) for name, variant in variants.items()}) as workers:
        times = measure.interleave(workers, pieces, repeats, warm=pieces, in_a_row=True)
        for name, worker in workers.items():
            peak = worker.peak_mib()  # before files are written
            facts = worker.facts()
            sec = BATCH * statistics.median(measure.step_seconds(times[name], PHASES, BATCH))
            whole = whole or sec
            main = [1e3 * statistics.median(times[name][phase]) for phase in ("Gmain", "Dmain")]
            lines.append(
                f"| `{name}` | {facts['gradients G'] / 1e6:.2f}, {facts['gradients D'] / 1e6:.2f} | "
                f"{facts['optimizer G'] / MIB:.1f} + {facts['optimizer D'] / MIB:.1f} | {peak:.0f} | "
                f"{main[0]:.0f} + {main[1]:.0f} | {1e3 * sec:.0f} | {sec / whole:.2f} | {facts['snapshot'] / MIB:.1f}"
                + (f", adapter {facts['adapter'] / MIB:.2f} |" if "adapter" in facts else " |")
            )
    return lines


def file_rows(size: str) -> list[str]:
    """Lines of the table of files: whole networks, and adapters of several ranks."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        snapshot = subjects.write_snapshot(path, SIZES[size])
        whole = snapshot.stat().st_size
        G = network_file.load(snapshot).G_ema

        def line(what: str) -> str:
            num_bytes = path.stat().st_size
            return f"| {what} | {num_bytes / MIB:.2f} | {num_bytes / whole:.2%} |"

        lines.append(line("snapshot (G, D, G_ema)"))
        for dtype in weights_file.DTYPES:
            weights_file.save(path, G_ema=G, dtype=dtype)
            lines.append(line(f"G_ema alone, {dtype} safetensors"))
        for rank in RANKS:
            low = LowRankAdapters(G, G, rank=rank, adam=partial(torch.optim.Adam, lr=1e-3), seed=0)
            weights_file.save_adapter(path, low.averaged, base=low.base_fingerprint)
            lines.append(line(f"adapter of `lora:{rank}`"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=tuple(SIZES), default="m64")
    parser.add_argument("--choice", action="append", metavar="WORDS", help="of --train; default: one of every kind")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--files", action="store_true", help="only the sizes of files")
    options = parser.parse_args()
    net = SIZES[options.config]
    print(f"{net.resolution}x{net.resolution}, base {net.channel_base}, at most {net.channel_max} channels\n")
    if options.files:
        print("| file | MiB | of the snapshot |\n|---|---|---|")
        print("\n".join(file_rows(options.config)))
        return
    print(
        "| `--train` | millions with gradients, G, D | Adam MiB, G + D | peak RSS MiB | Gmain + Dmain ms | step ms "
        "| of the first | files MiB |\n|---|---|---|---|---|---|---|---|"
    )
    chosen = options.choice or choices(options.config)
    print("\n".join(rows(options.config, chosen, options.repeats, options.threads)))


if __name__ == "__main__":
    main()
