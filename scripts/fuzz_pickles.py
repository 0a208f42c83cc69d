"""Read hostile and mutated network files under guard: none may execute anything, crash, hang or take much memory.

Each file is given to the reader that every command uses and to `inspect`, in a process of its own that is watched:
  - an audit hook reports exec, compile, import, unpickling by name, opening for writing, subprocesses, sockets;
  - the address space may grow by at most 2 GiB beyond the file;
  - more than 10 s, or the death of the process, counts against the file, which is kept.
A refusal must be one printable line.

Usage:
  python scripts/fuzz_pickles.py                        the corpus of tests/data/hostile
  python scripts/fuzz_pickles.py --mutations 20000      and that many mutated files (bytes and opcodes, seeded)
  python scripts/fuzz_pickles.py --atheris 20000        runs of the coverage-guided fuzzer (pip install atheris)
Prints one JSON object; exit code 1 if anything was found. Mutation number i of a seed is always the same file:
--only I writes it to --keep for a closer look.
"""

import argparse
import codecs
import gzip
import json
import multiprocessing
import os
import pickletools
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HOSTILE = ROOT / "tests" / "data" / "hostile"
GENUINE = ROOT / "tests" / "data" / "pickles"
MAX_SEC = 10
MAX_EXTRA_BYTES = 2 << 30
MAX_MESSAGE = 600
FORBIDDEN = (
    "exec", "compile", "import", "pickle.find_class", "code.__new__", "function.__new__", "subprocess.", "os.", "pty.",
    "socket.", "ctypes.", "shutil.", "marshal.", "urllib.", "http.", "webbrowser.", "ftplib.", "smtplib.", "mmap.",
)  # fmt: skip
HARMLESS = ("os.listdir", "os.scandir", "os.fwalk", "os.walk")
FRAGMENTS = (
    b"cos\nsystem\n(Vtouch executed\ntR",
    b"cbuiltins\nexec\n(Vopen('executed','w')\ntR",
    b"ctorch.storage\n_load_from_bytes\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n",
    b"cdnnlib.util\nEasyDict\n)\x81",
    b"ccollections\nOrderedDict\n)R",
    b"\x82\x01", b"Q", b"P0\n", b"o", b"b", b"\x92", b"\x81", b"R", b"0", b"2", b"(", b"t", b"]", b"}", b"\x8f",
)  # fmt: skip


class Guard:
    """The audit hook of one process, armed only while a file is read."""

    def __init__(self) -> None:
        self.armed = False
        self.caught: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        if event == "open":
            mode, flags = args[1], args[2]
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not writes and not (isinstance(mode, str) and set(mode) & set("wax+")):
                return
        elif not event.startswith(FORBIDDEN) or event in HARMLESS:
            return
        self.caught.append(f"{event} {str(args)[:200]}")


class TookTooLong(BaseException):
    """Beyond every `except Exception`."""


def read(data: bytes, path: Path, guard: Guard) -> dict[str, Any]:
    """Give one file to both doors; tell what came of it."""
    from stylegan_rooted.inspect import inspect_file
    from training import network_file, network_pickle

    path.write_bytes(data)
    result: dict[str, Any] = {"verdict": "loaded"}
    start = time.process_time()
    guard.caught.clear()
    signal.setitimer(signal.ITIMER_REAL, MAX_SEC)
    guard.armed = True
    try:
        try:
            network_file.load(path)
        except (network_pickle.PickleError, ValueError) as error:
            result = {"verdict": "refused", "message": str(error)}
            if not str(error).isprintable() or len(str(error)) > MAX_MESSAGE:
                result = {"verdict": "bad message", "message": str(error)}
        inspect_file(path).as_json()
    except TookTooLong:
        result = {"verdict": "too slow"}
    except BaseException as error:  # MemoryError and RecursionError are what is looked for
        result = {"verdict": f"raised {type(error).__name__}", "message": str(error)[:200]}
    finally:
        guard.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    if guard.caught:
        result = {"verdict": "acted", "message": guard.caught[0]}
    return {**result, "sec": round(time.process_time() - start, 3)}


def worker(pipe: Connection, folder: str) -> None:
    """Read the files that come through the pipe until None comes."""
    os.chdir(folder)  # a payload's traces would show here
    path = Path(folder) / "file.pkl"
    guard = Guard()
    signal.signal(signal.SIGALRM, _alarm)
    load_codecs()
    for data in genuine().values():  # whatever else is loaded on first use
        read(data, path, guard)
    page = resource.getpagesize()
    while (data := pipe.recv()) is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * page if Path("/proc/self/statm").exists() else 0
        if used:
            limit = used + len(data) + MAX_EXTRA_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        result = read(data, path, guard)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if sorted(entry.name for entry in Path(folder).iterdir()) != ["file.pkl"]:
            result = {"verdict": "acted", "message": "left a file behind", "sec": result["sec"]}
        pipe.send(result)


def load_codecs() -> None:
    """Text encodings that Python loads on first use, before a guard looks."""
    for name in ("raw_unicode_escape", "cp437"):
        codecs.lookup(name)


def _alarm(signum: int, frame: Any) -> None:
    raise TookTooLong


class Reader:
    """A worker process that is replaced when a file kills it."""

    def __init__(self) -> None:
        self._process: Any = None

    def __call__(self, data: bytes) -> dict[str, Any]:
        """What came of a file."""
        if self._process is None:
            self._folder = tempfile.TemporaryDirectory()
            self._pipe, other = multiprocessing.Pipe()
            self._process = multiprocessing.Process(target=worker, args=(other, self._folder.name), daemon=True)
            self._process.start()
            other.close()
        try:
            self._pipe.send(data)
            if self._pipe.poll(6 * MAX_SEC):
                return self._pipe.recv()
            verdict = "hung"
        except (EOFError, OSError):
            verdict = "killed its reader"
        self.close()
        return {"verdict": verdict, "sec": float(MAX_SEC)}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._folder.cleanup()
            self._process = None


def genuine() -> dict[str, bytes]:
    """Real network files, small ones."""
    return {path.name: gzip.decompress(path.read_bytes()) for path in sorted(GENUINE.glob("*.pkl.gz"))}


def hostile() -> dict[str, bytes]:
    """The corpus."""
    return {path.stem: gzip.decompress(path.read_bytes()) for path in sorted(HOSTILE.glob("*.gz"))}


class Mutator:
    """Numbered mutations of network files: number i of a seed is always the same."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        real, bad = list(genuine().values()), [data for data in hostile().values() if 0 < len(data) < 100_000]
        self.files = real + bad
        self.num_genuine = len(real)
        self._starts: dict[int, list[int]] = {}

    def __getitem__(self, number: int) -> bytes:
        rng = random.Random(f"{self.seed}/{number}")
        index = rng.randrange(self.num_genuine if rng.random() < 0.7 else len(self.files))
        data = bytearray(self.files[index])
        starts = self._opcode_starts(index)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            if starts and rng.random() < 0.6:
                self._opcode(data, starts, rng)
            else:
                self._bytes(data, rng)
        return bytes(data)

    def _opcode_starts(self, index: int) -> list[int]:
        if index not in self._starts:
            found = []
            try:
                for _, _, at in pickletools.genops(self.files[index]):
                    found.append(int(at or 0))
                    if len(found) > 20_000:
                        break
            except Exception:  # hostile files break pickletools, too; what it read until then serves
                pass
            self._starts[index] = found
        return self._starts[index]

    def _opcode(self, data: bytearray, starts: list[int], rng: random.Random) -> None:
        """Delete, repeat, move or replace whole opcodes, or insert others. (Starts are those of the original.)"""
        first = rng.randrange(len(starts))
        at = min(starts[first], len(data))
        stop = min(starts[min(first + rng.choice((1, 1, 2, 8)), len(starts) - 1)], len(data))
        choice = rng.randrange(5)
        if choice == 0:
            del data[at:stop]
        elif choice == 1:
            data[at:at] = data[at:stop] * rng.choice((1, 2, 50))
        elif choice == 2:
            data[at:stop] = rng.choice(FRAGMENTS)
        elif choice == 3:
            data[at:at] = rng.choice(FRAGMENTS)
        else:
            other = min(rng.choice(starts), len(data))
            data[at:at] = data[other : other + max(stop - at, 1)]

    def _bytes(self, data: bytearray, rng: random.Random) -> None:
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
            number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1))
            data[at : at + width] = struct.pack("<Q", number)[:width]
        elif rng.random() < 0.1:
            del data[at:]


def fuzz(num_mutations: int, seed: int, first: int = 0, *, keep: Path | None = None) -> dict[str, Any]:
    """Read the corpus and mutated files; count what came of them."""
    reader = Reader()
    index = json.loads((HOSTILE / "index.json").read_text())
    counts: dict[str, Counter] = {"corpus": Counter(), "mutations": Counter()}
    findings, slowest = [], {"name": "", "sec": 0.0}
    mutator = Mutator(seed)
    names = [("corpus", name) for name in index] + [("mutations", i) for i in range(first, first + num_mutations)]
    files = hostile()
    for group, name in names:
        data = files[name] if group == "corpus" else mutator[name]
        result = reader(data)
        verdict = result["verdict"]
        counts[group][verdict] += 1
        if result["sec"] > slowest["sec"]:
            slowest = {"name": f"{group} {name}", "sec": result["sec"]}
        loaded_hostile = group == "corpus" and verdict == "loaded" and not index[name].get("loads")
        if verdict not in ("loaded", "refused") or loaded_hostile:
            findings.append({"name": f"{group} {name}", **result})
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{group}-{name}.pkl").write_bytes(data)
        if sys.stderr.isatty() and group == "mutations" and not name % 100:
            sys.stderr.write(f"\r{name}")
    reader.close()
    return {"seed": seed, **{group: dict(count) for group, count in counts.items()},
            "slowest": slowest, "findings": findings}  # fmt: skip


def run_atheris(num_runs: int, seed: int, keep: Path | None) -> None:
    """Coverage-guided: the fuzzer sees the branches of our reader and mutates towards new ones. Ends the process."""
    import atheris

    read_by = ["torch_utils.pickle_reader", "training.network_pickle", "training.network_file"]
    with atheris.instrument_imports(include=read_by):
        from stylegan_rooted import inspect  # noqa: F401
        from training import network_file, network_pickle

    guard = Guard()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in {**genuine(), **hostile()}.items():
            if len(data) < 100_000:
                (Path(folder) / name).write_bytes(data)

        def one_input(data: bytes) -> None:
            guard.caught.clear()
            guard.armed = True
            try:
                network_file.parse(data)
            except network_pickle.PickleError as error:
                assert str(error).isprintable(), error
            finally:
                guard.armed = False
            assert not guard.caught, guard.caught

        load_codecs()
        for data in genuine().values():
            network_file.parse(data)
        flags = [f"-runs={num_runs}", f"-seed={seed + 1}", f"-timeout={MAX_SEC}", "-rss_limit_mb=4096"]
        flags.append(f"-artifact_prefix={keep or folder}/")
        atheris.Setup([sys.argv[0], *flags, "-max_len=100000", folder], one_input)
        atheris.Fuzz()


def main() -> int:
    """Parse the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=0, help="number of mutated files")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", type=int, default=0, help="runs of the coverage-guided fuzzer, instead")
    parser.add_argument("--only", type=int, help="write this mutation to --keep and end")
    parser.add_argument("--keep", type=Path, help="folder for files with a finding")
    options = parser.parse_args()
    if options.only is not None:
        folder = options.keep or Path(".")
        (folder / f"mutations-{options.only}.pkl").write_bytes(Mutator(options.seed)[options.only])
        return 0
    if options.atheris:
        run_atheris(options.atheris, options.seed, options.keep)
    report = fuzz(options.mutations, options.seed, options.first, keep=options.keep)
    print(json.dumps(report, indent=2))
    return 1 if report["findings"] else 0


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.exit(main())
