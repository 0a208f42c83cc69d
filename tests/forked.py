"""The command line in a process of its own, for tests that kill it: forked, so that torch is imported once."""

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from stylegan_rooted import cli

torch.optim.Adam([torch.zeros(1)])  # imports a second's worth of torch, which every child would do again


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (negative: by that signal) and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that say what went wrong."""
        return [line for line in self.err.splitlines() if line.startswith("Error: ")]


class Child:
    """A forked process that runs `function` and exits with what it returns, or with the command line's exit code."""

    def __init__(self, function: Callable[[], int | None]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads; here they only wait
            self.pid = os.fork()
        if self.pid:
            return
        code = 70
        torch.set_num_threads(1)  # a pool of threads that an earlier test started does not survive the fork
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(Path(self._folder.name, name), os.O_WRONLY | os.O_CREAT, 0o600), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            try:
                code = function() or 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
        finally:
            sys.stdout.flush()
            os._exit(code)

    def kill(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, limit_sec: float = 60) -> Ended:
        """Until it ends; one that takes longer is killed."""
        end = time.monotonic() + limit_sec
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
            time.sleep(0.005)
        texts = [Path(self._folder.name, name) for name in ("out", "err")]
        out, err = (text.read_text() if text.exists() else "" for text in texts)
        self._folder.cleanup()
        return Ended(os.waitstatus_to_exitcode(status), out, err)


def start(*arguments: object) -> Child:
    """Start `stylegan-rooted ARGUMENTS`."""
    return Child(lambda: cli.main([str(a) for a in arguments]))


def run(*arguments: object, before: Callable[[], object] = lambda: None) -> Ended:
    """Run `stylegan-rooted ARGUMENTS` to its end, `before` first in the same process."""
    return Child(lambda: (before(), cli.main([str(a) for a in arguments]))[1]).wait()


def wait_for(condition: Callable[[], object], limit_sec: float = 30) -> None:
    """Until `condition` holds."""
    end = time.monotonic() + limit_sec
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)


def own_mounts() -> None:
    """Give this (forked, single-threaded) process mounts of its own.

    Raises:
        OSError: The system does not allow that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid, newns, newuser = os.getuid(), os.getgid(), 0x20000, 0x10000000
    _check(libc.unshare(newns | (newuser if uid else 0)))
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _check(libc.mount(None, b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE


def mount_tmpfs(folder: Path, options: str, *, read_only: bool = False, remount: bool = False) -> None:
    """A file system in memory at `folder`, of this process alone (see `own_mounts`)."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = int(read_only) | (32 if remount else 0)
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options.encode()))


def can_mount() -> bool:
    """Whether a process here can have mounts of its own."""

    def attempt() -> int:
        with contextlib.suppress(OSError, AttributeError), tempfile.TemporaryDirectory() as folder:
            own_mounts()
            mount_tmpfs(Path(folder), "size=64k")
            ctypes.CDLL(None).umount2(os.fsencode(folder), 2)
            return 0
        return 1

    return Child(attempt).wait().code == 0


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
