"""Small fully connected layers and demodulation: definition against compiled operators, derivatives, checks."""

import helpers
import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops import dense

SHAPES = ((1, 1, 1), (3, 5, 37), (8, 66, 100), (13, 4, 33), (16, 3, 8), (2, 129, 64))  # N, O, I
KERNELS = ((1, 1, 1, 1), (3, 5, 37, 3), (8, 66, 20, 3), (13, 4, 17, 1), (5, 2, 64, 5))  # N, O, I, k


def numbers(*shape, dtype=torch.float64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def with_gradients(function, leaves) -> list[torch.Tensor]:
    """Result, first derivatives, the same without a graph, and second derivatives of a mixture."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    plain = torch.autograd.grad((function(*leaves) ** 2).sum(), leaves)
    first = torch.autograd.grad((y**2).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
    return [y, *first, *plain, *second]


def layer(x, w, b=None, act="lrelu"):
    """The definition, in float64."""
    u = 0.3 * x @ w.t() + (0 if b is None else 0.7 * b)
    return u if act == "linear" else torch.nn.functional.leaky_relu(u, 0.2) * 2**0.5


def scales(s, w):
    """Eq. 3, Karras et al. 2020, as it stands there."""
    return ((w[None] * s[:, None, :, None, None]).square().sum(dim=(2, 3, 4)) + 1e-8).rsqrt()


@pytest.mark.parametrize("act", ["linear", "lrelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_is_its_formula_with_two_derivatives(shape, act, ops) -> None:
    n, o, i = shape
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 4e-6)):
        for leaves in ((numbers(n, i), numbers(o, i), numbers(o)), (numbers(n, i), numbers(o, i))):
            rounded = [t.to(dtype) for t in leaves]
            got = with_gradients(lambda x, w, b=None: dense.dense(x, w, b, 0.3, 0.7, act), rounded)
            wanted = with_gradients(lambda x, w, b=None: layer(x, w, b, act), [t.double() for t in rounded])
            assert got[0].dtype == dtype
            for k, (a, b) in enumerate(zip(got, wanted, strict=True)):
                helpers.assert_close(a, b, bound, f"{shape} {act} {dtype} {k}")


@pytest.mark.parametrize("shape", KERNELS)
def test_demodulation_is_its_formula_with_two_derivatives(shape, ops) -> None:
    n, o, i, k = shape
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 4e-6)):
        rounded = [1 + numbers(n, i).to(dtype) / 4, numbers(o, i, k, k).to(dtype)]
        got, wanted = with_gradients(dense.demodulation, rounded), with_gradients(scales, [t.double() for t in rounded])
        for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
            helpers.assert_close(a, b, bound, f"{shape} {dtype} {index}")


def test_gradients_of_gradients(ops) -> None:
    x, w, b = numbers(3, 7), numbers(4, 7), numbers(4)
    s, kernel = 1 + numbers(3, 7) / 4, numbers(4, 7, 2, 2)
    for function, leaves in (
        (lambda x, w, b: dense.dense(x, w, b, 0.3, 0.7, "lrelu"), (x, w, b)),
        (dense.demodulation, (s, kernel)),
    ):
        leaves = [t.requires_grad_() for t in leaves]
        assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)


def test_only_what_is_asked_for(ops) -> None:
    x, w, b = numbers(5, 40), numbers(6, 40), numbers(6)
    for learning in ((0,), (1,), (2,), (0, 2), (1, 2)):
        leaves = [t.clone().requires_grad_(i in learning) for i, t in enumerate((x, w, b))]
        dense.dense(*leaves, 0.3, 0.7, "lrelu").square().sum().backward()
        exact = [t.clone().requires_grad_() for t in (x, w, b)]
        layer(*exact).square().sum().backward()
        for i, (a, e) in enumerate(zip(leaves, exact)):
            assert (a.grad is None) == (i not in learning)
            if a.grad is not None:
                helpers.assert_close(a.grad, e.grad, 1e-12, f"{learning} {i}")


def test_samples_with_gaps_and_transposed_weights(ops) -> None:
    ws, w = numbers(4, 3, 40), numbers(40, 6).t()
    for x in (ws[:, 1], numbers(40, 4).t()):
        helpers.assert_close(dense.dense(x, w), x @ w.t(), 1e-13, "strides")
    kernel = numbers(5, 8, 3, 3)
    last = kernel.contiguous(memory_format=torch.channels_last)
    helpers.assert_close(dense.demodulation(ws[:, 1, :8], last), scales(ws[:, 1, :8], kernel), 1e-12, "layouts")


def test_what_torch_asks_of_an_operator(monkeypatch) -> None:
    monkeypatch.setenv(custom_ops.VARIABLE, "native")
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    x, w, b = (numbers(*shape, dtype=torch.float32) for shape in ((4, 20), (6, 20), (6,)))
    s, kernel = numbers(4, 5, dtype=torch.float32), numbers(6, 5, 3, 3, dtype=torch.float32)
    run, demodulate = dense._operator("dense"), dense._operator("demodulation")
    y, (scale, energy) = run(x, w, b, 0.3, 0.7, 0.2, 1.4), demodulate(s, kernel)
    settings = (0.3, 0.7, 0.2, 1.4)
    torch.library.opcheck(dense._operator("dense_grad"), (y, x, y, w, *settings, True, False, True))
    torch.library.opcheck(dense._operator("demodulation_grad"), (scale, s, kernel, scale, energy, True, False))
    torch.library.opcheck(run, tuple(t.clone().requires_grad_() for t in (x, w, b)) + settings)
    torch.library.opcheck(run, (x.clone().requires_grad_(), w, None, *settings))
    torch.library.opcheck(demodulate, (s.clone().requires_grad_(), kernel.clone().requires_grad_()))
    for bad in (
        lambda: run(x, w[:, :3], b, *settings), lambda: run(x, w, b[:2], *settings), lambda: run(x[0], w, b, *settings),
        lambda: run(x.double(), w, b, *settings), lambda: run(x.half(), w.half(), None, *settings),
        lambda: demodulate(s[:, :2], kernel), lambda: demodulate(s, kernel[0]), lambda: demodulate(s.double(), kernel),
        lambda: dense._operator("dense_grad")(y[:2], x, y, w, *settings, True, True, True),
        lambda: dense._operator("demodulation_grad")(scale[:2], s, kernel, scale, energy, True, True),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="wanted"):
            bad()


def test_sums_do_not_depend_on_threads(monkeypatch) -> None:
    monkeypatch.setenv(custom_ops.VARIABLE, "native")
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    x, w, kernel = (numbers(*shape, dtype=torch.float32) for shape in ((13, 517), (203, 517), (67, 517, 3, 3)))
    threads, results = torch.get_num_threads(), []
    try:
        for num in (1, 2, 5):
            torch.set_num_threads(num)
            leaves = [t.clone().requires_grad_() for t in (x, w, kernel)]
            y, s = dense.dense(leaves[0], leaves[1], act="lrelu"), dense.demodulation(leaves[0], leaves[2])
            (y.square().sum() + s.square().sum()).backward()
            results.append([y, s, *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
