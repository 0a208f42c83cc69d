"""Fréchet distance: closed forms, goldens, clean-fid's own function, singular covariances."""

import warnings

import numpy as np
import pytest
from helpers import assert_close

from metrics.feature_stats import FeatureStats
from metrics.features import MetricUnavailable, cleanfid_module
from metrics.frechet_inception_distance import FrechetReference, frechet_distance


def stats_of(rows: np.ndarray) -> FeatureStats:
    stats = FeatureStats(rows.shape[1])
    for part in np.array_split(rows.astype(np.float32), 7):
        stats.append(part)
    return stats


def distance(f1: np.ndarray, f2: np.ndarray, convention: str) -> float:
    a, b = stats_of(f1), stats_of(f2)
    return frechet_distance(a.mean, a.cov(convention), b.mean, b.cov(convention))


def check_goldens(archive, name: str) -> None:
    if name == "identical":  # the same 200 rows on both sides
        real = gen = archive["main/real"][:200] if "main/real" in archive.files else archive["identical/real"]
    else:
        real, gen = archive[f"{name}/real"], archive[f"{name}/gen"]
    # In the rank-deficient case both stored values are about 1e-7 off (see test_exact_where_rank_deficient).
    bound = 1e-6 if name == "rank_deficient" else 1e-9
    for convention, keys in {"nvidia": ("nvidia", "biased_eigh"), "cleanfid": ("cleanfid", "unbiased_eigh")}.items():
        value = distance(real, gen, convention)
        for key in keys:
            if name == "identical":
                assert 0 <= value <= 1e-10
            else:
                assert_close(value, archive[f"{name}/fid_{key}"], bound, f"{name} {key}")


@pytest.mark.parametrize("name", ["main", "rank_deficient", "identical"])
def test_goldens(goldens, name):
    check_goldens(np.load(goldens / "metrics.npz", allow_pickle=False), name)


@pytest.mark.parametrize("name", ["rank_deficient", "identical"])
def test_small_copy_of_goldens(data_dir, name):
    check_goldens(np.load(data_dir / "metrics.npz", allow_pickle=False), name)


@pytest.mark.parametrize("convention, ddof", [("nvidia", 0), ("cleanfid", 1)])
def test_exact_where_rank_deficient(data_dir, convention, ddof):
    # With A, B the centred rows over sqrt(n), tr(AᵀA BᵀB)^½ is the sum of the singular values of A Bᵀ.
    archive = np.load(data_dir / "metrics.npz", allow_pickle=False)
    real, gen = (archive[f"rank_deficient/{side}"].astype(np.float64) for side in ("real", "gen"))
    a, b = ((rows - rows.mean(0)) / np.sqrt(len(rows) - ddof) for rows in (real, gen))
    diff = real.mean(0) - gen.mean(0)
    truth = diff @ diff + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    assert_close(distance(real, gen, convention), truth, 1e-12, f"rank-deficient truth, {convention}")


def test_goldens_of_mean_and_covariance(goldens):
    archive = np.load(goldens / "metrics.npz", allow_pickle=False)
    for side in ("real", "gen"):
        stats = stats_of(archive[f"main/{side}"])
        assert_close(stats.mean, archive[f"main/mu_{side}"], 1e-12, f"mu_{side}")
        cov = stats.cov("nvidia")
        assert_close(np.diag(cov), archive[f"main/sigma_{side}_biased_diag"], 1e-12, f"sigma_{side} diagonal")
        if f"main/sigma_{side}_biased_row0" in archive.files:
            assert_close(cov[0], archive[f"main/sigma_{side}_biased_row0"], 1e-12, f"sigma_{side} row 0")


def test_closed_form_of_commuting_gaussians():
    rng = np.random.RandomState(1)
    basis, _ = np.linalg.qr(rng.randn(20, 20))
    var1, var2, mu1, mu2 = rng.rand(20) * 4, rng.rand(20) * 9, rng.randn(20), rng.randn(20)
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(var1) - np.sqrt(var2)) ** 2).sum()
    value = frechet_distance(mu1, basis * var1 @ basis.T, mu2, basis * var2 @ basis.T)
    assert_close(value, expected, 1e-12, "closed form")


def test_singular_covariances_have_no_offset():
    # Two Gaussians on orthogonal lines: the traces add, nothing else.
    sigma1, sigma2 = np.zeros((300, 300)), np.zeros((300, 300))
    sigma1[0, 0], sigma2[1, 1] = 4.0, 9.0
    assert_close(frechet_distance(np.zeros(300), sigma1, np.zeros(300), sigma2), 13.0, 1e-12, "orthogonal lines")
    rng = np.random.RandomState(3)
    rows = rng.randn(12, 200)
    sigma = np.cov(rows, rowvar=False)
    assert frechet_distance(rows.mean(0), sigma, rows.mean(0), sigma) <= 1e-12 * np.trace(sigma)
    shifted = frechet_distance(rows.mean(0), sigma, rows.mean(0) + 1e-3, sigma)
    assert_close(shifted, 200 * 1e-6, 1e-6, "shift of a rank-deficient Gaussian")


def test_symmetric_and_scales_with_the_square():
    rng = np.random.RandomState(5)
    a, b = rng.randn(80, 16), rng.randn(90, 16) * 1.5 + 0.2
    value = distance(a, b, "cleanfid")
    assert_close(distance(b, a, "cleanfid"), value, 1e-6, "symmetry")
    assert_close(distance(3 * a, 3 * b, "cleanfid"), 9 * value, 1e-5, "scale")


@pytest.mark.parametrize("num", [400, 30])
def test_agrees_with_clean_fid(num):
    try:
        theirs = cleanfid_module("fid").frechet_distance
    except MetricUnavailable as error:
        pytest.skip(str(error))
    rng = np.random.RandomState(7)
    mix = rng.randn(48, 48)
    a, b = rng.randn(num, 48) @ mix, (rng.randn(num + 50, 48) + 0.3) @ mix * 1.1
    mu1, mu2, sigma1, sigma2 = a.mean(0), b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SciPy is removing sqrtm's `disp`
        try:
            expected = theirs(mu1, sigma1, mu2, sigma2)
        except TypeError as error:
            pytest.skip(f"clean-fid's function no longer runs with this SciPy: {error}")
    assert_close(frechet_distance(mu1, sigma1, mu2, sigma2), expected, 1e-6, f"clean-fid, {num} rows")


def test_conventions_differ_and_unknown_ones_are_refused():
    stats = stats_of(np.random.RandomState(0).randn(20, 4))
    assert_close(stats.cov("nvidia") * 20 / 19, stats.cov("cleanfid"), 1e-14, "n and n - 1")
    with pytest.raises(ValueError, match="convention 'biased'"):
        stats.cov("biased")


@pytest.mark.parametrize(
    "sigma, message",
    [
        (np.array([[1.0, 2.0], [0.0, 1.0]]), "not symmetric"),
        (np.diag([1.0, -1.0]), "negative eigenvalue"),
        (np.diag([1.0, np.nan]), "non-finite"),
        (np.eye(3), "wanted"),
    ],
)
def test_refuses_what_is_no_covariance(sigma, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), sigma)


# --- a reference, the standard error, the limit of infinitely many images


def gaussians(num_features: int, shift: float, seed: int = 0):
    """A reference Gaussian and a sampler of rows from another one that differs by `shift`."""
    rng = np.random.RandomState(seed)
    mix = (
        rng.randn(num_features, num_features)
        / np.sqrt(num_features)
        * np.exp(-np.arange(num_features) * 3 / num_features)
    )
    other = mix + shift * rng.randn(num_features, num_features) / np.sqrt(num_features)
    truth = frechet_distance(np.zeros(num_features), mix @ mix.T, np.full(num_features, shift), other @ other.T)
    return FrechetReference(np.zeros(num_features), mix @ mix.T), mix @ mix.T, other, truth


@pytest.mark.parametrize("num", [30, 400])
@pytest.mark.parametrize("ddof, convention", [(0, "nvidia"), (1, "cleanfid")])
def test_reference_agrees_with_the_plain_function(num, ddof, convention):
    reference, sigma, other, _ = gaussians(48, 0.3)
    rows = np.random.RandomState(1).randn(num, 48) @ other.T + 0.3
    stats = stats_of(rows)
    expected = frechet_distance(np.zeros(48), sigma, stats.mean, stats.cov(convention))
    assert_close(reference.distance(rows, ddof=ddof), expected, 1e-6, f"reference, {num} rows, {convention}")


@pytest.mark.parametrize("num_features, num, shift, low, high", [(16, 400, 0.3, 0.75, 1.3), (48, 30, 0.0, 0.9, 2.2)])
def test_standard_error_is_what_other_draws_show(num_features, num, shift, low, high):
    reference, _, other, _ = gaussians(num_features, shift)
    rng = np.random.RandomState(2)
    draws = [rng.randn(num, num_features) @ other.T + shift for _ in range(120)]
    seen = np.std([reference.distance(rows) for rows in draws])
    told = np.mean([reference.std_error(rows) for rows in draws[:40]])
    assert low < told / seen < high, (told, seen)


def test_extrapolation_removes_the_bias_of_few_images():
    reference, _, other, truth = gaussians(24, 0.3)
    rng = np.random.RandomState(3)
    limits, plain, errors = [], [], []
    for seed in range(40):
        rows = rng.randn(300, 24) @ other.T + 0.3
        result = reference.infinity(rows, seed=seed)
        limits.append(result.value)
        errors.append(result.std_error)
        plain.append(reference.distance(rows))
        assert result.sizes[0] == 30 and result.sizes[-1] == 300 and result.distances[-1] == pytest.approx(plain[-1])
    assert abs(np.mean(limits) - truth) < 0.35 * abs(np.mean(plain) - truth)
    assert 0.6 < np.mean(errors) / np.std(limits) < 1.6
    with pytest.raises(ValueError, match="at least 20"):
        reference.infinity(rows[:19])
    with pytest.raises(ValueError, match="wanted"):
        reference.distance(rows[:, :3])
