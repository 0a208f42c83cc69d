"""Paired intervals: closed forms, SciPy as the reference, coverage by simulation, and what a verdict may claim."""

import itertools
import math

import numpy as np
import pytest
from helpers import assert_close
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from stylegan_rooted import paired
from stylegan_rooted.paired import compare_pairs, paired_difference, paired_ratio, verdict

D = np.array([0.3, -1.2, 0.9, 2.2, 0.4])
ZERO = np.zeros(5)
METHOD = st.sampled_from(paired.METHODS)


def test_student_is_the_textbook_formula_and_scipys() -> None:
    found = paired_difference(D, ZERO, method="t")
    half = 2.7764451051977987 * D.std(ddof=1) / math.sqrt(5)  # t at 0.975 with 4 degrees of freedom
    assert_close([found.mean, found.low, found.high], [0.52, 0.52 - half, 0.52 + half], 1e-12)
    reference = stats.ttest_rel(D + 7, ZERO + 7).confidence_interval(0.95)
    assert_close([found.low, found.high], [reference.low, reference.high], 1e-12)


def test_two_pairs_have_three_means() -> None:
    """Resamples of (0, 1): means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    wide = paired_difference([0, 1], [0, 0], method="percentile", level=0.6)
    narrow = paired_difference([0, 1], [0, 0], method="percentile", level=0.4)
    assert (wide.low, wide.high) == (0, 1) and (narrow.low, narrow.high) == (0.5, 0.5)


@pytest.mark.parametrize("n", [2, 4, 5])
def test_all_resamples_are_counted(n) -> None:
    """Against the n^n ordered ones."""
    d = np.random.default_rng(n).normal(size=n)
    means = np.sort([np.mean(c) for c in itertools.product(d, repeat=n)])
    for level in (0.5, 0.8, 0.9, 0.95):
        found = paired_difference(d, np.zeros(n), method="percentile", level=level)
        least = math.ceil((1 - level) / 2 * n**n - 1e-9)
        assert_close([found.low, found.high], [means[least - 1], means[-least]], 1e-12, f"{level}")


@pytest.mark.parametrize("n", [6, 8, 12, 30])
@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_scipys_bootstrap_agrees(n, method) -> None:
    """Within what drawing resamples leaves open: a 40th of the interval's length."""
    d = np.random.default_rng(n).exponential(size=n) - 0.3
    found = paired_difference(d, np.zeros(n), method=method)
    reference = stats.bootstrap(
        (d,), np.mean, method=method, n_resamples=40_000, rng=np.random.default_rng(1)
    ).confidence_interval
    slack = (found.high - found.low) / 40
    assert abs(found.low - reference.low) < slack and abs(found.high - reference.high) < slack


def test_coverage_is_what_the_page_says() -> None:
    """Share of simulated experiments whose 95 % interval covers the truth: docs/compare.md quotes these."""
    rng = np.random.default_rng(0)
    samples = {n: rng.normal(size=[num, n]) for n, num in ((3, 2000), (5, 2000), (8, 800))}

    def coverage(n: int, method: str) -> float:
        intervals = [paired_difference(d, np.zeros(n), method=method) for d in samples[n]]
        return float(np.mean([not i.excludes(0) for i in intervals]))

    assert {n: coverage(n, "t") for n in samples} == pytest.approx({3: 0.95, 5: 0.95, 8: 0.95}, abs=0.015)
    assert {n: coverage(n, "bca") for n in samples} == pytest.approx({3: 0.75, 5: 0.84, 8: 0.89}, abs=0.03)


@settings(deadline=None)
@example([0.0] * 5 + [2.0**-1000], "bca")
@given(st.lists(st.integers(-(2**40), 2**40).map(lambda n: n / 2**30), min_size=2, max_size=6), METHOD)
def test_swapping_shifting_and_scaling(d, method) -> None:
    zero = [0.0] * len(d)
    there, back = paired_difference(d, zero, method=method), paired_difference(zero, d, method=method)
    assert (there.low, there.high) == (-back.high, -back.low)
    doubled = paired_difference([2 * x for x in d], zero, method=method)
    assert (doubled.low, doubled.high) == (2 * there.low, 2 * there.high)
    slack = 1e-9 * (1 + max(map(abs, d)))
    assert there.low - slack <= there.mean <= there.high + slack


def test_what_both_share_cancels() -> None:
    seeds = np.array([100.0, -50.0, 7.0, 3.0, 0.5])
    assert_close(
        list(vars(paired_difference(D + seeds, seeds)).values())[:3],
        list(vars(paired_difference(D, ZERO)).values())[:3],
        1e-12,
    )


def test_ratios_are_differences_of_logarithms() -> None:
    found = paired_ratio([2.0, 8.0], [1.0, 2.0], method="t")
    logs = paired_difference([math.log(2), math.log(4)], [0, 0], method="t")
    assert_close([found.mean, found.low, found.high], np.exp([logs.mean, logs.low, logs.high]), 1e-12)
    assert found.mean == pytest.approx(8**0.5)
    with pytest.raises(ValueError, match="positive"):
        paired_ratio([1.0], [0.0])


@pytest.mark.parametrize(
    "a, b, options, message",
    [
        ([1], [1, 2], {}, "one length"),
        ([], [], {}, "no pair"),
        ([math.nan], [1], {}, "finite"),
        ([1], [1], {"method": "magic"}, "bca, percentile, t"),
        ([1], [1], {"level": 1.0}, "level"),
    ],
)
def test_refusals(a, b, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b, **options)


def test_one_pair_and_equal_pairs() -> None:
    one = paired_difference([1.0], [3.0])
    assert (one.mean, one.low, one.high, one.n) == (-2, -math.inf, math.inf, 1)
    assert paired_ratio([1.0], [4.0]).low == 0 and paired_ratio([1.0], [4.0]).high == math.inf
    assert verdict("a", "b", compare_pairs([1.0], [3.0]), what="FD").outcome == paired.TOO_FEW
    same = compare_pairs(D, D)
    assert (same.bootstrap.low, same.student.high) == (0, 0)
    assert verdict("a", "b", same, what="FD").outcome == paired.NONE_SEEN


def test_differences_without_spread_claim_nothing_until_their_sign_does() -> None:
    """Equal differences have an interval of length 0 around whatever they are: two of 1e-9 were "better" by it."""
    for n, size in ((2, 1.0), (5, 1e-9), (5, -3.0)):
        a = 50 + np.arange(n) + size
        found = compare_pairs(a, a - size)
        assert found.bootstrap.low == found.student.high == pytest.approx(size, rel=1e-4)  # rounding is no spread
        told = verdict("a", "b", found, what="FD")
        assert told.outcome == paired.TOO_FEW and "no spread" in told.text
    six = compare_pairs(np.arange(6) - 1.0, np.arange(6))
    assert verdict("a", "b", six, what="FD").outcome == paired.BETTER  # a sign test: p = 1/32
    corrected = compare_pairs(np.arange(6) - 1.0, np.arange(6), num_comparisons=2)
    assert verdict("a", "b", corrected, what="FD").outcome == paired.TOO_FEW
    none = verdict("a", "b", compare_pairs(D, D), what="FD")
    assert none.outcome == paired.NONE_SEEN and "all 5 differences are +0" in none.text


@pytest.mark.parametrize("of_ratios", [False, True])
@pytest.mark.parametrize("base", [np.arange(20.0, 26.0), np.full(6, 1.0)])
def test_rounding_all_the_same_way_is_no_difference(base, of_ratios) -> None:
    """Six pairs one ulp apart were "worse" by the sign test ("mean ratio 1, 1 to 1"); near 1 logarithms vanish."""
    found = compare_pairs(np.nextafter(base, 99), base, of_ratios=of_ratios)
    assert found.bootstrap.mean == found.student.high == found.neutral
    assert verdict("a", "b", found, what="FD").outcome == paired.NONE_SEEN
    more = compare_pairs(base * (1 + 1e-10), base, of_ratios=of_ratios)
    assert verdict("a", "b", more, what="FD").outcome == paired.WORSE


def test_what_fails_more_often_is_never_the_better_one() -> None:
    clear = np.array([-5.0, -5.2, -4.9, -5.1, -4.8])

    def outcome(d, failed: int, failed_baseline: int) -> str:
        found = compare_pairs(d, ZERO)
        return verdict("a", "b", found, what="FD", num_failed=failed, num_failed_baseline=failed_baseline).outcome

    assert outcome(clear, 2, 0) == outcome(-clear, 0, 1) == paired.LEFT_OPEN
    assert outcome(clear, 1, 1) == outcome(clear, 0, 3) == paired.BETTER
    assert outcome(-clear, 2, 0) == outcome(-clear, 2, 2) == paired.WORSE
    assert outcome(D, 2, 0) == paired.NONE_SEEN


def test_verdicts() -> None:
    clear = np.array([-5.0, -5.2, -4.9, -5.1, -4.8])
    found = verdict("rooted:k=2", "logistic", compare_pairs(clear, ZERO), what="final FD")
    assert found.outcome == paired.BETTER
    assert found.text.startswith("rooted:k=2 against logistic, final FD: better (mean difference -5, 95% interval -5.")
    assert "n = 5" in found.text and "5 pairs are few and the intervals coarse" in found.text
    assert "p = 0.062" in found.text
    assert verdict("a", "b", compare_pairs(-clear, ZERO), what="FD").outcome == paired.WORSE
    assert verdict("a", "b", compare_pairs(-clear, ZERO), what="accuracy", lower_is_better=False).outcome == "better"
    none = verdict("a", "b", compare_pairs(D, ZERO), what="FD")
    assert none.outcome == paired.NONE_SEEN and "is not excluded" in none.text


def test_many_comparisons_ask_for_more() -> None:
    d = np.array([-1.0, -2.0, -1.5, -0.4, -2.4])
    assert verdict("a", "b", compare_pairs(d, ZERO), what="FD").outcome == paired.BETTER
    among = verdict("a", "b", compare_pairs(d, ZERO, num_comparisons=20), what="FD")
    assert among.outcome == paired.NONE_SEEN and "one of 20" in among.text
    corrected = paired_difference(d, ZERO, method="t", level=1 - 0.05 / 20)
    assert f"the interval corrected for that is {corrected.low:+.3g} to {corrected.high:+.3g})" in among.text
    with pytest.raises(ValueError, match="below 1"):
        compare_pairs(d, ZERO, num_comparisons=0)


def test_ratios_see_what_differences_cannot() -> None:
    """Runs that end at twice to twenty times the baseline's figure, and a figure whose unit is of no matter."""
    base = np.array([23.0, 21.0, 26.0, 20.0, 24.0])
    apart = base * np.array([2.0, 5.0, 15.0, 3.0, 18.0])
    differences, ratios = compare_pairs(apart, base), compare_pairs(apart, base, of_ratios=True)
    assert (differences.neutral, ratios.neutral) == (0, 1)
    assert ratios.student.mean == pytest.approx((2 * 5 * 15 * 3 * 18) ** 0.2)
    assert verdict("a", "b", differences, what="FD").outcome == paired.NONE_SEEN
    told = verdict("a", "b", ratios, what="FD")
    assert told.outcome == paired.WORSE and "(mean ratio 6.05, 95% interval 2." in told.text and "+" not in told.text
    assert verdict("b", "a", compare_pairs(base, apart, of_ratios=True), what="FD").outcome == paired.BETTER
    scaled = compare_pairs(1000 * apart, 1000 * base, of_ratios=True)
    assert scaled.corrected.low == pytest.approx(ratios.corrected.low, rel=1e-12)
    with pytest.raises(ValueError, match="positive"):
        compare_pairs(apart - 47, base, of_ratios=True)


def test_ratios_beyond_floats_are_infinite() -> None:
    found = compare_pairs([25, 8000], [22, 21], of_ratios=True, num_comparisons=20)
    assert found.corrected.high == math.inf and 0 <= found.corrected.low < 1 and math.isfinite(found.student.mean)
    assert verdict("a", "b", found, what="FD").outcome == paired.NONE_SEEN
    assert paired_ratio([1e300, 1e300], [1e-300, 1e-299]).mean == math.inf


def test_ratios_that_are_all_equal() -> None:
    base = np.array([3.0, 5.0, 7.0, 11.0, 13.0, 17.0])
    same = verdict("a", "b", compare_pairs(base, base, of_ratios=True), what="FD")
    assert same.outcome == paired.NONE_SEEN and "all 6 ratios are 1)" in same.text
    twice = compare_pairs(2 * base, base, of_ratios=True)
    assert verdict("a", "b", twice, what="FD").outcome == paired.WORSE  # by the sign test
    one = verdict("a", "b", compare_pairs([3.0], [2.0], of_ratios=True), what="FD")
    assert one.outcome == paired.TOO_FEW and "(ratio 1.5)" in one.text


def test_where_the_intervals_disagree_nothing_is_claimed() -> None:
    """The bootstrap of few pairs is too narrow: here it alone excludes zero."""
    d = np.array([-0.2, -3.0, -0.9, -0.1, -2.0])
    found = compare_pairs(d, ZERO)
    assert found.bootstrap.excludes(0) and not found.student.excludes(0)
    told = verdict("a", "b", found, what="FD")
    assert told.outcome == paired.NONE_SEEN and "only one of the two intervals" in told.text


def test_false_alarms_stay_below_the_level() -> None:
    """Two arms that are the same: a difference is claimed in about 5 % of 2,000 simulated experiments."""
    samples = np.random.default_rng(3).normal(size=[2000, 5])
    claimed = [verdict("a", "b", compare_pairs(d, ZERO), what="FD").outcome != paired.NONE_SEEN for d in samples]
    assert np.mean(claimed) == pytest.approx(0.05, abs=0.015)  # three standard errors
