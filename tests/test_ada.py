"""Augmentation-strength controller: golden traces, clamps, bad numbers, resume."""

import json
import math

import pytest
import torch
from helpers import assert_close

from training.ada import AdaController


def feed(controller: AdaController, mean: float, steps: range, batch_size: int = 100) -> list[float]:
    result = []
    for step in steps:
        controller.observe(torch.full([8, 1], mean))
        result.append(controller.update(batch_size, step))
    return result


def test_golden_traces(goldens):
    runs = json.loads((goldens / "training_traces.json").read_text())["ada_p"]
    assert len(runs) >= 3
    for number, run in enumerate(runs):
        controller = AdaController(run["ada_target"], run["ada_interval"], run["ada_kimg"], p_init=run["p0"], p_max=1.0)
        trace = []
        for step, signs in enumerate(run["real_sign_batches"], start=1):
            controller.observe(torch.tensor(signs, dtype=torch.float32))
            trace.append(controller.update(run["batch_size"], step))
        # The original keeps p in float32 and adds to it there: rounding leaves 6e-11 where the exact answer is 0.
        assert_close(trace, run["p_after_each_batch"], 5e-7, f"run {number}")


def test_moves_at_the_fixed_rate_and_only_at_the_interval():
    p = feed(AdaController(0.6, interval=4, ada_kimg=1), 1.0, range(1, 13), batch_size=50)
    assert p == pytest.approx([0, 0, 0, 0.2, 0.2, 0.2, 0.2, 0.4, 0.4, 0.4, 0.4, 0.6])


def test_a_mean_on_target_changes_nothing_and_below_lowers():
    controller = AdaController(0.0, interval=1, ada_kimg=1, p_init=0.5)
    assert feed(controller, 0.0, range(1, 2)) == [0.5]
    assert feed(controller, -1.0, range(2, 9)) == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0])


def test_upper_clamp_binds_and_says_so():
    controller = AdaController(0.6, interval=1, ada_kimg=1, p_init=0.8)
    assert not controller.binding
    assert feed(controller, 1.0, range(1, 3)) == pytest.approx([0.85, 0.85])
    assert controller.binding
    assert feed(controller, 0.0, range(3, 4)) == pytest.approx([0.75])
    assert not controller.binding


def test_signs_of_all_observations_since_the_last_change_are_averaged():
    controller = AdaController(0.6, interval=2, ada_kimg=1)
    controller.observe(torch.ones(9))
    controller.update(10, 1)
    controller.observe(-torch.ones(3))  # mean (9 - 3) / 12 = 0.5 < 0.6, though the first batch alone is above
    assert controller.update(10, 2) == 0.0
    controller.observe(torch.ones(1))
    assert controller.update(10, 3) == 0.0
    assert controller.update(10, 4) == pytest.approx(0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_mean_is_counted_and_leaves_p(bad):
    controller = AdaController(0.6, interval=1, ada_kimg=1, p_init=0.3)
    controller.observe(torch.tensor([1.0, bad]))
    assert controller.update(100, 1) == 0.3
    assert controller.num_nonfinite == 1
    assert feed(controller, 1.0, range(2, 3)) == pytest.approx([0.4])  # and the bad number is gone


def test_no_signs_leave_p():
    controller = AdaController(0.6, interval=1, p_init=0.3)
    assert controller.update(100, 1) == 0.3 and controller.num_nonfinite == 0


def test_resumed_controller_goes_on_unchanged():
    signs = [torch.randn(6, generator=torch.Generator().manual_seed(i)).sign() for i in range(20)]
    straight, first, second = (AdaController(0.1, interval=4, ada_kimg=1, p_init=0.4) for _ in range(3))
    expected = []
    for step, s in enumerate(signs, start=1):
        straight.observe(s)
        expected.append(straight.update(64, step))
    got = []
    for step, s in enumerate(signs, start=1):
        controller = first if step <= 10 else second  # in the middle of an interval
        if step == 11:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        controller.observe(s)
        got.append(controller.update(64, step))
    assert got == expected and len(set(got)) > 1


def test_all_processes_are_averaged():
    others = torch.tensor([-30.0, 30.0], dtype=torch.float64)
    controller = AdaController(0.6, interval=1, ada_kimg=1, p_init=0.5, reduce=lambda sums: sums + others)
    assert feed(controller, 1.0, range(1, 2)) == pytest.approx([0.4])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": 1.5}, "--target 1.5"),
        ({"target": math.nan}, "--target nan"),
        ({"target": 0.6, "p_max": 1.5}, "--p-max 1.5"),
        ({"target": 0.6, "p_init": 0.9}, r"--p 0.9 is outside \[0, 0.85\]"),
        ({"target": 0.6, "p_init": -0.1}, "--p -0.1"),
        ({"target": 0.6, "interval": 0}, "every 0 iterations"),
        ({"target": 0.6, "ada_kimg": 0}, "0 kimg"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaController(**options)
