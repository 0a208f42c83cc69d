"""Lazy regularisation: intervals, rescaled Adam, shared optimisers, counting of bad gradients."""

import json
import math

import pytest
import torch

from training.phases import build_phases, count_nonfinite


def build(g_reg_interval, d_reg_interval, lr=0.0025, betas=(0.0, 0.99)):
    return build_phases(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), lr_g=lr, lr_d=lr, betas=betas,
                        g_reg_interval=g_reg_interval, d_reg_interval=d_reg_interval)


def test_defaults_follow_the_spec():
    phases = {p.name: p for p in build(4, 16)}
    assert list(phases) == ["Gmain", "Greg", "Dmain", "Dreg"]
    assert [p.interval for p in phases.values()] == [1, 4, 1, 16]
    assert phases["Gmain"].opt is phases["Greg"].opt and phases["Dmain"].opt is phases["Dreg"].opt
    assert phases["Gmain"].opt is not phases["Dmain"].opt
    g, d = (phases[name].opt.param_groups[0] for name in ("Gmain", "Dmain"))
    assert g["lr"] == pytest.approx(0.002) and d["lr"] == pytest.approx(0.00235294, abs=5e-9)
    assert g["betas"] == (0.0, pytest.approx(0.991992, abs=5e-7))
    assert d["betas"] == (0.0, pytest.approx(0.990585, abs=5e-7))


def test_golden_schedules(goldens):
    cases = json.loads((goldens / "training_traces.json").read_text())["lazy_regularization"]
    assert len(cases) >= 6
    for case in cases:
        phases = build(case["G_reg_interval"], case["D_reg_interval"], case["lr"], tuple(case["betas"]))
        assert [p.name for p in phases] == [p["name"] for p in case["phases"]]
        for phase, expected in zip(phases, case["phases"]):
            group = phase.opt.param_groups[0]
            assert phase.interval == expected["interval"]
            assert group["lr"] == pytest.approx(expected["lr"], rel=1e-14)
            assert group["betas"] == pytest.approx(expected["betas"], rel=1e-14)
            assert group["eps"] == expected["eps"]
            shared = [p.name for p in phases if p.opt is phase.opt and p is not phase]
            assert shared == expected["optimizer_shared_with"]


def test_no_interval_is_one_phase_without_rescaling():
    phases = build(None, None, betas=(0.5, 0.9))
    assert [(p.name, p.interval) for p in phases] == [("Gboth", 1), ("Dboth", 1)]
    assert phases[0].opt.param_groups[0]["betas"] == (0.5, 0.9) and phases[0].opt.param_groups[0]["lr"] == 0.0025


def test_due():
    names = [[p.name for p in build(2, 3) if p.due(step)] for step in range(5)]
    assert names == [["Gmain", "Greg", "Dmain", "Dreg"], ["Gmain", "Dmain"], ["Gmain", "Greg", "Dmain"],
                     ["Gmain", "Dmain", "Dreg"], ["Gmain", "Greg", "Dmain"]]


def test_learning_rates_are_per_network():
    G, D = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    phases = build_phases(G, D, lr_g=1.0, lr_d=2.0, g_reg_interval=1, d_reg_interval=1)
    assert [p.opt.param_groups[0]["lr"] for p in phases] == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("option", ["g", "d"])
def test_bad_interval_is_refused(option):
    with pytest.raises(ValueError, match=f"--{option}-reg-interval 0"):
        build(0 if option == "g" else 4, 0 if option == "d" else 16)


def test_optimiser_is_adam():
    """The fused kernel takes the step of the textbook formula, and leaves parameters without gradient alone."""
    net = torch.nn.Linear(3, 2)
    before = [p.detach().clone().double() for p in net.parameters()]
    opt = build_phases(net, torch.nn.Linear(2, 2), lr_g=0.01, lr_d=1.0, g_reg_interval=None)[0].opt
    net.weight.grad = torch.tensor([[1.0, -2.0, 3e-9], [0.5, 0.0, -1e3]])
    for _ in range(2):
        opt.step()
    m = v = torch.zeros(2, 3, dtype=torch.float64)
    w, g = before[0], net.weight.grad.double()
    for t in (1, 2):
        m, v = g, 0.99 * v + 0.01 * g * g
        w = w - 0.01 * m / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    assert torch.allclose(net.weight.double(), w, rtol=1e-5, atol=1e-8)
    assert torch.equal(net.bias.double(), before[1])


def test_count_nonfinite():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    assert count_nonfinite(net.parameters()) == 0  # no gradients at all
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e19)  # its square is finite, the sum of all squares is not
    assert count_nonfinite(net.parameters()) == 0
    net[0].weight.grad[0, 1] = math.nan
    net[1].bias.grad[0] = -math.inf
    net[0].weight.grad[1, 2] = math.inf
    assert count_nonfinite(net.parameters()) == 3
    assert net[0].weight.grad[0, 1].isnan()  # counted, never repaired
    net[0].bias.grad = None
    assert count_nonfinite(net.parameters()) == 3
    assert count_nonfinite([]) == 0


def test_gradients_that_adam_cannot_square_count_as_non_finite():
    net = torch.nn.Linear(2, 1, bias=False)
    opt = build_phases(net, torch.nn.Linear(2, 2), lr_g=0.01, lr_d=1.0, g_reg_interval=None)[0].opt
    net.weight.grad = torch.tensor([[1e20, 1.0]])
    assert count_nonfinite(net.parameters()) == 1
    opt.step()
    before = net.weight.detach().clone()
    net.weight.grad = torch.ones(1, 2)
    for _ in range(100):
        opt.step()
    moved = (net.weight - before).abs()[0]
    assert moved[0] == 0 and moved[1] > 0.1  # why: one such gradient stops its weight for ever
