"""Build the corpus of hostile network files under tests/data/hostile. Nothing here executes what it writes.

Payloads would do no harm (they would create a file called `executed`), so that a reader which does execute them can be
caught. `index.json` tells for each file what it does and what kind of attack it is:
  code     an ordinary unpickler would import or call something that no network needs
  exhaust  reading it would take far more time or memory than its size
  lie      lengths, shapes or references that the file does not honour
  broken   damaged, as downloads are
`loads` marks the few whose hostile part is text that an inert reader has no use for: they may load, executing nothing.

Usage: python scripts/build_hostile.py [FOLDER]
"""

import copy
import gzip
import io
import json
import pickletools
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from torch_utils import pickle_reader
from torch_utils.pickle_reader import Blob, PersistentRecord, TensorRecord
from training import network_pickle, networks

ROOT = Path(__file__).resolve().parent.parent
DEST = ROOT / "tests" / "data" / "hostile"
GENUINE = ROOT / "tests" / "data" / "pickles" / "snapshot_b.pkl.gz"
PAYLOAD = "touch executed"
PYTHON_PAYLOAD = "open('executed', 'w').close()"
PERSISTENT = ("torch_utils.persistence", "_reconstruct_persistent_obj")
REBUILD = ("torch._utils", "_rebuild_tensor_v2")
FROM_BYTES = ("torch.storage", "_load_from_bytes")
ORDERED = ("collections", "OrderedDict")
PARAMETER = ("torch._utils", "_rebuild_parameter")
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
HEADER = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}

Case = tuple[str, str, str, bytes]  # name, kind, what it does, content


# An assembler. Values are written without memo, so that pieces can be put together freely.


class Raw(bytes):
    """Opcodes to insert as they are."""


def value(item: Any) -> bytes:
    """Opcodes that leave `item` on the stack."""
    if isinstance(item, Raw):
        return bytes(item)
    if item is None or isinstance(item, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[item]
    if isinstance(item, int):
        raw = item.to_bytes(item.bit_length() // 8 + 1, "little", signed=True)
        return b"J" + struct.pack("<i", item) if -(2**31) <= item < 2**31 else b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(item, float):
        return b"G" + struct.pack(">d", item)
    if isinstance(item, str):
        raw = item.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw
    if isinstance(item, bytes):
        return b"B" + struct.pack("<I", len(item)) + item
    if isinstance(item, tuple):
        return b"(" + b"".join(map(value, item)) + b"t"
    if isinstance(item, list):
        return b"](" + b"".join(map(value, item)) + b"e"
    return b"}(" + b"".join(value(key) + value(content) for key, content in item.items()) + b"u"


def named(module: str, name: str) -> Raw:
    """STACK_GLOBAL of protocol 4: names may hold dots."""
    return Raw(value(module) + value(name) + b"\x93")


def line_named(module: str, name: str) -> Raw:
    """GLOBAL of protocol 0."""
    return Raw(b"c" + module.encode() + b"\n" + name.encode() + b"\n")


def call(function: tuple[str, str] | Raw, *args: Any) -> Raw:
    """REDUCE."""
    return Raw((function if isinstance(function, Raw) else named(*function)) + value(tuple(args)) + b"R")


def whole(item: Any, protocol: int = 4) -> bytes:
    """A complete pickle."""
    return b"\x80" + bytes([protocol]) + value(item) + b"."


def storage_bytes(numel: int, content: bytes, dtype: str = "FloatStorage", keys: tuple = ("0",)) -> bytes:
    """PyTorch's container from before its zip format around one storage, as tensors in snapshots carry it."""
    key = ("storage", line_named("torch", dtype), "0", "cpu", numel, None)
    head = whole(TORCH_MAGIC, 2) + whole(1001, 2) + whole(HEADER, 2)
    return head + b"\x80\x02" + value(key) + b"Q." + whole(list(keys), 2) + struct.pack("<q", numel) + content


def tensor(size: tuple, stride: tuple, offset: Any = 0, *, numel: int = 4, content: bytes = bytes(16)) -> Raw:
    """A tensor over a storage of its own."""
    storage = call(FROM_BYTES, storage_bytes(numel, content))
    return call(REBUILD, storage, offset, size, stride, False, call(ORDERED))


def persistent(class_name: str, state: Any, source: str = "", **meta: Any) -> Raw:
    """An object of a persistent class, as networks are."""
    full = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state, **meta}
    return call(PERSISTENT, full)


def control(edit: Callable[[dict], None] = lambda root: None) -> bytes:
    """A small snapshot that loads, changed by `edit`, which gets it as the reader's records.

    So a refusal is the change's doing. The numbers are zeros and there is no source text, to keep files small.
    """
    sizes = {"img_resolution": 8, "img_channels": 3, "c_dim": 0}
    width = {"channel_base": 32, "channel_max": 4}
    G = networks.Generator(z_dim=4, w_dim=4, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=dict(width), **sizes)
    D = networks.Discriminator(**width, **sizes)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for tensor_ in [*G.parameters(), *G.buffers(), *D.parameters(), *D.buffers()]:
            tensor_.zero_()
        path = Path(folder) / "control.pkl"
        network_pickle.save(path, G=G, D=D, G_ema=copy.deepcopy(G))
        root = pickle_reader.read(path.read_bytes()).root
    edit(root)
    return whole(encoded(root))


def encoded(record: Any) -> Any:
    """Records of the reader as what `value` writes."""
    if isinstance(record, PersistentRecord):
        return call(PERSISTENT, encoded({**record.meta, "module_src": ""} | record.meta.pop("replaced", {})))
    if isinstance(record, TensorRecord):
        blob = record.storage.blob
        assert blob is not None
        found = tensor(record.size, record.stride, record.offset, numel=record.storage.numel,
                       content=blob.tobytes()[: 4 * record.storage.numel])  # fmt: skip
        return call(PARAMETER, found, False, call(ORDERED)) if record.is_parameter else found
    if isinstance(record, Blob):
        return record.tobytes()
    if isinstance(record, dict):
        return {key: encoded(content) for key, content in record.items()}
    if isinstance(record, set):
        return call(("builtins", "set"), sorted(record))
    if isinstance(record, (list, tuple)):
        return type(record)(encoded(item) for item in record)
    return record


def with_settings(**settings: Any) -> bytes:
    """The control with other constructor settings of its generators."""

    def edit(root: dict) -> None:
        for network in (root["G"], root["G_ema"]):
            kwargs = network.state["_init_kwargs"]
            for name, setting in settings.items():
                both = isinstance(setting, dict) and isinstance(kwargs.get(name), dict)
                kwargs[name] = {**kwargs[name], **setting} if both else setting

    return control(edit)


def with_state(**state: Any) -> bytes:
    """The control with more, or other, state of its generator."""
    return control(lambda root: root["G"].state.update(state))


def with_meta(**meta: Any) -> bytes:
    """The control with another record around its generator: class name, source text, type."""
    return control(lambda root: root["G"].meta.update(replaced=meta))


def with_entries(**entries: Any) -> bytes:
    """The control with more, or other, entries beside its networks."""
    return control(lambda root: root.update(entries))


def with_tensor(found: Raw) -> bytes:
    """The control with another tensor as the average of w, which has 4 numbers."""
    return control(lambda root: root["G_ema"].table("_modules")["mapping"].table("_buffers").update(w_avg=found))


def doubling(levels: int) -> Raw:
    """A list that shows 2^levels lists, all but the last only in the memo."""
    return Raw(b"]q\x000" + b"]h\x00ah\x00aq\x000" * levels + b"h\x00")


def genuine() -> bytes:
    """A real snapshot."""
    return gzip.decompress(GENUINE.read_bytes())


# The cases.


CALLED = {
    "os_system": ("os", "system", (PAYLOAD,)),
    "nt_system": ("nt", "system", (PAYLOAD,)),
    "subprocess_run": ("subprocess", "run", (["touch", "executed"],)),
    "commands_getoutput": ("commands", "getoutput", (PAYLOAD,)),
    "pty_spawn": ("pty", "spawn", (["touch", "executed"],)),
    "builtins_exec": ("builtins", "exec", (PYTHON_PAYLOAD,)),
    "builtins_compile": ("builtins", "compile", (PYTHON_PAYLOAD, "x", "exec")),
    "builtins_import": ("builtins", "__import__", ("antigravity",)),
    "builtins_getattr": ("builtins", "getattr", (named("os", "path"), "os")),
    "builtins_open": ("builtins", "open", ("executed", "w")),
    "code_interpreter": ("code", "InteractiveInterpreter.runsource", (None, PYTHON_PAYLOAD)),
    "timeit": ("timeit", "timeit", (PYTHON_PAYLOAD,)),
    "cprofile": ("cProfile", "run", (PYTHON_PAYLOAD,)),
    "pdb": ("pdb", "run", (PYTHON_PAYLOAD,)),
    "doctest": ("doctest", "debug_script", (PYTHON_PAYLOAD,)),
    "ctypes": ("ctypes", "CDLL", ("libc.so.6",)),
    "shutil_rmtree": ("shutil", "rmtree", ("executed",)),
    "socket": ("socket", "create_connection", (("127.0.0.1", 9),)),
    "urlopen": ("urllib.request", "urlopen", ("http://127.0.0.1:9/",)),
    "webbrowser": ("webbrowser", "open", ("http://127.0.0.1:9/",)),
    "pip_main": ("pip._internal", "main", (["--version"],)),
    "logging_config": ("logging.config", "dictConfig", ({"version": 1},)),
    "multiprocessing": ("multiprocessing.util", "spawnv_passfds", (b"/bin/touch", ["touch", "executed"], [])),
    "marshal": ("marshal", "loads", (b"N",)),
    "types_code": ("types", "CodeType", ()),
    "pickle_loads": ("pickle", "loads", (b"cos\nsystem\n(Vtouch executed\ntR.",)),
    "torch_load": ("torch", "load", ("executed",)),
    "torch_hub": ("torch.hub", "load", ("x/y", "z")),
    "torch_jit": ("torch.jit", "load", ("executed",)),
    "torch_compile": ("torch._inductor.codecache", "PyCodeCache.load", (PYTHON_PAYLOAD,)),
    "numpy_load": ("numpy", "load", ("executed", None, True)),
    "numpy_runstring": ("numpy.testing._private.utils", "runstring", (PYTHON_PAYLOAD, {})),
    "joblib": ("joblib", "load", ("executed",)),
    "methodcaller": ("operator", "methodcaller", ("system", PAYLOAD)),
    "asyncio": ("asyncio.base_events", "BaseEventLoop.run_in_executor", (None, None)),
    "sys_modules": ("sys", "modules.get", ("os",)),
    "dnnlib_open_url": ("dnnlib.util", "open_url", ("http://127.0.0.1:9/",)),
    "dnnlib_construct": ("dnnlib.util", "construct_class_by_name", ()),
    "our_loader": ("torch_utils.custom_ops", "build", ()),
}
DOTTED = {
    "easydict_globals": ("dnnlib.util", "EasyDict.__init__.__globals__"),
    "ordered_subclasses": ("collections", "OrderedDict.__base__.__subclasses__"),
    "import_dotted": ("torch._utils", "_import_dotted_name"),
    "persistence_module": ("torch_utils.persistence", "sys.modules"),
    "storage_torch_os": ("torch.storage", "_load_from_bytes.__globals__"),
    "dtype_module": ("numpy", "dtype.__class__"),
    "dotted_module": ("torch_utils", "persistence._reconstruct_persistent_obj"),
}
LOOKALIKE = {
    "cyrillic_o": ("\u043es", "system"),
    "fullwidth": ("\uff4f\uff53", "system"),
    "zero_width": ("o\u200bs", "system"),
    "cyrillic_in_allowed": ("c\u043ellections", "OrderedDict"),
    "nul_after_allowed": ("collections\0", "OrderedDict"),
    "newline_in_allowed": ("collections\n", "OrderedDict"),
    "space_after_allowed": ("collections", "OrderedDict "),
    "case_of_allowed": ("Collections", "orderedDict"),
    "right_to_left": ("\u202eso", "system"),
    "surrogate": ("o\ud800s", "system"),
}


def calls() -> Iterator[Case]:
    """A name that no network needs, called, read by a dot, or dressed as another."""
    for name, (module, attribute, args) in CALLED.items():
        yield f"call_{name}", "code", f"calls {module}.{attribute}", whole(call((module, attribute), *args))
    for name, (module, attribute) in DOTTED.items():
        yield f"dotted_{name}", "code", f"reads {module}:{attribute}", whole(call((module, attribute)))
    for name, (module, attribute) in LOOKALIKE.items():
        what = f"asks for {ascii(module)}.{ascii(attribute)}"
        yield f"lookalike_{name}", "code", what, whole(call((module, attribute), PAYLOAD))
    walk = call(("builtins", "getattr"), call(("builtins", "__import__"), "os"), "system")
    yield "nested_getattr", "code", "walks from __import__ to a function by getattr", whole(call(walk, PAYLOAD))
    yield "in_key", "code", "the call makes a dict key", whole({"G": 1, Raw(call(("os", "system"), PAYLOAD)): 2})
    yield "after_stop", "code", "a second pickle after the first", control() + whole(call(("os", "system"), PAYLOAD))
    yield "before_pop", "code", "called, then thrown away", b"\x80\x04" + call(("os", "system"), PAYLOAD) + b"0N."


def opcodes() -> Iterator[Case]:
    """Every opcode that makes objects, and the ones that reach outside the file."""
    system, popen = line_named("os", "system"), line_named("subprocess", "Popen")
    text = b"(V" + PAYLOAD.encode() + b"\ntR."
    yield "opcode_reduce_text", "code", "GLOBAL and REDUCE, protocol 0", system + text
    yield "opcode_inst", "code", "INST", b"(V" + PAYLOAD.encode() + b"\nios\nsystem\n."
    yield "opcode_obj", "code", "OBJ", b"\x80\x02(" + popen + value(["touch", "executed"]) + b"o."
    yield "opcode_newobj", "code", "NEWOBJ", b"\x80\x02" + popen + value((["touch", "executed"],)) + b"\x81."
    kwargs = value((["touch", "executed"],)) + value({"shell": False})
    yield "opcode_newobj_ex", "code", "NEWOBJ_EX", b"\x80\x04" + popen + kwargs + b"\x92."
    yield "opcode_build", "code", "BUILD sets attributes of an object", whole(
        Raw(call(ORDERED) + value({"__reduce__": 1}) + b"b"))  # fmt: skip
    yield "opcode_build_slots", "code", "BUILD with slot state", whole(
        Raw(call(ORDERED) + value((None, {"__class__": 1})) + b"b"))  # fmt: skip
    yield "opcode_build_global", "code", "BUILD changes a function", whole(
        Raw(named(*FROM_BYTES) + value({"__code__": 1}) + b"b"))  # fmt: skip
    yield "opcode_build_persistent", "code", "BUILD changes a network", whole(
        Raw(persistent("Generator", {}) + value({"forward": 1}) + b"b"))  # fmt: skip
    yield "opcode_ext1", "code", "extension registry, one byte", b"\x80\x02\x82\x01)R."
    yield "opcode_ext2", "code", "extension registry, two bytes", b"\x80\x02\x83\x01\x01)R."
    yield "opcode_ext4", "code", "extension registry, four bytes", b"\x80\x02\x84\x01\x01\x01\x01)R."
    yield "opcode_ext4_negative", "lie", "extension code below zero", b"\x80\x02\x84\xff\xff\xff\xff)R."
    yield "opcode_persid", "code", "persistent id as text", b"Posix.system\n."
    yield "opcode_binpersid", "code", "persistent id of any value", whole(Raw(value(("module", "os")) + b"Q"))
    yield "opcode_next_buffer", "lie", "a buffer outside the file", b"\x80\x05\x97."
    yield "opcode_readonly_buffer", "lie", "a buffer made read-only", b"\x80\x05N\x98."
    yield "reduce_of_value", "code", "calls a value that is no function", whole(Raw(value(5) + value(()) + b"R"))
    yield "reduce_of_result", "code", "calls what an allowed call gave", whole(call(Raw(call(ORDERED)), 1))
    yield "overwritten_memo", "code", "an allowed name in the memo is overwritten before its use", whole(
        Raw(named(*ORDERED) + b"q\x00" + system + b"q\x0000h\x00" + value((PAYLOAD,)) + b"R"))  # fmt: skip


def nested() -> Iterator[Case]:
    """Pickles inside the bytes of tensors, and foreign source text."""
    inner = whole(call(("os", "system"), PAYLOAD), 2)
    yield "bytes_hostile", "code", "_load_from_bytes of a hostile pickle", whole(call(FROM_BYTES, inner))
    late = whole(TORCH_MAGIC, 2) + whole(1001, 2) + whole(HEADER, 2) + inner
    yield "bytes_hostile_after_magic", "code", "hostile after the magic number", whole(call(FROM_BYTES, late))
    keys = whole(TORCH_MAGIC, 2) + whole(1001, 2) + whole(HEADER, 2) + whole(None, 2) + inner
    yield "bytes_hostile_in_keys", "code", "hostile in the list of keys", whole(call(FROM_BYTES, keys))
    content = inner
    for _ in range(6):
        content = whole(call(FROM_BYTES, content), 2)
    yield "bytes_seven_deep", "code", "_load_from_bytes, seven deep", content
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo("x/data.pkl"), inner)
    yield "bytes_zip", "code", "_load_from_bytes of a zip of torch.save", whole(call(FROM_BYTES, archive.getvalue()))
    yield "zip_hostile", "code", "a zip of torch.save with a hostile pickle", archive.getvalue()
    head = whole(TORCH_MAGIC, 2) + whole(1001, 2) + whole(HEADER, 2)
    yield "legacy_hostile", "code", "an old file of torch.save with a hostile pickle", head + inner
    source = f"{PYTHON_PAYLOAD}\nclass Generator:\n    pass\n"
    yield "source_acts", "code", "embedded source that acts when imported", with_meta(module_src=source)
    expression = f"__import__('os').system({PAYLOAD!r})"
    yield "class_name_acts", "code", "a class name that is an expression", with_meta(class_name=expression)
    yield "type_function", "code", "a persistent object that is a function", with_meta(type="function")
    yield "version_unknown", "lie", "a persistent object of version 7", with_meta(version=7)
    hooks = {0: named("os", "system")}
    yield "hook_in_state", "code", "a hook among the state of a network", with_state(_forward_hooks=hooks)
    yield "forward_in_state", "code", "a function in place of forward", with_state(forward=named("builtins", "exec"))
    loader = {"class_name": named("os", "system"), "path": PAYLOAD}
    yield "loader_class", "code", "a data set class that is a function", with_entries(training_set_kwargs=loader)
    texts = {"class_name": "os.system", "path": PAYLOAD}
    yield "loader_class_name", "code", "a data set class that is the name of a function", with_entries(
        training_set_kwargs=texts)  # fmt: skip
    yield "extra_entry", "code", "a call beside the networks", with_entries(extra=call(("os", "system"), PAYLOAD))
    real = genuine()
    middle = [at for op, _, at in pickletools.genops(real) if op.name == "MARK" and at is not None][20]
    yield "inside_genuine", "code", "a call in the midst of a genuine snapshot", (
        real[:middle] + call(("os", "system"), PAYLOAD) + b"0" + real[middle:])  # fmt: skip


def lies() -> Iterator[Case]:
    """Lengths, shapes and references that the file does not honour."""
    huge = 1 << 40
    for name, size, stride, offset in (
        ("huge_shape", (huge, huge), (huge, 1), 0),
        ("overflowing_shape", (1 << 32, 1 << 32, 1 << 32), (0, 0, 0), 0),
        ("zero_stride", (1 << 20, 4), (0, 1), 0),
        ("overlapping_windows", (3, 2), (1, 1), 0),
        ("negative_stride", (4,), (-1,), 3),
        ("negative_offset", (2,), (1,), -1),
        ("offset_beyond", (1,), (1,), 4),
        ("negative_size", (-4,), (1,), 0),
        ("sixty_five_dimensions", (1,) * 65, (1,) * 65, 0),
        ("float_size", (2.0,), (1,), 0),
        ("lengths_differ", (2, 2), (1,), 0),
        ("bool_offset", (2,), (1,), True),
    ):
        what = f"a tensor of shape {size[:3]}, strides {stride[:3]}, offset {offset} over 4 numbers"
        yield f"tensor_{name}", "lie", what, with_tensor(tensor(size, stride, offset))
    yield "storage_longer", "lie", "a storage that announces more", with_tensor(tensor((4,), (1,), numel=1 << 40))
    yield "storage_negative", "lie", "a storage of -1 numbers", with_tensor(tensor((4,), (1,), numel=-1))
    yield "storage_shorter", "lie", "bytes left over behind a storage", with_tensor(tensor((2,), (1,), numel=2))
    odd = call(FROM_BYTES, storage_bytes(4, bytes(16), "UntypedStorage"))
    yield "storage_untyped", "lie", "a storage of another class", with_tensor(
        call(REBUILD, odd, 0, (4,), (1,), False, call(ORDERED)))  # fmt: skip
    for name, entry in (("number", 0), ("list", []), ("object", call(ORDERED))):
        what = f"an old file of torch.save whose list of storages holds a {name} beside a name"
        yield f"legacy_key_{name}", "lie", what, storage_bytes(4, bytes(16), keys=("0", entry))
    yield "tensor_of_text", "lie", "a tensor over text", with_tensor(
        call(REBUILD, "text", 0, (4,), (1,), False, call(ORDERED)))  # fmt: skip
    hooks = {"hook": named("os", "system")}
    storage = call(FROM_BYTES, storage_bytes(4, bytes(16)))
    yield "tensor_hooks", "code", "a tensor with backward hooks", with_tensor(
        call(REBUILD, storage, 0, (4,), (1,), True, hooks))  # fmt: skip
    for name, function in (
        ("sparse", "_rebuild_sparse_tensor"),
        ("wrapper", "_rebuild_wrapper_subclass"),
        ("device", "_rebuild_device_tensor_from_numpy"),
        ("type_v2", "_rebuild_from_type_v2"),
    ):
        yield f"tensor_{name}", "code", f"torch._utils.{function}", whole(call(("torch._utils", function), 1, 2, 3))
    numpy_dtype = ("numpy", "dtype")
    scalar = ("numpy._core.multiarray", "scalar")
    yield "numpy_object_scalar", "code", "a NumPy scalar of dtype object", whole(
        call(scalar, call(numpy_dtype, "O8", False, True), b"\x80\x04N."))  # fmt: skip
    yield "numpy_array", "code", "a NumPy array", whole(
        call(("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), (0,), b"b"))  # fmt: skip
    yield "numpy_short_scalar", "lie", "a NumPy scalar of the wrong length", whole(
        call(scalar, call(numpy_dtype, "f8", False, True), b"abc"))  # fmt: skip
    yield "numpy_dtype_fields", "lie", "a dtype with fields", whole(call(numpy_dtype, [("a", "O")]))
    for name, data in {
        "bytes8": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc.",
        "bytes": b"\x80\x04B\xff\xff\xff\x7fabc.",
        "text8": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"abc.",
        "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b"abc.",
        "string_negative": b"\x80\x02T\xff\xff\xff\xffabc.",
        "long4": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
        "long4_negative": b"\x80\x02\x8b\xff\xff\xff\xff\x01.",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
        "frame_overlap": b"\x80\x04\x95\x02" + bytes(7) + b"\x95\x01" + bytes(7) + b"N.",
        "int_text": b"I" + b"9" * 60_000 + b"\n.",
        "long_text": b"L" + b"9" * 60_000 + b"L\n.",
        "protocol": b"\x80\xffN.",
    }.items():
        kind = "broken" if name == "frame_overlap" else "lie"
        yield f"length_{name}", kind, "an announced length or number that is not there", data
    yield "memo_missing", "lie", "a memo entry that was never stored", b"\x80\x02h\x07."
    yield "memo_index", "exhaust", "a memo index of two thousand millions", b"\x80\x02Nr\xff\xff\xff\x7f."
    yield "memo_negative", "lie", "a memo index below zero", b"Np-5\ng-5\n."
    yield "stack_empty", "lie", "STOP on an empty stack", b"\x80\x02."
    yield "mark_missing", "lie", "a tuple without its mark", b"\x80\x02t."
    yield "odd_dict", "lie", "a key without a value", b"\x80\x02}(K\x01u."
    yield "unhashable_key", "lie", "a list as a key", b"\x80\x02}]K\x01s."


def exhausting() -> Iterator[Case]:
    """Small files that would cost much."""
    yield "doubling", "exhaust", "lists of the list before, 2^60 in all", whole(doubling(60))
    yield "doubling_in_settings", "exhaust", "the same among the settings of a network", with_settings(
        synthesis_kwargs={"resample_filter": doubling(40)})  # fmt: skip
    yield "doubling_in_data_set", "exhaust", "the same among the settings of the data set", with_entries(
        training_set_kwargs={"x": doubling(40)})  # fmt: skip
    yield "nested_tuples", "exhaust", "200000 tuples, one in the other", b"\x80\x02)" + b"\x85" * 200_000 + b"."
    lists = b"\x80\x02" + b"](" * 200_000 + b"e" * 200_000 + b"."
    yield "nested_lists", "exhaust", "200000 lists, one in the other", lists
    dicts = b"\x80\x02N" + b"q\x00}K\x01h\x00s" * 50_000 + b"."
    yield "nested_dicts", "exhaust", "50000 dicts, one in the other", dicts
    yield "many_marks", "exhaust", "300000 marks", b"\x80\x02" + b"(" * 300_000 + b"."
    yield "many_steps", "exhaust", "1.4 million opcodes", b"\x80\x02" + b"N0" * 700_000 + b"."
    yield "many_names", "exhaust", "60000 names", b"".join(b"cm%d\nf\n0" % i for i in range(60_000)) + b"N."
    yield "list_in_itself", "exhaust", "a list that holds itself", whole(Raw(b"]q\x00h\x00a"))
    yield "dict_in_itself", "exhaust", "settings that hold themselves", with_entries(
        training_set_kwargs=Raw(b"}q\x00" + value("x") + b"h\x00s"))  # fmt: skip
    yield "tuple_key_bomb", "exhaust", "a dict keyed by nested tuples", whole(
        Raw(b"}" + b")" + b"\x85" * 50_000 + b"Ns"))  # fmt: skip
    colliding = b"".join(value(i * ((1 << 61) - 1)) + b"N" for i in range(20_000))
    yield "colliding_keys", "exhaust", "20000 keys of one hash", b"\x80\x02}(" + colliding + b"u."
    encode = named("_codecs", "encode")
    yield "encode_again", "exhaust", "a long text encoded 20000 times", whole(Raw(
        encode + b"q\x000" + value("a" * (1 << 18)) + b"q\x010"
        + b"(" + (b"h\x00h\x01" + value("latin1") + b"\x86R") * 20_000 + b"t"))  # fmt: skip
    yield "frozenset", "exhaust", "a set of 100000 sets", whole(Raw(b"(" + b"(\x91" * 100_000 + b"\x91"))
    for size, number in (
        ("z_dim", 1 << 30), ("w_dim", 1 << 19), ("img_resolution", 1 << 18), ("img_channels", 1 << 20),
        ("c_dim", 1 << 20), ("z_dim", -4), ("img_resolution", 7),
    ):  # fmt: skip
        kind = "lie" if number < 8 else "exhaust"
        yield f"setting_{size}_{number}", kind, f"a network of {size} {number}", with_settings(**{size: number})
    yield "setting_num_layers", "exhaust", "a mapping network of 2^40 layers", with_settings(
        mapping_kwargs={"num_layers": 1 << 40})  # fmt: skip
    for what, kind, setting in (
        ("channel_max", "exhaust", 1 << 40), ("kernel_size", "exhaust", 1 << 19),
        ("conv_clamp", "lie", "inf"), ("resample_filter", "exhaust", [1] * 99_999),
    ):  # fmt: skip
        yield f"setting_{what}", kind, f"a synthesis network of odd {what}", with_settings(
            synthesis_kwargs={what: setting})  # fmt: skip
    deep: Raw = persistent("X", {})
    for _ in range(2000):
        deep = Raw(call(PERSISTENT, {"type": "class", "version": 6, "module_src": "", "class_name": "X",
                                     "state": {"_modules": {"a": deep}}}))  # fmt: skip
    yield "modules_deep", "exhaust", "2000 modules, one in the other", with_state(_modules={"a": deep})
    loop = Raw(b"}q\x05" + value("x") + persistent("X", {"_modules": Raw(b"h\x05")}) + b"s")
    yield "modules_loop", "exhaust", "a module that contains itself", with_state(_modules=loop)
    yield from _zips()


def _zips() -> Iterator[Case]:
    def archive(*entries: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as file:
            for name, data in entries:
                info = zipfile.ZipInfo(name)
                info.compress_type = compression
                file.writestr(info, data)
        return stream.getvalue()

    bomb = b"\x80\x02" + b"N0" * (32 << 20) + b"."
    yield "zip_bomb_pickle", "exhaust", "a zip whose pickle unpacks to 64 MiB", archive(("a/data.pkl", bomb))
    zeros = bytes(64 << 20)
    yield "zip_bomb_data", "exhaust", "a zip with 64 MiB of zeros as numbers", archive(
        ("a/data.pkl", whole({}, 2)), ("a/data/0", zeros))  # fmt: skip
    yield "zip_many_entries", "exhaust", "a zip of 3000 entries", archive(
        *((f"a/data/{i}", b"") for i in range(3000)), ("a/data.pkl", whole({}, 2)))  # fmt: skip
    yield "zip_traversal", "lie", "a zip with a path that leaves its folder", archive(
        ("../../executed/data.pkl", whole({}, 2)))  # fmt: skip
    good = archive(("a/data.pkl", whole({}, 2)))
    yield "zip_lying_size", "lie", "a zip whose directory announces other sizes", good.replace(
        struct.pack("<II", len(whole({}, 2)) + 2, len(whole({}, 2))), struct.pack("<II", 5, 1 << 30))  # fmt: skip
    at = good.rindex(b"PK\x05\x06") + 16  # where the directory is said to be; readers shift entries by the difference
    shifted = good[:at] + struct.pack("<I", struct.unpack_from("<I", good, at)[0] + 1000) + good[at + 4 :]
    yield "zip_negative_offset", "lie", "a zip whose entries start before the file", shifted
    yield "zip_no_pickle", "broken", "a zip that holds no pickle", archive(("readme.txt", b"hello"))
    yield "zip_truncated", "broken", "half a zip", good[: len(good) // 2]
    yield "zip_duplicate", "lie", "a zip with two pickles of one name", _two_of_one_name()


def _two_of_one_name() -> bytes:
    """Readers differ in which of two entries of one name they take: the first is harmless, the second is not."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(zipfile.ZipInfo("a/data.pkl"), whole({}, 2))
        file.writestr(zipfile.ZipInfo("b/data.pkl"), whole(call(("os", "system"), PAYLOAD), 2))
    return stream.getvalue().replace(b"b/data.pkl", b"a/data.pkl")


def broken() -> Iterator[Case]:
    """What downloads and people do to files."""
    real = genuine()
    yield "empty", "broken", "no bytes", b""
    yield "protocol_only", "broken", "two bytes", b"\x80\x04"
    yield "no_stop", "broken", "a pickle without STOP", whole({"G": 1})[:-1]
    yield "half", "broken", "half a genuine snapshot", real[: len(real) // 2]
    yield "flipped_length", "broken", "a genuine snapshot with one length changed", real.replace(
        b"X\x01\x00\x00\x00G", b"X\x01\x00\x00\x01G", 1)  # fmt: skip
    yield "zeros", "broken", "zeros", bytes(1000)
    yield "html", "broken", "a web page saved as a pickle", b"<!DOCTYPE html><html><title>404</title></html>\n"
    yield "git_lfs", "broken", "a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\nsize 9\n"
    yield "gzip", "broken", "a compressed snapshot", gzip.compress(real[:2000], mtime=0)
    yield "utf16", "broken", "text in another encoding", "hello".encode("utf-16")
    yield "no_moving_average", "broken", "a dict without G_ema", control(lambda root: root.pop("G_ema"))
    yield "networks_are_text", "broken", "text in place of networks", with_entries(G="G", D="D", G_ema="G")


MAY_LOAD = ("after_stop", "source_acts", "loader_class_name", "setting_conv_clamp")
SECTIONS: tuple[Callable[[], Iterator[Case]], ...] = (calls, opcodes, nested, lies, exhausting, broken)


def cases() -> list[Case]:
    """All files: name, kind, what it does, content."""
    return [case for section in SECTIONS for case in section()]


def build(folder: Path) -> int:
    """Write all files, compressed (most would otherwise be mistaken for malware by scanners), and index.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.gz"):
        old.unlink()
    index = {}
    for name, kind, what, content in cases():
        assert name not in index, name
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, 9, mtime=0))
        index[name] = {"kind": kind, "what": what} | ({"loads": True} if name in MAY_LOAD else {})
    (folder / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=True) + "\n")
    return len(index)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEST
    print(f"{build(folder)} files in {folder}")
