"""TensorFlow-era StyleGAN2 and StyleGAN2-ADA pickles: their variables and options as our networks.

Source: networks-and-pickles.md section 6; clarifications 13, 14, 18; other-checkpoints.md section 3.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_utils.pickle_reader import ArrayRecord, ObjectRecord, PickleError, describe, plain, printable
from training import network_pickle, networks, state_dict

MIN_VERSION = 4
MAX_VARIABLES = 10_000
FILTERS = "resample_filter"  # not in the file; the options say them
REMEDY = "configurations A to D and other methods than StyleGAN2 are not supported"

# Options of both networks: name there -> (place, name here). The place '' is the network itself.
_COMMON = {
    "label_size": ("", "c_dim"),
    "resolution": ("", "img_resolution"),
    "num_channels": ("", "img_channels"),
}
_GENERATOR = {
    **_COMMON,
    "latent_size": ("", "z_dim"),
    "dlatent_size": ("", "w_dim"),
    "mapping_layers": ("mapping_kwargs", "num_layers"),
    "label_fmaps": ("mapping_kwargs", "embed_features"),
    "mapping_fmaps": ("mapping_kwargs", "layer_features"),
    "mapping_nonlinearity": ("mapping_kwargs", "activation"),
    "mapping_lrmul": ("mapping_kwargs", "lr_multiplier"),
    "w_avg_beta": ("mapping_kwargs", "w_avg_beta"),
    "fmap_base": ("synthesis_kwargs", "channel_base"),
    "fmap_max": ("synthesis_kwargs", "channel_max"),
    "num_fp16_res": ("synthesis_kwargs", "num_fp16_res"),
    "conv_clamp": ("synthesis_kwargs", "conv_clamp"),
    "architecture": ("synthesis_kwargs", "architecture"),
    "resample_kernel": ("synthesis_kwargs", "resample_filter"),
    "use_noise": ("synthesis_kwargs", "use_noise"),
    "nonlinearity": ("synthesis_kwargs", "activation"),
}
_DISCRIMINATOR = {
    **_COMMON,
    "architecture": ("", "architecture"),
    "fmap_base": ("", "channel_base"),
    "fmap_max": ("", "channel_max"),
    "num_fp16_res": ("", "num_fp16_res"),
    "conv_clamp": ("", "conv_clamp"),
    "mapping_layers": ("mapping_kwargs", "num_layers"),
    "mapping_fmaps": ("mapping_kwargs", "layer_features"),
    "mapping_lrmul": ("mapping_kwargs", "lr_multiplier"),
    "nonlinearity": ("epilogue_kwargs", "activation"),
    "resample_kernel": ("block_kwargs", "resample_filter"),
    "freeze_layers": ("block_kwargs", "freeze_layers"),
    "mbstd_group_size": ("epilogue_kwargs", "mbstd_group_size"),
    "mbstd_num_features": ("epilogue_kwargs", "mbstd_num_channels"),
}
# Without effect on the numbers: how images were made, or said again by the shapes.
_IGNORED = {"structure", "conditioning", "randomize_noise", "resolution_h", "resolution_w"}
_IGNORED_G = _IGNORED | {"truncation_psi", "truncation_cutoff", "style_mixing_prob", "fused_modconv"}
_SCALE_BASE = 2  # channels are fmap_base / 2^(log2 r - 1) there, channel_base / r here


def parse(root: Any) -> dict[str, Any]:
    """Our networks from the value of a TensorFlow pickle.

    Args:
        root: `Document.root` of a file that was read with `pickle_reader.TENSORFLOW_GLOBALS`: the tuple (G, D, Gs),
            or Gs alone.

    Returns:
        G, D (None where missing), G_ema and notes, as in `network_pickle.NetworkFile`.

    Raises:
        PickleError: a variable is missing, or an option has no counterpart.
    """
    if isinstance(root, ObjectRecord):
        return {"G": None, "D": None, "G_ema": _generator(root, "G_ema"), "notes": ()}
    if not isinstance(root, (tuple, list)) or len(root) != 3:
        raise PickleError(f"a TensorFlow pickle of a {describe(root)}, wanted the networks (G, D, Gs); {REMEDY}")
    G, D, G_ema = root
    return {
        "G": _generator(G, "G"),
        "D": _discriminator(D, "D"),
        "G_ema": _generator(G_ema, "G_ema"),
        "notes": (),
    }


def _generator(record: Any, what: str) -> torch.nn.Module:
    options, variables = _network(record, what)
    settings = _settings(options, _GENERATOR, _IGNORED_G, what)
    defaults = {"z_dim": 512, "c_dim": 0, "w_dim": 512, "img_resolution": 1024, "img_channels": 3}
    settings = {**defaults, **settings}
    synthesis, mapping = settings["synthesis_kwargs"], settings["mapping_kwargs"]
    synthesis.setdefault("channel_base", 16384 * _SCALE_BASE)
    if mapping.get("w_avg_beta", 0) is None:
        mapping["w_avg_beta"] = 1
    tensors = _rename(variables, _generator_name, what)
    return network_pickle.build(networks.Generator, settings, tensors, what, computed=FILTERS)


def _discriminator(record: Any, what: str) -> torch.nn.Module:
    options, variables = _network(record, what)
    settings = _settings(options, _DISCRIMINATOR, _IGNORED, what)
    settings = {"c_dim": 0, "img_resolution": 1024, "img_channels": 3, **settings}
    settings.setdefault("channel_base", 16384 * _SCALE_BASE)
    mapping, epilogue = settings["mapping_kwargs"], settings["epilogue_kwargs"]
    mapping.setdefault("num_layers", 0)
    mapping.setdefault("lr_multiplier", 0.1)
    epilogue.setdefault("mbstd_group_size", None)
    activation = epilogue.get("activation")
    if activation is not None:
        settings["block_kwargs"]["activation"] = mapping["activation"] = activation
    if mapping.get("layer_features") is not None:
        settings["cmap_dim"] = mapping["embed_features"] = mapping["layer_features"]
    if any(name.startswith("FromRGB_lod") for name in variables):
        settings["architecture"] = "orig"
    side = settings["img_resolution"] if type(settings["img_resolution"]) is int else 0
    tensors = _rename(variables, lambda name: _discriminator_name(name, side), what)
    if not settings["c_dim"]:
        settings["mapping_kwargs"] = {}
    return network_pickle.build(networks.Discriminator, settings, tensors, what, computed=FILTERS)


def _network(record: Any, what: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(static_kwargs, all variables with their components' names in front)."""
    if not isinstance(record, ObjectRecord) or not isinstance(record.state, dict):
        raise PickleError(f"{what} of a TensorFlow pickle is a {describe(record)}, wanted a network; {REMEDY}")
    version = record.state.get("version")
    if type(version) is not int or version < MIN_VERSION:
        raise PickleError(f"{what} is a TensorFlow network of version {version!r}, wanted {MIN_VERSION} or newer")
    options = plain(record.state.get("static_kwargs"), f"the options of {what}")
    if not isinstance(options, dict):
        raise PickleError(f"the options of {what} are a {describe(options)}, wanted a dict; damaged")
    variables: dict[str, torch.Tensor] = {}
    pending = [("", record, 0)]
    while pending:
        prefix, network, depth = pending.pop()
        state = network.state if isinstance(network, ObjectRecord) else None
        if not isinstance(state, dict) or depth > 4:
            raise PickleError(f"component {printable(prefix)!r} of {what} is no network; damaged or hostile")
        listed, components = state.get("variables"), state.get("components", {})
        if not isinstance(listed, list) or not isinstance(components, dict):
            raise PickleError(f"{what} has no list of variables; damaged or hostile")
        for pair in listed:
            if type(pair) not in (tuple, list) or len(pair) != 2 or type(pair[0]) is not str:
                raise PickleError(f"{what} has a variable without a name; damaged or hostile")
            variables[f"{prefix}{pair[0]}"] = pair[1]
            if len(variables) > MAX_VARIABLES:
                raise PickleError(f"{what} has more than {MAX_VARIABLES} variables; damaged or hostile")
        pending += [(f"{prefix}{name}/", child, depth + 1) for name, child in components.items()]
    return options, variables


def _settings(options: dict, known: Mapping[str, tuple[str, str]], ignored: set[str], what: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"mapping_kwargs": {}}
    for place, _ in known.values():
        if place:
            settings.setdefault(place, {})
    for key, value in options.items():
        if key in ignored:
            continue
        if key not in known:
            raise PickleError(f"{what} was made with {printable(str(key))}, which StyleGAN2 has not here; {REMEDY}")
        place, name = known[key]
        if key == "fmap_base" and (type(value) is int or (type(value) is float and value.is_integer())):
            value = int(value) * _SCALE_BASE
        (settings[place] if place else settings)[name] = value
    return settings


_Rule = tuple[str, Callable[[torch.Tensor], torch.Tensor]]


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _transposed(value: torch.Tensor) -> torch.Tensor:
    return value.t()


def _kernel(value: torch.Tensor) -> torch.Tensor:
    return value.permute(3, 2, 0, 1)  # [k, k, I, O] -> [O, I, k, k]


def _flipped_kernel(value: torch.Tensor) -> torch.Tensor:
    return value.flip([0, 1]).permute(3, 2, 0, 1)


def _generator_name(name: str) -> "_Rule | None":
    """Our name and the change of one variable; None for variables without counterpart (`lod` and the like)."""
    if name == "dlatent_avg":
        return "mapping.w_avg", _same
    if match := re.fullmatch(r"mapping/(LabelEmbed|Dense(\d{1,3}))/(weight|bias)", name):
        layer = "embed" if match[2] is None else f"fc{int(match[2])}"
        return f"mapping.{layer}.{match[3]}", _transposed if match[3] == "weight" else _same
    if name == "synthesis/4x4/Const/const":
        return "synthesis.b4.const", lambda value: value[0]
    if match := re.fullmatch(r"synthesis/noise(\d{1,2})", name):
        index = int(match[1]) + 1  # noise0 is b4.conv1's, then conv0 and conv1 of each resolution
        return f"synthesis.b{4 << (index // 2)}.conv{index % 2}.noise_const", lambda value: value[0, 0]
    match = re.fullmatch(r"synthesis/(\d{1,5})x\1/(Conv0_up|Conv1|Conv|ToRGB|Skip)/(\w+)", name)
    if match is None:
        return None
    layers = {"Conv0_up": "conv0", "Conv1": "conv1", "Conv": "conv1", "ToRGB": "torgb", "Skip": "skip"}
    layer = f"synthesis.b{match[1]}.{layers[match[2]]}"
    rules: dict[str, _Rule] = {
        "weight": (f"{layer}.weight", _flipped_kernel if match[2] in ("Conv0_up", "Skip") else _kernel),
        "bias": (f"{layer}.bias", _same),
        "noise_strength": (f"{layer}.noise_strength", _same),
        "mod_weight": (f"{layer}.affine.weight", _transposed),
        "mod_bias": (f"{layer}.affine.bias", lambda value: value + 1),
    }
    return rules.get(match[3])


def _discriminator_name(name: str, side: int) -> "_Rule | None":
    if match := re.fullmatch(r"(LabelEmbed|Mapping(\d{1,3}))/(weight|bias)", name):
        layer = "embed" if match[2] is None else f"fc{int(match[2])}"
        return f"mapping.{layer}.{match[3]}", _transposed if match[3] == "weight" else _same
    if match := re.fullmatch(r"(4x4/Dense0|Output)/(weight|bias)", name):
        layer = "b4.out" if match[1] == "Output" else "b4.fc"
        return f"{layer}.{match[2]}", _transposed if match[2] == "weight" else _same
    if match := re.fullmatch(r"FromRGB_lod(\d{1,2})/(weight|bias)", name):
        return f"b{side >> int(match[1])}.fromrgb.{match[2]}", _kernel if match[2] == "weight" else _same
    match = re.fullmatch(r"(\d{1,5})x\1/(FromRGB|Conv0|Conv1_down|Skip|Conv)/(weight|bias)", name)
    if match is None:
        return None
    layers = {"FromRGB": "fromrgb", "Conv0": "conv0", "Conv1_down": "conv1", "Skip": "skip", "Conv": "conv"}
    return f"b{match[1]}.{layers[match[2]]}.{match[3]}", _kernel if match[3] == "weight" else _same


def _rename(variables: Mapping[str, Any], rule: Callable[[str], "_Rule | None"], what: str) -> dict[str, Any]:
    """Our tensors; variables without counterpart are left out."""
    records: dict[str, Any] = {}
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for name, value in variables.items():
        found = rule(name)
        if found is None:
            continue
        ours, changes[ours] = found[0], found[1]
        if isinstance(value, ArrayRecord) and value.tensor is not None:
            records[ours] = value.tensor
        elif type(value) in (int, float):
            records[ours] = torch.tensor(float(value))
        else:
            raise PickleError(f"variable {printable(name)!r} of {what} is a {describe(value)}, wanted an array")
    tensors = state_dict.values(records, what)
    try:
        return {name: changes[name](tensor) for name, tensor in tensors.items()}
    except (IndexError, RuntimeError) as error:
        reason = printable(" ".join(str(error).split()), 120)
        raise PickleError(f"a variable of {what} has an unexpected shape ({reason}); damaged") from error
