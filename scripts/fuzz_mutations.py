"""The hostile corpus, and numbered mutations of it and of genuine files in every format that is read.

A mutation goes where the format's reader goes: into opcodes and bytes of a pickle, of each pickle of PyTorch's old
container, of the pickle inside a zip (packed again with right checksums, or nothing would get past them), into header
and configuration of a safetensors file (whose length is put right again); and now and then into the file as it is.
"""

import gzip
import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = ROOT / "tests" / "data" / "hostile"
MAX_OPCODES = 20_000
MAX_HOSTILE_BYTES = 100_000  # larger ones are bombs, which mutation only makes smaller
SHARE_HOSTILE = 0.15  # of the mutations
SHARE_RAW = 0.2  # of mutations of containers: into the file as it is
FRAGMENTS = (
    b"cos\nsystem\n(Vtouch executed\ntR",
    b"cbuiltins\nexec\n(Vopen('executed','w')\ntR",
    b"ctorch.storage\n_load_from_bytes\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n",
    b"cdnnlib.util\nEasyDict\n)\x81",
    b"cdnnlib.tflib.network\nNetwork\n)\x81",
    b"cargparse\nNamespace\n)\x81",
    b"ccollections\nOrderedDict\n)R",
    b"\x82\x01", b"Q", b"P0\n", b"o", b"b", b"\x92", b"\x81", b"R", b"0", b"2", b"(", b"t", b"]", b"}", b"\x8f",
)  # fmt: skip
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
JSON_VALUES: tuple[Any, ...] = (
    0, 1, -1, 7, 2**31, 2**63, 10**30, -(2**63), 1e308, True, None, "", "F16", "I64", "U8", "os.system", "\u043es",
    [], {}, [0, 0], [2**62, 4], [-4, 8], [10**12], {"x": {}}, [[[[[[]]]]]],
)  # fmt: skip


def genuine() -> dict[str, bytes]:
    """Network files that open, of every format that is read."""
    import fuzz_seeds  # late: it imports the readers, and the coverage-guided fuzzer has to do that first

    return fuzz_seeds.genuine()


def hostile() -> dict[str, bytes]:
    """The corpus."""
    return {path.stem: gzip.decompress(path.read_bytes()) for path in sorted(HOSTILE.glob("*.gz"))}


class Mutator:
    """Numbered mutations of network files: number i of a seed is always the same, whatever was asked for before."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.files = genuine()
        self.names = list(self.files)
        self.hostile = {name: data for name, data in hostile().items() if 0 < len(data) < MAX_HOSTILE_BYTES}
        self._starts: dict[bytes, list[int]] = {}

    def __getitem__(self, number: int) -> tuple[str, bytes]:
        """(what it is a mutation of, the file)."""
        rng = random.Random(f"{self.seed}/{number}")
        if rng.random() < SHARE_HOSTILE:
            name, data = "hostile corpus", rng.choice(list(self.hostile.values()))
        else:
            name = self.names[number % len(self.names)]
            data = self.files[name]
        changed = data
        while changed == data:  # some changes are none
            changed = self._changed(name, data, rng)
        return name, changed

    def _changed(self, name: str, data: bytes, rng: random.Random) -> bytes:
        raw = rng.random() < SHARE_RAW
        if data[:2] == b"PK" and not raw:
            return self._in_zip(data, rng)
        if name.startswith("safetensors") and not raw:
            return _in_safetensors(data, rng)
        return self._in_pickle(data, rng)

    def _in_pickle(self, data: bytes, rng: random.Random) -> bytes:
        starts = self._opcode_starts(data)
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            if starts and rng.random() < 0.6:
                _change_opcodes(changed, starts, rng)
            else:
                _change_bytes(changed, rng)
        return bytes(changed)

    def _in_zip(self, data: bytes, rng: random.Random) -> bytes:
        """One entry changed, mostly the pickle; or one entry missing, or there twice."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
        except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, NotImplementedError):  # of the hostile corpus
            return self._in_pickle(data, rng)
        pickles = [i for i, (entry, _) in enumerate(entries) if entry.filename.endswith(".pkl")]
        index = rng.choice(pickles) if pickles and rng.random() < 0.85 else rng.randrange(len(entries))
        entry, content = entries[index]
        if rng.random() < 0.03:
            entries[index : index + 1] = [(entry, content)] * rng.choice((0, 2))
        else:
            entries[index] = (entry, self._in_pickle(content, rng))
        return _packed(entries)

    def _opcode_starts(self, data: bytes) -> list[int]:
        """Where opcodes start: of one pickle, or of all that an old container strings together."""
        if data not in self._starts:
            stream, found = io.BytesIO(data), []
            try:
                while stream.tell() < len(data) and len(found) < MAX_OPCODES:
                    for _, _, at in pickletools.genops(stream):
                        found.append(int(at or 0))
                        if len(found) > MAX_OPCODES:
                            break
            except Exception:  # hostile files and numbers break pickletools; what it read until then serves
                pass
            self._starts[data] = found
        return self._starts[data]


def _packed(entries: "list[tuple[zipfile.ZipInfo, bytes]]") -> bytes:
    """A zip as torch.save makes it: stored, with right checksums."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name is there twice is what was wanted
        for entry, content in entries:
            archive.writestr(zipfile.ZipInfo(entry.filename), content)
    return stream.getvalue()


def _in_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Its header as JSON or as text, or the configuration inside, changed; the length of the header says so."""
    length = struct.unpack_from("<Q", data)[0]
    text, numbers = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.3:
        changed = bytearray(text)
        _change_bytes(changed, rng)
        text = bytes(changed)
    else:
        header = json.loads(text)
        config = json.loads(header["__metadata__"]["config"]) if "__metadata__" in header else {}
        for _ in range(rng.choice((1, 1, 2, 8))):
            _change_json(config if config and rng.random() < 0.5 else header, rng)
        if config and isinstance(header.get("__metadata__"), dict):
            header["__metadata__"]["config"] = json.dumps(config)
        text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def _change_json(root: dict, rng: random.Random) -> None:
    """Replace, drop or copy one value, at whatever depth."""
    node: Any = root
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        break
    choice = rng.randrange(4)
    if choice == 0:
        del node[key]
    elif choice == 1:
        node[rng.choice(keys)] = node[key]
    elif choice == 2 and isinstance(node, dict):
        node[rng.choice(("x", "G.x", "D.b4.out.weight", "config", "format", "\ud800"))] = node.pop(key)
    else:
        node[key] = rng.choice(JSON_VALUES)


def _change_opcodes(data: bytearray, starts: list[int], rng: random.Random) -> None:
    """Delete, repeat, move or replace whole opcodes, insert others, lie in arguments. (Starts are the original's.)"""
    first = rng.randrange(len(starts))
    at = min(starts[first], len(data))
    stop = min(starts[min(first + rng.choice((1, 1, 2, 8)), len(starts) - 1)], len(data))
    choice = rng.randrange(6)
    if choice == 0:
        del data[at:stop]
    elif choice == 1:
        data[at:at] = data[at:stop] * rng.choice((1, 2, 50))
    elif choice == 2:
        data[at:stop] = rng.choice(FRAGMENTS)
    elif choice == 3:
        data[at:at] = rng.choice(FRAGMENTS)
    elif choice == 4:
        other = min(rng.choice(starts), len(data))
        data[at:at] = data[other : other + max(stop - at, 1)]
    else:
        width = min(stop - at - 1, rng.choice((1, 2, 4, 8)))
        if width > 0:
            data[at + 1 : at + 1 + width] = struct.pack("<Q", rng.choice(NUMBERS))[:width]


def _change_bytes(data: bytearray, rng: random.Random) -> None:
    """Change, cut, repeat or overwrite bytes, wherever they are."""
    at = rng.randrange(len(data) + 1)
    choice = rng.randrange(6)
    if choice == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif choice == 1 and at < len(data):
        data[at] = rng.randrange(256)
    elif choice == 2:
        del data[at : at + rng.choice((1, 2, 4, 8, 1000))]
    elif choice == 3:
        data[at:at] = data[at : at + rng.choice((1, 4, 64, 4096))]
    elif choice == 4:
        width = rng.choice((1, 2, 4, 8))
        data[at : at + width] = struct.pack("<Q", rng.choice(NUMBERS))[:width]
    elif rng.random() < 0.1:
        del data[at:]
