"""One variant in a process of its own: builds a subject, then times a piece whenever it is asked to.

Talks JSON lines: asked over stdin, answered over the stdout it was born with (other output goes to stderr).
`Worker` is the asking side. Between questions the process sleeps, so variants can take turns.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CLOCK_SEC = 0.02  # of the system's books
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call, and how many cores everybody else kept busy meanwhile."""

    sec: float
    others: float


class WorkerFailed(RuntimeError):
    """The process ended or raised; the message carries its last words."""


class Worker:
    """A subject in another process; use as a context manager.

    Args:
        kind: A key of `subjects.SUBJECTS` or `parts.SUBJECTS`.
        variant: How the work is done.
    """

    def __init__(self, kind: str, variant: Any) -> None:
        env = dict(os.environ, OMP_NUM_THREADS=str(variant.threads), MKL_NUM_THREADS=str(variant.threads))
        if variant.ops:
            env["STYLEGAN_ROOTED_OPS"] = variant.ops
        command = [sys.executable, __file__, kind, json.dumps(dataclasses.asdict(variant))]
        self._words = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop the process when full
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, text=True, env=env
        )
        self.names: list[str] = []
        self.operators = ""

    def __enter__(self) -> "Worker":
        about = self._answer()
        self.names, self.operators = about["names"], about["operators"]
        return self

    def __exit__(self, *_: Any) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._words):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def time(self, name: str, count: int = 1) -> "Timing":
        """Wall-clock seconds per call of a piece, over `count` calls in a row."""
        return Timing(**self._ask({"do": "time", "name": name, "count": count}))

    def peak_mib(self) -> float:
        """Peak resident memory of the process so far."""
        return float(self._ask({"do": "memory"})["mib"])

    def facts(self) -> dict[str, float]:
        """What the subject found out beside its time."""
        return dict(self._ask({"do": "facts"})["facts"])

    def profile(self, name: str, rows: int) -> list[dict[str, Any]]:
        """The operators in which a piece spends its time, by their own time: [{op, share, calls}]."""
        return self._ask({"do": "profile", "name": name, "rows": rows})["ops"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._words.seek(0)
            raise WorkerFailed("".join(self._words.readlines()[-8:]).strip() or "the process ended")
        return json.loads(line)


def timed(subject: Any, name: str, count: int) -> Timing:
    """Seconds per call, and what others did meanwhile."""
    busy, own, start = busy_seconds(), sum(os.times()[:2]), time.perf_counter()
    for _ in range(count):
        subject(name)
    elapsed = time.perf_counter() - start
    others = busy_seconds() - busy - (sum(os.times()[:2]) - own) - CLOCK_SEC
    return Timing(elapsed / count, max(others, 0.0) / elapsed)


def busy_seconds() -> float:
    """Processor time that all processes and the host's other guests have used; 0 where the system does not tell."""
    try:
        fields = [int(v) for v in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def profiled(subject: Any, name: str, rows: int) -> list[dict[str, Any]]:
    """Operators by their own processor time."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        subject(name)
    events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return [{"op": e.key, "share": e.self_cpu_time_total / total, "calls": e.count} for e in events[:rows]]


def peak_mib() -> float:
    """Peak resident memory of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def subject_kind(kind: str) -> Any:
    """The class of that name. What it needs alone is imported.

    What a process has loaded before decides how much memory the C library keeps for later: with everything in `parts`
    the reference's step takes far fewer page faults than in a script that trains, and less time.
    """
    from benchmarks import subjects

    if kind in subjects.SUBJECTS:
        return subjects.SUBJECTS[kind]
    from benchmarks import parts

    return parts.SUBJECTS[kind]


def main() -> None:
    """Serve one subject until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    import torch

    from benchmarks import subjects
    from torch_utils import custom_ops

    torch.manual_seed(0)
    kind, variant = sys.argv[1], subjects.Variant(**json.loads(sys.argv[2]))
    with tempfile.TemporaryDirectory() as folder:
        subject = subject_kind(kind)(variant, Path(folder))
        answer({"operators": custom_ops.describe(), "names": list(subject.names)})
        for line in sys.stdin:
            question = json.loads(line)
            if question["do"] == "time":
                answer(dataclasses.asdict(timed(subject, question["name"], question["count"])))
            elif question["do"] == "profile":
                answer({"ops": profiled(subject, question["name"], question["rows"])})
            elif question["do"] == "facts":
                answer({"facts": getattr(subject, "facts", {})})
            else:
                answer({"mib": peak_mib()})


if __name__ == "__main__":
    main()
