"""Kernel distance: goldens, clean-fid's own function, a direct sum, its spread, and its own random stream."""

import numpy as np
import pytest
import torch
from helpers import assert_close

from metrics import kernel_inception_distance
from metrics.features import MetricUnavailable, cleanfid_module
from metrics.kernel_inception_distance import kernel_distance

DRAWS = {"seed0_subsets100_max1000": (0, 100, 1000), "seed7_subsets20_max100": (7, 20, 100)}


def check_goldens(archive, name: str) -> None:
    if name == "identical":  # the same 200 rows on both sides
        real = gen = archive["main/real"][:200] if "main/real" in archive.files else archive["identical/real"]
    else:
        real, gen = archive[f"{name}/real"], archive[f"{name}/gen"]
    for suffix, (seed, num_subsets, size) in DRAWS.items():
        kid = kernel_distance(real, gen, num_subsets=num_subsets, max_subset_size=size, seed=seed)
        assert kid.num_subsets == num_subsets and kid.subset_size == min(len(real), len(gen), size)
        assert_close(kid.mean, archive[f"{name}/kid_cleanfid_f64_{suffix}"], 1e-9, f"{name} f64 {suffix}")
        for key in ("nvidia", "cleanfid_f32"):  # computed in float32
            assert_close(kid.mean, archive[f"{name}/kid_{key}_{suffix}"], 1e-5, f"{name} {key} {suffix}")


@pytest.mark.parametrize("name", ["main", "rank_deficient", "identical"])
def test_goldens(goldens, name):
    check_goldens(np.load(goldens / "metrics.npz", allow_pickle=False), name)


@pytest.mark.parametrize("name", ["rank_deficient", "identical"])
def test_small_copy_of_goldens(data_dir, name):
    check_goldens(np.load(data_dir / "metrics.npz", allow_pickle=False), name)


def test_agrees_with_clean_fid():
    try:
        theirs = cleanfid_module("fid").kernel_distance
    except MetricUnavailable as error:
        pytest.skip(str(error))
    rng = np.random.RandomState(2)
    f1, f2 = rng.randn(90, 24), rng.randn(130, 24) + 0.2
    for first, second in ((f1, f2), (f2, f1)):
        state = np.random.get_state()
        try:
            np.random.seed(11)
            expected = theirs(first, second, num_subsets=10, max_subset_size=50)
        finally:
            np.random.set_state(state)
        value = kernel_distance(first, second, num_subsets=10, max_subset_size=50, seed=11).mean
        assert_close(value, expected, 1e-10, "clean-fid")


def test_direct_sum_over_pairs():
    rng = np.random.RandomState(0)
    x, y = rng.randn(6, 3), rng.randn(6, 3) + 1
    kernel = lambda a, b: (a @ b / 3 + 1) ** 3
    same = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(6) for j in range(6) if i != j) / 30
    cross = sum(kernel(a, b) for a in x for b in y) / 36
    kid = kernel_distance(x, y, num_subsets=5)
    assert_close(kid.mean, same - 2 * cross, 1e-12, "pairs")  # every subset is the whole set
    assert kid.std < 1e-12


def test_spread_is_that_of_single_subsets():
    rng = np.random.RandomState(4)
    f1, f2 = rng.randn(300, 8), rng.randn(300, 8) + 0.5
    kid = kernel_distance(f1, f2, num_subsets=40, max_subset_size=50, seed=3)
    draws = np.random.RandomState(3)
    values = []
    for _ in range(40):
        x, y = f2[draws.choice(300, 50, replace=False)], f1[draws.choice(300, 50, replace=False)]
        values.append(kernel_distance(y, x, num_subsets=1, max_subset_size=50).mean)
    assert_close([kid.mean, kid.std], [np.mean(values), np.std(values)], 1e-9, "mean and spread")
    assert kid.std > 0


def test_unbiased_for_equal_distributions():
    rng = np.random.RandomState(8)
    near = kernel_distance(rng.randn(2000, 8), rng.randn(2000, 8), num_subsets=50, max_subset_size=200)
    far = kernel_distance(rng.randn(2000, 8), rng.randn(2000, 8) + 0.3, num_subsets=50, max_subset_size=200)
    assert abs(near.mean) < near.std and far.mean > 5 * far.std / 50**0.5


def test_seeded_and_off_the_global_stream():
    rng = np.random.RandomState(6)
    f1, f2 = rng.randn(60, 5), rng.randn(60, 5)
    before = np.random.get_state()[1].copy()
    first = kernel_distance(f1, f2, num_subsets=4, max_subset_size=20, seed=1)
    assert (np.random.get_state()[1] == before).all()
    assert first == kernel_distance(f1, f2, num_subsets=4, max_subset_size=20, seed=1)
    assert first != kernel_distance(f1, f2, num_subsets=4, max_subset_size=20, seed=2)


@pytest.mark.parametrize(
    "f1, f2, message",
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2 rows"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "wanted"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "non-finite"),
    ],
)
def test_refuses_unusable_features(f1, f2, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(f1, f2)


# --- all pairs at once, and the standard error


@pytest.mark.parametrize("num_real, num_fake, size", [(60, 50, 20), (50, 60, 1000), (2500, 40, 10)])
def test_both_ways_of_summing_agree(num_real, num_fake, size, monkeypatch):
    rng = np.random.RandomState(0)
    real, fake = rng.rand(num_real, 8), rng.rand(num_fake, 8) + 0.1
    kwargs = {"num_subsets": 6, "max_subset_size": size, "seed": 4}
    monkeypatch.setattr(kernel_inception_distance, "BLOCK", 1000)  # several blocks, the last one short
    subsets = draws(num_real, num_fake, size)
    values, full, _ = kernel_inception_distance._all_pairs(torch.from_numpy(real), torch.from_numpy(fake), subsets)
    plain = [direct(real[r], fake[f]) for f, r in subsets]
    assert_close(values, plain, 1e-9, "subsets at once")
    assert_close(full, direct(real, fake), 1e-9, "all rows")
    assert_close(kernel_distance(real, fake, **kwargs).mean, np.mean(plain), 1e-9, "mean")


def draws(num_real, num_fake, size):
    return kernel_inception_distance._draws(num_real, num_fake, 6, min(size, num_real, num_fake), 4)


def direct(x, y):
    """Unbiased squared MMD, straight from its definition."""
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    return (xx.sum() - np.trace(xx)) / (n * n - n) + (yy.sum() - np.trace(yy)) / (m * m - m) - 2 * xy.mean()


def test_agrees_with_scikit_learn():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    rng = np.random.RandomState(0)
    x, y = rng.rand(40, 8), rng.rand(40, 8) + 0.1
    xx, yy, xy = (pairwise.polynomial_kernel(a, b, degree=3, gamma=1 / 8, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    expected = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (40 * 39) - 2 * xy.mean()
    assert_close(kernel_distance(x, y, num_subsets=1).mean, expected, 1e-10, "scikit-learn's polynomial kernel")


@pytest.mark.parametrize("shift, num_subsets, size", [(0.0, 20, 100), (1.0, 20, 100), (0.5, 8, 40)])
def test_standard_error_is_what_other_draws_show(shift, num_subsets, size, monkeypatch):
    monkeypatch.setattr(kernel_inception_distance, "MAX_ERROR_ROWS", 120)
    rng = np.random.RandomState(1)
    real = np.abs(rng.randn(250, 16))
    results = [
        kernel_distance(
            real,
            np.abs(rng.randn(200, 16) + shift / 4),
            num_subsets=num_subsets,
            max_subset_size=size,
            seed=seed,
        )
        for seed in range(120)
    ]
    assert (results[0].full is None) == (size == 40)  # subset by subset
    told = np.sqrt(np.mean([r.std_error**2 for r in results]))
    assert 0.75 < told / np.std([r.mean for r in results]) < 1.35
