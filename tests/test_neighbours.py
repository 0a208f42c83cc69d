"""Precision, recall, density, coverage, copies: goldens, torch-fidelity, scikit-learn, brute force, meaning."""

import numpy as np
import pytest
import torch
from helpers import assert_close

from metrics import neighbours
from metrics.features import torch_fidelity_module
from metrics.neighbours import manifolds, memorisation


def brute(real, fake, k, density_k):
    """(precision, recall, density, coverage) straight from the definitions."""

    def distances(a, b):
        return np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(2))

    def radii(a, count):
        return np.sort(distances(a, a), axis=1)[:, count]

    across = distances(real, fake)
    wide = across <= radii(real, density_k)[:, None]
    return (
        (across <= radii(real, k)[:, None]).any(0).mean(),
        (across <= radii(fake, k)[None]).any(1).mean(),
        wide.sum(0).mean() / density_k,
        wide.any(1).mean(),
    )


def values(result):
    return [result.precision, result.recall, result.density, result.coverage]


def check_goldens(archive, name):
    if name == "identical":
        real = fake = archive["main/real"][:200] if "main/real" in archive.files else archive["identical/real"]
    else:
        real, fake = archive[f"{name}/real"], archive[f"{name}/gen"]
    result = manifolds(real, fake)
    assert_close(result.precision, archive[f"{name}/precision_k3"], 1e-7, f"precision {name}")  # stored as float32
    assert_close(result.recall, archive[f"{name}/recall_k3"], 1e-7, f"recall {name}")


@pytest.mark.parametrize("name", ["main", "rank_deficient", "identical"])
def test_goldens(goldens, name):
    check_goldens(np.load(goldens / "metrics.npz", allow_pickle=False), name)


@pytest.mark.parametrize("name", ["rank_deficient", "identical"])
def test_small_copy_of_goldens(data_dir, name):
    check_goldens(np.load(data_dir / "metrics.npz", allow_pickle=False), name)


@pytest.mark.parametrize("k, density_k", [(3, 5), (1, 1), (4, 2)])
@pytest.mark.parametrize("block", [7, 2048])
def test_agrees_with_brute_force(k, density_k, block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    rng = np.random.RandomState(0)
    real, fake = rng.randn(90, 5).astype(np.float32), (rng.randn(70, 5) * 1.1 + 0.3).astype(np.float32)
    assert_close(values(manifolds(real, fake, k=k, density_k=density_k)), brute(real, fake, k, density_k), 1e-12)


def test_ties_far_from_the_origin_are_decided_exactly():
    # A lattice has ties everywhere, and an offset of 1000 leaves float32 products no digit to tell them.
    axis = np.arange(6.0)
    real = np.stack(np.meshgrid(axis, axis, axis), -1).reshape(-1, 3)
    fake = real[::2] + [0.5, 0.0, 0.25]
    for offset in (0.0, 1000.0):
        result = manifolds(real + offset, fake + offset)
        assert_close(values(result), brute(real, fake, 3, 5), 1e-12, f"offset {offset}")


def test_many_copies_are_ranked_exactly():
    # More rows at distance 0 than the candidates that float32 keeps.
    rng = np.random.RandomState(0)
    real = np.concatenate([np.repeat(rng.randn(2, 4), 20, 0), rng.randn(30, 4)])
    fake = np.concatenate([real[:3], rng.randn(20, 4)])
    assert_close(values(manifolds(real, fake)), brute(real, fake, 3, 5), 1e-12)


def test_agrees_with_torch_fidelity():
    try:
        theirs = torch_fidelity_module("metric_prc").prc_features_to_metric
    except ImportError as error:
        pytest.skip(str(error))
    rng = np.random.RandomState(0)
    real, fake = torch.from_numpy(rng.randn(300, 32)), torch.from_numpy(rng.randn(250, 32) * 1.1)
    expected = theirs(fake, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False)
    result = manifolds(real, fake)
    assert (result.precision, result.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


def test_nearest_neighbours_agree_with_scikit_learn():
    sklearn_neighbours = pytest.importorskip("sklearn.neighbors")
    rng = np.random.RandomState(0)
    train, fake = rng.randn(200, 16).astype(np.float32), rng.randn(120, 16).astype(np.float32)
    tree = sklearn_neighbours.NearestNeighbors(n_neighbors=2, algorithm="brute").fit(train.astype(np.float64))
    distances, index = tree.kneighbors(fake.astype(np.float64), 1)
    result = memorisation(train, fake)
    assert np.array_equal(result.nearest, index[:, 0])
    assert_close(result.distances, distances[:, 0], 1e-6, "nearest distances")
    own = tree.kneighbors(train.astype(np.float64), 2)[0][:, 1]
    assert_close(result.threshold, np.quantile(own, 0.05), 1e-6, "threshold")


# --- what the figures mean


def test_a_collapsed_generator_is_precise_and_recalls_little():
    rng = np.random.RandomState(0)
    real = rng.randn(400, 8)
    collapsed = real[:1] * 0.2 + 0.05 * rng.randn(300, 8)
    result, honest = manifolds(real, collapsed), manifolds(real, rng.randn(300, 8))
    assert result.precision > 0.95 and result.recall < 0.05 and result.coverage < 0.2
    assert honest.recall > 0.8 and honest.coverage > 0.8
    far = manifolds(real, rng.randn(300, 8) + 20)
    assert values(far) == [0, 0, 0, 0] and far.precision_error > 0


def test_a_memorising_generator_is_flagged_and_an_honest_one_is_not():
    rng = np.random.RandomState(0)
    train, held_out = rng.randn(500, 8), rng.randn(200, 8)
    honest = memorisation(train, rng.randn(300, 8), held_out=held_out)
    copies = memorisation(train, train[rng.randint(500, size=300)] + 0.01 * rng.randn(300, 8), held_out=held_out)
    assert honest.held_out_share is not None and honest.held_out_error is not None
    assert abs(honest.share - honest.held_out_share) < 3 * np.hypot(honest.std_error, honest.held_out_error)
    assert 0.9 < honest.median_ratio < 1.1 and copies.median_ratio < 0.1
    assert copies.share > 0.95 and copies.held_out_share == honest.held_out_share


def test_standard_errors_are_what_other_draws_show():
    rng = np.random.RandomState(1)
    real = rng.randn(300, 6)
    results = [manifolds(real, rng.randn(200, 6) * 1.2) for _ in range(80)]
    told = np.mean([r.precision_error for r in results])
    assert 0.7 < told / np.std([r.precision for r in results]) < 1.4
    told = np.mean([r.density_error for r in results])
    assert 0.7 < told / np.std([r.density for r in results]) < 1.4


@pytest.mark.parametrize(
    "real, fake, message",
    [
        (np.zeros((9, 2)), np.zeros((9, 3)), "wanted"),
        (np.full((9, 2), np.nan), np.zeros((9, 2)), "non-finite"),
        (np.zeros((5, 2)), np.zeros((9, 2)), "5 real images, balls of 5 neighbours need at least 6"),
        (np.zeros((9, 2)), np.zeros((3, 2)), "3 generated images"),
        (np.zeros((9, 2)), np.zeros((0, 2)), "empty"),
    ],
)
def test_refusals(real, fake, message):
    with pytest.raises(ValueError, match=message):
        manifolds(real, fake)
    with pytest.raises(ValueError, match="at least 2"):
        memorisation(np.zeros((1, 2)), np.zeros((3, 2)))
