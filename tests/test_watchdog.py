"""The watchdog: every state provoked in numbers, and from a run; what it measures against closed forms."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from processes import run_processes

from stylegan_rooted import finetune
from training import checkpoint, diversity, run_dir, training_loop, watchdog
from training.config import AugmentConfig, FinetuneConfig, LossConfig, OptimConfig, ScheduleConfig
from training.training_loop import TrainingDiverged
from training.watchdog import Figures, judge

CALM = Figures(
    kimg=4.0,
    real_score=1.0,
    real_spread=1.0,
    fake_score=-1.0,
    fake_spread=1.0,
    num_scores=1000,
    real_sign=0.6,
    gradients={"Gradient/Gmain": 1.0, "Gradient/Dmain": 2.0},
    augment_p=0.3,
    diversity=0.8,
    nearest=0.9,
    tail_share=0.01,
    top_share=0.1,
)


def after_calm(**changes) -> list[Figures]:
    """Four calm ticks, then one that differs."""
    return [CALM] * 4 + [dataclasses.replace(CALM, **changes)]


def test_a_calm_run_is_healthy_from_its_first_tick() -> None:
    assert judge([CALM]).state == watchdog.HEALTHY
    assert judge(after_calm(), p_max=0.85, distances=[10, 9, 8, 7.5, 7.6]).state == watchdog.HEALTHY
    assert judge([Figures(kimg=0.0)]).state == watchdog.HEALTHY
    assert str(judge([CALM])) == "healthy"


@pytest.mark.parametrize(
    "changes, settings, state",
    [
        ({"num_nonfinite": 5}, {}, watchdog.DIVERGING),
        ({"real_score": 99.5}, {}, watchdog.DIVERGING),
        ({"fake_score": None}, {}, watchdog.DIVERGING),
        ({"gradients": {"Gradient/Gmain": 31.0}}, {}, watchdog.DIVERGING),
        ({"diversity": 0.39}, {}, watchdog.COLLAPSING),
        ({"nearest": 0.3}, {}, watchdog.OVERFITTING),
        ({}, {"distances": [9, 6, 7, 7, 8]}, watchdog.OVERFITTING),
        ({"real_score": 5.0, "fake_score": -5.0, "real_sign": 0.99}, {}, watchdog.OVERFITTING),
        ({"augment_p": 0.85}, {"p_max": 0.85}, watchdog.SATURATED),
        ({"tail_share": 0.3}, {}, watchdog.TAIL_DOMINATED),
        ({"top_share": 0.6}, {}, watchdog.TAIL_DOMINATED),
    ],
)
def test_every_state_has_its_sign_and_its_sentence(changes, settings, state) -> None:
    verdict = judge(after_calm(**changes), **settings)
    assert verdict.state == state and verdict.evidence and verdict.advice
    assert str(verdict) == f"{state}: {verdict.evidence}; {watchdog.ADVICE[state]}"


@pytest.mark.parametrize(
    "changes, settings",
    [
        ({"num_nonfinite": 4}, {}),
        ({"gradients": {"Gradient/Gmain": 29.0}}, {}),
        ({"diversity": 0.41}, {}),
        ({}, {"distances": [9, 6, 7, 6.5, 8]}),
        ({}, {"distances": [6, 7, 7]}),
        ({"real_score": 5.0, "fake_score": -5.0, "real_sign": 0.99, "augment_p": 0.5}, {"p_max": 0.85}),  # ADA acts
        ({"augment_p": 0.84}, {"p_max": 0.85}),
        ({"top_share": 0.6, "num_scores": 100}, {}),
    ],
)
def test_less_than_the_sign_is_healthy(changes, settings) -> None:
    assert judge(after_calm(**changes), **settings).state == watchdog.HEALTHY


def test_the_gravest_state_is_named() -> None:
    everything = after_calm(num_nonfinite=9, diversity=0.1, nearest=0.1, augment_p=0.85, tail_share=0.9)
    assert judge(everything, p_max=0.85).state == watchdog.DIVERGING
    assert judge(after_calm(diversity=0.1, nearest=0.1), p_max=0.85).state == watchdog.COLLAPSING


def test_a_gradient_beyond_all_bounds_is_divergence_from_the_first_ticks_on() -> None:
    separated = dataclasses.replace(CALM, real_score=5.0, fake_score=-5.0, real_sign=1.0)
    broken = dataclasses.replace(separated, gradients={"Gradient/Gmain": 1e18})
    verdict = judge([CALM, broken])
    assert (verdict.state, verdict.evidence) == (watchdog.DIVERGING, "the gradient of Gmain is 1e+18")
    assert judge([broken]).state == watchdog.DIVERGING and judge([separated]).state == watchdog.OVERFITTING
    large = {"Gradient/Gmain": 1e5}  # a single tick, of which nothing says that it is unusual
    assert judge([dataclasses.replace(CALM, gradients=large)]).state == watchdog.HEALTHY


def test_a_network_from_scratch_that_is_uniform_at_first_does_not_collapse() -> None:
    ticks = [dataclasses.replace(CALM, diversity=d) for d in (0.02, 0.03, 0.2, 0.5)]
    assert all(judge(ticks[: i + 1]).state == watchdog.HEALTHY for i in range(4))


def test_non_finite_steps_count_per_tick() -> None:
    ticks = [dataclasses.replace(CALM, num_nonfinite=n) for n in (4.0, 8.0, 12.0)]
    assert judge(ticks).state == watchdog.HEALTHY


def test_confusion_is_that_of_two_normal_distributions() -> None:
    draw = np.random.RandomState(0)
    reals, fakes = draw.normal(2.0, 1.5, 10**6), draw.normal(0.5, 0.7, 10**6)
    figures = Figures(kimg=0, real_score=2.0, real_spread=1.5, fake_score=0.5, fake_spread=0.7)
    assert figures.confusion == pytest.approx(float((fakes > reals).mean()), abs=2e-3)
    assert dataclasses.replace(figures, real_spread=0.0, fake_spread=0.0).confusion == 0.0
    assert Figures(kimg=0).confusion is None


def test_figures_of_a_line_of_stats() -> None:
    row = {
        "Progress/kimg": {"num": 1, "mean": 8.0, "std": 0.0},
        "Loss/scores/real": {"num": 64, "mean": 0.5, "std": 0.25},
        "Loss/scores/fake": {"num": 128, "mean": None, "std": None},
        "Loss/top1_share/generator": {"num": 1, "mean": 0.2, "std": 0.0},
        "Loss/top1_share/discriminator_real": {"num": 1, "mean": 0.4, "std": 0.0},
        "Gradient/Gmain": {"num": 4, "mean": 3.0, "std": 0.1},
        "timestamp": 1.0,
        "state": "healthy",
    }
    figures = Figures.of_row(json.loads(json.dumps(row)))
    assert (figures.kimg, figures.real_score, figures.real_spread, figures.num_scores) == (8.0, 0.5, 0.25, 128)
    assert figures.fake_score is None and figures.top_share == 0.4 and figures.gradients == {"Gradient/Gmain": 3.0}
    assert judge([figures]).evidence == "scores of fakes are not finite"


def test_spread_and_nearest_in_closed_form() -> None:
    rows = torch.tensor([[0.0, 0.0], [6.0, 8.0]])
    assert diversity.spread(rows) == pytest.approx(math.sqrt((9 + 16) / 2))
    assert diversity.nearest(rows, rows, ignore_self=True) == pytest.approx(10.0)
    assert diversity.nearest(rows, torch.tensor([[0.0, 1.0], [6.0, 9.0]])) == pytest.approx(1.0)
    flat = torch.full([2, 3, 64, 64], 7, dtype=torch.uint8)
    assert diversity.thumbnails(flat).shape == (2, 3 * 16 * 16) and diversity.thumbnails(flat).unique().tolist() == [7]


class Pictures:
    """Six random images of 8x8 as a data set; the second cannot be read."""

    resolution = 8

    def __init__(self, num: int = 6) -> None:
        self.images = np.random.RandomState(0).randint(0, 256, [num, 3, 8, 8], dtype=np.uint8)
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        self.num_read += 1
        if index == 1:
            raise ValueError("corrupt")
        return self.images[index], None


def test_copies_are_near_and_likeness_is_no_diversity() -> None:
    dataset = Pictures()
    comparison = diversity.Comparison(dataset)
    copies = torch.as_tensor(dataset.images[[0, 2, 3]])
    assert comparison.figures(copies)["nearest"] == 0.0
    strangers = torch.as_tensor(np.random.RandomState(1).randint(0, 256, [6, 3, 8, 8], dtype=np.uint8))
    figures = comparison.figures(strangers)
    assert figures["nearest"] == pytest.approx(1, abs=0.2) and figures["diversity"] == pytest.approx(1, abs=0.2)
    assert comparison.figures(strangers[:1].expand(4, -1, -1, -1))["diversity"] < 1e-3
    assert dataset.num_read == 6
    alike = Pictures()
    alike.images[:] = 5
    assert diversity.Comparison(alike).figures(strangers) == {}


def test_large_images_are_sampled(monkeypatch) -> None:
    monkeypatch.setattr(diversity, "MAX_PIXELS", 8 * 8 * 10)
    dataset = Pictures(100)
    diversity.Comparison(dataset).figures(torch.zeros([2, 3, 8, 8], dtype=torch.uint8))
    assert dataset.num_read == 10


def tiny(pictures: Path, outdir: Path, **changes) -> FinetuneConfig:
    settings = runs.tiny(pictures, outdir, optim=OptimConfig(batch=4, batch_gpu=4))
    return settings.replace(schedule=ScheduleConfig(kimg=0.048, tick=0.008, snap=1)).replace(**changes)


def run_with(monkeypatch, config: FinetuneConfig, *, bad_from: int, times: int = 100) -> tuple[list[str], object]:
    """What a run said whose discriminator gives huge scores from that image on, the first so many times; the error."""
    original = finetune.build_run
    left = [times]

    def build(*args, **kwargs):
        run = original(*args, **kwargs)
        generator = run.adversarial.generator

        def loud(logits):
            if run.progress.cur_nimg >= bad_from and left[0]:
                left[0] -= 1
                run.stats.report("Loss/scores/fake", logits + 1e4)
            return generator(logits)

        run.adversarial.generator = loud
        return run

    monkeypatch.setattr(finetune, "build_run", build)
    said: list[str] = []
    try:
        return said, finetune.run(config, say=said.append)
    except TrainingDiverged as error:
        return said, error


def states(outdir: Path) -> list[str]:
    (path,) = [p for p in outdir.iterdir() if p.is_dir()]
    return [row["state"] for row in run_dir.read_jsonl(path / "stats.jsonl")]


def test_the_state_stands_in_stats_and_log_and_is_said_when_it_changes(pictures, tmp_path, monkeypatch) -> None:
    said, path = run_with(monkeypatch, tiny(pictures, tmp_path), bad_from=24, times=2)
    rows = run_dir.read_jsonl(path / "stats.jsonl")
    assert "diverging" in states(tmp_path) and states(tmp_path)[-1] != "diverging"
    assert all({"Watch/diversity", "Watch/nearest", "Gradient/Gmain", "Gradient/Dreg"} <= set(row) for row in rows)
    assert rows[0]["Gradient/Gmain"]["mean"] > 0
    lines = [line for line in said if line.startswith("State: diverging: scores of fakes are ")]
    assert len(lines) == 1 and lines[0].endswith(watchdog.ADVICE[watchdog.DIVERGING])
    assert lines[0].removeprefix("State: ") in (path / "log.txt").read_text()


def test_stop_ends_the_run_and_the_good_state_stays(pictures, tmp_path, monkeypatch) -> None:
    said, error = run_with(monkeypatch, tiny(pictures, tmp_path, optim__on_divergence="stop"), bad_from=24)
    assert isinstance(error, TrainingDiverged) and "stopped by --on-divergence: diverging" in str(error)
    assert states(tmp_path)[-1] == "diverging" and states(tmp_path).count("diverging") == 1


def test_rollback_goes_back_once_with_other_draws_and_comes_to_the_end(pictures, tmp_path, monkeypatch) -> None:
    config = tiny(pictures, tmp_path, optim__on_divergence="rollback")
    said, path = run_with(monkeypatch, config, bad_from=24, times=1)
    (line,) = [line for line in said if line.startswith("Training diverged at ")]
    assert "scores of fakes" in line and "back to the state of 0.02 kimg, once" in line
    rows = run_dir.read_jsonl(path / "stats.jsonl")
    kimg = [0.004, 0.012, 0.02, 0.028, 0.036, 0.044, 0.048]
    assert [row["Progress/kimg"]["mean"] for row in rows] == pytest.approx(kimg)
    assert "diverging" not in states(tmp_path)
    events = [row["event"] for row in run_dir.read_jsonl(path / "history.jsonl")]
    assert events == ["started", "rolled back", "finished"]
    state = checkpoint.read(checkpoint.find(path)[0])
    assert state["progress"]["num_rollbacks"] == 1 and state["progress"]["cur_nimg"] == 48
    monkeypatch.undo()
    calm = finetune.run(tiny(pictures, tmp_path / "calm"), say=lambda text: None)
    other = [row["Loss/scores/fake"]["mean"] for row in run_dir.read_jsonl(calm / "stats.jsonl")]
    mine = [row["Loss/scores/fake"]["mean"] for row in rows]
    assert mine[:3] == other[:3] and mine[3] != other[3]  # the same up to the state, other draws after it


def test_a_second_divergence_stops(pictures, tmp_path, monkeypatch) -> None:
    said, error = run_with(monkeypatch, tiny(pictures, tmp_path, optim__on_divergence="rollback"), bad_from=24)
    assert isinstance(error, TrainingDiverged) and "stopped by --on-divergence" in str(error)
    assert sum(line.startswith("Training diverged at ") for line in said) == 1


def test_divergence_at_once_has_nothing_to_go_back_to(pictures, tmp_path, monkeypatch) -> None:
    said, error = run_with(monkeypatch, tiny(pictures, tmp_path, optim__on_divergence="rollback"), bad_from=0)
    assert isinstance(error, TrainingDiverged) and "no earlier state to go back to" in str(error)


def test_two_processes_go_back_together(pictures, tmp_path, monkeypatch) -> None:
    config = tiny(pictures, tmp_path / "o", optim=OptimConfig(batch=4, batch_gpu=2, on_divergence="rollback"))

    def member(rank: int):
        return run_with(monkeypatch, config, bad_from=24, times=1 if rank else 0)

    (said, path), (silent, same) = run_processes(tmp_path / "results", 2, member)
    assert path == same and not silent
    assert sum(line.startswith("Training diverged at ") for line in said) == 1
    events = [row["event"] for row in run_dir.read_jsonl(path / "history.jsonl")]
    assert events == ["started", "rolled back", "finished"]


@pytest.mark.parametrize("state", [watchdog.COLLAPSING, watchdog.OVERFITTING])
def test_images_alike_and_copies_of_the_data_are_seen_in_a_run(pictures, tmp_path, monkeypatch, state) -> None:
    strangers = torch.as_tensor(np.random.RandomState(1).randint(0, 256, [4, 3, 8, 8], dtype=np.uint8))

    def render(run, num=None):
        if run.progress.cur_nimg < 24:
            return strangers
        if state == watchdog.COLLAPSING:
            return strangers[:1].expand(4, -1, -1, -1)
        return torch.as_tensor(np.stack([run.dataset[i][0] for i in range(4)]))

    monkeypatch.setattr(training_loop, "render_grid", render)
    said: list[str] = []
    path = finetune.run(tiny(pictures, tmp_path), say=said.append)
    assert [row["state"] for row in run_dir.read_jsonl(path / "stats.jsonl")] == [watchdog.HEALTHY] * 3 + [state] * 4
    (line,) = [line for line in said if line.startswith(f"State: {state}: ")]
    assert line.endswith(watchdog.ADVICE[state])


def test_the_tail_of_the_rooted_loss_and_the_clamp_of_ada_are_seen_in_a_run(pictures, tmp_path) -> None:
    loss = LossConfig(name="rooted", tail="linear", tail_at=1e-3)
    path = finetune.run(tiny(pictures, tmp_path / "tail", loss=loss), say=lambda text: None)
    assert watchdog.TAIL_DOMINATED in [row["state"] for row in run_dir.read_jsonl(path / "stats.jsonl")]
    augment = AugmentConfig(augpipe="color", target=0.0, p_max=0.01, ada_kimg=0.1)
    said: list[str] = []
    path = finetune.run(tiny(pictures, tmp_path / "ada", augment=augment, schedule__kimg=0.128), say=said.append)
    found = [row["state"] for row in run_dir.read_jsonl(path / "stats.jsonl")]
    assert watchdog.SATURATED in found
    assert any("augment-saturated: augmentation stands at its limit, 0.01" in line for line in said)
