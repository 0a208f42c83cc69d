"""`convert`: every source format to every target and back, with equal images; graphs; model cards; wrong use.

`pytest -s tests/test_convert.py -k matrix` prints the matrix; `-m slow` adds the graphs of every source.
"""

import dataclasses
import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign_files
import numpy as np
import pytest
import torch
from foreign_files import latents, make_pair, state
from PIL import Image

from stylegan_rooted import convert, convert_options, finetune, model_folder, onnx_file, origin, portable
from stylegan_rooted.cli import main
from stylegan_rooted.convert_options import ConvertOptions
from training import network_file, network_pickle, networks, rosinality, weights_file
from training.augment import AugmentPipe

EXACT = (
    1e-6  # relative, of images: TensorFlow's modulation biases are rounded by adding 1, all else is equal to the bit
)
TARGETS = {"pickle": "x.pkl", "safetensors": "x.safetensors", "folder": "folder", "rosinality": "x.pt"}
GRAPHS = {"onnx": "x.onnx", "torch-export": "x.pt2"}
NARROW = {"rosinality": ConvertOptions(any_channels=True)}  # its own table begins with 512
SOURCES = ("snapshot", "snapshot-p2", "legacy-tf", "rosinality", "state-dict", "safetensors", "folder")


def quiet(text: str) -> None:
    """Says nothing."""


def write_source(kind: str, nets: dict[str, Any], folder: Path) -> Path:
    """The same networks in one of the formats that are read."""
    path = folder / f"source-{kind}"
    if kind == "snapshot":
        network_pickle.save(path, **nets)
    elif kind == "snapshot-p2":
        path.write_bytes(pickle.dumps({**nets, "augment_pipe": None, "training_set_kwargs": None}, protocol=2))
    elif kind == "legacy-tf":
        path.write_bytes(foreign_files.tensorflow_pickle(nets))
    elif kind == "rosinality":
        rosinality.save(path, **nets, any_channels=True)
    elif kind == "state-dict":
        torch.save({key: state(net) for key, net in nets.items()}, path)
    elif kind == "safetensors":
        weights_file.save(path, **nets)
    else:
        model_folder.save(path, {**nets, "augment_pipe": None}, {})
    return path


def outputs(opened: Any) -> dict[str, torch.Tensor]:
    """What the networks of a file compute."""
    z, c = latents(opened.G_ema)
    images = torch.randn([4, 3, 8, 8], generator=torch.Generator().manual_seed(3))
    labels = torch.zeros([4, opened.D.c_dim])
    return {
        "image": opened.G_ema(z, c, noise_mode="const"),
        "truncated": opened.G_ema(z, c, truncation_psi=0.5, noise_mode="const"),
        "image of G": opened.G(z, c, noise_mode="const"),
        "logits": opened.D(images, labels),
    }


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return max(float((one[key] - two[key]).abs().max() / one[key].abs().max()) for key in one)


@pytest.fixture(scope="module")
def nets() -> dict[str, Any]:
    return make_pair(8)


def test_matrix(nets: dict[str, Any], tmp_path: Path) -> None:
    """Every source to every target, and back to a pickle."""
    wanted = outputs(finetune.EasyDict(nets))
    print(f"\n{'source':<14}" + "".join(f"{to:>24}" for to in TARGETS))  # noqa: T201
    assert difference({"x": wanted["image"]}, {"x": wanted["image of G"]}) > 0.1, "a mix-up would show"
    for kind in SOURCES:
        source, line = write_source(kind, nets, tmp_path), f"{kind:<14}"
        assert difference(wanted, outputs(network_file.load(source))) <= EXACT
        for to, name in TARGETS.items():
            dest = tmp_path / kind / to / name
            convert.convert(source, dest, to, NARROW.get(to), say=quiet)
            there = difference(wanted, outputs(network_file.load(dest)))
            convert.convert(dest, dest.with_name("back.pkl"), say=quiet)
            back = difference(wanted, outputs(network_file.load(dest.with_name("back.pkl"))))
            line += f"{there:>12.1e}{back:>12.1e}"
            assert there <= EXACT and back <= EXACT, (kind, to, there, back)
        print(line)  # noqa: T201


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_matrix_of_conditional_networks(architecture: str, tmp_path: Path) -> None:
    """Other architectures, classes, half precision and clamps, in the formats that have them."""
    nets = make_pair(
        8,
        3,
        synthesis={"architecture": architecture, "num_fp16_res": 1, "conv_clamp": 2, "resample_filter": [1, 2, 1]},
        discriminator={"architecture": architecture, "num_fp16_res": 1, "conv_clamp": 2},
    )
    for net in nets.values():
        net.float()
    source = write_source("snapshot", nets, tmp_path)
    for to in ("pickle", "safetensors", "folder"):
        convert.convert(source, tmp_path / to / TARGETS[to], to, say=quiet)
        found = network_file.load(tmp_path / to / TARGETS[to])
        for key, net in nets.items():
            assert getattr(found, key).init_kwargs == ({"block_kwargs": {}} if key == "D" else {}) | net.init_kwargs
            assert all(torch.equal(t, state(getattr(found, key))[name]) for name, t in state(net).items())
    with pytest.raises(ValueError, match="rosinality's code has no such networks: it knows 3 classes") as refusal:
        convert.convert(source, tmp_path / "x.pt", say=quiet)
    assert str(refusal.value).count("\n") == 0 and not (tmp_path / "x.pt").exists()


def test_pickles_convert_to_the_same_bytes(nets: dict[str, Any], tmp_path: Path) -> None:
    pipe = AugmentPipe(xflip=1)
    pipe.p.fill_(0.3)
    kwargs = {"path": "/some/where/data.zip", "xflip": True}
    network_pickle.save(tmp_path / "a.pkl", **nets, augment_pipe=pipe, training_set_kwargs=kwargs)
    convert.convert(tmp_path / "a.pkl", tmp_path / "b.safetensors", say=quiet)
    convert.convert(tmp_path / "b.safetensors", tmp_path / "c.pkl", say=quiet)
    again = network_file.load(tmp_path / "c.pkl")
    assert float(again.augment_pipe.p) == pytest.approx(0.3) and again.training_set_kwargs == kwargs
    first = network_file.load(tmp_path / "a.pkl")
    for key in ("G", "D", "G_ema", "augment_pipe"):
        one, two = state(getattr(first, key)), state(getattr(again, key))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_generators_alone(nets: dict[str, Any], tmp_path: Path) -> None:
    network_pickle.save(tmp_path / "a.pkl", **nets)
    said: list[str] = []
    for to, name in (("safetensors", "g.safetensors"), ("folder", "g"), ("rosinality", "g.pt")):
        options = dataclasses.replace(NARROW.get(to, ConvertOptions()), only_ema=True)
        convert.convert(tmp_path / "a.pkl", tmp_path / name, to, options, say=quiet)
        found = network_file.load(tmp_path / name)
        assert found.G is None and found.D is None
        convert.convert(tmp_path / name, tmp_path / f"{to}.pkl", say=said.append)
        full = network_file.load(tmp_path / f"{to}.pkl")
        assert torch.equal(full.G_ema.mapping.w_avg, nets["G_ema"].mapping.w_avg)
        assert torch.equal(full.G.mapping.fc0.weight, full.G_ema.mapping.fc0.weight)
        assert not torch.equal(full.D.b8.conv0.weight, nets["D"].b8.conv0.weight)
    assert sum("a new one starts from random weights" in line for line in said) == 3
    size = {name: (tmp_path / name).stat().st_size for name in ("a.pkl", "g.safetensors")}
    assert size["g.safetensors"] < size["a.pkl"] / 2
    convert.convert(
        tmp_path / "a.pkl", tmp_path / "h.safetensors", None, ConvertOptions(only_ema=True, dtype="float16"), say=quiet
    )
    half = network_file.load(tmp_path / "h.safetensors").G_ema
    z, c = latents(half)
    error = half(z, c, noise_mode="const") - nets["G_ema"](z, c, noise_mode="const")
    assert 0 < error.abs().max() < 0.02 * nets["G_ema"](z, c, noise_mode="const").abs().max()


# rosinality's format, written


@pytest.mark.parametrize("name", ["ros-train-args", "ros-converted", "ros-gonly-legacyzip"])
def test_rosinality_there_and_back_is_identical(name: str, goldens: Path, tmp_path: Path) -> None:
    """Names, order, shapes and bits of g_ema, g and d are the original's."""
    source = goldens / "other" / f"{name}.pt"
    convert.convert(source, tmp_path / "x.pt", options=NARROW["rosinality"], say=quiet)
    allowed = [("argparse.Namespace", type("Stub", (), {}))]
    with torch.serialization.safe_globals([(stub, name) for name, stub in allowed]):
        theirs = torch.load(source, weights_only=True)
    ours = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {"g_ema", "latent_avg"} <= ours.keys() and ours.keys() - {"latent_avg"} <= theirs.keys()
    for net in ours.keys() - {"latent_avg"}:
        assert ours[net].keys() == theirs[net].keys()
        assert all(torch.equal(ours[net][key], theirs[net][key]) for key in theirs[net]), net
    if "latent_avg" in theirs:
        assert torch.equal(ours["latent_avg"], theirs["latent_avg"].flatten())


def test_rosinality_bytes_repeat_and_keys_are_in_order(nets: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        rosinality.save(tmp_path / name, **nets, any_channels=True)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(content) == ["g_ema", "latent_avg", "g", "d"]
    assert list(content["g_ema"])[:5] == [
        "style.1.weight",
        "style.1.bias",
        "style.2.weight",
        "style.2.bias",
        "input.input",
    ]
    assert list(content["d"])[0] == "convs.0.0.weight" and list(content["d"])[-1] == "final_linear.1.bias"


IMPOSSIBLE = {
    "images have 1 channels": {"img_channels": 1},
    "z, w and the mapping's layers differ": {"z_dim": 10},
    "multiplier is not 0.01": {"mapping": {"lr_multiplier": 0.1}},
    "activation is not lrelu": {"synthesis": {"activation": "relu"}},
    "generator's architecture is resnet": {"synthesis": {"architecture": "resnet"}},
    "discriminator's architecture is orig": {"discriminator": {"architecture": "orig"}},
    "no noise": {"synthesis": {"use_noise": False}},
    "not 4 taps": {"synthesis": {"resample_filter": [1, 2, 1]}},
    "groups of 4 in 1 channel": {"discriminator": {"epilogue_kwargs": {"mbstd_group_size": 2}}},
}


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_what_rosinality_cannot_have(words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        rosinality.save(tmp_path / "x.pt", **make_pair(8, **IMPOSSIBLE[words]))
    assert list(tmp_path.iterdir()) == []


def test_what_rosinality_is_told(nets: dict[str, Any], tmp_path: Path) -> None:
    nets = make_pair(8, synthesis={"conv_clamp": 256, "num_fp16_res": 1})
    notes = rosinality.save(tmp_path / "x.pt", **nets, any_channels=True)
    assert [note.split()[2] for note in notes] == ["does", "computes", "of"]
    assert "{4: 20, 8: 16}" in notes[2]


def test_rosinality_has_a_table_of_channels(nets: dict[str, Any], tmp_path: Path) -> None:
    """512 up to 32 pixels, 16384 m / r above (other-checkpoints.md 1.2); the whole file needs one m."""
    with pytest.raises(ValueError, match=r"does not have \{4: 20, 8: 16\}; --any-channels"):
        rosinality.save(tmp_path / "x.pt", **nets)
    wide = {"channel_base": 32768, "channel_max": 512}
    G = make_pair(8, synthesis=wide, discriminator=wide)
    with pytest.raises(ValueError, match="does not have"):
        rosinality.save(tmp_path / "x.pt", G_ema=G["G_ema"], D=nets["D"])
    assert list(tmp_path.iterdir()) == []
    assert rosinality.save(tmp_path / "x.pt", G_ema=G["G_ema"], D=G["D"]) == ()


@pytest.mark.parametrize("base, multiplier", [(16384, 1), (32768, 2), (24576, None), (8192, None)])
def test_the_multiplier_of_rosinalitys_table(base: int, multiplier: int | None, tmp_path: Path) -> None:
    width = {"channel_base": base, "channel_max": 512}
    G = networks.Generator(512, 0, 512, 64, 3, mapping_kwargs={"num_layers": 1}, synthesis_kwargs=width)
    if multiplier is None:
        with pytest.raises(ValueError, match="its table of channels does not have"):
            rosinality.save(tmp_path / "x.pt", G_ema=G)
    else:
        notes = rosinality.save(tmp_path / "x.pt", G_ema=G)
        said = (f"rosinality's code opens it with --channel_multiplier {multiplier}",)
        assert notes == (() if multiplier == 2 else said)


# Graphs


def check_graphs(source: Path, folder: Path, G: Any) -> None:
    z, c = latents(G, 5)
    psi = torch.tensor(0.6)
    inputs = (z, c, psi) if G.c_dim else (z, psi)
    with torch.no_grad():
        wanted = G(z, c, truncation_psi=0.6, noise_mode="const", force_fp32=True)
    for to, name in GRAPHS.items():
        said: list[str] = []
        (path,) = convert.convert(source, folder / name, to, ConvertOptions(overwrite=True), say=said.append)
        assert said[-2].startswith("Checked: ") and said[-1].startswith(f"Inputs: z, {'c, ' if G.c_dim else ''}trunc")
        function = onnx_file.load(path) if to == "onnx" else portable.load(path)
        got = function(*inputs)
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= portable.TOLERANCE * wanted.abs().max()
    assert {path.name for path in folder.iterdir()} == set(GRAPHS.values()), "unchecked files do not stay"


def test_graphs(tmp_path: Path) -> None:
    """One network with everything at once: classes, residual blocks, clamps, half precision asked for."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    nets = make_pair(8, 3, synthesis={"architecture": "resnet", "conv_clamp": 256, "num_fp16_res": 1})
    source = write_source("snapshot", nets, tmp_path)
    (tmp_path / "out").mkdir()
    check_graphs(source, tmp_path / "out", nets["G_ema"])
    about = onnx_file.read_about(tmp_path / "out" / "x.onnx")
    assert about["source"]["file"] == source.name and about["written_by"].startswith("stylegan-rooted ")
    import onnx

    model = onnx.load(tmp_path / "out" / "x.onnx")
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shapes == {"z": ["batch", 12], "c": ["batch", 3], "truncation_psi": [], "image": ["batch", 3, 8, 8]}
    assert {node.domain for node in model.graph.node} == {""}, "standard operators only"


def test_a_graph_that_differs_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source("snapshot", make_pair(8), tmp_path)
    (tmp_path / "out").mkdir()
    load = portable.load
    monkeypatch.setattr(portable, "load", lambda path: lambda *inputs: load(path)(*inputs) * 1.0001)
    with pytest.raises(ValueError, match="differs from the network"):
        convert.convert(source, tmp_path / "out" / "x.pt2", say=quiet)
    assert list((tmp_path / "out").iterdir()) == []


def test_parts(nets: dict[str, Any], tmp_path: Path) -> None:
    G = nets["G_ema"]
    network_pickle.save(tmp_path / "a.pkl", **nets)
    z, _ = latents(G, 4)
    functions = {}
    for part in ("mapping", "synthesis"):
        (path,) = convert.convert(
            tmp_path / "a.pkl", tmp_path / f"{part}.pt2", None, ConvertOptions(part=part), say=quiet
        )
        functions[part] = portable.load(path)
    ws = functions["mapping"](z, torch.tensor(0.5))
    assert torch.allclose(ws, G.mapping(z, None, truncation_psi=0.5), rtol=0, atol=1e-5 * float(ws.abs().max()))
    image, wanted = functions["synthesis"](ws), G.synthesis(ws, noise_mode="const")
    assert (image - wanted).abs().max() <= portable.TOLERANCE * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_graphs_of_every_source(kind: str, nets: dict[str, Any], tmp_path: Path) -> None:
    source = write_source(kind, nets, tmp_path)
    (tmp_path / "out").mkdir()
    check_graphs(source, tmp_path / "out", nets["G_ema"])


# Model cards and origins


@pytest.fixture
def run_folder(nets: dict[str, Any], tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "00003-cats"
    run.mkdir(parents=True)
    digest = next(iter(origin.KNOWN_MODELS))
    network_pickle.save(
        run / "network-snapshot-000016.pkl", **nets, training_set_kwargs={"path": "/home/someone/cats.zip"}
    )
    options = {
        "loss": {"name": "rooted"},
        "data": {"path": "/home/someone/cats.zip"},
        "resume": "/home/someone/base.pkl",
    }
    (run / "training_options.json").write_text(json.dumps(options))
    data = {"path": "/home/someone/cats.zip", "num_images": 12, "fingerprint": "ab" * 32}
    resume = {"path": "/home/someone/base.pkl", "sha256": digest}
    (run / "environment.json").write_text(json.dumps({"data": data, "resume": resume}))
    (run / "stats.jsonl").write_text("{}\n")
    rows = [
        {
            "metric": "fd",
            "results": {"fd": value},
            "snapshot_pkl": name,
            "kimg": 16.0,
            "provenance": {"num_fake": 50, "num_real": 12, "extractor": "embedded", "digest": "cd" * 32,
                           "resize": "area", "data_fingerprint": "ab" * 32},
        }
        for value, name in ((99.5, "network-snapshot-000000.pkl"), (12.25, "network-snapshot-000016.pkl"))
    ]  # fmt: skip
    (run / "metric-fd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_model_folder(run_folder: Path, nets: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "my-cats"
    written = convert.convert(
        run_folder / "network-snapshot-000016.pkl",
        f"{out}/",
        options=ConvertOptions(licences={"weights": "CC-BY-4.0"}),
        say=quiet,
    )
    assert sorted(path.name for path in written) == ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in written)
    card = (out / "README.md").read_text()
    for words in (
        'license: "cc-by-4.0"',
        "# my-cats",
        "8x8",
        "embedded network (emoji32.pkl)",
        "Licence of the base model: Apache-2.0",
        "Licence of these weights: CC-BY-4.0",
        "ab" * 32,
        "| FD | 12.25 | 50 | 12 | embedded cdcdcdcdcdcd | area | abababababababab |",
        '"name": "rooted"',
        "real images shown: 16",
    ):
        assert words in card, words
    assert "99.5" not in card, "figures of another snapshot say nothing of this one"
    everything = card + (out / "config.json").read_text()
    assert "/home/someone" not in everything and b"/home/someone" not in (out / "model.safetensors").read_bytes()
    with Image.open(out / "samples.png") as picture:
        assert picture.size == (8 * 6, 8 * 3)
    assert json.loads((out / "config.json").read_text()) == network_file.load(out).config
    convert.convert(out, tmp_path / "again.safetensors", say=quiet)
    config = network_file.load(tmp_path / "again.safetensors").config
    assert config["metrics"][0]["results"] == {"fd": 12.25} and config["licences"] == {"weights": "CC-BY-4.0"}
    assert json.loads((tmp_path / "again.config.json").read_text()) == config


def test_a_card_says_what_is_not_recorded(nets: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state(nets["G_ema"]), tmp_path / "x.pt")
    convert.convert(tmp_path / "x.pt", tmp_path / "m" / "", "folder", say=quiet)
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.count("not recorded") >= 3 and "license: other" in card and "bare state dict" in card
    assert "ask the base model's author" in card and "The weights hold G\\_ema" not in card


def test_the_embedded_network_is_known() -> None:
    import hashlib

    path = Path(finetune.__file__).parent / "assets" / "emoji32.pkl"
    assert hashlib.sha256(path.read_bytes()).hexdigest() in origin.KNOWN_MODELS


def test_what_is_unknown_cannot_break_a_card() -> None:
    config = {"data": {"path": "a|b\n`c`<script>"}, "base_model": {"name": "[x](y)"}, "notes": ["*"], "metrics": [{}]}
    text = model_folder.card("t|\n", make_pair(8), config)
    assert "a\\|b?\\`c\\`\\<script\\>" in text and "\\[x\\](y)" in text and "# t\\|?" in text


# Wrong use


def fails(capsys: pytest.CaptureFixture, code: int, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, argv)])
    out, err = capsys.readouterr()
    assert stop.value.code == code and out == "" and err.startswith("Error: ") and err.count("\n") == 1, err
    return err


def test_command_line(nets: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "a.pkl"
    network_pickle.save(source, **nets)
    main(["convert", str(source), str(tmp_path / "b.safetensors"), "--only-ema", "--licence", "MIT"])
    out, err = capsys.readouterr()
    assert out == "" and [line.split()[0] for line in err.splitlines()] == ["Wrote", "Wrote"]
    assert network_file.load(tmp_path / "b.safetensors").config["licences"] == {"weights": "MIT"}
    assert "--to" in fails(capsys, 2, source, tmp_path / "b.xyz")
    assert "--to" in fails(capsys, 2, source, tmp_path / "b.pkl", "--to", "tensorflow")
    assert "--dtype" in fails(capsys, 2, source, tmp_path / "c.pkl", "--dtype", "float16")
    assert "--part" in fails(capsys, 2, source, tmp_path / "c.pkl", "--part", "mapping")
    assert "--only-ema" in fails(capsys, 2, source, tmp_path / "c.pkl", "--only-ema")
    assert "--any-channels" in fails(capsys, 2, source, tmp_path / "c.pkl", "--any-channels")
    assert "--any-channels" in fails(capsys, 1, source, tmp_path / "c.pt")
    assert "--overwrite" in fails(capsys, 1, source, tmp_path / "b.safetensors")
    assert "is read" in fails(capsys, 1, source, source, "--overwrite")
    assert "absent" in fails(capsys, 1, tmp_path / "absent", tmp_path / "c.pkl")
    assert "is a folder" in fails(capsys, 1, source, tmp_path, "--to", "pickle")
    assert "other things in it" in fails(capsys, 1, source, tmp_path)
    (tmp_path / "noise").write_bytes(b"hello")
    assert "not a pickle" in fails(capsys, 1, tmp_path / "noise", tmp_path / "c.pkl")
    assert "is a file" in fails(capsys, 1, source, tmp_path / "noise" / "c.pkl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pkl", "b.config.json", "b.safetensors", "noise"]
    main(["convert", str(source), str(tmp_path / "b.safetensors"), "--overwrite"])
    assert network_file.load(tmp_path / "b.safetensors").D is not None


def test_missing_packages_are_said(tmp_path: Path, nets: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network_pickle.save(tmp_path / "a.pkl", **nets)
    monkeypatch.setattr(onnx_file, "PACKAGES", ("no_such_package_here",))
    with pytest.raises(ValueError, match="pip install"):
        convert.convert(tmp_path / "a.pkl", tmp_path / "x.onnx", say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pkl"]


def test_options_and_writers_agree() -> None:
    assert set(convert_options.FORMATS) == set(convert_options.SUFFIXES) == {*TARGETS, *GRAPHS}
    assert set(convert_options.DTYPES) == set(weights_file.DTYPES) and convert_options.GRAPHS == tuple(GRAPHS)
    with pytest.raises(ValueError, match="--dtype"):
        ConvertOptions(dtype="int8")
    with pytest.raises(ValueError, match="--part"):
        ConvertOptions(part="x")


def test_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom stylegan_rooted.cli import main\n"
        "try: main(['convert', '--help'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip().endswith("False") and "--only-ema" in done.stdout, done.stderr


# Starting points of training


def train(source: Path, folder: Path, *, resolution: int = 8, num_classes: int = 0) -> Path:
    """Two steps from a file; the run folder."""
    (folder / "pictures").mkdir()
    rng = np.random.RandomState(0)
    for i in range(6):
        pixels = rng.randint(0, 256, [resolution, resolution, 3], dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    labels = [[f"{i}.png", i % num_classes] for i in range(6)] if num_classes else None
    (folder / "pictures" / "dataset.json").write_text(json.dumps({"labels": labels}))
    arguments = {
        "data": folder / "pictures", "resume": source, "outdir": folder / "runs", "kimg": "0.008", "batch": 4,
        "metrics": "none", "snap": 1, "tick": "0.004", "device": "cpu", "grid": "2x2", "cond": bool(num_classes),
    }  # fmt: skip
    main(["finetune", *(str(part) for key, value in arguments.items() for part in (f"--{key}", value))])
    (run,) = [path for path in (folder / "runs").iterdir() if path.is_dir() and path.name[:5].isdigit()]
    return run


def test_finetune_of_a_generator_alone(nets: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights_file.save(tmp_path / "g.safetensors", G_ema=nets["G_ema"])
    run = train(tmp_path / "g.safetensors", tmp_path)
    assert "Checkpoint: no discriminator in the file: a new one starts from random weights" in capsys.readouterr().err
    record = json.loads((run / "environment.json").read_text())["resume"]
    assert record["kind"] == "safetensors" and "no discriminator" in record["notes"][0]
    (last,) = sorted(run.glob("network-snapshot-*.pkl"))[-1:]
    trained = network_file.load(last)
    assert trained.D.b8.conv0.weight.shape == nets["D"].b8.conv0.weight.shape
    assert not torch.equal(trained.G.mapping.fc0.weight, nets["G_ema"].mapping.fc0.weight)


@pytest.mark.parametrize("kind", SOURCES)
def test_finetune_from_every_source(kind: str, nets: dict[str, Any], tmp_path: Path) -> None:
    run = train(write_source(kind, nets, tmp_path), tmp_path)
    trained = network_file.load(next(run.glob("network-snapshot-*.pkl")))
    for key in ("G", "D"):
        one, two = state(nets[key]), state(getattr(trained, key))
        assert one.keys() == two.keys() and any(not torch.equal(one[name], two[name]) for name in one)


STORED = {  # what other programs wrote: architecture, number of classes
    "snapshot of stylegan2-ada": ("pickles/snapshot_b.pkl.gz", 8, 3),
    "snapshot of the stylegan3 repository": ("pickles/snapshot_c_stylegan3repo.pkl.gz", 16, 2),
    "TensorFlow": ("other/legacy_tf.pkl.gz", 16, 0),
    "rosinality, old container, G_ema alone": ("other/ros-gonly-legacyzip.pt.gz", 8, 0),
}


@pytest.mark.parametrize("name", STORED)
def test_finetune_from_stored_files(name: str, data_dir: Path, tmp_path: Path) -> None:
    path, resolution, num_classes = STORED[name]
    (tmp_path / "source").write_bytes(gzip.decompress((data_dir / path).read_bytes()))
    before = network_file.load(tmp_path / "source")
    run = train(tmp_path / "source", tmp_path, resolution=resolution, num_classes=num_classes)
    (last,) = sorted(run.glob("network-snapshot-*.pkl"))[-1:]
    after = network_file.load(last)
    assert after.G.c_dim == num_classes and after.D is not None
    one, two = state(before.G or before.G_ema), state(after.G)
    assert one.keys() == two.keys() and any(not torch.equal(one[key], two[key]) for key in one)
