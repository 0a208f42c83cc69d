"""What headers of our safetensors files say that this program would not write: one line, rc 1, nothing written."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import make_pair

from stylegan_rooted import inspect
from stylegan_rooted.cli import main
from training import network_file, network_pickle, weights_file


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "a.safetensors"
    weights_file.save(path, **make_pair(8, synthesis={"conv_clamp": 256}), about={"licences": {"weights": "MIT"}})
    return path.read_bytes()


def with_config(stored: bytes, /, text: "str | None" = None, **changes: Any) -> bytes:
    """The file with another configuration in its header: as text, or with some entries changed."""
    length = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + length])
    config = json.loads(header["__metadata__"]["config"])
    header["__metadata__"]["config"] = json.dumps({**config, **changes}) if text is None else text
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + stored[8 + length :]


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def fails(capsys: pytest.CaptureFixture, words: str, *argv: object) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and err.startswith("Error: ") and err.count("\n") == 1 and words in err, (out, err)


HEADERS: dict[str, dict[str, Any]] = {
    "nests deeper than 32": {"data": deep(900)},
    "nests deeper": {"data": {"x": deep(32)}},
    "no JSON (": {"text": "[" * 100_000 + "]" * 100_000},
    "base_model in its configuration is no JSON object": {"base_model": 5},
    "sha256 of base_model": {"base_model": {"sha256": [1]}},
    "name of base_model": {"base_model": {"name": {}}},
    "training in its configuration": {"training": "x"},
    "licences in its configuration": {"licences": ["x"]},
    "weights of licences": {"licences": {"weights": 5}},
    "data in its configuration": {"data": []},
    "training_set_kwargs in its configuration": {"training_set_kwargs": 7},
    "metrics in its configuration is no JSON list": {"metrics": {"a": 1}},
    "an entry of metrics": {"metrics": [{"results": [1]}]},
    "entry of metrics": {"metrics": [5]},
    "notes in its configuration is no JSON list": {"notes": 5},
    "an entry of notes": {"notes": [{}]},
    "of a newer version": {"format": "stylegan-rooted weights 2"},
    "unknown format": {"format": None},
}


@pytest.mark.parametrize("words", HEADERS)
def test_headers_that_are_refused(words: str, good: bytes, tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_config(good, **HEADERS[words]))
    for argv in (
        ("convert", path, tmp_path / "b.pkl"), ("convert", path, f"{tmp_path}/hub/"),
        ("generate", "--network", path, "--seeds", 0, "--outdir", tmp_path / "out"),
    ):  # fmt: skip
        fails(capsys, words, *argv)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    for flags in ((), ("--json",)):
        main(["inspect", str(path), *flags])
    report = inspect.inspect_file(path)
    assert not report.loads and words in str(report.problem)


def test_headers_may_lack_all_that_is_not_needed(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_config(good, **dict.fromkeys(weights_file.ORIGIN_KINDS)))
    main(["convert", str(path), f"{tmp_path}/hub/"])
    path.write_bytes(with_config(good, data={"x": deep(20)}))
    main(["convert", str(path), f"{tmp_path}/hub/", "--overwrite"])
    assert network_file.load(tmp_path / "hub").config["data"] == {"x": deep(20)}


def test_a_newer_version_is_not_called_hostile(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(with_config(good, format="stylegan-rooted weights 2"))
    report = inspect.inspect_file(tmp_path / "a.safetensors")
    assert report.safe and not report.loads and "update" in str(report.problem)


def test_the_configuration_beside_a_folders_weights(good: bytes, tmp_path: Path, capsys) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "model.safetensors").write_bytes(good)
    beside = hub / "config.json"
    config = network_file.load(hub).config
    for text, words in (
        ("{not json", "config.json beside it: its configuration is no JSON"),
        ("[1]", "config.json beside it: its configuration is no JSON object"),
        (json.dumps({**config, "networks": {"G_ema": {}}}), "contradicts the header on networks"),
        (json.dumps({**config, "format": "stylegan-rooted weights 2"}), "contradicts the header on format"),
        (" " * (2 << 20), "more than"),
    ):
        beside.write_text(text)
        for source in (hub, hub / "model.safetensors"):
            fails(capsys, words, "convert", source, tmp_path / "b.pkl")
        assert words in str(inspect.inspect_file(hub).problem)
    beside.write_text(json.dumps({**config, "licences": {"weights": "CC0-1.0"}, "tags": ["cats"]}))
    assert network_file.load(hub).notes == ("config.json beside it differs from the header, which counts, on licences",)
    beside.write_text(json.dumps(config))
    assert network_file.load(hub).notes == ()
    beside.write_text("{not json")
    (hub / "other.safetensors").write_bytes(good)
    assert network_file.load(hub / "other.safetensors").notes == (), "it belongs to model.safetensors"


def test_no_graph_of_numbers_that_its_check_would_not_see(tmp_path: Path, capsys) -> None:
    """Of nine classes three are compared."""
    nets = make_pair(8, c_dim=9)
    with torch.no_grad():
        nets["G_ema"].mapping.embed.weight[0, 8] = float("nan")
    network_pickle.save(tmp_path / "a.pkl", **nets)
    fails(capsys, "a.pkl: G_ema.mapping.embed.weight holds", "convert", tmp_path / "a.pkl", tmp_path / "x.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]
