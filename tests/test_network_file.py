"""The door for network files: every format with its numbers, the foreign ones by name, damage in one line."""

import gzip
import io
import json
import pickle
from pathlib import Path
from typing import Any

import foreign_files
import helpers
import numpy as np
import pytest
import torch
from foreign_files import latents, make_pair, state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stylegan_rooted.inspect import inspect_file
from torch_utils import pickle_reader
from torch_utils.pickle_reader import PickleError
from training import network_file, network_pickle, rosinality, state_dict, weights_file
from training.augment import AugmentPipe

BOUND = 5e-6  # relative, images and logits against recorded numbers
ROS_FILES = ["ros-train-args", "ros-converted", "ros-gonly-legacyzip"]
REFUSED = {
    "lucidrains.pt": "lucidrains",
    "r3gan.pkl": "R3GAN",
    "stylegan-xl.pkl": "StyleGAN-XL",
    "stylegan1-tf.pkl": "StyleGAN1",
    "stylegan3-r.pkl": "StyleGAN3",
    "stylegan3-t.pkl": "StyleGAN3",
    "swagan.pt": "SWAGAN",
}


@pytest.fixture(scope="module")
def local(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small copy of the golden files of other code bases, unpacked."""
    folder = tmp_path_factory.mktemp("other")
    for path in (data_dir / "other").rglob("*.gz"):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return folder


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    a, b = state(one), state(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def torch_file(content: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def parse(data: bytes, folder: Path) -> network_pickle.NetworkFile:
    (folder / "a name says nothing.xyz").write_bytes(data)
    return network_file.load(folder / "a name says nothing.xyz")


# rosinality


def check_rosinality(path: Path, expected: dict[str, np.ndarray]) -> None:
    found = network_file.load(path)
    assert found.kind == "rosinality"
    G: Any = found.G_ema
    z = torch.from_numpy(expected["z"])
    ws = G.mapping(z, None)
    helpers.assert_close(ws[:, 0], expected["w"], BOUND, "w")
    helpers.assert_close(G.synthesis(ws, noise_mode="const"), expected["image_const"], BOUND, "image_const")
    helpers.assert_close(G.synthesis(ws, noise_mode="none"), expected["image_nonoise"], BOUND, "image_nonoise")
    wplus = torch.from_numpy(expected["wplus"])
    helpers.assert_close(G.synthesis(wplus, noise_mode="const"), expected["image_wplus"], BOUND, "image_wplus")
    if "mean_z" in expected:
        assert found.notes == ("no w average in the file, estimated from 10000 latents (seed 0)",)
        mean_w = G.mapping(torch.from_numpy(expected["mean_z"]), None)[:, 0].mean(dim=0)
        helpers.assert_close(mean_w, expected["mean_w"], BOUND, "mean_w")
        G.mapping.w_avg.copy_(torch.from_numpy(expected["mean_w"]))
    else:
        assert found.notes == ()
    image = G(z, None, truncation_psi=float(expected["psi"]), noise_mode="const")
    helpers.assert_close(image, expected["image_trunc"], BOUND, "image_trunc")
    if "d_in_int8" in expected:
        D: Any = found.D
        x = torch.from_numpy(expected["d_in_int8"].astype(np.float32) / 127)
        for key, num in (("d_logits_8", 8), ("d_logits_first3", 3), ("d_logits_first1", 1)):
            helpers.assert_close(D(x[:num], None), expected[key], BOUND, key)
    for key, value in expected.items():
        if key.startswith("nv/"):
            _, net, name = key.split("/", 2)
            assert np.array_equal(state(getattr(found, net))[name].numpy(), value), key


@pytest.mark.parametrize("name", ROS_FILES)
def test_rosinality_goldens(name: str, goldens: Path) -> None:
    with np.load(goldens / "other" / f"{name}.expected.npz", allow_pickle=False) as npz:
        expected = dict(npz)
        if "mean_z" not in expected and name == "ros-train-args":
            pytest.fail("the training file has no w average")
        check_rosinality(goldens / "other" / f"{name}.pt", expected)


def test_rosinality_local_copy(local: Path, data_dir: Path) -> None:
    with np.load(data_dir / "other" / "ros-gonly-legacyzip.expected.npz", allow_pickle=False) as npz:
        check_rosinality(local / "ros-gonly-legacyzip.pt", dict(npz))
    found = network_file.load(local / "ros-gonly-legacyzip.pt")
    assert found.D is None and found.G is None and found.training_set_kwargs is None


# TensorFlow


def check_tensorflow(path: Path, expected: dict[str, np.ndarray]) -> None:
    found = network_file.load(path)
    assert found.kind == "legacy-tf" and found.notes == ()
    G, D = found.G_ema, found.D
    z, c = torch.from_numpy(expected["z"]), torch.from_numpy(expected["c"])
    helpers.assert_close(G.mapping(z, c), expected["ws"], BOUND, "ws")
    helpers.assert_close(G(z, c, noise_mode="const"), expected["img_const"], BOUND, "img_const")
    helpers.assert_close(G(z, c, noise_mode="none"), expected["img_none"], BOUND, "img_none")
    image = G(z, c, truncation_psi=0.5, noise_mode="const")
    helpers.assert_close(image, expected["img_const_psi0.5"], BOUND, "img_const_psi0.5")
    helpers.assert_close(D(torch.from_numpy(expected["img_in"]), c), expected["d_logits"], BOUND, "d_logits")
    for key, value in expected.items():
        net, _, name = key.partition("/")
        if name:
            assert np.array_equal(state(getattr(found, net))[name].numpy(), value), key


def test_tensorflow_golden(goldens: Path) -> None:
    with np.load(goldens / "legacy_tf_expected.npz", allow_pickle=False) as npz:
        expected = dict(npz)
        meta = json.loads(str(expected.pop("meta")))
        check_tensorflow(goldens / "legacy_tf.pkl", expected)
    found = network_file.load(goldens / "legacy_tf.pkl")
    for net, key in ((found.G_ema, "G_ema_init_kwargs"), (found.D, "D_init_kwargs")):
        check_agree(network_pickle.keyword_settings(net), meta[key])


def check_agree(ours: dict, original: dict) -> None:
    """What is set here is what the original's converter sets."""
    for key, value in ours.items():
        check_agree(value, original[key]) if isinstance(value, dict) else None
        assert isinstance(value, dict) or value == original[key], key


def test_tensorflow_local_copy(local: Path, data_dir: Path) -> None:
    with np.load(data_dir / "other" / "legacy_tf_expected.npz", allow_pickle=False) as npz:
        check_tensorflow(local / "legacy_tf.pkl", dict(npz))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_tensorflow_round_trip(architecture: str, c_dim: int, protocol: int, tmp_path: Path) -> None:
    """The written file holds our numbers under TensorFlow's names; reading it gives them back, rounded only by +1."""
    nets = make_pair(16, c_dim, synthesis={"architecture": architecture}, discriminator={"architecture": architecture})
    data = foreign_files.tensorflow_pickle(nets, protocol=protocol, old_numpy=protocol < 4)
    found = parse(data, tmp_path)
    for key, net in nets.items():
        ours = state(getattr(found, key))
        assert ours.keys() == state(net).keys()
        for name, tensor in state(net).items():
            exact = not name.endswith("affine.bias")
            assert torch.equal(ours[name], tensor) if exact else torch.allclose(ours[name], tensor, atol=1e-6), name
    z, c = latents(nets["G_ema"])
    helpers.assert_close(
        found.G_ema(z, c, noise_mode="const"), nets["G_ema"](z, c, noise_mode="const"), BOUND, architecture
    )


def test_tensorflow_moving_average_alone(tmp_path: Path) -> None:
    nets = make_pair(8)
    found = parse(
        foreign_files.tensorflow_pickle(nets, edit=lambda records: records.__delitem__(slice(0, 2))), tmp_path
    )
    assert found.G is None and found.D is None and found.G_ema.img_resolution == 8


def test_tensorflow_discriminator_of_growing_training(tmp_path: Path) -> None:
    """FromRGB_lod{n} is the layer of resolution R / 2^n; there is none at other resolutions."""
    nets = make_pair(16, discriminator={"architecture": "orig"})

    def rename(records: list) -> None:
        D = records[1]
        del D.static_kwargs["architecture"]
        D.variables = [(name.replace("16x16/FromRGB", "FromRGB_lod0"), value) for name, value in D.variables]

    found = parse(foreign_files.tensorflow_pickle(nets, edit=rename), tmp_path)
    assert same(found.D, nets["D"]) and found.D.b16.architecture == "orig"


TF_EDITS = {
    "lacks 'mapping.w_avg'": lambda records: records[2].variables.clear(),
    "lacks 'b8.conv0.weight'": lambda records: records[1].variables.pop(
        [name for name, _ in records[1].variables].index("8x8/Conv0/weight")
    ),
    "fused_scale": lambda records: records[0].static_kwargs.update(fused_scale=True),
    "version 3": lambda records: [setattr(record, "version", 3) for record in records],
    "of version 'x'": lambda records: setattr(records[2], "version", "x"),
    "wanted the networks": lambda records: records.append(records[0]),
    "is a NoneType": lambda records: records.__setitem__(1, None),
    "unexpected shape": lambda records: records[2].components["synthesis"].variables.append(("noise0", np.ones(3))),
    "wanted an array": lambda records: records[1].variables.append(("Output/weight", "x")),
    "has shape": lambda records: records[0].static_kwargs.update(dlatent_size=13),
    "over the limit": lambda records: records[0].static_kwargs.update(resolution=2**30),
    "without a name": lambda records: records[1].variables.append(3),
    "no list of variables": lambda records: setattr(records[1], "variables", None),
    "is no network": lambda records: records[2].components.update(x=3),
    "on the allow-list": lambda records: records[1].variables.append(("x", Path("x"))),
    "make no Generator": lambda records: records[0].static_kwargs.update(fmap_base="x"),
}


@pytest.mark.parametrize("words", TF_EDITS)
def test_tensorflow_files_that_are_refused(words: str, tmp_path: Path) -> None:
    with pytest.raises(PickleError) as refusal:
        parse(foreign_files.tensorflow_pickle(make_pair(8), edit=TF_EDITS[words]), tmp_path)
    message = str(refusal.value)
    assert words in message and message.isprintable() and len(message) < 700, message


# Foreign formats


def check_refusal(path: Path) -> None:
    with pytest.raises(PickleError) as refusal:
        network_file.load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: this is a") and "is not supported: " in message
    assert REFUSED[path.name] in message and message.isprintable() and len(message) < 500


@pytest.mark.parametrize("name", REFUSED)
def test_foreign_formats_are_refused_by_name(name: str, local: Path) -> None:
    check_refusal(local / name)


def test_golden_foreign_formats(goldens: Path) -> None:
    paths = sorted((goldens / "other" / "refuse").iterdir())
    assert {path.name for path in paths} == set(REFUSED)
    for path in paths:
        check_refusal(path)


@pytest.mark.parametrize(
    "content, words",
    [
        ({"synthesis.input.freqs": torch.zeros(2)}, "StyleGAN3"),
        ({"synthesis.input.freqs": torch.zeros(2), "mapping.embed_proj.weight": torch.zeros(2)}, "StyleGAN-XL"),
        ({"generator.progression.0.weight": torch.zeros(2)}, "StyleGAN1"),
        ({"G_ema": {"synthesis.input.freqs": torch.zeros(2)}}, "StyleGAN3"),
        ({"weight": torch.zeros(2)}, "without StyleGAN2 networks"),
        ([torch.zeros(2)], "without StyleGAN2 networks"),
        ({"d": {"final_linear.1.weight": torch.zeros(1, 2)}}, "resolutions|lacks"),
        ({"b4.out.weight": torch.zeros(1, 2)}, "resolutions|lacks"),
        ({"g_ema": {"input.input": torch.zeros(1, 2, 4, 4), "extra": torch.zeros(1)}}, "has no 'extra'"),
        ({"g_ema": {"input.input": torch.zeros(2)}}, "has shape"),
        ({"g_ema": {"input.input": 3}}, "wanted a tensor"),
        ({"g_ema": {"synthesis.b4.const": torch.zeros(2, 4, 4)}}, "lacks|resolutions"),
    ],
)
def test_torch_files_that_are_refused(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(PickleError, match=words) as refusal:
        parse(torch_file(content), tmp_path)
    assert str(refusal.value).isprintable()


def test_widths_that_our_networks_cannot_have(goldens: Path, tmp_path: Path) -> None:
    """rosinality's channel_multiplier 3 and more: 512 up to 32 pixels, then more than half of it."""
    with pytest.raises(PickleError, match="no channel base and maximum"):
        state_dict.fit_channels({4: 512, 8: 512, 16: 512, 32: 512, 64: 768, 128: 384}, "G")
    assert state_dict.fit_channels({4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256}, "G") == (32768, 512)
    assert state_dict.fit_channels({4: 12, 8: 12}, "G") == (96, 12)


# State dicts


def full_state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state(net).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("c_dim, architecture", [(0, "skip"), (3, "resnet"), (0, "orig")])
def test_state_dicts(c_dim: int, architecture: str, zipped: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    nets = make_pair(
        16,
        c_dim,
        mapping={"embed_features": 7, "layer_features": 9} if c_dim else {},
        synthesis={"architecture": architecture, "resample_filter": [1, 2, 1]},
        discriminator={"architecture": architecture, "block_kwargs": {"resample_filter": [1, 2, 1]}},
        z_dim=10,
    )
    content = {key: {name: t.to(dtype) for name, t in full_state(net).items()} for key, net in nets.items()}
    found = parse(torch_file(content, zipped=zipped), tmp_path)
    assert found.kind == "state-dict" and len(found.notes) == 3 and all("assumed" in note for note in found.notes)
    for key, net in nets.items():
        assert same(getattr(found, key), net.to(dtype).float()), key
    z, c = latents(nets["G_ema"])
    assert torch.equal(found.G_ema(z, c, noise_mode="const"), nets["G_ema"](z, c, noise_mode="const"))
    x = torch.randn([4, 3, 16, 16])
    c = torch.eye(3)[[0, 1, 2, 0]] if c_dim else torch.zeros([4, 0])
    assert torch.equal(found.D(x, c), nets["D"](x, c))


def test_state_dicts_in_other_arrangements(tmp_path: Path) -> None:
    G = make_pair(8)["G_ema"]
    flat = full_state(G)
    for content in (
        flat,
        {"g_ema": flat},
        {"G": flat},
        {"G_ema": flat, "step": 3},
        {f"G_ema.{name}": tensor for name, tensor in flat.items()},
    ):
        found = parse(torch_file(content), tmp_path)
        assert same(found.G_ema, G) and found.G is None and found.D is None
    assert "no moving average" in " ".join(parse(torch_file({"G": flat}), tmp_path).notes)


def test_missing_buffers_are_estimated_or_drawn(tmp_path: Path) -> None:
    G: Any = make_pair(8, 2)["G_ema"]
    flat = {name: t for name, t in full_state(G).items() if name.rpartition(".")[2] not in ("w_avg", "noise_const")}
    flat = {name: tensor for name, tensor in flat.items() if not name.endswith("resample_filter")}
    found = parse(torch_file(flat), tmp_path)
    assert [note.split(",")[0] for note in found.notes[1:]] == [
        "no noise maps in the file",
        "no w average in the file",
    ]
    again = parse(torch_file(flat), tmp_path)
    assert same(found.G_ema, again.G_ema), "seeded"
    assert torch.equal(found.G_ema.synthesis.b8.resample_filter, G.synthesis.b8.resample_filter)
    z = torch.randn([40_000, 12], generator=torch.Generator().manual_seed(5))
    w = G.mapping(z, torch.eye(2)[torch.arange(40_000) % 2])[:, 0]
    error = (found.G_ema.mapping.w_avg - w.mean(dim=0)).abs() / w.std(dim=0)
    assert error.max() < 5 / np.sqrt(10_000), "the standard error of the mean of 10000, five times"


@pytest.mark.parametrize("zipped", [True, False])
def test_many_views_of_one_storage_do_not_fill_the_memory(zipped: bool, tmp_path: Path) -> None:
    nets = make_pair(16)
    flat = full_state(nets["G_ema"])
    shared = torch.zeros(max(tensor.numel() for tensor in flat.values()))
    content = {name: shared[: tensor.numel()].view(tensor.shape) for name, tensor in flat.items()}
    with pytest.raises(PickleError, match="far more numbers than the file stores"):
        parse(torch_file(content, zipped=zipped), tmp_path)


# Snapshots of all protocols and precisions


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_snapshots_resaved_by_the_stock_pickler(protocol: int, dtype: torch.dtype, tmp_path: Path) -> None:
    nets = {key: net.to(dtype) for key, net in make_pair(8, 2).items()}
    root = {**nets, "augment_pipe": None, "training_set_kwargs": {"path": "x"}, "note": "a fork's own entry"}
    found = parse(pickle.dumps(root, protocol=protocol), tmp_path)
    assert found.kind == "snapshot" and found.notes == () and found.training_set_kwargs == {"path": "x"}
    for key, net in nets.items():
        assert same(getattr(found, key), net.float())


def test_snapshot_without_discriminator(tmp_path: Path) -> None:
    G = make_pair(8)["G_ema"]
    found = parse(pickle.dumps({"G_ema": G}), tmp_path)
    assert found.kind == "snapshot" and same(found.G_ema, G) and found.G is None and found.D is None


# Our own files


def test_weights_file_round_trip(tmp_path: Path) -> None:
    nets = make_pair(8, 2, synthesis={"num_fp16_res": 1, "conv_clamp": 64})
    pipe = AugmentPipe(xflip=1, imgfilter_bands=[1, 1, 0, 1])
    pipe.p.fill_(0.25)
    about = {"training": {"kimg": 3.5}, "licences": {"weights": "CC0-1.0"}, "training_set_kwargs": {"path": "x.zip"}}
    config = weights_file.save(tmp_path / "a.safetensors", **nets, augment_pipe=pipe, about=about)
    found = network_file.load(tmp_path / "a.safetensors")
    assert found.kind == "safetensors" and found.config == config and found.notes == ()
    assert found.training_set_kwargs == {"path": "x.zip"} and config["licences"] == {"weights": "CC0-1.0"}
    for key, net in nets.items():
        assert same(getattr(found, key), net) and getattr(found, key).init_kwargs == net.init_kwargs
    assert float(found.augment_pipe.p) == 0.25 and found.augment_pipe.imgfilter_bands == [1, 1, 0, 1]
    weights_file.save(tmp_path / "b.safetensors", **nets, augment_pipe=pipe, about=about)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_inference_file(dtype: str, tmp_path: Path) -> None:
    G = make_pair(8)["G_ema"]
    weights_file.save(tmp_path / "g.safetensors", G_ema=G, dtype=dtype)
    found = network_file.load(tmp_path / "g.safetensors")
    assert found.G is None and found.D is None
    rounded = {name: tensor.to(getattr(torch, dtype)).float() for name, tensor in state(G).items()}
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in state(found.G_ema).items())
    assert next(found.G_ema.parameters()).dtype == torch.float32


def test_folder_and_config_beside(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    G = make_pair(8, mapping={"lr_multiplier": 0.5})["G_ema"]
    config = weights_file.save(tmp_path / "model.safetensors", G_ema=G)
    assert same(network_file.load(tmp_path).G_ema, G)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")  # drops the header's config
    bare = network_file.load(tmp_path)
    assert bare.G_ema.mapping.fc0.weight_gain != G.mapping.fc0.weight_gain and "assumed" in bare.notes[0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert network_file.load(tmp_path).G_ema.init_kwargs == G.init_kwargs
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="a folder without model.safetensors"):
        network_file.load(tmp_path)


def test_safetensors_with_other_names(tmp_path: Path, local: Path) -> None:
    from safetensors.torch import save

    ros = pickle_reader.survey((local / "ros-gonly-legacyzip.pt").read_bytes()).root
    tensors = {name: record.tensor().contiguous() for name, record in ros["g_ema"].items()}
    found = parse(save(tensors), tmp_path)
    reference = network_file.load(local / "ros-gonly-legacyzip.pt")
    assert found.kind == "safetensors" and "no w average" in found.notes[0]
    found.G_ema.mapping.w_avg.copy_(reference.G_ema.mapping.w_avg)
    assert same(found.G_ema, reference.G_ema)
    with pytest.raises(PickleError, match="StyleGAN3"):
        parse(save({"synthesis.input.freqs": torch.zeros(2)}), tmp_path)
    with pytest.raises(PickleError, match="not those of StyleGAN2"):
        parse(save({"x": torch.zeros(2)}), tmp_path)


def _rewritten(data: bytes, edit: Any) -> bytes:
    """A safetensors file with another header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    config = json.loads(header["__metadata__"]["config"])
    edit(header, config)
    if "__metadata__" in header and "config" in header["__metadata__"]:
        header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


SAFE_EDITS = {
    "describes no networks": lambda header, config: config.update(networks={}),
    "has no G_ema": lambda header, config: config.update(networks={"D": config["networks"]["D"]}),
    "not a JSON object": lambda header, config: config["networks"].update(G=3),
    "over the limit": lambda header, config: config["networks"]["G_ema"].update(img_resolution=2**40),
    "more numbers than": lambda header, config: config["networks"]["G_ema"].update(w_dim=2**20),
    "has shape": lambda header, config: config["networks"]["G_ema"].update(z_dim=13),
    "lacks": lambda header, config: config["networks"]["G_ema"].update(img_resolution=16),
    "damaged safetensors": lambda header, config: header["G_ema.mapping.w_avg"].update(data_offsets=[0, 4]),
    "activation 'eval' is unknown": lambda header, config: config["networks"]["G_ema"]["mapping_kwargs"].update(
        activation="eval"
    ),
    "activation ['lrelu'] is unknown": lambda header, config: config["networks"]["D"]["epilogue_kwargs"].update(
        activation=["lrelu"]
    ),
    "is torch.int64": lambda header, config: header["G_ema.mapping.w_avg"].update(dtype="I64", shape=[6]),
}


@pytest.mark.parametrize("words", SAFE_EDITS)
def test_our_files_with_an_edited_header(words: str, tmp_path: Path) -> None:
    weights_file.save(tmp_path / "a.safetensors", **make_pair(8))
    with pytest.raises(PickleError) as refusal:
        parse(_rewritten((tmp_path / "a.safetensors").read_bytes(), SAFE_EDITS[words]), tmp_path)
    message = str(refusal.value)
    assert (words in message or words == "is torch.int64") and message.isprintable() and len(message) < 700, message


def test_damaged_and_unlike_files(tmp_path: Path) -> None:
    weights_file.save(tmp_path / "a.safetensors", G_ema=make_pair(8)["G_ema"])
    data = (tmp_path / "a.safetensors").read_bytes()
    for broken in (data[:-1], data[: len(data) // 2], data[:20], data + b"x", b"", b"{}", bytes(9), data[8:]):
        with pytest.raises(PickleError) as refusal:
            parse(broken, tmp_path)
        assert str(refusal.value).isprintable()


def test_networks_that_do_not_belong_together(tmp_path: Path) -> None:
    nets = make_pair(8)
    nets["D"] = make_pair(16)["D"]
    weights_file.save(tmp_path / "a.safetensors", **nets)
    with pytest.raises(PickleError, match="img_resolution of D is 16, of G_ema 8"):
        network_file.load(tmp_path / "a.safetensors")
    report = inspect_file(tmp_path / "a.safetensors")
    assert not report.loads and "img_resolution of D is 16" in (report.problem or ""), "inspect says what load does"


def test_what_a_weights_file_cannot_hold(tmp_path: Path) -> None:
    G = make_pair(8)["G_ema"]
    for about, words in (({"networks": 3}, "networks"), ({"x": object()}, "plain"), ({"x": float("nan")}, "plain")):
        with pytest.raises(ValueError, match=words):
            weights_file.save(tmp_path / "a.safetensors", G_ema=G, about=about)
    with pytest.raises(ValueError, match="dtype"):
        weights_file.save(tmp_path / "a.safetensors", G_ema=G, dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_loading_leaves_the_random_streams_alone(tmp_path: Path) -> None:
    flat = full_state(make_pair(8)["G_ema"])
    del flat["mapping.w_avg"]
    before = torch.get_rng_state()
    parse(torch_file(flat), tmp_path)
    assert torch.equal(before, torch.get_rng_state())


# Damage


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small file of every format beside the snapshot's, whose damage tests/test_pickle_contract.py sees to."""
    width = {"channel_base": 32, "channel_max": 4}
    nets = make_pair(8, synthesis=width, discriminator=width, z_dim=4, w_dim=4)
    path = tmp_path_factory.mktemp("small") / "x"
    rosinality.save(path, **nets, any_channels=True)
    files = {"rosinality": path.read_bytes()}
    files["rosinality, old container"] = torch_file(torch.load(path, weights_only=True), zipped=False)
    weights_file.save(path, **nets)
    files["safetensors"] = path.read_bytes()
    files["TensorFlow"] = foreign_files.tensorflow_pickle(nets)
    files["TensorFlow, protocol 5"] = foreign_files.tensorflow_pickle(nets, protocol=5)
    files["state dict"] = torch_file({key: full_state(net) for key, net in nets.items()})
    return files


@settings(max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    which=st.integers(0, 5),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4), st.integers(0, 40)), max_size=3),
)
def test_damaged_files_load_or_are_refused_in_one_line(small_files: dict, which: int, changes: list) -> None:
    data = list(small_files.values())[which]
    for place, piece, cut in changes:
        at = int(place * (len(data) - 1))
        data = data[:at] + piece + data[at + cut :]
    try:
        found = network_file.parse(data)
        assert type(found["G_ema"]).__name__ == "Generator"
    except PickleError as error:
        assert str(error).isprintable() and len(str(error)) < 700
    assert changes or found["kind"]
