"""A benchmark's record: JSON with raw samples, and the tables made of it. Measures nothing."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks import goals, measure
from benchmarks.subjects import PHASES

BATCH = 8
PEAK_FLOPS = {f"conv 3x3 {c}x{s}x{s}": 2 * 9 * c * c * s * s * BATCH for c, s in ((512, 32), (256, 64), (128, 128))}
COPIED = 2**28  # bytes
# What the original was measured to cost on two cores of a Zen 5 processor with torch 2.13 (a study made beforehand):
# seconds per image of training, seconds per phase of batch 8, images per second of inference.
STEP_SEC = {"s64": 0.0765, "m64": 0.967, "l256": 3.90}
PHASE_SEC = {
    "s64": {"Gmain": 0.252, "Greg": 0.250, "Dmain": 0.274, "Dreg": 0.356},
    "m64": {"Gmain": 3.92, "Greg": 2.78, "Dmain": 2.90, "Dreg": 3.54},
    "l256": {"Gmain": 14.6, "Greg": 8.43, "Dmain": 13.5, "Dreg": 15.5},
}
INFER_IMG_PER_SEC = {8: {"s64": 161, "m64": 8.8, "l256": 3.16}, 1: {"s64": 105, "m64": 14.4, "l256": 6.9}}
CALIBRATION_BOUND = 0.15

Record = dict[str, Any]


def new_record(threads: int) -> Record:
    """An empty record with the environment that its numbers depend on."""
    import torch

    from torch_utils import custom_ops
    from training import run_dir

    environment = {
        "processor": run_dir.processor_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "operators": custom_ops.describe(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "transparent_hugepage": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "allocator": {k: v for k, v in os.environ.items() if k in ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_CONF")},
        "revision": revision(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return {"environment": environment, "cells": {}}


def continued(record: Record, now: Record) -> Record:
    """`record`, to which a run in the environment of `now` will add: all revisions are named.

    Raises:
        ValueError: It was made on another processor, or with another torch or number of threads.
    """
    before, after = record["environment"], now["environment"]
    for key in ("processor", "torch", "threads"):
        if before[key] != after[key]:
            raise ValueError(f"the file's {key} is {before[key]}, here it is {after[key]}; give another --json file")
    before["revision"] = " ".join(dict.fromkeys([*before["revision"].split(), *after["revision"].split()]))
    return record


def merged(records: list[Record]) -> Record:
    """One record with the samples of several, of the same machine.

    Raises:
        ValueError: As `continued`.
    """
    first, *others = records
    for other in others:
        first = continued(first, other)
        for cell, value in other["cells"].items():
            mine = first["cells"].setdefault(cell, value)
            if mine is not value and "samples" in value:
                mine["samples"].extend(value["samples"])
    return first


def revision() -> str:
    """The commit that is measured, `+` where files differ from it; empty outside of a repository."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty=+"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.stdout.strip()


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: Not a record of this benchmark.
        OSError: The file cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is no JSON: {e}") from None
    if not isinstance(record, dict) or not {"environment", "cells"} <= set(record):
        raise ValueError(f"{path} is no record of bench.py; make one with --json")
    return record


def save(path: Path, record: Record) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def step_samples(record: Record, size: str, name: str) -> list[float]:
    """Seconds per image of whole steps of a variant; [] where it was not measured."""
    pieces = {piece: samples(record, f"step {size} {name} {piece}") for piece in (*PHASES, "ema")}
    return measure.step_seconds(pieces, PHASES, BATCH) if all(pieces.values()) else []


def samples(record: Record, cell: str) -> list[float]:
    """Samples of a cell; [] where there are none."""
    return record["cells"].get(cell, {"samples": []})["samples"]


def figures(record: Record) -> dict[str, list[float]]:
    """Every figure that a goal may be set for, with one value per repetition."""
    out: dict[str, list[float]] = {}
    for size in goals.SIZES:
        for precision in ("fp32", "bf16"):
            ours = step_samples(record, size, f"ours {precision}")
            for suffix, name in (("", "reference"), (" strict", "reference strict")):
                out[f"train {size} {precision}{suffix}"] = measure.ratios(step_samples(record, size, name), ours)
            for batch in INFER_IMG_PER_SEC:
                pair = [samples(record, f"infer b{batch} {size} {n}") for n in ("reference", f"ours {precision}")]
                out[f"infer b{batch} {size} {precision}"] = measure.ratios(*pair)
            pair = [samples(record, f"memory {size} {name}") for name in (f"ours {precision}", "reference")]
            out[f"peak memory {size} {precision}"] = measure.ratios(*pair)
            out[f"conv floor {size} {precision}"] = floor_shares(record, size, precision)
        for batch in INFER_IMG_PER_SEC:
            pair = [samples(record, f"infer b{batch} {size} {name}") for name in ("onnxruntime", "ours fp32")]
            out[f"over onnxruntime b{batch} {size}"] = measure.ratios(*pair)
            pair = [samples(record, f"infer b{batch} {size} {name}") for name in ("onnxruntime", "ours bf16")]
            out[f"over onnxruntime b{batch} {size} bf16"] = measure.ratios(*pair)
        out[f"ADA share {size}"] = ada_shares(record, size)
        bare, whole = samples(record, f"loop {size} bare"), samples(record, f"loop {size} loop")
        out[f"loop overhead {size}"] = [(w / b - 1) * 100 for b, w in zip(bare, whole)]
    return {name: values for name, values in out.items() if values}


def flops_per_image(record: Record, size: str) -> float:
    """Operations of a step per image, all phases over their intervals; 0 where they were not counted."""
    counts = {phase: samples(record, f"flops {size} {phase}") for phase in PHASES}
    if not all(counts.values()):
        return 0.0
    return sum(counts[phase][0] / interval for phase, interval in PHASES.items())


def conv_peak(record: Record, precision: str) -> float:
    """Operations per second of the fastest convolution measured; 0 where none was."""
    speeds = [0.0]
    for name, flops in PEAK_FLOPS.items():
        sec = samples(record, f"peak {precision} {name}")
        speeds += [flops / measure.spread(sec).median] if sec else []
    return max(speeds)


def floor_shares(record: Record, size: str, precision: str) -> list[float]:
    """Per repetition: the time in which a step's operations would run at the convolutions' peak, in % of its time."""
    flops, peak = flops_per_image(record, size), conv_peak(record, precision)
    if not flops or not peak:
        return []
    return [100 * flops / peak / sec for sec in step_samples(record, size, f"ours {precision}")]


def ada_shares(record: Record, size: str) -> list[float]:
    """Augmentation in % of an iteration with it: Gmain with gradients, Dmain fakes and reals, Dreg twice derived."""
    pieces = {name: samples(record, f"augment {size} ours fp32 {name}") for name in ("forward", "gradient", "second")}
    whole = step_samples(record, size, "ours fp32")
    if not all(pieces.values()) or not whole:
        return []
    step = measure.spread(whole).median * BATCH
    costs = [g + 2 * f + s / PHASES["Dreg"] for f, g, s in zip(*pieces.values())]
    return [100 * cost / (step + cost) for cost in costs]


def render(record: Record) -> str:
    """All tables of a record as text."""
    environment = record["environment"]
    parts = [
        f"{environment['processor']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"revision {environment['revision']}, operators {environment['operators']}"
    ]
    tables = (
        step_table, infer_table, ops_table, floor_table, loop_table, scaling_table, metrics_table, calibration_table,
        goal_table,
    )  # fmt: skip
    parts += [text for text in (table(record) for table in tables) if text]
    return "\n\n".join(parts)


def step_table(record: Record) -> str:
    """Phases and whole steps of every variant."""
    lines = []
    names = _variants(record, "step", "Gmain")
    for size, name in names:
        phases = [samples(record, f"step {size} {name} {piece}") for piece in (*PHASES, "ema")]
        cells = " ".join(f"{measure.spread(values).median:8.3f}" for values in phases)
        whole = step_samples(record, size, name)
        memory = samples(record, f"memory {size} {name}")
        peak = f"{max(memory):9.0f}" if memory else ""
        lines.append(f"{size:<5} {name:<17} {cells} {_shown(whole)} {peak}")
    head = f"{'training step':<23} " + " ".join(f"{p:>8}" for p in (*PHASES, "ema"))
    return "\n".join([f"{head} {'s/img (quartiles), n':>28}  peak MiB", *lines]) if lines else ""


def infer_table(record: Record) -> str:
    """Images per second of every variant."""
    lines = []
    for batch in INFER_IMG_PER_SEC:
        for cell, value in record["cells"].items():
            if cell.startswith(f"infer b{batch} "):
                speed = [batch / s for s in value["samples"]]
                lines.append(f"{cell.removeprefix('infer '):<34} {_shown(speed)}")
    return "\n".join([f"{'inference, img/s':<34} {'median (quartiles), n':>28}", *lines]) if lines else ""


def ops_table(record: Record) -> str:
    """Single operators, forward and backward, in milliseconds."""
    names = dict.fromkeys(c.removeprefix("ops reference ") for c in record["cells"] if c.startswith("ops reference "))
    lines = []
    for name in names:
        slow, ours, half = (samples(record, f"ops {v} {name}") for v in ("reference", "ours fp32", "ours bf16"))
        if not ours:
            continue
        times = [f"{measure.spread(v).median * 1e3:10.3f}" if v else f"{'-':>10}" for v in (slow, ours, half)]
        ratios = [f"{_middle(measure.ratios(slow, v)):8.2f}x" if v else f"{'-':>9}" for v in (ours, half)]
        lines.append(f"{name:<28} {' '.join(times)} {' '.join(ratios)}")
    head = f"{'operator, both ways, ms':<28} {'reference':>10} {'fp32':>10} {'bf16':>10} {'fp32':>9} {'bf16':>9}"
    return "\n".join([head, *lines]) if lines else ""


def floor_table(record: Record) -> str:
    """What this processor reaches at best, and how much of it a training step gets."""
    lines = []
    for precision in ("fp32", "bf16"):
        if conv_peak(record, precision):
            lines.append(f"convolution peak {precision}, GFLOP/s {conv_peak(record, precision) / 1e9:26.0f}")
    copy = samples(record, "peak fp32 copy")
    if copy:
        lines.append(f"memory copy, GB/s (read + write) {2 * COPIED / measure.spread(copy).median / 1e9:22.1f}")
    for size in goals.SIZES:
        if flops_per_image(record, size):
            lines.append(f"operations per image {size}, GFLOP {flops_per_image(record, size) / 1e9:20.1f}")
        for precision in ("fp32", "bf16"):
            shares = floor_shares(record, size, precision)
            if shares:
                lines.append(f"share of the convolution floor {size} {precision}, % {_shown(shares)}")
    return "\n".join(["floor", *lines]) if lines else ""


def loop_table(record: Record) -> str:
    """The loop around the step, and augmentation."""
    lines = []
    for cell, value in record["cells"].items():
        if cell.startswith(("loop ", "augment ")):
            lines.append(f"{cell:<34} {_shown([s * 1e3 for s in value['samples']])}")
    return "\n".join([f"{'loop and augmentation, ms':<34} {'median (quartiles), n':>28}", *lines]) if lines else ""


def scaling_table(record: Record) -> str:
    """How a main step grows, with the fitted exponent per axis."""
    axes: dict[tuple[str, str], dict[int, float]] = {}
    for cell, value in record["cells"].items():
        if cell.startswith("scaling "):
            *name, axis, size = cell.removeprefix("scaling ").split()
            axes.setdefault((" ".join(name), axis), {})[int(size)] = measure.spread(value["samples"]).median
    lines = []
    for (name, axis), costs in axes.items():
        shown = "  ".join(f"{size}: {sec:.3f} s" for size, sec in costs.items())
        if len(costs) > 1:
            lines.append(
                f"{name} {axis:<11} {shown}   exponent {measure.exponent(list(costs), list(costs.values())):.2f}"
            )
        else:
            lines.append(f"{name} {axis:<11} {shown}")
    return "\n".join(["scaling of Gmain + Dmain", *lines]) if lines else ""


def metrics_table(record: Record) -> str:
    """Seconds of the metrics' parts."""
    lines = [
        f"{cell.removeprefix('metrics ours fp32 '):<34} {_shown(value['samples'])}"
        for cell, value in record["cells"].items()
        if cell.startswith("metrics ")
    ]
    return "\n".join([f"{'metrics, s':<34} {'median (quartiles), n':>28}", *lines]) if lines else ""


def calibration_table(record: Record) -> str:
    """The reference path against what the original was measured to cost, where it was."""
    rows: list[tuple[str, float, float]] = []
    for size in goals.SIZES:
        whole = step_samples(record, size, "reference")
        if whole:
            rows.append((f"train {size} s/img", measure.spread(whole).median, STEP_SEC[size]))
            for phase, sec in PHASE_SEC[size].items():
                measured = measure.spread(samples(record, f"step {size} reference {phase}")).median
                rows.append((f"      {size} {phase} s", measured, sec))
        for batch, speeds in INFER_IMG_PER_SEC.items():
            infer = samples(record, f"infer b{batch} {size} reference")
            if infer:
                rows.append((f"infer {size} b{batch} s/img", measure.spread(infer).median / batch, 1 / speeds[size]))
    lines = []
    for name, measured, expected in rows:
        gap = measured / expected - 1
        lines.append(f"{name:<24} {measured:9.4f} {expected:9.4f} {gap * 100:+7.0f} %"
                     f"{'' if abs(gap) <= CALIBRATION_BOUND else '   outside 15 %'}")  # fmt: skip
    head = f"{'reference path':<24} {'here':>9} {'original':>9} {'apart':>9}"
    return "\n".join([head, *lines]) if lines else ""


def goal_table(record: Record) -> str:
    """Every goal beside what was measured."""
    measured = figures(record)
    lines = [f"{'goal':<28} {'wanted':>9} {'measured (quartiles), n':>28}  verdict"]
    for goal in goals.all_goals():
        values = measured.get(goal.name)
        sign = ">=" if goal.is_least else "<="
        shown = _shown(values) if values else f"{'-':>28}"
        verdict = goal.verdict(measure.spread(values).median if values else None)
        lines.append(f"{goal.name:<28} {sign}{goal.bound:6.2f}{goal.unit:<2} {shown}  {verdict}")
    return "\n".join(lines)


def _variants(record: Record, kind: str, piece: str) -> list[tuple[str, str]]:
    """(size, variant) of the cells `kind size variant piece`."""
    out = []
    for cell in record["cells"]:
        if cell.startswith(f"{kind} ") and cell.endswith(f" {piece}"):
            size, name = cell.removeprefix(f"{kind} ").removesuffix(f" {piece}").split(" ", 1)
            out.append((size, name))
    return out


def _middle(values: list[float]) -> float:
    return measure.spread(values).median


def _shown(values: list[float]) -> str:
    """Median (quartiles), number."""
    s = measure.spread(values)
    return f"{s.median:9.4f} ({s.low:.4g}-{s.high:.4g}), {s.num}".rjust(28)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
