"""Libraries of compiled operators: which there are, what compiles them, where they are kept.

Knows compilers, keys, folders and locks; knows nothing of torch's operator registry nor of who asks. A library is kept
in the user's cache folder under a name made of everything that it depends on: its sources, torch, the flags, the
compilers and the processor or graphics card. One that is there is taken as it is; else it is compiled, once.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import dnnlib

FOLDER = Path(__file__).parent / "ops"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-march=native", "-fno-math-errno", "-fno-trapping-math")
CUDA_FLAGS = ("-O3",)
COMPILERS = ("c++", "g++", "clang++")
BUILD_SEC = 900  # longest compilation, and longest wait for somebody else's
NUM_LINES, MAX_WIDTH = 12, 400  # of the compiler's last words in a message

verbosity = "brief"


@dataclass(frozen=True)
class Plugin:
    """A library of compiled operators for one kind of device. Its sources are compiled side by side.

    Attributes:
        name: Its name, also on disk.
        sources: File names in torch_utils/ops; what they include from that folder is found by reading them.
        device: `cpu` or `cuda`.
    """

    name: str
    sources: tuple[str, ...]
    device: str = "cpu"


PLUGINS = {
    plugin.name: plugin
    for plugin in (
        Plugin(
            "cpu",
            ("derivatives_cpu.cpp", "native_cpu.cpp", "epilogue_cpu.cpp", "conv2d_cpu.cpp", "colours_cpu.cpp",
             "dense_cpu.cpp", "allocator_cpu.cpp"),
        ),
        Plugin("cuda", ("cuda_ops.cpp", "bias_act.cu", "upfirdn2d.cu"), device="cuda"),
    )
}


class BuildError(RuntimeError):
    """A library cannot be had; the message says why and what would help."""


class NoToolsError(BuildError):
    """Nothing was tried, as this machine lacks a compiler, a graphics card or a folder; nothing is broken."""


@dataclass(frozen=True)
class Tools:
    """What compiles a library: a C++ compiler and, for CUDA, a toolkit; with what they say of their versions."""

    compiler: str
    versions: tuple[str, ...]
    cuda_home: str | None = None


def cache_dir() -> Path:
    """Where libraries are kept; one folder per combination of all that they depend on."""
    return Path(dnnlib.util.make_cache_dir_path("ops"))


def spare_dir() -> Path:
    """Where libraries are kept if the cache folder cannot be written: a folder for this user among temporary files."""
    return Path(tempfile.gettempdir()) / f"stylegan-rooted-ops-{os.getuid()}"


def find(plugin: Plugin) -> Path | None:
    """The kept library that fits this machine, or None. Made by the compiler that is here, or if none is, by any.

    Raises:
        NoToolsError: The device that the library is for is not here.
    """
    _check_platform(plugin)
    tools = "*"
    with contextlib.suppress(BuildError):
        tools = _digest(*find_tools(plugin).versions)
    wanted = _target(plugin)
    for place in (cache_dir(), spare_dir()):
        if place == spare_dir() and not _is_private(place):
            continue
        found = []
        for path in place.glob(f"{plugin.name}-{_fit(plugin)}-*-{tools}/{plugin.name}.so"):
            target = path.parent.name.split("-")[2]
            if is_ours(path) and (_covers(target, wanted) if plugin.device == "cuda" else target == wanted):
                found.append((path.stat().st_mtime, path))
        if found:
            return max(found)[1]
    return None


def library_path(plugin: Plugin) -> Path:
    """Where the library for this machine would be kept.

    Raises:
        NoToolsError: There is no compiler, or it doesn't run; without one there is no telling.
    """
    _check_platform(plugin)
    tools = _digest(*find_tools(plugin).versions)
    return cache_dir() / f"{plugin.name}-{_fit(plugin)}-{_target(plugin)}-{tools}" / f"{plugin.name}.so"


def build(plugin: Plugin) -> Path:
    """Compile a library for this machine unless one is kept already; returns its path.

    Two builders at once take turns, and the second finds the first one's work. The lock is the kernel's (flock), so it
    goes with the process that holds it, however that ends.

    Raises:
        BuildError: The compiler failed. NoToolsError: no compiler, no device, or no folder that can be written.
    """
    kept = find(plugin)
    if kept is not None:
        return kept
    tools = find_tools(plugin)
    path = library_path(plugin)
    try:
        return _build_at(plugin, tools, path)
    except OSError as e:
        first = e
    spare = spare_dir()
    try:
        spare.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(spare):
            raise OSError(f"{spare} belongs to somebody else, or others may write to it")
        say(f"{cache_dir()} cannot be written ({first.strerror or first}); compiled operators go to {spare}")
        return _build_at(plugin, tools, spare / path.parent.name / path.name)
    except OSError as e:
        raise NoToolsError(
            f"cannot keep compiled operators in {path.parent}: {first.strerror or first}, nor in {spare}: "
            f"{e.strerror or e}; set STYLEGAN_ROOTED_CACHE to a folder that can be written"
        ) from None


def discard(path: Path) -> None:
    """Remove a library that does not load, and the objects that it may be made of."""
    with contextlib.suppress(OSError):
        path.unlink()
    shutil.rmtree(path.parent.parent / "objects", ignore_errors=True)


def clean() -> int:
    """Remove every kept library; returns how many there were. A process that has loaded one is not disturbed."""
    count = 0
    for place in (cache_dir(), spare_dir()):
        if place == spare_dir() and not _is_private(place):
            continue  # in a folder for all, where its name may be somebody else's link to anywhere
        for name in PLUGINS:
            for entry in filter(Path.is_dir, place.glob(f"{name}-*")):
                count += len(list(entry.glob(f"{name}.so")))
                shutil.rmtree(entry)
        shutil.rmtree(place / "objects", ignore_errors=True)
    return count


def find_tools(plugin: Plugin) -> Tools:
    """What would compile a library.

    Raises:
        NoToolsError: There is no C++ compiler, or no CUDA toolkit, or it isn't for this torch.
    """
    compiler = find_compiler()
    versions = (_version(compiler),)
    if plugin.device != "cuda":
        return Tools(compiler, versions)
    home = find_cuda()
    says = _version(str(home / "bin" / "nvcc"))
    built_for = torch.version.cuda
    found = re.search(r"release (\d+)\.", says)
    if built_for and found and found[1] != built_for.split(".")[0]:
        raise NoToolsError(
            f"torch was built for CUDA {built_for}, but {home / 'bin' / 'nvcc'} is of CUDA {found[1]}; set CUDA_HOME "
            f"to a toolkit of CUDA {built_for.split('.')[0]}"
        )
    return Tools(compiler, (*versions, says), str(home))


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, else the first of c++, g++ and clang++ on the PATH.

    Raises:
        NoToolsError: There is none.
    """
    wanted = os.environ.get("CXX", "").strip()
    for name in (wanted,) if wanted else COMPILERS:
        path = shutil.which(name)
        if path:
            return path
    what = f"$CXX is {wanted!r}, which is not a program" if wanted else f"none of {', '.join(COMPILERS)} is on the PATH"
    raise NoToolsError(f"no C++ compiler: {what}; install g++, or set CXX")


def find_cuda() -> Path:
    """Folder of the CUDA toolkit: $CUDA_HOME, $CUDA_PATH, that of the nvcc on the PATH, else /usr/local/cuda.

    Raises:
        NoToolsError: There is none, or the variable names something else.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        value = os.environ.get(variable, "").strip()
        if value and os.access(Path(value) / "bin" / "nvcc", os.X_OK):
            return Path(value)
        if value:
            raise NoToolsError(f"no CUDA toolkit: {variable} is {value}, where there is no bin/nvcc; mend or unset it")
    on_path = shutil.which("nvcc")
    homes = [Path(on_path).resolve().parent.parent] if on_path else []
    for home in (*homes, Path("/usr/local/cuda")):
        if os.access(home / "bin" / "nvcc", os.X_OK) and _cuda_includes(home):
            return home
    raise NoToolsError("no CUDA toolkit: nvcc is not on the PATH; install one, or set CUDA_HOME")


def is_ours(path: Path) -> bool:
    """Whether a file is there and nobody else can have put it there."""
    try:
        info = path.stat()
    except OSError:
        return False
    owners = (0, os.getuid())
    return stat.S_ISREG(info.st_mode) and info.st_uid in owners and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def say(text: str) -> None:
    """One line for people, from the first of several processes."""
    if verbosity != "none" and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{text}\n")


def _cuda_includes(home: Path) -> list[Path]:
    """Where a toolkit has its headers; conda's has them per target."""
    folders = [home / "include", *home.glob(f"targets/{platform.machine()}*/include")]
    return [folder for folder in folders if (folder / "cuda_runtime.h").is_file()]


def _build_at(plugin: Plugin, tools: Tools, path: Path) -> Path:
    """Compile a library to `path` unless somebody has; raises OSError if the folder cannot be written."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _exclusive(path.parent / "lock"):
        if is_ours(path):
            return path
        for left in path.parent.glob("build-*"):  # by a builder that was killed: we hold the lock, it does not
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix="build-", dir=path.parent))
        try:
            start = time.monotonic()
            what = "this graphics card" if plugin.device == "cuda" else "this processor"
            say(f"Compiling operators for {what}, once; usually less than a minute …")
            if plugin.device == "cuda":
                _compile_cuda(plugin, tools, folder / path.name)
            else:
                _compile_cpu(plugin, tools, folder / path.name)
            os.chmod(folder / path.name, 0o700)
            os.replace(folder / path.name, path)
            say(f"Compiled in {time.monotonic() - start:.0f} s")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if not is_ours(path):
        raise BuildError(f"{path} belongs to another user, or others may write to it; remove it")
    return path


def _compile_cpu(plugin: Plugin, tools: Tools, output: Path) -> None:
    """Each source to an object, side by side, then one library. Objects are kept: the next build may share some."""
    torch_dir = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = [tools.compiler, *_flags(plugin)]
    kept = output.parent.parent.parent / "objects"
    kept.mkdir(mode=0o700, exist_ok=True)

    def compile_one(source: str) -> Path:
        key = _digest(_text_of(source), _fit(plugin, with_sources=False), _target(plugin), *tools.versions)
        obj = kept / f"{key}-{source}.o"
        if not is_ours(obj):
            made = output.parent / f"{source}.o"
            include = f"-isystem{torch_dir / 'include'}"
            _run([*common, abi, include, "-c", str(FOLDER / source), "-o", str(made)], made)
            os.chmod(made, 0o700)
            os.replace(made, obj)
        return obj

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, plugin.sources))
    links = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run([*common, "-shared", *map(str, objects), "-o", str(output), *links], output)


def _compile_cuda(plugin: Plugin, tools: Tools, output: Path) -> None:
    """By torch.utils.cpp_extension and ninja, in a process of its own: its output is caught, its hanging ends."""
    home = Path(str(tools.cuda_home))
    macros = Path(torch.__file__).parent / "include" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    settings = {
        "name": plugin.name,
        "sources": [str(FOLDER / source) for source in plugin.sources],
        # A torch without CUDA has no such file; with this, its headers will do to compile for a torch that has CUDA.
        "extra_cflags": ["-O3"] if macros.is_file() else ["-O3", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"],
        "extra_cuda_cflags": [*CUDA_FLAGS, f"-ccbin={tools.compiler}"],
        "extra_include_paths": [str(folder) for folder in _cuda_includes(home) if folder != home / "include"],
        "build_directory": str(output.parent),
        "with_cuda": True,
        "is_python_module": False,
        "verbose": True,
    }
    # ninja comes with this package's dependencies, into a folder that need not be on the PATH.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    archs = ";".join(_arch_list(_target(plugin), tools))
    env = {"CUDA_HOME": str(home), "CXX": tools.compiler, "TORCH_CUDA_ARCH_LIST": archs, "PATH": path}
    _run([sys.executable, "-c", _CUDA_PROGRAM, str(home), json.dumps(settings)], output, env)


# Builds and loads, so that what it leaves is known to load; in case of failure the compiler's words, no traceback.
_CUDA_PROGRAM = """
import json, sys
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = sys.argv[1]
try:
    cpp_extension.load(**json.loads(sys.argv[2]))
except (RuntimeError, OSError) as e:
    sys.exit(str(e))
"""


def _run(command: list[str], output: Path, env: dict[str, str] | None = None) -> None:
    """Run a compiler, or raise BuildError with its last lines."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=BUILD_SEC,
            text=True, errors="replace", env={**os.environ, "LC_ALL": "C", **(env or {})},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} had not finished after {BUILD_SEC} s") from None
    except OSError as e:
        raise BuildError(f"{command[0]} does not run: {e.strerror or e}") from None
    if done.returncode or not output.is_file():
        said = [line[:MAX_WIDTH] for line in done.stdout.strip().splitlines() if not re.match(r"\[\d+/\d+\] ", line)]
        last = "\n".join(said[-NUM_LINES:]) or "(it said nothing)"
        ran = f"\nThe command was: {shlex.join(command)}" if env is None else ""  # ninja tells those that matter
        raise BuildError(f"{command[0]} failed with status {done.returncode}:\n{last}{ran}")
    if verbosity == "full":
        sys.stderr.write(f"{shlex.join(command)}\n{done.stdout}")


def _check_platform(plugin: Plugin) -> None:
    """Refuse what cannot work here."""
    if sys.platform != "linux":
        raise NoToolsError(f"compiled operators are made on Linux only, this is {sys.platform}")
    if plugin.device == "cuda" and not _target(plugin):
        raise NoToolsError("no CUDA graphics card; to compile for one elsewhere, name it: TORCH_CUDA_ARCH_LIST=9.0")


def _fit(plugin: Plugin, *, with_sources: bool = True) -> str:
    """Key of what a library must share with this process, whoever compiled it: sources, torch, flags."""
    texts = [_text_of(source) for source in plugin.sources] if with_sources else []
    versions = (torch.__version__, str(torch.version.git_version), str(torch.version.cuda))
    return _digest(*texts, *versions, str(torch.compiled_with_cxx11_abi()), *_flags(plugin))


def _text_of(source: str) -> str:
    """The text of a source and of all that it includes from its folder."""
    names, texts = [source], []
    for name in names:
        texts.append((FOLDER / name).read_text(encoding="utf-8"))
        for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', texts[-1], re.MULTILINE):
            if included not in names and (FOLDER / included).is_file():
                names.append(included)
    return "\n".join(texts)


def _flags(plugin: Plugin) -> tuple[str, ...]:
    """Compiler flags; compilers are shy of 512-bit vectors unless told."""
    if plugin.device == "cuda":
        return CUDA_FLAGS
    return (*FLAGS, "-mprefer-vector-width=512") if platform.machine() in ("x86_64", "AMD64") else FLAGS


def _target(plugin: Plugin) -> str:
    """What a library is compiled for: this processor as a key, or architectures as in `8.0_9.0+PTX`; empty if none."""
    return _graphics_cards() if plugin.device == "cuda" else _digest(_processor())


def _graphics_cards() -> str:
    """Capabilities of the cards that are here; without any, those that $TORCH_CUDA_ARCH_LIST names."""
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return "_".join(f"{major}.{minor}" for major, minor in sorted(found))
    named = re.findall(r"\d+\.\d[af]?(?:\+PTX)?", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    return "_".join(sorted(named))


def _covers(archs: str, wanted: str) -> bool:
    """Whether code for `archs` runs on every card of `wanted`: same generation and no newer, or PTX and no newer."""

    def number(arch: str) -> tuple[int, int]:
        major, minor = re.match(r"(\d+)\.(\d)", arch).groups()  # type: ignore[union-attr]
        return int(major), int(minor)

    def runs(arch: str, card: tuple[int, int]) -> bool:
        have = number(arch)
        return arch.endswith("+PTX") and have <= card or have[0] == card[0] and have <= card

    return all(any(runs(arch, number(card)) for arch in archs.split("_")) for card in wanted.split("_"))


def _arch_list(target: str, tools: Tools) -> list[str]:
    """`target` as the toolkit can serve it: for cards that are newer than the toolkit, PTX of the newest it knows."""
    nvcc = str(Path(str(tools.cuda_home)) / "bin" / "nvcc")
    try:
        done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, timeout=60)
        known = [(int(n) // 10, int(n) % 10) for n in re.findall(r"compute_(\d+)\b", done.stdout)]
    except (OSError, subprocess.SubprocessError):
        known = []
    out = []
    for arch in target.split("_"):
        major, minor = re.match(r"(\d+)\.(\d)", arch).groups()  # type: ignore[union-attr]
        if known and (int(major), int(minor)) < min(known):
            raise NoToolsError(f"{nvcc} no longer compiles for capability {arch}; use an older toolkit")
        is_newer = bool(known) and (int(major), int(minor)) > max(known)
        out.append(f"{max(known)[0]}.{max(known)[1]}+PTX" if is_newer else arch)
    return sorted(set(out))


@functools.lru_cache(maxsize=8)
def _version(program: str) -> str:
    """What `program --version` says, in one line."""
    try:
        done = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as e:
        raise NoToolsError(f"{program} --version fails: {e}") from None
    lines = done.stdout.strip().splitlines()
    return " ".join(lines[-2:] if "nvcc" in Path(program).name else lines[:1])


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    """Architecture and abilities of this processor: a library made for another may die of an illegal instruction."""
    lines = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        told = ("model name", "model", "flags", "Features")
        lines = [line for line in text.splitlines() if line.split("\t")[0].strip() in told]
    return "\n".join([platform.machine(), *sorted(lines)])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _is_private(folder: Path) -> bool:
    """Whether a folder is this user's own, and nobody else can put anything there."""
    try:
        info = folder.lstat()
    except OSError:
        return False
    is_own = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()
    return is_own and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


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
