"""Snapshots: their networks in our classes with their numbers, and files of ours that say the same again."""

import copy
import gzip
import hashlib
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch

import training.network_pickle as network_pickle
from torch_utils import persistence, pickle_reader
from training import augment, networks, recognise
from training.network_pickle import NetworkFile, PickleError, load, save

BOUND = 5e-6  # the stored float32 itself is 8e-7 from float64; other processors sum in another order
NAMES = ["snapshot_a", "snapshot_b", "snapshot_c_stylegan3repo"]


@pytest.fixture(scope="module")
def local(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small copy of the golden snapshots, unpacked."""
    folder = tmp_path_factory.mktemp("pickles")
    for path in (data_dir / "pickles").glob("*.pkl.gz"):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return folder


@pytest.fixture(scope="module")
def snapshot_b(local: Path) -> NetworkFile:
    return load(local / "snapshot_b.pkl")


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def check_outputs(snapshot: NetworkFile, expected: dict, tag: str) -> None:
    keys = [key for key in expected if key.startswith(f"{tag}/")]
    data = {key.removeprefix(f"{tag}/"): torch.from_numpy(expected[key]) for key in keys}
    z, c = data["z"], data["c"]
    results = {
        "ws": lambda: snapshot.G_ema.mapping(z, c),
        "img_const": lambda: snapshot.G_ema(z, c, noise_mode="const", force_fp32=True),
        "img_none": lambda: snapshot.G_ema(z, c, noise_mode="none", force_fp32=True),
        "img_const_psi0.5_cutoff3": lambda: snapshot.G_ema(
            z, c, truncation_psi=0.5, truncation_cutoff=3, noise_mode="const", force_fp32=True
        ),
        "d_logits": lambda: snapshot.D(data["img_in"], c, force_fp32=True),
    }
    compared = set(results) & set(data)
    assert {"ws", "img_const", "d_logits"} <= compared
    for name in compared:
        helpers.assert_close(results[name](), data[name], BOUND, f"{tag}/{name}")


@pytest.mark.parametrize("name", NAMES)
def test_goldens(name: str, goldens: Path) -> None:
    info = json.loads((goldens / "pickles" / "tensors.json").read_text())[name]
    path = goldens / "pickles" / info["file"]
    snapshot = load(path)
    assert snapshot.sha256 == info["sha256"] and snapshot.path == str(path)
    for net, rows in info["tensors"].items():
        own = state(getattr(snapshot, net))
        assert list(own) == [row[0] for row in rows] or set(own) == {row[0] for row in rows}
        for tensor, shape, dtype, digest in rows:
            assert list(own[tensor].shape) == shape and str(own[tensor].dtype) == f"torch.{dtype}"
            assert hashlib.sha256(own[tensor].numpy().tobytes()).hexdigest() == digest, f"{net}.{tensor}"
    assert snapshot.training_set_kwargs == info["training_set_kwargs"]
    if info["augment_kwargs"] is None:
        assert snapshot.augment_pipe is None
    else:
        assert snapshot.augment_pipe.init_kwargs == info["augment_kwargs"]
        assert float(snapshot.augment_pipe.p) == info["augment_p"]
    for net in (snapshot.G, snapshot.D, snapshot.G_ema):
        assert not any(module.training for module in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())
    with np.load(goldens / "pickles" / "expected.npz", allow_pickle=False) as npz:
        check_outputs(snapshot, dict(npz), name)


@pytest.mark.parametrize("name", NAMES[1:])
def test_local_copies_of_goldens(name: str, local: Path, data_dir: Path) -> None:
    snapshot = load(local / f"{name}.pkl")
    info = json.loads((data_dir / "pickles" / "tensors.json").read_text())[name]
    for net, rows in info["tensors"].items():
        own = state(getattr(snapshot, net))
        for tensor, shape, digest in rows:
            assert list(own[tensor].shape) == shape
            assert hashlib.sha256(own[tensor].numpy().tobytes()).hexdigest().startswith(digest)
    assert snapshot.training_set_kwargs == info["training_set_kwargs"]
    with np.load(data_dir / "pickles" / "expected.npz", allow_pickle=False) as npz:
        check_outputs(snapshot, dict(npz), name)


def test_defaults_of_the_stylegan3_repository(local: Path) -> None:
    """What was not given there means that repository's default: clamp 256, w_avg_beta 0.998, four fp16 resolutions."""
    snapshot = load(local / "snapshot_c_stylegan3repo.pkl")
    given = pickle_reader.survey((local / "snapshot_c_stylegan3repo.pkl").read_bytes()).root["G"].state["_init_kwargs"]
    assert "conv_clamp" not in given and "w_avg_beta" not in given["mapping_kwargs"]
    for G in (snapshot.G, snapshot.G_ema):
        assert G.mapping.w_avg_beta == 0.998 and isinstance(G.init_kwargs.synthesis_kwargs, dict)
        assert [G.synthesis.b16.conv1.conv_clamp, G.synthesis.b4.torgb.conv_clamp] == [256, 256]
        assert [getattr(G.synthesis, f"b{r}").use_fp16 for r in (4, 8, 16)] == [False, True, True]
    assert snapshot.D.b16.conv0.conv_clamp == 256 and snapshot.D.b16.use_fp16


def test_frozen_layers_are_buffers_or_not(snapshot_b: NetworkFile, tmp_path: Path) -> None:
    """Freeze-D: the first layer is a buffer in the file; by name it fits a network where it is trained, and back."""
    assert "b8.fromrgb.weight" in dict(snapshot_b.D.named_buffers())
    record = pickle_reader.survey(_saved(snapshot_b, tmp_path)).root["D"]
    settings, tensors = network_pickle.discriminator_settings(record), network_pickle.module_tensors(record)
    for count in (0, 1, 2):
        changed = {**settings, "block_kwargs": {"freeze_layers": count}}
        D = network_pickle.build(networks.Discriminator, changed, tensors, "D")
        for name, tensor in state(snapshot_b.D).items():
            assert torch.equal(state(D)[name], tensor)


def _saved(snapshot: NetworkFile, folder: Path, **changes) -> bytes:
    keys = ("G", "D", "G_ema", "augment_pipe", "training_set_kwargs")
    save(folder / "saved.pkl", **{key: changes.get(key, getattr(snapshot, key)) for key in keys})
    assert [path.name for path in folder.iterdir()] == ["saved.pkl"], "a partial file stayed"
    return (folder / "saved.pkl").read_bytes()


@pytest.mark.parametrize("name", NAMES[1:])
def test_round_trip_is_exact_and_bytes_repeat(name: str, local: Path, tmp_path: Path) -> None:
    first = load(local / f"{name}.pkl")
    data = _saved(first, tmp_path)
    second = load(tmp_path / "saved.pkl")
    for net in ("G", "D", "G_ema", "augment_pipe"):
        one, two = getattr(first, net), getattr(second, net)
        if one is not None:
            assert one.init_kwargs == two.init_kwargs and type(one) is type(two)
            assert list(state(one)) == list(state(two))
            assert all(torch.equal(a, b) for a, b in zip(state(one).values(), state(two).values()))
    assert first.training_set_kwargs == second.training_set_kwargs
    assert _saved(second, tmp_path) == data and _saved(copy.deepcopy(second), tmp_path) == data


def test_saving_does_not_change_the_networks(snapshot_b: NetworkFile, tmp_path: Path) -> None:
    G = copy.deepcopy(snapshot_b.G).train().requires_grad_(True)
    G.mapping.register_forward_hook(lambda *args: None)
    before = _saved(snapshot_b, tmp_path)
    assert _saved(snapshot_b, tmp_path, G=G) == before, "training mode, gradients and hooks stay outside"
    assert G.training and next(G.parameters()).requires_grad and G.mapping._forward_hooks


def test_positional_arguments_and_numpy_numbers_become_plain(snapshot_b: NetworkFile, tmp_path: Path) -> None:
    synthesis = dict(channel_base=np.int32(32), conv_clamp=np.float64(9))
    G = networks.Generator(np.int64(8), 0, 8, 8, 3, synthesis_kwargs=synthesis)
    assert G.init_args
    _saved(snapshot_b, tmp_path, G=G, augment_pipe=augment.AugmentPipe(xflip=np.float32(0.5)))
    document = pickle_reader.read((tmp_path / "saved.pkl").read_bytes())
    assert not any("numpy" in name for name in document.globals)
    root = document.root
    assert root["G"].state["_init_args"] == () and root["G"].state["_init_kwargs"]["z_dim"] == 8
    assert type(root["G"].state["_init_kwargs"]["synthesis_kwargs"]) is pickle_reader.EasyDictRecord
    assert load(tmp_path / "saved.pkl").augment_pipe.xflip == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_become_float32(snapshot_b: NetworkFile, tmp_path: Path, dtype: torch.dtype) -> None:
    _saved(snapshot_b, tmp_path, G=copy.deepcopy(snapshot_b.G).to(dtype))
    for one, two in zip(snapshot_b.G.parameters(), load(tmp_path / "saved.pkl").G.parameters()):
        assert two.dtype == torch.float32 and torch.equal(one.to(dtype).float(), two)


def test_channels_last(snapshot_b: NetworkFile, tmp_path: Path) -> None:
    torch.manual_seed(0)
    synthesis = dict(channel_base=128, channel_max=8, num_fp16_res=2, fp16_channels_last=True, conv_clamp=256)
    G = networks.Generator(z_dim=8, c_dim=0, w_dim=8, img_resolution=16, img_channels=3, synthesis_kwargs=synthesis)
    assert G.synthesis.b16.conv0.weight.stride()[1] == 1
    _saved(snapshot_b, tmp_path, G=G)
    stock = pickle.loads((tmp_path / "saved.pkl").read_bytes())["G"]
    for twin in (load(tmp_path / "saved.pkl").G, stock):
        for (name, one), two in zip(G.named_parameters(), twin.parameters()):
            assert torch.equal(one, two) and one.stride() == two.stride(), name


def test_strided_and_shared_tensors_are_saved_by_value(snapshot_b: NetworkFile, tmp_path: Path) -> None:
    G = copy.deepcopy(snapshot_b.G)
    wide = torch.randn(2 * G.mapping.w_avg.numel(), generator=torch.Generator().manual_seed(0))
    G.mapping.w_avg = wide[::2]
    _saved(snapshot_b, tmp_path, G=G)
    assert torch.equal(load(tmp_path / "saved.pkl").G.mapping.w_avg, wide[::2])


def test_save_is_atomic(snapshot_b: NetworkFile, tmp_path: Path) -> None:
    before = _saved(snapshot_b, tmp_path)
    with pytest.raises(ValueError, match="cannot go into a snapshot"):
        _saved(snapshot_b, tmp_path, training_set_kwargs={"path": object()})
    with pytest.raises(ValueError, match="persistent"):
        _saved(snapshot_b, tmp_path, D=torch.nn.Linear(1, 1))
    G = copy.deepcopy(snapshot_b.G)
    G.note = object()
    with pytest.raises(ValueError, match="Generator.note"):
        _saved(snapshot_b, tmp_path, G=G)
    assert (tmp_path / "saved.pkl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved.pkl"]


def test_deepcopy_of_our_networks(snapshot_b: NetworkFile) -> None:
    twin = copy.deepcopy(snapshot_b.G_ema)
    assert type(twin) is networks.Generator and twin.init_kwargs == snapshot_b.G_ema.init_kwargs
    z, c = torch.ones(1, 12), torch.zeros(1, 3)
    assert torch.equal(twin(z, c, noise_mode="const"), snapshot_b.G_ema(z, c, noise_mode="const"))


def test_trusted_source_is_executed_and_nothing_else_ever(
    snapshot_b: NetworkFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    text = persistence._source_of_module[networks.__name__]
    changed = text + "\nimport builtins\nbuiltins.executed_text = True\n"
    monkeypatch.setitem(persistence._source_of_module, networks.__name__, changed)
    _saved(snapshot_b, tmp_path)
    monkeypatch.undo()
    path = tmp_path / "saved.pkl"
    z, c = torch.ones(1, 12), torch.zeros(1, 3)
    expected = snapshot_b.G_ema(z, c, noise_mode="const")
    ours = load(path)
    with pytest.raises(ValueError, match="not executed"):
        pickle.loads(path.read_bytes())
    assert type(ours.G) is networks.Generator and not hasattr(builtins, "executed_text")
    try:
        theirs = load(path, trust_source=True)
        assert builtins.executed_text and type(theirs.G) is not networks.Generator
    finally:
        del builtins.executed_text
    for snapshot in (ours, theirs):
        assert torch.equal(snapshot.G_ema(z, c, noise_mode="const"), expected)
    save(tmp_path / "again.pkl", G=theirs.G, D=theirs.D, G_ema=theirs.G_ema)
    assert (tmp_path / "again.pkl").read_bytes().count(b"builtins.executed_text") == 1, "re-saving keeps their source"


def test_trust_does_not_open_the_allow_list(tmp_path: Path, data_dir: Path, local: Path) -> None:
    for path in sorted((data_dir / "pickles" / "malicious").glob("*.pkl")):
        with pytest.raises(PickleError):
            load(path, trust_source=True)
    with pytest.raises(PickleError, match="must not be executed"):  # the poison line of the goldens
        load(local / "snapshot_b.pkl", trust_source=True)


EDITS = {
    "no G_ema": (lambda root: root.pop("G_ema"), "no G_ema"),
    "G_ema is None": (lambda root: root.update(G_ema=None), "G_ema is a NoneType"),
    "G is a dict": (lambda root: root.update(G={}), "G is a dict"),
    "swapped": (lambda root: root.update(G=root["D"]), "wanted 'Generator'"),
    "pipe is a network": (lambda root: root.update(augment_pipe=root["D"]), "wanted an AugmentPipe"),
    "data set is a list": (lambda root: root.update(training_set_kwargs=[1]), "wanted a dict"),
    "deep data set": (lambda root: root.update(training_set_kwargs={"x": _nested(40)}), "deeper"),
    "version": (lambda root: root["G"].meta.update(version=5), "version"),
    "no tensor": (lambda root: root["G"].table("_modules")["mapping"].table("_buffers").pop("w_avg"), "lacks"),
    "tensor more": (lambda root: root["G"].table("_buffers").update(x=_some_tensor(root)), "unknown tensor"),
    "no tensor at all": (lambda root: root["G"].table("_parameters").update(x=3), "wanted a tensor"),
    "a module is a list": (lambda root: root["G"].table("_modules").update(x=[]), "module"),
    "endless modules": (lambda root: root["G"].table("_modules").update(x=root["G"]), "larger or deeper"),
    "resolution": (lambda root: root["G"].state["_init_kwargs"].update(img_resolution=16), "lacks"),
    "width": (lambda root: root["G"].state["_init_kwargs"].update(w_dim=15), "shape"),
    "odd resolution": (lambda root: root["G"].state["_init_kwargs"].update(img_resolution=9), "power of two"),
    "huge resolution": (lambda root: root["G"].state["_init_kwargs"].update(img_resolution=2**40), "over the limit"),
    "huge width": (lambda root: root["G"].state["_init_kwargs"].update(w_dim=2**20), "more numbers than"),
    "layers": (lambda root: root["G"].state["_init_kwargs"]["mapping_kwargs"].update(num_layers=99), "over the limit"),
    "unknown setting": (lambda root: root["D"].state["_init_kwargs"].update(depth=3), "depth"),
    "setting is a tensor": (lambda root: root["D"].state["_init_kwargs"].update(c_dim=_some_tensor(root)), "tensor"),
    "kwargs are text": (lambda root: root["D"].state.update(_init_kwargs="x"), "usual form"),
    "not a number": (lambda root: root["D"].state["_init_kwargs"].update(channel_base=float("nan")), "over the limit"),
    "division by zero": (lambda root: root["G"].state["_init_kwargs"].update(w_dim=0), "G"),
}


def _nested(depth: int) -> list:
    return [] if depth == 0 else [_nested(depth - 1)]


def _some_tensor(root: dict):
    return root["G"].table("_modules")["mapping"].table("_buffers")["w_avg"]


@pytest.mark.parametrize("name", EDITS)
def test_files_that_are_no_snapshots(name: str, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, words = EDITS[name]
    document = pickle_reader.survey((local / "snapshot_b.pkl").read_bytes())
    edit(document.root)
    monkeypatch.setattr(pickle_reader, "survey", lambda data: document)
    with pytest.raises(PickleError) as refusal:
        load(local / "snapshot_b.pkl")
    message = str(refusal.value)
    assert words in message and message.isprintable() and len(message) < 600
    assert message.startswith(f"{local / 'snapshot_b.pkl'}: ")


def test_few_stored_numbers_do_not_fill_many_tensors(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One storage behind all weights would let a small file ask for much memory."""
    document = pickle_reader.survey((local / "snapshot_b.pkl").read_bytes())
    tensors = network_pickle.module_tensors(document.root["G"])
    largest = max((t.storage for t in tensors.values()), key=lambda s: s.numel)
    for tensor in tensors.values():
        tensor.storage = largest
    monkeypatch.setattr(pickle_reader, "survey", lambda data: document)
    with pytest.raises(PickleError, match="far more numbers than the file stores"):
        load(local / "snapshot_b.pkl")


def test_forks_settings_without_effect(local: Path, monkeypatch: pytest.MonkeyPatch, snapshot_b: NetworkFile) -> None:
    document = pickle_reader.survey((local / "snapshot_b.pkl").read_bytes())
    for key in ("G", "G_ema"):
        document.root[key].state["_init_kwargs"]["epochs"] = 3
        document.root[key].state["_init_kwargs"]["mapping_kwargs"]["freeze_layers"] = 2
    monkeypatch.setattr(pickle_reader, "survey", lambda data: document)
    loaded = load(local / "snapshot_b.pkl")
    assert loaded.G.init_kwargs == snapshot_b.G.init_kwargs


def _record(children: dict, class_name: str = "Generator") -> pickle_reader.PersistentRecord:
    return pickle_reader.PersistentRecord({"class_name": class_name, "state": {"_modules": children}})


FOREIGN = {
    "stylegan3": {"G_ema": _record({"synthesis": _record({"input": _record({})}), "mapping": _record({})})},
    "stylegan-xl": {"G": _record({"synthesis": _record({"input": None}), "mapping": _record({"embed_proj": None})})},
    "unknown": {"G_ema": 3},
}


@pytest.mark.parametrize("code", FOREIGN)
def test_foreign_formats_are_named(code: str) -> None:
    assert recognise.identify(SimpleNamespace(root=FOREIGN[code], container="pickle", globals={}))[0] == code


TORCH_FILES = {
    "rosinality": ({"g_ema": {"input.input": torch.zeros(1)}, "latent_avg": torch.zeros(2)}, "rosinality stylegan2"),
    "swagan-rosinality": ({"g_ema": {"input.input": torch.zeros(1), "iwt.ll": torch.zeros(1)}}, "SWAGAN"),
    "lucidrains": ({"GAN": {}, "version": "1.8"}, "lucidrains"),
    "stylegan1-rosinality": ({"generator": {}, "discriminator": {}, "g_running": {}}, "StyleGAN1"),
    "torch": ([torch.zeros(2)], "torch.save"),
}


@pytest.mark.parametrize("code", TORCH_FILES)
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_other_code_are_named(code: str, zipped: bool, tmp_path: Path) -> None:
    content, words = TORCH_FILES[code]
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    assert recognise.identify(pickle_reader.survey(buffer.getvalue()))[0] == code
    (tmp_path / "other.pt").write_bytes(buffer.getvalue())
    with pytest.raises(PickleError, match=f"other.pt: this is .*{words}.*wanted a StyleGAN2-ADA snapshot"):
        load(tmp_path / "other.pt")


def test_tensorflow_pickles_are_named(goldens: Path) -> None:
    with pytest.raises(PickleError, match="TensorFlow StyleGAN2 pickle, wanted a .* snapshot") as refusal:
        load(goldens / "legacy_tf.pkl")
    assert str(refusal.value).isprintable()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        load(tmp_path / "absent.pkl")


def test_file_name_with_a_line_break_stays_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\nb.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(PickleError) as refusal:
        load(tmp_path / "a\nb.pkl")
    assert str(refusal.value).isprintable()


def test_loading_leaves_the_random_streams_alone(local: Path) -> None:
    before = torch.get_rng_state()
    load(local / "snapshot_b.pkl")
    assert torch.equal(before, torch.get_rng_state())
