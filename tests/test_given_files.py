"""What people hand over in place of a network or a data set: at every door one line that names it, at once."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import odd_files
import pytest
from foreign_files import make_pair

from stylegan_rooted.cli import main
from training import network_pickle

TIMEOUT_SEC = 30
Run = Callable[..., str]
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this system has no alarms to bound the time")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Iterator[Run]:
    """Give a command line; get what it says when it fails as a user's mistake, with a bound on the time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    def run(*arguments: object) -> str:
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT_SEC)
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        signal.setitimer(signal.ITIMER_REAL, 0)
        out, err = capsys.readouterr()
        assert caught.value.code == 1 and out == "" and err.startswith("Error: ") and err.count("\n") == 1, err
        return err

    before = signal.signal(signal.SIGALRM, stop)
    yield run
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "network.pkl"
    network_pickle.save(path, **make_pair())
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    odd_files.write_noise(folder, 4, side=8)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "inspect PIPE",
        "convert PIPE OUT.safetensors",
        "generate --network PIPE --seeds 0 --outdir OUT",
        "grid --network PIPE --out OUT.png",
        "surgery PIPE OUT.pkl --channels 1",
        "surgery NETWORK OUT.pkl --new-d --d-from PIPE",
        "surgery NETWORK OUT.pkl --merge PIPE",
        "finetune --resume PIPE --data IMAGES --outdir OUT",
        "finetune --resume NETWORK --data PIPE.zip --outdir OUT",
        "finetune --config PIPE",
        "dataset check PIPE.zip",
        "dataset build PIPE.zip OUT.zip --resolution 8",
        "metrics --network PIPE --data IMAGES",
    ],
)
def test_pipes_are_refused_by_name(command: str, refused: Run, network: Path, images: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.zip")
    words = {"PIPE": tmp_path / "pipe", "NETWORK": network, "IMAGES": images, "OUT": tmp_path / "out"}
    arguments = []
    for word in command.split():
        name, dot, suffix = word.partition(".")
        arguments.append(f"{words[name]}{dot}{suffix}" if name in words else word)
    said = refused(*arguments)
    assert str(tmp_path / "pipe") in said and "regular file" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "pipe.zip"]
