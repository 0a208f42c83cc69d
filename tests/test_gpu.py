"""The CUDA operators on a GPU: stored numbers, derivatives, types, layouts, streams, graphs, sizes beyond 2^31.

Deselected by default: `pytest -m gpu`, or scripts/gpu_check.sh, which adds compute-sanitizer and the timings.
"""

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import helpers
import pytest
import test_networks
import test_ops_bias_act
import test_ops_conv2d_resample
import test_ops_upfirdn2d
import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act, upfirdn2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# One rounding of the result, and float32 sums in another order.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-12}
SHORT = [1.0, 3.0, 3.0, 1.0]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch) -> Iterator[None]:
    """The compiled operators are there, and float32 means float32."""
    monkeypatch.setenv(custom_ops.VARIABLE, "native")
    assert custom_ops.selected("cuda") == "native", custom_ops.problem("cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture
def stored_numbers_on_gpu(monkeypatch) -> None:
    read = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: read(array).cuda())


def image(*shape, dtype=torch.float32, layout=torch.contiguous_format) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.to("cuda", dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("suite", ["upfirdn2d", "bias_act", "conv2d_resample"])
def test_goldens(suite, data_dir, stored_numbers_on_gpu) -> None:
    check = {
        "upfirdn2d": test_ops_upfirdn2d.check_goldens,
        "bias_act": test_ops_bias_act.check_goldens,
        "conv2d_resample": test_ops_conv2d_resample.check_goldens,
    }[suite]
    with helpers.goldens_through(suite, "CUDA"):
        check(data_dir / f"ops_{suite}.npz")


@pytest.mark.parametrize("suite", ["upfirdn2d", "bias_act", "conv2d_resample"])
def test_every_golden(suite, goldens, stored_numbers_on_gpu) -> None:
    test_goldens(suite, goldens, None)


def test_golden_network(data_dir) -> None:
    stored = test_networks.load_pair(data_dir / test_networks.LOCAL)
    G, D = (copy.deepcopy(network).cuda() for network in (stored.G, stored.D))
    data = {key: value.cuda() for key, value in stored.data.items()}
    pair = SimpleNamespace(meta=stored.meta, data=data, call={"force_fp32": True}, G=G, D=D)
    with helpers.goldens_through("networks", "CUDA"):
        test_networks.check_outputs(pair)
        test_networks.check_gradients(pair, True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_types_and_layouts(dtype, layout) -> None:
    """Against the definition in float64; tiles, both passes of a separable filter, and the general kernel."""
    for channels, size in ((3, 37), (64, 16), (17, 9)):
        x = image(2, channels, size, size + 3, dtype=dtype, layout=layout)
        b = image(channels, dtype=dtype)
        for f in (SHORT, [1.0 + i % 5 for i in range(12)], [[1.0, 2, 0.5], [-1, 4, 3]], [1.0, 2, 3, 2, 1, 2, 1, 1, 1]):
            taps = upfirdn2d.setup_filter(f, device="cuda")
            for options in ({"up": 2}, {"down": 2}, {}, {"up": [3, 1], "down": [1, 2]}):
                y = upfirdn2d.upfirdn2d(x, taps, padding=[8, 7, 9, 6], gain=1.5, **options)
                assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
                exact = upfirdn2d.upfirdn2d(x.double(), taps, padding=[8, 7, 9, 6], gain=1.5, impl="ref", **options)
                helpers.assert_close(y, exact, ROUNDING[dtype], f"{dtype} {f} {options}")
        for act in bias_act.activation_funcs:
            y = bias_act.bias_act(x, b, act=act, clamp=1.2)
            exact = bias_act.bias_act(x.double(), b.double(), act=act, clamp=1.2, impl="ref")
            helpers.assert_close(y, exact, ROUNDING[dtype] * 4, f"{dtype} {act}")
            assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_by_finite_differences(layout) -> None:
    x = image(2, 3, 4, 5, dtype=torch.float64, layout=layout).requires_grad_()
    b = image(3, dtype=torch.float64).requires_grad_()
    taps = upfirdn2d.setup_filter([[1.0, 2, 0.5], [-1, 4, 3]], device="cuda")
    for options in ({"up": 2}, {"down": 2}, {"flip_filter": True}):
        call = lambda x, o=options: upfirdn2d.upfirdn2d(x, taps, padding=[2, 1, 1, 2], **o)  # noqa: B023
        assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)
    for act in bias_act.activation_funcs:
        call = lambda x, b, a=act: bias_act.bias_act(x, b, act=a, gain=0.8, clamp=2.5)  # noqa: B023
        assert torch.autograd.gradcheck(call, (x, b)) and torch.autograd.gradgradcheck(call, (x, b))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_torch_asks_of_an_operator(dtype, layout) -> None:
    x = image(2, 3, 8, 6, dtype=dtype, layout=layout).requires_grad_()
    b = image(3, dtype=dtype).requires_grad_()
    f = upfirdn2d.setup_filter(SHORT, device="cuda")
    torch.library.opcheck(upfirdn2d._native(), (x, f, 2, 1, 1, 2, 2, 1, 3, 2, False, 4.0))
    for act in (3, 9):
        torch.library.opcheck(bias_act._native(), (x, b, None, None, None, 0, 1, act, 0.2, 1.4, 0.5))


def both(x, b, f) -> torch.Tensor:
    return bias_act.bias_act(upfirdn2d.upsample2d(x, f), b, act="lrelu", clamp=256)


def test_current_stream() -> None:
    """A kernel on another stream would read what is not yet written."""
    f, b = upfirdn2d.setup_filter(SHORT, device="cuda"), torch.zeros(4, device="cuda")
    x = torch.zeros(2, 4, 64, 64, device="cuda")
    both(x, b, f)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.fill_(1)
        y = both(x, b, f)
    stream.synchronize()
    torch.testing.assert_close(y[:, :, 4:-4, 4:-4], torch.full_like(y[:, :, 4:-4, 4:-4], 2**0.5))


def test_other_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    f, b = upfirdn2d.setup_filter(SHORT, device="cuda:1"), torch.zeros(4, device="cuda:1")
    assert torch.cuda.current_device() == 0
    y = both(torch.ones(1, 4, 8, 8, device="cuda:1"), b, f)
    assert y.device.index == 1 and torch.cuda.current_device() == 0 and y.isfinite().all()
    with pytest.raises((ValueError, RuntimeError)):
        upfirdn2d._native()(torch.ones(1, 4, 8, 8, device="cuda:0"), f, 1, 1, 1, 1, 3, 3, 3, 3, False, 1.0)


def test_no_wait_for_the_device() -> None:
    f, b = upfirdn2d.setup_filter(SHORT, device="cuda"), torch.zeros(4, device="cuda", requires_grad=True)
    x = torch.zeros(2, 4, 32, 32, device="cuda", requires_grad=True)
    both(x, b, f)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (dx,) = torch.autograd.grad(both(x, b, f).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_in_a_graph() -> None:
    f, b = upfirdn2d.setup_filter(SHORT, device="cuda"), torch.zeros(4, device="cuda")
    x = torch.zeros(2, 4, 32, 32, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both(x, b, f)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = both(x, b, f)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, both(x, b, f), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_graph_break() -> None:
    f, b = upfirdn2d.setup_filter(SHORT, device="cuda"), torch.zeros(4, device="cuda")
    x = image(2, 4, 16, 16)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, b, f), both(x, b, f))


def test_more_than_2_to_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip("less than 40 GiB of free memory")
    x = torch.zeros(3, 64, 4096, 4096, device="cuda", dtype=torch.float16)
    x[-1, -1, -8:, -8:] = 1
    f, b = upfirdn2d.setup_filter(SHORT, device="cuda"), torch.zeros(64, device="cuda", dtype=torch.float16)
    y = upfirdn2d.filter2d(x, f)
    assert x.numel() > 2**31 and (y[-1, -1, -6:-2, -6:-2] == 1).all() and not y[:-1].any()
    z = bias_act.bias_act(x, b + 1, act="lrelu", gain=1)
    assert (z[-1, -1, -8:, -8:] == 2).all() and z[0].eq(1).all()
