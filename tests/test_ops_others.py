"""Grid sampling, fused multiply-add and the convolution names."""

import helpers
import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops import conv2d_gradfix, fma, grid_sample_gradfix


def places(rng, *shape, dtype=torch.float64):
    """Random places in [-1.4, 1.4], some of them outside of the image."""
    return (torch.rand(*shape, 2, generator=rng, dtype=dtype) * 2.8 - 1.4).requires_grad_()


SAMPLERS = {
    "grid_sample": grid_sample_gradfix.grid_sample,
    "own second derivative": grid_sample_gradfix.TwiceDifferentiable.apply,
    "by neighbours": grid_sample_gradfix.sample_by_neighbours,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_grid_sampling_equals_torch_with_two_derivatives(name) -> None:
    sampler, rng = SAMPLERS[name], torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 5, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    grid = places(rng, 2, 6, 3)
    with torch.no_grad():
        grid[0, 0, 0] = torch.tensor([0.25, 0.2])  # exactly on a pixel: the derivative is that of the side to the right
    y = sampler(image, grid)
    expected = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    helpers.assert_close(y, expected, 1e-12, "y")
    v = torch.randn(y.shape, generator=rng, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(t, [image, grid], v) for t in (y, expected))):
        helpers.assert_close(a, b, 1e-12, "gradient")


@pytest.mark.parametrize("name", SAMPLERS)
def test_grid_sampling_by_finite_differences(name) -> None:
    rng = torch.Generator().manual_seed(1)
    image = torch.randn(1, 2, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    grid = places(rng, 1, 2, 3)
    assert torch.autograd.gradcheck(SAMPLERS[name], (image, grid))
    assert torch.autograd.gradgradcheck(SAMPLERS[name], (image, grid))


def test_grid_sampling_where_torch_has_no_second_derivative(monkeypatch) -> None:
    monkeypatch.setattr(grid_sample_gradfix, "torch_differentiates_twice", lambda: False)
    rng = torch.Generator().manual_seed(2)
    image, grid = torch.randn(1, 1, 3, 3, generator=rng, requires_grad=True), places(rng, 1, 2, 2, dtype=torch.float32)
    y = grid_sample_gradfix.grid_sample(image, grid)
    assert "TwiceDifferentiable" in type(y.grad_fn).__name__
    (first,) = torch.autograd.grad(y.square().sum(), image, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), image)
    assert second.abs().sum() > 0
    with torch.no_grad():
        assert grid_sample_gradfix.grid_sample(image, grid).grad_fn is None


def test_the_probe_is_honest(monkeypatch) -> None:
    """It must say no where the second derivative raises."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, image, grid):
            ctx.save_for_backward(image, grid)
            return F.grid_sample(image, grid, align_corners=False)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dy):
            modes = dict(interpolation_mode=0, padding_mode=0, align_corners=False, output_mask=[True, True])
            return torch.ops.aten.grid_sampler_2d_backward(dy, *ctx.saved_tensors, **modes)

    probe = grid_sample_gradfix.torch_differentiates_twice.__wrapped__
    with torch.no_grad():
        assert isinstance(probe(), bool)
    monkeypatch.setattr(grid_sample_gradfix, "_sample", Once.apply)
    assert probe() is False


def test_fma() -> None:
    rng = torch.Generator().manual_seed(3)
    a = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 1, generator=rng, dtype=torch.float64, requires_grad=True)
    c = torch.randn(1, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    helpers.assert_close(fma.fma(a, b, c), (a * b + c).detach(), 1e-14, "fma")
    assert torch.autograd.gradcheck(fma.fma, (a, b, c)) and torch.autograd.gradgradcheck(fma.fma, (a, b, c))
    mixed = fma.fma(torch.ones(2, dtype=torch.float16), torch.ones(2), torch.ones(2))
    assert mixed.dtype == torch.float32 and mixed.tolist() == [2.0, 2.0]


def test_convolutions_are_torchs() -> None:
    rng = torch.Generator().manual_seed(4)
    x, w = torch.randn(2, 4, 6, 5, generator=rng), torch.randn(6, 2, 3, 3, generator=rng)
    bias = torch.randn(6, generator=rng)
    y = conv2d_gradfix.conv2d(x, w, bias, stride=2, padding=(1, 0), dilation=1, groups=2)
    assert torch.equal(y, F.conv2d(x, w, bias, stride=2, padding=(1, 0), groups=2))
    w = torch.randn(4, 3, 3, 3, generator=rng)
    y = conv2d_gradfix.conv_transpose2d(x, w, bias, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
    assert torch.equal(y, F.conv_transpose2d(x, w, bias, 2, 1, 1, 2, 2))


def test_no_weight_gradients_restores_its_flag() -> None:
    assert not conv2d_gradfix.weight_gradients_disabled
    with pytest.raises(KeyError):
        with conv2d_gradfix.no_weight_gradients():
            assert conv2d_gradfix.weight_gradients_disabled
            with conv2d_gradfix.no_weight_gradients(disable=False):
                assert conv2d_gradfix.weight_gradients_disabled
            raise KeyError
    assert not conv2d_gradfix.weight_gradients_disabled
    assert conv2d_gradfix.enabled is False and grid_sample_gradfix.enabled is False
