"""What people hand over in place of a network or a data set: at every door one line that names it, at once."""

import gzip
import lzma
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import odd_files
import pytest
import torch
from foreign_files import make_pair

from stylegan_rooted.cli import main
from training import adapters, network_file, network_pickle, weights_file

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
        "surgery NETWORK OUT.pkl --d-from PIPE",
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


@pytest.fixture
def adapter(network: Path, tmp_path: Path) -> Callable[..., Path]:
    """An adapter of `network` with its first factor changed."""

    def write(change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
        G = network_pickle.load(network).G_ema
        factors = {}
        for name, layer in adapters.modulated_convolutions(G).items():
            flat = layer.weight.flatten(1)
            factors[name] = (torch.ones(len(flat), 1), torch.ones(1, flat.shape[1]))
        name = next(iter(factors))
        factors[name] = (change(factors[name][0]), factors[name][1])
        weights_file.save_adapter(tmp_path / "adapter.safetensors", factors, base=adapters.fingerprint(G))
        return tmp_path / "adapter.safetensors"

    return write


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda up: up.fill_(torch.nan), "up' holds numbers that are not finite"),
        (lambda up: up.fill_(-torch.inf), "up' holds numbers that are not finite"),
        (lambda up: up[:, :0], "not matrices of numbers"),
        (lambda up: up.t(), "does not fit this generator"),
    ],
)
def test_adapters_that_cannot_be_merged(
    change: Callable, words: str, adapter: Callable, network: Path, refused: Run, tmp_path: Path
) -> None:
    file = adapter(change)
    said = refused("surgery", network, tmp_path / "out.pkl", "--merge", file)
    assert words in said and str(file) in said
    assert not (tmp_path / "out.pkl").exists()


def test_networks_whose_numbers_are_not_finite(adapter: Callable, network: Path, refused: Run, tmp_path: Path) -> None:
    """What cannot be compared is not written; a difference of NaN once counted as none."""
    dest = tmp_path / "out.pkl"
    file = adapter(lambda up: up.fill_(3e38))  # finite factors, whose product is not
    said = refused("surgery", network, dest, "--merge", file)
    assert "not finite" in said and str(network) in said
    nets = make_pair()
    with torch.no_grad():
        nets["G_ema"].mapping.fc0.bias[0] = torch.nan
    source = tmp_path / "bad.pkl"
    network_pickle.save(source, **nets)
    assert "G_ema.mapping.fc0.bias" in (said := refused("surgery", source, dest, "--new-d")) and str(source) in said
    said = refused("convert", source, tmp_path / "out.pt2", "--part", "mapping")
    assert "not finite" in said and str(source) in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "bad.pkl"]


def _onnx() -> bytes:
    """The first fields of an ONNX file: version, producer."""
    return b"\x08\x0a\x12\x0fstylegan-rooted\x1a\x062.13.0:\x05"


STRANGERS = {
    "empty file": b"",
    "web page": b"\n<!DOCTYPE html><html><head><title>404</title></head></html>",
    "Git LFS pointer.*`git lfs pull`": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
    "gzip archive": gzip.compress(b"content"),
    "is an archive": lzma.compress(b"content"),
    "JSON text": b'{"message": "Not Found"}',
    "ONNX graph": _onnx(),
    "PNG image.*--data": b"\x89PNG\r\n\x1a\n" + bytes(30),
    "JPEG image.*--data": b"\xff\xd8\xff\xe0" + bytes(30),
    "begins with zeros": bytes(1000),
    "cut off inside its header": (500).to_bytes(8, "little") + b'{"a":{"dtype":"F32"',
    "truncated": b"PK\x03\x04" + bytes(200),
}


@pytest.mark.parametrize("words", STRANGERS)
def test_what_is_no_network_file_is_named(words: str, refused: Run, tmp_path: Path, capsys: Any) -> None:
    """What it is and what to do, not which opcode its first byte would be."""
    path = tmp_path / "network.pkl"
    path.write_bytes(STRANGERS[words])
    said = refused("convert", path, tmp_path / "out.safetensors")
    assert re.search(words, said) and "opcode" not in said and str(path) in said
    main(["inspect", str(path)])
    shown = capsys.readouterr().out
    assert re.search(words, shown) and "container pickle" not in shown
    assert "safe: no" in shown and "loads: no" in shown


def test_header_lengths_that_look_like_other_formats(tmp_path: Path) -> None:
    """A safetensors file begins with a number: this one's first two bytes are those of gzip."""
    path = tmp_path / "weights.safetensors"
    weights_file.save(path, G_ema=make_pair()["G_ema"])
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    wanted = 0x8B1F
    assert length < wanted
    header = data[8 : 8 + length] + b" " * (wanted - length)
    path.write_bytes(wanted.to_bytes(8, "little") + header + data[8 + length :])
    assert path.read_bytes()[:2] == b"\x1f\x8b" and network_file.load(path).G_ema.img_resolution == 8


def test_adapters_are_named(adapter: Callable, network: Path, refused: Run, tmp_path: Path, capsys: Any) -> None:
    file = adapter(lambda up: up)
    said = refused("convert", file, tmp_path / "out.pkl")
    assert "adapter" in said and "--merge" in said and str(file) in said
    main(["inspect", str(file)])
    shown = capsys.readouterr().out
    assert "kind      a low-rank adapter" in shown and "safe: yes" in shown and "--merge" in shown
    (tmp_path / "page.safetensors").write_bytes(b"<html>")
    assert "web page" in refused("surgery", network, tmp_path / "out.pkl", "--merge", tmp_path / "page.safetensors")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_has_not_are_refused_with_the_files_name(number: str, refused: Run, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    rows = [{"metric": "fid", "results": {"fid": 7.25}}]
    weights_file.save(path, G_ema=make_pair()["G_ema"], about={"metrics": rows})
    data = path.read_bytes().replace(b"7.25", number.encode())
    length = int.from_bytes(path.read_bytes()[:8], "little") + len(number) - 4
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    said = refused("convert", path, tmp_path / "out.safetensors")
    assert "not finite" in said and str(path) in said
