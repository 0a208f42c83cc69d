"""`inspect`: honest, hostile and damaged files are described; exit code 0 unless there is no file."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from stylegan_rooted.cli import main
from stylegan_rooted.inspect import InspectReport, format_report, inspect_file
from training import network_pickle, networks


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    for path in (data_dir / "pickles").rglob("*.pkl*"):
        data = path.read_bytes()
        name = path.name.removesuffix(".gz")
        (folder / name).write_bytes(gzip.decompress(data) if path.suffix == ".gz" else data)
    return folder


def last_lines(report: InspectReport) -> list[str]:
    return format_report(report).splitlines()[-2:]


def test_snapshot_of_the_family(folder: Path) -> None:
    report = inspect_file(folder / "snapshot_b.pkl")
    assert (report.kind, report.family, report.protocol, report.container) == ("snapshot", "stylegan2-ada", 3, "pickle")
    assert report.safe and report.loads and report.problem is None and report.refused_globals == []
    assert "torch.storage._load_from_bytes" in report.globals
    G, D = report.networks["G"], report.networks["D"]
    loaded = network_pickle.load(folder / "snapshot_b.pkl")
    for name, net in (("G", loaded.G), ("D", loaded.D)):
        described = report.networks[name]
        assert described["num_parameters"] == sum(p.numel() for p in net.parameters())
        assert described["num_buffer_elements"] == sum(b.numel() for b in net.buffers())
    assert (G["class"], G["img_resolution"], G["z_dim"], G["c_dim"]) == ("Generator", 8, 12, 3)
    assert G["architecture"] == "resnet"
    assert D["architecture"] == "skip" and D["settings"]["block_kwargs"] == {"freeze_layers": 1}
    assert report.training_set_kwargs["path"] == "/data/labels.zip" and "augment_pipe" not in report.networks
    (source,) = report.sources
    assert not source["ours"] and len(source["sha256"]) == 64 and "Conv2dLayer" in source["classes"]
    assert last_lines(report)[0].startswith("safe: yes") and last_lines(report)[1] == "loads: yes"


def test_snapshot_of_the_stylegan3_repository(folder: Path) -> None:
    report = inspect_file(folder / "snapshot_c_stylegan3repo.pkl")
    assert report.family == "stylegan3-repo" and report.loads
    assert report.networks["augment_pipe"]["p"] == pytest.approx(0.57)
    assert report.networks["G"]["settings"]["synthesis_kwargs"]["conv_clamp"] == 256


def test_our_own_snapshot(tmp_path: Path) -> None:
    common = dict(img_resolution=8, img_channels=3, c_dim=0)
    G = networks.Generator(z_dim=8, w_dim=8, synthesis_kwargs=dict(channel_base=32), **common)
    network_pickle.save(tmp_path / "ours.pkl", G=G, D=networks.Discriminator(channel_base=32, **common), G_ema=G)
    report = inspect_file(tmp_path / "ours.pkl")
    assert report.family == "stylegan-rooted" and report.sources[0]["ours"] and report.loads
    assert report.training_set_kwargs is None


def test_hostile_files_are_described(folder: Path) -> None:
    for path in sorted(folder.glob("[0-2][0-9]_*.pkl")):
        report = inspect_file(path)
        text = format_report(report)
        assert all(line.isprintable() for line in text.splitlines()) and json.loads(report.as_json())
        if path.name[:2] <= "20":
            assert not report.safe and not report.loads and report.refused_globals
            assert report.refused_globals[0] in text and last_lines(report)[0].startswith("safe: no")
    report = inspect_file(folder / "07_tensor_bytes_inside_snapshot.pkl")
    assert report.kind == "snapshot" and report.refused_globals == ["os.system"]


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\x80\x04}\x8c\x01G\x8c\x01xs.", bytes(100)])
def test_anything_is_described(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(data)
    report = inspect_file(tmp_path / "x.pkl")
    assert not report.loads and report.kind == "unknown" and report.num_bytes == len(data)
    assert report.problem in format_report(report)


def test_file_of_torch_save(tmp_path: Path) -> None:
    torch.save({"g_ema": {"input.input": torch.zeros(1)}}, tmp_path / "x.pt")
    report = inspect_file(tmp_path / "x.pt")
    assert report.kind == "rosinality" and report.container == "torch-zip" and not report.loads


def test_command_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    def cli(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(["inspect", *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    code, out, err = cli(str(folder / "01_os_system_proto0.pkl"), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["safe"] is False and json.loads(out)["refused_globals"] == ["os.system"]
    code, out, err = cli(str(folder / "snapshot_b.pkl"))
    assert (code, err) == (0, "") and "\nsafe: yes" in out
    code, out, err = cli(str(folder / "absent.pkl"))
    assert code == 1 and out == "" and err.startswith("Error: ") and err.count("\n") == 1
    code, out, err = cli()
    assert code == 2 and out == ""


def test_other_formats(data_dir: Path, tmp_path: Path) -> None:
    import foreign_files

    from training import weights_file

    for name, kind, container in (
        ("legacy_tf.pkl", "legacy-tf", "pickle"),
        ("ros-gonly-legacyzip.pt", "rosinality", "torch-legacy"),
    ):
        path = tmp_path / "anything"
        path.write_bytes(gzip.decompress((data_dir / "other" / f"{name}.gz").read_bytes()))
        report = inspect_file(path)
        assert (report.kind, report.container) == (kind, container) and report.safe and report.loads
        assert report.refused_globals == [] and report.networks["G_ema"]["num_parameters"] > 1000
        assert report.family in ("stylegan2-tensorflow", "rosinality")
        assert json.loads(report.as_json())["networks"]["G_ema"]["settings"]["z_dim"] == 16
    nets = foreign_files.make_pair(8)
    about = {"training": {"kimg": 3}, "licences": {"weights": "MIT"}}
    weights_file.save(tmp_path / "model.safetensors", **nets, about=about)
    report = inspect_file(tmp_path)
    assert (report.kind, report.family, report.container) == ("safetensors", "stylegan-rooted", "safetensors")
    assert report.training_options == {"kimg": 3} and report.config["licences"] == {"weights": "MIT"}
    assert list(report.networks) == ["G", "D", "G_ema"] and "the format holds no code" in format_report(report)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-4])
    report = inspect_file(tmp_path)
    assert not report.safe and not report.loads and "damaged" in report.reasons[0]


def test_options_and_notes_of_a_training_file(tmp_path: Path) -> None:
    import argparse

    import foreign_files

    from training import rosinality

    nets = foreign_files.make_pair(8)
    content = {"g_ema": rosinality.generator_to_theirs(nets["G_ema"]), "args": argparse.Namespace(lr=0.002, path="x")}
    torch.save(content, tmp_path / "x.pt")
    report = inspect_file(tmp_path / "x.pt")
    assert report.safe and report.training_options == {"lr": 0.002, "path": "x"}
    assert report.notes == ["no w average in the file, estimated from 10000 latents (seed 0)"]
    assert "\nnote      no w average" in format_report(report) and '"lr": 0.002' in format_report(report)


@pytest.mark.parametrize("name", ["stylegan3-t.pkl", "stylegan-xl.pkl", "r3gan.pkl", "stylegan1-tf.pkl", "swagan.pt"])
def test_foreign_formats_are_named(name: str, data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "anything"
    path.write_bytes(gzip.decompress((data_dir / "other" / "refuse" / f"{name}.gz").read_bytes()))
    report = inspect_file(path)
    assert not report.loads and "not supported" in report.problem
    assert report.kind.startswith(name.split(".")[0].split("-")[0])
