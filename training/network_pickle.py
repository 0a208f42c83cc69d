"""Network snapshots: the pickled dict G, D, G_ema, augment_pipe, training_set_kwargs that the family exchanges.

`load` builds *our* networks from *their* weights and settings; nothing in the file is executed. `save` writes files
that open in the StyleGAN2-ADA and StyleGAN3 repositories. The bytes are read by `torch_utils.pickle_reader`. Files of
other kinds are opened by `training.network_file`, which is the door for all of them.
Source: networks-and-pickles.md sections 3-5; clarifications 1-9, 13-17.
"""

import hashlib
import inspect
import io
import math
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from dnnlib.util import EasyDict, atomic_file, open_url
from torch_utils import persistence, pickle_reader
from torch_utils.ops import bias_act
from torch_utils.pickle_reader import PersistentRecord, PickleError, TensorRecord, printable
from training import augment, data_record, networks, recognise

__all__ = [
    "NetworkFile",
    "PickleError",
    "augment_settings",
    "build",
    "discriminator_settings",
    "check_stored",
    "generator_settings",
    "keyword_settings",
    "load",
    "module_tensors",
    "parse",
    "save",
    "size_of",
]

KEYS = ("G", "D", "G_ema", "augment_pipe", "training_set_kwargs")
PROTOCOL = 4
MAX_MODULES = 2000  # persistent objects in one network; a 1024-pixel generator has about 70
MAX_MODULE_DEPTH = 16
MAX_SETTING = 1 << 20  # any whole number among the settings of a network
MAX_LAYERS = 64
REMEDY = "give a network-snapshot-*.pkl of StyleGAN2-ADA (PyTorch), or see docs/formats.md"

_GENERATOR_KEYS = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "mapping_kwargs", "synthesis_kwargs")
_FORK_KEYS = ("epochs",)  # written by dvschultz's fork, without effect
_FORK_MAPPING_KEYS = (
    "freeze_layers",
    "freeze_embed",
    "trainable_layers",
)  # PDillis' fork: frozen = buffers, same names


@dataclass(frozen=True)
class NetworkFile:
    """The networks of a file, in eval mode, on the CPU, without gradients.

    Attributes:
        G, D: generator and discriminator; None where the file has none.
        G_ema: moving average of the generator.
        augment_pipe: the augmentation pipe with its strength `p`, or None.
        training_set_kwargs: settings of the data set as far as they are known ones, or None; see `data_record`.
        path: where it was read from.
        sha256: digest of the file.
        kind: the format, one of `recognise.READABLE`.
        notes: sentences on what the file did not say and was assumed or estimated, and on what was left out.
        config: what a file of ours says of its origin (training, licences), plain JSON values; None for other files.
    """

    G: "torch.nn.Module | None"
    D: "torch.nn.Module | None"
    G_ema: torch.nn.Module
    augment_pipe: "torch.nn.Module | None"
    training_set_kwargs: "dict | None"
    path: str
    sha256: str
    kind: str = recognise.SNAPSHOT
    notes: "tuple[str, ...]" = ()
    config: "dict[str, Any] | None" = None


def load(path_or_url: "str | os.PathLike", *, trust_source: bool = False) -> NetworkFile:
    """Load a snapshot pickle without executing anything in it.

    Args:
        path_or_url: file of the StyleGAN2-ADA repository, of the StyleGAN3 repository's StyleGAN2, or ours.
        trust_source: DANGEROUS. Make the objects with the source text embedded in the file, which is executed and can
            do anything, instead of our classes. For networks of forks that changed the architecture, from an author you
            trust as you trust a program you run. Other functions that a file may name stay refused.

    Raises:
        PickleError: not such a file, damaged, or hostile; one line with what was found and what to do.
        OSError: the file cannot be read.
    """
    name = printable(os.fspath(path_or_url), 500)
    with open_url(os.fspath(path_or_url)) as stream:
        data = stream.read()
    try:
        found = _revive_all(_checked(data)) if trust_source else parse(data)
    except PickleError as error:
        raise PickleError(f"{name}: {error}") from None
    return NetworkFile(**found, path=os.fspath(path_or_url), sha256=hashlib.sha256(data).hexdigest())


def parse(data: bytes) -> dict[str, Any]:
    """Build our networks from the bytes of a snapshot: the values of `KEYS`, G and D None where it has none, and notes.

    Raises:
        PickleError: see `load`; the message lacks the file's name.
    """
    root = _checked(data)
    result: dict[str, Any] = {}
    for key in ("G", "D", "G_ema"):
        if root.get(key) is None:
            result[key] = None
            continue
        settings = discriminator_settings(root[key]) if key == "D" else generator_settings(root[key])
        cls = networks.Discriminator if key == "D" else networks.Generator
        result[key] = build(cls, settings, module_tensors(root[key]), key)
    pipe = root.get("augment_pipe")
    result["augment_pipe"] = None
    if pipe is not None:
        if not isinstance(pipe, PersistentRecord) or pipe.class_name != "AugmentPipe":
            raise PickleError(
                f"augment_pipe is a {pickle_reader.describe(pipe)}, wanted an AugmentPipe or None; {REMEDY}"
            )
        result["augment_pipe"] = build(
            augment.AugmentPipe, augment_settings(pipe), module_tensors(pipe), "augment_pipe"
        )
    result["training_set_kwargs"], result["notes"] = _training_set_kwargs(root)
    return result


def save(
    path: "str | os.PathLike",
    *,
    G: torch.nn.Module,
    D: torch.nn.Module,
    G_ema: torch.nn.Module,
    augment_pipe: "torch.nn.Module | None" = None,
    training_set_kwargs: "dict | None" = None,
) -> None:
    """Write a snapshot atomically; equal content gives equal bytes.

    The file opens in the StyleGAN2-ADA and StyleGAN3 repositories: protocol 4, our own source text, Python numbers.
    The networks are described, not changed: in the file they are in eval mode, on the CPU, without gradients.

    Args:
        path: file to write; an existing one is replaced when the new one is complete.
        G, D, G_ema: networks of persistent classes.
        augment_pipe: augmentation pipe or None.
        training_set_kwargs: settings of the data set or None; those that `data_record` knows are written.

    Raises:
        ValueError: a network holds something that does not belong into a snapshot.
    """
    writer = _Writer()
    content: dict[str, Any] = {"G": G, "D": D, "G_ema": G_ema, "augment_pipe": augment_pipe}
    settings = writer.plain(training_set_kwargs, "training_set_kwargs")
    content["training_set_kwargs"], _ = data_record.known(settings)
    with atomic_file(path) as stream:
        _SnapshotPickler(stream, writer).dump(content)


def generator_settings(record: PersistentRecord) -> dict:
    """Constructor arguments of our Generator for a recorded one, whichever repository wrote it.

    Flat arguments (StyleGAN3 repository) become `synthesis_kwargs`. What was not given means the *origin's* default,
    and the recorded attributes tell it: conv_clamp, use_fp16, w_avg_beta.

    Raises:
        PickleError: the record lacks what is needed.
    """
    settings = _constructor_settings(record, _GENERATOR_KEYS[:5])
    mapping = _nested(settings, "mapping_kwargs")
    synthesis = _nested(settings, "synthesis_kwargs")
    for key in [key for key in settings if key not in _GENERATOR_KEYS]:
        synthesis[key] = settings.pop(key)
    for key in _FORK_KEYS:
        synthesis.pop(key, None)
    for key in _FORK_MAPPING_KEYS:
        mapping.pop(key, None)
    children = record.table("_modules")
    _settle_precision(synthesis, children.get("synthesis"), ("conv1", "conv0", "torgb"), smallest=4)
    mapping_record = children.get("mapping")
    if isinstance(mapping_record, PersistentRecord) and "w_avg_beta" in mapping_record.state:
        beta = mapping_record.state["w_avg_beta"]
        if _is_number(beta) and beta != mapping.get("w_avg_beta", 0.995):
            mapping["w_avg_beta"] = beta
    settings.update(mapping_kwargs=mapping, synthesis_kwargs=synthesis)
    return settings


def discriminator_settings(record: PersistentRecord) -> dict:
    """Constructor arguments of our Discriminator for a recorded one, whichever repository wrote it.

    Raises:
        PickleError: the record lacks what is needed.
    """
    settings = _constructor_settings(record, ("c_dim", "img_resolution", "img_channels"))
    for key in ("block_kwargs", "mapping_kwargs", "epilogue_kwargs"):
        settings[key] = _nested(settings, key)
    for key in _FORK_KEYS:
        settings.pop(key, None)
    for key in _FORK_MAPPING_KEYS:
        settings["mapping_kwargs"].pop(key, None)
    _settle_precision(settings, record, ("conv0", "conv1"), smallest=8)
    return settings


def augment_settings(record: PersistentRecord) -> dict:
    """Constructor arguments of our AugmentPipe for a recorded one.

    Raises:
        PickleError: the record lacks them.
    """
    return _constructor_settings(record, ())


def module_tensors(record: PersistentRecord) -> dict[str, TensorRecord]:
    """All parameters and buffers of a recorded module, in the order of torch's state dict.

    Raises:
        PickleError: the module tree is malformed or built to exhaust its reader.
    """
    tensors: dict[str, TensorRecord] = {}
    pending: list[tuple[str, Any, int]] = [("", record, 0)]
    visited = 0
    while pending:
        prefix, module, depth = pending.pop()
        visited += 1
        if visited > MAX_MODULES or depth > MAX_MODULE_DEPTH:
            raise PickleError("its module tree is larger or deeper than any StyleGAN2; damaged or hostile")
        if not isinstance(module, PersistentRecord):
            raise PickleError(f"module {printable(prefix)!r} is a {pickle_reader.describe(module)}; {REMEDY}")
        visited += sum(len(module.table(table)) for table in ("_parameters", "_buffers", "_modules")) // 16
        if visited > MAX_MODULES:
            raise PickleError("its module tree is larger than any StyleGAN2; damaged or hostile")
        for table in ("_parameters", "_buffers"):
            for name, tensor in module.table(table).items():
                if isinstance(tensor, TensorRecord):
                    tensors[f"{prefix}{name}"] = tensor
                elif tensor is not None:
                    what = pickle_reader.describe(tensor)
                    raise PickleError(
                        f"{printable(prefix + str(name))!r} is a {what}, wanted a tensor; damaged or hostile"
                    )
        children = [(f"{prefix}{name}.", child, depth + 1) for name, child in module.table("_modules").items()]
        pending.extend(item for item in reversed(children) if item[1] is not None)
    return tensors


def build(
    cls: type, settings: dict, tensors: "Mapping[str, TensorRecord | torch.Tensor]", what: str, *, computed: str = ""
) -> torch.nn.Module:
    """Make one of our modules and fill it with recorded numbers, by name; buffer or parameter does not matter.

    The memory taken is bounded by the numbers in the file, whatever the settings say.

    Args:
        cls: our class.
        settings: its constructor arguments.
        tensors: parameters and buffers, recorded in a file or at hand.
        what: name in messages.
        computed: last part of the names of buffers that the constructor computes and the file need not have.

    Raises:
        PickleError: the settings do not make such a module, or names, shapes or types differ.
    """
    _check_settings(settings, what)
    order = {name: index for index, name in enumerate(inspect.signature(cls).parameters)}
    settings = {key: settings[key] for key in sorted(settings, key=lambda key: order.get(key, len(order)))}
    shown = check_stored(tensors, what)
    try:
        with _MemoryBudget(2 * shown + 4096):
            module = cls(**settings)
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError, ArithmeticError) as e:
        reason = printable(" ".join(str(e).split()), 160)
        raise PickleError(f"{what}: its settings make no {cls.__name__} here ({reason}); {REMEDY}") from e
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    if computed:
        own = {name: t for name, t in own.items() if name in tensors or name.rpartition(".")[2] != computed}
    for name in [*own, *tensors]:
        if name not in tensors or name not in own:
            which = "lacks" if name not in tensors else "has the unknown tensor"
            raise PickleError(f"{what} {which} {printable(name)!r}; the architecture is not StyleGAN2's; {REMEDY}")
        got, wanted = list(size_of(tensors[name])), list(own[name].shape)
        if got != wanted:
            raise PickleError(f"{what}: {name!r} has shape {got}, its settings say {wanted}; the file is damaged")
        if not tensors[name].dtype.is_floating_point:
            raise PickleError(f"{what}: {name!r} is {tensors[name].dtype}, wanted floating point; {REMEDY}")
    with torch.no_grad():
        for name, tensor in own.items():
            value = tensors[name]
            tensor.copy_(value.tensor() if isinstance(value, TensorRecord) else value)
    return module.eval().requires_grad_(False)


def size_of(tensor: "TensorRecord | torch.Tensor") -> tuple[int, ...]:
    """Shape of a recorded tensor or of one at hand."""
    return tensor.size if isinstance(tensor, TensorRecord) else tuple(tensor.shape)


def check_stored(tensors: "Mapping[str, TensorRecord | torch.Tensor]", what: str) -> int:
    """Number of elements that the tensors show together.

    Raises:
        PickleError: far more than the file stores, so that copying them out would fill the memory.
    """
    records = [tensor for tensor in tensors.values() if isinstance(tensor, TensorRecord)]
    blobs = [(record.storage.blob, record.storage.numel) for record in records]
    stored = {(id(blob.data), blob.start): numel for blob, numel in blobs if blob is not None}
    shown = sum(record.numel for record in records)
    if shown > 2 * sum(stored.values()):
        raise PickleError(f"{what}: its tensors show far more numbers than the file stores; damaged or hostile")
    return shown + sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, torch.Tensor))


class _MemoryBudget(TorchFunctionMode):
    """While a module is constructed: its tensors start as zeros, and all together stay within a number of elements."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.num_elements = num_elements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.rand, torch.zeros, torch.ones, torch.full, torch.empty):
            size = kwargs["size"] if "size" in kwargs else args[0] if isinstance(args[0], (list, tuple)) else args
            self.num_elements -= math.prod(int(n) for n in size)
            if self.num_elements < 0:
                raise ValueError("they imply more numbers than the file holds")
        return (torch.zeros if func in (torch.randn, torch.rand) else func)(*args, **kwargs)


def _checked(data: bytes) -> dict:
    """The top-level dict of a snapshot that stays within the allow-list."""
    document = pickle_reader.survey(data)
    code, words = recognise.identify(document)
    if code not in (recognise.SNAPSHOT, recognise.UNKNOWN):
        reason = recognise.FOREIGN[code][1] if code in recognise.FOREIGN else "not a snapshot pickle"
        raise PickleError(f"this is {words}, wanted a StyleGAN2-ADA snapshot; {reason}; {REMEDY}")
    if document.container != "pickle":
        raise PickleError(f"not a snapshot pickle but a file of torch.save; {REMEDY}")
    if document.refusals:
        raise PickleError(document.refusals[0])
    if document.damage is not None:
        raise PickleError(document.damage)
    root = document.root
    if not isinstance(root, dict):
        what = pickle_reader.describe(root)
        raise PickleError(
            f"not a network snapshot: the top level is a {what}, wanted a dict with G, D and G_ema; {REMEDY}"
        )
    for key in ("G", "D", "G_ema"):
        if root.get(key) is None and key != "G_ema":  # some forks keep the moving average only
            continue
        if key not in root:
            raise PickleError(f"not a network snapshot: it has no {key}, wanted G, D and G_ema; {REMEDY}")
        if not isinstance(root[key], PersistentRecord):
            what = pickle_reader.describe(root[key])
            raise PickleError(f"not a network snapshot: {key} is a {what}, wanted a network; {REMEDY}")
        wanted = "Discriminator" if key == "D" else "Generator"
        if root[key].class_name != wanted:
            got = printable(root[key].class_name)
            raise PickleError(f"not a StyleGAN2 snapshot: {key} is of class {got!r}, wanted {wanted!r}; {REMEDY}")
    return root


def _training_set_kwargs(root: dict) -> "tuple[dict | None, tuple[str, ...]]":
    value = root.get("training_set_kwargs")
    if value is not None and not isinstance(value, dict):
        raise PickleError(f"training_set_kwargs is a {pickle_reader.describe(value)}, wanted a dict or None; {REMEDY}")
    return data_record.known(pickle_reader.plain(value, "training_set_kwargs"))


def _constructor_settings(record: PersistentRecord, positional: tuple[str, ...]) -> dict:
    """`_init_args` and `_init_kwargs` as one dict; the leading ones also stand as attributes."""
    if record.meta.get("type") != "class" or record.meta.get("version") != persistence.FORMAT_VERSION:
        raise PickleError(f"a persistent object of another version than {persistence.FORMAT_VERSION}; {REMEDY}")
    what = f"the settings of {printable(record.class_name)}"
    args = pickle_reader.plain(record.state.get("_init_args", ()), what)
    settings = pickle_reader.plain(record.state.get("_init_kwargs", {}), what)
    if not isinstance(args, (tuple, list)) or not isinstance(settings, dict) or len(args) > len(positional):
        raise PickleError(f"{what} are not in the usual form; {REMEDY}")
    settings = {**dict(zip(positional, args)), **settings}
    for key in positional:
        if key not in settings:
            value = record.state.get(key)
            if type(value) is not int:
                raise PickleError(f"{what} lack {key}; {REMEDY}")
            settings[key] = value
    if not all(type(key) is str for key in settings):
        raise PickleError(f"{what} have a name that is not text; damaged or hostile")
    return settings


def _nested(settings: dict, key: str) -> dict:
    value = settings.pop(key, None)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(type(name) is str for name in value):
        raise PickleError(f"setting {key} is a {pickle_reader.describe(value)}, wanted a dict; {REMEDY}")
    return dict(value)


def _settle_precision(settings: dict, blocks: Any, leaves: tuple[str, ...], smallest: int) -> None:
    """Let the attributes decide conv_clamp and num_fp16_res, whose defaults differ between the repositories."""
    if not isinstance(blocks, PersistentRecord):
        return
    children = blocks.table("_modules")
    flags = []
    clamp_found = False
    for res in (2**i for i in range(2, 15)):
        block = children.get(f"b{res}")
        if res < smallest or not isinstance(block, PersistentRecord):
            continue
        flags.append((res, block.state.get("use_fp16") is True))
        for leaf in leaves:
            layer = block.table("_modules").get(leaf)
            if not clamp_found and isinstance(layer, PersistentRecord) and "conv_clamp" in layer.state:
                clamp, clamp_found = layer.state["conv_clamp"], True
                if (clamp is None or _is_number(clamp)) and clamp != settings.get("conv_clamp"):
                    settings["conv_clamp"] = clamp
    if not flags or any("use_fp16" not in children[f"b{res}"].state for res, _ in flags):
        return
    top = flags[-1][0]
    given = settings.get("num_fp16_res", 0)
    if type(given) is not int or not 0 <= given <= MAX_LAYERS:
        raise PickleError(f"num_fp16_res is {pickle_reader.describe(given)}, wanted a small whole number; {REMEDY}")
    if any(flag != (res >= max(2 * top / 2**given, 8)) for res, flag in flags):
        settings["num_fp16_res"] = sum(flag for _, flag in flags)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _check_settings(settings: dict, what: str) -> None:
    """Known activations, which layers look up when they first run, and bounds on every number, so that building costs
    no more than a real network does.
    """
    pending: list[tuple[str, Any]] = list(settings.items())
    while pending:
        key, value = pending.pop()
        if key == "activation" and (not isinstance(value, str) or value not in bias_act.activation_funcs):
            wanted = ", ".join(bias_act.activation_funcs)
            raise PickleError(f"{what}: activation {printable(ascii(value))} is unknown; one of {wanted}; {REMEDY}")
        if isinstance(value, dict):
            pending.extend(value.items())
        elif isinstance(value, (list, tuple)):
            if len(value) > MAX_LAYERS:
                raise PickleError(f"{what}: setting {printable(str(key))} has {len(value)} entries; damaged or hostile")
            pending.extend((key, item) for item in value)
        elif _is_number(value):
            limit = MAX_LAYERS if key in ("num_layers", "num_fp16_res", "kernel_size") else MAX_SETTING
            if not abs(value) <= limit:
                raise PickleError(
                    f"{what}: setting {printable(str(key))} is {value}, over the limit of {limit}; {REMEDY}"
                )


def _revive_all(root: dict) -> dict[str, Any]:
    """The objects themselves, made with the source embedded in the file. Executes it."""
    result: dict[str, Any] = {}
    with persistence.trust_source():
        for key in ("G", "D", "G_ema", "augment_pipe"):
            record = root.get(key)
            if record is not None:
                module_tensors(record)  # bounds of the tree
                try:
                    module = _revive(record, 0)
                except PickleError:
                    raise
                except Exception as error:  # whatever foreign code raises
                    reason = printable(" ".join(f"{type(error).__name__}: {error}".split()), 160)
                    raise PickleError(
                        f"the embedded source of {key} failed ({reason}); load it without trust"
                    ) from error
                if not isinstance(module, torch.nn.Module):
                    raise PickleError(f"the embedded source of {key} makes no torch module; {REMEDY}")
                record = module.eval().requires_grad_(False)
            result[key] = record
    result["training_set_kwargs"], result["notes"] = _training_set_kwargs(root)
    return result


def _revive(node: Any, depth: int) -> Any:
    if depth > 4 * MAX_MODULE_DEPTH:
        raise PickleError("its objects nest deeper than any StyleGAN2; damaged or hostile")
    if isinstance(node, PersistentRecord):
        state = {key: _revive(value, depth + 1) for key, value in node.state.items()}
        return persistence._reconstruct_persistent_obj({**node.meta, "state": state})
    if isinstance(node, TensorRecord):
        return torch.nn.Parameter(node.tensor(), requires_grad=False) if node.is_parameter else node.tensor()
    if isinstance(node, dict):
        kinds: dict[type, Any] = {pickle_reader.OrderedDictRecord: OrderedDict, pickle_reader.EasyDictRecord: EasyDict}
        return kinds.get(type(node), dict)((key, _revive(value, depth + 1)) for key, value in node.items())
    if type(node) in (list, tuple):
        return type(node)(_revive(item, depth + 1) for item in node)
    if type(node) is set:
        return set(node)
    return pickle_reader.plain(node, "an attribute")


class _Storage:
    """The numbers of one tensor, on their way into the pickle."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def tobytes(self) -> bytes:
        """PyTorch's container from before its zip format; a fixed key makes the bytes depend on the content only."""
        flat = self.tensor.as_strided((self.tensor.numel(),), (1,))
        names = {dtype: name for name, dtype in pickle_reader.STORAGE_DTYPES.items()}
        if self.tensor.dtype not in names:
            raise ValueError(f"a tensor of type {self.tensor.dtype} cannot go into a snapshot; convert it to float32")
        system = dict(
            protocol_version=pickle_reader.TORCH_PROTOCOL, little_endian=True, type_sizes=dict(short=2, int=4, long=4)
        )
        storage_class = getattr(torch, names[self.tensor.dtype].split(".")[1])
        header = io.BytesIO()
        for value in (pickle_reader.TORCH_MAGIC, pickle_reader.TORCH_PROTOCOL, system):
            pickle.dump(value, header, 2)
        pickler = _IdPickler(header, 2)
        pickler.dump(_PersistentId(("storage", storage_class, "0", "cpu", flat.numel(), None)))
        pickle.dump(["0"], header, 2)
        header.write(struct.pack("<q", flat.numel()))
        raw = flat.view(torch.uint8) if flat.dtype != torch.bool else flat
        return header.getvalue() + raw.numpy().tobytes()


class _PersistentId:
    def __init__(self, value: tuple) -> None:
        self.value = value


class _IdPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.value if isinstance(obj, _PersistentId) else None


class _SnapshotPickler(pickle.Pickler):
    """Writes modules as persistent records and tensors as stock PyTorch does; the bytes depend on the content only."""

    def __init__(self, stream: Any, writer: "_Writer") -> None:
        super().__init__(stream, protocol=PROTOCOL)
        self.writer = writer

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.nn.Module):
            return persistence._reconstruct_persistent_obj, (persistence.describe(obj, self.writer.state(obj)),)
        if isinstance(obj, torch.nn.Parameter):
            return torch._utils._rebuild_parameter, (obj.detach(), False, OrderedDict())
        if isinstance(obj, torch.Tensor):
            tensor = obj.detach().cpu()
            if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
                tensor = tensor.contiguous()
            size, stride = tuple(tensor.shape), tuple(tensor.stride())
            return torch._utils._rebuild_tensor_v2, (_Storage(tensor), 0, size, stride, False, OrderedDict())
        if isinstance(obj, _Storage):
            return torch.storage._load_from_bytes, (obj.tobytes(),)
        return NotImplemented


class _Writer:
    """Turns the state of modules into fresh plain values; equal strings become one: sharing is part of the bytes."""

    def __init__(self) -> None:
        self.strings: dict[str, str] = {}

    def state(self, module: torch.nn.Module) -> dict:
        """What `__setstate__` of old and new PyTorch needs, then the module's own attributes."""
        internal = vars(torch.nn.Module())
        state: dict[str, Any] = {
            "training": False,
            "_parameters": OrderedDict(module._parameters),
            "_buffers": OrderedDict(module._buffers),
            "_non_persistent_buffers_set": set(module._non_persistent_buffers_set),
        }
        for hooks in (
            "_backward_hooks",
            "_forward_hooks",
            "_forward_pre_hooks",
            "_state_dict_hooks",
            "_load_state_dict_pre_hooks",
        ):
            state[hooks] = OrderedDict()
        state["_modules"] = OrderedDict(module._modules)
        for table in ("_parameters", "_buffers", "_modules"):
            state[table] = OrderedDict((self.plain(name, "name"), value) for name, value in state[table].items())
        attributes = {name: value for name, value in vars(module).items() if name not in internal}
        args, kwargs = attributes.pop("_init_args", ()), attributes.pop("_init_kwargs", {})
        for name, value in attributes.items():
            state[self.plain(name, "name")] = self.plain(value, f"{type(module).__name__}.{name}")
        what = f"the settings of {type(module).__name__}"
        if args:
            args, kwargs = (), _as_keywords(type(module), args, kwargs)
        state["_init_args"] = self.plain(tuple(args), what)
        state["_init_kwargs"] = {
            self.plain(key, what): self.plain(value, what, EasyDict) for key, value in kwargs.items()
        }
        return state

    def plain(self, value: Any, what: str, dict_type: type = dict) -> Any:
        """A fresh copy made of Python's own types; NumPy numbers become Python's."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in (bool, int, float):
            return value
        if isinstance(value, str):
            return self.strings.setdefault(str(value), str(value))
        if isinstance(value, dict):
            dict_type = EasyDict if isinstance(value, EasyDict) else dict_type
            items = [(self.plain(key, what), self.plain(item, what, dict_type)) for key, item in value.items()]
            return dict_type(items)
        if isinstance(value, (list, tuple)):
            items = [self.plain(item, what, dict_type) for item in value]
            return items if isinstance(value, list) else tuple(items)
        raise ValueError(
            f"{what} holds a {type(value).__name__}, which cannot go into a snapshot; keep plain settings there"
        )


def keyword_settings(module: torch.nn.Module) -> dict[str, Any]:
    """The call that made a persistent module, with keywords only and plain values.

    Raises:
        ValueError: a value is not plain.
    """
    attributes = vars(module)
    settings = _as_keywords(type(module), attributes.get("_init_args", ()), attributes.get("_init_kwargs", {}))
    return _Writer().plain(dict(settings), f"the settings of {type(module).__name__}")


def _as_keywords(cls: type, args: tuple, kwargs: dict) -> dict:
    """The same constructor call with keywords only."""
    parameters = list(inspect.signature(cls).parameters.values())
    names = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise ValueError(f"{cls.__name__} was made with unnamed arguments that have no names; use keywords")
    return {**dict(zip(names, args)), **kwargs}
