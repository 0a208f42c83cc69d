"""`stylegan_rooted.generate`: seeds, latents, the family's pixels, independence of neighbours, grids."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stylegan_rooted import generate
from torch_utils import images
from training import network_pickle, networks


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """snapshot_b.pkl (conditional, of the family) and half.pkl (ours, with half-precision blocks)."""
    folder = tmp_path_factory.mktemp("generate")
    packed = (data_dir / "pickles" / "snapshot_b.pkl.gz").read_bytes()
    (folder / "snapshot_b.pkl").write_bytes(gzip.decompress(packed))
    torch.manual_seed(1)
    common = dict(img_resolution=16, img_channels=3, c_dim=0, channel_base=128, channel_max=8, num_fp16_res=2)
    synthesis = {key: common.pop(key) for key in ("channel_base", "channel_max", "num_fp16_res")}
    G = networks.Generator(z_dim=8, w_dim=8, synthesis_kwargs=dict(synthesis), **common).eval()
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            parameter.data.fill_(0.5)
    network_pickle.save(folder / "half.pkl", G=G, D=networks.Discriminator(**synthesis, **common), G_ema=G)
    return folder


def test_seeds() -> None:
    assert generate.parse_seeds("0-3") == [0, 1, 2, 3]
    assert generate.parse_seeds("1,5,7-9") == [1, 5, 7, 8, 9]
    assert generate.parse_seeds(" 4 , 2 - 2 ") == [4, 2]
    assert generate.parse_seeds(f"{2**32 - 1}") == [2**32 - 1]


@pytest.mark.parametrize("text", ["", "a", "1,", "3-1", "-1", "1.5", "0-1000000", str(2**32), "1--2", "²"])
def test_bad_seeds_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="--seeds"):
        generate.parse_seeds(text)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 20)), min_size=1, max_size=5))
def test_seeds_expand_as_written(ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in ranges)
    assert generate.parse_seeds(text) == [s for first, more in ranges for s in range(first, first + more + 1)]


def test_latent_is_the_familys() -> None:
    expected = np.random.RandomState(7).randn(1, 12).astype(np.float32)
    assert np.array_equal(generate.latent(7, 12).numpy(), expected)


def family_pixels(x: np.ndarray) -> np.ndarray:
    """clamp(127.5 x + 128, 0, 255), cut."""
    return np.clip(x.astype(np.float64) * 127.5 + 128, 0, 255).astype(np.uint8)


def check_golden(
    path: Path, expected: dict[str, np.ndarray], tag: str, modes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = generate.open_network(path, "cpu")
    z = torch.from_numpy(expected[f"{tag}/z"])
    monkeypatch.setattr(generate, "latent", lambda seed, z_dim: z[seed : seed + 1])
    for mode in modes:
        for i in range(len(z)):
            label = torch.from_numpy(expected[f"{tag}/c"][i : i + 1])
            got = generate.render(loaded, i, label, noise_mode=mode).numpy().astype(int)
            difference = np.abs(got - family_pixels(expected[f"{tag}/img_{mode}"][i]))
            # A value within round-off of a step may fall to either side of it.
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01, (mode, i)


def test_golden_pixels(folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(data_dir / "pickles" / "expected.npz", allow_pickle=False) as expected:
        check_golden(folder / "snapshot_b.pkl", dict(expected), "snapshot_b", ("const",), monkeypatch)


@pytest.mark.parametrize("tag", ["snapshot_a", "snapshot_b", "snapshot_c_stylegan3repo"])
def test_more_golden_pixels(tag: str, goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(goldens / "pickles" / "expected.npz", allow_pickle=False) as expected:
        check_golden(goldens / "pickles" / f"{tag}.pkl", dict(expected), tag, ("const", "none"), monkeypatch)


@pytest.mark.parametrize("mode", ["const", "random", "none"])
def test_an_image_depends_on_its_seed_alone(folder: Path, tmp_path: Path, mode: str) -> None:
    loaded = generate.open_network(folder / "half.pkl", "cpu")
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(generate.write_images(loaded, [0, 1, 2, 3], tmp_path / "a", noise_mode=mode))
    list(generate.write_images(loaded, [2], tmp_path / "b", noise_mode=mode))
    assert (tmp_path / "a" / "seed0002.png").read_bytes() == (tmp_path / "b" / "seed0002.png").read_bytes()
    assert (tmp_path / "a" / "seed0001.png").read_bytes() != (tmp_path / "a" / "seed0002.png").read_bytes()
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])


def test_noise_modes_differ(folder: Path) -> None:
    loaded = generate.open_network(folder / "half.pkl", "cpu")
    label = torch.zeros([1, 0])
    const, random, none = (generate.render(loaded, 0, label, noise_mode=mode) for mode in generate.NOISE_MODES)
    assert not torch.equal(const, random) and not torch.equal(const, none) and not torch.equal(random, none)
    with pytest.raises(ValueError, match="--noise-mode loud"):
        generate.render(loaded, 0, label, noise_mode="loud")


def test_half_precision_blocks_run_in_float32_on_a_cpu(folder: Path) -> None:
    original = network_pickle.load(folder / "half.pkl").G_ema
    assert original.synthesis.b16.use_fp16
    loaded = generate.open_network(folder / "half.pkl", "cpu")
    z, c = generate.latent(0, 8), torch.zeros([1, 0])
    expected = images.to_uint8(original(z, c, noise_mode="const", force_fp32=True)[0], rounding="truncate")
    assert torch.equal(generate.render(loaded, 0, c), expected)


def test_truncation_to_nothing_gives_one_image(folder: Path) -> None:
    loaded = generate.open_network(folder / "half.pkl", "cpu")
    label = torch.zeros([1, 0])
    first, second = (generate.render(loaded, seed, label, trunc=0.0) for seed in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(generate.render(loaded, 0, label, trunc=0.7), generate.render(loaded, 0, label))
    with pytest.raises(ValueError, match="--trunc nan"):
        generate.check_trunc(float("nan"))


def test_classes(folder: Path) -> None:
    conditional = generate.open_network(folder / "snapshot_b.pkl", "cpu")
    assert generate.class_label(conditional, 2).tolist() == [[0, 0, 1]]
    with pytest.raises(ValueError, match="conditional: choose a class with --class 0 to --class 2"):
        generate.class_label(conditional, None)
    with pytest.raises(ValueError, match="--class 3 is out of range"):
        generate.class_label(conditional, 3)
    pictures = [generate.render(conditional, 0, generate.class_label(conditional, i)) for i in (0, 1)]
    assert not torch.equal(*pictures)
    said: list[str] = []
    unconditional = generate.open_network(folder / "half.pkl", "cpu")
    assert generate.class_label(unconditional, 5, said.append).shape == (1, 0)
    assert len(said) == 1 and "--class 5 is ignored" in said[0]


def test_broken_weights_are_an_error_not_a_black_image(folder: Path, tmp_path: Path) -> None:
    loaded = generate.open_network(folder / "half.pkl", "cpu")
    loaded.G.synthesis.b4.torgb.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite pixels for seed 3"):
        list(generate.write_images(loaded, [3], tmp_path))
    assert not list(tmp_path.iterdir())


def test_grid_shape() -> None:
    assert generate.grid_shape(20, None, None) == (8, 3)
    assert generate.grid_shape(3, None, None) == (3, 1)
    assert generate.grid_shape(5, 2, None) == (2, 3)
    assert generate.grid_shape(5, None, 2) == (3, 2)
    assert generate.grid_shape(5, 4, 4) == (4, 4)
    with pytest.raises(ValueError, match="9 seeds don't fit --cols 2 x --rows 2"):
        generate.grid_shape(9, 2, 2)


def test_grid_places_images_row_by_row_and_leaves_white(folder: Path, tmp_path: Path) -> None:
    loaded = generate.open_network(folder / "half.pkl", "cpu")
    path = generate.write_grid(loaded, [4, 0, 9], tmp_path / "deep" / "g.png", (2, 2))
    grid = images.from_pil(images.open_image(path.read_bytes()))
    assert grid.shape == (3, 32, 32)
    for (row, col), seed in {(0, 0): 4, (0, 1): 0, (1, 0): 9}.items():
        cell = grid[:, row * 16 : row * 16 + 16, col * 16 : col * 16 + 16]
        assert np.array_equal(cell, generate.render(loaded, seed, torch.zeros([1, 0])).numpy())
    assert (grid[:, 16:, 16:] == 255).all()


def test_captions_stand_above_the_images(folder: Path) -> None:
    tiles = torch.zeros([4, 3, 16, 16], dtype=torch.uint8)
    plain, captioned = generate.draw(tiles, (2, 2)), generate.draw(tiles, (2, 2), ["1", "23", "4", ""])
    strip = captioned.shape[1] // 2
    assert captioned.shape[2] == plain.shape[2] and strip > 16
    for row in range(2):
        margin = captioned[:, row * strip : (row + 1) * strip - 16]
        assert (margin == 255).any() and (margin < 128).any()
        assert (captioned[:, (row + 1) * strip - 16 : (row + 1) * strip] == 0).all()


def test_missing_device_and_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        generate.open_network(tmp_path / "none.pkl", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA device"):
            generate.open_network(folder / "half.pkl", "cuda")
