"""Perceptual path length: closed forms of linear generators, trimming, cropping, and that nothing is left changed."""

import numpy as np
import pytest
import torch
from helpers import assert_close

from metrics.perceptual_path_length import path_length, slerp


class Synthesis(torch.nn.Module):
    """Image = w reshaped, plus its noise buffer."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("noise_const", torch.zeros(side, side))
        self.seen: list[torch.Tensor] = []

    def forward(self, ws, noise_mode, force_fp32):
        assert noise_mode == "const" and force_fp32 and not self.training
        self.seen.append(self.noise_const.clone())
        return ws[:, 0].reshape(-1, 1, self.side, self.side) + self.noise_const


class Linear(torch.nn.Module):
    """w = z (times `gain`), image = w."""

    def __init__(self, side: int = 8, gain: float = 1.0, c_dim: int = 0) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.gain = side * side, c_dim, gain
        self.synthesis = Synthesis(side)

    def mapping(self, z, c):
        assert c.shape == (len(z), self.c_dim)
        return (z * self.gain)[:, None].repeat(1, 3, 1)


def pixels(images):
    assert images.shape[1] == 3
    return images.double().flatten(1)


def test_slerp():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert_close(slerp(a, b, torch.tensor([[1 / 3]])), [[np.cos(np.pi / 6), 0.5]], 1e-6, "slerp")
    assert_close(slerp(a, b, torch.tensor([[1.0]])), [[0.0, 1.0]], 1e-6, "slerp end")


@pytest.mark.parametrize("sampling", ["full", "end"])
def test_closed_form_in_w(sampling):
    # Per pair ‖127.5 (w₂ - w₁)‖² on three equal channels; its mean is 3 · 127.5² · 2 · 64 before trimming.
    G = Linear().double()
    result = path_length(G, pixels, num=400, space="w", sampling=sampling, epsilon=1e-3)
    assert result.mean == pytest.approx(3 * 127.5**2 * 2 * 64, rel=0.03)
    assert result.num == 400 and 390 <= result.num_kept <= 396 and 0.004 < result.std_error / result.mean < 0.02


def test_closed_form_in_z():
    # On the unit sphere a step ε along an arc of angle θ ≈ π/2 has length θ ε.
    result = path_length(Linear().double(), pixels, num=200, space="z", sampling="full", epsilon=1e-3)
    assert result.mean == pytest.approx(3 * 127.5**2 * (np.pi / 2) ** 2, rel=0.03)


def test_crop_takes_the_middle_and_large_images_are_reduced():
    whole = path_length(Linear(16), pixels, num=60, epsilon=1e-2)
    part = path_length(Linear(16), pixels, num=60, epsilon=1e-2, crop=True)
    assert part.mean / whole.mean == pytest.approx(0.25, rel=0.1)
    sizes = []

    def watch(images):
        sizes.append(images.shape[2])
        return pixels(images)

    path_length(Linear(512), watch, num=2)
    assert sizes == [256]


def test_nothing_is_left_changed_and_noise_is_fresh():
    G = Linear(8, c_dim=2).train()
    G.synthesis.noise_const.fill_(7)
    state = torch.get_rng_state()
    labels = torch.eye(2)
    first = path_length(G, pixels, num=4, labels=labels, seed=1)
    assert G.training and bool((G.synthesis.noise_const == 7).all()) and torch.equal(torch.get_rng_state(), state)
    a, b = G.synthesis.seen
    assert not torch.equal(a, b) and not bool((a == 7).any())
    assert path_length(G, pixels, num=4, labels=labels, seed=1) == first
    assert path_length(G, pixels, num=4, labels=labels, seed=2) != first


def test_refusals():
    with pytest.raises(ValueError, match="space 'x'"):
        path_length(Linear(), pixels, num=4, space="x")
    with pytest.raises(ValueError, match="at least 2"):
        path_length(Linear(), pixels, num=1)
    with pytest.raises(ValueError, match="labels of 2 numbers"):
        path_length(Linear(c_dim=2), pixels, num=4)
