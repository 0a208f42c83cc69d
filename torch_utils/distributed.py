"""The processes of one run: which one this is, sums over all of them, and a clear end when one of them fails.

torchrun, or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, starts the processes;
nothing here does. Knows tensors and modules, nothing of training. With one process every method is a no-op.

Why not DistributedDataParallel: a phase runs several backward passes, some of them over a graph that
`torch.autograd.grad` made, on a module whose gradients are switched off in all other phases; a reduction that starts
inside backward would have to be held back for all passes but the last. Here gradients are summed once per phase, when
all of them are there, at the price of not hiding the transfer behind the computation (docs/scaling.md has the figures).
"""

import contextlib
import hashlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

BUCKET_BYTES = 32 << 20
MAX_NAMED = 3  # differing names that a message lists
PULSE_SEC = 1.0
USER_ERRORS = (ValueError, OSError, MemoryError)


class ProcessFailed(RuntimeError):
    """A process of the run failed. The message is one line; it is empty where another process says it."""


@dataclass(frozen=True)
class Place:
    """Which process this is: `rank` of `world`, and `local_rank` among those of its machine; all count from 0."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def place() -> Place:
    """This process's place as its launcher has set it in the environment; the only one without a launcher.

    Raises:
        ValueError: RANK, WORLD_SIZE and LOCAL_RANK do not fit together.
    """
    texts = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if texts["RANK"] is None and texts["WORLD_SIZE"] in (None, "1"):
        return Place()
    try:
        rank, world = int(texts["RANK"] or ""), int(texts["WORLD_SIZE"] or "")
        local_rank = rank if texts["LOCAL_RANK"] is None else int(texts["LOCAL_RANK"])
    except ValueError:
        rank = world = local_rank = -1
    if not 0 <= local_rank <= rank < world:
        shown = ", ".join(f"{name}={'unset' if text is None else text}" for name, text in texts.items())
        raise ValueError(f"the environment says {shown}: no process's place; start with torchrun, or unset them")
    return Place(rank, world, local_rank)


@contextlib.contextmanager
def start(where: Place, device: torch.device, *, timeout_sec: float) -> Iterator["DistEnv"]:
    """Join the other processes for the block's duration: gloo between CPUs, NCCL between GPUs.

    Args:
        where: This process's place.
        device: Where it computes.
        timeout_sec: How long processes wait for each other before the run ends.

    Raises:
        ProcessFailed: The others did not come in time, or one of them failed later (see `DistEnv.guard`).
    """
    if where.world == 1:
        yield DistEnv(device)
        return
    patience = timedelta(seconds=timeout_sec)
    try:
        common, _, _ = next(rendezvous("env://", where.rank, where.world, timeout=patience))
        store = _meet(common, where, timeout_sec)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The pulse ends a wait first and says for whom; the group's own limit is for the case that it cannot.
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=store,
            rank=where.rank,
            world_size=where.world,
            timeout=2 * patience + timedelta(seconds=60),
        )
    except RuntimeError as e:
        raise ProcessFailed(
            f"rank {where.rank}: the {where.world} processes did not find each other at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within {timeout_sec:g} s ({_brief(e)})"
        ) from e
    pulse = Pulse(dist.PrefixStore("stylegan-rooted", store), where, timeout_sec)
    env = DistEnv(device, where.rank, where.world, pulse)
    try:
        with env.guard():
            env.all_gather(None)  # every pulse beats before anybody looks for one
            yield env
            env.all_gather(None)
    finally:
        pulse.stop()
    dist.destroy_process_group()  # not after a failure: it would wait for those who failed


class DistEnv:
    """One process among `world`, numbered `rank` from 0; rank 0 writes files and speaks.

    A method that takes part in an exchange must be called by all processes, in the same order.

    Args:
        device: Where this process computes.
        rank, world: Its number, and how many there are.
        pulse: Watches the others; None with one process.
    """

    def __init__(
        self, device: torch.device | str = "cpu", rank: int = 0, world: int = 1, pulse: "Pulse | None" = None
    ) -> None:
        assert (pulse is None) == (world == 1)
        self.device = torch.device(device)
        self.rank = rank
        self.world = world
        self._pulse = pulse

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's part of `total` things in a row: contiguous, and at most one more than any other's."""
        return range(total * self.rank // self.world, total * (self.rank + 1) // self.world)

    def beat(self, doing: str) -> None:
        """Note what this process does, for the message that names it should it not come back."""
        if self._pulse is not None:
            self._pulse.beat(doing)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes, the same bits everywhere."""
        if self.world == 1:
            return tensor
        total = tensor.clone()
        with self._exchange("adding up figures"):
            dist.all_reduce(total)
        return total

    def max(self, value: int) -> int:
        """Largest of the processes' whole numbers."""
        if self.world == 1:
            return value
        largest = torch.tensor([value], dtype=torch.int64)
        with self._exchange("comparing notes"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of these parameters over all processes, in place."""
        if self.world == 1:
            return
        with self._exchange("adding up gradients"):
            _in_buckets([p.grad for p in parameters if p.grad is not None], dist.all_reduce)

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite every process's tensors with those of rank 0."""
        if self.world == 1:
            return
        with self._exchange("taking over the start"):
            _in_buckets(list(tensors.values()), lambda flat, async_op: dist.broadcast(flat, 0, async_op=async_op))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, a small object, in every process."""
        if self.world == 1:
            return value
        box = [value]
        with self._exchange("hearing from rank 0"):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """The processes' small objects, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self._exchange("comparing notes"):
            dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list[Any] | None:
        """The processes' objects, in the order of their ranks, at rank 0; None elsewhere."""
        if self.world == 1:
            return [value]
        values: list[Any] | None = [None] * self.world if self.is_main else None
        with self._exchange("handing in results"):
            dist.gather_object(value, values, dst=0)
        return values

    def require_equal(self, facts: Mapping[str, Any], when: str) -> None:
        """Refuse to go on where processes differ in what must be equal.

        Args:
            facts: Name to tensor (compared by a checksum of its bits) or to a plain value.
            when: For the message, e.g. "at 12.0 kimg".

        Raises:
            ProcessFailed: Names what differs, and where.
        """
        if self.world == 1:
            return
        own = {name: checksum(v) if isinstance(v, Tensor) else repr(v) for name, v in facts.items()}
        digests = self.all_gather(hashlib.sha256(json.dumps(own).encode()).hexdigest())
        if len(set(digests)) == 1:
            return
        first, *others = self.all_gather(own)
        for rank, other in enumerate(others, 1):
            differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
            if differing:
                listed = ", ".join(differing[:MAX_NAMED]) + (", …" if len(differing) > MAX_NAMED else "")
                message = f"rank {rank} differs from rank 0 {when} in {len(differing)} of {len(first)}: {listed}"
                raise self.everywhere(ProcessFailed(message))

    def everywhere(self, error: Exception) -> Exception:
        """For an error that every process meets at the same moment: itself at rank 0, silence elsewhere."""
        return error if self.is_main else ProcessFailed("")

    @contextlib.contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Inside goes what all processes do at this moment: where it fails in one, it fails in all.

        Raises:
            ProcessFailed: Another process failed; its message is said once, with its rank.
        """
        if self.world == 1:
            yield
            return
        self.beat(doing)
        own: Exception | None = None
        try:
            yield
        except ProcessFailed:
            raise
        except Exception as e:
            own = e
        problems = self.all_gather(None if own is None else one_line(own))
        failed = [rank for rank, problem in enumerate(problems) if problem is not None]
        if not failed:
            return
        if own is None or failed[0] != self.rank:
            raise ProcessFailed("") from own
        raise own if len(failed) == self.world and len(set(problems)) == 1 else with_rank(self.rank, own)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Around everything: the first process to fail says so, with its rank; the others end in silence."""
        try:
            yield
        except ProcessFailed as e:
            if str(e) and self._pulse is not None and not self._pulse.first_word():
                raise ProcessFailed("") from e
            raise
        except Exception as e:
            if self._pulse is None:
                raise
            if not self._pulse.first_word():
                raise ProcessFailed("") from e
            if self.is_main:
                raise
            raise with_rank(self.rank, e) from e.__cause__

    @contextlib.contextmanager
    def _exchange(self, doing: str) -> Iterator[None]:
        assert self._pulse is not None
        self._pulse.enter(doing)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            raise ProcessFailed(f"{self._pulse.diagnose()} ({_brief(e)})") from e
        finally:
            self._pulse.leave()


class Pulse:
    """Every process's sign of life in the processes' common store, and the end of a run that waits for too long.

    A thread writes what this process does, once a second. Where this process has not moved for `timeout_sec`, because
    another one does not come to an exchange or because it hangs itself, and no other has moved in the second half of
    that time, the thread names the culprit and ends the process: the main thread may be inside a call that nothing
    interrupts.
    """

    def __init__(self, store: Any, where: Place, timeout_sec: float) -> None:
        self._store = store
        self._where = where
        self._timeout_sec = timeout_sec
        self._interval_sec = min(PULSE_SEC, timeout_sec / 4)
        self._num_exchanges = 0
        self._doing = "starting"
        self._before = "starting"
        self._leaving = False
        self._store_seen = False
        self._moved = time.monotonic()
        self._num_moves = 0
        self._halfway: dict[int, int] | None = None
        self._serial = 0
        self._stop = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._watch, name="pulse", daemon=True)
        self._thread.start()

    def beat(self, doing: str) -> None:
        """This process moves: it now does `doing`."""
        self._doing = doing
        self._num_moves += 1
        self._moved = time.monotonic()

    def enter(self, doing: str) -> None:
        """This process begins an exchange with the others."""
        self._before = self._doing
        self._num_exchanges += 1
        self.beat(f"waiting for the others: {doing}")

    def leave(self) -> None:
        """The exchange is over."""
        self.beat(self._before)

    def stop(self) -> None:
        """No more signs of life, no more watching. A thread inside the store would abort the interpreter's end."""
        self._stop.set()
        self._thread.join(timeout=5 * self._interval_sec)

    def first_word(self) -> bool:
        """Whether no other process has said yet why the run ends; then this one is to say it."""
        try:
            return self._store.add("said", 1) == 1
        except RuntimeError:  # the process that keeps the store is gone; it had the word if it lived a moment ago
            return not self._store_seen

    def diagnose(self) -> str:
        """Who the others wait for, by comparing two looks at everybody's signs of life. Takes a few seconds."""
        earlier = self._read()
        time.sleep(2.5 * self._interval_sec)
        later = self._read()
        self._store_seen = later is not None
        self._leaving = True
        self._write()
        if self._where.rank == 0:  # the store may live in this process: let the others come to their end with it
            time.sleep(2.5 * self._interval_sec)
        own = f"rank {self._where.rank} was {self._before} and lost touch with the others"
        if earlier is None or later is None:
            return f"{own}; the process that keeps their common store is gone, probably rank 0 or the launcher"
        gone = [r for r, beat in later.items() if beat["serial"] == earlier[r]["serial"] and not beat["leaving"]]
        gone = [r for r in gone if r != self._where.rank]
        if gone:
            return _culprits(gone, later, "ended or is out of reach")
        fewest = min(beat["exchanges"] for beat in later.values())
        behind = [r for r, beat in later.items() if beat["exchanges"] == fewest]
        if len(behind) < len(later):
            return _culprits(behind, later, f"did not come back within {self._timeout_sec:g} s")
        return own

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_sec):
            self._write()
            idle_sec = time.monotonic() - self._moved
            if idle_sec <= self._timeout_sec / 2:
                self._halfway = None
            elif self._halfway is None:
                self._halfway = self._moves_of_others()
            elif idle_sec > self._timeout_sec:
                if self._moves_of_others() == self._halfway:
                    self._end()
                self._moved, self._halfway = time.monotonic() - self._timeout_sec / 2, None

    def _moves_of_others(self) -> dict[int, int]:
        beats = self._read() or {}
        return {rank: beat["moves"] for rank, beat in beats.items() if rank != self._where.rank}

    def _end(self) -> None:
        """Name the culprit and end this process, unless somebody moves after all."""
        own, others, alive = self._num_moves, self._moves_of_others(), threading.Event()
        threading.Thread(target=self._keep_writing, args=(alive,), name="pulse-last", daemon=True).start()
        message = self.diagnose()
        if self._num_moves != own or (self._store_seen and self._moves_of_others() != others):
            self._leaving = False
            alive.set()
            return
        if self.first_word():
            sys.stderr.write(f"Error: {message}; --rank-timeout sets that limit\n")
            sys.stderr.flush()
        os._exit(1)

    def _keep_writing(self, until: threading.Event) -> None:
        while not until.wait(self._interval_sec):
            self._write()

    def _write(self) -> None:
        self._serial += 1
        beat = {
            "serial": self._serial,
            "moves": self._num_moves,
            "exchanges": self._num_exchanges,
            "doing": self._doing,
            "leaving": self._leaving,
        }
        with contextlib.suppress(RuntimeError):  # the store is gone; `diagnose` says so
            self._store.set(f"pulse{self._where.rank}", json.dumps(beat))

    def _read(self) -> dict[int, dict[str, Any]] | None:
        try:
            return {rank: json.loads(self._store.get(f"pulse{rank}")) for rank in range(self._where.world)}
        except RuntimeError:
            return None


def with_rank(rank: int, error: Exception) -> Exception:
    """An error that a user can mend, with the number of the process that met it; any other error as it is."""
    return ProcessFailed(f"rank {rank}: {one_line(error)}") if isinstance(error, USER_ERRORS) else error


def one_line(error: BaseException) -> str:
    """An error's text on one line, with the file's name where the system gave one."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    return " ".join((text or type(error).__name__).split())


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """Two sums over a tensor's bits, plain and weighted by position, with type and shape; computed on its device."""
    flat = tensor.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    bits = flat.to(torch.int64)
    weights = torch.arange(1, 2 * bits.numel() + 1, 2, device=bits.device)  # odd: no bit of a product is lost
    return f"{tensor.dtype} {list(tensor.shape)} {int(bits.sum())} {int((bits * weights).sum())}"


def _meet(store: Any, where: Place, timeout_sec: float) -> Any:
    """A part of the processes' store for those that are here now.

    After a restart torchrun's store still holds what the processes before had written, their addresses too. So rank 0
    names a new part, every other process answers there with a word of its own, and begins once rank 0 has repeated it.
    """
    word = secrets.token_hex(8)
    if where.rank == 0:
        store.set("meeting", word)
        words = [word, *(store.get(f"{word}/{rank}").decode() for rank in range(1, where.world))]
        store.set(f"{word}/all", json.dumps(words))
        return dist.PrefixStore(word, store)
    end = time.monotonic() + timeout_sec
    answered = None
    while time.monotonic() < end:
        name = store.get("meeting").decode()
        if name != answered:
            store.set(f"{name}/{where.rank}", word)
            answered = name
        if store.check([f"{name}/all"]) and json.loads(store.get(f"{name}/all"))[where.rank] == word:
            return dist.PrefixStore(name, store)
        time.sleep(0.05)
    raise RuntimeError("rank 0 did not answer")


@torch.no_grad()
def _in_buckets(tensors: list[Tensor], exchange: Callable[..., Any]) -> None:
    """Run an exchange over tensors, several at a time as one flat tensor, and write its results back."""
    works = []
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        works.append((exchange(flat, async_op=True), flat, bucket))
    for work, flat, bucket in works:
        work.wait()
        for tensor, piece in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            tensor.copy_(piece.view(tensor.shape))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in sorted(tensors, key=lambda t: str(t.dtype)):  # stable: one type after the other
        full = size + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _culprits(ranks: list[int], beats: Mapping[int, dict[str, Any]], what: str) -> str:
    """`rank 1 (reading data) …`."""
    listed = ", ".join(f"rank {rank} ({beats[rank]['doing']})" for rank in ranks[:MAX_NAMED])
    return f"{listed}{', …' if len(ranks) > MAX_NAMED else ''} {what}"


def _brief(error: BaseException) -> str:
    """First line of an error of torch.distributed, without its long tail."""
    return one_line(error)[:160]
