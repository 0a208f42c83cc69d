"""Read hostile and mutated network files under guard: none may execute anything, crash, hang or take much memory.

Each file is given to the reader that every command uses and to `inspect`, in a process of its own that is watched:
  - an audit hook reports exec, compile, import, unpickling by name, opening for writing, subprocesses, sockets;
  - the address space may grow by at most 2 GiB beyond the file;
  - more than 10 s, or the death of the process, counts against the file, which is kept.
A refusal must be one printable line.

Usage:
  python scripts/fuzz_pickles.py                        the corpus of tests/data/hostile
  python scripts/fuzz_pickles.py --mutations 20000      and that many mutated files of every format that is read
  python scripts/fuzz_pickles.py --atheris 20000        runs of the coverage-guided fuzzer (pip install atheris)
Prints one JSON object; exit code 1 if anything was found. Mutation number i of a seed is always the same file:
--only I writes it to --keep for a closer look.
"""

import argparse
import codecs
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz_mutations import HOSTILE, ROOT, Mutator, genuine, hostile

sys.path.insert(0, str(ROOT))

MAX_SEC = 10
MAX_EXTRA_BYTES = 2 << 30
MAX_MESSAGE = 600
FORBIDDEN = (
    "exec", "compile", "import", "pickle.find_class", "code.__new__", "function.__new__", "subprocess.", "os.", "pty.",
    "socket.", "ctypes.", "shutil.", "marshal.", "urllib.", "http.", "webbrowser.", "ftplib.", "smtplib.", "mmap.",
)  # fmt: skip
READERS = ("network_file", "recognise", "network_pickle", "legacy_tf", "rosinality", "state_dict", "weights_file")
HARMLESS = ("os.listdir", "os.scandir", "os.fwalk", "os.walk")


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


def fuzz(num_mutations: int, seed: int, first: int = 0, *, keep: Path | None = None) -> dict[str, Any]:
    """Read the corpus and mutated files; count what came of them."""
    reader = Reader()
    index = json.loads((HOSTILE / "index.json").read_text())
    counts: dict[str, Counter] = {"corpus": Counter(), "mutations": Counter()}
    of_format: dict[str, Counter] = {}
    findings, slowest = [], {"name": "", "sec": 0.0}
    mutator = Mutator(seed)
    names = [("corpus", name) for name in index] + [("mutations", i) for i in range(first, first + num_mutations)]
    files = hostile()
    for group, name in names:
        origin, data = ("corpus", files[name]) if group == "corpus" else mutator[name]
        result = reader(data)
        verdict = result["verdict"]
        counts[group][verdict] += 1
        if group == "mutations":
            of_format.setdefault(origin, Counter())[verdict] += 1
        if result["sec"] > slowest["sec"]:
            slowest = {"name": f"{group} {name}", "sec": result["sec"]}
        loaded_hostile = group == "corpus" and verdict == "loaded" and not index[name].get("loads")
        if verdict not in ("loaded", "refused") or loaded_hostile:
            findings.append({"name": f"{group} {name}", "of": origin, **result})
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{group}-{name}.pkl").write_bytes(data)
        if sys.stderr.isatty() and group == "mutations" and not name % 100:
            sys.stderr.write(f"\r{name}")
    reader.close()
    return {"seed": seed, **{group: dict(count) for group, count in counts.items()},
            "mutations_of": {origin: dict(count) for origin, count in sorted(of_format.items())},
            "slowest": slowest, "findings": findings}  # fmt: skip


def run_atheris(num_runs: int, seed: int, keep: Path | None) -> None:
    """Coverage-guided: the fuzzer sees the branches of our reader and mutates towards new ones. Ends the process."""
    import atheris

    read_by = ["torch_utils.pickle_reader", *(f"training.{name}" for name in READERS)]
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
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"mutations-{options.only}.pkl").write_bytes(Mutator(options.seed)[options.only][1])
        return 0
    if options.atheris:
        run_atheris(options.atheris, options.seed, options.keep)
    report = fuzz(options.mutations, options.seed, options.first, keep=options.keep)
    print(json.dumps(report, indent=2))
    return 1 if report["findings"] else 0


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.exit(main())
