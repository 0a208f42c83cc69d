"""The commands `metrics` and `cache`: what they print, write, refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import quiet
from test_features import scripted
from test_finetune import run_cli, tiny
from test_surgery import networks
from test_surgery import save as save_networks

from stylegan_rooted import cache, finetune
from stylegan_rooted.evaluation import Evaluator, ImageSet
from training import run_dir
from training.config import MetricConfig
from training.dataset import ImageDataset


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory, pictures) -> Path:
    path = finetune.run(tiny(pictures, tmp_path_factory.mktemp("runs")), say=quiet)
    return path / "network-snapshot-000000.pkl"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("STYLEGAN_ROOTED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_metrics_prints_records_and_errors(pictures, snapshot, capsys):
    wanted = "kid,pr,dc,memorisation,ppl,fid_inf,fid"
    arguments = ["--network", snapshot, "--data", pictures, "--metrics", wanted, "--num", "24", "--subset", "8"]
    assert run_cli("metrics", *arguments, "--repeats", "2", "--seed", "3", "--device", "cpu", "--json") == 0
    out, err = capsys.readouterr()
    records = {record["metric"]: record for record in json.loads(out)}
    names = {"kd", "precision", "recall", "density", "coverage", "memorisation", "fpl", "fd_inf", "fd"}
    assert set(records) == names
    copies = records["memorisation"]["provenance"]["details"]
    assert (copies["num_train"], copies["num_held_out"], copies["seeds"]) == (8, 4, [3, 4])
    assert records["fd"]["provenance"]["num_real"] == 12 and records["fd"]["errors"]["fd"] > 0
    assert "KD " in err and " ± " in err and "Warning: 24 generated" in err and "Go by: KD" in err
    for name in names:
        (line,) = run_dir.read_jsonl(snapshot.parent / f"metric-{name}.jsonl")
        assert line["snapshot_pkl"] == snapshot.name and line["added_by"] == "metrics"
        assert line["kimg"] == 0.016  # the file's name holds whole kimg
        (snapshot.parent / f"metric-{name}.jsonl").unlink()


def test_metrics_against_a_reference(pictures, snapshot, tmp_path, capsys):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(96), sigma=np.eye(96))
    arguments = ["metrics", "--network", snapshot, "--data", pictures, "--num", "12", "--json"]
    assert run_cli(*arguments, "--metrics", "fid", "--reference", tmp_path / "reference.npz") == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["provenance"]["num_real"] == 0
    assert run_cli(*arguments, "--metrics", "kid", "--reference", tmp_path / "reference.npz") == 1
    assert "FID can be measured against it" in capsys.readouterr().err
    (snapshot.parent / "metric-fd.jsonl").unlink()


def test_two_images_have_no_error_and_a_biased_figure_is_no_advice(pictures, snapshot, capsys):
    arguments = ["metrics", "--network", snapshot, "--data", pictures, "--json"]
    assert run_cli(*arguments, "--num", "2", "--metrics", "kid,fid") == 0
    out, err = capsys.readouterr()
    assert "NaN" not in out and "nan" not in err and "Go by: KD" in err
    assert run_cli(*arguments, "--num", "8", "--metrics", "fid,memorisation") == 0
    err = capsys.readouterr().err
    assert "go by the kernel distance (--metrics kid)" in err and "Go by" not in err
    for file in snapshot.parent.glob("metric-*.jsonl"):
        file.unlink()


class Odd(torch.nn.Module):
    """A detector that fails, or gives what cannot be measured."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "scalar":
            return x.mean()
        if self.kind == "failing":
            return x.reshape(7, 11)
        return x.mean([2, 3]) / 0


def test_files_that_do_not_serve_are_named(pictures, snapshot, tmp_path, capsys):
    def refused(*arguments) -> str:
        assert run_cli("metrics", "--network", snapshot, "--num", "8", *arguments) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    for kind, says in (("scalar", "gives no row"), ("failing", "failed on"), ("infinite", "gives non-finite features")):
        file = tmp_path / f"{kind}.pt"
        scripted(Odd(kind), file)
        line = refused("--data", pictures, "--detector", "torchscript", "--detector-file", file)
        assert line.startswith(f"Error: {file} {says}")
    text = tmp_path / "text.pt"
    text.write_text("no program\n")
    line = refused("--data", pictures, "--detector", "torchscript", "--detector-file", text)
    assert line.startswith(f"Error: {text} is no TorchScript file (") and ". " not in line.split(" (", 1)[1]
    for option in (["--detector", "inception", "--detector-file"], ["--detector-file"], ["--reference"]):
        line = refused("--data", pictures, *option, text)
        assert f"{text} is no" in line and "allow_pickle" not in line and ". " not in line
    np.savez(tmp_path / "odd.npz", mu=np.zeros(96), sigma=-np.eye(96))
    line = refused("--data", pictures, "--metrics", "fid", "--reference", tmp_path / "odd.npz")
    assert line.startswith(f"Error: {tmp_path / 'odd.npz'}: sigma is no covariance")
    one = tmp_path / "one"
    one.mkdir()
    Image.new("RGB", (16, 16)).save(one / "a.png")
    assert f"{one} holds 1 image" in refused("--data", one)


def test_transparency_is_measured_on_white(tmp_path, capsys):
    """A network with alpha and data with alpha; the same data without alpha, laid on white, have the same features."""
    folder, rgba, rgb, network = tmp_path / "in", tmp_path / "rgba.zip", tmp_path / "rgb.zip", tmp_path / "a.pkl"
    folder.mkdir()
    for i in range(8):
        image = Image.new("RGBA", (16, 16), (250, 10 * i, 0, 40))
        image.paste((0, 0, 200, 255), (4, 4, 12, 9 + i))
        image.save(folder / f"{i}.png")
    for data, kind in ((rgba, "--rgba"), (rgb, "--rgb")):
        assert run_cli("dataset", "build", folder, data, "--resolution", "16", kind) == 0
    save_networks(network, networks(img_channels=4))
    capsys.readouterr()
    wanted = "fid,kid,pr,memorisation,ppl"
    assert run_cli("metrics", "--network", network, "--data", rgba, "--metrics", wanted, "--num", "8", "--json") == 0
    out, err = capsys.readouterr()
    assert "alpha on white" in err
    assert {r["provenance"]["details"]["background"] for r in json.loads(out)} == {"white"}
    means = []
    for data in (rgba, rgb):
        evaluator = Evaluator(ImageDataset(str(data)), MetricConfig(num=8), torch.device("cpu"), 0)
        means.append(evaluator._real_features(ImageSet("real", None), torch.nn.Identity()).mean)
    np.testing.assert_allclose(*means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--metrics", "none"], 2, "--metrics none measures nothing"),
        (["--metrics", "fid,kid,fid"], 2, "names fid more than once"),
        (["--metrics", "is"], 1, "the inception detector needs its weights"),
        (["--metrics", "fid", "--held-out", "absent"], 2, "--held-out absent is for --metrics memorisation"),
        (["--subset", "5000"], 1, "--subset 5000 is more than the 12 images of "),
        (["--metrics", "beauty"], 2, "--metrics beauty is unknown"),
        (["--metrics", "fid50k_full"], 1, "inception-2015-12-05.pt"),
        (["--metrics", "ppl2_wend"], 1, "--vgg-file"),
        (["--metrics", "pr50k3_full", "--vgg-file", "absent.pt"], 1, "absent.pt is no file"),
        (["--detector", "torchscript"], 1, "--detector-file"),
        (["--detector", "resnet"], 2, "--detector resnet is unknown"),
        (["--detector", "torchscript", "--detector-file", "https://example.invalid/x"], 1, "#sha256=DIGEST"),
        (["--reference", "absent.npz"], 1, "absent.npz"),
        (["--repeats", "0"], 2, "'--repeats': 0 is not in the range 1<=x<="),
    ],
)
def test_refusals_are_one_line(pictures, snapshot, capsys, monkeypatch, tmp_path, arguments, code, message):
    monkeypatch.setattr("metrics.features.inception_home", lambda: tmp_path)
    assert run_cli("metrics", "--network", snapshot, "--data", pictures, "--num", "8", *arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("Error: ") and message in lines[-1]
    assert not list(snapshot.parent.glob("metric-*"))


def test_cache_is_listed_and_cleared(pictures, snapshot, own_cache, capsys):
    assert run_cli("cache", "list") == 0
    assert "0 files" in capsys.readouterr().err
    assert run_cli("metrics", "--network", snapshot, "--data", pictures, "--num", "8", "--metrics", "kid") == 0
    (snapshot.parent / "metric-kd.jsonl").unlink()
    (own_cache / "feature-stats" / "torn.npz").write_bytes(b"torn")
    (own_cache / "downloads").mkdir()
    (own_cache / "downloads" / "x.pkl").write_bytes(b"kept")
    capsys.readouterr()
    assert run_cli("cache", "list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted(row["part"] for row in rows) == ["downloads", "feature-stats", "feature-stats"]
    texts = [row["what"] for row in rows if row["part"] == "feature-stats"]
    assert any(text.startswith("embedded (antialiased bilinear to 32), 12 images of data ") for text in texts)
    assert any(text.startswith("damaged") for text in texts)
    assert run_cli("cache", "list") == 0
    assert "12 images" in capsys.readouterr().out
    assert run_cli("cache", "clear") == 0
    assert [entry.part for entry in cache.entries()] == ["downloads"]
    assert run_cli("cache", "clear", "--all") == 0
    assert cache.entries() == []
