"""The tables of scripts/comparison_tables.py: single seeds, equal runs, figures without ratios, seeds as blocks."""

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_compare_results import ARMS, run

from stylegan_rooted.compare_results import summarise
from training import run_dir

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "comparison_tables.py"
ARM, BASE = "rooted:k=2", "logistic"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("comparison_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compared(factors: Sequence[float], judged_by: str = "fd", base: float = 20.0) -> dict[str, Any]:
    """compare.json of an arm that ends, seed by seed, at these factors of the baseline's figure."""
    values = {(BASE, seed): base + seed for seed in range(len(factors))}
    values |= {(ARM, seed): (base + seed) * factor for seed, factor in enumerate(factors)}
    records = [run(arm, seed, [100, 50]) for arm, seed in values]
    for record in records:
        record["final"]["fd"] = record["final"][judged_by] = {"value": values[record["arm"], record["seed"]]}
    found = summarise(records, arms=ARMS[:2], seeds=range(len(factors)), judged_by=judged_by)
    return json.loads(json.dumps(run_dir.plain(found)))


def cells(table: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return dict(zip(lines[0], lines[2], strict=True))


def test_one_seed_has_no_interval(script) -> None:
    row = cells(script.differences_table(compared([1.5]), BASE))
    assert row["mean"] == "1.5" and row["bootstrap"] == row["t"] == row["t, corrected"] == "none"
    assert script.ratio(compared([1.5]), ARM, BASE) == "1.50"


def test_equal_runs_have_no_spread(script) -> None:
    equal = [compared([1.0] * 3), compared([1.0] * 3)]
    assert script.together(equal, ARM, 1) == "1.000 (no spread), 6 pairs of 2 comparisons"
    assert script.with_blocks(equal, ARM, 1) == "1.000 (no spread), 3 seeds of 2 comparisons"


def test_figures_at_or_below_zero_have_no_ratios(script, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    pair = [compared([1.5, -0.5, 0.0], "kd"), compared([1.5, 1.2, 1.1], "kd")]
    assert script.ratio(pair[0], BASE, ARM) == script.together(pair, ARM, 1) == script.with_blocks(pair, ARM, 1) == ""
    files = [tmp_path / name / "compare.json" for name in "ab"]
    for file, found in zip(files, pair, strict=True):
        file.parent.mkdir()
        file.write_text(json.dumps(found))
    options = ["--against", ARM, "--png", str(tmp_path / "x.png")]
    monkeypatch.setattr(sys, "argv", ["comparison_tables.py", *map(str, files), *options])
    script.main()
    assert "nan" not in capsys.readouterr().out and (tmp_path / "x.png").stat().st_size


def test_the_judged_figure_says_whether_arms_are_over_or_less(script) -> None:
    assert f"arm over {BASE}" in cells(script.differences_table(compared([1.5, 1.4]), BASE))
    by_kd = compared([1.5, 1.4], "kd")
    assert any(row["ratio"] for row in by_kd["differences"])  # FD stands beside it
    assert f"arm less {BASE}" in cells(script.differences_table(by_kd, BASE))


def test_what_was_used_is_said(script) -> None:
    """A comparison of one pair gives no spread, and is none of those counted."""
    found = [compared([1.1, 1.2]), compared([1.3, 1.2, 1.1]), compared([9.0])]
    assert script.together(found, ARM, 1).endswith(", 5 pairs of 2 comparisons")
    assert script.with_blocks(found, ARM, 1) == ""  # seeds differ


def test_the_figure_names_its_own_words(script) -> None:
    assert script.axis_label(compared([1.5, 1.4], "kd")).startswith(f"last KD over {BASE}'s, logarithmic")
    by_recall = compared([1.5, 1.4], "recall") | {"baseline": ARM}
    assert script.axis_label(by_recall).startswith(f"last recall over {ARM}'s")
    assert script.axis_label(by_recall).endswith("right is better")


def test_seeds_as_blocks_are_students_t_over_their_means(script) -> None:
    """A seed that is bad for the arm on all data is one such seed, not one per comparison."""
    effects = np.array([[0.1, 0.4, -0.2, 0.3], [0.2, 0.5, -0.1, 0.4], [0.0, 0.3, -0.3, 0.2]])
    found = [compared(np.exp(row).tolist()) for row in effects]
    means = effects.mean(axis=0)
    single, corrected = (stats.ttest_1samp(means, 0).confidence_interval(level) for level in (0.95, 0.975))
    single, corrected = (f"{math.exp(e.low):.3f} to {math.exp(e.high):.3f}" for e in (single, corrected))
    wanted = f"{math.exp(means.mean()):.3f} ({single}; corrected {corrected}), 4 seeds of 3 comparisons"
    assert script.with_blocks(found, ARM, 2) == wanted
    independent = script.together(found, ARM, 2)
    assert single not in independent and independent.endswith(", 12 pairs of 3 comparisons")
    assert script.with_blocks(found[:1], ARM, 2) == script.with_blocks([compared([1.1]), compared([1.2])], ARM, 2) == ""


def test_ratios_to_another_comparison(script) -> None:
    """Equal baselines; the arm ends at 1.2 times them here, and at twice them there."""
    lines = script.beside(compared([1.2] * 3), compared([2.0] * 3)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0] == [BASE, "1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)"]
    assert rows[1] == [ARM, "0.60 (0.60 to 0.60)", "1.20 (1.20 to 1.20)"]


def test_what_is_no_comparison_is_refused_in_one_line(script, tmp_path) -> None:
    for text in (None, "{", "[]", '{"format": "another"}'):
        file = tmp_path / "compare.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(SystemExit, match="wanted a compare.json") as refused:
            script.read(file)
        assert "\n" not in str(refused.value)
