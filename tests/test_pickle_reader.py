"""The pickle interpreter: right values for honest files, bounded refusal of all others, and never an execution."""

import copy
import io
import pickle
import pickletools
import re
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torch_utils import persistence, pickle_reader
from torch_utils.pickle_reader import ObjectRecord, PickleError, TensorRecord, plain, read, survey

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8]
DTYPES += [torch.bool]


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93"


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """Through pickle and our reader."""
    record = read(pickle.dumps(tensor, protocol=4)).root
    assert isinstance(record, TensorRecord)
    return record.tensor()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_values_equal_pickles_own(protocol: int) -> None:
    value = {
        "a": [1, -1, 255, 256, 70000, 2**40, -(2**70), True, False, None, 1.5, float("inf")],
        "b": ("", "é\U0001f600", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "c": {"nested": {1: "one", None: "none"}},
    }
    value["again"] = value["a"]
    if protocol >= 3:
        value["d"] = b"raw \x00\xff"
    data = pickle.dumps(value, protocol=protocol)
    document = read(data)
    assert plain(document.root) == value and document.damage is None
    assert document.root["again"] is document.root["a"]
    assert document.protocol == (protocol if protocol >= 2 else 0)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_names_on_the_allow_list_become_values(protocol: int) -> None:
    numbers = [np.float64(1.5), np.float32(-2), np.int64(7), np.bool_(True)]
    value = {"o": OrderedDict(a=1), "s": {"x", "y"}, "n": numbers}
    if protocol == 2:
        value["b"] = b"\x00\xff"  # goes through _codecs.encode
    root = read(pickle.dumps(value, protocol=protocol)).root
    assert type(root["o"]) is pickle_reader.OrderedDictRecord and dict(root["o"]) == {"a": 1}
    assert root["s"] == {"x", "y"} and root["n"] == [1.5, -2.0, 7, True]
    assert [type(x) for x in root["n"]] == [float, float, int, bool], "NumPy scalars become Python numbers"
    if protocol == 2:
        assert root["b"].tobytes() == b"\x00\xff"


def test_big_endian_numpy_scalar() -> None:
    assert read(pickle.dumps(np.array([2.5], dtype=">f8")[0], protocol=4)).root == 2.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_equal_torchs(dtype: torch.dtype, protocol: int) -> None:
    tensor = (torch.arange(24).reshape(2, 3, 4) % 7).to(dtype)
    record = read(pickle.dumps(tensor, protocol=protocol)).root
    assert torch.equal(record.tensor(), tensor) and record.dtype == dtype and not record.is_parameter


def test_tensor_layouts() -> None:
    base = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for tensor in (base.to(memory_format=torch.channels_last), base[:, 1:, ::2], base.transpose(1, 3), base[0, 0, 0, 0],
                   torch.zeros(0, 3), torch.zeros(())):  # fmt: skip
        twin = stored(tensor)
        assert torch.equal(twin, tensor) and twin.dtype == tensor.dtype
    assert stored(base.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert read(pickle.dumps(torch.nn.Parameter(base))).root.is_parameter
    first, second = read(pickle.dumps([base, base])).root
    assert first is second


GEOMETRY = [
    ((0, (24,), (1,)), True),
    ((0, (2, 12), (12, 1)), True),
    ((20, (2, 2), (2, 1)), True),
    ((0, (5, 0), (1, 1)), True),
    ((0, (1, 24), (0, 1)), True),
    ((0, (25,), (1,)), False),
    ((21, (2, 2), (2, 1)), False),
    ((-1, (2,), (1,)), False),
    ((0, (10**10,), (0,)), False),
    ((0, (10**10, 10**10), (0, 0)), False),
    ((0, (13, 12), (1, 1)), False),
    ((0, (2,), (-1,)), False),
    ((0, (2, 2), (1,)), False),
    ((0, [2], [1]), False),
    ((0.0, (2,), (1,)), False),
    ((0, (True,), (1,)), False),
    ((0, (2**62,), (1,)), False),
    ((0, (1,) * 9, (1,) * 9), False),
]


@pytest.mark.parametrize("geometry, fits", GEOMETRY)
def test_tensor_geometry_is_checked_against_the_storage(geometry: tuple, fits: bool) -> None:
    if fits:
        pickle_reader.check_tensor(24, *geometry)
    else:
        with pytest.raises(PickleError, match="hostile"):
            pickle_reader.check_tensor(24, *geometry)


class Crafted:
    """Pickles as a call of an allowed function with arguments of our choice."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_crafted_tensors_are_refused() -> None:
    rebuild, parameter = torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter
    storage = torch.ones(4).storage()

    def tensor(*geometry) -> Crafted:
        return Crafted(rebuild, storage, *geometry, False, OrderedDict())

    assert read(pickle.dumps(tensor(0, (2, 2), (2, 1)))).root.tensor().tolist() == [[1, 1], [1, 1]]
    for crafted in (
        tensor(0, (10**10,), (0,)),  # 40 GB from four numbers
        tensor(1, (4,), (1,)),
        Crafted(rebuild, torch.storage._load_from_bytes, 0, (1,), (1,), False, OrderedDict()),
        Crafted(rebuild, [1.0], 0, (1,), (1,), False, OrderedDict()),
        Crafted(rebuild, storage),
        Crafted(parameter, storage, False, OrderedDict()),
        Crafted(torch.storage._load_from_bytes, "text"),
        Crafted(torch.storage._load_from_bytes, b""),
        Crafted(torch.storage._load_from_bytes, pickle.dumps(OrderedDict(), 2)),
        Crafted(OrderedDict, [1, 2]),
        Crafted(OrderedDict, 3),
        Crafted(persistence._reconstruct_persistent_obj, [1]),
        Crafted(np.dtype, "O" * 9),
        Crafted(np.dtype, 8),
    ):
        with pytest.raises(PickleError) as refusal:
            read(pickle.dumps(crafted, protocol=4))
        assert "hostile" in str(refusal.value) or "refused" in str(refusal.value) or "bytes" in str(refusal.value)


def test_storage_that_lies_about_its_length() -> None:
    data = pickle.dumps(torch.ones(6), protocol=4)
    length = struct.pack("<q", 6) + struct.pack("<6f", *[1] * 6)
    assert data.count(length) == 1
    for numel in (5, 7, -1, 2**60):
        changed = data.replace(length, struct.pack("<q", numel) + length[8:])
        with pytest.raises(PickleError, match="bytes|stored"):
            read(changed)


REFUSED = {
    "extension": (b"\x80\x02\x82\x01.", "extension code"),
    "persistent id": (b"\x80\x02K\x01Q.", "persistent id"),
    "BUILD on a list": (b"\x80\x02]}b.", "BUILD"),
    "BUILD on an ordered dict": (b"\x80\x04" + named("collections", "OrderedDict") + b")R}b.", "attributes"),
    "BUILD on a global": (b"\x80\x04" + named("torch._utils", "_rebuild_tensor_v2") + b"}b.", "BUILD"),
    "NEWOBJ of an allowed function": (b"\x80\x04" + named("collections", "OrderedDict") + b")\x81.", "makes an object"),
    "NEWOBJ_EX": (b"\x80\x04" + named("dnnlib.util", "EasyDict") + b")}\x92.", "keyword"),
    "INST of an allowed class": (b"(icollections\nOrderedDict\n.", "INST"),
    "calling a result": (b"\x80\x04" + named("collections", "OrderedDict") + b")R)R.", "calls a"),
    "module of an allowed name": (b"\x80\x04" + named("torch_utils", "persistence") + b".", "allow-list"),
    "dotted name": (b"\x80\x04" + named("dnnlib", "util.EasyDict.__init__") + b".", "allow-list"),
    "storage class outside a tensor": (b"\x80\x04" + named("torch", "FloatStorage") + b".", "allow-list"),
    "numpy array": (pickle.dumps(np.zeros(3), protocol=3), "allow-list"),
    "function of ours": (b"\x80\x04" + named("dnnlib.util", "open_url") + b".", "dnnlib.util.open_url"),
    "python class": (pickle.dumps(Path("x"), protocol=4), "allow-list"),
    "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "bytearray": (pickle.dumps(bytearray(b"x"), protocol=5), "BYTEARRAY8"),
    "list as a key": (b"\x80\x02}]K\x01s.", "key"),
    "tuple as a key": (b"\x80\x02})K\x01s.", "key"),
    "huge number as a key": (b"\x80\x02}\x8a\x09\x01\x01\x01\x01\x01\x01\x01\x01\x01K\x01s.", "key"),
    "number of 255 bytes": (b"\x80\x02\x8a\xff" + bytes(255) + b".", "whole number"),
    "number of 5000 digits": (b"L" + b"9" * 5000 + b"L\n.", "digits"),
    "key without value": (b"\x80\x02}(K\x01u.", "without a value"),
    "append to a dict": (b"\x80\x02}K\x01a.", "appended"),
    "keys for a list": (b"\x80\x02]K\x01K\x02s.", "keys set"),
    "empty stack": (b"\x80\x02.", "damaged"),
    "unknown memo entry": (b"\x80\x02h\x07.", "damaged"),
    "mark without end": (b"\x80\x02t.", "damaged"),
    "unknown opcode": (b"\x80\x02\xff.", "unknown opcode"),
    "future protocol": (b"\x80\x09.", "protocol 9"),
    "no bytes": (b"", "truncated"),
    "text": (b"hello\nworld", "not a pickle file"),
    "image": (b"\x89PNG\r\n\x1a\n", "not a pickle file"),
    "announced length": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abcd.", "announces"),
    "announced text": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b"abcd.", "at most"),
    "announced frame": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.", "frame"),
    "negative length": (b"\x80\x02T\xff\xff\xff\xffN.", "announces"),
    "memo index": (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo index"),
    "negative memo index": (b"Np-5\n.", "memo index"),
    "long global": (b"c" + b"a" * 2000 + b"\nb\n.", "letters"),
    "endless line": (b"V" + b"a" * 200000 + b"\n.", "line"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(PickleError) as refusal:
        read(data)
    message = str(refusal.value)
    assert words in message and message.isprintable() and len(message) < 400


def test_survey_tells_what_a_hostile_file_asks_for() -> None:
    data = b"\x80\x04}" + short("x") + named("os", "system") + short("true") + b"\x85Rs."
    document = survey(data)
    assert list(document.globals) == ["os.system"] and "os.system" in document.refusals[0]
    assert isinstance(document.root["x"], ObjectRecord) and document.root["x"].args == ("true",)


BOMBS = {
    "budget of steps": b"\x80\x02" + b"N0" * 700_000 + b".",
    "encode again and again": b"\x80\x04" + named("_codecs", "encode") + b"\x940\x8d" + struct.pack("<Q", 1 << 19)
    + b"a" * (1 << 19) + b"\x940" + (b"h\x00h\x01" + short("latin1") + b"\x86R0") * 40_000 + b"N.",
    "copy an ordered dict again and again": b"\x80\x04" + named("collections", "OrderedDict") + b"\x940](" + b"".join(
        b"K\x01K%c\x86" % (i % 256) for i in range(20_000)) + b"e\x940" + b"h\x00h\x01\x85R0" * 40_000 + b"N.",
    "nested tuples": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "nested calls": b"\x80\x02" + (b"cos\nsystem\nq\x00" + b"h\x00" * 80_000) + b")" + b"R\x85" * 80_000 + b".",
    "nested dicts": b"\x80\x02N" + b"q\x00}K\x01h\x00s" * 150_000 + b".",
    "many names": b"".join(b"cm%d\nf\n0" % i for i in range(150_000)) + b"N.",
    "doubling": b"\x80\x02]" + b"q\x00]h\x00ah\x00a" * 60 + b".",
}  # fmt: skip


def test_bombs_end_quickly_in_little_memory() -> None:
    """Each in one process with a memory limit, walked and thrown away too."""
    program = (
        "import resource, sys, time, pickle\n"
        "from torch_utils import pickle_reader\n"
        "bombs = pickle.load(sys.stdin.buffer)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "for name, data in bombs.items():\n"
        "    start = time.process_time()\n"
        "    document = pickle_reader.survey(data)\n"
        "    try: pickle_reader.plain(document.root)\n"
        "    except pickle_reader.PickleError: pass\n"
        "    else: assert document.root is None or document.damage, name\n"
        "    del document\n"
        "    seconds = time.process_time() - start\n"
        "    assert seconds < 10, (name, seconds)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(BOMBS), cwd=ROOT, capture_output=True, timeout=100
    )
    assert result.returncode == 0, result.stderr.decode()[-2000:]


def test_payload_is_not_copied_and_cost_is_linear() -> None:
    tensor = torch.zeros(16 << 20)  # 64 MiB
    data = pickle.dumps(tensor, protocol=4)
    start = time.process_time()
    root = read(data).root
    assert root.storage.blob.data is data
    assert time.process_time() - start < 1


def test_plain_is_bounded() -> None:
    deep: list = []
    for _ in range(30):
        deep = [deep]
    for value in (deep, list(range(20_000)), {"x": object()}):
        with pytest.raises(PickleError):
            plain(value)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save(zipped: bool) -> None:
    wide = torch.arange(24.0).reshape(4, 6)
    content = {"w": wide, "view": wide[1:, ::2], "t": wide.t(), "half": torch.ones(3).half(), "none": torch.zeros(0)}
    content["state"] = torch.nn.Linear(2, 3).state_dict()  # an OrderedDict with `_metadata`
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    document = survey(buffer.getvalue())
    assert document.container == ("torch-zip" if zipped else "torch-legacy")
    assert document.damage is None and document.refusals == [] and document.allowed is pickle_reader.TORCH_GLOBALS
    for key in ("w", "view", "t", "half", "none"):
        assert torch.equal(document.root[key].tensor(), content[key]), key
    assert document.root["w"].storage is document.root["view"].storage and document.root["w"].storage.blob.data
    for key, tensor in content["state"].items():
        assert torch.equal(document.root["state"][key].tensor(), tensor)
    with pytest.raises(PickleError, match="torch.save"):
        read(buffer.getvalue())


def _zip_of(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(64), "b": torch.zeros(64)}, buffer)
    return buffer.getvalue()


def test_damaged_files_of_torch_save(torch_zip: bytes) -> None:
    entries = _entries(torch_zip)
    assert survey(_zip_of(entries)).damage is None
    data = next(name for name in entries if name.endswith("data/0"))
    cases = {
        "missing": _zip_of({name: value for name, value in entries.items() if name != data}),
        "short": _zip_of({**entries, data: entries[data][:-1]}),
        "compressed": _zip_of(entries, zipfile.ZIP_DEFLATED),
        "little-endian": _zip_of({**entries, data.replace("data/0", "byteorder"): b"big"}),
        "without a pickle": _zip_of({"x/y": b"z"}),
    }
    for words, damaged in cases.items():
        document = survey(damaged)
        assert document.root is None and words in document.damage, (words, document.damage)


HOSTILE_PICKLE = b"\x80\x02cos\nsystem\n(X\x05\x00\x00\x00truetR."


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "name, words",
    [
        ("archive/data.pkl", "two entries 'archive/data.pkl' and 'archive/data.pkl'"),
        ("archive/DATA.PKL", "two entries 'archive/"),
        ("ARCHIVE/Data.pkl", "two entries 'archive/|'ARCHIVE/"),
        ("archive/data.pkl%.txt", r"the entry 'archive/data.pkl\\x00.txt', which programs read as different names"),
        ("archive\\data.pkl", r"the entry 'archive\\\\data.pkl', which"),
        ("other/data.pkl", "several root folders, 'archive' and 'other'|'other' and 'archive'"),
        ("other/version", "several root folders"),
        ("data.pkl", "several root folders"),
        ("archive/x/data.pkl", "2 pickles .*archive/x/data.pkl"),
    ],
)
def test_zips_that_programs_read_in_two_ways(name: str, words: str, first: bool, torch_zip: bytes) -> None:
    """PyTorch's reader looks names up in its own way, so that it might find another pickle than this one."""
    genuine = [(f"archive/{key.partition('/')[2]}", value) for key, value in _entries(torch_zip).items()]
    entries = [(name, HOSTILE_PICKLE), *genuine] if first else [*genuine, (name, HOSTILE_PICKLE)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, value in entries:
            archive.writestr(key, value)
    assert survey(_zip_of(dict(genuine))).damage is None
    document = survey(buffer.getvalue().replace(b"%", b"\0"))
    assert document.root is None and re.search(words, document.damage or ""), document.damage


def test_zips_with_a_second_directory(torch_zip: bytes) -> None:
    """Programs look for the directory from the end, each in its own way: nothing may lie behind or between."""
    hostile = _zip_of({"archive/data.pkl": HOSTILE_PICKLE})
    end = len(torch_zip) - 22
    cases = {
        "comment": torch_zip[:-2] + (22).to_bytes(2, "little") + hostile[-22:],
        "bytes behind": torch_zip + bytes(30),
        "one file behind the other": hostile + torch_zip,
        "the other way round": torch_zip + hostile,
        "bytes before the last record": torch_zip[:end] + bytes(30) + torch_zip[end:],
        "other count": hostile[:-14] + b"\2\0\2\0" + hostile[-10:],
    }
    for what, data in cases.items():
        document = survey(data)
        assert document.root is None and "zip file" in (document.damage or ""), what


def test_overlapping_zip_entries_do_not_multiply_a_file() -> None:
    """Twenty entries of the directory at one place in the file: each alone is in order."""
    buffer = io.BytesIO()
    torch.save([torch.full([4096], float(n)) for n in range(20)], buffer)
    entries = _entries(buffer.getvalue())
    folder = next(name for name in entries if name.endswith("data.pkl")).removesuffix("data.pkl")
    hostile = io.BytesIO()
    with zipfile.ZipFile(hostile, "w") as archive:
        for name, data in entries.items():
            if "/data/" not in name or name.endswith("/data/0"):
                archive.writestr(name, data)
        for key in range(1, 20):
            info = copy.copy(archive.getinfo(f"{folder}data/0"))
            info.filename = f"{folder}data/{key}"
            archive.filelist.append(info)
    assert survey(buffer.getvalue()).damage is None
    assert "overlap" in (survey(hostile.getvalue()).damage or "")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_arrays_where_they_are_allowed(protocol: int, order: str) -> None:
    arrays = [np.arange(24, dtype=dtype).reshape(2, 3, 4).copy(order) for dtype in ("f2", "f4", "f8", "i4", "i8", "u1")]
    arrays += [np.array(3.5, dtype="f4")] + ([np.zeros([0, 3], dtype="f4")] if protocol > 2 else [])
    data = pickle.dumps(arrays, protocol=protocol)
    assert survey(data).refusals or survey(data).damage, "snapshots hold no arrays"
    document = survey(data, allowed=pickle_reader.TENSORFLOW_GLOBALS)
    assert document.refusals == [] and document.damage is None
    for record, array in zip(document.root, arrays, strict=True):
        assert isinstance(record, pickle_reader.ArrayRecord)
        assert np.array_equal(record.tensor.tensor().numpy(), array) and record.tensor.size == array.shape


@pytest.mark.parametrize("array", [np.zeros(2, ">f4"), np.array(["x"]), np.array([None]), np.zeros(2, "c8")])
def test_other_numpy_arrays_are_refused(array: np.ndarray) -> None:
    document = survey(pickle.dumps(array, protocol=3), allowed=pickle_reader.TENSORFLOW_GLOBALS)
    assert document.damage is not None and document.root is None


def test_damaged_zip() -> None:
    assert "zip" in (survey(b"PK\x03\x04" + bytes(100)).damage or "")


OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes]
FRAGMENTS = [short("x"), named("collections", "OrderedDict"), named("numpy", "dtype"), named("os", "system"), b"K\x05",
             named("torch._utils", "_rebuild_tensor_v2"), named("torch.storage", "_load_from_bytes"), b"C\x04abcd",
             named("torch_utils.persistence", "_reconstruct_persistent_obj"),
             named("dnnlib.util", "EasyDict")]  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(OPCODES) | st.sampled_from(FRAGMENTS) | st.binary(max_size=3), max_size=60))
def test_any_bytes_are_surveyed(parts: list[bytes]) -> None:
    data = b"\x80\x04" + b"".join(parts) + b"."
    document = survey(data)
    try:
        read(data)
        accepted = True
    except PickleError as error:
        accepted = False
        assert str(error).isprintable()
    assert accepted == (not document.refusals and document.damage is None)


def test_zip_entries_at_impossible_places(torch_zip: bytes) -> None:
    """A directory whose zip64 fields put an entry far outside any file; zipfile itself fails with an OverflowError."""
    data = bytearray(torch_zip)
    place = data.find(b"PK\x01\x02")  # the first entry of the directory: data.pkl
    struct.pack_into("<I", data, place + 42, 0xFFFFFFFF)
    name, extra = struct.unpack_from("<HH", data, place + 28)
    assert b"data.pkl" in data[place + 46 : place + 46 + name]
    field = struct.pack("<HHQ", 1, 8, (1 << 64) - 1)
    data[place + 46 + name : place + 46 + name + extra] = field
    struct.pack_into("<H", data, place + 30, len(field))
    end = data.rfind(b"PK\x05\x06")
    size = struct.unpack_from("<I", data, end + 12)[0]
    struct.pack_into("<I", data, end + 12, size + len(field) - extra)
    zip64 = data.rfind(b"PK\x06\x06", 0, end)
    if zip64 >= 0:
        struct.pack_into("<Q", data, zip64 + 40, struct.unpack_from("<Q", data, zip64 + 40)[0] + len(field) - extra)
    document = survey(bytes(data))
    assert document.root is None and "zip" in (document.damage or "")
