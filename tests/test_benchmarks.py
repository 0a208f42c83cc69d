"""The benchmark's own arithmetic, and that its slow reference path is the same network. Nothing is timed here."""

import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import bench, compare, goals, measure, parts, reference, report, subjects  # noqa: E402


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> subjects.TrainingSubject:
    torch.manual_seed(3)
    variant = subjects.Variant(size="tiny", batch=4, threads=1, allocator="system")
    built = subjects.TrainingSubject(variant, tmp_path_factory.mktemp("run"))
    torch.set_flush_denormal(False)
    for net in (built.run.G, built.run.G_ema, built.run.D):
        for parameter in net.parameters():  # no bias and no noise may hide behind its initial zero
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


@pytest.mark.parametrize("is_training", [False, True])
def test_the_reference_path_makes_the_same_images(subject, is_training):
    G = subject.run.G.train(is_training)
    z = torch.randn(4, G.z_dim)
    expected = G.synthesis(G.mapping(z, None, skip_w_avg_update=True), noise_mode="const")
    generator = reference.ReferenceGenerator(G)
    assert_close(generator.synthesis(generator.mapping(z), "const"), expected, 1e-5)


def test_the_reference_path_gives_the_same_logits_and_r1(subject):
    D = subject.run.D
    results = []
    for path in (lambda x: D(x, None), reference.ReferenceDiscriminator(D)):
        x = subject.real.clone().requires_grad_(True)
        logits = path(x)
        (gradient,) = torch.autograd.grad([logits.sum()], [x], create_graph=True)
        results.append((logits.detach(), gradient.square().sum().detach()))
    assert_close(results[1][0], results[0][0], 1e-5)
    assert_close(results[1][1], results[0][1], 1e-4)


def test_the_reference_filters_are_those_of_the_operators(subject):
    from torch_utils.ops import upfirdn2d

    x, taps = torch.randn(2, 3, 9, 8), torch.rand(12)
    expected = upfirdn2d.upsample2d(x, taps, up=2, impl="ref")
    assert_close(reference.upfirdn(x, taps, up=2, pad=(6, 5), gain=4), expected, 1e-6)
    expected = upfirdn2d.downsample2d(x, taps, down=2, padding=2, flip_filter=True, impl="ref")
    assert_close(reference.upfirdn(x, taps.flip(0), down=2, pad=(7, 7)), expected, 1e-6)


def test_the_reference_augmentation_draws_and_makes_the_same(subject):
    from training.augment import AUGMENT_PRESETS, AugmentPipe

    pipe = AugmentPipe(**AUGMENT_PRESETS["bgc"])
    x = torch.rand(4, 3, 24, 24) * 2 - 1
    torch.manual_seed(5)
    expected = pipe(x)
    torch.manual_seed(5)
    assert_close(reference.augmented(pipe, x), expected, 1e-5)


def test_every_phase_of_both_paths_trains(subject):
    """One step of each phase leaves finite, changed weights, and the average follows."""
    run = subject.run
    trainer = reference.ReferenceTrainer(run.G, run.D, run.G_ema)
    for name in subjects.PHASES:
        net = run.G if name[0] == "G" else run.D
        before = [p.clone() for p in net.parameters()]
        trainer.phase(name, subject.real, torch.randn(4, run.G.z_dim))
        assert all(p.isfinite().all() for p in net.parameters())
        assert any((p != b).any() for p, b in zip(net.parameters(), before)), name
        subject(name)
    trainer.update_average(0.0)
    assert all((a == p).all() for a, p in zip(run.G_ema.parameters(), run.G.parameters()))


def test_spread_is_median_and_quartiles():
    assert measure.spread([5.0]) == measure.Spread(5.0, 5.0, 5.0, 1)
    assert measure.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == measure.Spread(3.0, 2.0, 4.0, 5)
    with pytest.raises(ValueError, match="nothing"):
        measure.spread([])


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_exponent_of_a_power_law(power):
    sizes = [16, 32, 64, 256]
    assert math.isclose(measure.exponent(sizes, [3 * s**power for s in sizes]), power, abs_tol=1e-12)


@pytest.mark.parametrize("sizes, costs", [([2], [1]), ([2, 2], [1, 3]), ([1, 2], [0, 1]), ([1, 2], [1])])
def test_exponent_of_too_little_is_refused(sizes, costs):
    with pytest.raises(ValueError):
        measure.exponent(sizes, costs)


def test_a_step_is_its_phases_over_their_intervals():
    phases = {"Gmain": [8.0], "Greg": [16.0], "Dmain": [4.0], "Dreg": [32.0], "ema": [2.0]}
    assert measure.step_seconds(phases, subjects.PHASES, 8) == [(8 + 4 + 4 + 2 + 2) / 8]


def test_verdicts_of_goals():
    assert goals.Goal("a", 2.0).verdict(2.0) == "met"
    assert goals.Goal("a", 2.0).verdict(1.5) == "missed by 25 %"
    assert goals.Goal("a", 8.0, is_least=False).verdict(7.0) == "met"
    assert goals.Goal("a", 8.0, is_least=False).verdict(10.0) == "missed by 25 %"
    assert goals.Goal("a", 2.0).verdict(None) == "not measured"


def test_a_record_becomes_tables(tmp_path):
    record = {"environment": report.new_record(2)["environment"], "cells": {}}
    for name, sec in (("reference", 4.0), ("reference strict", 3.0), ("ours fp32", 1.0)):
        for piece in subjects.TrainingSubject.names:
            bench.add(record["cells"], f"step s64 {name} {piece}", "s", [sec, sec])
    report.save(tmp_path / "a.json", record)
    record = report.load(tmp_path / "a.json")
    later = {"environment": record["environment"] | {"revision": "later"}, "cells": {}}
    assert report.continued(record, later)["environment"]["revision"].split()[-1] == "later"
    both = report.merged([report.load(tmp_path / "a.json"), report.load(tmp_path / "a.json")])
    assert len(both["cells"]["step s64 reference ema"]["samples"]) == 4
    with pytest.raises(ValueError, match="threads is 2, here it is 1"):
        report.continued(record, report.new_record(1))
    assert report.figures(record) == {"train s64 fp32": [4.0, 4.0], "train s64 fp32 strict": [3.0, 3.0]}
    text = report.render(record)
    assert "train s64 fp32 " in text and "met" in text and "not measured" in text
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match="no record"):
        report.load(tmp_path / "b.json")


def test_figures_beside_ratios():
    """The floor, augmentation and the loop in percent, and the exponents, of a made-up record."""
    cells: measure.Cells = {}
    for piece in subjects.TrainingSubject.names:
        bench.add(
            cells, f"step s64 ours fp32 {piece}", "s", [0.0 if piece == "ema" else 0.4, 0.0 if piece == "ema" else 0.4]
        )
    step_sec = 0.4 * (1 + 1 / 4 + 1 + 1 / 16)
    for phase in subjects.PHASES:
        bench.add(cells, f"flops s64 {phase}", "flop", [1e9])
    bench.add(cells, "peak fp32 conv 3x3 256x64x64", "s", [0.1])
    for piece, sec in (("forward", 0.01), ("gradient", 0.03), ("second", 0.16)):
        bench.add(cells, f"augment s64 ours fp32 {piece}", "s", [sec])
    bench.add(cells, "loop s64 bare", "s", [0.4])
    bench.add(cells, "loop s64 loop", "s", [0.5])
    for threads, sec in ((1, 4.0), (2, 2.0)):
        bench.add(cells, f"scaling ours fp32 threads {threads}", "s", [sec])
    record = {"environment": report.new_record(2)["environment"], "cells": cells}
    found = report.figures(record)
    flops = 1e9 * (1 + 1 / 4 + 1 + 1 / 16)
    peak = 2 * 9 * 256 * 256 * 64 * 64 * 8 / 0.1
    assert math.isclose(found["conv floor s64 fp32"][0], 100 * flops / peak / (step_sec / 8))
    assert math.isclose(found["ADA share s64"][0], 100 * 0.06 / (step_sec + 0.06))
    assert math.isclose(found["loop overhead s64"][0], 25.0)
    assert "exponent -1.00" in report.render(record)


def test_compare_marks_what_is_beyond_the_spread():
    assert compare.verdict([1.0, 1.01, 0.99], [0.9, 0.89, 0.91])[1] == -1
    assert compare.verdict([1.0, 1.01, 0.99], [1.2, 1.21, 1.19])[1] == 1
    assert compare.verdict([1.0, 1.01, 0.99], [1.02, 1.03, 1.01])[1] == 0  # apart, but by less than 3 %
    assert compare.verdict([1.0, 1.5, 0.5], [1.2, 1.7, 0.7])[1] == 0  # the quartiles overlap
    assert compare.verdict([1.0], [1.1])[1] == 0  # one sample on a side says little
    assert compare.verdict([1.0], [1.2]) == (1.2, 1)


def test_compare_prints_the_ratio_of_each_cell(tmp_path, monkeypatch, capsys):
    environment = report.new_record(2)["environment"]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, sec in zip(paths, (1.0, 0.5)):
        cells = {"x": {"unit": "s", "samples": [sec] * 3}, "same": {"unit": "s", "samples": [1.0] * 3}}
        report.save(path, {"environment": environment | {"threads": sec}, "cells": cells})
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, paths)])
    compare.main()
    out = capsys.readouterr().out
    assert "0.500x  faster" in out and "1 of 2 cells within their spread" in out and "Careful: threads differs" in out
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, paths[:1]), str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="none.json"):
        compare.main()


def test_pieces_of_a_short_run_exist(tmp_path):
    """What `--quick` asks workers for is there; one operator and one augmentation run."""
    variant = subjects.Variant(size="tiny", batch=2, threads=1, allocator="system")
    augment = parts.AugmentSubject(variant, tmp_path)
    for name in augment.names:
        augment(name)
    flops = parts.FlopsSubject(variant, tmp_path)
    flops("count")
    assert set(flops.facts) == set(subjects.PHASES) and min(flops.facts.values()) > 0
    assert set(parts.PeakSubject.names) == {*report.PEAK_FLOPS, "copy"}
    assert set(bench.QUICK) <= set(bench.PARTS)


def test_variants_run_in_groups_where_memory_is_short(monkeypatch, capsys):
    needs = {"reference": 7.0, "reference strict": 11.0, "ours fp32": 5.0, "ours bf16": 4.0}
    assert bench.groups(needs, 100) == [["reference", "ours fp32", "ours bf16", "reference strict"]]
    assert bench.groups(needs, 22) == [["reference", "ours fp32", "ours bf16"], ["reference strict"]]
    assert bench.groups(needs, 1) == [[name] for name in ("reference", "ours fp32", "ours bf16", "reference strict")]
    chosen = bench.variants(bench.parse([]), "l256")
    for available, num in ((None, 1), (60.0, 1), (20.0, 2)):
        monkeypatch.setattr(measure, "available_gib", lambda free=available: free)
        found = bench.step_groups("l256", chosen)
        assert len(found) == num and {k: v for group in found for k, v in group.items()} == chosen
    assert "20.0 GiB of memory are free, 27 would be wanted" in capsys.readouterr().err
    only = bench.parse(["step", "--variant", "ours bf16", "--variant", "reference"])
    assert list(bench.variants(only, "s64")) == ["reference", "ours bf16"]


def test_options_name_a_part_that_does_not_exist(capsys):
    assert bench.parse(["step", "--config", "m64", "--precision", "fp32"]).config == ["m64"]
    with pytest.raises(SystemExit):
        bench.parse(["stepp"])
    assert "stepp" in capsys.readouterr().err
