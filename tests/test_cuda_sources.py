"""The CUDA sources without a GPU: their device code runs on the host, thread by thread, against the reference.

tests/cuda_host_emulation.cpp is what runs it; it also checks every access. The slow tests run nvcc.
"""

import ctypes
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from torch_utils.ops import bias_act as bias_act_ops
from torch_utils.ops import upfirdn2d as upfirdn2d_ops

TESTS = Path(__file__).resolve().parent
OPS = TESTS.parent / "torch_utils" / "ops"
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# Half a unit in the last place of the result, as one rounding leaves it, and float32 sums in another order.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 1e-13}
ACTS = list(bias_act_ops.activation_funcs)
LAYOUTS = ["planes", "channels_last"]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    """The emulation as a shared library; without optimisation, as building it costs more than running it."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    command = [compiler, "-std=c++17", "-O0", "-Wall", "-Wno-unused-function", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, str(TESTS / "cuda_host_emulation.cpp"), "-o", str(library)], check=True)
    lib = ctypes.CDLL(str(library))
    pointer, i32, i64, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
    lib.emulate_bias_act.argtypes = [pointer] * 6 + [i32, i64, i64, i64, i32, i32, real, real, real, i64, i64, i32]
    lib.emulate_upfirdn2d.argtypes = [pointer] * 4 + [i32, i32] + [pointer] * 4 + [real, i32, pointer, i64, i64, i32]
    for name in ("emulate_bias_act", "emulate_upfirdn2d", "emulated_kernel"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.emulated_blocks.restype = i64
    lib.emulated_narrow.argtypes, lib.emulated_narrow.restype = [ctypes.c_float, i32], ctypes.c_uint16
    lib.emulated_widen.argtypes, lib.emulated_widen.restype = [ctypes.c_uint16, i32], ctypes.c_float
    lib.emulated_quotient.argtypes, lib.emulated_quotient.restype = [ctypes.c_uint32] * 2, ctypes.c_uint32
    return lib


def address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def raise_problem(problem: bytes | None) -> None:
    if problem:
        raise RuntimeError(problem.decode())


def kernel_name(lib) -> str:
    """Such as Tile<Half, 2, 1, true, 16, 16, 16, 8>."""
    found = re.search(r"K = sgr::(.*?>)[;\]]", lib.emulated_kernel().decode())
    assert found is not None, lib.emulated_kernel()
    return found[1].replace("sgr::", "")


def emulate_upfirdn2d(
    lib, x, f, up=(1, 1), down=(1, 1), pads=(0, 0, 0, 0), flip=False, gain=1.0, out_dtype=None, is_backward=False
):
    """Run one kernel as the binding would; a 1-D filter goes through the fused kernel for both axes."""
    f = f if f.ndim == 2 else f[None, :]
    is_separable = f.shape[0] == 1 and f.shape[1] == 12
    fh, fw = (f.shape[1], f.shape[1]) if is_separable else f.shape
    ints = (ctypes.c_int64 * 15)(*x.shape, fw, fh, *up, *down, *pads, int(flip))
    strides = ctypes.c_int64 * 4
    f_strides = (ctypes.c_int64 * 2)(*f.stride())
    size = (ctypes.c_int64 * 2)()
    fx, fy = address(f), address(f) if is_separable else None
    out_dtype = out_dtype or x.dtype
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    rest = (float(gain), int(layout == torch.channels_last), size)
    codes = CODES[x.dtype], CODES[out_dtype]
    raise_problem(lib.emulate_upfirdn2d(address(x), fx, fy, None, *codes, ints, None, None, f_strides, *rest, 0, 0, 0))
    y = torch.empty([*x.shape[:2], *size], dtype=out_dtype, memory_format=layout)
    raise_problem(
        lib.emulate_upfirdn2d(
            address(x), fx, fy, address(y), *codes, ints, strides(*x.stride()), strides(*y.stride()), f_strides,
            *rest, 0, 0, int(is_backward),
        )
    )  # fmt: skip
    return y


def is_channels_last(x: torch.Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def reference_upfirdn2d(x, f, up, down, pads, flip, gain):
    """In float64, from the numbers as they are stored; taps times gain are float32, as always."""
    return upfirdn2d_ops.upfirdn2d(
        x.double(), f, list(up), list(down), list(pads), flip_filter=flip, gain=gain, impl="ref"
    )


def check_upfirdn2d(lib, x, f, up=(1, 1), down=(1, 1), pads=(0, 0, 0, 0), flip=False, gain=1.0, kernel=None) -> None:
    expected = reference_upfirdn2d(x, f, up, down, pads, flip, gain)
    what = f"{tuple(x.shape)} {x.dtype} filter {tuple(f.shape)} up {up} down {down} pads {pads}"
    actual = emulate_upfirdn2d(lib, x, f, up, down, pads, flip, gain)
    assert kernel is None or kernel_name(lib).startswith(kernel), (kernel_name(lib), what)
    assert actual.dtype == x.dtype
    helpers.assert_close(actual, expected, ROUNDING[x.dtype], what)
    again = emulate_upfirdn2d(lib, x, f, up, down, pads, flip, gain, is_backward=True)
    assert torch.equal(actual, again), f"threads depend on their order: {what}"


def image(n, c, h, w, dtype=torch.float32, layout="planes") -> torch.Tensor:
    x = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(h * 100 + w)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def taps(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


FACTORS = {"same": ((1, 1), (1, 1)), "up2": ((2, 2), (1, 1)), "down2": ((1, 1), (2, 2))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_numbers(emulator, dtype) -> None:
    rng = np.random.default_rng(0)
    floats = rng.standard_normal(1500) * 10.0 ** rng.integers(-9, 6, 1500)
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 2**-14, 2**-24, 2**-25, 3 * 2**-26, 1 + 2**-11]
    floats = torch.tensor([*floats, *edges], dtype=torch.float32)
    narrowed = floats.to(dtype)
    code = CODES[dtype]
    for value, wanted in zip(floats.tolist(), narrowed):
        got = torch.tensor(emulator.emulated_narrow(value, code)).to(torch.uint16).view(dtype)
        assert torch.equal(got, wanted) or (got.isnan() and wanted.isnan()), value
        back = emulator.emulated_widen(wanted.view(torch.int16).item() & 0xFFFF, code)
        assert back == wanted.float().item() or np.isnan(back)


def test_division_by_multiplication(emulator) -> None:
    rng = np.random.default_rng(0)
    divisors = [1, 2, 3, 5, 7, 16, 17, 641, 65535, 65536, 2**30 + 1, 2**31 - 1, 2**31, *rng.integers(1, 2**31, 300)]
    for d in map(int, divisors):
        numbers = {0, 1, d - 1, d, d + 1, 2 * d - 1, 2**31 - 1, (2**31 - 1) // d * d, (2**31 - 1) // d * d - 1}
        for n in (k for k in numbers if 0 <= k < 2**31):
            assert emulator.emulated_quotient(n, d) == n // d, (n, d)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("size", [(3, 4), (9, 13), (5, 35), (2, 72)], ids=str)
def test_tiles_of_every_size(emulator, size, factor, layout) -> None:
    """Odd sizes, borders on every side, crops, several tiles; each tile shape of each layout."""
    up, down = FACTORS[factor]
    channels = 16 if layout == "channels_last" else 3
    f = taps(4, 4)
    for pads in [(2, 1, 2, 1), (1, 2, -1, 4), (3, 3, 3, 3), (5, -2, 0, 1)]:
        x = image(2, channels, *size, layout=layout)
        if min(size[1] * up[0] + pads[0] + pads[1], size[0] * up[1] + pads[2] + pads[3]) < 4:
            continue
        check_upfirdn2d(emulator, x, f, up, down, pads, flip=pads[0] == 1, gain=1.7, kernel="Tile<float")


def test_every_tile_shape_is_reached(emulator) -> None:
    """By image size; more planes and channels than a tile holds, and a channel count that fills none."""
    seen = set()
    for up, down in FACTORS.values():
        for layout, channels in (("planes", 5), ("channels_last", 20)):
            for size in (4, 12, 18):
                h = size * down[0] // up[0]
                x = image(2, channels, h, h + 1, layout=layout)
                check_upfirdn2d(emulator, x, taps(4, 4), up, down, (2, 1, 2, 1), gain=up[0] ** 2, kernel="Tile")
                seen.add(kernel_name(emulator))
    source = (OPS / "upfirdn2d_kernel.h").read_text()
    shapes = set(re.findall(r"upfirdn2d_launch_tile<T, (\d, \d, \w+, \d+, \d+, \d+, \d+)>", source))
    assert seen == {f"Tile<float, {shape}>" for shape in shapes}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_sixteen_bits(emulator, dtype, layout) -> None:
    for up, down in FACTORS.values():
        x = image(1, 18, 8, 9, dtype, layout)
        check_upfirdn2d(emulator, x, taps(4, 4), up, down, (2, 1, 1, 2), gain=2.0, kernel="Tile")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("factor", FACTORS)
def test_separable_tiles(emulator, factor, dtype) -> None:
    up, down = FACTORS[factor]
    for layout, size, pads in [
        ("planes", (17, 23), (6, 5, 6, 5)),
        ("planes", (37, 3), (11, 6, -3, 2)),
        ("channels_last", (13, 12), (0, 1, 5, 0)),
    ]:
        x = image(1, 2, *size, dtype, layout)
        check_upfirdn2d(emulator, x, taps(12), up, down, pads, pads[0] == 0, 1.3, kernel="SeparableTile")


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_general_kernel(emulator, dtype, layout) -> None:
    for shape, up, down, pads in [
        ((1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
        ((1, 1), (3, 2), (2, 3), (1, 0, -1, 2)),
        ((3, 5), (2, 3), (3, 1), (4, 1, 2, 3)),
        ((4, 4), (2, 1), (1, 2), (2, 1, 3, 1)),
        ((7, 2), (4, 4), (2, 2), (-5, 3, 2, -4)),
        ((32, 32), (1, 2), (5, 1), (16, 15, 20, 20)),
        ((1, 32), (5, 1), (1, 1), (9, 9, 0, 0)),
    ]:
        x = image(2, 3, 5, 7, dtype, layout)
        check_upfirdn2d(emulator, x, taps(*shape), up, down, pads, shape[0] == 3, -0.7, kernel="Resample")


def test_sixteen_bit_images_have_a_float32_middle(emulator) -> None:
    """The two passes of other separable filters."""
    f = taps(7)
    for dtype in (torch.float16, torch.bfloat16):
        x = image(1, 2, 9, 6, dtype)
        half = emulate_upfirdn2d(emulator, x, f[None, :], (2, 1), (1, 1), (3, 3, 0, 0), out_dtype=torch.float32)
        y = emulate_upfirdn2d(emulator, half, f[:, None], (1, 2), (1, 1), (0, 0, 3, 3), out_dtype=dtype)
        expected = reference_upfirdn2d(x, f, (2, 2), (1, 1), (3, 3, 3, 3), False, 1.0)
        helpers.assert_close(y, expected, ROUNDING[dtype], str(dtype))


def test_views_are_read_in_place(emulator) -> None:
    """Gaps, transposed axes, odd offsets, repeated planes; and a filter with strides of its own."""
    big = torch.randn(3, 24, 20, 22, generator=torch.Generator().manual_seed(0))
    base = taps(8, 12)
    for x in [
        big[::2, 1:20, 3:17, 1:21],
        big[:, :, ::3, ::2],
        big.transpose(2, 3),
        big[:1, :1].expand(2, 3, 20, 22),
        big.contiguous(memory_format=torch.channels_last)[:, 1:18, 2:9, 3:12],
        big.permute(0, 2, 3, 1)[:, :3],
    ]:
        check_upfirdn2d(emulator, x, base[::2, ::3], (2, 2), (1, 1), (2, 1, 2, 1), kernel="Tile")
        check_upfirdn2d(emulator, x, base[1:4, :2].t(), (1, 1), (3, 2), (2, 1, 2, 1), kernel="Resample")
    check_upfirdn2d(emulator, big[:1, 3:5, 1:9, 2:7], taps(36)[::3], (2, 2), (1, 1), (9, 9, 9, 9), kernel="Separable")


def test_adjoint_is_a_resampling(emulator) -> None:
    """<up(x), y> = <x, adjoint(y)> with the padding that the autograd formula gives, through the kernels."""
    for f, up, down, pads in [
        (taps(4, 4), (2, 2), (1, 1), (2, 1, 2, 1)),
        (taps(4, 4), (1, 1), (2, 2), (1, 1, 1, 1)),
        (taps(4, 4), (1, 1), (1, 1), (1, 2, 3, -1)),
        (taps(12), (2, 2), (1, 1), (6, 5, 6, 5)),
        (taps(3, 5), (3, 2), (2, 3), (4, 2, 1, 3)),
    ]:
        x = image(1, 2, 6, 8)
        fw, fh = f.shape[-1], f.shape[0]
        y = emulate_upfirdn2d(emulator, x, f, up, down, pads, gain=1.5)
        (h, w), (h_out, w_out) = x.shape[2:], y.shape[2:]
        adjoint_x = (fw - pads[0] - 1, w * up[0] - w_out * down[0] + pads[0] - up[0] + 1)
        adjoint_y = (fh - pads[2] - 1, h * up[1] - h_out * down[1] + pads[2] - up[1] + 1)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        dx = emulate_upfirdn2d(emulator, dy, f, down, up, (*adjoint_x, *adjoint_y), flip=True, gain=1.5)
        assert dx.shape == x.shape
        left, right = (y.double() * dy).sum(), (x.double() * dx).sum()
        assert abs(left - right) <= 1e-5 * (y.double().norm() * dy.double().norm())


def sparse_tensor(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that exists once it is written: as large as one likes."""
    noreserve = 0x4000  # MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
    try:
        area = mmap.mmap(-1, num_elements * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"no sparse memory here: {error}")
    return torch.frombuffer(area, dtype=dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="sparse memory as Linux gives it")
@pytest.mark.parametrize("axis", range(4))
def test_strides_beyond_32_bits(emulator, axis) -> None:
    small = image(3, 3, 6, 8)
    step = 2**31 + 8
    strides = [3 * 6 * 8 * 4, 6 * 8 * 4, 8 * 4, 4]
    strides[axis] = step
    flat = sparse_tensor(step * 8, torch.float32)
    x = flat.as_strided(small.shape, strides)
    x.copy_(small)
    for f, up, down in [(taps(4, 4), (2, 2), (1, 1)), (taps(3, 2), (1, 1), (2, 1)), (taps(12), (1, 1), (2, 2))]:
        y = emulate_upfirdn2d(emulator, x, f, up, down, (6, 5, 6, 5))
        helpers.assert_close(y, reference_upfirdn2d(small, f, up, down, (6, 5, 6, 5), False, 1.0), 2e-6, str(axis))


@pytest.mark.skipif(sys.platform != "linux", reason="sparse memory as Linux gives it")
@pytest.mark.parametrize("kind", ["tile", "channels", "separable", "general", "many planes"])
def test_last_blocks_of_a_huge_image(emulator, kind) -> None:
    """More than 2^32 pixels, or 2^31 planes: the last blocks alone are run, and the last corner compared."""
    channels_last = kind == "channels"
    n, c, h, w = (2050, 16, 256, 520) if channels_last else (1025, 64, 256, 260)
    if kind == "many planes":
        n, c, h, w = 2**29, 12, 2, 2
    x = sparse_tensor(n * c * h * w, torch.float16)
    y = sparse_tensor(n * c * h * w, torch.float16)
    strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    x, y = x.as_strided((n, c, h, w), strides), y.as_strided((n, c, h, w), strides)
    size = min(h, 70)
    corner = image(1, 2, size, size, torch.float16)
    x[-1:, -2:, -size:, -size:] = corner
    f = {"separable": taps(12), "general": taps(3, 3)}.get(kind, taps(4, 4))
    pad0, pad1 = f.shape[-1] // 2, (f.shape[-1] - 1) // 2
    two_d = f if f.ndim == 2 else f[None]
    fw = f.shape[-1]
    ints = (ctypes.c_int64 * 15)(n, c, h, w, fw, fw, 1, 1, 1, 1, pad0, pad1, pad0, pad1, 0)
    c_strides = (ctypes.c_int64 * 4)(*strides)
    blocks = -40 if kind == "general" else -1
    raise_problem(
        emulator.emulate_upfirdn2d(
            address(x), address(f), address(f) if f.ndim == 1 else None, address(y), 1, 1, ints, c_strides, c_strides,
            (ctypes.c_int64 * 2)(*two_d.stride()), 1.0, int(channels_last), (ctypes.c_int64 * 2)(), blocks, 0, 0,
        )
    )  # fmt: skip
    assert n * c * h * w > 2**32
    expected = reference_upfirdn2d(corner, f, (1, 1), (1, 1), (pad0, pad1, pad0, pad1), False, 1.0)
    helpers.assert_close(y[-1:, -1:, -2:, -2:], expected[:, -1:, -2:, -2:], 2**-10, kind)


def test_upfirdn2d_refuses(emulator) -> None:
    x = image(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="smaller than the filter"):
        emulate_upfirdn2d(emulator, x, taps(5, 5))
    with pytest.raises(RuntimeError, match="1 to 32 taps"):
        emulate_upfirdn2d(emulator, x, taps(33, 1), pads=(0, 0, 40, 40))
    with pytest.raises(RuntimeError, match="at least 1"):
        emulate_upfirdn2d(emulator, x, taps(1, 1), up=(0, 1))
    with pytest.raises(RuntimeError, match="2\\^31"):
        emulate_upfirdn2d(emulator, x, taps(1, 1), pads=(2**30, 2**30, 0, 0))


def emulate_bias_act(
    lib, x, b=None, xref=None, yref=None, dy=None, order=0, dim=1, act="linear", alpha=0.0, gain=1.0, clamp=None
):
    """Run one kernel over dense tensors of equal strides, as the binding would; forwards and backwards."""
    results = []
    for is_backward in (0, 1):
        y = torch.empty_like(x)
        assert all(t is None or t.stride() == y.stride() for t in (xref, yref, dy))
        step, num = (x.stride(dim) if x.shape[dim] > 1 else x.numel(), x.shape[dim]) if b is not None else (0, 0)
        code = bias_act_ops.activation_funcs[act].cuda_idx
        problem = lib.emulate_bias_act(
            *map(address, (x, b, xref, yref, dy, y)), CODES[x.dtype], x.numel(), step, num, code, order,
            alpha, gain, -1.0 if clamp is None else clamp, 0, 0, is_backward,
        )  # fmt: skip
        raise_problem(problem)
        results.append(y)
    assert torch.equal(*(r.nan_to_num(1234.0) for r in results)), "threads depend on their order"
    return results[0]


def reference_bias_act(x, b, dy, v, dim, act, alpha, gain, clamp):
    """Result, first derivative and what the second adds, by autograd over the reference in float64."""
    u = x.double() + (0 if b is None else b.double().reshape([-1 if i == dim else 1 for i in range(x.ndim)]))
    u.requires_grad_()
    y = bias_act_ops.bias_act(u, None, dim=dim, act=act, alpha=alpha, gain=gain, clamp=clamp, impl="ref")
    (dx,) = torch.autograd.grad(y, u, dy.double(), create_graph=True)
    second = torch.zeros_like(u)
    if dx.requires_grad:
        (grad,) = torch.autograd.grad(dx, u, v.double(), allow_unused=True)
        second = second if grad is None else grad
    return y.detach(), dx.detach(), second


def grid_values(shape, dtype) -> torch.Tensor:
    """Numbers on a coarse grid, zero among them, so that 16-bit sums are exact."""
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randint(-24, 25, shape, generator=generator) / 8).to(dtype)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_every_activation_and_derivative(emulator, act, dtype) -> None:
    for shape, layout, clamp in [((2, 5, 3, 7), "planes", None), ((3, 8, 5, 1), "channels_last", 0.7)]:
        x, b, dy, v = (grid_values(s, dtype) for s in (shape, shape[1:2], shape, (1, *shape[1:])))
        v = v.expand(shape).contiguous()
        if layout == "channels_last":
            x, dy, v = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, v))
        settings = dict(dim=1, act=act, alpha=0.3, gain=1.25, clamp=clamp)
        expected = reference_bias_act(x, b, dy, v, **settings)
        y = emulate_bias_act(emulator, x, b, **settings)
        rel = max(ROUNDING[dtype], 2e-6 if dtype != torch.float64 else 0)
        helpers.assert_close(y, expected[0], rel, f"{act} y")
        dx = emulate_bias_act(emulator, dy, b, xref=x, order=1, **settings)
        helpers.assert_close(dx, expected[1], rel, f"{act} first, of x")
        second = emulate_bias_act(emulator, v, b, xref=x, dy=dy, order=2, **settings)
        helpers.assert_close(second, expected[2], rel, f"{act} second, of x")
        if act == "swish" or dtype in (torch.float16, torch.bfloat16):
            continue  # y is rounded there: test_derivatives_of_a_rounded_result
        dx = emulate_bias_act(emulator, dy, yref=y, order=1, **settings)
        second = emulate_bias_act(emulator, v, yref=y, dy=dy, order=2, **settings)
        rel *= 5
        if clamp is not None:  # elements at +-clamp count as clipped
            settled = (y.double().abs() != clamp).double()
            dx, second, expected = dx * settled, second * settled, [e * settled for e in expected]
        helpers.assert_close(dx, expected[1], rel, f"{act} first, of y")
        helpers.assert_close(second, expected[2], rel, f"{act} second, of y")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_derivatives_of_a_rounded_result(emulator, dtype) -> None:
    """lrelu, relu and linear lose nothing by it: sign and clamp are all they need."""
    x, dy = grid_values((2, 3, 4, 5), dtype), grid_values((2, 3, 4, 5), dtype) + 1
    for act in ("lrelu", "relu", "linear"):
        settings = dict(dim=1, act=act, alpha=0.2, gain=2**0.5, clamp=2.0)
        y = emulate_bias_act(emulator, x, **settings)
        dx = emulate_bias_act(emulator, dy, yref=y, order=1, **settings)
        expected = reference_bias_act(x, None, dy, dy, **settings)[1]
        helpers.assert_close(dx, expected, ROUNDING[dtype], act)


def test_bias_on_any_axis_of_any_layout(emulator) -> None:
    """Packs within a step, packs of biases, and neither; tails; unaligned tensors; axes of one element."""
    for dtype in (torch.float32, torch.float16):
        for shape, order in [
            ((2, 6, 4, 8), (0, 1, 2, 3)),
            ((2, 16, 3, 3), (0, 2, 3, 1)),
            ((3, 5, 7), (2, 0, 1)),
            ((7, 9), (0, 1)),
            ((4, 1, 5), (1, 2, 0)),
            ((300, 40), (0, 1)),
            ((13,), (0,)),
        ]:
            dense = grid_values([shape[i] for i in order], dtype)
            x = dense.permute([order.index(i) for i in range(len(shape))])
            assert x.shape == torch.Size(shape)
            for dim in range(len(shape)):
                b = grid_values((shape[dim] + 1,), dtype)[1:]  # not aligned to 16 bytes
                b = b if dim % 2 else b.clone()
                expected = x + b.reshape([-1 if i == dim else 1 for i in range(len(shape))])
                assert torch.equal(emulate_bias_act(emulator, x, b, dim=dim), expected), (shape, dim)
        shifted = grid_values((41,), dtype)[1:].view(4, 10)
        assert torch.equal(emulate_bias_act(emulator, shifted, gain=2.0), shifted * 2)


def test_clamp_and_not_a_number(emulator) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.5, -0.5, 2.0, -2.0, 0.0]])
    y = emulate_bias_act(emulator, x, act="linear", clamp=2.0)
    assert torch.equal(y[:, 1:], x[:, 1:].clamp(-2, 2)) and y[0, 0].isnan()
    assert not emulate_bias_act(emulator, x[:, 1:].contiguous(), act="relu", clamp=0.0).any()
    for act in ACTS:
        y = emulate_bias_act(emulator, x, act=act, alpha=0.2)
        expected = bias_act_ops.activation_funcs[act].func(x, alpha=0.2)
        assert torch.equal(y.isnan(), expected.isnan()), act
    # At exactly the clamp the gradient passes if x is known, as in the reference, and not if y is.
    ones = torch.ones_like(x)
    assert emulate_bias_act(emulator, ones, xref=x, order=1, clamp=2.0).tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    assert emulate_bias_act(emulator, ones, yref=x, order=1, clamp=2.0).tolist() == [[0, 0, 0, 1, 1, 0, 0, 1]]
    assert not emulate_bias_act(emulator, ones, yref=ones * 0, order=1, act="tanh", gain=0.0).any()


@pytest.mark.skipif(sys.platform != "linux", reason="sparse memory as Linux gives it")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_last_blocks_of_a_huge_tensor(emulator, layout) -> None:
    c, hw = 24, 2**28 // 3 + 1
    n = 3
    total = n * c * hw
    assert total > 2**32
    x, y = sparse_tensor(total, torch.float16), sparse_tensor(total, torch.float16)
    b = grid_values((c,), torch.float16)
    x[-50:] = 1
    step = hw if layout == "planes" else 1
    problem = emulator.emulate_bias_act(
        address(x), address(b), None, None, None, address(y), 1, total, step, c, 1, 0, 0.0, 1.0, -1.0, -2, 0, 0
    )
    raise_problem(problem)
    wanted = b[-1].expand(50) if layout == "planes" else b.repeat(3)[-50:]
    assert torch.equal(y[-50:], wanted + 1)


def test_bias_act_refuses(emulator) -> None:
    x = torch.ones(1, 2)
    for settings, message in [
        (dict(order=3), "order is wrong"),
        (dict(order=1, act="tanh"), "xref or yref"),
        (dict(order=1, clamp=1.0), "xref or yref"),
        (dict(order=1, act="swish", yref=x), "swish"),
        (dict(order=1, act="lrelu", alpha=-1.0, yref=x), "negative slope"),
        (dict(order=2, act="tanh", yref=x), "needs dy"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            emulate_bias_act(emulator, x, **settings)


NVCC_TARGETS = {
    "sm_75": "arch=compute_75,code=sm_75",
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90": "arch=compute_90,code=sm_90",
    "PTX": "arch=compute_90,code=compute_90",
}


@pytest.mark.slow
@pytest.mark.parametrize("target", NVCC_TARGETS)
@pytest.mark.parametrize("source", ["bias_act.cu", "upfirdn2d.cu"])
def test_nvcc_compiles(source, target, tmp_path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-gencode", NVCC_TARGETS[target]]
    command += ["-c", str(OPS / source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr))
    summary = f"{len(registers)} kernels, at most {max(registers, default=0)} registers, {spills} bytes spilled"
    print(f"{source} {target}: {summary}")  # noqa: T201
    assert registers or target == "PTX"


@pytest.mark.slow
def test_binding_compiles_for_cuda(tmp_path) -> None:
    """Against the headers of any build of torch, the CPU one included."""
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    if nvcc is None or compiler is None:
        pytest.skip("no nvcc or no g++")
    toolkit = Path(nvcc).resolve().parent.parent
    includes = [f"-isystem{p}" for p in [*torch_includes(), toolkit / "include", "/usr/local/cuda/include"]]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    subprocess.run([*command, *includes, str(OPS / "cuda_ops.cpp")], check=True)


def torch_includes() -> list[str]:
    from torch.utils import cpp_extension

    return cpp_extension.include_paths()


class EmulatedResample(torch.autograd.Function):
    """upfirdn2d over the emulated kernels, differentiable to any order: the adjoint of a resampling is a resampling."""

    @staticmethod
    def forward(ctx, lib, x, f, up, down, pads, flip, gain):
        if f.ndim == 1 and not (len(f) == 12 and (up, down) in FACTORS.values()):
            half = (up[0], 1), (down[0], 1), (*pads[:2], 0, 0)
            y = emulate_upfirdn2d(lib, x, f[None, :], *half, flip, gain)
            y = emulate_upfirdn2d(lib, y, f[:, None], (1, up[1]), (1, down[1]), (0, 0, *pads[2:]), flip)
        else:
            y = emulate_upfirdn2d(lib, x, f, up, down, pads, flip, gain)
        fw, fh = f.shape[-1], f.shape[0]
        adjoint_x = (fw - pads[0] - 1, x.shape[3] * up[0] - y.shape[3] * down[0] + pads[0] - up[0] + 1)
        adjoint_y = (fh - pads[2] - 1, x.shape[2] * up[1] - y.shape[2] * down[1] + pads[2] - up[1] + 1)
        ctx.adjoint = (f, down, up, (*adjoint_x, *adjoint_y), not flip, gain)
        ctx.lib = lib
        return y

    @staticmethod
    def backward(ctx, dy):
        return None, EmulatedResample.apply(ctx.lib, dy, *ctx.adjoint), *[None] * 6


class EmulatedBiasAct(torch.autograd.Function):
    """bias_act over the emulated kernels."""

    @staticmethod
    def forward(ctx, lib, x, b, settings):
        ctx.save_for_backward(x, b)
        ctx.lib, ctx.settings = lib, settings
        return emulate_bias_act(lib, x, b, **settings)

    @staticmethod
    def backward(ctx, dy):
        x, b = ctx.saved_tensors
        dx = EmulatedBiasActGrad.apply(ctx.lib, dy, x, b, ctx.settings)
        return None, dx, None if b is None else sum_to_bias(dx, ctx.settings), None


class EmulatedBiasActGrad(torch.autograd.Function):
    """Its first derivative, with the second."""

    @staticmethod
    def forward(ctx, lib, dy, x, b, settings):
        ctx.save_for_backward(dy, x, b)
        ctx.lib, ctx.settings = lib, settings
        return emulate_bias_act(lib, dy.contiguous(), b, xref=x, order=1, **settings)

    @staticmethod
    def backward(ctx, v):
        dy, x, b = ctx.saved_tensors
        v = v.contiguous()
        ddy = emulate_bias_act(ctx.lib, v, b, xref=x, order=1, **ctx.settings)
        dx = emulate_bias_act(ctx.lib, v, b, xref=x, dy=dy.contiguous(), order=2, **ctx.settings)
        return None, ddy, dx, None if b is None else sum_to_bias(dx, ctx.settings), None


def sum_to_bias(t, settings):
    others = [i for i in range(t.ndim) if i != settings["dim"] % t.ndim]
    return t.sum(others) if others else t  # an empty list would mean all axes


def check_upfirdn2d_goldens(lib, path, monkeypatch) -> None:
    def emulated(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl="cuda"):
        f = torch.ones(1, 1) if f is None else f
        up, down = (tuple(v) if isinstance(v, list | tuple) else (v, v) for v in (up, down))
        return EmulatedResample.apply(lib, x, f, up, down, upfirdn2d_ops.parse_padding(padding), flip_filter, gain)

    monkeypatch.setattr(upfirdn2d_ops, "upfirdn2d", emulated)  # the wrappers call it by this name
    data = np.load(path, allow_pickle=False)
    meta = json.loads(str(data["meta"]))
    count = 0
    for function in ("upfirdn2d", "filter2d", "upsample2d", "downsample2d"):
        for case in meta[function]:
            key, kwargs = case["key"], {k: v for k, v in case.items() if k not in ("key", "filter")}
            f = torch.from_numpy(data[f"{key}/f"]) if case["filter"] is not None else None
            x, dy, v = (torch.from_numpy(data[f"{key}/{n}"]) for n in ("x", "dy", "v"))
            x.requires_grad_()
            dy.requires_grad_()
            y = getattr(upfirdn2d_ops, function)(x, f, **kwargs)
            (dx,) = torch.autograd.grad((y * dy).sum(), x, create_graph=True)
            (ddy,) = torch.autograd.grad(0.5 * (v * dx.square()).sum(), dy)
            for name, value in (("y", y), ("dx", dx), ("ddy", ddy)):
                helpers.assert_close(value, data[f"{key}/{name}"], 1e-6, f"{key}/{name}")
            count += 1
    assert count >= 8


def check_bias_act_goldens(lib, path) -> None:
    data = np.load(path, allow_pickle=False)
    cases = json.loads(str(data["meta"]))["cases"]
    assert len(cases) >= 5
    for case in cases:
        key = case["key"]
        x, dy, v = (torch.from_numpy(data[f"{key}/{n}"]) for n in ("x", "dy", "v"))
        b = torch.from_numpy(data[f"{key}/b"]) if case["bias"] else None
        spec = bias_act_ops.activation_funcs[case["act"]]
        alpha, gain = (float(spec[f"def_{n}"] if case.get(n) is None else case[n]) for n in ("alpha", "gain"))
        settings = dict(dim=case.get("dim", 1), act=case["act"], alpha=alpha, gain=gain, clamp=case.get("clamp"))
        leaves = [t.requires_grad_() for t in (x, b) if t is not None]
        dy.requires_grad_()
        y = EmulatedBiasAct.apply(lib, x, b, settings)
        first = torch.autograd.grad((y * dy).sum(), leaves, create_graph=True)
        second = torch.autograd.grad((first[0] * v).sum(), [dy, *leaves])
        results = {"y": y, "dx": first[0], "d2_dy": second[0], "d2_x": second[1]}
        if b is not None:
            results |= {"db": first[1], "d2_b": second[2]}
        for name, value in results.items():
            helpers.assert_close(value, data[f"{key}/{name}"], 2e-6, f"{key}/{name} {case['act']}")


def test_goldens(emulator, goldens, monkeypatch) -> None:
    with helpers.goldens_through("upfirdn2d", "CUDA on the host"):
        check_upfirdn2d_goldens(emulator, goldens / "ops_upfirdn2d.npz", monkeypatch)
    with helpers.goldens_through("bias_act", "CUDA on the host"):
        check_bias_act_goldens(emulator, goldens / "ops_bias_act.npz")


def test_goldens_small_copy(emulator, data_dir, monkeypatch) -> None:
    check_upfirdn2d_goldens(emulator, data_dir / "ops_upfirdn2d.npz", monkeypatch)
    check_bias_act_goldens(emulator, data_dir / "ops_bias_act.npz")
