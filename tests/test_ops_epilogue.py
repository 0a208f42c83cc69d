"""The operator behind convolutions: definition against fast ways, derivatives, what torch asks of an operator."""

import itertools
import weakref

import helpers
import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops import epilogue

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def arguments(scale, noise, bias, channels=20, size=(3, 4), dtype=torch.float64, layout=torch.channels_last) -> list:
    """x, scale, noise, strength, bias, with gradients where there is one; None for what is left out."""
    rng = torch.Generator().manual_seed(channels)
    parameters = dtype if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(shape, generator=rng, dtype=parameters)

    x = draw(2, channels, *size).to(dtype).contiguous(memory_format=layout).requires_grad_()
    shape = {"map": size, "each": (2, 1, *size)}.get(noise)
    return [
        x,
        draw(2, channels).requires_grad_() if scale else None,
        draw(*shape) if shape else None,
        draw().requires_grad_() if shape else None,
        draw(channels).requires_grad_() if bias else None,
    ]


def derivatives(args, leaves, **options) -> list[torch.Tensor]:
    """Result, first and second derivatives, zeros where there is none."""
    y = epilogue.epilogue(*args, **options)
    rng = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    total = sum((g * torch.randn(g.shape, generator=rng, dtype=torch.float64)).sum() for g in first)
    second = torch.autograd.grad(total, [dy, *leaves], allow_unused=True)
    return [y, *first, *(torch.zeros_like(t) if g is None else g for g, t in zip(second, [dy, *leaves]))]


def test_every_combination_against_the_definition(ops) -> None:
    for scale, noise, bias, act, clamp, channels, layout in itertools.product(
        (False, True), (None, "map", "each"), (False, True), ("linear", "lrelu", "tanh"), (None, 0.5), (3, 20), LAYOUTS
    ):
        args = arguments(scale, noise, bias, channels, layout=layout)
        leaves = [t for t in args if t is not None and t.requires_grad]
        options = {"act": act, "clamp": clamp, "gain": 1.3}
        ours, theirs = (derivatives(args, leaves, impl=impl, **options) for impl in ("cuda", "ref"))
        for a, b in zip(ours, theirs, strict=True):
            helpers.assert_close(a, b, 1e-12, f"{scale} {noise} {bias} {options} {channels}")


def test_many_blocks_in_float32_do_not_depend_on_threads(ops) -> None:
    args = arguments(True, "each", True, 70, (33, 41), torch.float32)
    leaves = [t for t in args if t is not None and t.requires_grad]
    exact = derivatives([None if t is None else t.double() for t in args], leaves, act="lrelu", clamp=2.0, impl="ref")
    threads, results = torch.get_num_threads(), []
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            results.append(derivatives(args, leaves, act="lrelu", clamp=2.0))
    finally:
        torch.set_num_threads(threads)
    for a, b, e in zip(*results, exact, strict=True):
        assert ops == "torch" or torch.equal(a, b)
        helpers.assert_close(a, e, 3e-6, "float32")


def test_bfloat16_is_rounded_once(monkeypatch) -> None:
    monkeypatch.setenv(custom_ops.VARIABLE, "native")
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    args = arguments(True, "map", True, 20, dtype=torch.bfloat16)
    y = epilogue.epilogue(*args, act="lrelu", clamp=1.5)
    exact = epilogue.epilogue(*args, act="lrelu", clamp=1.5, impl="ref")
    assert y.dtype == torch.bfloat16 and (y != exact).double().mean() < 0.01  # an FMA rounds otherwise
    helpers.assert_close(y, exact, 2**-8, "bfloat16")
    leaves = [args[0], args[1], args[3], args[4]]
    grads = torch.autograd.grad(y.float().sum(), leaves)
    assert [g.dtype for g in grads] == [torch.bfloat16, *[torch.float32] * 3]
    for ours, theirs in zip(grads, torch.autograd.grad(exact.float().sum(), leaves), strict=True):
        helpers.assert_close(ours, theirs, 2**-7, "bfloat16 gradient")


@pytest.mark.parametrize("clamp", (None, 1.1))
@pytest.mark.parametrize("act", epilogue.NATIVE_ACTS)
def test_derivatives_by_finite_differences(act, clamp, ops) -> None:
    args = arguments(True, "map", True, 3, (2, 2))

    def call(x, scale, strength, bias):
        return epilogue.epilogue(x, scale, args[2], strength, bias, act=act, clamp=clamp)

    leaves = (args[0], args[1], args[3], args[4])
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("noise", (None, "map", "each"))
@pytest.mark.parametrize("scale", (False, True))
def test_gradients_from_the_result_are_those_from_the_input(scale, noise, dtype, bound, ops) -> None:
    args = arguments(scale, noise, True, 36, (17, 13), dtype)
    if scale:  # like a demodulation's: x is what is divided by it
        args[1] = args[1].detach().abs().add(0.5).requires_grad_()
    leaves = [t for t in args if t is not None and t.requires_grad]
    dy = torch.randn_like(args[0])
    with epilogue.inputs_kept():
        kept = torch.autograd.grad(epilogue.epilogue(*args, act="lrelu"), leaves, dy)
    for a, b in zip(torch.autograd.grad(epilogue.epilogue(*args, act="lrelu"), leaves, dy), kept, strict=True):
        helpers.assert_close(a, b, bound, f"{dtype}")


@pytest.mark.parametrize("scale", (False, True))
def test_what_was_activated_is_not_kept(scale, monkeypatch) -> None:
    """At 256 pixels it is a third of what a step needs; the result, which comes next keeps, is enough."""
    monkeypatch.setenv(custom_ops.VARIABLE, "native")
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    args = arguments(scale, "each", True, 20, dtype=torch.float32)

    def is_kept(**options) -> bool:
        x = args[0] * 1
        y, gone = epilogue.epilogue(x, *args[1:], act="lrelu", **options), weakref.ref(x)
        del x
        return y.grad_fn is not None and gone() is not None

    assert not is_kept() and is_kept(clamp=1.0)
    with epilogue.inputs_kept():
        assert is_kept() == scale


def test_third_derivatives_exist(ops) -> None:
    """Nobody needs them; a wrong zero would be worse than an error."""
    x, scale = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 2, 2), (2, 3)))

    def third(impl):
        y = (epilogue.epilogue(x, scale, impl=impl) ** 3).sum()
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), scale, create_graph=True)
        return y

    helpers.assert_close(third("cuda"), third("ref"), 1e-12, "third derivative")


def test_noise_maps_have_a_gradient(ops) -> None:
    """A projector optimises them."""
    noise = torch.randn(4, 4, requires_grad=True)
    y = epilogue.epilogue(torch.zeros(2, 3, 4, 4), None, noise, torch.tensor(0.5))
    assert torch.equal(torch.autograd.grad(y.sum(), noise)[0], torch.full([4, 4], 3.0))


def test_what_torch_asks_of_an_operator(monkeypatch) -> None:
    monkeypatch.setenv(custom_ops.VARIABLE, "native")
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    x, scale, noise, strength, bias = arguments(True, "map", True, 20, dtype=torch.float32)
    dy, settings = torch.randn_like(x), (0.2, 1.4, 0.5)
    torch.library.opcheck(epilogue._forward(), (x, scale, noise, strength, bias, *settings))
    torch.library.opcheck(epilogue._forward(), (x, None, None, None, bias, *settings))
    torch.library.opcheck(epilogue._grad(), (dy, x, scale, noise, strength, bias, *settings, True))
    with pytest.raises(ValueError, match="wanted"):
        epilogue._forward()(x, scale[:1], noise, strength, bias, *settings)
    with pytest.raises(ValueError, match="one value per pixel"):
        epilogue._forward()(x, scale, noise[:1], strength, bias, *settings)
    with pytest.raises(ValueError, match="only where there is none"):
        epilogue._result_grad()(dy, x, scale, noise, strength, bias, *settings, True)


def test_wrong_use_is_explained() -> None:
    x = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="noise and its strength come together"):
        epilogue.epilogue(x, noise=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="act is 'loud'"):
        epilogue.epilogue(x, act="loud")
    with pytest.raises(ValueError, match="clamp is -1"):
        epilogue.epilogue(x, clamp=-1)
