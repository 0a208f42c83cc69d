"""A run's folder: its name, its JSON and JSON-lines files, the record of the environment. Knows nothing of networks.

Names and fields: spec training-and-metrics.md section 2.
"""

import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.util import atomic_file, naming
from torch_utils import custom_ops


def create(outdir: str | os.PathLike, description: str) -> Path:
    """Make and return `outdir/NNNNN-description`, NNNNN being one more than the largest number there.

    Raises:
        OSError: `outdir` is a file or cannot be written.
    """
    outdir = Path(outdir)
    if outdir.exists() and not outdir.is_dir():
        raise NotADirectoryError(f"--outdir {outdir} is a file; name a folder")
    outdir.mkdir(parents=True, exist_ok=True)
    description = re.sub(r"[^A-Za-z0-9._+=-]+", "_", description)
    for _ in range(100):
        numbers = [int(match[0]) for p in outdir.iterdir() if p.is_dir() and (match := re.match(r"\d+", p.name))]
        path = outdir / f"{max(numbers, default=-1) + 1:05d}-{description}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise OSError(f"no free run number in {outdir}")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one."""
    with atomic_file(path) as f:
        f.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity become null."""
    write_atomic(path, json.dumps(plain(value), indent=2) + "\n")


def append_jsonl(path: Path, value: Any) -> None:
    """Append one object as one line."""
    with naming(path), open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(plain(value)) + "\n")


GROWING = ("stats.jsonl", "log.txt", "metric-*.jsonl")
TIMING_KEYS = ("timestamp", "total_time", "total_time_str")
TIMING_PREFIXES = ("Timing/", "Resources/")


def without_timing(row: dict[str, Any]) -> dict[str, Any]:
    """A line of stats.jsonl or metric-*.jsonl without what the clock and the machine put into it.

    What is left is the same, byte for byte when written again, in a run that was stopped and continued.
    """
    kept = {k: v for k, v in row.items() if k not in TIMING_KEYS and not k.startswith(TIMING_PREFIXES)}
    if isinstance(kept.get("provenance"), dict):
        kept["provenance"] = {k: v for k, v in kept["provenance"].items() if k != "seconds"}
    return kept


def measure_files(path: Path) -> dict[str, int]:
    """Sizes in bytes of the files that grow with a run, once they are safely on the disk."""
    sizes = {}
    for file in (f for pattern in GROWING for f in sorted(path.glob(pattern))):
        with naming(file), file.open("rb") as f:
            os.fsync(f.fileno())
            sizes[file.name] = os.fstat(f.fileno()).st_size
    return sizes


def rewind(path: Path, sizes: dict[str, int], *, keep_metrics: bool = False) -> None:
    """Cut the files that grow with a run back to `sizes` (see `measure_files`); those not named there are removed.

    Args:
        keep_metrics: Leave metric-*.jsonl, but for a torn last line: nobody will measure these snapshots again.
    """
    for file in (f for pattern in GROWING for f in sorted(path.glob(pattern))):
        size = sizes.get(file.name)
        if keep_metrics and file.match("metric-*.jsonl"):
            size = file.read_bytes().rfind(b"\n") + 1
        if not size:
            file.unlink()
        elif size < file.stat().st_size:
            with naming(file):
                os.truncate(file, size)


def drop_metrics(path: Path, nimg: int) -> None:
    """Remove the lines of metric-*.jsonl of snapshots taken at or after `nimg` images."""
    for file in sorted(path.glob("metric-*.jsonl")):
        rows = read_jsonl(file)
        kept = [row for row in rows if round((row.get("kimg") or 0.0) * 1000) < nimg]
        if not kept:
            file.unlink()
        elif len(kept) < len(rows):
            write_atomic(file, "".join(json.dumps(row) + "\n" for row in kept))


def remove_leftovers(path: Path) -> None:
    """Remove the unfinished files of a process that was killed while it wrote; its lock must be held."""
    for file in path.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def prune_snapshots(path: Path, keep_last: int, spared: Container[str | None]) -> None:
    """Remove all snapshots but the newest `keep_last` and those whose pickle's name is in `spared`, all their files.

    The pickle goes last: a process killed in between finds the rest at the next snapshot. Grids of images stay.
    """
    pickles = sorted(path.glob("network-snapshot-*.pkl"), key=lambda p: (len(p.name), p.name))
    for old in pickles[:-keep_last]:
        if old.name not in spared:
            number = old.stem.removeprefix("network-snapshot-")
            others = (f"{old.stem}.safetensors", f"{old.stem}.config.json", f"adapter-{number}.safetensors")
            for name in (*others, old.name):
                (path / name).unlink(missing_ok=True)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a JSON-lines file; a torn last line is left out; [] where there is no file."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def plain(value: Any) -> Any:
    """`value` as strict JSON types; non-finite floats become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, np.generic):
        return plain(value.item())
    return value


def environment(device: torch.device | str) -> dict[str, Any]:
    """What the numbers of a run may depend on beside its options: versions, processor, device, threads."""
    device = torch.device(device)
    record = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "operators": custom_ops.describe(device.type),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return record


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_mem_gib() -> float:
    """Peak resident memory of this process in GiB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
