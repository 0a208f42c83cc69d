"""`make bench`: all figures of this project in one run, beside what it wants to reach.

One cell quickly:
    python benchmarks/bench.py step --config m64 --precision fp32 --repeats 3
    python benchmarks/bench.py infer --config s64 --batch 1 --precision bf16
    python benchmarks/bench.py step --config l256 --precision fp32 --path ours --profile    (and where the time goes)
Without PART all parts run, in minutes; `--quick` takes under one. `--json FILE` keeps the samples; given again, samples
are added to those in the file, so a long run can be made in pieces: by part, `--config` and `--variant`. Where memory
is short for all variants of a training step at once, they run in groups, one after the other, which a line says.
`report FILE...` prints the tables of such files,
`compare.py A.json B.json` two of them against each other.

Every variant runs in a process of its own; repetitions are interleaved. `reference` is `reference.py` with the
allocator as it is; `strict` gives it the allocator settings of this project.
"""

import argparse
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure, report, subjects
from benchmarks.measure import Cells
from benchmarks.subjects import Variant
from benchmarks.worker import Worker, WorkerFailed

REPEATS = {"step": {"s64": 7, "m64": 3, "l256": 2}, "infer": {"s64": 9, "m64": 5, "l256": 3}}
QUICK = {"step": {"s64": 1}, "infer": {"s64": 3}}
ONNX = "onnxruntime"
# Of a training process, roughly and rather too much, by size and variant: decides who runs beside whom.
STEP_GIB = {
    "s64": {"reference": 1.0, "reference strict": 1.0, "ours fp32": 1.0, "ours bf16": 1.0},
    "m64": {"reference": 3.5, "reference strict": 5.0, "ours fp32": 2.5, "ours bf16": 2.0},
    "l256": {"reference": 7.0, "reference strict": 11.0, "ours fp32": 5.0, "ours bf16": 4.0},
}


def variants(options: argparse.Namespace, size: str, **kwargs: Any) -> dict[str, Variant]:
    """The variants that the options ask for, by the name of their cells."""
    common = {"size": size, "threads": options.threads, **kwargs}
    out = {}
    if options.path != "ours":
        out["reference"] = Variant(path="reference", allocator="system", **common)
        if options.strict:
            out["reference strict"] = Variant(path="reference", allocator="project", **common)
    if options.path != "reference":
        for precision in options.precision:
            if subjects.knows_precision(precision):
                out[f"ours {precision}"] = Variant(path="ours", precision=precision, ops=options.ops, **common)
            else:
                say(f"{precision} is not known to this revision: left out")
    return {name: variant for name, variant in out.items() if not options.variant or name in options.variant}


def groups(needs: dict[str, float], available: float) -> list[list[str]]:
    """Names whose needs fit together, in as few groups as first fit finds; what fits nowhere is alone.

    The strict reference comes last: everything else is compared with the reference as it is.
    """
    out: list[list[str]] = []
    for name in sorted(needs, key=lambda name: name.endswith("strict")):
        room = (group for group in out if sum(needs[n] for n in [*group, name]) <= available)
        group = next(room, None)
        if group is None:
            out.append([name])
        else:
            group.append(name)
    return out


def step_groups(size: str, chosen: dict[str, Variant]) -> list[dict[str, Variant]]:
    """The variants in groups that memory suffices for."""
    available = measure.available_gib()
    needs = {name: STEP_GIB[size][name] for name in chosen} if size in STEP_GIB else {}
    if not needs or available is None:
        return [chosen]
    found = groups(needs, available)
    if len(found) > 1:
        shown = "; ".join(", ".join(group) for group in found)
        wanted = sum(needs.values())
        say(f"{available:.1f} GiB of memory are free, {wanted:.0f} would be wanted: one after the other {shown}")
    return [{name: chosen[name] for name in group} for group in found]


def step(options: argparse.Namespace, cells: Cells) -> None:
    """Seconds of every phase, Adam included, and of the moving average; peak memory of the processes."""
    for size in options.config:
        repeats = options.repeats or (QUICK if options.quick else REPEATS)["step"].get(size, 0)
        if not repeats:
            continue
        chosen = variants(options, size)
        for group in step_groups(size, chosen) if chosen else []:
            step_group(options, cells, size, group, repeats)


def step_group(options: argparse.Namespace, cells: Cells, size: str, chosen: dict[str, Variant], repeats: int) -> None:
    """The same for variants that run side by side."""
    say(f"training step {size}: {', '.join(chosen)}")
    with measure.started({name: Worker("train", variant) for name, variant in chosen.items()}) as workers:
        pieces = subjects.TrainingSubject.names
        # Minutes at 256 pixels; there only the phase whose first run was seen to be slower gets its warm-up.
        warm = ["Gmain"] if size == "l256" else pieces
        times = measure.interleave(
            workers, pieces, repeats, warm=warm, in_a_row=True, wake=size != "l256" and not options.quick, say=say
        )
        for name, worker in workers.items():
            for piece, samples in times[name].items():
                add(cells, f"step {size} {name} {piece}", "s", samples)
            add(cells, f"memory {size} {name}", "MiB", [worker.peak_mib()])
            if name.startswith("ours"):
                note_profile(options, worker, pieces, f"{size} {name}", cells)


def infer(options: argparse.Namespace, cells: Cells) -> None:
    """Seconds of one batch through the generator, constant noise."""
    for size in options.config:
        repeats = options.repeats or (QUICK if options.quick else REPEATS)["infer"].get(size, 0)
        if not repeats:
            continue
        chosen = variants(options, size)
        chosen.pop("reference strict", None)
        if options.path == "both" and (not options.variant or ONNX in options.variant) and has_onnxruntime():
            chosen[ONNX] = Variant(path=ONNX, size=size, threads=options.threads)
        say(f"inference {size}: {', '.join(chosen)}")
        pieces = [f"b{batch}" for batch in options.batch]
        with measure.started({name: Worker("infer", variant) for name, variant in chosen.items()}) as workers:
            times = measure.interleave(workers, pieces, repeats, warm=pieces, least_sec=0.3, say=say)
            for name, worker in workers.items():
                for piece, samples in times[name].items():
                    add(cells, f"infer {piece} {size} {name}", "s", samples)
                if name.startswith("ours"):
                    note_profile(options, worker, pieces, f"infer {size} {name}", cells)


def ops(options: argparse.Namespace, cells: Cells) -> None:
    """Forward and backward of single operators."""
    chosen = variants(options, "s64")
    chosen.pop("reference strict", None)
    if "reference" in chosen:  # a page fault is not what an operator costs
        chosen["reference"] = dataclasses.replace(chosen["reference"], allocator="project")
    if not options.quick:
        simple(options, cells, "ops", chosen, options.repeats or 5, least_sec=0.03)


def floor(options: argparse.Namespace, cells: Cells) -> None:
    """Operations per image, and what this processor's convolutions and memory reach at best."""
    chosen = {}
    for precision in options.precision:
        if subjects.knows_precision(precision):
            chosen[precision] = Variant(precision=precision, threads=options.threads)
    simple(options, cells, "peak", chosen, options.repeats or (2 if options.quick else 5), least_sec=0.1)
    for size in options.config[:1] if options.quick else options.config:
        with Worker("flops", Variant(size=size, threads=options.threads)) as worker:
            say(f"operations per image of {size}")
            worker.time("count")
            for phase, flops in worker.facts().items():
                cells[f"flops {size} {phase}"] = {"unit": "flop", "samples": [flops]}


def loop(options: argparse.Namespace, cells: Cells) -> None:
    """What data, statistics, ticks and snapshots add to bare steps."""
    size = options.config[0]
    repeats = options.repeats or (1 if options.quick else 3)
    with Worker("loop", Variant(size=size, augment=True, threads=options.threads)) as worker:
        say(f"loop {size}")
        for repeat in range(repeats if options.quick else repeats + 1):
            worker.time("loop")
            if repeat or options.quick:  # the first warms up
                for name, sec in worker.facts().items():
                    add(cells, f"loop {size} {name}", "s", [sec])


def ada(options: argparse.Namespace, cells: Cells) -> None:
    """The augmentation pipe by itself."""
    for size in [] if options.quick else options.config:
        common = {"size": size, "threads": options.threads}
        chosen = {
            "reference": Variant(path="reference", allocator="system", **common),
            "ours fp32": Variant(**common),
        }
        simple(options, cells, "augment", chosen, options.repeats or 5, least_sec=0.1,
               label=f"augment {size}")  # fmt: skip


def scaling(options: argparse.Namespace, cells: Cells) -> None:
    """Main phases while resolution, batch, channels or threads grow."""
    if not options.quick:
        chosen = {f"ours {p}": Variant(precision=p, threads=options.threads) for p in options.precision[:1]}
        simple(options, cells, "scaling", chosen, options.repeats or 3)


def metrics(options: argparse.Namespace, cells: Cells) -> None:
    """Distances between features, and features."""
    if not options.quick:
        simple(options, cells, "metrics", {"ours fp32": Variant(threads=options.threads)}, options.repeats or 3)


def simple(
    options: argparse.Namespace, cells: Cells, kind: str, chosen: dict[str, Variant], repeats: int, *,
    least_sec: float = 0.0, label: str = "",
) -> None:  # fmt: skip
    """Time all pieces of a kind of subject that any variant has, interleaved."""
    label = label or kind
    say(f"{label}: {', '.join(chosen)}")
    with measure.started({name: Worker(kind, variant) for name, variant in chosen.items()}) as workers:
        pieces = list(dict.fromkeys(piece for worker in workers.values() for piece in worker.names))
        times = measure.interleave(workers, pieces, repeats, warm=pieces, least_sec=least_sec)
        for name in workers:
            for piece, samples in times[name].items():
                add(cells, f"{label} {name} {piece}", "s", samples)


def has_onnxruntime() -> bool:
    """Whether the extra `onnx` is installed; says so where it isn't."""
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        return True
    say("onnxruntime is not installed (extra `onnx`): left out")
    return False


PARTS: dict[str, Callable[[argparse.Namespace, Cells], None]] = {
    "step": step, "infer": infer, "ops": ops, "floor": floor, "loop": loop, "ada": ada, "scaling": scaling,
    "metrics": metrics,
}  # fmt: skip


def note_profile(options: argparse.Namespace, worker: Worker, pieces: Any, label: str, cells: Cells) -> None:
    """With --profile: print the operators that a piece spends its time in, and keep them."""
    if not options.profile:
        return
    for piece in pieces:
        if piece == "ema":
            continue
        top = worker.profile(piece, 8)
        cells[f"profile {label} {piece}"] = {"unit": "share", "ops": top}
        shown = ", ".join(f"{t['op']} {t['share'] * 100:.0f} % ({t['calls']})" for t in top)
        print(f"profile {label} {piece}: {shown}")


def add(cells: Cells, name: str, unit: str, samples: list[float]) -> None:
    """Add samples to a cell."""
    cells.setdefault(name, {"unit": unit, "samples": []})["samples"].extend(samples)


def say(text: str) -> None:
    """One line of progress, for people."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or report FILE...; none = all")
    parser.add_argument("--config", action="append", choices=tuple(subjects.SIZES), help="network; can be repeated")
    parser.add_argument("--precision", action="append", choices=("fp32", "bf16"), help="can be repeated")
    parser.add_argument("--batch", action="append", type=int, choices=(8, 1), help="of inference; can be repeated")
    parser.add_argument("--path", choices=("both", "ours", "reference"), default="both")
    parser.add_argument(
        "--variant", action="append", choices=(*STEP_GIB["s64"], ONNX), help="these alone; can be repeated"
    )
    parser.add_argument("--no-strict", dest="strict", action="store_false", help="leave the strict reference out")
    parser.add_argument("--ops", choices=("", "auto", "native", "ref"), default="", help="STYLEGAN_ROOTED_OPS of ours")
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also show where the time goes")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path, help="keep samples here, beside those that are there already")
    options = parser.parse_args(argv)
    options.config = options.config or ["s64", "m64", "l256"]
    options.precision = options.precision or ["fp32", "bf16"]
    options.batch = options.batch or [8, 1]
    if options.parts[:1] != ["report"]:
        for part in options.parts:
            if part not in PARTS:
                parser.error(f"there is no part {part!r}; one of {', '.join(PARTS)}, or report FILE")
    elif len(options.parts) < 2:
        parser.error("report needs a FILE")
    return options


def main() -> None:
    """Run the parts, or print a report; one line where something is wrong."""
    options = parse()
    start = time.monotonic()
    try:
        if options.parts[:1] == ["report"]:
            print(report.render(report.merged([report.load(Path(path)) for path in options.parts[1:]])))
            return
        record = report.new_record(options.threads)
        if options.json is not None and options.json.is_file():
            record = report.continued(report.load(options.json), record)
        for part in options.parts or PARTS:
            say(f"part {part}")
            PARTS[part](options, record["cells"])
            if options.json:
                report.save(options.json, record)
    except (OSError, ValueError, WorkerFailed) as e:
        sys.exit(str(e))
    print(report.render(record))
    say(f"took {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
