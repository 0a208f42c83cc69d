"""`stylegan-rooted generate` and `grid`: the files they leave, what they say, how they fail."""

import gzip
from pathlib import Path

import pytest

from stylegan_rooted.cli import main
from torch_utils import images


@pytest.fixture(scope="module")
def network(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A conditional snapshot with three classes of 8x8 images."""
    path = tmp_path_factory.mktemp("cli_generate") / "snapshot_b.pkl"
    path.write_bytes(gzip.decompress((data_dir / "pickles" / "snapshot_b.pkl.gz").read_bytes()))
    return str(path)


def fail(capsys: pytest.CaptureFixture, code: int, *argv: str) -> str:
    """Run a command that must end with `code` and one line on stderr; returns that line."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    out, err = capsys.readouterr()
    assert stop.value.code == code and out == "" and err.startswith("Error: ") and err.count("\n") == 1, err
    return err


def test_generate(network: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new" / "folder"
    main(
        ["generate", "--network", network, "--seeds", "0-2,11", "--class", "1", "--trunc", "0.7", "--outdir", str(out)]
    )
    assert sorted(p.name for p in out.iterdir()) == ["seed0000.png", "seed0001.png", "seed0002.png", "seed0011.png"]
    picture = images.open_image((out / "seed0011.png").read_bytes())
    assert picture.size == (8, 8) and picture.mode == "RGB"
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"Wrote 4 images to {out}\n"


def test_grid(network: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["grid", "--network", network, "--class", "0"]
    main([*common, "--cols", "3", "--rows", "2", "--out", str(tmp_path / "a.png")])
    main([*common, "--seeds", "0-5", "--cols", "3", "--out", str(tmp_path / "b.png")])
    main([*common, "--seeds", "0-5", "--cols", "3", "--labels", "--out", str(tmp_path / "c.png")])
    assert images.open_image((tmp_path / "a.png").read_bytes()).size == (24, 16)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert images.open_image((tmp_path / "c.png").read_bytes()).size[1] > 16
    assert "3 columns, 2 rows" in capsys.readouterr().err


def test_a_grid_cell_is_the_generated_image(network: str, tmp_path: Path) -> None:
    main(["generate", "--network", network, "--seeds", "5", "--class", "2", "--outdir", str(tmp_path)])
    main(["grid", "--network", network, "--seeds", "5", "--class", "2", "--out", str(tmp_path / "grid.png")])
    assert (tmp_path / "seed0005.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_what_cannot_be_done(network: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    say = ["generate", "--seeds", "0", "--outdir"]
    assert "choose a class" in fail(capsys, 1, *say, str(tmp_path / "o"), "--network", network)
    assert not (tmp_path / "o").exists()
    assert "out of range" in fail(capsys, 1, *say, str(tmp_path / "o"), "--network", network, "--class", "3")
    assert "is a file" in fail(capsys, 1, *say, str(file), "--network", network)
    assert "No such file" in fail(capsys, 1, *say, str(tmp_path / "o"), "--network", str(tmp_path / "none.pkl"))
    assert str(file) in fail(capsys, 1, *say, str(tmp_path / "o"), "--network", str(file))
    (tmp_path / "dir.png").mkdir()
    grid = ["grid", "--network", network, "--class", "0", "--out"]
    assert "is a folder" in fail(capsys, 1, *grid, str(tmp_path / "dir.png"))
    assert "is a file" in fail(capsys, 1, *grid, str(file / "g.png"))


def test_wrong_usage(network: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["generate", "--network", network, "--outdir", str(tmp_path / "o")]
    assert "--seeds" in fail(capsys, 2, *common)
    for option, value in [
        ("--seeds", "3-1"),
        ("--seeds", "x"),
        ("--noise-mode", "loud"),
        ("--trunc", "nan"),
        ("--trunc", "much"),
        ("--class", "-1"),
        ("--device", "tpu"),
    ]:
        options = {"--seeds": "0", option: value}
        assert option in fail(capsys, 2, *common, *(text for pair in options.items() for text in pair))
    grid = ["grid", "--network", network]
    assert ".png" in fail(capsys, 2, *grid, "--out", str(tmp_path / "g.jpg"))
    assert "don't fit" in fail(
        capsys, 2, *grid, "--out", str(tmp_path / "g.png"), "--seeds", "0-8", "--cols", "2", "--rows", "2"
    )
    assert "--cols" in fail(capsys, 2, *grid, "--out", str(tmp_path / "g.png"), "--cols", "0")
    assert not (tmp_path / "o").exists() and not (tmp_path / "g.png").exists()


@pytest.mark.parametrize("command", ["generate", "grid"])
def test_help_shows_options_and_defaults(command: str, capsys: pytest.CaptureFixture) -> None:
    main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for word in ["--network", "--seeds", "[required]", "--trunc", "[default: 1.0]", "[default: const]", "--class"]:
        assert word in text
