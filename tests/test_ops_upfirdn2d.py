"""upfirdn2d and its wrappers: stored numbers, algebraic properties, both implementations against a direct sum."""

import json
import os

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_utils import custom_ops
from torch_utils.ops import epilogue
from torch_utils.ops import upfirdn2d as ops

IMPLS = ["ref", "cuda"]
REL = 1e-6


def check_goldens(path) -> None:
    data = np.load(path, allow_pickle=False)
    meta = json.loads(str(data["meta"]))
    count = 0
    for function in ("upfirdn2d", "filter2d", "upsample2d", "downsample2d"):
        for case in meta[function]:
            key, kwargs = case["key"], {k: v for k, v in case.items() if k not in ("key", "filter")}
            f = torch.from_numpy(data[f"{key}/f"]) if case["filter"] is not None else None
            for impl in IMPLS:
                x, dy, v = (torch.from_numpy(data[f"{key}/{n}"]) for n in ("x", "dy", "v"))
                x.requires_grad_()
                dy.requires_grad_()
                y = getattr(ops, function)(x, f, impl=impl, **kwargs)
                (dx,) = torch.autograd.grad((y * dy).sum(), x, create_graph=True)
                (ddy,) = torch.autograd.grad(0.5 * (v * dx.square()).sum(), dy)
                for name, value in (("y", y), ("dx", dx), ("ddy", ddy)):
                    helpers.assert_close(value, data[f"{key}/{name}"], REL, f"{key}/{name} {impl}")
            count += 1
    for case in meta["setup_filter"]:
        kwargs = {k: v for k, v in case.items() if k != "key"}
        out = ops.setup_filter(**kwargs)
        assert out.dtype == torch.float32
        helpers.assert_close(out, data[f"{case['key']}/out"], REL, case["key"])
        count += 1
    assert count >= 8


def test_goldens(goldens) -> None:
    check_goldens(goldens / "ops_upfirdn2d.npz")


def test_goldens_small_copy(data_dir) -> None:
    check_goldens(data_dir / "ops_upfirdn2d.npz")


def direct_sum(x, f, up, down, pads, flip, gain):
    """The formula, sample by sample, in float64 NumPy; independent of torch's convolutions."""
    x = x.detach().double().numpy()
    k = np.ones((1, 1)) if f is None else f.double().numpy()
    k = np.outer(k, k) if k.ndim == 1 else k
    k = k if flip else k[::-1, ::-1]
    n, c, h, w = x.shape
    z = np.zeros((n, c, h * up[1], w * up[0]))
    z[:, :, :: up[1], :: up[0]] = x
    big = np.pad(z, [(0, 0), (0, 0), (max(pads[2], 0), max(pads[3], 0)), (max(pads[0], 0), max(pads[1], 0))])
    big = big[:, :, max(-pads[2], 0) : big.shape[2] - max(-pads[3], 0), max(-pads[0], 0) :]
    big = big[..., : big.shape[3] - max(-pads[1], 0)]
    rows, cols = big.shape[2] - k.shape[0] + 1, big.shape[3] - k.shape[1] + 1
    y = sum(k[a, b] * big[:, :, a : a + rows, b : b + cols] for a in range(k.shape[0]) for b in range(k.shape[1]))
    return gain * y[:, :, :: down[1], :: down[0]]


factors = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def calls(draw):
    """A call of upfirdn2d with a non-empty result."""
    up, down = draw(factors), draw(factors)
    size = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))  # h, w
    shape = draw(st.sampled_from([(4, 4), (1, 1), (3, 4), (4, 2), (1, 3), (2, 5), (3,), (4,), (8,), None]))
    fw, fh = (1, 1) if shape is None else (shape[-1], shape[0])
    pads = []
    for length, factor, taps in ((size[1], up[0], fw), (size[0], up[1], fh)):
        before = draw(st.integers(-min(2, length * factor - 1), 5))
        least = max(taps - length * factor - before, -(length * factor - 1) - min(before, 0))
        pads += [before, draw(st.integers(max(least, -2), max(least, -2) + 5))]
    seed = draw(st.integers(0, 2**31))
    channels_last = draw(st.booleans())
    flip, gain = draw(st.booleans()), draw(st.sampled_from([1, 4, 0.7, -1.5]))
    return up, down, size, shape, pads, flip, gain, seed, channels_last


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(calls())
def test_any_call_is_the_direct_sum_and_its_gradient_the_adjoint(call) -> None:
    up, down, (h, w), shape, pads, flip, gain, seed, channels_last = call
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, h, w, generator=rng, dtype=torch.float64)
    f = None if shape is None else torch.randn(shape, generator=rng)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = direct_sum(x, f, up, down, pads, flip, gain)
    for impl in IMPLS:
        x = x.detach().requires_grad_()
        y = ops.upfirdn2d(x, f, up, down, pads, flip, gain, impl=impl)
        helpers.assert_close(y, expected, 1e-6 if shape is not None and len(shape) == 1 else 2e-7, f"{impl} {call}")
        # <A x, v> = <x, A' v>, for the gradient and for the op that the specification says it is.
        v = torch.randn(y.shape, generator=rng, dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(y, x, v, create_graph=True)
        scale = float((y.detach().abs() * v.detach().abs()).sum()) + 1e-12
        assert abs(((y * v).sum() - (x * dx).sum()).item()) <= 1e-10 * scale
        fw, fh = (1, 1) if f is None else (f.shape[-1], f.shape[0])
        back = [fw - pads[0] - 1, w * up[0] - y.shape[3] * down[0] + pads[0] - up[0] + 1]
        back += [fh - pads[2] - 1, h * up[1] - y.shape[2] * down[1] + pads[2] - up[1] + 1]
        adjoint = ops.upfirdn2d(v, f, down, up, back, not flip, gain, impl=impl)
        helpers.assert_close(dx, adjoint, 1e-6, f"adjoint {impl} {call}")
        # The derivative of the gradient with respect to v is the op itself.
        u = torch.randn(x.shape, generator=rng, dtype=torch.float64)
        (ddv,) = torch.autograd.grad(dx, v, u)
        helpers.assert_close(ddv, ops.upfirdn2d(u, f, up, down, pads, flip, gain, impl=impl), 1e-6, f"twice {impl}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(3, 2), (4,)])
def test_gradients_by_finite_differences(impl, shape) -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 4, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    f = torch.randn(shape, generator=rng)

    def call(x):
        return ops.upfirdn2d(x, f, up=[2, 1], down=[1, 2], padding=[3, 1, 2, 2], gain=1.3, impl=impl)

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["none", "up", "down"])
def test_layout_is_kept_and_both_paths_agree(memory_format, kind) -> None:
    x = torch.randn(3, 16, 8, 10, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    f = ops.setup_filter([1, 3, 3, 1])
    call = {"none": ops.filter2d, "up": ops.upsample2d, "down": ops.downsample2d}[kind]
    y = call(x, f)
    assert y.is_contiguous(memory_format=memory_format)
    helpers.assert_close(y, call(x, f, impl="ref"), 5e-7, kind)


def test_brightness_and_sizes() -> None:
    f = ops.setup_filter([1, 3, 3, 1])
    x = torch.full([1, 1, 16, 12], 0.75)
    for y in (ops.upsample2d(x, f), ops.downsample2d(x, f), ops.filter2d(x, f)):
        torch.testing.assert_close(y[:, :, 3:-3, 2:-2], torch.full_like(y[:, :, 3:-3, 2:-2], 0.75))
    assert ops.upsample2d(x, f).shape == (1, 1, 32, 24)
    assert ops.downsample2d(x, f).shape == (1, 1, 8, 6)
    assert ops.filter2d(x, f).shape == x.shape


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(impl, dtype, rel) -> None:
    x = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    f = ops.setup_filter([1, 3, 3, 1])
    for call in (ops.upsample2d, ops.downsample2d, ops.filter2d):
        h = x.to(dtype).requires_grad_()
        y = call(h, f, impl=impl)
        y.float().sum().backward()
        assert y.dtype == dtype and h.grad.dtype == dtype
        helpers.assert_close(y.float(), call(x, f), rel, f"{call.__name__} {dtype}")


def test_setup_filter_leaves_the_caller_alone() -> None:
    for given_taps in (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(9), torch.tensor([1.0, 3.0, 3.0, 1.0])):
        before = given_taps.clone()
        out = ops.setup_filter(given_taps, gain=4)
        assert torch.equal(given_taps, before)
        out.zero_()
        assert torch.equal(given_taps, before)
    raw = ops.setup_filter(given_taps[None], normalize=False)
    raw.zero_()
    assert torch.equal(given_taps, before)
    table = np.ones((3, 3), dtype=np.float32)
    ops.setup_filter(table, normalize=False).zero_()
    assert table.sum() == 9


def test_wrong_use_is_explained() -> None:
    x, f = torch.zeros(1, 1, 4, 4), ops.setup_filter([1, 3, 3, 1])
    for bad in (
        lambda: ops.upfirdn2d(x[0], f),
        lambda: ops.upfirdn2d(x, f, up=0),
        lambda: ops.upfirdn2d(x, f, down=[1, 2, 3]),
        lambda: ops.upfirdn2d(x, f, padding=[1, 2, 3]),
        lambda: ops.upfirdn2d(x, f, padding=1.5),
        lambda: ops.upfirdn2d(x, f, padding=-1),
        lambda: ops.upfirdn2d(x, [1, 2], padding=1),
        lambda: ops.upfirdn2d(x, f, impl="fast"),
        lambda: ops.upfirdn2d(x, f.clone().requires_grad_()),
        lambda: ops.setup_filter(torch.zeros(1, 2, 3)),
        lambda: ops.setup_filter([]),
        lambda: ops.setup_filter(torch.ones(2, 2), separable=True),
    ):
        with pytest.raises(ValueError, match="wanted|smaller|separable|gradient"):
            bad()


@pytest.mark.parametrize("ops_family", ["ref", "torch", "auto"])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (0, 3, 0, 8)])
def test_no_images(shape, ops_family, monkeypatch) -> None:
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", ops_family)
    for layout in (torch.contiguous_format, torch.channels_last):
        for f in (ops.setup_filter([1, 3, 3, 1]), ops.setup_filter([1.0] * 12), None):
            x = torch.zeros(shape).contiguous(memory_format=layout).requires_grad_()
            y = ops.upfirdn2d(x, f, up=2, padding=12)
            assert y.shape[:2] == (0, 3) and torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_the_switch(monkeypatch) -> None:
    for value, fast in (("torch", True), ("ref", False), (" REF ", False)):
        monkeypatch.setenv("STYLEGAN_ROOTED_OPS", value)
        assert custom_ops.selected() == "ref" and custom_ops.describe().startswith(value.strip().lower())
        assert custom_ops.fast_paths() is fast and custom_ops.fast_paths("ref") is False
        y = ops.upsample2d(torch.ones(1, 1, 2, 2, requires_grad=True), ops.setup_filter([1, 3, 3, 1]))
        assert ("_Resample" in type(y.grad_fn).__name__) is fast
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "quick")
    with pytest.raises(ValueError, match="wanted one of auto, native, torch, ref"):
        custom_ops.selected()


@pytest.mark.skipif("STYLEGAN_ROOTED_EMULATED_CUDA" in os.environ, reason="an operator of the CPU's alone")
@pytest.mark.parametrize("noise", [None, "map", "each"])
@pytest.mark.parametrize("channels", [5, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filter_and_what_follows_it_at_once(noise, channels, dtype, monkeypatch) -> None:
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "native")
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    torch.manual_seed(1)
    f = ops.setup_filter([1, 3, 3, 1])
    x = torch.randn(2, channels, 9, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    strength = None if noise is None else torch.tensor(0.3)
    level = None if noise is None else torch.randn((8, 6) if noise == "map" else (2, 1, 8, 6))
    others = torch.rand(2, 2 * channels)[:, :channels], level, strength, torch.randn(channels)
    for clamp in (None, 1.0):
        chosen = "lrelu", 1.4, clamp
        at_once = ops.bound_epilogue(x, f, [1, 1, 1, 1], 4, epilogue.native_settings(*chosen))
        assert at_once is not None
        steps = epilogue.epilogue(ops.upfirdn2d(x, f, padding=1, gain=4), *others, *chosen)
        y = at_once(x, *others)
        assert y.dtype == dtype and y.shape == steps.shape and y.is_contiguous(memory_format=torch.channels_last)
        helpers.assert_close(y, steps, 1e-6 if dtype == torch.float32 else 2**-8, f"{dtype} {chosen}")
    with pytest.raises(ValueError, match="wanted channels-last"):
        at_once(x.contiguous(), *others)
    with pytest.raises(ValueError, match="wanted both"):
        at_once(x, others[0], torch.zeros(8, 6), None, others[3])
    with pytest.raises(ValueError, match="noise is .* wanted"):
        at_once(x, others[0], torch.zeros(8, 5), torch.tensor(1.0), others[3])
