"""Perceptual path length of a generator: how much its images change per step in latent space.

Knows a generator by its `mapping` and `synthesis`, and a perceptual distance as a function; knows no data set.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torch_utils import seeding

SPACES = ("z", "w")
SAMPLINGS = ("full", "end")

Perceive = Callable[[torch.Tensor], torch.Tensor]
"""Images float [N, 3, H, W] in [0, 255] to rows whose squared Euclidean distance is the perceptual one."""


@dataclass(frozen=True)
class PathLength:
    """Perceptual path length; lower is smoother.

    Attributes:
        mean: Mean of the kept distances / ε².
        std_error: Their standard deviation / √kept. The two cuts move with the sample too, so it is a little small.
        num_kept: Distances between the 1st and the 99th percentile.
        num: All.
    """

    mean: float
    std_error: float
    num_kept: int
    num: int


def path_length(
    G: Any,
    perceive: Perceive,
    *,
    num: int,
    space: str = "w",
    sampling: str = "end",
    crop: bool = False,
    epsilon: float = 1e-4,
    labels: torch.Tensor | None = None,
    seed: int = 0,
    batch_size: int = 2,
    device: torch.device | str = "cpu",
) -> PathLength:
    """Mean perceptual distance of images an ε apart on paths between random latents, divided by ε².

    Both images of a pair share their noise maps, drawn anew per batch; everything runs in float32. The generator's
    noise buffers, its mode and the global random streams are the same afterwards.

    Args:
        G: Generator with `mapping(z, c)`, `synthesis(ws, noise_mode="const")`, `z_dim`, `c_dim`; already on `device`.
        perceive: See `Perceive`.
        num: Pairs; at least 2.
        space: `w` interpolates between mapped latents (linearly), `z` between latents (spherically).
        sampling: `full` takes a uniform place on the path, `end` its start.
        crop: Cut the rows from 3/8 to 7/8 and the columns from 2/8 to 6/8: the face, in aligned portraits.
        epsilon: Step along the path, of length 1.
        labels: Conditional networks: rows [M, c_dim] to draw from.
        seed: Of latents, places, labels and noise.
        batch_size: Pairs at once. Latents depend on (seed, pair) alone, noise on the batch too.
        device: Where `G` is.

    Raises:
        ValueError: For an unknown space or sampling, or labels that do not fit.

    Source: Karras et al. 2019, section 4.1; spec section 6, PPL.
    """
    if space not in SPACES or sampling not in SAMPLINGS:
        raise ValueError(f"got space {space!r} and sampling {sampling!r}, wanted {SPACES} and {SAMPLINGS}")
    if num < 2:
        raise ValueError(f"got {num} pairs, a path length needs at least 2")
    if G.c_dim and (labels is None or not len(labels) or labels.shape[1] != G.c_dim):
        raise ValueError(f"the network wants labels of {G.c_dim} numbers; pass the data set's label rows")
    pool = labels if G.c_dim else torch.zeros(1, 0)
    assert pool is not None
    distances = []
    for first in range(0, num, batch_size):
        pairs = range(first, min(first + batch_size, num))
        streams = [seeding.generator(seed, "evaluate", "paths", i) for i in pairs]
        ends = torch.stack([torch.randn(2, int(G.z_dim), generator=stream) for stream in streams])
        place = torch.stack([torch.rand(1, generator=stream) for stream in streams])
        c = torch.stack([pool[int(torch.randint(len(pool), (1,), generator=stream))] for stream in streams])
        if sampling == "end":
            place = torch.zeros_like(place)
        with torch.no_grad(), _borrowed(G), seeding.scoped(seed, "evaluate", "path noise", first):
            ws = _path(G, ends.to(device), c.to(device), place.to(device), epsilon, space)
            for buffer in _noise_buffers(G):
                buffer.normal_()
            images = G.synthesis(ws, noise_mode="const", force_fp32=True)
            near, far = perceive(_prepared(images, crop)).double().chunk(2)
        distances.append(((near - far).square().sum(1) / epsilon**2).cpu().numpy())
    return _trimmed(np.concatenate(distances))


def slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Point at share `t` [N, 1] of the arc from a/‖a‖ to b/‖b‖ [N, D], normalised."""
    a, b = torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)
    cosine = (a * b).sum(-1, keepdim=True).clamp(-1, 1)
    across = torch.nn.functional.normalize(b - cosine * a, dim=-1)
    angle = t * torch.acos(cosine)
    return torch.nn.functional.normalize(a * torch.cos(angle) + across * torch.sin(angle), dim=-1)


def _path(G: Any, ends: torch.Tensor, c: torch.Tensor, place: torch.Tensor, epsilon: float, space: str) -> torch.Tensor:
    """ws of all points at `place`, then of all an `epsilon` further: [2 N, num_ws, w_dim]."""
    start, end = ends[:, 0], ends[:, 1]
    if space == "z":
        points = torch.cat([slerp(start, end, place), slerp(start, end, place + epsilon)])
        return G.mapping(points, torch.cat([c, c]))
    first, last = G.mapping(torch.cat([start, end]), torch.cat([c, c])).chunk(2)
    place = place[:, :, None]
    return torch.cat([first.lerp(last, place), first.lerp(last, place + epsilon)])


def _prepared(images: torch.Tensor, crop: bool) -> torch.Tensor:
    """Images [N, C, H, W] in about [-1, 1] as [N, 3, ≤ 256-ish, …] in about [0, 255], not rounded."""
    side = images.shape[2]
    if crop:
        part = side // 8
        images = images[:, :, part * 3 : part * 7, part * 2 : part * 6]
    factor = side // 256
    if factor > 1:
        images = torch.nn.functional.avg_pool2d(images, factor)
    if images.shape[1] == 4:  # alpha, laid on white
        alpha = (images[:, 3:] + 1) / 2
        images = images[:, :3] * alpha + (1 - alpha)
    return ((images + 1) * 127.5).expand(-1, 3, -1, -1)


def _trimmed(distances: np.ndarray) -> PathLength:
    low, high = np.percentile(distances, 1, method="lower"), np.percentile(distances, 99, method="higher")
    kept = distances[(distances >= low) & (distances <= high)]
    error = float(kept.std(ddof=1) / len(kept) ** 0.5) if len(kept) > 1 else 0.0
    return PathLength(float(kept.mean()), error, len(kept), len(distances))


def _noise_buffers(G: Any) -> list[torch.Tensor]:
    return [buffer for name, buffer in G.synthesis.named_buffers() if name.split(".")[-1] == "noise_const"]


@contextlib.contextmanager
def _borrowed(G: Any) -> Iterator[None]:
    """Evaluation mode inside; mode and noise buffers as they were afterwards."""
    modes = [(child, child.training) for child in G.modules()]
    noise = [(buffer, buffer.clone()) for buffer in _noise_buffers(G)]
    G.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode
        for buffer, value in noise:
            buffer.copy_(value)
