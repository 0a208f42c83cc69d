"""Features to a few colours and back: definition against compiled operators, derivatives, what torch asks of one."""

from functools import partial

import helpers
import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops import colours

SHAPES = ((2, 1, 20, 3, 4), (1, 3, 64, 33, 41), (3, 4, 70, 5, 1), (2, 2, 3, 1, 7))  # N, O, C, H, W


def operands(shape, dtype=torch.float64, layout=torch.channels_last) -> list[torch.Tensor]:
    """Features, colours and kernels."""
    n, o, c, h, w = shape
    rng = torch.Generator().manual_seed(c)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(n, c, h, w, generator=rng).to(dtype).contiguous(memory_format=layout)
    return [x, torch.randn(n, o, h, w, generator=rng).to(kind), torch.randn(n, o, c, generator=rng).to(kind)]


def with_gradients(function, leaves) -> list[torch.Tensor]:
    """Result, first derivatives, and second ones of a mixture."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    first = torch.autograd.grad((y.to(torch.float64) ** 2).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((g.double() ** 2).sum() for g in first), leaves)
    return [y, *first, *second]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_sum_with_two_derivatives(shape, layout, ops) -> None:
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 4e-6)):
        x, y, k = operands(shape, dtype, layout)
        for ours, exact, leaves in (
            (colours.few, lambda x, k: torch.einsum("nchw,noc->nohw", x, k), (x, k)),
            (partial(colours.many, dtype=dtype), lambda y, k: torch.einsum("nohw,noc->nchw", y, k), (y, k)),
        ):
            got, wanted = with_gradients(ours, leaves), with_gradients(exact, [t.double() for t in leaves])
            for a, b in zip(got, wanted, strict=True):
                helpers.assert_close(a, b, bound, f"{shape} {dtype}")


def test_bfloat16_features_are_rounded_once(ops) -> None:
    x, y, k = operands(SHAPES[1], torch.bfloat16)
    few, many = colours.few(x, k), colours.many(y, k, torch.bfloat16)
    assert few.dtype == torch.float32 and many.dtype == torch.bfloat16
    exact = torch.einsum("nchw,noc->nohw", x.double(), k.bfloat16().double())
    helpers.assert_close(few, exact, 2**-8, "few")  # as coarse as the features, and no coarser
    exact = torch.einsum("nohw,noc->nchw", y.double(), k.double())
    assert ((many.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_kernels_for_all_images_alike_and_layouts(ops) -> None:
    _, y, k = operands(SHAPES[1])
    shared = k[0].requires_grad_()
    x = colours.many(y, shared.expand(2, -1, -1)[:1], torch.float64)
    assert ops == "torch" or x.is_contiguous(memory_format=torch.channels_last)
    given = torch.randn_like(x)
    dk, = torch.autograd.grad(x, shared, given)
    helpers.assert_close(dk, torch.einsum("nohw,nchw->oc", y, given), 1e-13, "shared kernel")


def test_what_torch_asks_of_an_operator(monkeypatch) -> None:
    monkeypatch.setenv(custom_ops.VARIABLE, "native")
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    x, y, k = (t.requires_grad_() for t in operands((2, 3, 20, 4, 5), torch.float32))
    torch.library.opcheck(colours._operator("colours_few"), (x, k))
    torch.library.opcheck(colours._operator("colours_many"), (y, k, torch.float32))
    torch.library.opcheck(colours._operator("colours_kernels"), (x, y))
    few, many, kernels = (colours._operator(f"colours_{name}") for name in ("few", "many", "kernels"))
    for bad in (
        lambda: few(x, k[:1]), lambda: few(x, k.double()), lambda: few(x[0], k),
        lambda: many(y[:, :2], k, torch.float32), lambda: many(y[0], k, torch.float32),
        lambda: kernels(x, y[..., :2]), lambda: kernels(x, torch.zeros(2, 5, 4, 5)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="wanted|differ"):
            bad()


def test_sums_do_not_depend_on_threads(monkeypatch) -> None:
    monkeypatch.setenv(custom_ops.VARIABLE, "native")
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    x, y, _ = operands((2, 3, 70, 64, 40), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for num in (1, 2, 5):
            torch.set_num_threads(num)
            results.append(colours._operator("colours_kernels")(x, y))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
