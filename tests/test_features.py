"""Extractors: the embedded network's promises, Inception's plumbing through clean-fid; streaming statistics; cache."""

import hashlib
import importlib.util
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import assert_close

import dnnlib.util
from metrics import features
from metrics.feature_net import (
    LAYERS,
    NUM_FEATURES,
    expected_shapes,
    load_feature_net,
    prepare_images,
    save_feature_net,
)
from metrics.feature_stats import FeatureStats, Source, accumulate, dataset_stats
from metrics.features import MetricUnavailable, cleanfid_module, find_inception, get_extractor, weights_file

ASSETS = Path(__file__).resolve().parent.parent / "stylegan_rooted" / "assets"
WEIGHTS = ASSETS / "feature-net.npz"


@pytest.fixture(scope="module")
def embedded():
    return get_extractor("embedded", detector=WEIGHTS)


def pictures(num: int, seed: int, size: int = 40) -> torch.Tensor:
    """Coloured discs and boxes on white, uint8 [num, 3, size, size]."""
    rng = np.random.RandomState(seed)
    axis = np.arange(size) + 0.5
    out = np.full((num, 3, size, size), 255, np.uint8)
    for image in out:
        for _ in range(rng.randint(1, 4)):
            x, y, r = rng.uniform(0.2, 0.8, 2).tolist() + [rng.uniform(0.1, 0.35)]
            dx, dy = np.abs(axis[None] / size - x), np.abs(axis[:, None] / size - y)
            inside = (dx**2 + dy**2 < r * r) if rng.rand() < 0.5 else (np.maximum(dx, dy) < r)
            image[:, inside] = rng.randint(0, 256, (3, 1))
    return torch.from_numpy(out)


# --- the embedded network


def test_card_and_size(embedded):
    data = WEIGHTS.read_bytes()
    card = (ASSETS / "feature-net.md").read_text()
    assert len(data) <= 2 * 2**20
    assert embedded.digest == hashlib.sha256(data).hexdigest() and embedded.digest in card
    assert embedded.headline == "FD" and embedded.num_features == NUM_FEATURES == 96


def test_features_do_not_depend_on_the_batch(embedded):
    images = pictures(23, 0)
    whole = embedded(images)
    assert whole.shape == (23, 96) and whole.dtype == torch.float32
    for size in (1, 2, 5, 16):
        assert_close(torch.cat([embedded(part) for part in images.split(size)]), whole, 1e-5, f"batches of {size}")
    assert torch.equal(embedded(images), whole)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    assert_close(embedded(images[order]), whole[order], 1e-5, "order")


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (32, 32), (33, 47), (64, 64), (300, 200)])
def test_any_resolution_and_grey(embedded, size):
    grey = torch.randint(0, 256, (2, 1, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(embedded(grey)).all()
    assert torch.equal(embedded(grey), embedded(grey.repeat(1, 3, 1, 1)))


def test_resize_keeps_means_and_constant_images():
    big = pictures(3, 2, 128)
    small = prepare_images(big)
    assert small.shape == (3, 3, 32, 32) and small.abs().max() <= 1 + 1e-6
    assert torch.allclose(small.mean(dim=(2, 3)), (big.float() / 127.5 - 1).mean(dim=(2, 3)), atol=0.01)
    assert torch.allclose(prepare_images(torch.full((1, 3, 50, 70), 255)), torch.ones(1, 3, 32, 32), atol=1e-6)


def test_refuses_other_shapes(embedded):
    with pytest.raises(ValueError, match="wanted"):
        embedded(torch.zeros(2, 4, 32, 32, dtype=torch.uint8))


def test_written_files_are_read_back_and_damaged_ones_refused(tmp_path):
    rng = np.random.RandomState(0)
    weights = {name: rng.randn(*shape).astype(np.float32) for name, shape in expected_shapes().items()}
    digest = save_feature_net(tmp_path / "a.npz", weights)
    assert save_feature_net(tmp_path / "b.npz", weights) == digest
    net = load_feature_net(tmp_path / "a.npz")
    assert net.digest == digest and all(np.array_equal(net.weights[k].numpy(), v) for k, v in weights.items())
    good = (tmp_path / "a.npz").read_bytes()
    buffer = io.BytesIO()
    np.savez(buffer, **{k: v for k, v in weights.items() if k != "scale"})
    for damaged in (good[:-3000], good[:2000] + b"x" + good[2001:], b"", b"not a zip", buffer.getvalue()):
        (tmp_path / "bad.npz").write_bytes(damaged)
        with pytest.raises(MetricUnavailable, match="cannot read the embedded feature network"):
            get_extractor("embedded", detector=tmp_path / "bad.npz")
    with pytest.raises(MetricUnavailable):
        get_extractor("embedded", detector=tmp_path / "absent.npz")


def test_values_of_a_known_picture(embedded):
    ramp = (torch.arange(64) * 4).to(torch.uint8)
    down, right = ramp[:, None].expand(64, 64), ramp[None].expand(64, 64)
    row = embedded(torch.stack([down, right, 255 - right])[None])[0]
    assert_close(row[::12], [6.646, 1.7978, 0.491, 2.6284, 0.8286, 1.2673, 0.7299, 1.5132], 2e-5, "pinned features")


def test_training_script_folds_to_the_same_network(tmp_path):
    path = ASSETS.parents[1] / "scripts" / "train_feature_net.py"
    spec = importlib.util.spec_from_file_location("train_feature_net", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = script.TrainableNet(3, 5)
        images = pictures(16, 9, 32)
        net(script.augment(prepare_images(images), torch.Generator().manual_seed(0)))  # moves the running statistics
        net.eval()
    save_feature_net(tmp_path / "net.npz", net.folded())
    with torch.no_grad():
        expected = net.features(prepare_images(images))
    assert_close(load_feature_net(tmp_path / "net.npz")(images), expected, 1e-5, "folded batch norm")


def test_layers_join():
    assert all(a.out_channels == b.in_channels for a, b in zip(LAYERS, LAYERS[1:]))


# --- Inception through clean-fid


class StandIn(torch.nn.Module):
    """Same interface as the TorchScript Inception: `layers` on normalised 299 x 299 images; own resize otherwise."""

    def __init__(self) -> None:
        super().__init__()
        linear = torch.nn.Linear(3 * 23 * 23, 2048)
        self.layers = torch.nn.Sequential(torch.nn.AvgPool2d(13), torch.nn.Flatten(), linear)

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        x = torch.nn.functional.interpolate(x, size=[299, 299], mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128)
        if return_features:
            return features
        assert no_output_bias
        return features[:, :1008].softmax(1)


def have_cleanfid() -> None:
    try:
        cleanfid_module("resize")
        cleanfid_module("inception_torchscript")
    except MetricUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "some-name.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and is the format of the published weights
        torch.jit.script(StandIn().eval()).save(str(path))
    return path


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_inception_plumbing(detector, mode):
    have_cleanfid()
    extractor = get_extractor("inception", mode=mode, detector=detector)
    assert extractor.digest == hashlib.sha256(detector.read_bytes()).hexdigest()
    assert (extractor.resize, extractor.headline, extractor.num_features) == (mode, "FID", 2048)
    images = pictures(3, 5)
    rows = extractor(images)
    assert rows.shape == (3, 2048) and rows.dtype == torch.float32 and not rows.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.jit.load(str(detector)).eval()
    if mode == "clean":  # bicubic in float32 per channel, clipped, not rounded
        resized = clean_resize(images)
        assert_close(rows, network.layers((resized - 128) / 128), 1e-5, "clean")
        as_float = images.float()
        plain = torch.nn.functional.interpolate(as_float, size=(299, 299), mode="bicubic", align_corners=False)
        assert float((plain.clamp(0, 255) - resized).abs().max()) > 1  # PIL's kernel is another one
    else:
        assert_close(rows, network(images.float(), return_features=True), 1e-5, "legacy_tensorflow")
    grey = images[:, :1]
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    assert_close(torch.cat([extractor(images[:1]), extractor(images[1:])]), rows, 1e-5, "batches")


def clean_resize(images: torch.Tensor) -> torch.Tensor:
    """The definition of clean-fid's resize, written out with Pillow."""
    from PIL import Image

    out = [
        [np.asarray(Image.fromarray(plane.astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
         for plane in image]
        for image in images.numpy()
    ]  # fmt: skip
    return torch.from_numpy(np.array(out)).clamp(0, 255)


def test_modes_differ_when_images_are_reduced(detector):
    have_cleanfid()
    images = pictures(2, 6, 500)
    modes = ("clean", "legacy_tensorflow")
    clean, legacy = (get_extractor("inception", mode=m, detector=detector)(images) for m in modes)
    assert float((clean - legacy).abs().max()) > 1e-3


def test_offline_without_weights_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "inception_home", lambda: tmp_path)
    with pytest.raises(MetricUnavailable) as caught:
        get_extractor("inception")
    message = str(caught.value)
    assert features.INCEPTION_URL in message and str(tmp_path / "inception-2015-12-05.pt") in message
    assert "\n" not in message and not list(tmp_path.iterdir())
    with pytest.raises(MetricUnavailable, match="is no file"):
        get_extractor("inception", detector=tmp_path / "absent.pt")


def test_own_place_is_used(tmp_path, monkeypatch, detector):
    have_cleanfid()
    monkeypatch.setattr(features, "inception_home", lambda: tmp_path)
    (tmp_path / features.INCEPTION_FILE).write_bytes(detector.read_bytes())
    assert find_inception() == tmp_path / features.INCEPTION_FILE
    assert get_extractor("inception")(pictures(1, 0)).shape == (1, 2048)


# --- other extractors


class Vgg(torch.nn.Module):
    """Same interface as the family's VGG16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4096)

    def forward(
        self, x: torch.Tensor, return_features: bool = False, resize_images: bool = True, return_lpips: bool = False
    ) -> torch.Tensor:
        if return_lpips:
            assert not resize_images
            return x.flatten(1) / 255
        assert return_features
        return self.linear(x.mean((2, 3)))


class Plain(torch.nn.Module):
    """Any network: a map per channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::16, ::16]


def scripted(module: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module.eval()).save(str(path))
    return path


def test_vgg16(tmp_path, monkeypatch):
    path = scripted(Vgg(), tmp_path / "v.pt")
    vgg, images = get_extractor("vgg16", detector=path), pictures(2, 0)
    assert vgg(images).shape == (2, 4096) and (vgg.name, vgg.headline, vgg.num_features) == ("vgg16", "FD", 4096)
    assert torch.equal(vgg.perceive(images.float()), images.float().flatten(1) / 255)
    monkeypatch.setenv("STYLEGAN_ROOTED_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MetricUnavailable) as caught:
        get_extractor("vgg16")
    assert features.VGG16_URL in str(caught.value) and "--vgg-file" in str(caught.value)


def test_any_torchscript_file(tmp_path):
    path = scripted(Plain(), tmp_path / "p.pt")
    extractor = get_extractor("torchscript", detector=path)
    assert extractor.digest == hashlib.sha256(path.read_bytes()).hexdigest() and extractor.num_features == 48
    with pytest.raises(MetricUnavailable, match="no TorchScript file"):
        get_extractor("torchscript", detector=WEIGHTS)
    with pytest.raises(MetricUnavailable, match="failed on"):
        get_extractor("vgg16", detector=path)


def test_legacy_pytorch_takes_its_weights_from_the_file(tmp_path, monkeypatch):
    have_cleanfid()
    module = cleanfid_module("inception_pytorch")

    class Small(torch.nn.Module):
        def __init__(self, output_blocks, resize_input):
            super().__init__()
            assert output_blocks == [3] and not resize_input
            self.linear = torch.nn.Linear(3, 2048)
            self.linear.load_state_dict(module.load_state_dict_from_url("https://example.invalid/weights"))

        def forward(self, x):
            assert 0 <= float(x.min()) and float(x.max()) <= 1 and x.shape[2:] == (299, 299)
            return [self.linear(x.mean((2, 3)))[:, :, None, None]]

    monkeypatch.setattr(module, "InceptionV3", Small)
    fetch = module.load_state_dict_from_url
    state = torch.nn.Linear(3, 2048).state_dict()
    torch.save(state, tmp_path / "w.pth")
    extractor, images = get_extractor("inception", mode="legacy_pytorch", detector=tmp_path / "w.pth"), pictures(2, 1)
    assert module.load_state_dict_from_url is fetch
    x = torch.nn.functional.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False) / 255
    expected = x.mean((2, 3)) @ state["weight"].T + state["bias"]
    assert_close(extractor(images), expected, 1e-5, "legacy_pytorch")
    assert (extractor.resize, extractor.headline) == ("legacy_pytorch", "FID")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(MetricUnavailable, match="pt_inception-2015-12-05-6726825d.pth"):
        get_extractor("inception", mode="legacy_pytorch")
    (tmp_path / features.PYTORCH_FILE).write_bytes((tmp_path / "w.pth").read_bytes())
    with pytest.raises(MetricUnavailable, match="does not start with 6726825d"):
        get_extractor("inception", mode="legacy_pytorch", detector=tmp_path / features.PYTORCH_FILE)


def test_downloads_need_a_digest_and_are_kept(tmp_path, monkeypatch):
    content, fetched = b"weights", []

    def fetch(url, file, *, num_attempts, verbose):
        fetched.append(url)
        file.write(content)

    monkeypatch.setattr(dnnlib.util, "_download", fetch)
    with pytest.raises(ValueError, match="only against their digest"):
        weights_file("https://example.invalid/w.pt", tmp_path)
    good = "https://example.invalid/w.pt#sha256=" + hashlib.sha256(content).hexdigest()
    assert weights_file(good, tmp_path).read_bytes() == weights_file(good, tmp_path).read_bytes() == content
    assert len(fetched) == 1
    with pytest.raises(MetricUnavailable, match="expected 0000"):
        weights_file("https://example.invalid/other.pt#sha256=" + "0" * 64, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_timm_is_optional(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MetricUnavailable, match="pip install timm"):
        get_extractor("timm:vit_small_patch14_dinov2", detector=WEIGHTS)


def test_timm_models_take_weights_from_a_file(tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    class Model(torch.nn.Module):
        num_features = 5

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 5)

        def forward(self, x):
            return self.linear(x.mean((2, 3)))

    made = []

    def create_model(name, **kwargs):
        made.append((name, kwargs))
        return Model()

    config = {"input_size": (3, 14, 14), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    data = SimpleNamespace(resolve_model_data_config=lambda model: config)
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model, data=data))
    state = Model().state_dict()
    safetensors.torch.save_file({**state, "head.weight": torch.zeros(2, 5)}, str(tmp_path / "w.safetensors"))
    extractor = get_extractor("timm:tiny", detector=tmp_path / "w.safetensors")
    assert made == [("tiny", {"pretrained": False, "num_classes": 0})]
    assert (extractor.name, extractor.num_features, extractor.headline) == ("timm:tiny", 5, "FD")
    images = torch.full((2, 1, 9, 9), 255, dtype=torch.uint8)
    assert_close(extractor(images), (state["linear.weight"].sum(1) + state["linear.bias"])[None].repeat(2, 1), 1e-5)
    safetensors.torch.save_file({"linear.bias": torch.zeros(5)}, str(tmp_path / "part.safetensors"))
    with pytest.raises(MetricUnavailable, match="lacks 1 tensors, linear.weight"):
        get_extractor("timm:tiny", detector=tmp_path / "part.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(MetricUnavailable, match="read safely"):
        get_extractor("timm:tiny", detector=tmp_path / "bad.pth")


def test_wrong_files_and_names_are_refused(tmp_path):
    have_cleanfid()
    (tmp_path / "x.pt").write_bytes(b"no network")
    with pytest.raises(MetricUnavailable, match="not the TorchScript Inception"):
        get_extractor("inception", detector=tmp_path / "x.pt")
    with pytest.raises(ValueError, match="wanted one of inception, embedded"):
        get_extractor("vgg")
    with pytest.raises(ValueError, match="wanted one of clean, legacy_tensorflow"):
        get_extractor("inception", mode="dirty")
    with pytest.raises(ValueError, match="needs its weights"):
        get_extractor("embedded")


def test_global_warning_filters_are_left_alone():
    have_cleanfid()
    before = list(warnings.filters)
    cleanfid_module("fid")
    assert warnings.filters == before


def test_missing_cleanfid_is_said(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cleanfid", None)
    monkeypatch.setitem(sys.modules, "cleanfid.resize", None)
    with pytest.raises(MetricUnavailable, match="pip install"):
        cleanfid_module("resize")


# --- streaming statistics


def test_streaming_equals_numpy():
    rows = (np.random.RandomState(0).randn(101, 7) * 3 + 1000).astype(np.float32)  # far from zero: no cancellation
    for sizes in ([101], [1] * 101, [1, 50, 0, 50]):
        stats = FeatureStats(7)
        for part in np.split(rows, np.cumsum(sizes)[:-1]):
            stats.append(torch.from_numpy(part))
        assert stats.num == 101 and np.array_equal(stats.features(), rows)
        assert_close(stats.mean, rows.astype(np.float64).mean(0), 1e-13, "mean")
        assert_close(stats.cov("cleanfid"), np.cov(rows.astype(np.float64), rowvar=False), 1e-11, "unbiased")
        assert_close(stats.cov("nvidia"), np.cov(rows.astype(np.float64), rowvar=False, bias=True), 1e-11, "biased")


def test_merge_equals_one_stream():
    rows = np.random.RandomState(1).randn(30, 4).astype(np.float32)
    parts = [FeatureStats(4), FeatureStats(4), FeatureStats(4)]
    for part, chunk in zip(parts, (rows[:3], rows[3:20], rows[20:])):
        part.append(chunk)
    for other in parts[1:]:
        parts[0].merge(other)
    assert np.array_equal(parts[0].features(), rows)
    assert_close(parts[0].cov("nvidia"), np.cov(rows.astype(np.float64), rowvar=False, bias=True), 1e-12, "merged")
    with pytest.raises(ValueError, match="cannot merge"):
        parts[0].merge(FeatureStats(4, source=Source("other", "", "")))


def test_kept_rows_are_bounded_and_a_fair_sample():
    hits = np.zeros(60)
    for shift in range(300):
        stats = FeatureStats(1, max_rows=10)
        stats._rng = np.random.RandomState(shift)
        for part in np.arange(60, dtype=np.float32).reshape(-1, 1, 1).reshape(12, 5, 1):
            stats.append(part)
        kept = stats.features()[:, 0].astype(int)
        assert len(kept) == 10 == len(set(kept))
        hits[kept] += 1
    assert stats.num == 60 and abs(stats.mean[0] - 29.5) < 1e-9
    assert abs(hits - 50).max() < 5 * 50**0.5  # each row is kept in 50 of 300 runs on average
    none = FeatureStats(1, max_rows=0)
    none.append(np.ones((4, 1)))
    assert none.num == 4 and len(none.features()) == 0


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match="wanted"):
        FeatureStats(3).append(np.zeros((2, 4)))
    with pytest.raises(MetricUnavailable, match="non-finite"):
        FeatureStats(3).append(np.full((2, 3), np.inf))
    with pytest.raises(ValueError, match="at least 2"):
        FeatureStats(3).cov("cleanfid")


# --- the cache


class Counting:
    """Extractor that counts its calls; features are channel means."""

    name, digest, num_features, headline, resize = "counting", "d1", 3, "FD", "none"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return images.float().mean(dim=(2, 3)).expand(-1, 3)


def test_cache_answers_for_equal_content_only(tmp_path):
    images, extractor = pictures(9, 3), Counting()
    touched = []

    def stream():
        touched.append(1)
        yield from images.split(4)

    def ask(**kw):
        return dataset_stats(stream(), extractor, cache_dir=tmp_path / "deep" / "cache", **{"content_key": "abc", **kw})

    first = ask()
    again = ask()
    assert len(touched) == 1 and extractor.calls == 3
    assert first.source == again.source == Source("counting", "d1", "none")
    assert np.array_equal(first.features(), again.features()) and again.num == 9
    assert np.array_equal(first.cov("nvidia"), again.cov("nvidia")) and np.array_equal(first.mean, again.mean)
    ask(content_key="abd")
    ask(content_key=["abc", "mirrored"])
    assert ask(num=5).num == 5
    extractor.digest = "d2"
    ask()
    extractor.resize = "other"
    ask()
    assert len(touched) == 6 and len(list((tmp_path / "deep" / "cache").iterdir())) == 6
    ask(content_key=None)
    assert len(touched) == 7 and len(list((tmp_path / "deep" / "cache").iterdir())) == 6
    dataset_stats(images.split(4), extractor)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "pickle", "other key"])
def test_damaged_cache_is_computed_anew(tmp_path, damage):
    images, extractor = pictures(8, 4), Counting()
    good = dataset_stats(images.split(4), extractor, cache_dir=tmp_path, content_key="k")
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":  # a value, and the zip's own checksum with it
        arrays = dict(np.load(path, allow_pickle=False))
        arrays["mean"] = arrays["mean"] + 1
        np.savez(path, **arrays)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        with path.open("wb") as file:
            np.savez(file, meta=np.array([object()], dtype=object), allow_pickle=True)
    else:
        arrays = dict(np.load(path, allow_pickle=False))
        arrays["meta"] = np.array(str(arrays["meta"]).replace('"k"', '"z"'))
        np.savez(path, **arrays)
    calls = extractor.calls
    again = dataset_stats(images.split(4), extractor, cache_dir=tmp_path, content_key="k")
    assert extractor.calls == 2 * calls and np.array_equal(again.mean, good.mean)
    dataset_stats(images.split(4), extractor, cache_dir=tmp_path, content_key="k")
    assert extractor.calls == 2 * calls, "the damaged file was not replaced"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_unwritable_cache_is_no_error(tmp_path):
    (tmp_path / "file").write_text("a file where the folder should be")
    stats = dataset_stats([pictures(4, 0)], Counting(), cache_dir=tmp_path / "file", content_key="k")
    assert stats.num == 4


def test_accumulate_refuses_other_images():
    for batch in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 4, 4, dtype=torch.uint8), np.zeros((3, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="wanted uint8"):
            accumulate([batch], Counting())
