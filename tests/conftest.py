"""Shared fixtures: where the golden numbers lie, and one thread per test process for repeatable sums."""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

# One thread, also in child processes: repeatable sums, and no waiting for a core that another process holds.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

import helpers  # noqa: E402
import runs  # noqa: E402

from torch_utils import custom_ops  # noqa: E402

# Where the suite runs in the background of a shell script SIGINT is ignored, also in children; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: what one run passes, the next must not fail. Fuzzing has scripts of its own.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def compiled_operators() -> None:
    """Compiled once per machine, not once per test with a cache folder of its own; not at all without a compiler."""
    from torch_utils import custom_ops

    if "STYLEGAN_ROOTED_EMULATED_CUDA" in os.environ:
        emulate_cuda(Path(os.environ["STYLEGAN_ROOTED_EMULATED_CUDA"]))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        custom_ops.available()


def emulate_cuda(library: Path) -> None:
    """Let the CUDA operators, built for the host by test_cuda_sources.py, serve CPU tensors in place of the CPU's."""
    import torch

    from torch_utils import custom_ops
    from torch_utils.ops import bias_act, conv2d_cpu, epilogue, upfirdn2d

    torch.ops.load_library(str(library))
    custom_ops._outcomes["cpu"] = custom_ops.Outcome(library, "")
    for table in (bias_act.NATIVE_ACTS, bias_act.NATIVE_DTYPES, bias_act.NATIVE_MIN_NUMEL, upfirdn2d.NATIVE_DTYPES):
        table["cpu"] = table["cuda"]  # type: ignore[index]
    upfirdn2d.NATIVE_MAX_PLANES = 10**9
    conv2d_cpu.pays, epilogue.NATIVE_ACTS = lambda *_: False, ()  # the CPU's own, which are not there now


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Twelve random 8x8 RGB images of two labelled classes; not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    return runs.write_pictures(folder)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with the full set of golden numbers; tests that need it are skipped where it is absent."""
    path = Path(os.environ.get("STYLEGAN_ROOTED_GOLDENS", ROOT.parent / "shared" / "goldens"))
    if not path.is_dir():
        pytest.skip(
            "the full golden numbers are not here (set STYLEGAN_ROOTED_GOLDENS); tests/data still covers a part"
        )
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The small copy of the most telling goldens that travels with the repository."""
    return ROOT / "tests" / "data"


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the worst relative error seen per group of comparisons."""
    rows = helpers.worst_errors()
    if rows:
        terminalreporter.section("numeric agreement (worst relative error per group)")
        for group, (count, rel, bound, what) in rows.items():
            terminalreporter.write_line(
                f"{group:<46} {count:>6} checks  worst {rel:.2e} of {bound:.0e} allowed at {what}"
            )


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    """A test that leaves more threads to the next changes its sums, and hangs those that fork: it fails, by name."""
    import torch

    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before, f"this test leaves {after} threads behind, there were {before}"


@pytest.fixture(params=["torch", "native"])
def ops(request, monkeypatch) -> str:
    """Made of torch calls, and compiled where there is a compiler."""
    monkeypatch.setenv(custom_ops.VARIABLE, request.param)
    if request.param == "native" and not custom_ops.available():
        pytest.skip("no compiled operators here")
    return request.param
