"""The loader of CUDA operators without a GPU: pretended card and compilers, real ninja and cpp_extension.

The slow test has the real compilers, too; pretended are only the libraries of torch that a CPU build lacks.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from test_custom_ops import calls, compiler

from torch_utils import custom_ops, op_build

CUDA = op_build.PLUGINS["cuda"]
NUM_CU = sum(source.endswith(".cu") for source in CUDA.sources)
RELEASE = "Cuda compilation tools, release {release}, V{release}.88\nBuild cuda_{release}.r{release}/compiler.1_0"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="compiled operators are made on Linux only")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path) -> None:
    """One card of capability 9.0, torch for CUDA 13.0, an empty cache, a C++ compiler that makes nothing sensible."""
    monkeypatch.setattr(custom_ops, "_outcomes", {})
    monkeypatch.setattr(op_build, "verbosity", "none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("STYLEGAN_ROOTED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "auto")
    for variable in ("CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo rubbish > "$out"'))
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "toolkit")))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cards(monkeypatch, (9, 0))


def cards(monkeypatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capabilities[i])


def toolkit(home: Path, release: str = "13.0", work: str = 'echo rubbish > "$out"') -> Path:
    """A toolkit whose nvcc writes down its arguments and does `work`."""
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").write_text("")
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && {{ echo "{RELEASE.format(release=release)}"; exit 0; }}
[ "$1" = --list-gpu-arch ] && {{ echo compute_75; echo compute_90; echo compute_100; exit 0; }}
echo "$@" >> "{nvcc}.args"; echo x >> "{nvcc}.calls"
while [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done
{work}
"""
    )
    nvcc.chmod(0o755)
    return home


def expect_torch_calls(match: str, *, is_broken: bool) -> str:
    """It is told once, as a warning if something is broken, and nobody tries again."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert custom_ops.selected("cuda") == custom_ops.selected("cuda") == "ref"
    assert len(seen) == int(is_broken), [str(w.message) for w in seen]
    assert match in custom_ops.problem("cuda"), custom_ops.problem("cuda")
    assert "torch calls" in custom_ops.describe("cuda")
    return custom_ops.problem("cuda")


def expect_not_tried(match: str, tmp_path) -> None:
    expect_torch_calls(match, is_broken=False)
    assert calls(tmp_path / "cxx") == 0 and not (tmp_path / "cache").exists()


def test_without_a_card(monkeypatch, tmp_path) -> None:
    cards(monkeypatch)
    expect_not_tried("no CUDA graphics card", tmp_path)


def test_without_a_toolkit(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(os, "access", lambda path, mode: "nvcc" not in str(path))
    expect_not_tried("nvcc is not on the PATH", tmp_path)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_variable_that_names_something_else(monkeypatch, tmp_path, variable) -> None:
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv(variable, str(tmp_path))
    expect_not_tried(f"{variable} is {tmp_path}", tmp_path)


def test_toolkit_of_another_generation_than_torch(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    expect_not_tried("torch was built for CUDA 12.8", tmp_path)
    assert "of CUDA 13" in custom_ops.problem("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.2")  # a minor version makes no difference
    assert op_build.find_tools(CUDA).cuda_home == str(tmp_path / "toolkit")


def test_card_older_than_the_toolkit_serves(monkeypatch, tmp_path) -> None:
    cards(monkeypatch, (7, 0))
    expect_torch_calls("no longer compiles for capability 7.0", is_broken=False)
    assert calls(tmp_path / "toolkit/bin/nvcc") == 0


def test_toolkit_is_found_by_its_nvcc_on_the_path(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{tmp_path / 'toolkit' / 'bin'}:{os.environ['PATH']}")
    assert op_build.find_cuda() == tmp_path / "toolkit"


def test_broken_nvcc_is_quoted(monkeypatch, tmp_path) -> None:
    home = toolkit(tmp_path / "broken", work="echo '#error -- unsupported GNU version!' >&2; exit 2")
    monkeypatch.setenv("CUDA_HOME", str(home))
    message = expect_torch_calls("unsupported GNU version", is_broken=True)
    assert "failed with status 1" in message and not list((tmp_path / "cache").rglob("build-*"))


def test_library_is_built_by_ninja_kept_and_found(monkeypatch, tmp_path) -> None:
    """A library that loads, in place of the real one: one of Python's own."""
    import _ctypes

    monkeypatch.setenv("CXX", compiler(tmp_path / "link", f'cp "{_ctypes.__file__}" "$out"'))
    cards(monkeypatch, (9, 0), (12, 0), (9, 0))
    assert custom_ops.selected("cuda") == "native" and custom_ops.describe("cuda") == "auto: compiled operators"
    nvcc = tmp_path / "toolkit/bin/nvcc"
    assert calls(nvcc) == NUM_CU
    for line in Path(f"{nvcc}.args").read_text().splitlines():
        assert "-gencode=arch=compute_90,code=sm_90" in line and "-ccbin" in line and str(tmp_path / "link") in line
        assert "-gencode=arch=compute_100,code=compute_100" in line and "compute_120" not in line  # newer: PTX
    path = custom_ops._outcomes["cuda"].path
    assert path is not None and [p.name for p in sorted(path.parent.iterdir())] == ["cuda.so", "lock"]
    made = calls(tmp_path / "link")
    assert op_build.find(CUDA) == op_build.build(CUDA) == path and calls(tmp_path / "link") == made
    shutil.rmtree(tmp_path / "toolkit")  # a machine that has the library, but not what made it
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert op_build.build(CUDA) == path
    cards(monkeypatch, (8, 9))
    assert op_build.find(CUDA) is None  # it isn't for that card


def test_compiled_ahead_for_cards_elsewhere(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    cards(monkeypatch)
    kept = op_build.library_path(CUDA)
    assert "-8.0_9.0+PTX-" in kept.parent.name
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    kept.chmod(0o700)
    assert op_build.find(CUDA) == kept
    for card, fits in (((8, 0), True), ((8, 6), True), ((9, 0), True), ((12, 0), True), ((7, 5), False)):
        cards(monkeypatch, card)
        assert (op_build.find(CUDA) == kept) is fits, card
    cards(monkeypatch, (8, 0), (7, 5))
    assert op_build.find(CUDA) is None


def test_key_knows_both_versions_of_cuda(monkeypatch, tmp_path) -> None:
    keys = {op_build.library_path(CUDA)}
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "newer", "13.1")))
    keys.add(op_build.library_path(CUDA))
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    keys.add(op_build.library_path(CUDA))
    cards(monkeypatch, (8, 6))
    keys.add(op_build.library_path(CUDA))
    assert len(keys) == 4


def test_command_builds_what_the_machine_can_use(monkeypatch, tmp_path) -> None:
    from stylegan_rooted import ops

    cards(monkeypatch)
    built = ops.build()
    assert len(built.paths) == 1 and "TORCH_CUDA_ARCH_LIST" in built.problems["cuda"]
    record = ops.info()["libraries"]["cuda"]
    assert record["built"] is False and "no CUDA graphics card" in record["problem"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    record = ops.info()["libraries"]["cuda"]
    assert record["cuda_home"] == str(tmp_path / "toolkit") and record["problem"] is None
    with pytest.raises(ValueError, match="cuda|ELF|failed"):
        ops.build()  # what the pretended compiler leaves does not load


LOADED = """
import sys, torch
from torch_utils.ops import bias_act, upfirdn2d
torch.ops.load_library(sys.argv[1])
for module, name in ((bias_act, "bias_act"), (upfirdn2d, "upfirdn2d")):
    op = module._native()  # torch compares the schema with the C++ function's signature
    for key in ("CUDA", "CPU"):
        print(name, key, torch._C._dispatch_has_kernel_for_dispatch_key(f"stylegan_rooted::{name}", key))
"""


@pytest.mark.slow
def test_the_real_sources_by_the_real_compilers(monkeypatch, tmp_path) -> None:
    """From sources to a library that loads and registers what Python declares."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("no nvcc or no g++")
    monkeypatch.delenv("CXX")
    monkeypatch.delenv("CUDA_HOME")
    home = op_build.find_cuda()
    release = re.search(
        r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    assert release is not None
    monkeypatch.setattr(torch.version, "cuda", release[1])
    stubs(home, tmp_path / "stubs")
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path / "stubs"))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path / 'stubs'}:{home / 'lib64'}")
    cards(monkeypatch, (7, 5), (9, 0))
    path = op_build.build(CUDA)
    assert "-7.5_9.0-" in path.parent.name and path.stat().st_size < 20 * 2**20
    command = [sys.executable, "-c", LOADED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=op_build.FOLDER.parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [
        "bias_act CUDA True", "bias_act CPU False", "upfirdn2d CUDA True", "upfirdn2d CPU False", ""
    ]  # fmt: skip


def stubs(home: Path, folder: Path) -> None:
    """libc10_cuda and libtorch_cuda with the functions that the binding calls, which do nothing."""
    from torch.utils import cpp_extension

    folder.mkdir()
    includes = [f"-isystem{p}" for p in [*cpp_extension.include_paths(), home / "include"]]
    flags = ["-std=c++20", "-fPIC", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    source, obj = op_build.FOLDER / "cuda_ops.cpp", folder / "cuda_ops.o"
    subprocess.run(["g++", *flags, *includes, "-c", str(source), "-o", str(obj)], check=True)
    listed = subprocess.run(["nm", "-u", str(obj)], capture_output=True, text=True, check=True).stdout
    names = sorted(set(re.findall(r"U (_ZNK?3c104cuda\w+)", listed)))
    assert any("getCurrentCUDAStream" in name for name in names)
    (folder / "stubs.c").write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    (folder / "nothing.c").write_text("")
    for library, text in (("c10_cuda", "stubs.c"), ("torch_cuda", "nothing.c")):
        command = ["gcc", "-shared", "-fPIC", str(folder / text), "-o", str(folder / f"lib{library}.so")]
        subprocess.run(command, check=True)
