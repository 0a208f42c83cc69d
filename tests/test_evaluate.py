"""Evaluation: what the figures mean, their provenance, and that training's random streams are left alone."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close

from metrics.catalogue import CATALOGUE
from metrics.evaluate import (
    FIGURES,
    MetricResult,
    combine,
    evaluate,
    generated_images,
    headline,
)
from metrics.feature_stats import FeatureStats, accumulate, read_reference
from metrics.features import MetricUnavailable, get_extractor
from metrics.frechet_inception_distance import frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel_inception_distance import kernel_distance
from metrics.neighbours import manifolds
from training.config import FAMILY_METRICS, SHORT_METRICS

WEIGHTS = Path(__file__).resolve().parent.parent / "stylegan_rooted" / "assets" / "feature-net.npz"
NUM, SIZE = 200, 48


@pytest.fixture(scope="module")
def extractor():
    return get_extractor("embedded", detector=WEIGHTS)


@functools.lru_cache
def pictures(num: int, seed: int) -> torch.Tensor:
    """Coloured discs and boxes on white, uint8 [num, 3, 48, 48]."""
    rng = np.random.RandomState(seed)
    axis = (np.arange(SIZE) + 0.5) / SIZE
    out = np.full((num, 3, SIZE, SIZE), 255, np.uint8)
    for image in out:
        for _ in range(rng.randint(1, 4)):
            x, y, r = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.35)
            dx, dy = np.abs(axis[None] - x), np.abs(axis[:, None] - y)
            inside = (dx**2 + dy**2 < r * r) if rng.rand() < 0.5 else (np.maximum(dx, dy) < r)
            image[:, inside] = rng.randint(0, 256, (3, 1))
    return torch.from_numpy(out)


def stripes(num: int, seed: int) -> torch.Tensor:
    """Other pictures altogether: coloured sine gratings, uint8 [num, 3, 48, 48]."""
    rng = np.random.RandomState(seed)
    axis = torch.arange(SIZE) / SIZE
    out = []
    for _ in range(num):
        kx, ky, phase = rng.uniform(-20, 20), rng.uniform(-20, 20), rng.uniform(0, 6)
        wave = torch.sin(kx * axis[None] + ky * axis[:, None] + phase)
        out.append(127.5 + 127 * wave * torch.tensor(rng.uniform(-1, 1, (3, 1, 1)), dtype=torch.float32))
    return torch.stack(out).to(torch.uint8)


def to_u8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(0, 255).round().to(torch.uint8)


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    taps = torch.exp(-(torch.arange(-9, 10).float() ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).view(1, 1, 1, -1)
    flat = torch.nn.functional.pad(x.float(), (9, 9, 9, 9), mode="replicate").flatten(0, 1)[:, None]
    flat = torch.nn.functional.conv2d(torch.nn.functional.conv2d(flat, taps), taps.transpose(2, 3))
    return to_u8(flat.view(x.shape))


def noisy(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return to_u8(x.float() + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))


def tinted(x: torch.Tensor, amount: float) -> torch.Tensor:
    return to_u8(x.float() + amount * torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1))


def mixed(x: torch.Tensor, share: float) -> torch.Tensor:
    num = int(share * len(x))
    return torch.cat([stripes(num, 5), x[num:]])


# --- what the figures mean


@pytest.mark.parametrize(
    "alter, amounts",
    [
        (blurred, [1.0, 2.0, 4.0]),
        (noisy, [30, 60, 120]),
        (tinted, [15, 40, 80]),
        (mixed, [0.1, 0.4, 1.0]),
    ],
)
def test_figures_grow_with_damage(extractor, alter, amounts):
    reals = accumulate(pictures(NUM, 0).split(64), extractor)
    others = pictures(NUM, 1)
    rows = [
        evaluate(extractor, reals, fakes.split(64), num_subsets=10)
        for fakes in (others, *(alter(others, amount) for amount in amounts))
    ]
    for values in ([fd.value for fd, _ in rows], [kd.value for _, kd in rows]):
        assert all(a < b for a, b in itertools.pairwise(values)), values
    untouched, worst = rows[0], rows[-1]
    assert worst[0].value > 2 * untouched[0].value
    assert abs(untouched[1].value) < 3 * untouched[1].spread < worst[1].value


def test_identical_images_have_distance_zero(extractor):
    images = pictures(150, 0)
    (fd,) = evaluate(extractor, images.split(64), images.split(32), metrics=["fid"])
    assert 0 <= fd.value < 1e-3  # another batch size, so the features differ by round-off


# --- results and provenance


def test_results_carry_provenance(extractor):
    reals, fakes = pictures(40, 0), pictures(30, 1)
    results = evaluate(extractor, reals.split(16), fakes.split(7), seed=3, num_subsets=5, max_subset_size=20)
    fd, kd = results
    assert [r.name for r in results] == ["fd", "kd"] and [r.label for r in results] == ["FD", "KD"]
    for r in results:
        assert (r.num_real, r.num_fake, r.seed, r.extractor, r.digest) == (40, 30, 3, "embedded", extractor.digest)
        assert r.resize == "antialiased bilinear to 32" and r.seconds > 0
        assert json.loads(json.dumps(r.as_dict())) == r.as_dict()
    assert (fd.spread, fd.covariance, fd.subset_size) == (None, "cleanfid", None)
    assert (kd.covariance, kd.num_subsets, kd.subset_size) == (None, 5, 20) and kd.spread > 0
    f1, f2 = extractor(reals).double().numpy(), extractor(fakes).double().numpy()
    expected = kernel_distance(f1, f2, num_subsets=5, max_subset_size=20, seed=3)
    assert_close([kd.value, kd.spread], [expected.mean, expected.std], 1e-5, "KD")
    for convention, bias in (("cleanfid", False), ("nvidia", True)):
        cov1, cov2 = (np.cov(f, rowvar=False, bias=bias) for f in (f1, f2))
        (row,) = evaluate(extractor, [reals], [fakes], metrics=["fid"], covariance=convention)
        assert row.covariance == convention
        assert_close(row.value, frechet_distance(f1.mean(0), cov1, f2.mean(0), cov2), 1e-5, f"FD {convention}")
    with pytest.raises(dataclasses.FrozenInstanceError):
        fd.value = 0.0


def test_spread_says_something_for_small_sets(extractor):
    reals, fakes = pictures(40, 0), pictures(30, 1)
    (kd,) = evaluate(extractor, [reals], [fakes], metrics=["kid"], num_subsets=10)
    (whole,) = evaluate(extractor, [reals], [reals[:30]], metrics=["kid"], num_subsets=10, max_subset_size=1000)
    assert kd.subset_size == 15 and kd.spread > 1e-3
    assert whole.subset_size == 30


def test_names_and_convention_follow_the_extractor(extractor):
    class Inception:
        name, digest, num_features, headline, resize = "inception", "d", 3, "FID", "legacy_tensorflow"

        def __call__(self, images):
            return images.float().mean(dim=(2, 3))

    results = evaluate(Inception(), [pictures(9, 0)], [pictures(9, 1)], metrics=("kid", "fid"))
    assert [r.name for r in results] == ["kid", "fid"] and results[1].covariance == "nvidia"
    assert "FID" not in extractor.headline


def test_statistics_images_and_arrays_are_the_same_to_it(extractor):
    reals, fakes = pictures(30, 0), pictures(30, 1)
    expected = [(r.value, r.spread) for r in evaluate(extractor, [reals], [fakes])]
    stats = [accumulate([x.numpy()], extractor) for x in (reals, fakes)]
    assert [(r.value, r.spread) for r in evaluate(extractor, *stats)] == expected
    assert [(r.value, r.spread) for r in evaluate(extractor, iter([reals]), [fakes.numpy()])] == expected


def test_unusable_input(extractor):
    good = pictures(5, 0)
    with pytest.raises(MetricUnavailable, match="got 1 images as fakes"):
        evaluate(extractor, [good], [good[:1]])
    with pytest.raises(MetricUnavailable, match="got 0 images as reals"):
        evaluate(extractor, [], [good])
    with pytest.raises(ValueError, match="got metric 'lpips', wanted any of fid, kid"):
        evaluate(extractor, [good], [good], metrics=["lpips"])
    with pytest.raises(ValueError, match="convention"):
        evaluate(extractor, [good], [good], covariance="biased")
    with pytest.raises(ValueError, match="statistics of the reals"):
        evaluate(extractor, FeatureStats(96), [good])


# --- a generator as a source of images


class Toy(torch.nn.Module):
    """Smallest thing that looks like a generator."""

    def __init__(self, c_dim: int = 0) -> None:
        super().__init__()
        self.z_dim, self.c_dim = 8, c_dim
        self.paint = torch.nn.Linear(8 + c_dim, 3 * 16)
        self.frozen = torch.nn.Dropout(0.5).eval()
        self.seen_labels: list[torch.Tensor] = []

    def forward(self, z, c, truncation_psi=1.0, noise_mode="random", gain=1.0):
        assert not self.training and not torch.is_grad_enabled() and c.shape == (len(z), self.c_dim)
        self.seen_labels.append(c)
        x = self.paint(torch.cat([z * truncation_psi, c], dim=1)).view(-1, 3, 4, 4) * gain
        return x + 0.3 * torch.randn(x.shape) if noise_mode == "random" else x


@pytest.fixture
def toy():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = Toy().train()
        G.frozen.eval()
        return G


def collect(G, **kw) -> torch.Tensor:
    return torch.cat(list(generated_images(G, **{"num": 10, "seed": 5, "batch_size": 4, **kw})))


def test_images_depend_on_the_seed_alone(toy):
    images = collect(toy)
    assert images.shape == (10, 3, 4, 4) and images.dtype == torch.uint8
    for size in (1, 3, 10, 64):
        assert int((collect(toy, batch_size=size).int() - images.int()).abs().max()) <= 1
    assert torch.equal(collect(toy, num=6), images[:6])
    assert not torch.equal(collect(toy, seed=6), images)
    noise = collect(toy, noise_mode="random")
    assert torch.equal(collect(toy, noise_mode="random"), noise) and not torch.equal(noise, images)
    assert not torch.equal(collect(toy, truncation_psi=0.5), images)
    assert collect(toy, gain=0.0).unique().tolist() == [128]  # passed on to G; truncation makes 0 become 128


@pytest.mark.parametrize("noise_mode", ["const", "random"])
def test_global_streams_and_module_are_left_alone(extractor, toy, noise_mode):
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.randn(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    modes = [m.training for m in toy.modules()]
    stream = generated_images(toy, num=8, seed=0, batch_size=3, noise_mode=noise_mode)
    next(stream)
    assert torch.is_grad_enabled() and [m.training for m in toy.modules()] == modes  # also between two batches
    evaluate(extractor, [pictures(8, 0)], itertools.chain(stream), num_subsets=3)
    assert [m.training for m in toy.modules()] == modes == [True, True, False]
    assert torch.equal(torch.randn(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])


def test_labels_are_drawn_from_the_pool():
    G = Toy(c_dim=3)
    pool = np.eye(3, dtype=np.float32)[[0, 0, 0, 1]]
    collect(G, num=200, batch_size=50, labels=pool)
    counts = torch.cat(G.seen_labels).sum(0)
    assert counts[2] == 0 and 130 <= counts[0] <= 170 and counts.sum() == 200
    for labels in (None, np.zeros((0, 3)), np.zeros((4, 2))):
        with pytest.raises(ValueError, match="wants labels of 3 numbers"):
            generated_images(G, num=1, seed=0, labels=labels)
    with pytest.raises(ValueError, match="noise_mode 'none'"):
        generated_images(Toy(), num=1, seed=0, noise_mode="none")


def test_diverged_generator_is_unavailable_not_a_number(toy, extractor):
    with torch.no_grad():
        toy.paint.bias[0] = float("nan")
    with pytest.raises(MetricUnavailable, match="non-finite pixels"):
        evaluate(extractor, [pictures(4, 0)], generated_images(toy, num=4, seed=0))


def test_failure_inside_the_generator_restores_everything(toy):
    state = torch.get_rng_state()
    with pytest.raises(TypeError):
        list(generated_images(toy, num=4, seed=0, unknown_option=1))
    assert toy.training and torch.equal(torch.get_rng_state(), state)


def test_result_type_has_no_surprises():
    names = [field.name for field in dataclasses.fields(MetricResult)]
    assert names[:8] == ["name", "value", "spread", "num_real", "num_fake", "extractor", "digest", "resize"]


# --- every figure from one pass, its error and its warning


def test_all_figures_from_one_pass(extractor):
    calls = []

    class Counted:
        name, digest, resize = extractor.name, extractor.digest, extractor.resize
        num_features, headline = extractor.num_features, extractor.headline

        def __call__(self, images):
            calls.append(len(images))
            return extractor(images)

    reals, fakes = pictures(120, 0), pictures(110, 1)
    wanted = ["fid", "kid", "fid_inf", "pr", "dc", "memorisation"]
    rows = evaluate(Counted(), [reals], [fakes], metrics=wanted, num_subsets=5)
    assert sum(calls) == 230
    names = ["fd", "kd", "fd_inf", "precision", "recall", "density", "coverage", "memorisation"]
    assert [r.name for r in rows] == names
    assert [r.metric for r in rows] == ["fid", "kid", "fid_inf", "pr", "pr", "dc", "dc", "memorisation"]
    assert all(r.std_error is not None and r.std_error > 0 for r in rows)
    assert all(json.loads(json.dumps(r.as_dict())) == r.as_dict() for r in rows)
    assert [r.name for r in rows if not r.lower_is_better] == ["precision", "recall", "density", "coverage"]
    f1, f2 = extractor(reals).numpy(), extractor(fakes).numpy()
    m = manifolds(f1, f2)
    assert [r.value for r in rows[3:7]] == [m.precision, m.recall, m.density, m.coverage]
    details = rows[-1].details
    assert details["num_train"] == 120 and details["expected_share"] == 0.05 and len(details["closest"]) == 20
    closest = details["closest"][0]
    distance = np.linalg.norm(f1[closest["train"]].astype(float) - f2[closest["fake"]])
    assert_close(closest["distance"], distance, 1e-6, "closest pair")
    assert rows[0].text.startswith("FD ") and " ± " in rows[0].text


@pytest.mark.parametrize("num, warned", [(96, True), (97, False)])
def test_too_few_images_for_fd_make_kd_the_headline(extractor, num, warned):
    rows = evaluate(extractor, [pictures(120, 0)], [pictures(num, 1)], num_subsets=3)
    assert (rows[0].warning is not None) == warned
    assert headline(rows).name == ("kd" if warned else "fd")
    if warned:
        assert (
            rows[0].warning.startswith("96 generated images with 96 features") and "kernel distance" in rows[0].warning
        )
    assert headline([]) is None and headline(rows[:1]) is rows[0]


def test_few_images_are_said(extractor):
    rows = evaluate(extractor, [pictures(30, 0)], [pictures(40, 1)], metrics=["kid", "pr", "dc", "memorisation"])
    assert all(r.warning.startswith("30 images are few (under ") for r in rows)
    assert "30 real" in evaluate(extractor, [pictures(30, 0)], [pictures(120, 1)], metrics=["fid"])[0].warning


def test_repeats_give_an_error_that_assumes_nothing(extractor):
    reals = accumulate([pictures(150, 0)], extractor)
    rows = [evaluate(extractor, reals, [pictures(120, seed)], seed=seed, num_subsets=5) for seed in (1, 2, 3)]
    fd, kd = combine(rows)
    values = [row[0].value for row in rows]
    assert fd.value == pytest.approx(np.mean(values)) and fd.details == {"repeats": values, "seeds": [1, 2, 3]}
    assert fd.std_error == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    assert combine(rows[:1]) == rows[0]
    assert 0.2 < fd.std_error / rows[0][0].std_error * 3**0.5 < 3  # the jackknife's guess from one sample


def test_meaning_of_overlap_and_copies(extractor):
    reals, held_out = pictures(200, 0), pictures(100, 7)
    stats = accumulate([held_out], extractor)
    wanted = ["pr", "memorisation"]

    def figures(fakes):
        rows = evaluate(extractor, [reals], [fakes], metrics=wanted, held_out=stats)
        return {r.name: r for r in rows}

    honest = figures(pictures(150, 1))
    collapsed = figures(reals[:3].repeat(50, 1, 1, 1))
    shifted = figures(stripes(150, 0))
    copying = figures(noisy(reals[:150], 1.0))
    assert collapsed["precision"].value > 0.95 and collapsed["recall"].value < 0.3 < honest["recall"].value
    assert shifted["precision"].value < 0.1 < honest["precision"].value
    assert copying["memorisation"].value > 0.9 and honest["memorisation"].value < 0.2
    assert honest["memorisation"].details["held_out_share"] < 0.2


def test_inception_score_needs_class_probabilities(extractor):
    class Classes:
        name, digest, num_features, headline, resize = "inception", "d", 3, "FID", "clean"

        def __call__(self, images):
            return images.float().mean(dim=(2, 3))

        def probabilities(self, images):
            return images.float().mean(dim=(2, 3)).div(20).softmax(1)

    fakes = pictures(60, 1)
    (row,) = evaluate(Classes(), [pictures(30, 0)], fakes.split(25), metrics=["is"])
    expected = inception_score(Classes().probabilities(fakes).numpy())
    assert (row.name, row.value, row.spread, row.std_error) == ("is", expected.mean, expected.std, expected.std_error)
    assert row.num_subsets == 10 and not row.lower_is_better and "60 images" in row.warning
    with pytest.raises(MetricUnavailable, match="embedded does not give"):
        evaluate(extractor, [fakes], [fakes], metrics=["is"])
    with pytest.raises(ValueError, match="not their statistics"):
        evaluate(Classes(), [fakes], accumulate([fakes], Classes()), metrics=["is"])


# --- precomputed references


def test_references_of_others_are_read(extractor, tmp_path):
    reals, fakes = pictures(150, 0), pictures(120, 1)
    rows = extractor(reals).numpy()
    exact = rows.astype(np.float64)
    np.savez(tmp_path / "moments.npz", mu=exact.mean(0), sigma=np.cov(exact, rowvar=False))
    np.savez(tmp_path / "feats.npz", feats=rows)
    wanted = evaluate(extractor, [reals], [fakes], covariance="cleanfid", num_subsets=5)
    (fd,) = evaluate(extractor, read_reference(tmp_path / "moments.npz", extractor), [fakes], metrics=["fid"])
    assert_close(fd.value, wanted[0].value, 1e-9, "moments")
    assert fd.num_real == 0 and fd.warning is None
    feats = read_reference(tmp_path / "feats.npz", extractor)
    (kd,) = evaluate(extractor, feats, [fakes], metrics=["kid"], num_subsets=5)
    assert (kd.value, kd.num_real) == (wanted[1].value, 150)
    with pytest.raises(MetricUnavailable, match="no features"):
        evaluate(extractor, read_reference(tmp_path / "moments.npz", extractor), [fakes], metrics=["kid"])
    with pytest.raises(MetricUnavailable, match="mu and sigma"):
        evaluate(extractor, feats, [fakes], metrics=["fid"])


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, "the embedded detector wants finite numbers \\[96\\]"),
        ({"mu": np.zeros(96)}, "neither"),
        ({"feats": np.full((4, 96), np.nan)}, "wants finite"),
        ({"mu": np.zeros(96, int), "sigma": np.zeros((96, 96))}, "int64"),
    ],
)
def test_unusable_references(extractor, tmp_path, arrays, message):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / "r.npz", extractor)
    (tmp_path / "r.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not an npz file"):
        read_reference(tmp_path / "r.npz", extractor)


def test_names_are_the_same_on_both_floors():
    assert {*SHORT_METRICS, *FAMILY_METRICS} == set(CATALOGUE)
    assert all(d.fixed == (d.name in FAMILY_METRICS) for d in CATALOGUE.values())
    assert all(d.figure in (*FIGURES, "ppl") for d in CATALOGUE.values())
