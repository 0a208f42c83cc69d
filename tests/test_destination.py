"""What `convert` and `surgery` may write over: nothing unasked, never what they read, never what is no regular file."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from foreign_files import make_pair

from stylegan_rooted.cli import main
from training import network_file, network_pickle

posix = pytest.mark.skipif(sys.platform == "win32", reason="named pipes and links of POSIX")
ENDINGS = {"pickle": "x.pkl", "safetensors": "x.safetensors", "rosinality": "x.pt", "onnx": "x.onnx", "pt2": "x.pt2"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    network_pickle.save(tmp_path / "a.pkl", **make_pair(8))
    return tmp_path / "a.pkl"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> Iterator:
    """Run a command that has to fail with one line, leaving every file in the folder as it was."""

    def run(words: str, *argv: object) -> None:
        before, names = contents(tmp_path), sorted(tmp_path.rglob("*"))
        capsys.readouterr()  # of commands before
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert stop.value.code == 1 and err.startswith("Error: ") and err.count("\n") == 1 and words in err, err
        assert contents(tmp_path) == before and sorted(tmp_path.rglob("*")) == names

    yield run


def test_surgery_keeps_its_source_and_what_exists(source: Path, tmp_path: Path, refused) -> None:
    for overwrite in ((), ("--overwrite",)):
        refused("is read as well", "surgery", source, source, "--channels", 1, *overwrite)
    other, grid = tmp_path / "mine.pkl", tmp_path / "grid.png"
    other.write_text("notes of mine")
    refused("--overwrite replaces it", "surgery", source, other, "--channels", 1)
    grid.write_text("a picture of mine")
    refused("--grid", "surgery", source, tmp_path / "b.pkl", "--channels", 1, "--grid", grid)
    main(["surgery", str(source), str(other), "--channels", "1", "--grid", str(grid), "--overwrite"])
    assert network_file.load(other).G_ema.img_channels == 1 and grid.read_bytes().startswith(b"\x89PNG")


def test_surgery_keeps_the_other_files_that_it_reads(source: Path, tmp_path: Path, refused) -> None:
    second = tmp_path / "second.pkl"
    second.write_bytes(source.read_bytes())
    refused("is read as well", "surgery", source, second, "--d-from", second, "--overwrite")
    os.link(second, tmp_path / "same.pkl")
    refused("is read as well", "surgery", source, tmp_path / "same.pkl", "--d-from", second, "--overwrite")
    adapter = tmp_path / "adapter.pkl"
    adapter.write_bytes(b"x")
    refused("is read as well", "surgery", source, adapter, "--merge", adapter, "--overwrite")


def test_surgery_of_a_hub_folder_does_not_write_over_its_weights(source: Path, tmp_path: Path, refused) -> None:
    main(["convert", str(source), f"{tmp_path}/hub/"])
    link = tmp_path / "weights.pkl"
    os.link(tmp_path / "hub" / "model.safetensors", link)
    refused("is read as well", "surgery", f"{tmp_path}/hub", link, "--channels", 1, "--overwrite")


def test_convert_keeps_the_configuration_beside(source: Path, tmp_path: Path, refused) -> None:
    beside = tmp_path / "b.config.json"
    beside.write_text("{}")
    refused("b.config.json exists; --overwrite", "convert", source, tmp_path / "b.safetensors")
    main(["convert", str(source), str(tmp_path / "b.safetensors"), "--overwrite"])
    assert "stylegan2" in beside.read_text()


def test_convert_of_a_hub_folder_into_itself(source: Path, tmp_path: Path, refused) -> None:
    hub = tmp_path / "hub"
    main(["convert", str(source), f"{hub}/"])
    refused("--overwrite replaces it", "convert", source, f"{hub}/")
    for one, two in ((hub / "model.safetensors", f"{hub}/"), (hub, hub / "model.safetensors"), (hub, f"{hub}/")):
        refused("is read as well", "convert", one, two, "--overwrite")
    refused("is read as well", "convert", hub, hub / "config.json", "--to", "pickle", "--overwrite")
    main(["convert", str(source), f"{hub}/", "--overwrite"])


@posix
@pytest.mark.parametrize("kind", ENDINGS)
def test_convert_leaves_pipes_alone(kind: str, source: Path, tmp_path: Path, refused) -> None:
    """So that a device node, which only root can make for a test, stays one, too."""
    os.mkfifo(tmp_path / ENDINGS[kind])
    for overwrite in ((), ("--overwrite",)):
        refused("no regular file", "convert", source, tmp_path / ENDINGS[kind], *overwrite)
    os.symlink(tmp_path / ENDINGS[kind], tmp_path / f"link-{ENDINGS[kind]}")
    refused("no regular file", "convert", source, tmp_path / f"link-{ENDINGS[kind]}", "--overwrite")


@posix
def test_pipes_and_broken_links_elsewhere(source: Path, tmp_path: Path, refused) -> None:
    pipe, broken = tmp_path / "pipe.png", tmp_path / "broken.pkl"
    os.mkfifo(pipe)
    os.symlink(tmp_path / "nowhere", broken)
    refused("no regular file", "surgery", source, broken, "--channels", 1, "--overwrite")
    refused("no regular file", "surgery", source, tmp_path / "b.pkl", "--channels", 1, "--grid", pipe, "--overwrite")
    os.mkfifo(tmp_path / "b.config.json")
    refused("no regular file", "convert", source, tmp_path / "b.safetensors", "--overwrite")
    main(["convert", str(source), f"{tmp_path}/hub/"])
    (tmp_path / "hub" / "README.md").unlink()
    os.mkfifo(tmp_path / "hub" / "README.md")
    refused("no regular file", "convert", source, f"{tmp_path}/hub/", "--overwrite")
