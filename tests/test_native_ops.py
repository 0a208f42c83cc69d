"""The compiled operators: stored numbers, the direct sum, derivatives, layouts, what torch asks of an operator."""

import helpers
import pytest
import test_ops_bias_act
import test_ops_upfirdn2d
import torch
from hypothesis import given, settings

from torch_utils import custom_ops
from torch_utils.ops import bias_act, upfirdn2d

ACTS = bias_act.NATIVE_ACTS["cpu"]
FILTERS = {"1331": [1.0, 3, 3, 1], "12": [1.0 + i % 5 for i in range(12)], "asymmetric": [[1.0, 2, 0.5], [-1, 4, 3]]}


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """Compiled operators wherever they can be used, also where they aren't faster; yields the number of their calls."""
    problem = custom_ops.problem()
    if "no C++ compiler" in problem or "Linux only" in problem:
        pytest.skip(problem)
    assert not problem
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "native")
    monkeypatch.setitem(bias_act.NATIVE_MIN_NUMEL, "cpu", 0)
    monkeypatch.setattr(upfirdn2d, "NATIVE_MAX_PLANES", 10**9)
    count = {"upfirdn2d": 0, "bias_act": 0}
    for module, name in ((bias_act, "bias_act"), (upfirdn2d, "upfirdn2d")):

        def counted(get=module._native, name=name):
            count[name] += 1
            return get()

        monkeypatch.setattr(module, "_native", counted)
    assert custom_ops.selected() == "native"
    return count


def check_goldens(folder, count) -> None:
    test_ops_upfirdn2d.check_goldens(folder / "ops_upfirdn2d.npz")
    test_ops_bias_act.check_goldens(folder / "ops_bias_act.npz")
    assert count["upfirdn2d"] >= 8 and count["bias_act"] >= 12, count


def test_goldens(goldens, native) -> None:
    check_goldens(goldens, native)


def test_goldens_small_copy(data_dir, native) -> None:
    check_goldens(data_dir, native)


def test_any_call_is_the_direct_sum_and_its_gradient_the_adjoint(native) -> None:
    test_ops_upfirdn2d.test_any_call_is_the_direct_sum_and_its_gradient_the_adjoint()
    assert native["upfirdn2d"] > 200


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(test_ops_upfirdn2d.calls())
def check_single_and_bfloat16(call) -> None:
    up, down, (h, w), shape, pads, flip, gain, seed, channels_last = call
    rng = torch.Generator().manual_seed(seed)
    channels = 1 + seed % 20  # either side of the channels-last kernels' threshold
    x = torch.randn(2, channels, h, w, generator=rng)
    f = None if shape is None else torch.randn(shape, generator=rng)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    expected = test_ops_upfirdn2d.direct_sum(x, f, up, down, pads, flip, gain)
    helpers.assert_close(upfirdn2d.upfirdn2d(x, f, up, down, pads, flip, gain), expected, 2e-6, f"{call}")
    half = x.bfloat16()
    y = upfirdn2d.upfirdn2d(half, f, up, down, pads, flip, gain)
    assert y.dtype == torch.bfloat16
    expected = test_ops_upfirdn2d.direct_sum(half.double(), f, up, down, pads, flip, gain)
    helpers.assert_close(y, expected, 2**-8, f"bfloat16 {call}")


def test_any_call_in_float32_and_bfloat16(native) -> None:
    check_single_and_bfloat16()
    assert native["upfirdn2d"] > 200


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [3, 40])
def test_any_number_of_taps(channels, layout, native) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 37, 35, generator=rng).contiguous(memory_format=layout)
    for taps in (1, 5, 7, 12, 31, 32, 33):
        for f in (torch.randn(taps, generator=rng), torch.randn(2, taps, generator=rng)):
            for up, down in ((1, 1), (2, 1), (1, 2), (3, 2)):
                y = upfirdn2d.upfirdn2d(x, f, up=up, down=down, padding=[-1, 2, 5, 0])
                expected = upfirdn2d.upfirdn2d(x, f, up=up, down=down, padding=[-1, 2, 5, 0], impl="ref")
                assert taps == 33 or y.is_contiguous(memory_format=layout)
                helpers.assert_close(y, expected, 2e-6, f"{taps} taps, {f.ndim}-D, up {up}, down {down}")
    assert native["upfirdn2d"] == 6 * 2 * 4  # 33 taps are torch's


@pytest.mark.parametrize("down", [1, 2, (1, 2), (2, 1)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_four_taps_slide_over_channels_last_images(rows, down, native) -> None:
    rng = torch.Generator().manual_seed(rows)
    f = torch.outer(torch.randn(rows, generator=rng), torch.randn(4, generator=rng))
    for size in ((1, 1), (3, 2), (9, 4), (6, 150)):  # the last in several strips
        x = torch.randn(2, 48, *size, generator=rng).contiguous(memory_format=torch.channels_last)
        for pads in ([2, 1, 2, 1], [3, 3, 0, 4], [7, 0, 1, 9], [-1, 5, 4, -1]):
            call = {"down": down, "padding": pads, "flip_filter": rows % 2 == 0, "gain": 1.5}
            expected = upfirdn2d.upfirdn2d(x.double(), f, impl="ref", **call)
            helpers.assert_close(upfirdn2d.upfirdn2d(x, f, **call), expected, 2e-6, f"{size} {pads}")
            half = x.bfloat16()
            expected = upfirdn2d.upfirdn2d(half.double(), f, impl="ref", **call)
            y = upfirdn2d.upfirdn2d(half, f, **call).double()
            assert ((y - expected).abs() <= expected.abs() * 2**-8 + 1e-5).all()
    assert native["upfirdn2d"] >= 32


def test_threads_and_layouts_give_the_same_numbers(native) -> None:
    x = torch.randn(3, 48, 33, 29, generator=torch.Generator().manual_seed(0))
    f, b = upfirdn2d.setup_filter(FILTERS["1331"]), torch.linspace(-1, 1, 48)
    threads = torch.get_num_threads()
    try:
        results = []
        for num in (1, 2):
            torch.set_num_threads(num)
            for layout in (torch.contiguous_format, torch.channels_last):
                y = x.contiguous(memory_format=layout)
                results.append((upfirdn2d.downsample2d(y, f), bias_act.bias_act(y, b, act="lrelu", clamp=1)))
    finally:
        torch.set_num_threads(threads)
    for y, z in results[1:]:
        helpers.assert_close(y, results[0][0], 5e-7, "layout")
        assert torch.equal(z, results[0][1])
    assert torch.equal(results[0][0], results[2][0]) and torch.equal(results[1][0], results[3][0])


@pytest.mark.parametrize("shape", [(3, 2), (4,)])
def test_resampling_by_finite_differences(shape, native) -> None:
    test_ops_upfirdn2d.test_gradients_by_finite_differences("cuda", shape)
    assert native["upfirdn2d"] > 50


@pytest.mark.parametrize("act", ACTS)
def test_activations_by_finite_differences(act, native) -> None:
    test_ops_bias_act.test_gradients_by_finite_differences(act, "cuda")
    assert native["bias_act"] > 50


def test_activations_at_the_edges(native) -> None:
    test_ops_bias_act.test_edges("cuda")
    assert bias_act.bias_act(torch.tensor([-torch.inf, torch.nan]), act="relu").isnan().tolist() == [False, True]
    assert native["bias_act"] > 5


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("clamp", [None, 0.9])
def test_activations_along_any_axis(dim, act, clamp, native) -> None:
    rng = torch.Generator().manual_seed(3)
    base = torch.randn(4, 37, 6, 5, generator=rng)
    for x in (base, base.contiguous(memory_format=torch.channels_last), base.permute(2, 0, 3, 1)[::2]):
        b, dy = torch.randn(x.shape[dim], generator=rng), torch.randn(x.shape, generator=rng)
        grads = []
        for impl in ("cuda", "ref"):
            u, c = x.clone().detach().requires_grad_(), b.clone().requires_grad_()
            y = bias_act.bias_act(u, c, dim=dim, act=act, gain=1.3, clamp=clamp, impl=impl)
            grads.append((y, *torch.autograd.grad(y, (u, c), dy)))
        for ours, theirs, name in zip(*grads, ("y", "dx", "db")):
            helpers.assert_close(ours, theirs, 1e-6, f"{name} {act} axis {dim} clamp {clamp}")
        half, few = x.bfloat16(), b.bfloat16()
        y = bias_act.bias_act(half, few, dim=dim, act=act, clamp=clamp)
        exact = bias_act.bias_act(half.float(), few.float(), dim=dim, act=act, clamp=clamp, impl="ref")
        assert y.dtype == torch.bfloat16 and torch.equal(y, exact.bfloat16())  # float32 inside, rounded once
    assert native["bias_act"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_torch_asks_of_an_operator(layout, dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 6, generator=rng).to(dtype).contiguous(memory_format=layout).requires_grad_()
    b = torch.randn(3, generator=rng).to(dtype).requires_grad_()
    f = upfirdn2d.setup_filter(FILTERS["1331"])
    torch.library.opcheck(upfirdn2d._native(), (x, f, 2, 1, 1, 2, 2, 1, 3, 2, False, 4.0))
    for clamp in (-1.0, 0.5):
        torch.library.opcheck(bias_act._native(), (x, b, None, None, None, 0, 1, 3, 0.2, 1.4, clamp))
    torch.library.opcheck(bias_act._native(), (x, None, None, x.detach(), None, 1, 1, 3, 0.2, 1.4, -1.0))


@pytest.mark.filterwarnings("ignore")  # torch's compiler has its own
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, native) -> None:
    f = upfirdn2d.setup_filter(FILTERS["1331"])

    def call(x, b):
        return bias_act.bias_act(upfirdn2d.upsample2d(x, f), b, act="lrelu", clamp=1)

    x, b = torch.randn(2, 3, 8, 6, requires_grad=True), torch.randn(3, requires_grad=True)
    grads = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
        grads.append(torch.autograd.grad(function(x, b).square().sum(), (x, b)))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_wrong_use_is_explained() -> None:
    x, f = torch.zeros(1, 1, 4, 4), upfirdn2d.setup_filter(FILTERS["1331"])
    for bad in (
        lambda: upfirdn2d._native()(x[0], f, 1, 1, 1, 1, 0, 0, 0, 0, False, 1.0),
        lambda: upfirdn2d._native()(x, f.double(), 1, 1, 1, 1, 0, 0, 0, 0, False, 1.0),
        lambda: upfirdn2d._native()(x, f, 0, 1, 1, 1, 0, 0, 0, 0, False, 1.0),
        lambda: upfirdn2d._native()(x, f, 1, 1, 1, 1, -1, 0, 0, 0, False, 1.0),
        lambda: upfirdn2d._native()(x.int(), f, 1, 1, 1, 1, 0, 0, 0, 0, False, 1.0),
        lambda: bias_act._native()(x, None, None, None, None, 0, 1, 10, 0.0, 1.0, -1.0),
        lambda: bias_act._native()(x, torch.zeros(2), None, None, None, 0, 1, 3, 0.2, 1.0, -1.0),
        lambda: bias_act._native()(x, None, None, None, None, 1, 1, 3, 0.2, 1.0, -1.0),
        lambda: bias_act._native()(x, None, None, None, None, 2, 1, 3, 0.2, 1.0, -1.0),
    ):
        with pytest.raises(ValueError, match="wanted|smaller|needs|must be|does not fit"):
            bad()
