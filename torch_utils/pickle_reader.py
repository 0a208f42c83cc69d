"""Reads pickles without executing anything: bytes in, inert records out.

A small interpreter of the pickle opcodes of its own. It holds no reference to any function or class that a file could
name: a global becomes a `Global` with a name in it, a call becomes a record of the call, and only a handful of known
calls (tensors, ordered dicts, numbers) become values. Names outside the allow-list are noted; `read` then refuses the
file, `survey` hands back what was found. Work is bounded by the file's size: announced lengths and memo indices are
checked before use, steps and bytes have a budget, nothing recurses.

It knows nothing of networks: `training.network_pickle` makes networks of the records.
Source: networks-and-pickles.md sections 3.1-3.3; clarifications 13-17.
"""

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

MAX_STEPS = 1_000_000  # opcodes in one file; a 1024-pixel snapshot has about 60 000
MAX_TEXT_BYTES = 16 << 20  # one string; the source of a module has about 50 000
MAX_LINE_BYTES = 1 << 16  # one line of a text opcode
MAX_INT_BYTES = 16
MAX_NAME = 1000  # letters in the name of a global
MAX_LISTED = 1000  # different globals, and reasons to refuse, that are kept
MAX_DIMS = 8
MAX_ZIP_ENTRIES = 50_000
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # first value of PyTorch's container from before its zip format
TORCH_PROTOCOL = 1001

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
EASY_DICT = "dnnlib.util.EasyDict"
ALLOWED_GLOBALS = frozenset(
    {
        PERSISTENT,
        EASY_DICT,
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.storage._load_from_bytes",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "builtins.set",
        "__builtin__.set",
        "_codecs.encode",
    }
)
ARRAY_GLOBALS = frozenset(
    {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray"}
)
BUFFER_GLOBALS = frozenset({"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"})  # protocol 5
TF_NETWORK = "dnnlib.tflib.network.Network"
NAMESPACE = "argparse.Namespace"
TENSORFLOW_GLOBALS = frozenset(  # pickles of StyleGAN2's TensorFlow code: numbers in NumPy arrays
    {TF_NETWORK, EASY_DICT, "collections.OrderedDict", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
    | {"numpy.dtype", "_codecs.encode", *ARRAY_GLOBALS, *BUFFER_GLOBALS}
)
STORAGE_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
ARRAY_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "i1": torch.int8,
}
TORCH_GLOBALS = frozenset(  # files of torch.save that hold state dicts
    {"collections.OrderedDict", "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2", NAMESPACE}
    | STORAGE_DTYPES.keys()
)
OBJECT_CLASSES = frozenset({TF_NETWORK, NAMESPACE})  # become an `ObjectRecord` where they are allowed


class PickleError(ValueError):
    """A pickle that is refused or that holds something else than wanted; the message is one line."""


class Global:
    """The name of a function or class that the file asked for. A name, nothing else."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class ObjectRecord:
    """A call or an object of a class that is not on the allow-list, recorded so that formats can be told apart."""

    __slots__ = ("name", "args", "state")

    def __init__(self, name: str, args: Any) -> None:
        self.name, self.args, self.state = name, args, None


class PersistentRecord:
    """An object of a persistent class: the dict with `class_name`, `module_src` and `state`, never executed."""

    __slots__ = ("meta",)

    def __init__(self, meta: dict) -> None:
        self.meta = meta

    @property
    def class_name(self) -> str:
        """Name of the class, or '' where the file has none."""
        name = self.meta.get("class_name")
        return name if isinstance(name, str) else ""

    @property
    def source(self) -> str:
        """The embedded source text, or ''."""
        source = self.meta.get("module_src")
        return source if isinstance(source, str) else ""

    @property
    def state(self) -> dict:
        """The instance dict, or {}."""
        state = self.meta.get("state")
        return state if isinstance(state, dict) else {}

    def table(self, key: str) -> dict:
        """One of the dicts `_parameters`, `_buffers`, `_modules`, or {}."""
        table = self.state.get(key)
        return table if isinstance(table, dict) else {}


class OrderedDictRecord(dict):
    """Stands for collections.OrderedDict."""


class EasyDictRecord(dict):
    """Stands for dnnlib.util.EasyDict."""


class Blob:
    """A stretch of bytes of the file, not copied."""

    __slots__ = ("data", "start", "end")

    def __init__(self, data: bytes, start: int, end: int) -> None:
        self.data, self.start, self.end = data, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def tobytes(self) -> bytes:
        """Copy the bytes out."""
        return self.data[self.start : self.end]


class DtypeRecord:
    """Stands for numpy.dtype; BUILD may set its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "<"


class ArrayRecord:
    """Stands for numpy.ndarray; BUILD fills in its numbers as a tensor's."""

    __slots__ = ("tensor",)

    def __init__(self) -> None:
        self.tensor: TensorRecord | None = None


class StorageRecord:
    """The raw numbers behind tensors: `numel` elements of `dtype`, little-endian; `blob` None where not at hand."""

    __slots__ = ("dtype", "numel", "blob")

    def __init__(self, dtype: torch.dtype, numel: int, blob: "Blob | None") -> None:
        self.dtype, self.numel, self.blob = dtype, numel, blob


class TensorRecord:
    """A tensor's place in its storage, already checked against the storage's length."""

    __slots__ = ("storage", "offset", "size", "stride", "is_parameter")

    def __init__(self, storage: StorageRecord, offset: int, size: tuple, stride: tuple, is_parameter: bool) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride
        self.is_parameter = is_parameter

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self.storage.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    def tensor(self) -> torch.Tensor:
        """Copy the numbers out of the file: a CPU tensor of the recorded shape and memory order.

        Raises:
            PickleError: the file does not hold the numbers themselves.
        """
        blob = self.storage.blob
        if blob is None:
            raise PickleError("the numbers of a tensor are not inside the pickle; wanted a self-contained file")
        # NumPy has no bfloat16, and a bool must be 0 or 1: both travel as unsigned integers.
        carrier = {torch.bfloat16: "<u2", torch.bool: "u1"}.get(self.dtype) or np.dtype(_numpy_code(self.dtype))
        width = np.dtype(carrier).itemsize
        start = blob.start + self.offset * width
        strides = tuple(step * width for step in self.stride)
        view: np.ndarray = np.ndarray(self.size, carrier, blob.data, start if self.numel else 0, strides)
        values = torch.from_numpy(view.copy(order="K"))
        if self.dtype == torch.bfloat16:
            return values.view(torch.int16).view(torch.bfloat16)
        return values != 0 if self.dtype == torch.bool else values


class Document:
    """What one file holds.

    Attributes:
        root: the top-level value (records and plain values), None where the file is damaged.
        globals: names the pickle asks for, in order of appearance (an ordered set).
        nested_globals: names that tensor storages inside it ask for (likewise).
        refusals: why a strict reader refuses the file, in order; empty for a file within the allow-list.
        damage: what is broken, or None.
        allowed: the allow-list that the names were held against.
        protocol: pickle protocol, 0 if none is announced.
        num_steps: opcodes read.
        container: 'pickle', 'torch-zip' or 'torch-legacy'.
    """

    def __init__(self) -> None:
        self.root: Any = None
        self.globals: dict[str, None] = {}
        self.nested_globals: dict[str, None] = {}
        self.refusals: list[str] = []
        self.damage: str | None = None
        self.protocol = 0
        self.num_steps = 0
        self.container = "pickle"
        self.allowed: frozenset[str] = ALLOWED_GLOBALS


def read(data: bytes) -> Document:
    """Read a pickle that stays within the allow-list.

    Args:
        data: the whole file.

    Raises:
        PickleError: it asks for anything else, or is damaged; one line.
    """
    document = survey(data)
    if document.container != "pickle":
        raise PickleError("a file of torch.save, not a snapshot pickle")
    if document.refusals:
        raise PickleError(document.refusals[0])
    if document.damage is not None:
        raise PickleError(document.damage)
    return document


def survey(data: bytes, *, allowed: frozenset[str] = ALLOWED_GLOBALS) -> Document:
    """Read whatever the bytes are, without executing anything and without raising for what they hold.

    Args:
        data: the whole file.
        allowed: names that a bare pickle may ask for; files of torch.save are held against `TORCH_GLOBALS`.
    """
    document = Document()
    document.allowed = allowed
    machine = _Machine(data, 0, len(data), document, _Budget(len(data)))
    try:
        if data[:4] == b"PK\x03\x04":
            document.container, document.allowed = "torch-zip", TORCH_GLOBALS
            _survey_zip(data, document)
        else:
            document.root = machine.run()
            if type(document.root) is int and document.root == TORCH_MAGIC:
                document.container, document.allowed = "torch-legacy", TORCH_GLOBALS
                _survey_legacy(machine, document)
    except PickleError as error:
        document.damage = str(error)
        document.root = None
        if document.protocol == 0 and not document.globals and document.container == "pickle":
            document.refusals.clear()  # opcodes met by chance
            document.damage = f"not a pickle file ({error})"
    if type(document.root) in (Global, Blob, DtypeRecord, ArrayRecord):
        document.root = None
    return document


def plain(value: Any, what: str = "value", max_nodes: int = 10_000, max_depth: int = 16) -> Any:
    """Turn records into plain Python data: None, bool, int, float, str, bytes, list, tuple, dict.

    Args:
        value: a value of a `Document`.
        what: its name in messages.
        max_nodes: bound on the size of the result, however often parts are shared.
        max_depth: bound on nesting.

    Raises:
        PickleError: it holds anything else, is larger or nests deeper.
    """
    budget = [max_nodes]

    def convert(node: Any, depth: int) -> Any:
        budget[0] -= 1
        if budget[0] < 0 or depth > max_depth:
            raise PickleError(f"{what} is larger than {max_nodes} values or deeper than {max_depth}; wanted settings")
        if node is None or type(node) in (bool, int, float, str):
            return node
        if isinstance(node, Blob) and len(node) <= MAX_LINE_BYTES:
            return node.tobytes()
        if isinstance(node, dict):
            return {key: convert(item, depth + 1) for key, item in node.items()}
        if type(node) in (list, tuple):
            return type(node)(convert(item, depth + 1) for item in node)
        raise PickleError(f"{what} holds a {describe(node)}, wanted plain settings (numbers, text, lists, dicts)")

    return convert(value, 0)


def describe(node: Any) -> str:
    """A few words for a value, safe to print: the type, never the content of containers."""
    if isinstance(node, (Global, ObjectRecord)):
        return f"record of {printable(node.name)}"
    if isinstance(node, PersistentRecord):
        return f"persistent object {printable(node.class_name)!r}"
    names = {OrderedDictRecord: "dict", EasyDictRecord: "dict", Blob: "bytes", TensorRecord: "tensor"}
    names[ArrayRecord] = "NumPy array"
    return names.get(type(node)) or type(node).__name__


def printable(text: str, limit: int = 100) -> str:
    """One printable line of bounded length."""
    line = "".join(ch if ch.isprintable() else "?" for ch in text[: limit + 1])
    return line if len(line) <= limit else line[:limit] + "..."


class _Budget:
    """Steps and bytes that one file may cost, all nested pickles together."""

    def __init__(self, size: int) -> None:
        self.steps = 0
        self.bytes_left = 8 * size + (1 << 20)

    def spend(self, count: int) -> None:
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise PickleError("reading it costs far more than its size; the file is built to exhaust its reader")


class _Machine:
    """The pickle machine: a stack, a memo and a position. Values are records."""

    def __init__(
        self, data: bytes, start: int, end: int, document: Document, budget: _Budget, *, nested=False, foreign=False
    ) -> None:
        self.data, self.pos, self.end = data, start, end
        self.document, self.budget = document, budget
        self.nested = nested  # the pickles inside a tensor's bytes: other names are allowed there
        self.foreign = foreign  # a container of torch.save: persistent ids are storages
        self.storages: dict[str, StorageRecord] = {}  # those of a container, by key
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Interpret one pickle from the current position; return its value."""
        self.stack, self.marks, self.memo = [], [], {}
        budget, table = self.budget, _OPCODES
        try:
            while True:
                budget.steps += 1
                if budget.steps > MAX_STEPS:
                    raise PickleError(f"more than {MAX_STEPS} opcodes; a snapshot has far fewer")
                if self.pos >= self.end:
                    raise PickleError(
                        f"it ends in the middle of a pickle, after {self.end} bytes; the file is truncated"
                    )
                code = self.data[self.pos]
                self.pos += 1
                if code == 0x2E:  # STOP
                    return self.stack.pop()
                operation = table.get(code)
                if operation is None:
                    raise PickleError(f"unknown opcode 0x{code:02x} at byte {self.pos - 1}; not a pickle, or damaged")
                operation(self)
        except PickleError:
            raise
        except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError, AttributeError) as error:
            raise PickleError(f"damaged near byte {self.pos} ({type(error).__name__} in the opcodes)") from error
        finally:
            if not self.nested:
                self.document.num_steps = budget.steps

    # Reading from the file.

    def take(self, count: int) -> int:
        """Step over `count` bytes and return where they start."""
        start = self.pos
        if count < 0 or count > self.end - start:
            raise PickleError(f"byte {start} announces {count} bytes, {self.end - start} are left; a truncated file")
        self.pos += count
        return start

    def number(self, layout: str) -> Any:
        start = self.take(struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, start)[0]

    def text(self, count: int, encoding: str = "utf-8") -> str:
        if count > MAX_TEXT_BYTES:
            raise PickleError(f"text of {count} bytes at byte {self.pos}; at most {MAX_TEXT_BYTES} are accepted")
        start = self.take(count)
        self.budget.spend(count)
        return self.data[start : start + count].decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")

    def line(self) -> bytes:
        stop = self.data.find(b"\n", self.pos, min(self.end, self.pos + MAX_LINE_BYTES))
        if stop < 0:
            raise PickleError(f"a line without end at byte {self.pos}; truncated or hostile")
        start = self.take(stop + 1 - self.pos)
        self.budget.spend(stop + 1 - start)
        return self.data[start:stop]

    def blob(self, count: int) -> Blob:
        start = self.take(count)
        return Blob(self.data, start, start + count)

    # Stack and memo.

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def push_mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        if not 0 <= index <= len(self.data):
            raise PickleError(f"memo index {index} in a file of {len(self.data)} bytes; built to exhaust its reader")
        self.memo[index] = self.stack[-1]

    def append_to(self, target: Any, items: list[Any]) -> None:
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            self.budget.spend(len(items))
            target.update(_key(item) for item in items)
        elif isinstance(target, ObjectRecord):
            self.refuse(f"items for an object of {printable(target.name)}")
        else:
            raise PickleError(f"items appended to a {describe(target)} near byte {self.pos}; damaged or hostile")

    def set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise PickleError(f"a dict key without a value near byte {self.pos}; damaged")
        if isinstance(target, ObjectRecord):
            return self.refuse(f"items for an object of {printable(target.name)}")
        if not isinstance(target, dict):
            raise PickleError(f"keys set on a {describe(target)} near byte {self.pos}; damaged or hostile")
        for index in range(0, len(items), 2):
            target[_key(items[index])] = items[index + 1]
        return None

    # Names, calls and objects: everything that would be able to act in an ordinary unpickler.

    def refuse(self, reason: str) -> None:
        if len(self.document.refusals) < MAX_LISTED:
            self.document.refusals.append(reason)

    def find(self, module: str, name: str) -> Global:
        if len(module) + len(name) > MAX_NAME:
            raise PickleError(f"the name of a global has {len(module) + len(name)} letters; damaged or hostile")
        full = f"{module}.{name}"
        seen = self.document.nested_globals if self.nested else self.document.globals
        allowed = full in (STORAGE_DTYPES if self.nested else self.document.allowed)
        if full not in seen and len(seen) < MAX_LISTED:
            seen[full] = None
            if not allowed:
                inside = "a tensor's bytes ask" if self.nested else "it asks"
                self.refuse(
                    f"{inside} for {printable(full)}, which is not on the allow-list of network snapshots; nothing was "
                    "executed; use a file from a source you trust"
                )
        return Global(full)

    def call(self, function: Any, args: Any) -> Any:
        if type(args) is not tuple:
            raise PickleError(f"a call without arguments near byte {self.pos}; damaged or hostile")
        if isinstance(function, Global):
            handler = _CALLS.get(function.name)
            if handler is None or self.nested or function.name not in self.document.allowed:
                return ObjectRecord(function.name, args)
            return handler(self, args)
        self.refuse(f"it calls a {describe(function)}, which is not a known function")
        return ObjectRecord("a call", args)

    def new_object(self, cls: Any, args: Any) -> Any:
        if isinstance(cls, Global) and cls.name == EASY_DICT and args == ():
            return EasyDictRecord()
        if isinstance(cls, Global) and (cls.name not in self.document.allowed or cls.name in OBJECT_CLASSES):
            return ObjectRecord(cls.name, args)
        self.refuse(f"it makes an object of a {describe(cls)} in a way no snapshot does")
        return ObjectRecord("an object", args)

    def build(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, ObjectRecord):
            target.state = state
        elif isinstance(target, DtypeRecord):
            target.order = state[1]
        elif isinstance(target, ArrayRecord):
            self.fill_array(target, state)
        elif isinstance(target, OrderedDictRecord) and self.foreign:
            pass  # a state dict's `_metadata`: versions of modules, which our names don't need
        elif isinstance(target, OrderedDictRecord):
            self.refuse("it sets attributes of an ordered dict, which no snapshot does")
        else:
            self.refuse(f"it sets attributes (BUILD) of a {describe(target)}, which no snapshot does")

    def persistent_id(self, pid: Any) -> Any:
        """('storage', torch.FloatStorage, key, location, numel, ...) inside files of torch.save."""
        if not (self.nested or self.foreign):
            self.refuse("it uses persistent ids, which no snapshot does")
            return ObjectRecord("persistent id", pid)
        if type(pid) is tuple and len(pid) >= 5 and isinstance(pid[1], Global):
            dtype, key, numel = STORAGE_DTYPES.get(pid[1].name), pid[2], pid[4]
            view = pid[5] if len(pid) > 5 else None
            if pid[0] == "storage" and dtype is not None and type(numel) is int and 0 <= numel < 1 << 48:
                if view is None and type(key) is str:
                    record = self.storages.setdefault(key, StorageRecord(dtype, numel, None))
                    if (record.dtype, record.numel) == (dtype, numel):
                        return record
        raise PickleError("tensor data of an unknown kind; wanted a plain CPU storage")

    def load_storage(self, args: tuple) -> Any:
        """torch.storage._load_from_bytes: PyTorch's container from before its zip format, holding one storage."""
        if len(args) != 1 or not isinstance(args[0], (Blob, bytes)):
            raise PickleError("tensor data that is not bytes; damaged or hostile")
        blob = args[0] if isinstance(args[0], Blob) else Blob(args[0], 0, len(args[0]))
        inner = _Machine(blob.data, blob.start, blob.end, self.document, self.budget, nested=True)
        try:
            magic, version, system = inner.run(), inner.run(), inner.run()
            if magic != TORCH_MAGIC or version != TORCH_PROTOCOL:
                raise PickleError("a tensor's bytes are not in PyTorch's format")
            if type(system) is not dict or system.get("little_endian") is not True:
                raise PickleError("a tensor's bytes are not little-endian")
            storage, keys = inner.run(), inner.run()
            if not isinstance(storage, StorageRecord) or type(keys) is not list or len(keys) != 1:
                raise PickleError("a tensor's bytes do not hold exactly one storage")
            numel = inner.number("<q")
            if numel != storage.numel or inner.end - inner.pos != numel * storage.dtype.itemsize:
                raise PickleError(f"a tensor's bytes announce {numel} numbers, the data differ in length; damaged")
            return StorageRecord(storage.dtype, numel, Blob(inner.data, inner.pos, inner.end))
        except PickleError as error:
            self.refuse(str(error))
            return ObjectRecord("torch.storage._load_from_bytes", args)

    def rebuild_tensor(self, args: tuple) -> Any:
        if len(args) not in (6, 7):
            raise PickleError("a tensor with the wrong number of arguments; damaged or hostile")
        storage, offset, size, stride = args[:4]
        if isinstance(storage, ObjectRecord):
            return ObjectRecord("torch._utils._rebuild_tensor_v2", args)
        if not isinstance(storage, StorageRecord):
            raise PickleError("a tensor without a storage; damaged or hostile")
        check_tensor(storage.numel, offset, size, stride)
        return TensorRecord(storage, offset, size, stride, False)

    def new_array(self, args: tuple) -> ArrayRecord:
        """numpy's _reconstruct(ndarray, (0,), b"b"): an empty array; BUILD brings shape, type and bytes."""
        if len(args) != 3 or not isinstance(args[0], Global) or args[0].name != "numpy.ndarray":
            raise PickleError("a NumPy array of an unknown kind; damaged or hostile")
        return ArrayRecord()

    def fill_array(self, target: ArrayRecord, state: Any) -> None:
        """(version, shape, dtype, whether in Fortran's order, bytes); the version may be missing."""
        if type(state) is not tuple or len(state) not in (4, 5) or target.tensor is not None:
            raise PickleError("a NumPy array whose state is not in the usual form; damaged or hostile")
        shape, dtype, fortran, raw = state[-4:]
        target.tensor = self.array_tensor(raw, dtype, shape, fortran is True or fortran == 1)

    def array_from_buffer(self, args: tuple) -> ArrayRecord:
        """numpy's _frombuffer(bytes, dtype, shape, order), which protocol 5 uses."""
        if len(args) != 4 or args[3] not in ("C", "F"):
            raise PickleError("a NumPy array whose state is not in the usual form; damaged or hostile")
        record = ArrayRecord()
        record.tensor = self.array_tensor(args[0], args[1], args[2], args[3] == "F")
        return record

    def array_tensor(self, raw: Any, dtype: Any, shape: Any, fortran: bool) -> TensorRecord:
        element = ARRAY_DTYPES.get(dtype.code) if isinstance(dtype, DtypeRecord) else None
        if element is None or dtype.order not in ("<", "|", "="):
            raise PickleError("a NumPy array of something else than little-endian numbers; wanted float32")
        if not isinstance(raw, Blob) or type(shape) is not tuple or len(raw) % element.itemsize:
            raise PickleError("a NumPy array without its bytes; damaged or hostile")
        if len(shape) > MAX_DIMS or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            raise PickleError("a NumPy array whose shape is not made of small whole numbers; damaged or hostile")
        order = range(len(shape)) if fortran else range(len(shape) - 1, -1, -1)
        stride, step = [0] * len(shape), 1
        for axis in order:
            stride[axis], step = step, step * shape[axis]
        numel = len(raw) // element.itemsize
        if step != numel:
            raise PickleError(f"a NumPy array of shape {list(shape)} has {numel} numbers; damaged or hostile")
        return TensorRecord(StorageRecord(element, numel, raw), 0, shape, tuple(stride), False)

    def rebuild_parameter(self, args: tuple) -> Any:
        data = args[0] if len(args) == 3 else None
        if isinstance(data, ObjectRecord):
            return data
        if not isinstance(data, TensorRecord):
            raise PickleError("a parameter without a tensor; damaged or hostile")
        return TensorRecord(data.storage, data.offset, data.size, data.stride, True)

    def persistent(self, args: tuple) -> PersistentRecord:
        if len(args) != 1 or type(args[0]) is not dict:
            raise PickleError("a persistent object without its record; damaged or hostile")
        return PersistentRecord(args[0])

    def ordered_dict(self, args: tuple) -> OrderedDictRecord:
        result = OrderedDictRecord()
        if args and type(args[0]) is list:
            self.budget.spend(8 * len(args[0]))
            for pair in args[0]:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise PickleError("an ordered dict of something else than pairs; damaged or hostile")
                result[_key(pair[0])] = pair[1]
        elif args:
            raise PickleError("an ordered dict of something else than pairs; damaged or hostile")
        return result

    def make_set(self, args: tuple) -> set:
        items = args[0] if len(args) == 1 else () if not args else None
        if type(items) not in (list, tuple):
            raise PickleError("a set of something else than a list; damaged or hostile")
        self.budget.spend(8 * len(items))  # type: ignore[arg-type]
        return {_key(item) for item in items}  # type: ignore[union-attr]

    def encode(self, args: tuple) -> Blob:
        """_codecs.encode(text, 'latin1'): how protocol 2 writes bytes."""
        if len(args) != 2 or type(args[0]) is not str or args[1] not in ("latin1", "latin-1"):
            raise PickleError("_codecs.encode with something else than text and 'latin1'; refused")
        self.budget.spend(len(args[0]))
        data = args[0].encode("latin-1")
        return Blob(data, 0, len(data))

    def dtype(self, args: tuple) -> DtypeRecord:
        if not args or type(args[0]) is not str or len(args[0]) > 8:
            raise PickleError("a numpy.dtype that is not a simple one; refused")
        return DtypeRecord(args[0])

    def scalar(self, args: tuple) -> "float | int | bool":
        """numpy scalar -> Python number."""
        if len(args) != 2 or not isinstance(args[0], DtypeRecord) or not isinstance(args[1], Blob):
            raise PickleError("a NumPy scalar that is not a number; refused")
        code = {
            **{"f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q"},
            **{"u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
        }.get(args[0].code)
        order = {"<": "<", "|": "<", "=": "<", ">": ">"}.get(args[0].order if type(args[0].order) is str else "")
        if code is None or order is None or len(args[1]) != struct.calcsize(code):
            raise PickleError("a NumPy scalar that is not a number; refused")
        return struct.unpack(order + code, args[1].tobytes())[0]


def check_tensor(storage_numel: int, offset: Any, size: Any, stride: Any) -> None:
    """Check a tensor's geometry against its storage: PyTorch itself would grow the storage or repeat numbers.

    Raises:
        PickleError: a part is not a whole number, lies outside the storage, or shows more numbers than are stored.
    """
    tuples = type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= MAX_DIMS
    if not tuples or not all(type(n) is int and 0 <= n < 1 << 48 for n in (offset, *size, *stride)):
        raise PickleError("a tensor whose shape is not made of small whole numbers; damaged or hostile")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride) if n > 1)
    repeats = any(n > 1 and step == 0 for n, step in zip(size, stride))
    if numel and (repeats or last >= storage_numel or numel > storage_numel):
        raise PickleError(
            f"a tensor of shape {list(size)}, strides {list(stride)}, offset {offset} does not fit its "
            f"{storage_numel} stored numbers; damaged or hostile"
        )


def _survey_legacy(machine: _Machine, document: Document) -> None:
    """The rest of PyTorch's container from before its zip format: version, system, value, keys, then the numbers."""
    machine.foreign = True
    version, system = machine.run(), machine.run()
    if version != TORCH_PROTOCOL or type(system) is not dict or system.get("little_endian") is not True:
        raise PickleError("a file of torch.save of an unknown version or byte order")
    root = machine.run()
    keys = machine.run()
    named = type(keys) is list and all(type(key) is str for key in keys)
    if not named or set(keys) != machine.storages.keys():
        raise PickleError("a file of torch.save whose list of tensors is damaged")
    for key in keys:
        record = machine.storages[key]
        numel = machine.number("<q")
        if numel != record.numel or record.blob is not None:
            raise PickleError(f"tensor data announce {numel} numbers, wanted {record.numel}; damaged")
        record.blob = machine.blob(numel * record.dtype.itemsize)
    document.root = root


def _survey_zip(data: bytes, document: Document) -> None:
    """The pickle inside a zip file of torch.save, and the places of its numbers, which are stored uncompressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            by_name = _zip_entries(data, archive)
            folder = next(iter(by_name), "").partition("/")[0] + "/"
            entry = by_name.get(f"{folder}data.pkl")
            if entry is None or entry.file_size > MAX_TEXT_BYTES:
                raise PickleError("a zip file without a pickle; not a snapshot")
            with archive.open(entry) as stream:
                inner = stream.read(MAX_TEXT_BYTES)
            order = by_name.get(f"{folder}byteorder")
            if order is not None:
                with archive.open(order) as stream:
                    if stream.read(16) != b"little":
                        raise PickleError("a file of torch.save whose numbers are not little-endian")
    except PickleError:
        raise
    except (
        *(zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, struct.error),
        *(OverflowError, LookupError),  # places in the directory that no file has
    ) as error:
        if data.rfind(b"PK\x05\x06") < 0:
            raise PickleError("a zip file without its end, where the directory is; truncated") from error
        raise PickleError(f"a damaged zip file ({type(error).__name__})") from error
    machine = _Machine(inner, 0, len(inner), document, _Budget(len(inner)), foreign=True)
    root = machine.run()
    total = 0
    for key, record in machine.storages.items():
        record.blob = _stored_entry(data, by_name.get(f"{folder}data/{key}"), record.numel * record.dtype.itemsize)
        total += len(record.blob)
    if total > len(data):
        raise PickleError("a zip file whose entries overlap; damaged or hostile")
    document.root = root


def _zip_entries(data: bytes, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by name, of a zip in which every program finds the same pickle.

    PyTorch's reader looks names up without regard to case, ends them at a NUL, takes the first entry's folder for the
    root, and where the directory is from its last record; `zipfile` does each in another way. So everything that is
    read in two ways is refused; torch.save writes none of it.
    """
    entries = archive.infolist()
    if len(entries) > MAX_ZIP_ENTRIES:
        raise PickleError(f"a zip file of {len(entries)} entries; at most {MAX_ZIP_ENTRIES} are accepted")
    if not any("data.pkl" in entry.orig_filename.casefold() for entry in entries):
        raise PickleError("a zip file without a pickle; not a snapshot, but e.g. a data set or arrays of NumPy")
    place, count = _zip_directory(data)
    if (place, count) != (archive.start_dir, len(entries)):
        raise PickleError("a zip file with two directories, or with bytes around its own; damaged or hostile")
    seen: dict[str, str] = {}
    for entry in entries:
        name = entry.orig_filename
        shown = printable(ascii(name))
        if "\0" in name or "\\" in name or name != entry.filename:
            raise PickleError(f"a zip file with the entry {shown}, which programs read as different names; hostile")
        if (folded := name.casefold()) in seen:
            raise PickleError(f"a zip file with two entries {printable(ascii(seen[folded]))} and {shown}; hostile")
        seen[folded] = name
    roots = list(dict.fromkeys(name.partition("/")[0] for name in seen.values()))
    if len(roots) > 1:
        shown = " and ".join(printable(ascii(root)) for root in roots[:2])
        raise PickleError(f"a zip file with several root folders, {shown}; torch.save writes one; hostile")
    pickles = [name for folded, name in seen.items() if folded.endswith(".pkl")]
    if len(pickles) > 1:
        shown = ", ".join(printable(ascii(name)) for name in pickles[:4])
        raise PickleError(f"a zip file with {len(pickles)} pickles ({shown}); torch.save writes one")
    return {entry.filename: entry for entry in entries}


def _zip_directory(data: bytes) -> tuple[int, int]:
    """(place, number of entries) of a zip's directory, by the record at the very end of the file.

    Source: PKWARE's APPNOTE.TXT, sections 4.3.14 to 4.3.16.
    """
    end = len(data) - 22
    if data[end : end + 4] != b"PK\x05\x06":
        raise PickleError("a zip file with a comment or other bytes at its end; damaged or hostile")
    count, size, place = struct.unpack_from("<HLL", data, end + 10)
    start = end
    if data[end - 20 : end - 16] == b"PK\x06\x07":
        start = end - 76
        if data[start : start + 4] != b"PK\x06\x06" or struct.unpack_from("<Q", data, end - 12)[0] != start:
            raise PickleError("a zip file with two directories, or with bytes around its own; damaged or hostile")
        count, size, place = struct.unpack_from("<QQQ", data, start + 32)
    return (place, count) if place + size == start else (-1, count)


def _stored_entry(data: bytes, entry: "zipfile.ZipInfo | None", num_bytes: int) -> Blob:
    """Where the bytes of an uncompressed entry lie."""
    if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < num_bytes or entry.flag_bits & 1:
        raise PickleError(f"tensor data of {num_bytes} bytes are missing, short or compressed; a damaged file")
    header = entry.header_offset
    if header < 0 or data[header : header + 4] != b"PK\x03\x04" or header + 30 > len(data):
        raise PickleError("a damaged zip file (an entry without its header)")
    name_bytes, extra_bytes = struct.unpack_from("<HH", data, header + 26)
    start = header + 30 + name_bytes + extra_bytes
    if start + num_bytes > len(data):
        raise PickleError("a damaged zip file (an entry outside the file)")
    return Blob(data, start, start + num_bytes)


def _key(value: Any) -> Any:
    """Keys are text or small numbers: nothing whose hash recurses or whose collisions a file could arrange."""
    if value is None or type(value) in (str, bool, float) or (type(value) is int and abs(value) < 1 << 60):
        return value
    raise PickleError(f"a {describe(value)} as a key; wanted text or a number; damaged or hostile")


def _numpy_code(dtype: torch.dtype) -> str:
    kinds = {torch.float16: "f", torch.float32: "f", torch.float64: "f", torch.uint8: "u"}
    return f"<{kinds.get(dtype, 'i')}{dtype.itemsize}"


def _small_int(raw: bytes) -> int:
    if len(raw) > MAX_INT_BYTES:
        raise PickleError(f"a whole number of {len(raw)} bytes; at most {MAX_INT_BYTES} are accepted")
    return int.from_bytes(raw, "little", signed=True)


def _decimal(raw: bytes) -> int:
    if len(raw) > 40:
        raise PickleError(f"a whole number of {len(raw)} digits; at most 40 are accepted")
    return int(raw.rstrip(b"L"))


# One function per opcode; `m` is the machine.


def _frame(m: _Machine) -> None:
    count = m.number("<Q")
    if count > m.end - m.pos:
        raise PickleError(f"a frame announces {count} bytes, {m.end - m.pos} are left; a truncated file")


def _proto(m: _Machine) -> None:
    version = m.number("<B")
    if version > 5:
        raise PickleError(f"pickle protocol {version}; wanted at most 5; damaged, or from a future Python")
    if not m.nested:
        m.document.protocol = version


def _int_line(m: _Machine) -> None:
    raw = m.line()
    m.stack.append({b"00": False, b"01": True}[raw] if raw in (b"00", b"01") else _decimal(raw))


def _string_line(m: _Machine) -> None:
    raw = m.line().strip()
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in b"'\"":
        raise PickleError(f"text without quotes near byte {m.pos}; damaged")
    m.stack.append(raw[1:-1].decode("latin-1"))  # escapes stay: no snapshot has this opcode, it is only shown


def _names(m: _Machine) -> tuple[str, str]:
    return m.line().decode("utf-8", "replace"), m.line().decode("utf-8", "replace")


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise PickleError(f"a global whose name is not text near byte {m.pos}; damaged or hostile")
    m.stack.append(m.find(module, name))


def _inst(m: _Machine) -> None:
    cls = m.find(*_names(m))
    args = tuple(m.pop_mark())
    m.refuse(f"it makes an object of {printable(cls.name)} with the opcode INST, which no snapshot does")
    m.stack.append(ObjectRecord(cls.name, args))


def _obj(m: _Machine) -> None:
    items = m.pop_mark()
    m.refuse(f"it makes an object of a {describe(items[0])} with the opcode OBJ, which no snapshot does")
    m.stack.append(ObjectRecord(items[0].name if isinstance(items[0], Global) else "an object", tuple(items[1:])))


def _reduce(m: _Machine) -> None:
    args, function = m.stack.pop(), m.stack.pop()
    m.stack.append(m.call(function, args))


def _newobj(m: _Machine) -> None:
    args, cls = m.stack.pop(), m.stack.pop()
    m.stack.append(m.new_object(cls, args))


def _newobj_ex(m: _Machine) -> None:
    kwargs, args, cls = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.refuse(f"it makes an object of a {describe(cls)} with keyword arguments, which no snapshot does")
    m.stack.append(ObjectRecord(cls.name if isinstance(cls, Global) else "an object", (args, kwargs)))


def _tuple(count: int) -> Callable[[_Machine], None]:
    def operation(m: _Machine) -> None:
        if len(m.stack) < count:
            raise PickleError(f"a tuple of values that are not there near byte {m.pos}; damaged")
        items = tuple(m.stack[len(m.stack) - count :])
        del m.stack[len(m.stack) - count :]
        m.stack.append(items)

    return operation


def _dict(m: _Machine) -> None:
    items, result = m.pop_mark(), {}  # type: ignore[var-annotated]
    m.set_items(result, items)
    m.stack.append(result)


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items(m.stack[-1], [key, value])


def _append(m: _Machine) -> None:
    value = m.stack.pop()
    m.append_to(m.stack[-1], [value])


def _append_many(m: _Machine) -> None:
    items = m.pop_mark()
    m.append_to(m.stack[-1], items)


def _set_items(m: _Machine) -> None:
    items = m.pop_mark()
    m.set_items(m.stack[-1], items)


def _pop(m: _Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def _pop_mark(m: _Machine) -> None:
    m.pop_mark()


def _extension(layout: str) -> Callable[[_Machine], None]:
    def operation(m: _Machine) -> None:
        code = m.number(layout)
        m.refuse(f"it uses extension code {code}, which no snapshot does")
        m.stack.append(ObjectRecord(f"extension {code}", ()))

    return operation


def _bytearray(m: _Machine) -> None:
    if m.document.allowed.isdisjoint(BUFFER_GLOBALS):
        raise PickleError(f"opcode BYTEARRAY8 near byte {m.pos}, which no snapshot has; refused")
    m.stack.append(m.blob(m.number("<Q")))  # what `_frombuffer` reads


def _refused(name: str) -> Callable[[_Machine], None]:
    def operation(m: _Machine) -> None:
        raise PickleError(f"opcode {name} near byte {m.pos}, which no snapshot has; refused")

    return operation


def _frozenset(m: _Machine) -> None:
    items = m.pop_mark()
    m.budget.spend(8 * len(items))
    m.stack.append({_key(item) for item in items})


def _opcodes() -> Iterator[tuple[bytes, Callable[[_Machine], None]]]:
    def push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
        def operation(m: _Machine) -> None:
            result = value(m)  # first: it may replace m.stack
            m.stack.append(result)

        return operation

    yield pickle.PROTO, _proto
    yield pickle.FRAME, _frame
    yield pickle.NONE, push(lambda m: None)
    yield pickle.NEWTRUE, push(lambda m: True)
    yield pickle.NEWFALSE, push(lambda m: False)
    yield pickle.INT, _int_line
    yield pickle.LONG, push(lambda m: _decimal(m.line()))
    yield pickle.BININT, push(lambda m: m.number("<i"))
    yield pickle.BININT1, push(lambda m: m.number("<B"))
    yield pickle.BININT2, push(lambda m: m.number("<H"))
    yield pickle.LONG1, push(lambda m: _small_int(m.blob(m.number("<B")).tobytes()))
    yield pickle.LONG4, push(lambda m: _small_int(m.blob(min(m.number("<i"), MAX_INT_BYTES + 1)).tobytes()))
    yield pickle.FLOAT, push(lambda m: float(m.line()[:64]))
    yield pickle.BINFLOAT, push(lambda m: m.number(">d"))
    yield pickle.STRING, _string_line
    yield pickle.BINSTRING, push(lambda m: m.text(m.number("<i"), "latin-1"))
    yield pickle.SHORT_BINSTRING, push(lambda m: m.text(m.number("<B"), "latin-1"))
    yield pickle.UNICODE, push(lambda m: m.line().decode("raw-unicode-escape"))
    yield pickle.BINUNICODE, push(lambda m: m.text(m.number("<I")))
    yield pickle.SHORT_BINUNICODE, push(lambda m: m.text(m.number("<B")))
    yield pickle.BINUNICODE8, push(lambda m: m.text(m.number("<Q")))
    yield pickle.BINBYTES, push(lambda m: m.blob(m.number("<I")))
    yield pickle.SHORT_BINBYTES, push(lambda m: m.blob(m.number("<B")))
    yield pickle.BINBYTES8, push(lambda m: m.blob(m.number("<Q")))
    yield pickle.EMPTY_LIST, push(lambda m: [])
    yield pickle.EMPTY_DICT, push(lambda m: {})
    yield pickle.EMPTY_SET, push(lambda m: set())
    yield pickle.EMPTY_TUPLE, push(lambda m: ())
    yield pickle.LIST, push(lambda m: m.pop_mark())
    yield pickle.TUPLE, push(lambda m: tuple(m.pop_mark()))
    yield pickle.TUPLE1, _tuple(1)
    yield pickle.TUPLE2, _tuple(2)
    yield pickle.TUPLE3, _tuple(3)
    yield pickle.DICT, _dict
    yield pickle.FROZENSET, _frozenset
    yield pickle.APPEND, _append
    yield pickle.APPENDS, _append_many
    yield pickle.ADDITEMS, _append_many
    yield pickle.SETITEM, _set_item
    yield pickle.SETITEMS, _set_items
    yield pickle.MARK, _Machine.push_mark
    yield pickle.POP, _pop
    yield pickle.POP_MARK, _pop_mark
    yield pickle.DUP, push(lambda m: m.stack[-1])
    yield pickle.PUT, lambda m: m.put(_decimal(m.line()))
    yield pickle.BINPUT, lambda m: m.put(m.number("<B"))
    yield pickle.LONG_BINPUT, lambda m: m.put(m.number("<I"))
    yield pickle.MEMOIZE, lambda m: m.put(len(m.memo))
    yield pickle.GET, push(lambda m: m.memo[_decimal(m.line())])
    yield pickle.BINGET, push(lambda m: m.memo[m.number("<B")])
    yield pickle.LONG_BINGET, push(lambda m: m.memo[m.number("<I")])
    yield pickle.GLOBAL, push(lambda m: m.find(*_names(m)))
    yield pickle.STACK_GLOBAL, _stack_global
    yield pickle.REDUCE, _reduce
    yield pickle.NEWOBJ, _newobj
    yield pickle.NEWOBJ_EX, _newobj_ex
    yield pickle.BUILD, lambda m: m.build(m.stack.pop())
    yield pickle.INST, _inst
    yield pickle.OBJ, _obj
    yield pickle.PERSID, push(lambda m: m.persistent_id(m.line().decode("latin-1")))
    yield pickle.BINPERSID, push(lambda m: m.persistent_id(m.stack.pop()))
    yield pickle.EXT1, _extension("<B")
    yield pickle.EXT2, _extension("<H")
    yield pickle.EXT4, _extension("<i")
    yield pickle.BYTEARRAY8, _bytearray
    yield pickle.NEXT_BUFFER, _refused("NEXT_BUFFER")
    yield pickle.READONLY_BUFFER, _refused("READONLY_BUFFER")


_OPCODES = {code[0]: operation for code, operation in _opcodes()}
_CALLS: dict[str, Callable[[_Machine, tuple], Any]] = {
    PERSISTENT: _Machine.persistent,
    "collections.OrderedDict": _Machine.ordered_dict,
    "torch._utils._rebuild_parameter": _Machine.rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": _Machine.rebuild_tensor,
    "torch.storage._load_from_bytes": _Machine.load_storage,
    "numpy.core.multiarray.scalar": _Machine.scalar,
    "numpy._core.multiarray.scalar": _Machine.scalar,
    "numpy.dtype": _Machine.dtype,
    "builtins.set": _Machine.make_set,
    "__builtin__.set": _Machine.make_set,
    "_codecs.encode": _Machine.encode,
    "numpy.core.multiarray._reconstruct": _Machine.new_array,
    "numpy._core.multiarray._reconstruct": _Machine.new_array,
    "numpy.core.numeric._frombuffer": _Machine.array_from_buffer,
    "numpy._core.numeric._frombuffer": _Machine.array_from_buffer,
}
