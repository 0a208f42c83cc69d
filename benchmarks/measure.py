"""Samples, their spread, interleaved repetitions, and the fitted exponent of growth. Knows no network."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.worker import Worker

MAX_OTHERS = 0.12  # cores
TRIES = 3
MAX_RETRY_SEC = 4.0  # longer runs are not repeated

Cells = dict[str, dict[str, Any]]  # name: {"unit": ..., "samples": [...]}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `num` samples."""

    median: float
    low: float
    high: float
    num: int


def spread(samples: Sequence[float]) -> Spread:
    """Median and quartiles; of one sample, itself.

    Raises:
        ValueError: No samples.
    """
    if not samples:
        raise ValueError("there is nothing to take the median of")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high, len(samples))


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """slow / fast of every repetition: interleaved neighbours share what else the machine was doing."""
    return [a / b for a, b in zip(slow, fast)]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The e of cost = c * size^e, by least squares on logarithms.

    Raises:
        ValueError: Fewer than two different sizes, or a number that has no logarithm.
    """
    if len(sizes) != len(costs) or len(set(sizes)) < 2:
        raise ValueError(f"an exponent needs costs of two different sizes at least; got sizes {list(sizes)}")
    if min(*sizes, *costs) <= 0:
        raise ValueError("sizes and costs of an exponent are positive")
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in costs]
    return statistics.linear_regression(x, y).slope


def step_seconds(phases: dict[str, list[float]], intervals: dict[str, int], batch: int) -> list[float]:
    """Seconds per image of a whole step, one value per repetition: every phase over its interval, the average on top.

    Args:
        phases: Seconds per piece; the pieces of `intervals`, and `ema`.
        intervals: Iterations between two runs of a phase.
        batch: Images per step.
    """
    pieces = {**intervals, "ema": 1}
    num = min(len(phases[name]) for name in pieces)
    return [sum(phases[name][i] / interval for name, interval in pieces.items()) / batch for i in range(num)]


def interleave(
    workers: dict[str, Worker], pieces: Iterable[str], repeats: int, *, warm: Iterable[str], least_sec: float = 0.0,
    in_a_row: bool = False, wake: bool = False, say: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """Seconds per worker and piece: in every repetition the workers take turns, piece by piece.

    Args:
        workers: Name: process.
        pieces: What to time; a worker that does not have a piece is passed over.
        repeats: Repetitions that count.
        warm: Pieces that every worker first runs once, uncounted.
        least_sec: Short pieces are repeated to fill this time, judged by the second run, and run once uncounted before:
            what a process does first after the others' turns is to get its memory back.
        in_a_row: Workers take turns by repetitions instead: all pieces of one, then of the next. Memory that a process
            has handed back goes to the host of a virtual machine within seconds and is dear to get again; the original
            was measured without such pauses.
        wake: All pieces are run once more, uncounted, before such a turn: the first round after others' long turns
            is slower than the next ones.
        say: Told what is being done.
    """
    pieces = list(pieces)
    times: dict[str, dict[str, list[float]]] = {
        name: {piece: [] for piece in pieces if piece in worker.names} for name, worker in workers.items()
    }
    counts: dict[tuple[str, str], int] = {}
    warm = list(warm)
    for name, worker in workers.items():
        for piece in times[name]:
            if piece in warm:
                worker.time(piece)
                if least_sec:
                    counts[name, piece] = max(math.ceil(least_sec / max(worker.time(piece).sec, 1e-6)), 1)
    order = list(workers)
    for repetition in range(repeats):
        say(f"repetition {repetition + 1} of {repeats}")
        turns = [(n, p) for n in order for p in pieces] if in_a_row else [(n, p) for p in pieces for n in order]
        for name, piece in turns:
            if wake and piece == pieces[0]:
                for each in times[name]:
                    workers[name].time(each)
            if piece in times[name]:
                if (name, piece) in counts:
                    workers[name].time(piece)
                times[name][piece].append(quiet_seconds(workers[name], piece, counts.get((name, piece), 1)))
        order = order[1:] + order[:1]  # nobody always comes after the same neighbour
    return times


def quiet_seconds(worker: Worker, piece: str, count: int) -> float:
    """Seconds per call of a run in which nobody else used more than MAX_OTHERS of a core; the quietest of TRIES."""
    runs = []
    for _ in range(TRIES):
        runs.append(worker.time(piece, count))
        if runs[-1].others <= MAX_OTHERS or runs[-1].sec * count > MAX_RETRY_SEC:
            break
    return min(runs, key=lambda run: run.others).sec


def available_gib() -> float | None:
    """Memory that processes can have without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
        return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


@contextlib.contextmanager
def started(workers: dict[str, Worker]) -> Any:
    """All workers running; they are built at the same time and all ended at the end."""
    with contextlib.ExitStack() as stack:
        for worker in workers.values():
            stack.enter_context(worker)
        yield workers
