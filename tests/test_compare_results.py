"""What a comparison says of its runs: thresholds, ratios, failures, verdicts; closed cases, no training."""

import json
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stylegan_rooted import compare_results, paired, report_compare
from stylegan_rooted.compare_results import choose, kimg_to, summarise

ARMS = [{"name": name, "loss": {}} for name in ("logistic", "rooted:k=2", "rooted:k=8")]
PROVENANCE = {
    "version": "0",
    "evaluation_seed": 0,
    "shared": {
        "loss": {"pl_weight": 0.0, "style_mixing": 0.0, "gamma": 1.0},
        "schedule": {"kimg": 4.0},
        "optim": {"batch": 4, "glr": 0.1, "dlr": 0.1},
        "augment": {"aug": "ada"},
        "metric": {"detector": "embedded", "num": 8},
    },
    "data": {"path": "a/<b>.zip", "num_images": 4, "sha256": "0" * 64},
    "resume": {"path": "none", "sha256": None},
    "environment": {"command": ["compare"], "device_name": "x", "num_threads": 1, "torch": "2"},
}


def run(arm: str, seed: int, values: list[float], *, failed: bool = False, **changes) -> dict:
    """A run measured at 0, 1, 2, … kimg."""
    final = {"fd": {"value": values[-1], "std_error": None}, "recall": {"value": 1 / values[-1], "std_error": None}}
    record = {
        "arm": arm,
        "seed": seed,
        "setting": None,
        "status": "failed" if failed else "finished",
        "reason": "TrainingDiverged: <b>" if failed else None,
        "headline": None if failed else "fd",
        "final": {} if failed else final,
        "warnings": [],
        "kimg": len(values) - 1,
        "curves": {"fd": [[kimg, value] for kimg, value in enumerate(values)]},
        "sec_per_kimg": 2.0,
        "peak_gib": 1.0,
        "nonfinite": 0,
        "state": "healthy",
        "machine": {"device_name": "x"},
        "version": "0",
    }
    return record | changes


def three_arms(num: int = 5, **changes) -> list[dict]:
    """k = 2 is 5 better, within noise of a tenth; k = 8 differs by noise only, whatever the seed does to all."""
    records = []
    for seed in range(num):
        shift, wobble = 10.0 * seed, [0.1, -0.1, 0.0, 0.05, -0.05][seed % 5]
        records.append(run("logistic", seed, [100 + shift, 60 + shift, 50 + shift]))
        records.append(run("rooted:k=2", seed, [100 + shift, 50 + shift, 45 + shift + wobble], **changes))
        records.append(run("rooted:k=8", seed, [100 + shift, 60 + shift, 50 + shift + wobble]))
    return records


def results_of(records: list[dict], num: int = 5) -> dict:
    return summarise(records, arms=ARMS, seeds=range(num), judged_by="fd")


def test_kimg_to_a_threshold() -> None:
    curve = [(0, 100.0), (1, 60.0), (2, 80.0), (4, 20.0)]
    assert kimg_to(curve, 100) == 0 and kimg_to(curve, 120) == 0  # there from the start
    assert kimg_to(curve, 80) == 0.5 and kimg_to(curve, 60) == 1
    assert kimg_to(curve, 50) == 3 and kimg_to(curve, 20) == 4 and kimg_to(curve, 19.9) is None
    assert kimg_to([], 1) is None


def test_differences_and_verdicts() -> None:
    found = results_of(three_arms())
    rows = {(row["arm"], row["figure"]): row for row in found["differences"]}
    assert rows["rooted:k=2", "fd"]["mean"] == pytest.approx(-5) and rows["rooted:k=8", "fd"]["mean"] == pytest.approx(
        0
    )
    assert rows["rooted:k=2", "fd"]["n"] == 5 and rows["rooted:k=2", "fd"]["per_seed"]["1"] == pytest.approx(-5.1)
    assert rows["rooted:k=2", "fd"]["corrected"]["level"] == pytest.approx(0.975)  # two arms against one baseline
    assert [v["outcome"] for v in found["verdicts"]] == [paired.BETTER, paired.NONE_SEEN]
    assert found["verdict"] == (
        "Verdict (final FD, 5 seeds): better than logistic: rooted:k=2; no difference seen from logistic: rooted:k=8. "
        "5 pairs are few and the intervals coarse (an exact sign test cannot fall below p = 0.062)."
    )
    assert found["figures"][0] == "fd" and found["arms"][0]["final"]["fd"]["sd"] == pytest.approx(math.sqrt(250))


def test_distances_are_judged_as_ratios_and_others_as_differences() -> None:
    """Five runs that end at 2 to 18 times the baseline's distance are worse, however far apart they lie."""
    factors = [2.0, 5.0, 15.0, 3.0, 18.0]
    records = [run("logistic", s, [100, 20 + s]) for s in range(5)]
    records += [run("rooted:k=2", s, [100, (20 + s) * factors[s]]) for s in range(5)]
    for record in records:
        record["final"]["kd"] = record["final"]["fd"]
    arms = ARMS[:2]
    found = summarise(records, arms=arms, seeds=range(5), judged_by="fd")
    assert found["verdicts"][0]["outcome"] == paired.WORSE and "mean ratio 6.05" in found["verdicts"][0]["text"]
    assert summarise(records, arms=arms, seeds=range(5), judged_by="kd")["verdicts"][0]["outcome"] == paired.NONE_SEEN
    rows = {row["figure"]: row for row in found["differences"]}
    assert rows["fd"]["ratio"]["mean"] == pytest.approx(6.05, abs=0.005) and rows["kd"]["ratio"] is None
    assert rows["fd"]["student"]["low"] < 0 < 1 < rows["fd"]["ratio"]["corrected"]["low"]
    records[0]["final"]["fd"] = {"value": 0.0, "std_error": None}  # a distance that rounds to nothing
    found = summarise(records, arms=arms, seeds=range(5), judged_by="fd")
    assert found["verdicts"][0]["outcome"] == paired.NONE_SEEN and "mean difference" in found["verdicts"][0]["text"]
    assert found["differences"][0]["ratio"] is None


def test_the_corrected_interval_is_shown_for_the_judged_figure_alone() -> None:
    found = results_of(three_arms())
    table = next(table for table in report_compare.tables(found) if table.title == "Paired differences")
    shown = {(row[0], row[1]): row[table.header.index("corrected")] for row in table.rows}
    ratio = next(row["ratio"]["corrected"] for row in found["differences"] if row["arm"] == "rooted:k=2")
    assert shown["FD", "rooted:k=2"] == f"{ratio['low']:.4g} to {ratio['high']:.4g}"
    assert shown["recall", "rooted:k=2"] == ""
    table = report_compare.tables(summarise(three_arms(), arms=ARMS, seeds=range(5), judged_by="recall"))[2]
    shown = {(row[0], row[1]): row[table.header.index("corrected")] for row in table.rows}
    assert shown["recall", "rooted:k=2"].startswith("+") and shown["FD", "rooted:k=2"] == ""


def test_figures_where_more_is_better() -> None:
    found = summarise(three_arms(), arms=ARMS, seeds=range(5), judged_by="recall")
    assert found["verdicts"][0]["outcome"] == paired.BETTER
    assert not compare_results.lower_is_better("pr50k3_full_recall") and compare_results.lower_is_better("kd")


def test_time_ratios() -> None:
    found = results_of(three_arms())
    rows = {(row["arm"], row["share"]): row for row in found["thresholds"]}
    row = rows["rooted:k=2", 1.0]
    assert row["ratio"] == pytest.approx(0.5) and row["censored"] == 0 and row["first"] == 5  # 1 kimg instead of 2
    assert rows["rooted:k=2", 0.5]["ratio"] == pytest.approx(0.5 / 0.625)  # at 75 + shift
    assert rows["rooted:k=8", 0.5]["ratio"] == pytest.approx(1) and rows["rooted:k=8", 0.5]["first"] == 0


def test_arms_that_never_arrive_give_a_bound() -> None:
    records = [run("logistic", s, [100, 60, 50]) for s in range(2)]
    records += [run("rooted:k=2", 0, [100, 90, 80]), run("rooted:k=2", 1, [100, 40, 30])]
    found = summarise(records, arms=ARMS[:2], seeds=range(2), judged_by="fd")
    row = found["thresholds"][0]
    late, early = 2 / 2, (50 / 60) / 2
    assert row["censored"] == 1 and row["ratio"] == pytest.approx(math.sqrt(late * early)) and row["bootstrap"] is None
    assert row["first"] == 1


def test_failed_runs_at_thresholds() -> None:
    """An arm that failed early never arrives: it counts with all images of a whole run. A failed baseline sets none."""
    records = [run("logistic", 0, [100, 60, 50]), run("rooted:k=2", 0, [100, 90], failed=True)]
    records += [run("logistic", 1, [100, 50], failed=True), run("rooted:k=2", 1, [100, 60, 50])]
    row = summarise(records, arms=ARMS[:2], seeds=range(2), judged_by="fd")["thresholds"][0]
    assert (row["n"], row["censored"], row["first"], row["without_threshold"]) == (1, 1, 0, 1)
    assert row["ratio"] == pytest.approx(2 / 2)  # 2 kimg shown in a whole run, 2 that the baseline needs
    half = summarise(records, arms=ARMS[:2], seeds=range(2), judged_by="fd")["thresholds"][2]
    assert half["ratio"] == pytest.approx(2 / 0.625) and half["first"] == 0


def test_thresholds_where_more_is_better() -> None:
    curves = {"logistic": [0.1, 0.3, 0.5], "rooted:k=2": [0.1, 0.5, 0.6]}
    records = [
        run(name, seed, [1, 1, 1], curves={"recall": list(enumerate(values))})
        for seed in range(2)
        for name, values in curves.items()
    ]
    rows = summarise(records, arms=ARMS[:2], seeds=range(2), judged_by="recall")["thresholds"]
    assert rows[0]["ratio"] == pytest.approx(0.5) and rows[0]["first"] == 2


def test_verdicts_count_all_arms() -> None:
    """A difference that two arms would make believe, and that is not claimed among three."""
    steps = [-0.2, 3.0, 2.5, 1.5, 2.0]  # p = 0.033 by Student's test
    records = [run("logistic", seed, [100, 50]) for seed in range(5)]
    records += [run("rooted:k=2", seed, [100, 50 - step]) for seed, step in enumerate(steps)]
    two = summarise(records, arms=ARMS[:2], seeds=range(5), judged_by="fd")["verdicts"]
    records += [run("rooted:k=8", seed, [100, 51 + seed % 2]) for seed in range(5)]
    three = results_of(records)["verdicts"]
    assert two[0]["outcome"] == paired.BETTER and three[0]["outcome"] == paired.NONE_SEEN


def test_a_baseline_that_does_not_improve_sets_no_threshold() -> None:
    records = [run("logistic", 0, [100, 120]), run("rooted:k=2", 0, [100, 90])]
    records += [run("logistic", 1, [100, 50]), run("rooted:k=2", 1, [100, 50])]
    found = summarise(records, arms=ARMS[:2], seeds=range(2), judged_by="fd")
    assert found["thresholds"][0]["n"] == 1 and found["thresholds"][0]["without_threshold"] == 1
    found = summarise(records[:2], arms=ARMS[:2], seeds=[0], judged_by="fd")
    assert found["thresholds"] == [] and found["verdicts"][0]["outcome"] == paired.TOO_FEW


def test_failed_runs_leave_pairs_out_and_are_said() -> None:
    records = three_arms()
    records[1] = run("rooted:k=2", 0, [100, 90], failed=True)
    found = results_of(records)
    assert found["differences"][0]["n"] == 4 and found["arms"][1]["num_finished"] == 4
    assert found["verdicts"][0]["text"].endswith(
        "failed or unmeasured runs: 1 of 5 of rooted:k=2 and 0 of logistic, whose pairs are left out, which flatters "
        "what fails more often"
    )
    assert found["verdicts"][0]["outcome"] == paired.LEFT_OPEN  # better in 4 pairs, but the 5th it did not survive
    assert found["verdict"].startswith(
        "Verdict (final FD, 5 seeds): no difference seen from logistic: rooted:k=8; left open by failed runs: "
        "rooted:k=2; pairs lost to failed runs: 1 of 5 (rooted:k=2). 4 pairs are few"
    )
    assert found["thresholds"][0]["censored"] == 1  # it had not arrived when it failed


def test_a_figure_that_is_no_number_is_a_missing_one(tmp_path) -> None:
    """A finished run whose figure is null (NaN in JSON) neither stops the summary nor passes for a failed one."""
    records = three_arms()
    records[4]["final"]["fd"]["value"] = None
    found = results_of(records)
    assert found["verdicts"][0]["n"] == 4 and found["arms"][1]["final"]["fd"]["n"] == 4
    assert "failed or unmeasured runs: 1 of 5 of rooted:k=2" in found["verdicts"][0]["text"]
    assert "FD none" in compare_results.describe(records[4])
    report_compare.write(tmp_path, found | PROVENANCE)


@given(first=st.floats(1, 1e3), share=st.floats(1e-6, 1 - 1e-6))
@settings(max_examples=200, deadline=None)
def test_the_baseline_reaches_its_own_last_figure(first, share) -> None:
    """Rounding put the threshold of 100 % below the figure it was made of in one of seven such curves."""
    last = first * share
    records = [run("logistic", 0, [first, last]), run("rooted:k=2", 0, [first, last])]
    if last < first:
        (row, *_) = summarise(records, arms=ARMS[:2], seeds=[0], judged_by="fd")["thresholds"]
        assert row["ratio"] == 1 and row["censored"] == 0


def test_an_arm_of_failures_has_no_pair() -> None:
    found = results_of(three_arms(status="failed", final={}, reason="x", headline=None))
    assert (
        found["verdicts"][0]["outcome"] == compare_results.NO_PAIR
        and "5 of 5 of rooted:k=2" in found["verdicts"][0]["text"]
    )
    assert "no pair of finished runs: rooted:k=2" in found["verdict"]
    assert all(row["arm"] != "rooted:k=2" for row in found["differences"])
    report_compare.page(found | PROVENANCE)


def test_bands_leave_the_verdict_to_the_table() -> None:
    note = report_compare.pictures(results_of(three_arms()))[-1].note
    assert "no difference is seen" not in note and "the verdict goes by the table of paired differences" in note


def test_bands_are_of_paired_differences() -> None:
    found = results_of(three_arms())
    band = next(band for band in found["bands"] if band["arm"] == "rooted:k=2")
    assert band["n"] == 5 and [p[:2] for p in band["points"]] == [[0, 0], [1, -10], [2, pytest.approx(-5)]]
    assert band["points"][1][2:] == [-10, -10]  # what the seeds share has cancelled
    assert band["points"][2][2] < -5 < band["points"][2][3]
    records = three_arms()
    records[1] = run("rooted:k=2", 0, [100, 9, 9], failed=True)
    band = next(band for band in results_of(records)["bands"] if band["arm"] == "rooted:k=2")
    assert band["n"] == 4 and band["points"][1][1] == -10


def test_choosing_settings() -> None:
    records = [
        run("logistic", 9, [1, 5], setting="lr=1"),
        run("logistic", 9, [1, 3], setting="lr=2"),
        run("rooted:k=2", 9, [1, 2], setting="lr=1"),
        run("rooted:k=2", 9, [1], setting="lr=2", failed=True),
        run("rooted:k=8", 9, [1], setting="lr=1", failed=True),
        run("rooted:k=8", 9, [1], setting="lr=2", failed=True),
    ]
    found = choose(records, [arm["name"] for arm in ARMS], "fd")
    assert {arm: row["setting"] for arm, row in found["chosen"].items()} == {
        "logistic": "lr=2",
        "rooted:k=2": "lr=1",
        "rooted:k=8": "lr=1",
    }
    assert "1 of 2 settings failed" in found["chosen"]["rooted:k=2"]["note"]
    assert "every setting failed" in found["chosen"]["rooted:k=8"]["note"]
    assert [row["value"] for row in found["runs"]] == [5, 3, 2, None, None, None]
    higher = choose(records[:2], ["logistic"], "recall")
    assert higher["chosen"]["logistic"]["setting"] == "lr=2"  # recall 1/3 against 1/5


def test_a_choice_at_the_edge_or_of_a_diverging_run_says_so() -> None:
    points = [f"lr={lr},gamma={gamma}" for lr in (1, 2, 4) for gamma in (0.1, 0.5)]
    records = [run("logistic", 9, [1, 9 - (p == points[2])], setting=p) for p in points]
    records += [run("rooted:k=2", 9, [1, i], setting=p, state="diverging") for i, p in enumerate(points, 1)]
    chosen = choose(records, ["logistic", "rooted:k=2"], "fd")["chosen"]
    assert chosen["logistic"] == {
        "setting": "lr=2,gamma=0.1",
        "note": " (gamma at the grid's edge: a better one may lie beyond)",
    }
    assert chosen["rooted:k=2"]["note"] == (
        " (lr and gamma at the grid's edge: a better one may lie beyond; its last state was diverging)"
    )


def test_different_machines_are_said() -> None:
    records = three_arms()
    assert results_of(records)["notes"] == []
    records[0]["machine"] = {"device_name": "y", "num_threads": 3}
    records[1]["version"] = "1"
    notes = results_of(records)["notes"]
    assert len(notes) == 3 and "different devices (seeds 0)" in notes[1]
    for seed in range(3):  # a seed whose arms are together is no torn pair
        records[seed]["machine"] = {"device_name": "y"}
    assert not any("different devices" in note for note in results_of(records)["notes"])
    facts = dict(report_compare.facts(results_of(records) | PROVENANCE))
    assert facts["machine"] == "y, None threads; x, None threads"


def test_missing_measurements_are_said() -> None:
    records = three_arms()
    del records[4]["curves"]["fd"][1]
    (note,) = results_of(records)["notes"]
    assert "Measurements on the way are missing, as after an interruption: rooted:k=2, seed 1." in note


def test_pages_are_whole_and_escaped(tmp_path) -> None:
    records = three_arms()
    records[1] = run("rooted:k=2", 0, [100, 90], failed=True)
    found = results_of(records) | PROVENANCE
    found["tuning"] = choose([{**r, "setting": "lr=1"} for r in records[:3]], [arm["name"] for arm in ARMS], "fd")
    report_compare.write(tmp_path, found)
    page, text = (tmp_path / "compare.html").read_text(), (tmp_path / "compare.md").read_text()
    for title in ("Arms", "Paired differences", "kimg to a threshold", "Failures", "Choice of settings"):
        assert f"<h2>{title}</h2>" in page and f"## {title}\n" in text
    assert "<b>" not in page and "&lt;b&gt;" in page and "nan" not in page.lower().replace("finan", "")
    assert "≥ " in text and json.loads((tmp_path / "compare.json").read_text())["verdict"] == found["verdict"]
    for picture in report_compare.pictures(found):
        root = ElementTree.fromstring(picture.svg)
        assert len(root.findall("polyline")) == len(picture.legend) and root.findall("polygon")
    for block in text.split("\n\n"):
        rows = block.splitlines()
        assert not block.startswith("|") or {row.count("|") for row in rows} == {rows[0].count("|")}


def test_a_band_of_two_runs_does_not_hide_the_curves() -> None:
    line = report_compare.Line("a", 1, [(0, 1.0), (1, 2.0)], [(0, -1e6, 1e6), (1, -1e6, 1e6)])
    root = ElementTree.fromstring(report_compare.draw("t", [line]))
    ys = [float(pair.split(",")[1]) for pair in root.find("polyline").get("points").split()]
    assert abs(ys[0] - ys[1]) > report_compare.HEIGHT / 10


def test_a_chart_of_one_point() -> None:
    ElementTree.fromstring(report_compare.draw("t", [report_compare.Line("a", 1, [(0.5, 0.0)])], zero=True).strip())
