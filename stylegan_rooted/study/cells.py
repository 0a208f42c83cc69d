"""Cells of a study: settings in, measurements out, one JSON line each; a cell whose line is there is not repeated.

Knows files and processes; what a cell computes is handed in as a function. A cell's key is its settings, all of them,
written as JSON with sorted names, so that a changed setting is another cell.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from training.run_dir import append_jsonl, plain, read_jsonl

FILE = "cells.jsonl"
FORMAT = 1
"""Of results: lines of another format count as missing."""

Cell = dict[str, Any]
Result = dict[str, Any]
Compute = Callable[[Cell], Result]


class Cells:
    """The results in one folder.

    Args:
        folder: Where `cells.jsonl` lies or will lie.
        compute: Settings -> measurements; a function of a module, since other processes call it too.
        num_workers: Processes that compute; with 1 this process does.
    """

    def __init__(self, folder: Path, compute: Compute, *, num_workers: int = 1) -> None:
        self._path = folder / FILE
        self._compute = compute
        self._num_workers = num_workers
        self._results: dict[str, Result] = {}
        for row in read_jsonl(self._path):
            if isinstance(row, dict) and row.get("format") == FORMAT:
                self._results[key(row["cell"])] = row["result"]

    def __len__(self) -> int:
        """How many results there are."""
        return len(self._results)

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those without a result."""
        return [cell for cell in cells if key(cell) not in self._results]

    def result(self, cell: Cell) -> Result:
        """What was measured.

        Raises:
            KeyError: Not computed yet.
        """
        return self._results[key(cell)]

    def compute(self, cells: Sequence[Cell], done: Callable[[], None] = lambda: None) -> None:
        """Compute what is missing; every result is on disk before `done` is called for it."""
        _end_torn_line(self._path)
        for cell, result in self._computed(self.missing(cells)):
            result = plain(result)
            append_jsonl(self._path, {"format": FORMAT, "cell": cell, "result": result})
            self._results[key(cell)] = result
            done()

    def _computed(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Result]]:
        if self._num_workers == 1 or len(cells) < 2:
            with one_thread():
                for cell in cells:
                    yield cell, self._compute(cell)
            return
        pool = ProcessPoolExecutor(
            self._num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
        )
        try:
            waiting = {pool.submit(self._compute, cell): cell for cell in cells}
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class one_thread:  # noqa: N801 (a context manager, used like a function)
    """Within, torch computes with one thread: sums do not depend on the machine, and small networks are faster."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *exc: Any) -> None:
        torch.set_num_threads(self._before)


def key(cell: Cell) -> str:
    """The cell's name: its settings as JSON."""
    return json.dumps(plain(cell), sort_keys=True)


def _end_torn_line(path: Path) -> None:
    """A line that an interruption cut short must not swallow the next one."""
    if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with open(path, "ab") as f:
            f.write(b"\n")


def start_worker() -> None:
    """In every process that computes: one thread, and the end when the parent ends, however it ends."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the pool's own way to end its workers died with the parent; they would wait for ever
