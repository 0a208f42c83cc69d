"""Several processes that form one group, for tests: forked, so that torch is imported once."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_processes(folder: Path, world: int, function: Callable[[int], Any], *, limit_sec: float = 60) -> list[Any]:
    """What `function(rank)` returned or raised in each of `world` processes; None where a process did not get there."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    context = multiprocessing.get_context("fork")
    members = [context.Process(target=_member, args=(folder, world, rank, port, function)) for rank in range(world)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads; here they only wait
        for member in members:
            member.start()
    end = time.monotonic() + limit_sec
    for member in members:
        member.join(max(end - time.monotonic(), 0))
        if member.is_alive():
            member.kill()
            member.join()
    files = [folder / f"{rank}.pkl" for rank in range(world)]
    return [pickle.loads(file.read_bytes()) if file.is_file() else None for file in files]


def _member(folder: Path, world: int, rank: int, port: int, function: Callable[[int], Any]) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        value = function(rank)
    except BaseException as e:
        traceback.print_exc()
        value = e.with_traceback(None)
        value.__cause__ = value.__context__ = None
    try:
        data = pickle.dumps(value)
    except Exception:
        data = pickle.dumps(RuntimeError(f"{type(value).__name__}: {value}"))
    (folder / f"{rank}.pkl").write_bytes(data)
    os._exit(0)
