"""The whole way of a CUDA operator without a GPU: gate, schema, gradients, checks, binding, over emulated kernels.

cuda_ops.cpp is built over tests/cuda_host_emulation.cpp so that it serves CPU tensors; a pytest of its own then runs
the operators' suites with it in place of the CPU library (conftest.emulate_cuda), and the tests here that need it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from test_cuda_sources import (
    CODES,
    LAYOUTS,
    OPS,
    ROUNDING,
    grid_values,
    image,
    is_channels_last,
    reference_bias_act,
    reference_upfirdn2d,
    taps,
    torch_includes,
)

from torch_utils.ops import bias_act, upfirdn2d

TESTS = Path(__file__).resolve().parent
VARIABLE = "STYLEGAN_ROOTED_EMULATED_CUDA"
SUITES = ["cuda_binding", "native_ops", "ops_bias_act", "ops_upfirdn2d", "ops_conv2d_resample", "networks", "gan_loss"]
emulated = pytest.mark.skipif(VARIABLE not in os.environ, reason="runs inside the slow test of this file")


@pytest.mark.slow
@pytest.mark.skipif(VARIABLE in os.environ, reason="this is the inner run")
def test_the_operators_pass_over_the_emulated_kernels(tmp_path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = tmp_path / "binding.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-unused-function", "-Werror", "-shared", "-fPIC"]
    flags += ["-DSGR_HOST_EMULATION", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f"-isystem{p}" for p in torch_includes()]
    sources = [str(OPS / "cuda_ops.cpp"), str(TESTS / "cuda_host_emulation.cpp")]
    lib = Path(torch.__file__).parent / "lib"
    links = [f"-L{lib}", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{lib}"]
    subprocess.run([compiler, *flags, *sources, *links, "-o", str(library)], check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(str(TESTS / f"test_{suite}.py") for suite in SUITES)]
    env = {**os.environ, VARIABLE: str(library), "STYLEGAN_ROOTED_OPS": "auto"}
    done = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    print(done.stdout[-2500:])  # noqa: T201
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 250


@emulated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_upfirdn2d(dtype, layout) -> None:
    for f, up, down, pads in [
        (taps(4, 4), (2, 2), (1, 1), (2, 1, 2, 1)),
        (taps(12), (2, 2), (1, 1), (6, 5, 6, 5)),
        (taps(12), (1, 1), (2, 2), (6, 5, 6, 5)),
        (taps(24)[::2], (3, 1), (1, 2), (6, 5, 4, 7)),
        (taps(5), (2, 3), (2, 1), (3, 1, 2, 4)),
        (taps(6, 3).t(), (1, 1), (1, 1), (3, 3, 3, 3)),
        (taps(1), (1, 1), (1, 1), (0, 0, 0, 0)),
    ]:
        x = image(2, 17, 9, 11, dtype, layout)
        for given in (x, x[:, 1:16, 2:, ::2]):
            y = upfirdn2d._native()(given, f, *up, *down, *pads, True, 1.5)
            assert y.dtype == dtype and is_channels_last(y) == is_channels_last(given)
            expected = reference_upfirdn2d(given, f, up, down, pads, True, 1.5)
            helpers.assert_close(y, expected, ROUNDING[dtype], f"{dtype} {tuple(f.shape)}")
    assert upfirdn2d._native()(x[:0], taps(4, 4), 1, 1, 1, 1, 2, 1, 2, 1, False, 1.0).shape == (0, 17, 9, 11)


@emulated
def test_upfirdn2d_refuses() -> None:
    x, f = image(1, 2, 9, 11), taps(4, 4)
    for args, message in [
        ((x[0], f, 1, 1, 1, 1, 0, 0, 0, 0), "N, C, H, W"),
        ((x, f.double(), 1, 1, 1, 1, 0, 0, 0, 0), "float32"),
        ((x, taps(40), 1, 1, 1, 1, 0, 0, 0, 0), "1 to 32 taps"),
        ((x, taps(3, 3), 1, 1, 1, 1, 0, -30, 0, 0), "smaller than the filter"),
        ((x.int(), f, 1, 1, 1, 1, 0, 0, 0, 0), "wanted float32"),
        ((x, f, 2**40, 1, 1, 1, 0, 0, 0, 0), "out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            upfirdn2d._native()(*args, False, 1.0)


@emulated
def test_bias_act() -> None:
    x = grid_values((2, 6, 5, 4), torch.float32)
    b = grid_values((6,), torch.float32)
    variants = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(0, 3), x[..., ::2], x[:, :, :0]]
    for given in variants:
        bias = b if given.shape[1] == 6 else b[: given.shape[1]]
        grad = torch.ones(given.shape) * 0.5
        y = bias_act._native()(given, bias, None, None, None, 0, 1, 3, 0.2, 1.5, 2.0)
        dx = bias_act._native()(grad, bias, given, None, None, 1, 1, 3, 0.2, 1.5, 2.0)
        expected = reference_bias_act(given, bias, grad, grad, dim=1, act="lrelu", alpha=0.2, gain=1.5, clamp=2.0)
        helpers.assert_close(y, expected[0], 2e-6, "y")
        helpers.assert_close(dx, expected[1], 2e-6, "dx")
        assert is_channels_last(y) == is_channels_last(given) and (is_channels_last(y) or y.is_contiguous())
    assert y.shape == (2, 6, 0, 4)


@emulated
def test_bias_act_refuses() -> None:
    x, b, dy = grid_values((2, 6, 5, 4), torch.float32), grid_values((6,), torch.float32), torch.ones(2, 6, 5, 4)
    for args, message in [
        ((x, b[:2], None, None, None, 0, 1, 3, 0.2, 1.0, -1.0), "one value for each index"),
        ((x, b.double(), None, None, None, 0, 1, 3, 0.2, 1.0, -1.0), "but x is"),
        ((x, b, None, None, None, 0, 4, 3, 0.2, 1.0, -1.0), "wanted 0 to 3"),
        ((x, b, None, None, None, 1, 1, 3, 0.2, 1.0, -1.0), "xref or yref"),
        ((x, b, dy[:1], None, None, 1, 1, 3, 0.2, 1.0, -1.0), "xref has shape"),
        ((x, b, None, None, None, 0, 1, 10, 0.2, 1.0, -1.0), "activation is unknown"),
        ((x, b, x, None, None, 2, 1, 9, 0.2, 1.0, -1.0), "needs dy"),
    ]:
        with pytest.raises(ValueError, match=message):
            bias_act._native()(*args)


@emulated
@pytest.mark.parametrize("act", bias_act.CURVED_ACTS)
def test_curved_activations(act, monkeypatch) -> None:
    """By the operator to second order, in every type; to third order refused with the way out."""
    spec = bias_act.activation_funcs[act]
    settings = (1, spec.cuda_idx, 0.0, float(spec.def_gain), 0.9)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 2, generator=rng, dtype=torch.float64).requires_grad_()
    b = torch.randn(3, generator=rng, dtype=torch.float64).requires_grad_()
    assert type(bias_act.bias_act(x, b, act=act).grad_fn).__name__.startswith("GeneratedBackward")
    for given in (x, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()):
        torch.library.opcheck(bias_act._native(), (given, b, None, None, None, 0, *settings))
        torch.library.opcheck(bias_act._native(), (given, b, given, None, None, 1, *settings))
    y = bias_act.bias_act(x, b, act=act)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(ddx.square().sum(), x)
