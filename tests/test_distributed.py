"""Several processes: their exchanges, what they must agree on, and how they end when one of them fails."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import free_port, run_processes
from torch.distributed import TCPStore

from torch_utils import distributed
from torch_utils.distributed import DistEnv, Place, ProcessFailed, checksum

CPU = torch.device("cpu")


def joined(function, *, timeout_sec: float = 20.0):
    """`function(env)` inside a group of processes."""

    def member(rank: int):
        with distributed.start(distributed.place(), CPU, timeout_sec=timeout_sec) as env:
            return function(env)

    return member


def test_one_process_needs_nobody(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.place() == Place()
    env = DistEnv()
    x = torch.ones(2)
    assert env.sum(x) is x and env.max(3) == 3 and env.broadcast("a") == "a" and env.gather(1) == [1]
    assert list(env.share(5)) == [0, 1, 2, 3, 4] and env.is_main
    with pytest.raises(OSError, match="full"), env.together("saving"):
        raise OSError("full")


@pytest.mark.parametrize(
    "texts", [{"RANK": "2", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0"}]
)
def test_an_environment_that_names_no_place_is_refused(monkeypatch, texts) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, text in texts.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match="torchrun"):
        distributed.place()


@pytest.mark.parametrize("total, world", [(8, 3), (7, 7), (64, 5)])
def test_shares_cover_everything_once_and_evenly(total: int, world: int) -> None:
    envs = [DistEnv(rank=rank, world=world, pulse=object()) for rank in range(world)]
    shares = [list(env.share(total)) for env in envs]
    assert sum(shares, []) == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_exchanges_between_three_processes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 64)  # several buckets, one tensor larger than a bucket

    def work(env: DistEnv):
        module = torch.nn.Sequential(torch.nn.Linear(3, 10), torch.nn.Conv2d(2, 2, 3)).to(
            memory_format=torch.channels_last
        )
        for p in module.parameters():
            p.grad = torch.arange(p.numel()).reshape(p.shape).float() * (env.rank + 1)
        env.sum_gradients(module.parameters())
        exact = all(
            torch.equal(p.grad, torch.arange(p.numel()).reshape(p.shape) * 6.0) for p in module.parameters()
        )
        mixed = {"a": torch.full([40], env.rank), "b": torch.full([3], env.rank + 0.5)}
        env.broadcast_tensors(mixed)
        return {
            "exact": exact,
            "start": (mixed["a"].unique().tolist(), mixed["b"].unique().tolist()),
            "sum": env.sum(torch.tensor([1.0 * env.rank])).item(),
            "max": env.max(env.rank * 5),
            "word": env.broadcast(f"from {env.rank}"),
            "all": env.all_gather(env.rank),
            "results": env.gather(env.rank * 2),
        }

    common = {"exact": True, "start": ([0], [0.5]), "sum": 3.0, "max": 10, "word": "from 0", "all": [0, 1, 2]}
    assert run_processes(tmp_path, 3, joined(work)) == [
        {**common, "results": [0, 2, 4]},
        {**common, "results": None},
        {**common, "results": None},
    ]


def test_checksums_see_a_flipped_bit_and_a_swap() -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    same = checksum(x)
    assert checksum(x.clone()) == same
    flipped = x.clone()
    flipped.view(torch.int32)[2, 3] ^= 1
    swapped = x.clone()
    swapped[0, [0, 1]] = x[0, [1, 0]]
    assert len({same, checksum(flipped), checksum(swapped), checksum(x.double()), checksum(x.reshape(7, 5))}) == 5
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.zeros(0)) and checksum(torch.tensor(True)) and checksum(torch.ones(3).half())


def test_what_differs_is_named_once(tmp_path) -> None:
    def work(env: DistEnv):
        state = {"G.w_avg": torch.ones(3), "D.conv.weight": torch.ones(2)}
        env.require_equal(state, "at 0 kimg")
        if env.rank == 1:
            state["D.conv.weight"][1] += 1e-7
        env.require_equal(state, "at 4 kimg")

    first, second = run_processes(tmp_path, 2, joined(work))
    assert isinstance(first, ProcessFailed) and isinstance(second, ProcessFailed)
    assert str(first) == "rank 1 differs from rank 0 at 4 kimg in 1 of 2: D.conv.weight" and str(second) == ""


def test_a_failure_in_one_process_is_a_failure_in_all(tmp_path) -> None:
    def work(env: DistEnv):
        with env.together("reading"):
            if env.rank == 1:
                raise ValueError("bad data")

    errors = run_processes(tmp_path, 3, joined(work))
    assert [type(e) for e in errors] == [ProcessFailed] * 3
    assert [str(e) for e in errors] == ["", "rank 1: bad data", ""]

    def alike(env: DistEnv):
        with env.together("reading"):
            raise ValueError("no such folder")

    errors = run_processes(tmp_path / "alike", 2, joined(alike))
    assert type(errors[0]) is ValueError and str(errors[0]) == "no such folder" and str(errors[1]) == ""


def test_an_error_on_one_rank_ends_the_others_in_bounded_time(tmp_path) -> None:
    def work(env: DistEnv):
        if env.rank == 1:
            env.beat("reading data")
            raise OSError(28, "No space left on device", "/data/x")
        env.sum(torch.ones(1))

    start = time.monotonic()
    first, second = run_processes(tmp_path, 2, joined(work))
    assert str(second) == "rank 1: /data/x: No space left on device" and str(first) == ""
    assert time.monotonic() - start < 15


def test_a_killed_process_is_named(tmp_path) -> None:
    def work(env: DistEnv):
        if env.rank == 1:
            env.beat("reading data at 1.000 kimg")
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        env.sum(torch.ones(1))

    start = time.monotonic()
    first, second = run_processes(tmp_path, 2, joined(work, timeout_sec=2))
    assert second is None and isinstance(first, ProcessFailed)
    assert str(first).startswith("rank 1 (reading data at 1.000 kimg) ended or is out of reach")
    assert time.monotonic() - start < 15


def test_a_hanging_process_is_named_and_ended(tmp_path, capfd) -> None:
    def work(env: DistEnv):
        if env.rank == 1:
            env.beat("reading data")
            time.sleep(60)
        env.sum(torch.ones(1))

    start = time.monotonic()
    assert run_processes(tmp_path, 2, joined(work, timeout_sec=1)) == [None, None]
    assert time.monotonic() - start < 15
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert line == "Error: rank 1 (reading data) did not come back within 1 s; --rank-timeout sets that limit"


def test_a_slow_process_that_moves_is_waited_for(tmp_path) -> None:
    def work(env: DistEnv):
        for _ in range(10 if env.rank == 1 else 0):
            time.sleep(0.4)
            env.beat("measuring")
        return env.max(env.rank)

    assert run_processes(tmp_path, 2, joined(work, timeout_sec=2)) == [1, 1]


def test_what_an_earlier_attempt_left_in_the_store_is_passed_over() -> None:
    """torchrun restarts all processes with the same store; one of them may have died before it wrote anything."""
    port = free_port()
    server = TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    server.set("meeting", "old")
    server.set("old/all", json.dumps(["old", "gone"]))
    with ThreadPoolExecutor(2) as pool:
        clients = [TCPStore("127.0.0.1", port, 2, is_master=False, wait_for_workers=False) for _ in range(2)]
        late = pool.submit(distributed._meet, clients[1], Place(1, 2, 1), 20)
        time.sleep(0.2)  # rank 1 meets the old name first
        assert not late.done()
        first = pool.submit(distributed._meet, clients[0], Place(0, 2, 0), 20)
        first.result(20).set("x", "hello")
        assert late.result(20).get("x") == b"hello"


def test_processes_that_never_come_are_missed(tmp_path: Path) -> None:
    def alone(rank: int):
        if rank == 0:
            with distributed.start(Place(0, 2, 0), CPU, timeout_sec=1):
                pass

    (first, _) = run_processes(tmp_path, 2, alone)
    assert isinstance(first, ProcessFailed) and "2 processes did not find each other" in str(first)
