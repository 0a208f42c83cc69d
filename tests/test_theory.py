"""What docs/theory.md says beyond the formulas: R1's weight, ADA's sign, tails; and that every test it names exists."""

import ast
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from stylegan_rooted.losses import RootedLogisticLoss, logistic, rooted_cross_entropy, rooted_logistic

KS = [1.0, 2.0, 3.0, 8.0, 20.0]
PAGE = ROOT / "docs" / "theory.md"


def slope(f, m):
    m = torch.as_tensor(m, dtype=torch.float64).clone().requires_grad_(True)
    (first,) = torch.autograd.grad(f(m).sum(), m, create_graph=True)
    return first


@given(k=st.floats(1, 100))
@settings(max_examples=50, deadline=None)
def test_every_k_has_the_logistic_losss_right_tail(k):
    """C_k(m) e^m -> 1 for m -> infinity, for the direct form too: what decides where separable data lead."""
    m = torch.tensor([12.0, 20.0], dtype=torch.float64)
    direct = -k * torch.expm1(-logistic(m) / k)
    for value in (rooted_logistic(m, k, centred=True), direct):
        assert_close(value * m.exp(), torch.ones(2), 1e-5, f"k = {k}")


@pytest.mark.parametrize("k", KS)
def test_the_stiffness_at_the_undecided_point(k):
    """R''(0) for p = q = 1 is 2^(1/k) / (2 a), where the logistic loss has 1/2."""
    def risk(s):
        return rooted_logistic(s, k) + rooted_logistic(-s, k)

    s = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(risk(s).sum(), s, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), s)
    assert second.item() == pytest.approx(2 ** (1 / k) * (k + 1) / (2 * k), rel=1e-12)


def regularised(loss, p, q, gamma, length):
    """Logits on a ring of `length` that minimise the mean of p L(s) + q L(-s) + gamma / 2 s'^2, by Newton's method."""
    n = len(p)
    step = length / n
    difference = (torch.eye(n, dtype=torch.float64).roll(1, 1) - torch.eye(n, dtype=torch.float64)) / step
    s = torch.zeros(n, dtype=torch.float64)
    for _ in range(12):
        s = s.detach().requires_grad_(True)
        (g,) = torch.autograd.grad((p * loss(s) + q * loss(-s)).sum(), s, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), s)
        stiffness = gamma * difference.T @ difference
        s = s.detach() - torch.linalg.solve(torch.diag(h) + stiffness, g.detach() + stiffness @ s.detach())
    return s


@pytest.mark.parametrize("k", KS)
def test_r1_is_lighter_beside_the_rooted_loss(k):
    """Where p and q hardly differ, R1 shrinks a wave of frequency w by c / (c + gamma w^2), c = 2^(1/k) / (2 a)."""
    n, length, gamma, size = 100, 2 * math.pi, 0.3, 1e-3
    x = torch.arange(n, dtype=torch.float64) * length / n
    wave = (2 * x).cos()
    p, q = 1 + size * wave, 1 - size * wave
    a, frequency = k / (k + 1), 2 * n / length * math.sin(2 * length / n / 2)  # of the differences, about 2
    for loss, shrunk, stiffness in (
        (lambda m: rooted_logistic(m, k), a, 2 ** (1 / k) / (2 * a)),
        (lambda m: rooted_logistic(m, k, calibrated=True), a, 1 / (2 * a)),
        (logistic, 1.0, 0.5),
    ):
        for weight in (0.0, gamma):
            s = regularised(loss, p, q, weight, length)
            expected = 2 * size * shrunk * stiffness / (stiffness + weight * frequency**2)
            assert (s @ wave).item() / (n / 2) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("k", KS)
def test_the_r1_penalty_of_the_best_logits_is_a_squared_times_the_logistic_losss(k):
    x = torch.linspace(-3, 3, 121, dtype=torch.float64)
    p, q = (-(x - 0.5).square() / 2).exp(), (-(x + 0.5).square() / 1.5).exp()
    best = regularised(lambda m: rooted_logistic(m, k), p, q, 0.0, 6.0)
    plain = regularised(logistic, p, q, 0.0, 6.0)
    penalties = [(p * torch.gradient(s, spacing=0.05)[0].square()).mean().item() for s in (best, plain)]
    assert penalties[0] / penalties[1] == pytest.approx((k / (k + 1)) ** 2, rel=1e-6)
    assert torch.equal(best.sign(), plain.sign())  # what ADA's heuristic sees of them is the same


def test_one_bad_sample_owns_the_batch_unless_the_tail_is_guarded():
    margins = torch.zeros(256, dtype=torch.float64)
    margins[0] = -20.0

    def share(f):
        slopes = slope(f, margins).abs()
        return (slopes[0] / slopes.sum()).item()

    assert share(logistic) == pytest.approx(1 / (1 + 255 / 2), rel=1e-6)
    assert share(lambda m: rooted_logistic(m, 2)) > 0.99
    assert share(lambda m: rooted_logistic(m, 20)) < 0.03
    guarded = RootedLogisticLoss(2, tail="linear", tail_at=4.0)
    assert share(guarded.generator) < 0.05
    assert guarded.diagnostics(margins)["top1_share"] < 0.06


@pytest.mark.parametrize("k", [1.0, 2.0, 8.0])
def test_the_direct_form_gives_up_on_hopeless_samples(k):
    """Its slope by the logit is -p^(1/k) (1 - p), 0 for p -> 0; the inverse form's is -p^(-1/k) (1 - p)."""
    p = torch.tensor([1e-5, 1e-3, 0.5, 0.99], dtype=torch.float64)
    logits = torch.stack([torch.zeros(4, dtype=torch.float64), torch.logit(p)], dim=1).requires_grad_(True)
    target = torch.ones(4, dtype=torch.int64)
    for form, sign in (("direct", 1), ("inverse", -1)):
        (g,) = torch.autograd.grad(rooted_cross_entropy(logits, target, k=k, form=form, reduction="sum"), logits)
        assert_close(g[:, 1] / (-(p ** (sign / k)) * (1 - p)), torch.ones(4), 1e-9, form)


@given(k=st.floats(1, 50), p=st.floats(0.01, 0.99), q=st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_the_divergence_is_zero_for_equal_densities_alone(k, p, q):
    """k 2^(1/a) less the attained value, summed over two points, is >= 0, and 0 where the densities are equal."""
    a = k / (k + 1)
    first, second = np.array([p, 1 - p]), np.array([q, 1 - q])
    distance = k * (2 ** (1 / a) - ((first**a + second**a) ** (1 / a)).sum())
    assert distance >= -1e-9 * k
    if abs(p - q) > 0.05:
        assert distance > 1e-5
    same = k * (2 ** (1 / a) - (2 * first**a) ** (1 / a) @ np.ones(2))
    assert abs(same) < 1e-9 * k


# --- the page names tests that exist


def test_every_statement_names_a_test_that_exists():
    text = PAGE.read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (T\d+) \|.*\| `tests/(test_\w+\.py::test_\w+)` \|$", text, flags=re.M))
    body = re.sub(r"^\| T\d+ \|.*$", "", text, flags=re.M)
    used = set(re.findall(r"T\d+", body))
    assert used == set(table), f"marks without a row {used - set(table)}, rows without a mark {set(table) - used}"
    assert len(table) >= 25
    for mark, place in table.items():
        file, name = place.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert any(isinstance(n, ast.FunctionDef) and n.name == name for n in tree.body), f"{mark}: {place}"


def test_the_example_of_the_modules_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    names = {}
    exec(example, names)  # noqa: S102 (the page's own text)
    assert names["loss"].isfinite() and names["logits"].grad.abs().sum() > 0
    modules = [names["losses"].RootedBCEWithLogitsLoss, names["losses"].RootedCrossEntropyLoss]
    assert all(issubclass(module, torch.nn.Module) for module in modules)
    assert not issubclass(names["losses"].RootedLogisticLoss, torch.nn.Module)  # as the page says


def test_figures_of_the_page_are_there_and_small():
    text = PAGE.read_text(encoding="utf-8")
    figures = re.findall(r"!\[[^\]]+\]\(([\w-]+\.png)\)", text)
    assert len(figures) >= 2 and "python scripts/draw_theory.py" in text
    for figure in figures:
        assert (PAGE.parent / figure).stat().st_size < 150_000
