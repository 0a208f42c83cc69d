"""Small networks with telling numbers, and writers of the formats that we read but do not write."""

import math
import pickle
import re
import sys
import types
from typing import Any

import numpy as np
import torch

from training import networks


def make_pair(
    resolution: int = 8, c_dim: int = 0, seed: int = 0, *, z_dim: int = 12, w_dim: int = 12, **changes: Any
) -> dict[str, torch.nn.Module]:
    """G, D and G_ema of random numbers everywhere, no two alike.

    `changes`: `synthesis`, `mapping`, `discriminator` are merged into the constructor arguments.
    """
    torch.manual_seed(seed)
    common = {"c_dim": c_dim, "img_resolution": resolution, "img_channels": changes.pop("img_channels", 3)}
    width = {"channel_base": 16 * resolution, "channel_max": 20}
    G_kwargs = {
        "z_dim": z_dim,
        "w_dim": w_dim,
        "mapping_kwargs": {"num_layers": 2, **changes.pop("mapping", {})},
        "synthesis_kwargs": {**width, **changes.pop("synthesis", {})},
    }
    D_kwargs = {**width, "mapping_kwargs": {}, "epilogue_kwargs": {"mbstd_group_size": 4}}
    D_kwargs |= changes.pop("discriminator", {})
    assert not changes, changes
    nets = {
        "G": networks.Generator(**common, **G_kwargs),
        "D": networks.Discriminator(**common, **D_kwargs),
        "G_ema": networks.Generator(**common, **G_kwargs),
    }
    for net in nets.values():
        fill(net)
    return nets


@torch.no_grad()
def fill(net: torch.nn.Module) -> None:
    """Random biases, noise strengths, noise maps and w average; weights are random already."""
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        last = name.rpartition(".")[2]
        if last in ("bias", "noise_strength", "w_avg"):
            tensor.add_(torch.randn(tensor.shape) * (10 if "mapping.fc" in name else 0.3))
    net.eval().requires_grad_(False)


def state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(net.named_parameters()) | dict(net.named_buffers())


def latents(net: Any, num: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn([num, net.z_dim], generator=generator)
    c = torch.eye(net.c_dim)[torch.arange(num) % net.c_dim] if net.c_dim else torch.zeros([num, 0])
    return z, c


def tensorflow_pickle(
    nets: dict[str, torch.nn.Module], *, protocol: int = 3, old_numpy: bool = False, edit: Any = None
) -> bytes:
    """The tuple (G, D, Gs) as TensorFlow code pickled it: the inverse of the tables in networks-and-pickles.md 6.

    `edit(records)` may change the three records before they are pickled.
    """
    module = types.ModuleType("dnnlib.tflib.network")

    class Network:
        def __init__(self, **state: Any) -> None:
            self.__dict__.update(state)

    Network.__module__, Network.__qualname__ = module.__name__, "Network"
    module.Network = Network  # type: ignore[attr-defined]

    def record(name: str, options: dict, variables: list, components: dict) -> Any:
        fields = dict(version=5, name=name, static_kwargs=options, build_module_src="", build_func_name="")
        return Network(**fields, components=components, variables=variables)

    def generator(net: Any) -> Any:
        own, parts = [], {"mapping": [], "synthesis": []}
        for name, tensor in state(net).items():
            found = _tf_generator_variable(name, tensor)
            if found is not None:
                place, _, rest = found[0].rpartition("/") if "/" not in found[0] else found[0].partition("/")
                (parts[place] if place else own).append((rest, found[1]))
        parts["synthesis"].append(("lod", np.float32(0)))
        components = {part: record(part, {}, variables, {}) for part, variables in parts.items()}
        return record("G", _tf_generator_options(net), own, components)

    def discriminator(net: Any) -> Any:
        variables = [v for name, t in state(net).items() if (v := _tf_discriminator_variable(name, t))]
        return record("D", _tf_discriminator_options(net), variables, {})

    records = [generator(nets["G"]), discriminator(nets["D"]), generator(nets["G_ema"])]
    if edit is not None:
        edit(records)
    parents = {name: sys.modules.get(name) for name in ("dnnlib.tflib", module.__name__)}
    try:
        sys.modules |= {"dnnlib.tflib": types.ModuleType("dnnlib.tflib"), module.__name__: module}
        data = pickle.dumps(records[0] if len(records) == 1 else tuple(records), protocol=protocol)
    finally:
        for name, value in parents.items():
            sys.modules.pop(name) if value is None else sys.modules.__setitem__(name, value)
    return data.replace(b"cnumpy._core.", b"cnumpy.core.") if old_numpy else data


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().numpy().copy()


def _tf_generator_variable(name: str, t: torch.Tensor) -> "tuple[str, np.ndarray] | None":
    if name == "mapping.w_avg":
        return "dlatent_avg", _array(t)
    if match := re.fullmatch(r"mapping\.(embed|fc(\d+))\.(\w+)", name):
        layer = "LabelEmbed" if match[2] is None else f"Dense{match[2]}"
        return f"mapping/{layer}/{match[3]}", _array(t.t() if match[3] == "weight" else t)
    if name == "synthesis.b4.const":
        return "synthesis/4x4/Const/const", _array(t[None])
    match = re.fullmatch(r"synthesis\.b(\d+)\.(conv0|conv1|torgb|skip)\.(.+)", name)
    if match is None or match[3] == "resample_filter":
        return None
    res, layer, part = int(match[1]), match[2], match[3]
    if part == "noise_const":
        log2 = int(math.log2(res))
        number = 0 if res == 4 else 2 * log2 - (5 if layer == "conv0" else 4)
        return f"synthesis/noise{number}", _array(t[None, None])
    there = {"conv0": "Conv0_up", "conv1": "Conv" if res == 4 else "Conv1", "torgb": "ToRGB", "skip": "Skip"}[layer]
    value = {
        "weight": lambda: (t.flip([2, 3]) if layer in ("conv0", "skip") else t).permute(2, 3, 1, 0),
        "affine.weight": lambda: t.t(),
        "affine.bias": lambda: t - 1,
    }.get(part, lambda: t)()
    last = {"affine.weight": "mod_weight", "affine.bias": "mod_bias"}.get(part, part)
    return f"synthesis/{res}x{res}/{there}/{last}", _array(value)


def _tf_discriminator_variable(name: str, t: torch.Tensor) -> "tuple[str, np.ndarray] | None":
    if name.endswith("resample_filter"):
        return None
    if match := re.fullmatch(r"mapping\.(embed|fc(\d+))\.(\w+)", name):
        layer = "LabelEmbed" if match[2] is None else f"Mapping{match[2]}"
        return f"{layer}/{match[3]}", _array(t.t() if match[3] == "weight" else t)
    match = re.fullmatch(r"b(\d+)\.(\w+)\.(\w+)", name)
    assert match is not None
    res, layer, part = match[1], match[2], match[3]
    if layer in ("fc", "out"):
        there = "4x4/Dense0" if layer == "fc" else "Output"
        return f"{there}/{part}", _array(t.t() if part == "weight" else t)
    there = {"fromrgb": "FromRGB", "conv0": "Conv0", "conv1": "Conv1_down", "skip": "Skip", "conv": "Conv"}[layer]
    return f"{res}x{res}/{there}/{part}", _array(t.permute(2, 3, 1, 0) if part == "weight" else t)


def _tf_generator_options(net: Any) -> dict[str, Any]:
    synthesis, mapping = net.init_kwargs["synthesis_kwargs"], net.init_kwargs["mapping_kwargs"]
    return {
        "latent_size": net.z_dim,
        "label_size": net.c_dim,
        "dlatent_size": net.w_dim,
        "resolution": net.img_resolution,
        "num_channels": net.img_channels,
        "mapping_layers": mapping["num_layers"],
        "fmap_base": synthesis["channel_base"] // 2,
        "fmap_max": synthesis["channel_max"],
        "architecture": synthesis.get("architecture", "skip"),
        "resample_kernel": synthesis.get("resample_filter", [1, 3, 3, 1]),
        "mapping_fmaps": mapping.get("layer_features", net.w_dim),
        "label_fmaps": mapping.get("embed_features"),
        "truncation_psi": 0.5,
        "randomize_noise": True,
        "structure": "auto",
    }


def _tf_discriminator_options(net: Any) -> dict[str, Any]:
    kwargs = net.init_kwargs
    return {
        "label_size": net.c_dim,
        "resolution": net.img_resolution,
        "num_channels": net.img_channels,
        "fmap_base": kwargs["channel_base"] // 2,
        "fmap_max": kwargs["channel_max"],
        "architecture": kwargs.get("architecture", "resnet"),
        "mbstd_group_size": kwargs["epilogue_kwargs"]["mbstd_group_size"],
        "mapping_layers": kwargs["mapping_kwargs"].get("num_layers", 8),
        "mapping_lrmul": kwargs["mapping_kwargs"].get("lr_multiplier", 0.01),
        "structure": "auto",
    }
