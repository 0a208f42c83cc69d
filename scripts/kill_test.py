"""Kill a training run with SIGKILL at random moments, during saves too, and compare its end with an undisturbed run.

    python scripts/kill_test.py --kills 50

Prints one line per kill and a summary. Exit code 1 if anything that had been saved was lost or any byte of the end
differs. Runs are forked from this process, so torch is imported once; networks are tiny, everything else is real.
"""

import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from stylegan_rooted import cli  # noqa: E402
from torch_utils import images  # noqa: E402
from training import checkpoint, network_file, run_dir  # noqa: E402

OPTIONS = (
    "--resume none --cbase 64 --cmax 8 --zdim 8 --wdim 8 --batch 4 --batch-gpu 2 --device cpu --grid 2x2 --mirror true "
    "--tick 0.02 --snap 2 --metrics kid --metric-num 4 --autosave-min 0 --aug ada --target 0 --ada-kimg 0.2 "
    "--augpipe bgc --pl-weight 2 --style-mixing 0.9 --loss rooted --k 1.5:3@0.2"
).split()
STARTED_SEC = 0.25  # what a run takes before its first step; only for the choice of moments
STEP_SEC = 0.06
KINDS = ("time", "time", "call", "write")  # of every four kills in a row; see `Moments`
CALLS = ("fsync", "replace", "unlink", "truncate")


@dataclass
class Report:
    """What the kills did, and of which kinds the next ones are."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    to_come: list[str] = field(default_factory=list)
    in_save: int = 0


def main() -> int:
    """Parse options, kill, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kimg", type=float, default=0.24, help="length of the run that is killed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = torment(Path(folder), options.kills, options.kimg, options.seed, say=print)
    print(summary(report))
    return bool(report.problems)


def torment(folder: Path, kills: int, kimg: float, seed: int, say: Callable[[str], None]) -> Report:
    """Kill runs until `kills` are used up, starting a new run when one has come to its end; compare every end."""
    torch.optim.Adam([torch.zeros(1)])  # imports what every child would import again
    write_pictures(folder / "pictures")
    command = ["finetune", "--data", str(folder / "pictures"), "--kimg", str(kimg), *OPTIONS]
    count = folder / "count"
    assert wait(fork([*command, "--outdir", str(folder / "reference")], Moments(count_to=count))) == 0
    num_steps = round(kimg * 1000 / 4)
    pause = min(2 * num_steps / max(kills, 1), num_steps)  # most steps between two kills: they spread over the run
    per_step = {kind: num / num_steps for kind, num in json.loads(count.read_text()).items()}
    reference = only(folder / "reference")
    rng, report, number = random.Random(seed), Report(), 0
    say(" no  killed                                      saved then       now  lost")
    while len(report.lines) < kills or number == 0:
        outdir = folder / f"run{number}"
        number += 1
        while len(report.lines) < kills and not finished(outdir):
            torture_once(command, outdir, rng, report, pause, per_step, say)
        code = wait(fork([*command, "--outdir", str(outdir)]))
        if code:
            report.problems.append(f"run {number}: the last start ended with code {code}")
        report.problems += [f"run {number}: {difference}" for difference in differences(only(outdir), reference)]
    return report


def torture_once(
    command: list[str],
    outdir: Path,
    rng: random.Random,
    report: Report,
    pause: float,
    per_step: dict[str, float],
    say: Callable[[str], None],
) -> None:
    """Start the command, kill it at a random moment, and look at what is left."""
    before = newest_good(outdir)
    report.to_come = report.to_come or rng.sample(KINDS, len(KINDS))
    kind = report.to_come[-1]
    note = outdir.parent / "note"
    note.unlink(missing_ok=True)
    if kind in per_step:
        number = rng.randint(1, max(round(pause * per_step[kind]), 1))
        pid = fork([*command, "--outdir", str(outdir)], Moments(kind, number, note))
    else:
        pid = fork([*command, "--outdir", str(outdir)])
        time.sleep(rng.uniform(0, STARTED_SEC + pause * STEP_SEC))
        os.kill(pid, signal.SIGKILL)
    code = wait(pid)
    if code == 0:
        return  # it was done first: no kill
    report.to_come.pop()
    after = newest_good(outdir)
    where = note.read_text() if note.exists() else "at a random time"
    lost = after < before or bool(unreadable(outdir))
    report.in_save += note.exists()
    number = len(report.lines) + 1
    report.lines.append(f"{number:3d}  {where:<42} {shown(before):>10} {shown(after):>9}  {'YES' if lost else '0'}")
    say(report.lines[-1])
    if code != -signal.SIGKILL:
        report.problems.append(f"kill {number}: the run ended with code {code} instead")
    if lost:
        report.problems.append(f"kill {number} ({where}): {unreadable(outdir) or 'the newest state is gone'}")


@dataclass
class Moments:
    """Counts the pieces of file work of a process, and SIGKILLs it at one of them.

    A `call` is a moment before or after a system call of `CALLS`; a `write` is half a write into a training state.
    """

    kind: str = ""
    number: int = 0
    note: Path | None = None
    count_to: Path | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"call": 0, "write": 0})

    def reached(self, kind: str, what: str) -> bool:
        """Count one moment; whether it is the last one, noted as `what`."""
        self.counts[kind] += 1
        last = kind == self.kind and self.counts[kind] == self.number
        if last and self.note:
            self.note.write_text(what[:42])
        return last

    def watch(self) -> None:
        """From here on."""
        for name in CALLS:
            self._watch_call(name, getattr(os, name))
        original = checkpoint._Digesting.write

        def write(digesting: Any, data: Any) -> int:
            if self.reached("write", "within the training state"):
                view = memoryview(data).cast("B")
                digesting._file.write(view[: len(view) // 2])
                digesting._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(digesting, data)

        checkpoint._Digesting.write = write

    def _watch_call(self, name: str, original: Callable[..., Any]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            file = "" if name == "fsync" else Path(args[-1] if name == "replace" else args[0]).name
            if self.reached("call", f"before {name} {file}"):
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if self.reached("call", f"after {name} {file}"):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, call)


def fork(arguments: list[str], moments: Moments | None = None) -> int:
    """Start the command line in a child; returns its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads; here they only wait
        pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        sys.stdout = sys.stderr = io.StringIO()
        if moments:
            moments.watch()
        try:
            cli.main(arguments)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        if moments and moments.count_to:
            moments.count_to.write_text(json.dumps(moments.counts))
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a child; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def only(outdir: Path) -> Path:
    """The one run folder in it."""
    (path,) = (p for p in outdir.iterdir() if p.is_dir())
    return path


def finished(outdir: Path) -> bool:
    """Whether the run there has come to its end."""
    return outdir.exists() and any(
        row.get("event") == "finished" for p in outdir.iterdir() for row in run_dir.read_jsonl(p / "history.jsonl")
    )


def newest_good(outdir: Path) -> int:
    """Images shown at the newest state that can be read; -1 where there is none."""
    for folder in outdir.iterdir() if outdir.exists() else ():
        for state in checkpoint.find(folder):
            try:
                checkpoint.check_digest(state)
            except checkpoint.StateError:
                continue
            return checkpoint.nimg_of(state)
    return -1


def unreadable(outdir: Path) -> list[str]:
    """Saved files that cannot be read: none, ever, under their own names."""
    bad = []
    for folder in outdir.iterdir() if outdir.exists() else ():
        for file in sorted(folder.glob("*.*")):
            try:
                if file.suffix in (".pkl", ".safetensors"):
                    network_file.load(file)
                elif file.suffix == ".json":
                    json.loads(file.read_text(encoding="utf-8"))
                elif file.suffix == ".pt":
                    checkpoint.read(file)
                elif file.suffix == ".png":
                    images.open_image(file.read_bytes()).load()
            except Exception as error:
                bad.append(f"{file.name}: {error}")
    return bad


def differences(path: Path, reference: Path) -> list[str]:
    """Names of files whose content is not that of the undisturbed run, clock and machine aside."""
    found = []
    for file in sorted(reference.iterdir()):
        other = path / file.name
        if file.suffix in (".png", ".pkl", ".safetensors") or file.name.endswith(".config.json"):
            same = other.exists() and other.read_bytes() == file.read_bytes()
        elif file.suffix == ".jsonl" and file.name != "history.jsonl":
            same = other.exists() and rows(other) == rows(file)
        elif file.suffix == ".pt":
            same = other.exists() and tensors(checkpoint.read(other)) == tensors(checkpoint.read(file))
        else:
            continue
        if not same:
            found.append(f"{file.name} differs")
    return found


def rows(file: Path) -> list[str]:
    """Lines of a JSON-lines file without what the clock put there, as text."""
    return [json.dumps(run_dir.without_timing(row)) for row in run_dir.read_jsonl(file)]


def tensors(value: Any, name: str = "") -> dict[str, bytes]:
    """Bits of all tensors of the networks and optimisers in a state."""
    if isinstance(value, torch.Tensor):
        return {name: value.contiguous().numpy().tobytes()}
    if isinstance(value, dict):
        keys = ("networks", "optimizers", "pl_mean", "objectives") if not name else value
        return {k: v for key in keys for k, v in tensors(value[key], f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in tensors(item, f"{name}.{i}").items()}
    return {}


def shown(nimg: int) -> str:
    """A state's position, or a dash."""
    return "-" if nimg < 0 else str(nimg)


def summary(report: Report) -> str:
    """The last line."""
    end = "the end differs" if any("differs" in p for p in report.problems) else "byte-identical end"
    lost = sum("kill" in p for p in report.problems)
    text = f"{len(report.lines)} kills ({report.in_save} of them during file work), {lost} with a loss; {end}"
    return "\n".join([*report.problems, text])


def write_pictures(folder: Path) -> None:
    """Twelve 16x16 RGB images."""
    folder.mkdir()
    rng = np.random.RandomState(0)
    for i in range(12):
        images.save_png(folder / f"{i:02d}.png", torch.from_numpy(rng.randint(0, 256, [3, 16, 16], dtype=np.uint8)))


if __name__ == "__main__":
    sys.exit(main())
