"""Low-rank adapters on the generator's modulated convolutions (Hu et al. 2021, arXiv:2106.09685).

Each convolution's kernel W [O, I, k, k] is the base's plus scale * up @ down, with up [O, r] and down [r, I k k]. The
networks always hold the sum, so they compute, are saved and are read like any others; only the optimiser sees the
factors. G and G_ema share the base, which is the average that fine-tuning started from, and G_ema's sum comes from the
moving average of the factors: so a file of these factors, merged into the base, gives G_ema again to the last bit.
"""

import hashlib
import math
from typing import Any

import torch

from torch_utils import seeding

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def modulated_convolutions(G: torch.nn.Module) -> dict[str, Any]:
    """The layers that adapters act on, by name."""
    return {name: layer for name, layer in G.named_modules() if hasattr(layer, "affine")}


def kernel(base: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """base + up @ down / sqrt(rank), of the base's shape [O, I, k, k]."""
    return base + ((up @ down) * (1 / math.sqrt(len(down)))).reshape(base.shape)


def fingerprint(G: torch.nn.Module) -> str:
    """SHA-256 of a generator's numbers, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(G.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def merge(G: torch.nn.Module, factors: Factors) -> None:
    """Add adapters to a generator, in place.

    Args:
        G: the base they were made for.
        factors: (up, down) by layer name, as `LowRankAdapters.averaged`.

    Raises:
        ValueError: they belong to a generator of another shape.
    """
    layers = modulated_convolutions(G)
    for name, (up, down) in factors.items():
        shape = None if name not in layers else (len(layers[name].weight), layers[name].weight[0].numel())
        if shape != (len(up), down.shape[-1]) or up.shape[-1] != len(down):
            raise ValueError(f"the adapter of {name!r} does not fit this generator; it was made for another base")
    with torch.no_grad():
        for name, (up, down) in factors.items():
            layers[name].weight.copy_(kernel(layers[name].weight, up.to(layers[name].weight), down))


class LowRankAdapters:
    """The factors of one run, their moving average, and their Adam; an optimiser to whoever steps it.

    Args:
        G: generator in training; it becomes a copy of G_ema, the base.
        G_ema: moving average.
        rank: of each product; never more than the kernel's own.
        adam: makes the optimiser of a list of parameters.
        seed: of the first factors' numbers.
    """

    def __init__(self, G: torch.nn.Module, G_ema: torch.nn.Module, *, rank: int, adam: Any, seed: int) -> None:
        G.load_state_dict(G_ema.state_dict())
        self.base_fingerprint = fingerprint(G_ema)
        self._layers, self._averages = modulated_convolutions(G), modulated_convolutions(G_ema)
        self._base = {name: layer.weight.detach().clone() for name, layer in self._layers.items()}
        self._factors: Factors = {}
        for name, weight in self._base.items():
            flat = weight.flatten(1)
            num = min(rank, *flat.shape)
            random = seeding.generator(seed, "adapters", name)
            down = torch.randn([num, flat.shape[1]], generator=random).to(weight.device)
            up = torch.zeros([len(flat), num], device=weight.device)  # so that everything starts as the base
            self._factors[name] = (up, down)
        self._mean: Factors = {name: (up.clone(), down.clone()) for name, (up, down) in self._factors.items()}
        self._adam = adam([factor for pair in self._factors.values() for factor in pair])

    @property
    def averaged(self) -> Factors:
        """The moving averages of the factors, whose product G_ema holds."""
        return self._mean

    @property
    def num_parameters(self) -> int:
        """Numbers that learn."""
        return sum(factor.numel() for pair in self._factors.values() for factor in pair)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Adam's own, as every optimiser has them: what is stepped, and its rates."""
        return self._adam.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the kernels' gradients."""
        for layer in self._layers.values():
            layer.weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Turn the kernels' gradients into those of the factors, step, and put the new kernels in place."""
        for name, (up, down) in self._factors.items():
            gradient = self._layers[name].weight.grad
            if gradient is None:
                up.grad = down.grad = None
                continue
            slope = gradient.flatten(1) * (1 / math.sqrt(len(down)))  # [O, I k k]
            up.grad, down.grad = slope @ down.t(), up.t() @ slope
        self._adam.step()
        for name, (up, down) in self._factors.items():
            self._layers[name].weight.copy_(kernel(self._base[name], up, down))

    @torch.no_grad()
    def update_average(self, beta: float) -> None:
        """Move the averages to factor + (average - factor) * beta, and put G_ema's kernels in place."""
        for name, pair in self._factors.items():
            for mean, factor in zip(self._mean[name], pair):
                mean.lerp_(factor, 1 - beta)
            self._averages[name].weight.copy_(kernel(self._base[name], *self._mean[name]))

    def state_dict(self) -> dict[str, Any]:
        """Factors, averages and Adam; the base is that of the file the run started from."""
        return {
            "adam": self._adam.state_dict(),
            "factors": {name: list(pair) for name, pair in self._factors.items()},
            "averages": {name: list(pair) for name, pair in self._mean.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for own, saved in ((self._factors, state["factors"]), (self._mean, state["averages"])):
            for name, pair in own.items():
                for tensor, value in zip(pair, saved[name]):
                    tensor.copy_(value)
        self._adam.load_state_dict(state["adam"])
