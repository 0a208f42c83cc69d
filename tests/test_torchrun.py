"""The command as torchrun starts it: two machines, processes that die or hang. Slow: torch is imported many times."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from training import run_dir

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ADDRESSES = ("10.87.43.1", "10.87.43.2")
pytestmark = pytest.mark.slow


def finetune(pictures: Path, outdir: Path, *options: str) -> list[str]:
    return [
        *["-m", "stylegan_rooted", "finetune", "--resume", "none", "--data", str(pictures), "--outdir", str(outdir)],
        *["--cbase", "64", "--cmax", "8", "--zdim", "8", "--wdim", "8", "--batch", "8", "--metrics", "none"],
        *["--grid", "2x2", "--device", "cpu", *options],
    ]


@pytest.fixture
def two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a pair of virtual interfaces: the names of namespaces and interfaces."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (package iproute2) to make network namespaces with")
    names = (f"sgr{os.getpid()}a", f"sgr{os.getpid()}b")
    with contextlib.ExitStack() as undo:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
            undo.callback(subprocess.run, ["ip", "netns", "delete", name], check=False)
        link = ["ip", "link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1]]
        made = subprocess.run([*link, "netns", names[1]], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"virtual interfaces cannot be made here: {made.stderr.strip()}")
        for name, address in zip(names, ADDRESSES):
            subprocess.run(["ip", "-n", name, "addr", "add", f"{address}/24", "dev", name], check=True)
            for interface in ("lo", name):
                subprocess.run(["ip", "-n", name, "link", "set", interface, "up"], check=True)
        yield names


def test_two_machines_meet_and_train(two_machines, pictures, tmp_path) -> None:
    processes = []
    for node, (name, address) in enumerate(zip(two_machines, ADDRESSES)):
        command = [
            *["ip", "netns", "exec", name, *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d"],
            *[f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=test", f"--rdzv-conf=is_host={1 - node}"],
            *[f"--local-addr={address}", *finetune(pictures, tmp_path / "out", "--kimg", "0.016")],
        ]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": name, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with (tmp_path / f"{node}.log").open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment))
    codes = [process.wait(timeout=180) for process in processes]
    first, second = [(tmp_path / f"{node}.log").read_text() for node in (0, 1)]
    assert codes == [0, 0], first + second
    assert "2 processes (gloo)" in first and "Done: " in first and "tick" not in second
    (path,) = (tmp_path / "out").iterdir()
    assert "auto2" in path.name and (path / "network-snapshot-000000.pkl").is_file()


def start_two(pictures: Path, outdir: Path, *options: str, kimg: str = "1000", restarts: int = 0) -> subprocess.Popen:
    """torchrun with two processes, once it has begun to train; usually with no end in sight."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    command += finetune(pictures, outdir, "--kimg", kimg, "--tick", "0.008", "--snap", "1", *options)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("tick 1"):
            return process
    raise AssertionError("it ended before it trained")


def worker(launcher: subprocess.Popen, rank: int) -> int:
    """Process id of one of torchrun's processes."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_ends_the_job_with_its_name(pictures, tmp_path, kind) -> None:
    process = start_two(pictures, tmp_path / "out", "--rank-timeout", "5")
    start = time.monotonic()
    os.kill(worker(process, 1), kind)
    output, _ = process.communicate(timeout=90)
    seconds = time.monotonic() - start
    assert process.returncode != 0
    if kind == signal.SIGKILL:  # torchrun sees it first, and names it in its own words
        assert "rank      : 1" in output or "Error: rank 1" in output, output
        assert seconds < 45
    else:
        assert "Error: rank 1 (" in output and "is out of reach" in output, output
        assert seconds < 60
    assert output.count("Error: rank") <= 1


def test_a_signal_to_one_process_stops_all_with_a_snapshot(pictures, tmp_path) -> None:
    process = start_two(pictures, tmp_path / "out")
    os.kill(worker(process, 1), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "exitcode  : 143" in output, output  # both processes end with 128 + SIGTERM
    assert "SIGTERM: stopping after this step with a snapshot" in output and "the same command goes on" in output
    (path,) = (tmp_path / "out").iterdir()
    assert list(path.glob("network-snapshot-*.pkl"))


def test_torchrun_restarts_a_run_that_lost_a_process_from_its_state(pictures, tmp_path) -> None:
    process = start_two(pictures, tmp_path / "out", kimg="1", restarts=1)
    os.kill(worker(process, 1), signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "Continuing at 0." in output and "Done: " in output, output
    (path,) = (tmp_path / "out").iterdir()
    kimg = [row["Progress/kimg"]["mean"] for row in run_dir.read_jsonl(path / "stats.jsonl")]
    assert kimg == sorted(set(kimg)) and kimg[-1] == 1.0
