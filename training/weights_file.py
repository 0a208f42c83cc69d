"""Our own form: a `.safetensors` file whose header also says architecture, training and licences, as JSON.

One file holds G, D and G_ema, or G_ema alone, which makes images. Tensors are called `G_ema.mapping.fc0.weight` etc.
The header's entry `config` is everything that is not a tensor; `config.json` beside a `model.safetensors` says the same
for people and other tools, and counts where the header has none. The only file that imports safetensors.
Documented in docs/formats.md.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import safetensors.torch
import torch

from dnnlib.util import atomic_file, naming, open_regular
from torch_utils import polyglot
from torch_utils.pickle_reader import PickleError, printable
from training import augment, data_record, network_pickle, networks, recognise

FORMAT = "stylegan-rooted weights 1"
ADAPTER_FORMAT = "stylegan-rooted adapter 1"
ADAPTER = "a low-rank adapter"
ADAPTER_REMEDY = "add it to the network that its run started from, with stylegan-rooted surgery SRC DEST --merge FILE"
MODEL_TYPE = "stylegan2"
NETWORKS = ("G", "D", "G_ema", "augment_pipe")
CLASSES: dict[str, type] = {
    "G": networks.Generator,
    "D": networks.Discriminator,
    "G_ema": networks.Generator,
    "augment_pipe": augment.AugmentPipe,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16}
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 32
OURS = "stylegan-rooted"  # what the format of every file of ours begins with
ORIGIN_KINDS: dict[str, type] = {
    "source": dict,
    "training": dict,
    "data": dict,
    "metrics": list,
    "base_model": dict,
    "licences": dict,
    "training_set_kwargs": dict,
    "notes": list,
}
ORIGIN_TEXTS = {"base_model": ("name", "licence", "sha256"), "licences": ("weights",)}
REMEDY = "give a file that stylegan-rooted convert or finetune wrote, or see docs/formats.md"


def save(
    path: "str | os.PathLike",
    *,
    G_ema: torch.nn.Module,
    G: "torch.nn.Module | None" = None,
    D: "torch.nn.Module | None" = None,
    augment_pipe: "torch.nn.Module | None" = None,
    about: "Mapping[str, Any] | None" = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write a `.safetensors` file atomically; equal content gives equal bytes.

    With G_ema alone it is an inference file: `generate`, `grid`, `report` and `convert` take it like a snapshot,
    `finetune` starts a new discriminator beside it.

    Args:
        path: file to write; an existing one is replaced when the new one is complete.
        G_ema: moving average of the generator.
        G, D, augment_pipe: what training goes on from, or None.
        about: plain JSON values on origin: training, licences, data set and the like; see docs/formats.md.
        dtype: 'float32', or 'float16' for half the size (numbers are rounded, the networks stay as they are).

    Returns:
        The configuration in the header.

    Raises:
        ValueError: unknown dtype, or `about` is not plain.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is unknown; one of {', '.join(DTYPES)}")
    given = {"G": G, "D": D, "G_ema": G_ema, "augment_pipe": augment_pipe}
    nets = {key: net for key, net in given.items() if net is not None}
    config = configuration(nets, about or {}, dtype)
    tensors = {}
    for key, net in nets.items():
        for name, tensor in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
            tensors[f"{key}.{name}"] = tensor.detach().to("cpu", DTYPES[dtype]).contiguous().clone()
    _write(path, tensors, config)
    return config


def save_adapter(
    path: "str | os.PathLike", factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], *, base: str
) -> None:
    """Write low-rank adapters (`training.adapters`) as a small `.safetensors` file, atomically.

    Args:
        path: file to write.
        factors: (up [O, r], down [r, I k k]) by layer name.
        base: fingerprint of the generator that they belong to.
    """
    tensors = {}
    for name, (up, down) in factors.items():
        tensors[f"{name}.up"] = up.detach().cpu().contiguous().clone()
        tensors[f"{name}.down"] = down.detach().cpu().contiguous().clone()
    _write(path, tensors, {"format": ADAPTER_FORMAT, "base": base})


def read_adapter(path: "str | os.PathLike") -> "tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], str]":
    """The factors by layer name, and the base's fingerprint.

    Raises:
        PickleError: not such a file, or damaged; one line with its name.
        OSError: it cannot be read.
    """
    with naming(path), open_regular(path) as stream:
        data = stream.read()
    try:
        if stranger := recognise.stranger(data):
            raise PickleError(f"this is {stranger[0]}: {stranger[1]}")
        tensors, config = read(data)
        if config is None or not is_adapter(config) or not isinstance(config.get("base"), str):
            raise PickleError("this is no adapter; give an adapter-*.safetensors that finetune --train lora:N wrote")
        names = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
        if sorted(tensors) != sorted(f"{name}.{part}" for name in names for part in ("up", "down")):
            raise PickleError("its tensors are not pairs; damaged")
        if not names or not all(t.ndim == 2 and t.numel() and t.is_floating_point() for t in tensors.values()):
            raise PickleError("its tensors are not matrices of numbers; damaged")
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise PickleError(f"{printable(name)!r} holds numbers that are not finite; damaged")
    except PickleError as error:
        raise PickleError(f"{printable(os.fspath(path), 500)}: {error}") from None
    return {name: (tensors[f"{name}.up"], tensors[f"{name}.down"]) for name in names}, config["base"]


def _write(path: "str | os.PathLike", tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write a file that appears whole or not at all."""
    with atomic_file(path) as stream:  # one entry in the header: several have no fixed order
        stream.write(safetensors.torch.save(tensors, {"config": json.dumps(config)}))


def configuration(nets: Mapping[str, torch.nn.Module], about: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """What the header says: format, architecture of each network as constructor arguments, and `about`.

    Raises:
        ValueError: a setting is no plain value, or `about` uses a key of ours.
    """
    config: dict[str, Any] = {"format": FORMAT, "model_type": MODEL_TYPE, "dtype": dtype, "networks": {}}
    for key, net in nets.items():
        config["networks"][key] = network_pickle.keyword_settings(net)
    taken = sorted(set(config) & set(about))
    if taken:
        raise ValueError(f"about has {', '.join(taken)}, which the file says itself; use other names")
    config |= about
    if "training_set_kwargs" in config:
        config["training_set_kwargs"], _ = data_record.known(config["training_set_kwargs"])
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"about holds something that JSON has not ({error}); keep plain values there") from None


def is_ours(config: "dict[str, Any] | None") -> TypeGuard[dict[str, Any]]:
    """Whether a configuration is one that `save` wrote."""
    return config is not None and config.get("format") == FORMAT


def check_known(config: "dict[str, Any] | None") -> None:
    """Refuse a configuration that describes our networks in a way that this version cannot read.

    Its tensors alone would open as a bare state dict, with guesses in place of settings that the file has.

    Raises:
        PickleError: such a one.
    """
    found = (config or {}).get("format")
    if found in (FORMAT, ADAPTER_FORMAT):
        return
    if isinstance(found, str) and found.startswith(f"{OURS} "):
        raise PickleError(f"its format is {printable(found, 60)!r}, of a newer version of {OURS}; update to read it")
    described = (config or {}).get("networks")
    if isinstance(described, dict) and set(described) & set(NETWORKS):
        raise PickleError(f"it describes networks in the unknown format {printable(str(found), 60)!r}; {REMEDY}")


def check_beside(config: dict[str, Any], beside: "str | os.PathLike") -> tuple[str, ...]:
    """Hold a folder's `config.json` against the header, which counts.

    Args:
        config: the header's configuration.
        beside: the file; it need not exist.

    Returns:
        A sentence on entries of no consequence that differ, as they do after an edit by hand; else nothing.

    Raises:
        PickleError: it is damaged, or describes other networks.
        OSError: it cannot be read.
    """
    text = _text_of(beside)
    if text is None:
        return ()
    name = Path(beside).name
    try:
        other = _as_config(text)
    except PickleError as error:
        raise PickleError(f"{name} beside it: {error}; delete it or convert anew") from None
    for key in ("format", "networks"):
        if key in other and other[key] != config.get(key):
            raise PickleError(f"{name} beside it contradicts the header on {key}; delete it or convert anew")
    differ = sorted(key for key in set(other) & set(config) if other[key] != config[key])
    return (f"{name} beside it differs from the header, which counts, on {', '.join(differ)}",) if differ else ()


def _check_origin(config: dict[str, Any]) -> None:
    """Refuse what is said of the origin in another form than ours, on which those who show it would stumble.

    Raises:
        PickleError: it is.
    """
    for key, kind in ORIGIN_KINDS.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise PickleError(f"{key} in its configuration is no JSON {'object' if kind is dict else 'list'}; damaged")
    texts = [("an entry of notes", note) for note in config.get("notes") or []]
    for part, keys in ORIGIN_TEXTS.items():
        texts += [(f"{key} of {part}", (config.get(part) or {}).get(key)) for key in keys]
    for what, value in texts:
        if value is not None and not isinstance(value, str):
            raise PickleError(f"{what} in its configuration is no text; damaged")
    for row in config.get("metrics") or []:
        parts = [row, *(row.get(key) or {} for key in ("results", "provenance"))] if isinstance(row, dict) else [row]
        if not all(isinstance(part, dict) for part in parts):
            raise PickleError("an entry of metrics in its configuration is no JSON object of objects; damaged")


def is_adapter(config: "dict[str, Any] | None") -> bool:
    """Whether a configuration is one that `save_adapter` wrote."""
    return config is not None and config.get("format") == ADAPTER_FORMAT


def build(tensors: Mapping[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Our networks from the tensors and the configuration of a file of ours (see `read`).

    Returns:
        G, D, G_ema, augment_pipe, training_set_kwargs, notes and config, as in `network_pickle.NetworkFile`.

    Raises:
        PickleError: the tensors are not those that the configuration describes.
    """
    _check_origin(config)
    described = config.get("networks")
    if not isinstance(described, dict) or not described or set(described) - set(NETWORKS):
        raise PickleError(f"its configuration describes no networks; {REMEDY}")
    result: dict[str, Any] = dict.fromkeys(NETWORKS)
    for key, settings in described.items():
        if not isinstance(settings, dict):
            raise PickleError(f"the settings of {key} are not a JSON object; {REMEDY}")
        prefix = f"{key}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        result[key] = network_pickle.build(CLASSES[key], settings, own, key)
    if result["G_ema"] is None:
        raise PickleError(f"it has no G_ema, which every file of ours has; {REMEDY}")
    kwargs = config.get("training_set_kwargs")
    kwargs, lost = data_record.known(kwargs if isinstance(kwargs, dict) else None)
    notes = config.get("notes", [])
    return {
        **result,
        "training_set_kwargs": kwargs,
        "notes": (*(printable(str(note), 300) for note in (notes[:20] if isinstance(notes, list) else ())), *lost),
        "config": config,
    }


def read(
    data: bytes, beside: "str | os.PathLike | None" = None
) -> "tuple[dict[str, torch.Tensor], dict[str, Any] | None]":
    """Tensors and configuration of a safetensors file, whoever wrote it.

    Args:
        data: the whole file.
        beside: file with the configuration, for a file whose header has none; it need not exist.

    Returns:
        The tensors, and the configuration or None.

    Raises:
        PickleError: damaged, or a pickle as well.
    """
    if not recognise.is_safetensors(data):
        raise PickleError(f"not a safetensors file; {REMEDY}")
    name = polyglot.imported_name(data)
    if name is not None:
        what = f"a safetensors file that is a pickle as well, which imports {printable(name)}"
        raise PickleError(f"{what}; hostile: do not open it with anything")
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, TypeError, OverflowError) as error:
        raise PickleError(f"damaged safetensors file ({printable(' '.join(str(error).split()), 160)})") from error
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    text = header.get("__metadata__", {}).get("config")
    if text is None and beside is not None:
        text = _text_of(beside)
    return tensors, None if text is None else _as_config(text)


def _text_of(path: "str | os.PathLike") -> "bytes | None":
    """The bytes of a configuration, or one more than it may have; None if there is no such file."""
    if not Path(path).is_file():
        return None
    with naming(path), open(path, "rb") as stream:
        return stream.read(MAX_CONFIG_BYTES + 1)


def _as_config(text: "str | bytes") -> dict[str, Any]:
    """Parse JSON of bounded size."""
    if len(text) > MAX_CONFIG_BYTES:
        raise PickleError(f"its configuration has more than {MAX_CONFIG_BYTES} bytes; damaged or hostile")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PickleError(f"its configuration is no JSON ({printable(str(error), 80)})") from None
    if not isinstance(config, dict):
        raise PickleError("its configuration is no JSON object; damaged")
    level: list[Any] = [config]
    for _ in range(MAX_CONFIG_DEPTH):
        level = [item for value in level for item in (value.values() if isinstance(value, dict) else value)]
        if any(isinstance(item, float) and not math.isfinite(item) for item in level):
            raise PickleError("its configuration holds a number that is not finite, which JSON has not; damaged")
        level = [item for item in level if isinstance(item, (dict, list))]
    if level:
        raise PickleError(f"its configuration nests deeper than {MAX_CONFIG_DEPTH}; damaged or hostile")
    return config
