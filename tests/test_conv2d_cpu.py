"""The compiled convolutions: the exact sum in float64, derivatives, stored numbers, what torch asks of an operator."""

import helpers
import pytest
import test_gan_loss
import test_networks
import test_ops_conv2d_resample
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from torch_utils import custom_ops, op_build
from torch_utils.ops import conv2d_cpu, conv2d_gradfix, epilogue

# Winograd's transforms lose about two bits against a direct sum, which has 5e-7 here; its usual sample points four.
BOUND = 3e-6
CASES = [  # images, input channels, output channels, height and width of the input, stride, padding
    (2, 20, 40, (9, 7), 1, (1, 1)),
    (1, 3, 5, (1, 1), 1, (1, 1)),
    (1, 33, 64, (16, 4), 1, (0, 2)),
    (3, 5, 33, (13, 30), 1, (2, 1)),
    (2, 70, 31, (3, 21), 1, (0, 0)),
    (2, 32, 40, (15, 9), 2, (0, 0)),
    (3, 64, 20, (16, 35), 2, (0, 0)),
    (1, 7, 32, (3, 4), 2, (0, 0)),
    (2, 40, 33, (17, 11), 2, (0, 0)),
    (1, 5, 3, (3, 3), 2, (0, 0)),
    (32, 64, 66, (17, 18), 2, (0, 0)),  # tiles enough for every algorithm
    (49, 64, 64, (8, 8), 1, (1, 1)),  # gradients to weights in two portions of tiles, the last of one block
]


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """Our code wherever it can be used, also where it isn't faster; yields how often it was chosen."""
    try:
        op_build.build(op_build.PLUGINS["cpu"])
    except op_build.NoToolsError as e:
        pytest.skip(str(e))
    count = dict.fromkeys(("conv2d", "conv2d_input", "conv2d_weight"), 0)

    def always(kind, *_):
        count[kind] += 1
        return True

    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "native")
    monkeypatch.setattr(conv2d_cpu, "pays", always)
    assert custom_ops.selected() == "native"
    return count


def operands(case, seed=0):
    n, c, o, size, stride, padding = case
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, *size, generator=rng)
    w = torch.randn(o, c, 3, 3, generator=rng)
    y = F.conv2d(x.double(), w.double(), None, stride, padding)
    return x, w, torch.randn(y.shape, generator=rng), y


@pytest.mark.parametrize("case", CASES)
def test_is_the_sum_with_two_derivatives(case, native) -> None:
    *_, stride, padding = case
    x, w, dy, exact = operands(case)
    u, v = torch.randn_like(x), torch.randn_like(w)
    results = []
    for kind in (torch.float32, torch.float64):
        function = conv2d_gradfix.conv2d if kind == torch.float32 else F.conv2d
        a, b, c = (t.to(kind).requires_grad_() for t in (x, w, dy))
        y = function(a, b, None, stride, padding)
        first = torch.autograd.grad(y, (a, b), c, create_graph=True)
        second = torch.autograd.grad(first, (a, b, c), (u.to(kind), v.to(kind)))
        results.append((y, *first, *second))
    helpers.assert_close(results[1][0], exact, 1e-15, "float64")
    for ours, theirs, name in zip(*results, ("y", "dx", "dw", "d2x", "d2w", "d2dy")):
        helpers.assert_close(ours, theirs, BOUND, f"{name} of {case}")
    assert all(native.values()), native


@pytest.mark.parametrize("case", CASES)
def test_transposed(case, native) -> None:
    *_, stride, padding = case
    x, w, dy, _ = operands(case)
    results = []
    for kind in (torch.float32, torch.float64):
        function = conv2d_gradfix.conv_transpose2d if kind == torch.float32 else F.conv_transpose2d
        a, b = dy.to(kind).requires_grad_(), w.to(kind).requires_grad_()
        y = function(a, b, None, stride, padding)
        results.append((y, *torch.autograd.grad(y, (a, b), torch.ones_like(y) + y.detach())))
    for ours, theirs, name in zip(*results, ("y", "dx", "dw")):
        helpers.assert_close(ours, theirs, BOUND, f"transposed {name} of {case}")
    assert native["conv2d_input"] and native["conv2d"] and native["conv2d_weight"]


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_rounded_once(case, native) -> None:
    """Sums in float32: half a unit in the last place of the exact result, and what float32 itself is off."""
    *_, stride, padding = case
    x, w, dy, _ = (t.bfloat16() for t in operands(case))
    results = []
    for kind in (torch.bfloat16, torch.float64):
        function = conv2d_gradfix.conv2d if kind == torch.bfloat16 else F.conv2d
        a, b = x.to(kind).requires_grad_(), w.to(kind).requires_grad_()
        y = function(a, b, None, stride, padding)
        results.append((y, *torch.autograd.grad(y, (a, b), dy.to(kind))))
    for ours, theirs, name in zip(*results, ("y", "dx", "dw")):
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - theirs).abs()
        assert (error <= theirs.abs() * 2**-8 + theirs.abs().max() * BOUND).all(), f"{name} of {case}"
    assert native["conv2d_weight"]


def test_layouts_and_bias(native) -> None:
    x, w, _, exact = operands(CASES[0])
    b = torch.linspace(-1, 1, 40)
    x_wide, w_wide = torch.empty(2, 25, 9, 7), torch.empty(3, 3, 40, 20)
    x_wide[:, 3:23] = x
    w_wide[:] = w.permute(2, 3, 0, 1)
    for image in (x, x.contiguous(memory_format=torch.channels_last), x_wide[:, 3:23]):
        for kernel in (w, w.contiguous(memory_format=torch.channels_last), w_wide.permute(2, 3, 0, 1)):
            y = conv2d_gradfix.conv2d(image, kernel, b, padding=1)
            assert y.is_contiguous(memory_format=torch.channels_last)
            helpers.assert_close(y, exact + b[:, None, None].double(), BOUND, "layout")
    assert native["conv2d"] >= 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_weights_give_the_same_numbers(dtype) -> None:
    for n, c, o, size in ((2, 20, 40, (9, 7)), (1, 33, 64, (16, 4)), (1, 64, 5, (1, 1))):
        x, w, _, _ = operands((n, c, o, size, 1, (1, 1)))
        x, w = x.to(dtype), w.to(dtype)
        y = conv2d_cpu.conv2d_prepared(x, conv2d_cpu.prepare(w), o)
        assert y.dtype == dtype and torch.equal(y, conv2d_cpu.conv2d(x, w, 1, (1, 1)))
        if dtype == torch.float32:
            w = w.transpose(0, 1)
            y = conv2d_cpu.conv2d_prepared(x, conv2d_cpu.prepare(w, transposed=True), o, transposed=True)
            assert torch.equal(y, conv2d_gradfix.conv_transpose2d(x, w, stride=2))
            helpers.assert_close(y, F.conv_transpose2d(x.double(), w.double(), stride=2), BOUND, "prepared")
    with pytest.raises(RuntimeError, match="no gradient"):
        conv2d_cpu.conv2d_prepared(x.requires_grad_(), conv2d_cpu.prepare(w), o).sum().backward()


@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[10]])
def test_any_number_of_threads_gives_the_same_numbers(case) -> None:
    *_, stride, padding = case
    x, w, dy, _ = operands(case)
    threads = torch.get_num_threads()
    results = []
    try:
        for num in (1, 2, 5):
            torch.set_num_threads(num)
            settings = stride, padding
            results.append((
                conv2d_cpu.conv2d(x, w, *settings), conv2d_cpu.conv2d_input(dy, w, x.shape[2:], *settings),
                conv2d_cpu.conv2d_weight(x, dy, *settings),
            ))  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(ours, other) for ours, other in zip(results[0], others))


def test_rounding_errors_are_those_of_the_sample_points() -> None:
    """At the width of a real layer: root mean square error against float64, direct sum beside it."""
    rng = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=rng) for shape in ((2, 256, 16, 16), (64, 256, 3, 3), (2, 64, 16, 16)))
    def direct(x, w, dy):
        return F.conv2d(x, w, padding=1), F.conv_transpose2d(dy, w, padding=1), conv2d_weight(x, w.shape, dy, padding=1)

    settings = 1, (1, 1)
    y, dx = conv2d_cpu.conv2d(x, w, *settings), conv2d_cpu.conv2d_input(dy, w, (16, 16), *settings)
    ours = y, dx, conv2d_cpu.conv2d_weight(x, dy, *settings)
    exact = direct(x.double(), w.double(), dy.double())
    for name, a, d, e, bound in zip(("y", "dx", "dw"), ours, direct(x, w, dy), exact, (2e-6, 1.5e-6, 3e-6)):
        error, least = ((t.double() - e).square().mean().sqrt() / e.square().mean().sqrt() for t in (a, d))
        assert least < error < bound, f"{name}: {error:.1e}, direct {least:.1e}"


def test_infinities_and_nans_arrive(native) -> None:
    for value in (torch.nan, torch.inf):
        x = torch.ones(1, 32, 12, 12)
        x[0, 3, 5, 6] = value
        for stride in (1, 2):
            y = conv2d_gradfix.conv2d(x, torch.ones(32, 32, 3, 3), stride=stride)
            expected = F.conv2d(x, torch.ones(32, 32, 3, 3), stride=stride)
            assert not y[~expected.isfinite()].isfinite().any()  # Winograd spreads them over a tile


def test_weight_gradients_can_be_left_out(native) -> None:
    x, w = torch.randn(1, 32, 8, 8, requires_grad=True), torch.randn(32, 32, 3, 3, requires_grad=True)
    y = conv2d_gradfix.conv2d(x, w, padding=1)
    with conv2d_gradfix.no_weight_gradients(), torch.profiler.profile() as first:
        dx, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with torch.profiler.profile() as second:
        dw, = torch.autograd.grad(dx.square().sum(), w)
    names = [[event.name for event in part.events()] for part in (first, second)]
    assert [each.count("stylegan_rooted::conv2d_weight") for each in names] == [0, 2]
    a, b = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    da, = torch.autograd.grad(F.conv2d(a, b, padding=1).square().sum(), a, create_graph=True)
    helpers.assert_close(dw, torch.autograd.grad(da.square().sum(), b)[0], 3e-6, "R1's gradient")


def test_goldens_of_the_operators(data_dir, native) -> None:
    test_ops_conv2d_resample.check_goldens(data_dir / "ops_conv2d_resample.npz")
    assert min(native.values()) > 0


def test_goldens_of_the_networks(goldens, monkeypatch, native) -> None:
    """Images as exact as by torch. Gradients, too, but for one network of nine: there a value so near to 0 that
    rounding decides its sign falls to the other side of the activation's kink, and all gradients follow."""
    errors: list[float] = []

    def note(actual, expected, rel, what=""):
        a, e = helpers.as_array(actual), helpers.as_array(expected)
        errors.append(float(abs(a - e).max()) / (float(abs(e).max()) or 1.0))

    worst = []
    for name in test_networks.NAMES:
        pair = test_networks.load_pair(goldens / f"networks_{name}.npz")
        test_networks.check_outputs(pair)
        with monkeypatch.context() as patch:
            patch.setattr(helpers, "assert_close", note)
            test_networks.check_gradients(pair, False)
        worst.append(max(errors))
        errors.clear()
    assert sorted(worst)[-2] <= test_networks.GRADIENT_BOUND and max(worst) < 5e-3, worst
    assert native["conv2d"] > 300 and native["conv2d_input"] > 100 and native["conv2d_weight"] > 10, native


def test_goldens_of_the_training_phases(goldens, monkeypatch, native) -> None:
    test_gan_loss.fixed_noise.__wrapped__(monkeypatch)
    test_gan_loss.test_every_golden_phase(test_gan_loss.Goldens(goldens / "loss_phases.npz"), None)
    assert min(native.values()) > 100, native


@pytest.mark.parametrize("noise", [None, "map", "each"])
@pytest.mark.parametrize("clamp", [None, 30.0])
def test_a_layer_at_once_is_its_three_steps(noise, clamp) -> None:
    torch.manual_seed(1)
    for n, c, o, size in ((2, 20, 40, (9, 7)), (3, 64, 33, (4, 8)), (1, 5, 3, (1, 2))):
        x, w, _, _ = operands((n, c, o, size, 1, (1, 1)))
        styles, scale = torch.randn(n, c), torch.rand(n, 2 * o)[:, :o]
        bias, strength = torch.randn(o), None if noise is None else torch.tensor(0.3)
        level = None if noise is None else torch.randn(size if noise == "map" else (n, 1, *size))
        settings = "lrelu", 1.3, clamp
        for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 2**-6)):  # the three steps round three times
            image, u = x.to(dtype), conv2d_cpu.prepare(w)
            y = conv2d_cpu.bound_layer(u, o, *epilogue.native_settings(*settings))(
                image, styles, scale, level, strength, bias
            )
            steps = conv2d_cpu.conv2d_prepared((image * styles[:, :, None, None]).to(dtype), u, o)
            steps = epilogue.epilogue(steps, scale, level, strength, bias, *settings)
            assert y.dtype == dtype
            helpers.assert_close(y, steps, bound, f"{dtype} {size}")
        u = conv2d_cpu.prepare(w.transpose(0, 1), transposed=True)
        y = conv2d_cpu.bound_modulated(u, o, transposed=True)(x, styles)
        steps = conv2d_cpu.conv2d_prepared(x * styles[:, :, None, None], u, o, transposed=True)
        helpers.assert_close(y, steps, 1e-6, f"transposed {size}")


@pytest.mark.parametrize("own", [0b111, 0])
@pytest.mark.parametrize("case", [CASES[0], CASES[5]])
def test_what_torch_asks_of_an_operator(case, own) -> None:
    *_, stride, padding = case
    x, w, dy, _ = operands(case)
    x, dy = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, dy))
    w.requires_grad_()
    torch.library.opcheck(conv2d_cpu._operator("conv2d"), (x, w, stride, *padding, own))
    torch.library.opcheck(conv2d_cpu._operator("conv2d_input"), (dy, w, *x.shape[2:], stride, *padding, own))
    torch.library.opcheck(conv2d_cpu._operator("conv2d_weight"), (x, dy, stride, *padding, own))


def test_wrong_use_is_explained() -> None:
    x, w = torch.zeros(1, 4, 8, 8), torch.zeros(5, 4, 3, 3)
    names = ("conv2d", "conv2d_input", "conv2d_weight", "conv2d_prepared")
    forward, to_input, to_weight, prepared = (conv2d_cpu._operator(name) for name in names)
    for bad in (
        lambda: forward(x[0], w, 1, 1, 1, True),
        lambda: forward(x.double(), w.double(), 1, 1, 1, True),
        lambda: forward(x, w.bfloat16(), 1, 1, 1, True),
        lambda: forward(x, w[:, :3], 1, 1, 1, True),
        lambda: forward(x, w[..., :2], 1, 1, 1, True),
        lambda: forward(x, w, 1, 3, 1, True),
        lambda: forward(x, w, 2, 1, 1, True),
        lambda: forward(x, w, 0, 1, 1, True),
        lambda: forward(x[..., :2, :2], w, 1, 0, 0, True),
        lambda: to_input(x, w, 8, 8, 1, 1, 1, True),
        lambda: to_input(torch.zeros(1, 5, 8, 8), w, 9, 8, 1, 1, 1, True),
        lambda: to_weight(x, torch.zeros(2, 5, 8, 8), 1, 1, 1, True),
        lambda: conv2d_cpu.prepare(w[..., :2]),
        lambda: prepared(x, torch.zeros(10), 5),
        lambda: prepared(x, conv2d_cpu.prepare(w), 5, True),
        lambda: prepared(x.bfloat16(), conv2d_cpu.prepare(w, transposed=True), 3, True),
        lambda: conv2d_cpu.prepare(w.bfloat16(), transposed=True),
        lambda: prepared(x, conv2d_cpu.prepare(w), 5, False, torch.zeros(1, 5)),
        lambda: prepared(x, conv2d_cpu.prepare(w), 5, False, None, torch.zeros(1, 5)),
        lambda: prepared(x, conv2d_cpu.prepare(w), 5, False, None, x[:, 0, 0, :5], x[0, 0], None, x[0, 0, 0, :5]),
        lambda: to_weight(x, torch.zeros(1, 5, 8, 7), 1, 1, 1, True),
    ):
        with pytest.raises(ValueError, match="wanted|smaller|differ|don't fit"):
            bad()
