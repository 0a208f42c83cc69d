"""Which implementation of the operators runs, and the one place that compiles, keeps and loads compiled ones.

The one switch is the environment variable STYLEGAN_ROOTED_OPS. `ref` forces the plain definitions of every operator;
`auto` (the default) lets each operator take an equal but faster path made of the same torch calls; `native` compiles
the C++ operators once, keeps them in the user's cache folder and uses them where they are faster. What cannot be
compiled is explained once and then done by torch calls: no operator ever fails for want of a compiler.

Nothing happens at import. Found, compiled and loaded is on first use: a kept library, else the compiler, else torch.
"""

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dnnlib

VARIABLE = "STYLEGAN_ROOTED_OPS"
CHOICES = ("auto", "native", "ref")
NAMESPACE = "stylegan_rooted"
SOURCE = Path(__file__).parent / "ops" / "native_cpu.cpp"
LIBRARY = "native_cpu.so"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-march=native", "-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("c++", "g++", "clang++")
BUILD_SEC = 900  # longest compilation, and longest wait for somebody else's
NUM_LINES = 12  # of the compiler's last words in a warning

verbosity = "brief"

_lock = threading.RLock()
_outcome: "Outcome | None" = None  # of this process's one attempt
_declared: dict[str, Any] = {}


class BuildError(RuntimeError):
    """The compiled operators cannot be had; the message says why and what would help."""


@dataclass(frozen=True)
class Outcome:
    """What came of the attempt to get the compiled operators: loaded from `path`, or not for `reason`."""

    path: Path | None
    reason: str


def requested() -> str:
    """What the environment asks for: `auto`, `native` or `ref`.

    Raises:
        ValueError: The variable holds anything else.
    """
    value = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE} is {value!r}, wanted one of {', '.join(CHOICES)}")
    return value


def selected() -> str:
    """The family of implementations in use: `native` (compiled) or `ref` (torch calls). May compile, if asked to.

    Raises:
        ValueError: The variable is not understood.
    """
    return "native" if requested() == "native" and available() else "ref"


def fast_paths(impl: str = "cuda") -> bool:
    """Whether an operator called with `impl` may take its faster path instead of its plain definition.

    Args:
        impl: The operator's argument: `cuda` (the default: whatever is fastest) or `ref` (the plain definition).

    Raises:
        ValueError: `impl` or the environment variable is not understood.
    """
    if impl not in ("cuda", "ref"):
        raise ValueError(f"impl is {impl!r}, wanted 'cuda' or 'ref'")
    return requested() != "ref" and impl != "ref"


def available() -> bool:
    """Whether the compiled operators are loaded; the first call finds or compiles them, or warns once why not."""
    if _outcome is None:
        _resolve()
    return _outcome is not None and _outcome.path is not None


def describe() -> str:
    """One line for logs: what is asked for and what runs. Compiles only if `native` is asked for."""
    asked = requested()
    if asked == "ref":
        return "ref: plain definitions"
    if asked == "auto":
        return "auto: fast paths made of torch calls"
    return "native: compiled operators" if available() else "native asked for, but not available: torch calls"


def declare(
    name: str, schema: str, shape: Callable[..., Any], setup_context: Callable[..., Any], backward: Callable[..., Any]
) -> Any:
    """The compiled operator `name`, made known to torch with schema, shape function and gradient on the first call.

    torch.compile cannot trace that first call, so have one call outside of it before.
    """
    op = _declared.get(name)
    if op is not None:
        return op
    with _lock:
        if name not in _declared:
            qualified = f"{NAMESPACE}::{name}"
            torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(qualified, shape)
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
            _declared[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
        return _declared[name]


def cache_dir() -> Path:
    """Where compiled operators are kept; one folder per combination of source, torch, compiler and processor."""
    return Path(dnnlib.util.make_cache_dir_path("ops"))


def library_path(compiler: str | None = None) -> Path:
    """Where the compiled operators for this machine are, or would be.

    Args:
        compiler: Path of a C++ compiler; None = the one that `find_compiler` finds.

    Raises:
        BuildError: There is no compiler, or it doesn't run; without one there is no telling which library fits.
    """
    parts = (
        hashlib.sha256(SOURCE.read_bytes()).hexdigest(),
        torch.__version__,
        str(torch.version.git_version),
        str(torch.compiled_with_cxx11_abi()),
        _compiler_version(compiler or find_compiler()),
        " ".join(_flags()),
        _processor(),
    )
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    return cache_dir() / f"cpu-{key}" / LIBRARY


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, else the first of c++, g++ and clang++ on the PATH.

    Raises:
        BuildError: There is none.
    """
    wanted = os.environ.get("CXX", "").strip()
    for name in (wanted,) if wanted else COMPILERS:
        path = shutil.which(name)
        if path:
            return path
    what = f"$CXX is {wanted!r}, which is not a program" if wanted else f"none of {', '.join(COMPILERS)} is on the PATH"
    raise BuildError(f"no C++ compiler: {what}; install g++, or set CXX")


def build() -> Path:
    """Compile the operators for this machine unless they are kept already; returns the library's path.

    Two builders at once take turns, and the second finds the first one's work. The lock is the kernel's (flock), so it
    goes with the process that holds it, however that ends.

    Raises:
        BuildError: No compiler, it failed, or the cache folder cannot be written.
    """
    if sys.platform != "linux":
        raise BuildError(f"compiled operators are made on Linux only, this is {sys.platform}")
    compiler = find_compiler()
    path = library_path(compiler)
    if _is_ours(path):
        return path
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _exclusive(path.parent / "lock"):
            if not _is_ours(path):
                for left in path.parent.glob("build-*"):  # by a builder that was killed: we hold the lock, it does not
                    shutil.rmtree(left, ignore_errors=True)
                folder = Path(tempfile.mkdtemp(prefix="build-", dir=path.parent))
                try:
                    _compile(compiler, folder / LIBRARY)
                    os.chmod(folder / LIBRARY, 0o700)
                    os.replace(folder / LIBRARY, path)
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as e:
        raise BuildError(
            f"cannot keep compiled operators in {path.parent}: {e.strerror or e}; set STYLEGAN_ROOTED_CACHE to a "
            "folder that can be written"
        ) from None
    if not _is_ours(path):
        raise BuildError(f"{path} belongs to another user, or others may write to it; remove it")
    return path


def clean() -> int:
    """Remove every kept library; returns how many there were. A process that has loaded one is not disturbed."""
    folder = cache_dir()
    count = len(list(folder.glob(f"*/{LIBRARY}")))
    for entry in folder.glob("cpu-*"):
        shutil.rmtree(entry)
    return count


def _resolve() -> None:
    """Get the compiled operators, once per process; remember a failure and warn of it once."""
    global _outcome
    with _lock:
        if _outcome is not None:
            return
        try:
            path = _load()
            _outcome = Outcome(path, "")
            return
        except BuildError as e:
            reason = str(e)
        except Exception as e:  # whatever it is, torch calls do the same work
            reason = f"{type(e).__name__}: {e}"
        _outcome = Outcome(None, reason)
    warnings.warn(f"compiled operators are not available, torch calls do their work: {reason}", stacklevel=2)


def _load() -> Path:
    """Load the library, which is compiled before if need be, and once again if the kept one does not load."""
    path = build()
    try:
        torch.ops.load_library(str(path))
        return path
    except OSError as e:
        broken = str(e)
    with contextlib.suppress(OSError):
        path.unlink()
    path = build()
    try:
        torch.ops.load_library(str(path))
    except OSError as e:
        raise BuildError(f"{path} does not load: {e} (before: {broken})") from None
    return path


def _compile(compiler: str, output: Path) -> None:
    """Run the compiler, or raise BuildError with its last lines."""
    torch_dir = Path(torch.__file__).parent
    command = [compiler, *_flags(), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-isystem{torch_dir / 'include'}", str(SOURCE), "-o", str(output)]
    command += [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
    start = time.monotonic()
    if verbosity != "none":
        sys.stderr.write("Compiling operators for this processor, once; about half a minute …\n")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=BUILD_SEC,
            text=True, errors="replace", env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BuildError(f"{compiler} had not finished after {BUILD_SEC} s") from None
    except OSError as e:
        raise BuildError(f"{compiler} does not run: {e.strerror or e}") from None
    if done.returncode or not output.is_file():
        last = "\n".join(done.stdout.strip().splitlines()[-NUM_LINES:]) or "(it said nothing)"
        ran = f"The command was: {shlex.join(command)}"
        raise BuildError(f"{compiler} failed with status {done.returncode}:\n{last}\n{ran}")
    if verbosity == "full":
        sys.stderr.write(f"{shlex.join(command)}\n{done.stdout}")
    if verbosity != "none":
        sys.stderr.write(f"Compiled in {time.monotonic() - start:.0f} s\n")


def _flags() -> tuple[str, ...]:
    """Compiler flags for this processor; compilers are shy of 512-bit vectors unless told."""
    return (*FLAGS, "-mprefer-vector-width=512") if platform.machine() in ("x86_64", "AMD64") else FLAGS


@functools.lru_cache(maxsize=4)
def _compiler_version(compiler: str) -> str:
    """First line of `compiler --version`."""
    try:
        done = subprocess.run(
            [compiler, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as e:
        raise BuildError(f"{compiler} --version fails: {e}") from None


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    """Architecture and abilities of this processor: a library made for another may die of an illegal instruction."""
    lines = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        told = ("model name", "model", "flags", "Features")
        lines = [line for line in text.splitlines() if line.split("\t")[0].strip() in told]
    return "\n".join([platform.machine(), *sorted(lines)])


def _is_ours(path: Path) -> bool:
    """Whether the library is there and nobody else can have put it there."""
    try:
        info = path.stat()
    except OSError:
        return False
    owners = (0, os.getuid())
    return stat.S_ISREG(info.st_mode) and info.st_uid in owners and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of this file; the kernel releases it when its holder ends, however."""
    import fcntl  # not on every platform

    with path.open("ab") as file:
        deadline = time.monotonic() + BUILD_SEC
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has held {path} for {BUILD_SEC} s") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks: the rename at the end still keeps the library whole
                break
        yield
