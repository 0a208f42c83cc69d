"""The rooted logistic objective: formulas, numerics, tail, schedule, and what it optimises."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch.autograd import gradcheck, gradgradcheck

from stylegan_rooted.losses import (
    LOSSES,
    MAX_K,
    KSchedule,
    LogisticLoss,
    RootedBCEWithLogitsLoss,
    RootedCrossEntropyLoss,
    RootedLogisticLoss,
    build_loss,
    check_k,
    logistic,
    parse_k,
    rooted_binary_cross_entropy_with_logits,
    rooted_cross_entropy,
    rooted_logistic,
)

KS = [1.0, 1.5, 2.0, 3.0, 8.0, 20.0]
roots = st.floats(1, 100)
margins = st.floats(-60, 60)


def power_form(margin, k):
    """The literal formula, as in the authors' released code: overflows float32 below m = -88.7, whatever k."""
    return k * (1 + torch.exp(-margin)) ** (1 / k)


def derivatives(f, x):
    """f(x), f'(x), f''(x) of an elementwise function."""
    x = x.detach().clone().requires_grad_(True)
    value = f(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    if not first.requires_grad:
        return value.detach(), first.detach(), torch.zeros_like(x)
    (second,) = torch.autograd.grad(first.sum(), x)
    return value.detach(), first.detach(), second


def assert_ratio(actual, expected, rel, what):
    """Every element within `rel` of its own expected value, not of the largest one."""
    expected = torch.as_tensor(expected)
    assert_close(actual / expected, torch.ones_like(expected), rel, what)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", KS)
def test_value_and_derivatives_follow_the_formulas(k):
    m = np.linspace(-30, 30, 241)
    sp = np.logaddexp(0, -m)
    x = torch.tensor(m)
    value, first, second = derivatives(lambda t: rooted_logistic(t, k), x)
    assert_ratio(value, k * np.exp(sp / k), 1e-13, f"value k={k}")
    assert_ratio(first, -np.exp(sp / k) * sigmoid(-m), 1e-12, f"slope k={k}")
    curvature = np.exp(sp / k) * (sigmoid(-m) ** 2 / k + sigmoid(m) * sigmoid(-m))
    assert_ratio(second, curvature, 1e-12, f"curvature k={k}")
    assert_ratio(rooted_logistic(x, k, centred=True), k * np.expm1(sp / k), 1e-13, f"centred k={k}")


@pytest.mark.parametrize(
    "k, value, slope, curvature, slope_at_minus_10",
    [
        (1, 2, -1, 1, -2.2e4),
        (2, 2.828427, -0.707107, 0.530330, -148),
        (3, 3.779763, -0.629961, 0.419974, -28.0),
        (5, 5.743491, -0.574349, 0.344610, -7.39),
        (8, 8.724062, -0.545254, 0.306705, -3.49),
        (20, 20.705298, -0.517632, 0.271757, -1.65),
    ],
)
def test_published_table(k, value, slope, curvature, slope_at_minus_10):
    got = derivatives(lambda x: rooted_logistic(x, k), torch.tensor([0.0, -10.0], dtype=torch.float64))
    assert got[0][0].item() == pytest.approx(value, abs=1e-6)
    assert got[1][0].item() == pytest.approx(slope, abs=5e-7)
    assert got[2][0].item() == pytest.approx(curvature, abs=5e-7)
    assert got[1][1].item() == pytest.approx(slope_at_minus_10, rel=5e-3)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_golden_table(k, data_dir):
    with np.load(data_dir / "loss_phases.npz") as d:
        x, value, slope = torch.tensor(d["table/x"]), d[f"table/rooted_k{k}"], d[f"table/rooted_k{k}_deriv"]
    got = derivatives(lambda m: rooted_logistic(m, k), x)
    assert_ratio(got[0], value, 1e-13, f"table value k={k}")
    assert_ratio(got[1], slope, 1e-12, f"table slope k={k}")


def test_limits_of_k():
    m = torch.linspace(-20, 20, 201, dtype=torch.float64)
    assert_ratio(rooted_logistic(m, 1e6, centred=True), logistic(m), 2e-5, "k = 1e6")
    near = m[(m > -4)]
    assert (rooted_logistic(near, 1e6, centred=True) - logistic(near)).abs().max() < 1e-5
    assert_close(rooted_logistic(m, 1), 1 + torch.exp(-m), 1e-14, "k = 1")
    assert_close(logistic(m), np.logaddexp(0, -m.numpy()), 1e-15, "logistic")


def test_the_largest_k_is_the_logistic_loss_to_rounding():
    m = torch.linspace(-8, 8, 161)
    assert_ratio(rooted_logistic(m, MAX_K, centred=True), logistic(m), 5e-6, "float32, k = MAX_K")
    logits = torch.tensor([[-500.0, 500.0], [500.0, -500.0]], requires_grad=True)
    target = torch.tensor([0, 0])
    for loss in (RootedCrossEntropyLoss(MAX_K), RootedCrossEntropyLoss(MAX_K, form="direct")):
        (slope,) = torch.autograd.grad(loss(logits, target), logits)
        assert loss(logits, target).isfinite() and slope.isfinite().all()


@pytest.mark.parametrize("k", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("options", [{}, {"centred": True}, {"calibrated": True}, {"tail_at": 3.0}])
def test_gradcheck(k, options):
    m = torch.tensor([-25.0, -7.0, -2.9, -0.3, 0.0, 0.4, 5.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: rooted_logistic(x, k, **options), m)
    assert gradgradcheck(lambda x: rooted_logistic(x, k, **options), m)


def test_gradcheck_logistic_and_cross_entropy():
    m = torch.tensor([-50.0, -19.0, -0.3, 0.0, 5.0, 21.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(logistic, m) and gradgradcheck(logistic, m)
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    target = torch.tensor([0, 4, 2, 2])
    for loss in (RootedCrossEntropyLoss(3), RootedCrossEntropyLoss(3, form="direct", label_smoothing=0.1)):
        assert gradcheck(loss, (logits, target)) and gradgradcheck(loss, (logits, target))
    soft = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = RootedBCEWithLogitsLoss(2, pos_weight=torch.arange(1.0, 6.0, dtype=torch.float64))
    assert gradcheck(loss, (logits, soft)) and gradgradcheck(loss, (logits, soft))


# --- properties -----------------------------------------------------------------------------------------------------


@given(k=roots, m=margins)
@settings(max_examples=100, deadline=None)
def test_more_curved_than_the_logistic_loss(k, m):
    x = torch.tensor([m], dtype=torch.float64)
    _, slope, curvature = derivatives(lambda t: rooted_logistic(t, k), x)
    _, _, logistic_curvature = derivatives(logistic, x)
    assert curvature > 0 and slope <= 0
    # Strictly in exact arithmetic; the ratio tends to 1 for m -> infinity, where rounding decides.
    assert curvature.item() >= logistic_curvature.item() * (1 - 1e-12)
    if m < 5:
        assert curvature > logistic_curvature


@given(k=roots, a=margins, b=margins, t=st.floats(0, 1), tail=st.one_of(st.none(), st.floats(0.1, 40)))
@settings(max_examples=100, deadline=None)
def test_convex_between_any_two_margins(k, a, b, t, tail):
    x = torch.tensor([a, b, t * a + (1 - t) * b], dtype=torch.float64)
    at_a, at_b, between = rooted_logistic(x, k, tail_at=tail).tolist()
    assert between <= (t * at_a + (1 - t) * at_b) * (1 + 1e-9)


@given(k=roots, m=st.floats(-80, 80), factor=st.floats(1, 3))
@settings(max_examples=100, deadline=None)
def test_centred_is_the_value_minus_k_and_decreases_with_k(k, m, factor):
    x = torch.tensor([m], dtype=torch.float64)
    value, centred = rooted_logistic(x, k), rooted_logistic(x, k, centred=True)
    assert centred.item() == pytest.approx(value.item() - k, rel=1e-9, abs=1e-12 * k)
    assert centred >= 0
    larger = rooted_logistic(x, k * factor, centred=True)
    assert larger.item() <= centred.item() * (1 + 1e-12)
    assert larger.item() >= logistic(x).item() * (1 - 1e-12)


@given(k=roots)
@settings(max_examples=50, deadline=None)
def test_calibrated_slope_at_zero_is_minus_one_half(k):
    _, slope, _ = derivatives(lambda x: rooted_logistic(x, k, calibrated=True), torch.zeros([1], dtype=torch.float64))
    assert slope.item() == pytest.approx(-0.5, abs=1e-13)


# --- numerics -------------------------------------------------------------------------------------------------------


def test_literal_power_form_is_the_known_bug():
    """The released code's formula gives inf and a NaN gradient at m = -100 in float32; ours is finite there."""
    m = torch.tensor([-100.0], requires_grad=True)
    value = power_form(m, 2)
    (slope,) = torch.autograd.grad(value.sum(), m)
    assert value.isinf().all() and slope.isnan().all()
    value, slope, curvature = derivatives(lambda x: rooted_logistic(x, 2), torch.tensor([-100.0]))
    assert value.isfinite().all() and slope.isfinite().all() and curvature.isfinite().all()
    exact = 2 * math.exp(50)
    assert value.item() == pytest.approx(exact, rel=1e-5)
    # Within its range the two agree.
    m = torch.linspace(-80, 80, 33)
    assert_ratio(rooted_logistic(m, 2), power_form(m, 2), 1e-5, "power form")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1.0, 1.5, 2.0, 8.0, 64.0])
@pytest.mark.parametrize("tail_at", [None, 10.0])
@pytest.mark.parametrize("centred", [False, True])
def test_no_nan_anywhere_in_plus_minus_500(dtype, k, tail_at, centred):
    m = torch.linspace(-500, 500, 2001).to(dtype)
    value, slope, curvature = derivatives(lambda x: rooted_logistic(x, k, centred=centred, tail_at=tail_at), m)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not (value.isnan() | slope.isnan() | curvature.isnan()).any()
    inside = m >= (-math.inf if tail_at else -700.0 * k if dtype == torch.float64 else -88.0 * k)
    assert value[inside].isfinite().all()
    if dtype in (torch.float32, torch.float64):  # the gradient comes back in the margin's type
        assert slope[inside].isfinite().all() and curvature[inside].isfinite().all()


def test_gradients_far_in_the_tail_are_finite_for_half_precision_extremes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        extreme = torch.finfo(dtype).max
        m = torch.tensor([-extreme, extreme], dtype=dtype)
        _, slope, curvature = derivatives(lambda x: rooted_logistic(x, 2, tail_at=8.0), m)
        assert slope.isfinite().all() and curvature.isfinite().all()
        assert slope[0].item() == pytest.approx(-math.exp(math.log1p(math.exp(8)) / 2) * sigmoid(8.0), rel=5e-3)


def test_a_bad_logit_is_not_hidden():
    assert rooted_logistic(torch.tensor([math.nan]), 2).isnan().all()
    assert rooted_logistic(torch.tensor([math.nan]), 2, tail_at=5.0).isnan().all()
    assert logistic(torch.tensor([math.nan])).isnan().all()


# --- tail -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("tail_at", [0.5, 4.0, 12.0])
def test_tail_is_the_tangent(k, tail_at):
    at = torch.tensor([-tail_at], dtype=torch.float64)
    value, slope, _ = derivatives(lambda x: rooted_logistic(x, k), at)
    bound = math.exp(math.log1p(math.exp(tail_at)) / k) * sigmoid(tail_at)

    below = at - torch.tensor([1e-9, 1.0, 7.0, 400.0], dtype=torch.float64)
    tail_value, tail_slope, tail_curvature = derivatives(lambda x: rooted_logistic(x, k, tail_at=tail_at), below)
    assert_close(tail_value, value + slope * (below - at), 1e-13, "tangent")
    assert_close(tail_slope, slope.expand(4), 1e-13, "slope below -T")
    assert tail_slope.abs().max().item() == pytest.approx(bound, rel=1e-12)  # the bound is attained
    assert bound < math.exp(math.log1p(math.exp(tail_at)) / k)
    assert (tail_curvature == 0).all()

    here = derivatives(lambda x: rooted_logistic(x, k, tail_at=tail_at), at)
    assert_close(here[0], value, 1e-14, "value at -T")
    assert_close(here[1], slope, 1e-14, "slope at -T")
    above = torch.linspace(-tail_at, 30, 50, dtype=torch.float64)
    assert torch.equal(rooted_logistic(above, k, tail_at=tail_at), rooted_logistic(above, k))


def test_tail_bounds_every_slope():
    loss = RootedLogisticLoss(2, tail="linear", tail_at=6.0)
    _, slope, _ = derivatives(loss.generator, torch.linspace(-500, 500, 4001, dtype=torch.float64)[:, None])
    bound = loss.slopes(torch.tensor([-6.0], dtype=torch.float64)).item()
    assert slope.abs().max().item() == pytest.approx(bound, rel=1e-12)


# --- what it optimises (spec section 2) -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1.0, 2.0, 3.0, 8.0, 20.0])
@pytest.mark.parametrize("p, q", [(0.3, 0.7), (0.9, 0.02), (1.0, 1.0), (2.5, 0.4)])
def test_optimal_logit_and_attained_value(k, p, q):
    """For densities p (real) and q (fake): s* = a ln(p/q), value k (p^a + q^a)^(1/a), a = k / (k + 1)."""
    def risk(s):
        s = torch.tensor([s], dtype=torch.float64)
        return (p * rooted_logistic(s, k) + q * rooted_logistic(-s, k)).item()

    a = k / (k + 1)
    found = minimize_scalar(risk, bracket=(-1, 1), tol=1e-12)
    assert found.x == pytest.approx(a * math.log(p / q), abs=1e-6)
    assert found.fun == pytest.approx(k * (p**a + q**a) ** (1 / a), rel=1e-12)


@given(k=roots, p=st.floats(0.01, 10), q=st.floats(0.01, 10))
@settings(max_examples=100, deadline=None)
def test_optimal_logit_is_stationary_and_keeps_its_sign(k, p, q):
    a = k / (k + 1)
    s = torch.tensor([a * math.log(p / q)], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((p * rooted_logistic(s, k) + q * rooted_logistic(-s, k)).sum(), s)
    assert abs(slope.item()) < 1e-9 * (p + q) * 100
    assert s.item() * math.log(p / q) >= 0


def test_k_1_is_hellinger_and_large_k_is_jensen_shannon():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])

    def attained(k):
        a = k / (k + 1)
        return (k * (p**a + q**a) ** (1 / a)).sum()

    hellinger2 = ((np.sqrt(p) - np.sqrt(q)) ** 2).sum() / 2
    assert attained(1) == pytest.approx(4 - 2 * hellinger2, rel=1e-14)
    middle = (p + q) / 2
    jensen_shannon = (p * np.log(p / middle)).sum() / 2 + (q * np.log(q / middle)).sum() / 2
    assert attained(1e6) - 2e6 == pytest.approx(2 * math.log(2) - 2 * jensen_shannon, abs=1e-5)


# --- the GAN losses -------------------------------------------------------------------------------------------------


def test_roles_and_siblings():
    logits = torch.linspace(-6, 6, 13, dtype=torch.float64)[:, None]
    rooted, plain = RootedLogisticLoss(3), LogisticLoss()
    assert torch.equal(rooted.generator(logits), rooted_logistic(logits, 3))
    assert torch.equal(rooted.discriminator_real(logits), rooted_logistic(logits, 3))
    assert torch.equal(rooted.discriminator_fake(logits), rooted_logistic(-logits, 3))
    assert torch.equal(plain.generator(logits), logistic(logits))
    assert torch.equal(plain.discriminator_real(logits), logistic(logits))
    assert torch.equal(plain.discriminator_fake(logits), logistic(-logits))
    assert set(LOSSES) == {"logistic", "rooted"}


@pytest.mark.parametrize("acts_on, g, d", [("both", True, True), ("G", True, False), ("D", False, True)])
def test_acts_on(acts_on, g, d):
    logits = torch.linspace(-6, 6, 13, dtype=torch.float64)[:, None]
    loss, rooted, plain = RootedLogisticLoss(2, acts_on=acts_on), RootedLogisticLoss(2), LogisticLoss()
    assert torch.equal(loss.generator(logits), (rooted if g else plain).generator(logits))
    assert torch.equal(loss.discriminator_fake(logits), (rooted if d else plain).discriminator_fake(logits))
    assert torch.equal(loss.discriminator_real(logits), (rooted if d else plain).discriminator_real(logits))
    assert loss.floor_generator == (2 if g else 0)
    assert loss.floor_discriminator == (4 if d else 0)


@pytest.mark.parametrize("scale, factor", [("paper", 1.0), ("calibrated", 2**-0.5), (5.0, 2.5), ("5", 2.5)])
def test_scale_and_floors(scale, factor):
    logits = torch.linspace(-8, 60, 35, dtype=torch.float64)[:, None]
    loss = RootedLogisticLoss(2, scale=scale)
    assert_close(loss.generator(logits), factor * rooted_logistic(logits, 2), 1e-15, "scaled value")
    assert loss.generator(logits).min().item() == pytest.approx(loss.floor_generator, rel=1e-12)
    assert loss.floor_generator == pytest.approx(2 * factor)
    both = loss.discriminator_real(logits) + loss.discriminator_fake(-logits)
    assert both.min().item() == pytest.approx(loss.floor_discriminator, rel=1e-12)
    assert_close(loss.centred("generator", logits), loss.generator(logits) - loss.floor_generator, 1e-14, "centred")
    assert_close(loss.slopes(logits), -derivatives(loss.generator, logits)[1], 1e-13, "slopes")


def test_calibrated_floor_follows_the_schedule():
    loss = RootedLogisticLoss("2:8@10", scale="calibrated")
    loss.advance(10_000)
    assert loss.floor_generator == pytest.approx(8 * 2 ** (-1 / 8))


def test_diagnostics():
    loss = RootedLogisticLoss(2, tail="linear", tail_at=4.0)
    margin = torch.cat([torch.full([198], 5.0), torch.tensor([-3.0, -50.0])])
    figures = loss.diagnostics(margin)
    slopes = loss.slopes(margin)
    assert figures["tail_share"].item() == pytest.approx(1 / 200)
    assert figures["max_slope"].item() == pytest.approx(slopes[-1].item())
    assert figures["top1_share"].item() == pytest.approx((slopes[-2:].sum() / slopes.sum()).item())
    assert RootedLogisticLoss(2).tail_share(margin).item() == 0


def test_observe_and_drain_cover_everything_since_the_last_call():
    loss = RootedLogisticLoss(2, tail="linear", tail_at=4.0, acts_on="D")
    loss.observe("generator", torch.zeros(4, 1))  # logistic there: nothing to say
    loss.observe("discriminator_fake", torch.tensor([[9.0], [-9.0]]))
    loss.observe("discriminator_fake", torch.tensor([[3.0], [2.0]]))
    figures = loss.drain()
    assert set(figures) == {f"Loss/{name}/discriminator_fake" for name in ("tail_share", "max_slope", "top1_share")}
    assert figures["Loss/tail_share/discriminator_fake"] == 0.25
    assert figures["Loss/max_slope/discriminator_fake"] == pytest.approx(loss.slopes(torch.tensor([-4.0])).item())
    assert loss.drain() == {}


# --- schedule and options -------------------------------------------------------------------------------------------


def test_parse_k():
    assert parse_k("2") == parse_k(2) == parse_k(2.0) == KSchedule(2, 2)
    schedule = parse_k("2:64@20")
    assert schedule == KSchedule(2, 64, 20)
    assert str(schedule) == "2:64@20" and parse_k(str(schedule)) == schedule
    assert str(parse_k("2.5")) == "2.5"
    assert [schedule.at(n) for n in (0, 20_000, 10**9)] == [2, 64, 64]
    assert schedule.at(10_000) == pytest.approx(math.sqrt(2 * 64))
    assert parse_k("64:2@20").at(4_000) == pytest.approx(64 * (2 / 64) ** 0.2)


def test_advance_moves_k_and_the_floors():
    loss = RootedLogisticLoss(k_schedule="2:32@1")
    assert (loss.k, loss.floor_generator, loss.floor_discriminator) == (2, 2, 4)
    loss.advance(500)
    assert loss.k == pytest.approx(8) and loss.floor_discriminator == pytest.approx(16)
    assert loss.generator(torch.zeros(1, 1)).item() == pytest.approx(8 * 2 ** (1 / 8))
    loss.advance(5000)
    assert loss.k == 32
    LogisticLoss().advance(500)
    assert LogisticLoss().drain() == {}


@given(start=roots, end=roots, kimg=st.floats(0.01, 100), t=st.floats(0, 2))
@settings(max_examples=100, deadline=None)
def test_schedule_stays_between_its_ends(start, end, kimg, t):
    k = KSchedule(start, end, kimg).at(t * kimg * 1000)
    assert min(start, end) * (1 - 1e-12) <= k <= max(start, end) * (1 + 1e-12)
    assert k >= 1


BAD_K = [0.5, 0, -2, math.nan, math.inf, -math.inf, None, "0.5", "nan", "two", "", "2:64", "2@5", "0.5:2@5", "2:nan@5"]
BAD_K += [1.1e6, 1e39, "1e39", "2:1e39@5"]
BAD_LENGTHS = ["2:4@0", "2:4@-1", "2:4@nan", "2:4@x", "2:3:4@5"]


@pytest.mark.parametrize("k", BAD_K + BAD_LENGTHS)
def test_bad_k_names_the_option(k):
    with pytest.raises(ValueError, match="--k"):
        RootedLogisticLoss(k)
    with pytest.raises(ValueError, match="--k"):
        build_loss("rooted", k=k)


@pytest.mark.parametrize("make", [RootedBCEWithLogitsLoss, RootedCrossEntropyLoss, RootedLogisticLoss, check_k])
def test_a_tensor_is_no_k(make):
    """torch's first argument is the weight: one such number was taken for k without a word."""
    for weight in (torch.tensor([3.0]), torch.ones(4, 3)):
        with pytest.raises(ValueError, match=r"^--k is a tensor, float32 \[.*weight=.*, pos_weight=[^\n]*$"):
            make(weight)


@pytest.mark.parametrize("k", [0.99, 1e39, math.nan, math.inf])
def test_bad_k_says_the_allowed_range(k):
    with pytest.raises(ValueError, match=r"--k .*>= 1"):
        rooted_logistic(torch.zeros(1), k)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tail": "linear"}, r"--tail linear needs --tail-at T.*\(0, 160\]"),
        ({"tail": "quadratic"}, "--tail quadratic is unknown; one of none, linear"),
        ({"tail_at": 5.0}, "--tail-at 5.0 is for --tail linear only"),
        ({"tail": "linear", "tail_at": 0.0}, r"--tail-at 0.0 .*\(0, 160\]"),
        ({"tail": "linear", "tail_at": -1.0}, "--tail-at"),
        ({"tail": "linear", "tail_at": math.nan}, "--tail-at nan"),
        ({"tail": "linear", "tail_at": 161.0}, r"--tail-at 161.0 .*\(0, 160\]"),
        ({"scale": "big"}, "--scale big is none of paper, calibrated or a positive"),
        ({"scale": 0.0}, "--scale"),
        ({"scale": -1.0}, "--scale"),
        ({"scale": math.nan}, "--scale"),
        ({"acts_on": "g"}, "--acts-on g is unknown; one of both, D, G"),
    ],
)
def test_bad_options_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        RootedLogisticLoss(2, **options)


def test_tail_range_follows_the_smallest_root_of_the_schedule():
    with pytest.raises(ValueError, match=r"--tail-at 200 .*\(0, 160\]"):
        RootedLogisticLoss("64:2@5", tail="linear", tail_at=200)


def test_steepest_allowed_tail_is_finite_in_float32():
    for k in (1.0, 2.0, 5.0):
        loss = RootedLogisticLoss(k, tail="linear", tail_at=80 * k)
        value, slope, curvature = derivatives(loss.generator, torch.tensor([[-500.0], [-80 * k], [0.0], [500.0]]))
        assert value.isfinite().all() and slope.isfinite().all() and curvature.isfinite().all()


def test_build_loss():
    assert isinstance(build_loss("logistic"), LogisticLoss)
    assert build_loss("rooted", k="3", tail="linear", tail_at=7.0, scale="calibrated", acts_on="G").k == 3
    with pytest.raises(ValueError, match="--loss hinge is unknown; one of logistic, rooted"):
        build_loss("hinge")
    with pytest.raises(ValueError, match="--tail-at: for --loss rooted only"):
        build_loss("logistic", tail_at=3.0)


# --- several classes (spec section 3) -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1.0, 2.0, 3.0, 8.0])
def test_two_classes_are_the_binary_objective(k):
    m = torch.linspace(-40, 40, 81, dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(m), m], dim=1)
    target = torch.ones(len(m), dtype=torch.int64)
    expected = rooted_logistic(m, k)
    def loss(**options):
        return rooted_cross_entropy(logits, target, k=k, reduction="none", **options)

    assert_ratio(loss(), expected, 1e-12, "two classes")
    assert_close(loss(centred=True), expected - k, 1e-12, "two classes, centred")
    binary = rooted_binary_cross_entropy_with_logits(m, torch.ones_like(m), k=k, reduction="none")
    assert_ratio(binary, expected, 1e-12, "binary")


def test_the_forms_of_several_classes():
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(50, 10, dtype=torch.float64, generator=g) * 3, torch.arange(50) % 10
    p = logits.softmax(1)[torch.arange(50), target]

    def loss(scale=1, **options):
        return rooted_cross_entropy(logits * scale, target, reduction="none", **options)

    assert_close(loss(k=3), 3 * p ** (-1 / 3), 1e-13, "inverse")
    assert_close(loss(k=8, m=10, form="direct"), 10 * (1 - p ** (1 / 8)), 1e-13, "direct")
    assert (loss(100, k=8, m=10, form="direct") <= 10).all()
    # Generalised cross-entropy (1 - p^q) / q with q = 1/k.
    assert_close(loss(k=4, form="direct"), (1 - p**0.25) / 0.25, 1e-13, "q = 1/4")


def test_alpha_losses():
    """alpha-loss: alpha / (alpha - 1) * (1 - p^((alpha - 1) / alpha)); inverse is alpha = k/(k+1), direct k/(k-1)."""
    logits, target = torch.tensor([[1.0, -0.5, 2.0]], dtype=torch.float64), torch.tensor([1])
    p = logits.softmax(1)[0, 1]
    for k in (2.0, 5.0):
        for form, a in (("inverse", k / (k + 1)), ("direct", k / (k - 1))):
            expected = a / (a - 1) * (1 - p ** ((a - 1) / a))
            got = rooted_cross_entropy(logits, target, k=k, form=form, centred=form == "inverse")
            assert got.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("form", ["inverse", "direct"])
def test_m_is_the_factor_in_front(form):
    """Of values, tangents and centred values alike; None is k."""
    logits, target = torch.linspace(-90, 9, 7, dtype=torch.float64)[:, None] * torch.tensor([0.0, 1.0]), torch.ones(7)
    for options in ({}, {"tail_at": 12.0}, {"centred": True} if form == "inverse" else {}):
        one, ten = (
            rooted_cross_entropy(logits, target.long(), k=4, m=m, form=form, reduction="none", **options)
            for m in (None, 10.0)
        )
        assert_ratio(ten / 10, one / 4, 1e-14, f"{form} {options}")


def test_modules_hand_every_option_on():
    logits, target = torch.tensor([[-30.0, 4.0, 0.5], [3.0, -20.0, 1.0]], dtype=torch.float64), torch.tensor([0, 1])
    weight, soft = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), logits.roll(1, 1).sigmoid()
    many = {"k": 2.5, "m": 4.0, "reduction": "sum", "ignore_index": 1, "label_smoothing": 0.2, "centred": True}
    module = RootedCrossEntropyLoss(**many, tail_at=5.0, weight=weight)
    assert torch.equal(module(logits, target), rooted_cross_entropy(logits, target, weight, tail_at=5.0, **many))
    two = {"k": 2.5, "reduction": "sum", "centred": True, "tail_at": 5.0, "calibrated": True}
    module = RootedBCEWithLogitsLoss(**two, weight=weight, pos_weight=weight.flip(0))
    ours = rooted_binary_cross_entropy_with_logits(logits, soft, weight, weight.flip(0), **two)
    assert torch.equal(module(logits, soft), ours)
    every = rooted_cross_entropy(logits, target, weight, tail_at=5.0, **many)
    for name in ("k", "m", "ignore_index", "label_smoothing", "centred", "tail_at"):  # each of them matters here
        fewer = {key: value for key, value in (many | {"tail_at": 5.0}).items() if key != name}
        assert not torch.equal(rooted_cross_entropy(logits, target, weight, **fewer), every), name


def test_the_binary_cross_entropy_calibrated():
    """At logit 0 it is as steep as torch's, for every k."""
    for k in KS:
        x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        loss = rooted_binary_cross_entropy_with_logits(
            x, torch.tensor([0.0, 1.0], dtype=torch.float64), k=k, calibrated=True, reduction="sum"
        )
        assert_close(torch.autograd.grad(loss, x)[0], torch.tensor([0.5, -0.5], dtype=torch.float64), 1e-13, f"k={k}")


CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("form", ["inverse", "direct"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 5, 2, 4)])
@pytest.mark.parametrize("soft", [False, True])
def test_large_k_is_torchs_cross_entropy_whatever_the_options(form, reduction, smoothing, weight, shape, soft):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, dtype=torch.float64, generator=g) * 3
    axis = 0 if len(shape) == 1 else 1
    target = logits.roll(1, 0).softmax(axis) if soft else logits.roll(1, axis).argmax(axis)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    if not soft:
        options["ignore_index"] = 2
    expected = torch.nn.functional.cross_entropy(logits, target, weight, **options)
    ours = RootedCrossEntropyLoss(1e6, form=form, weight=weight, centred=form == "inverse", **options)
    assert ours(logits, target).shape == expected.shape
    assert_close(ours(logits, target), expected, 1e-5, "k = 1e6")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_large_k_is_torchs_binary_cross_entropy(reduction, weighted):
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(6, 5, dtype=torch.float64, generator=g) * 3, torch.rand(6, 5, generator=g).double()
    weights = {"weight": CLASS_WEIGHT, "pos_weight": CLASS_WEIGHT.flip(0)} if weighted else {}
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction=reduction, **weights)
    ours = RootedBCEWithLogitsLoss(1e6, reduction=reduction, centred=True, **weights)
    assert_close(ours(logits, target), expected, 1e-5, "k = 1e6")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1.0, 2.0, 3.0, 20.0])
def test_classifier_losses_and_gradients_are_finite_for_any_logits(dtype, k):
    values = torch.tensor([-500.0, -90.0, 0.0, 90.0, 500.0], dtype=dtype)
    logits = torch.cartesian_prod(values, values, values).requires_grad_(True)
    target = torch.arange(len(logits)) % 3
    losses = [
        rooted_cross_entropy(logits, target, k=k, form=form, label_smoothing=smoothing, reduction="none").sum()
        for form in ("inverse", "direct")
        for smoothing in (0.0, 0.1)
    ]
    losses.append(rooted_binary_cross_entropy_with_logits(logits, (logits > 0).to(dtype), k=k).sum())
    for loss in losses:
        (slope,) = torch.autograd.grad(loss, logits)
        assert loss.dtype == torch.float32 and loss.isfinite() and slope.isfinite().all()
    # What the guard is for: without it the product of an infinite slope and a vanished probability is not a number.
    nll = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
    (unguarded,) = torch.autograd.grad((k * (nll / k).exp()).sum(), logits)
    assert unguarded.isnan().any() == (k < 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_overflow_the_tangent_count_for_nothing_where_their_share_is_0(dtype):
    """At 1e13 the tangent beyond 60 k is inf, and inf * 0 of a perfect prediction was NaN."""
    logits = torch.tensor([[-1e13, 1e13, 0.0]], dtype=dtype, requires_grad=True)
    soft = torch.tensor([[0.0, 1.0, 0.0]], dtype=dtype)
    weight = torch.tensor([0.0, 1.0, 1.0])
    right = {
        "binary": (rooted_binary_cross_entropy_with_logits(logits[:, :2], soft[:, :2], k=2), 2.0),
        "soft": (rooted_cross_entropy(logits, soft, k=3), 3.0),
        "weight 0": (rooted_cross_entropy(logits, torch.tensor([0]), weight, k=3, reduction="sum"), 0.0),
    }
    for name, (loss, expected) in right.items():
        (slope,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(expected), name
        assert slope.isfinite().all(), name
    assert rooted_cross_entropy(logits * math.nan, soft, k=3).isnan()  # a bad logit is not hidden


def test_ignored_samples_count_for_nothing_whatever_their_logits():
    logits, target = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, -100, 2, 1])
    bad = logits.clone()
    bad[1] = math.nan
    for smoothing in (0.0, 0.1):
        for reduction in ("mean", "sum"):
            options = {"label_smoothing": smoothing, "reduction": reduction}
            assert torch.nn.functional.cross_entropy(bad, target, **options).isfinite()  # torch's own contract
            ours, clean = (rooted_cross_entropy(x, target, **options) for x in (bad, logits))
            assert torch.equal(ours, clean)
    for reduction in ("none", "sum", "mean"):
        nothing = torch.full([4], -100)
        ours = rooted_cross_entropy(logits, nothing, reduction=reduction)
        theirs = torch.nn.functional.cross_entropy(logits, nothing, reduction=reduction)
        assert torch.equal(ours, theirs) or (ours.isnan() and theirs.isnan())


def test_class_numbers_of_one_byte_are_taken_as_by_torch():
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    for options in ({}, {"label_smoothing": 0.1}, {"ignore_index": 2}):
        small, large = (rooted_cross_entropy(logits, y, **options) for y in (target.to(torch.uint8), target))
        assert torch.equal(small, large)


def test_underflowing_probability_keeps_its_gradient():
    logits = torch.tensor([[0.0, 200.0]], requires_grad=True)
    p = logits.softmax(1)[:, 0]
    (naive,) = torch.autograd.grad((1 - p ** (1 / 3)).sum(), logits)
    assert naive.isnan().any()
    loss = rooted_cross_entropy(logits, torch.tensor([0]), k=3, m=3, form="direct")
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope.isfinite().all()


def test_inverse_form_is_convex_and_the_direct_form_is_not():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, 4, dtype=torch.float64, generator=g) * 6
    target = torch.arange(500) % 4

    def excess(form):
        at_a, at_b, between = (
            rooted_cross_entropy(x, target, k=2, form=form, reduction="none") for x in (a, b, (a + b) / 2)
        )
        return ((at_a + at_b) / 2 - between) / between

    assert (excess("inverse") >= -1e-12).all()
    assert (excess("direct") < -1e-3).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0.5}, "k is a finite number >= 1"),
        ({"form": "sideways"}, "one of inverse, direct"),
        ({"m": 0.0}, "m 0.0 is out of range"),
        ({"label_smoothing": 1.5}, r"a share in \[0, 1\]"),
        ({"reduction": "median"}, "one of none, mean, sum"),
        ({"k": 2.0, "tail_at": 200.0}, "out of range"),
    ],
)
def test_classifier_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        RootedCrossEntropyLoss(**options)
    with pytest.raises(ValueError, match=message):
        rooted_cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), **options)


def test_targets_that_do_not_fit():
    with pytest.raises(ValueError, match=r"target of shape \[3\] for logits of shape \[2, 3\]; use \[2\]"):
        rooted_cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    logits, soft = torch.zeros(2, 3), torch.full([2, 3], 1 / 3)
    number = torch.zeros(2, dtype=torch.int64)
    for message, wrong in {
        "ignore_index 1 is for class numbers": lambda: rooted_cross_entropy(logits, soft, ignore_index=1),
        r"weight of shape \[2\] for 3 classes": lambda: rooted_cross_entropy(logits, number, torch.ones(2)),
        r"target is bool \[2, 3\]": lambda: rooted_cross_entropy(logits, soft > 0),
        r"not int64 \[2\]": lambda: rooted_cross_entropy(number, number),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="use the same"):
        rooted_binary_cross_entropy_with_logits(torch.zeros(2, 1), torch.zeros(2))


def test_modules_carry_their_weights_and_say_their_options():
    loss = RootedCrossEntropyLoss(8, 10, "direct", weight=torch.ones(3))
    assert loss.to(torch.float64).weight.dtype == torch.float64
    assert "k=8.0, m=10.0, form=direct" in repr(loss)
    assert "k=2.0" in repr(RootedBCEWithLogitsLoss())


def test_classifier_losses_compile_without_graph_breaks():
    logits, target = torch.randn(8, 5), torch.arange(8) % 5
    for loss, y in ((RootedCrossEntropyLoss(3), target), (RootedBCEWithLogitsLoss(2), torch.rand(8, 5))):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert_close(compiled(logits, y), loss(logits, y), 1e-6, "compiled")


# --- the published figures ------------------------------------------------------------------------------------------


def test_published_discriminator_loss_fits_k_20_not_2():
    """Spec section 2: the logged D loss of 40.4 to 42.5 lies just above k = 20's floor, ten times k = 2's."""
    assert RootedLogisticLoss(20).floor_discriminator == 40
    undecided = RootedLogisticLoss(20)
    zero = torch.zeros(1, 1)
    assert 40.4 < (undecided.discriminator_real(zero) + undecided.discriminator_fake(zero)).item() < 42.5
    two = RootedLogisticLoss(2)
    assert (two.discriminator_real(zero) + two.discriminator_fake(zero)).item() < 6


def test_meta_of_the_small_copy(data_dir):
    with np.load(data_dir / "loss_phases.npz") as d:
        assert set(json.loads(str(d["meta"]))["ks"]) == {1, 2, 3, 8}
