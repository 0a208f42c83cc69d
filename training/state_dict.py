"""Networks from bare tensors: the architecture is read off names and shapes, what no tensor tells is assumed and said.

Names are the family's (`synthesis.b4.const`, `b8.conv0.weight`); readers of other formats rename theirs first.
Source: networks-and-pickles.md section 2 (names, shapes, widths); other-checkpoints.md section 1 (missing w average).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from torch_utils.pickle_reader import PickleError, TensorRecord, describe, printable
from training import network_pickle, networks
from training.network_pickle import check_stored, size_of

W_AVG_SAMPLES = 10_000  # the error of the mean falls with the root: 0.06 of an image with 64 at psi 0.5, 0.015 with 512
W_AVG_SEED = 0
W_AVG_BATCH = 1000
ASSUMED_G = "mapping learning-rate multiplier 0.01, leaky ReLU, no clamp"
ASSUMED_D = "minibatch-std groups of 4, leaky ReLU, no clamp"
NO_MOVING_AVERAGE = "no moving average in the file: the generator in training takes its place"

_REMEDY = "convert it where it was made to a network-snapshot-*.pkl"


def values(tensors: Mapping[str, Any], what: str) -> dict[str, torch.Tensor]:
    """Copy recorded tensors out of the file.

    Raises:
        PickleError: they show far more numbers than the file stores, or one is no tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, (TensorRecord, torch.Tensor)):
            raise PickleError(f"{what}: {printable(str(name))!r} is a {describe(tensor)}, wanted a tensor; {_REMEDY}")
    check_stored(tensors, what)
    return {name: t.tensor() if isinstance(t, TensorRecord) else t for name, t in tensors.items()}


def parse(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Our networks from bare state dicts with the family's names.

    Args:
        found: result of `recognise.state_dicts`.

    Returns:
        G, D (None where missing), G_ema and notes, as in `network_pickle.NetworkFile`.

    Raises:
        PickleError: not the tensors of StyleGAN2 networks, or no generator among them.
    """
    nets: dict[str, Any] = {"G": None, "D": None, "G_ema": None}
    notes: list[str] = []
    for key, state in found.items():
        nets[key], said = (build_discriminator if key == "D" else build_generator)(state, key)
        notes += said
    if nets["G_ema"] is None:
        if nets["G"] is None:
            raise PickleError("a state dict without a generator; wanted G_ema or G")
        nets["G_ema"], nets["G"] = nets["G"], None
        notes.append(NO_MOVING_AVERAGE)
    return {**nets, "notes": tuple(notes)}


def build_generator(
    tensors: Mapping[str, Any], what: str, *, is_bare: bool = True
) -> "tuple[torch.nn.Module, tuple[str, ...]]":
    """A generator from its tensors.

    Args:
        tensors: all parameters; of the buffers, filters, noise maps and w average may be missing.
        what: name in messages.
        is_bare: whether nothing but the tensors is known, so that the rest is assumed; False where the format fixes it.

    Returns:
        The generator, and sentences on what was assumed or estimated.

    Raises:
        PickleError: the names and shapes are not those of a StyleGAN2 generator.
    """
    tensors = values(tensors, what)
    settings = generator_settings(tensors, what)
    notes = [f"{what} is a bare state dict: assumed {ASSUMED_G}"] if is_bare else []
    lacks_w_avg = "mapping.w_avg" not in tensors
    tensors, drawn = _with_buffers(tensors, settings["w_dim"])
    notes += drawn
    G = network_pickle.build(networks.Generator, settings, tensors, what, computed="resample_filter")
    if lacks_w_avg:
        notes.append(estimate_w_avg(G))
    return G, tuple(notes)


def build_discriminator(
    tensors: Mapping[str, Any], what: str, *, is_bare: bool = True
) -> "tuple[torch.nn.Module, tuple[str, ...]]":
    """A discriminator from its tensors; as `build_generator`."""
    tensors = values(tensors, what)
    settings = discriminator_settings(tensors, what)
    notes = (f"{what} is a bare state dict: assumed {ASSUMED_D}",) if is_bare else ()
    return network_pickle.build(networks.Discriminator, settings, tensors, what, computed="resample_filter"), notes


@torch.no_grad()
def estimate_w_avg(G: Any, num_samples: int = W_AVG_SAMPLES, seed: int = W_AVG_SEED) -> str:
    """Set `G.mapping.w_avg` to the mean of the mapping over fresh latents and, in turn, all classes.

    Args:
        G: generator; its w average is replaced.
        num_samples: latents.
        seed: of the latents, drawn from a stream of their own.

    Returns:
        A sentence that says so.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros([G.w_dim], dtype=torch.float64)
    for start in range(0, num_samples, W_AVG_BATCH):
        num = min(W_AVG_BATCH, num_samples - start)
        z = torch.randn([num, G.z_dim], generator=generator)
        classes = torch.arange(start, start + num) % max(G.c_dim, 1)
        c = torch.nn.functional.one_hot(classes, G.c_dim).float() if G.c_dim else torch.zeros([num, 0])
        total += G.mapping(z, c)[:, 0].double().sum(dim=0)
    G.mapping.w_avg.copy_(total / num_samples)
    return f"no w average in the file, estimated from {num_samples} latents (seed {seed})"


def generator_settings(tensors: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Constructor arguments of our Generator as the tensors' names and shapes tell them.

    Raises:
        PickleError: they are not those of a StyleGAN2 generator.
    """
    shapes = _Shapes(tensors, what)
    resolutions = shapes.resolutions(r"synthesis\.b(\d+)\.conv1\.weight")
    top = resolutions[-1]
    channels = {res: shapes.get(f"synthesis.b{res}.conv1.weight", 4)[0] for res in resolutions}
    base, most = fit_channels(channels, what)
    w_dim = shapes.get("synthesis.b4.conv1.affine.weight", 2)[1]
    num_layers = shapes.count(r"mapping\.fc\d+\.weight")
    first = shapes.get("mapping.fc0.weight", 2)
    c_dim = shapes.get("mapping.embed.weight", 2)[1] if "mapping.embed.weight" in tensors else 0
    embed = shapes.get("mapping.embed.weight", 2)[0] if c_dim else 0
    has_skip = f"synthesis.b{top}.skip.weight" in tensors
    every_rgb = all(f"synthesis.b{res}.torgb.weight" in tensors for res in resolutions)
    architecture = "resnet" if has_skip else "skip" if every_rgb and len(resolutions) > 1 else "orig"
    synthesis = {"channel_base": base, "channel_max": most, "architecture": architecture}
    kernel_size = shapes.get("synthesis.b4.conv1.weight", 4)[2]
    if kernel_size != 3:
        synthesis["kernel_size"] = kernel_size
    if "synthesis.b4.conv1.noise_strength" not in tensors:
        synthesis["use_noise"] = False
    taps = taps_of(tensors.get(f"synthesis.b{top}.conv0.resample_filter"))
    if taps is not None:
        synthesis["resample_filter"] = taps
    mapping: dict[str, Any] = {"num_layers": num_layers}
    if num_layers > 1 and first[0] != w_dim:
        mapping["layer_features"] = first[0]
    if embed and embed != w_dim:
        mapping["embed_features"] = embed
    return {
        "z_dim": first[1] - embed,
        "c_dim": c_dim,
        "w_dim": w_dim,
        "img_resolution": top,
        "img_channels": shapes.get(f"synthesis.b{top}.torgb.weight", 4)[0],
        "mapping_kwargs": mapping,
        "synthesis_kwargs": synthesis,
    }


def discriminator_settings(tensors: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Constructor arguments of our Discriminator as the tensors' names and shapes tell them.

    Raises:
        PickleError: they are not those of a StyleGAN2 discriminator.
    """
    shapes = _Shapes(tensors, what)
    resolutions = shapes.resolutions(r"b(\d+)\.conv0\.weight", first=8)
    top = resolutions[-1]
    channels = {res: shapes.get(f"b{res}.conv0.weight", 4)[0] for res in resolutions}
    last = shapes.get("b4.conv.weight", 4)
    base, most = fit_channels({4: last[0], **channels}, what)
    c_dim = shapes.get("mapping.embed.weight", 2)[1] if "mapping.embed.weight" in tensors else 0
    every_rgb = all(f"b{res}.fromrgb.weight" in tensors for res in (4, *resolutions))
    has_skip = f"b{top}.skip.weight" in tensors
    settings: dict[str, Any] = {
        "c_dim": c_dim,
        "img_resolution": top,
        "img_channels": shapes.get(f"b{top}.fromrgb.weight", 4)[1],
        "architecture": "resnet" if has_skip else "skip" if every_rgb else "orig",
        "channel_base": base,
        "channel_max": most,
        "block_kwargs": {},
        "mapping_kwargs": {},
        "epilogue_kwargs": {"mbstd_group_size": 4, "mbstd_num_channels": last[1] - last[0]},
    }
    taps = taps_of(tensors.get(f"b{top}.conv1.resample_filter"))
    if taps is not None:
        settings["block_kwargs"]["resample_filter"] = taps
    if c_dim:
        cmap_dim = shapes.get("b4.out.weight", 2)[0]
        num_layers = shapes.count(r"mapping\.fc\d+\.weight")
        embed = shapes.get("mapping.embed.weight", 2)[0]
        settings["cmap_dim"] = cmap_dim
        settings["mapping_kwargs"]["num_layers"] = num_layers
        if embed != cmap_dim:
            settings["mapping_kwargs"]["embed_features"] = embed
        if num_layers > 1 and shapes.get("mapping.fc0.weight", 2)[0] != cmap_dim:
            settings["mapping_kwargs"]["layer_features"] = shapes.get("mapping.fc0.weight", 2)[0]
    return settings


def fit_channels(channels: Mapping[int, int], what: str) -> tuple[int, int]:
    """(channel_base, channel_max) such that every resolution r has min(channel_base // r, channel_max) channels.

    Raises:
        PickleError: there is no such pair.
    """
    most = max(channels.values())
    base = max(count * res for res, count in channels.items())
    if any(min(base // res, most) != count for res, count in channels.items()):
        listed = ", ".join(f"{count} at {res}" for res, count in sorted(channels.items()))
        raise PickleError(f"{what}: no channel base and maximum give its channels ({listed}); {_REMEDY}")
    return base, most


def taps_of(kernel: "torch.Tensor | None") -> "list[float] | None":
    """The taps whose prepared filter is `kernel` [k, k] or [k], None for the default or no filter.

    A separable square filter of sum 1 is the outer product of its column sums with themselves. [1, 3, 3, 1] and
    [1, 2, 1] come back as whole numbers.
    """
    if kernel is None or kernel.ndim not in (1, 2) or not torch.isfinite(kernel).all():
        return None
    taps = (kernel.sum(dim=0) if kernel.ndim == 2 else kernel).float()
    for known in ([1.0, 3.0, 3.0, 1.0], [1.0, 2.0, 1.0]):
        if len(taps) == len(known) and torch.allclose(torch.tensor(known) / sum(known), taps):
            return None if len(known) == len(networks.DEFAULT_FILTER) else known
    return [float(tap) for tap in taps]


class _Shapes:
    """Shapes by name; what is missing or of another kind is a refusal."""

    def __init__(self, tensors: Mapping[str, Any], what: str) -> None:
        self.tensors, self.what = tensors, what

    def get(self, name: str, num_dims: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise PickleError(f"{self.what} lacks {name!r}; the architecture is not StyleGAN2's, or the file is cut")
        shape = size_of(self.tensors[name])
        if len(shape) != num_dims or 0 in shape:
            raise PickleError(f"{self.what}: {name!r} has shape {list(shape)}, wanted {num_dims} dimensions; damaged")
        return shape

    def resolutions(self, pattern: str, first: int = 4) -> list[int]:
        found = sorted(int(m[1]) for name in self.tensors if (m := re.fullmatch(pattern, name)) and len(m[1]) < 6)
        if not found or found != [first << i for i in range(len(found))]:
            raise PickleError(
                f"{self.what} has layers at the resolutions {found[:20]}; wanted {first}, {2 * first}, ..."
            )
        return found

    def count(self, pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in self.tensors)


def _with_buffers(tensors: dict[str, torch.Tensor], w_dim: int) -> "tuple[dict[str, torch.Tensor], list[str]]":
    """A generator's tensors with what is missing of noise maps (drawn, seeded) and a place for the w average."""
    full, notes = dict(tensors), []
    generator = torch.Generator().manual_seed(W_AVG_SEED)
    for name in tensors:
        layer = re.fullmatch(r"(synthesis\.b(\d{1,5})\.conv[01])\.noise_strength", name)
        if layer is not None and f"{layer[1]}.noise_const" not in full:
            side = int(layer[2])
            full[f"{layer[1]}.noise_const"] = torch.randn([side, side], generator=generator)
            notes = [f"no noise maps in the file, drawn (seed {W_AVG_SEED})"]
    full.setdefault("mapping.w_avg", torch.zeros([w_dim]))
    return full, notes
