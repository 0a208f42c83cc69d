"""`stylegan_rooted.report`: one structure of facts in three files, for whole, unfinished, damaged and bare subjects."""

import html
import html.parser
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from report_runs import NAUGHTY, R, make_run, metric_row, save_network, stat_rows, tiles, write_lines

from metrics import feature_net
from stylegan_rooted import (
    generate,
    report,
    report_answer,
    report_charts,
    report_curves,
    report_pictures,
    report_run,
    report_samples,
)
from stylegan_rooted.evaluation import Evaluator
from stylegan_rooted.report import Wanted
from stylegan_rooted.report_charts import Series, chart, nice_ticks, number, thinned
from stylegan_rooted.report_run import read_run
from torch_utils import images
from training import measured, watchdog
from training.config import MetricConfig
from training.dataset import ImageDataset


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks, twelve images, weights of a feature network, a run on that data."""
    place = tmp_path_factory.mktemp("report")
    save_network(place / "before.pkl", 1)
    save_network(place / "after.pkl", 2)
    report_runs.save_data(place / "data")
    report_runs.save_features(place / "features.npz")
    make_run(place / "00000-data", data=place / "data", augment__aug="ada")
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEGAN_ROOTED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(report_samples, "NUM_SAMPLES", 8)  # the grid's 24 will do
    monkeypatch.setattr(report_samples, "NUM_SWEEP_SEEDS", 2)


def settings(place: Path, **changes: Any) -> MetricConfig:
    return MetricConfig(**{"num": 14, "detector_file": str(place / "features.npz"), **changes})


def wanted(place: Path, **changes: Any) -> Wanted:
    return Wanted(**{"metric_config": settings(place), "device": "cpu", "data": place / "data", **changes})


@pytest.fixture(scope="module")
def full(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report of a run, as the demo makes it: before and after, credits, hostile words in every free text."""
    outdir = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLEGAN_ROOTED_CACHE", str(outdir / "cache"))
        result = report.write(
            outdir,
            [place / "00000-data"],
            wanted(place, measure="all", credits=[f"Pictures CC-BY 4.0 {NAUGHTY}"], title=NAUGHTY),
            before=place / "before.pkl",
        )
    return result, outdir


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.headings: list[int] = []
        self._hidden = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._hidden = tag if tag in ("style", "script") else self._hidden
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag: str) -> None:
        self._hidden = "" if tag == self._hidden else self._hidden

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def page_of(outdir: Path) -> Page:
    return Page((outdir / "report.html").read_text(encoding="utf-8"))


# --- one structure, three files


def test_json_is_the_facts_and_names_where_they_come_from(full: tuple[dict[str, Any], Path], place: Path) -> None:
    result, outdir = full
    assert json.loads((outdir / "report.json").read_text()) == result and "NaN" not in json.dumps(result)
    assert sorted(p.name for p in outdir.iterdir() if p.is_file()) == ["report.html", "report.json", "report.md"]
    pickle = place / "00000-data" / "network-snapshot-000004.pkl"
    run, before = result["subjects"]
    assert run["network"]["sha256"] == report_runs.digest(pickle) and run["snapshot"] == pickle.name
    assert run["origin"]["base"] == "base.pkl" and run["origin"]["base_sha256"] == "5" * 64
    assert run["origin"]["base_licence"] == run["origin"]["licence"] == "not recorded"
    assert before["role"] == "before" and before["run"] is None
    assert result["data"]["num_images"] == 12 and re.fullmatch("[0-9a-f]{64}", result["data"]["fingerprint"])
    assert {"duplicate", "near-duplicate"} & {f["code"] for f in result["data"]["check"]["findings"]} == set()
    assert run["trained_on_data"] is False and any("fingerprints differ" in line for line in result["warnings"])
    assert run["run"]["reproduce"]["command"] == "stylegan-rooted finetune --data 'a b.zip'"
    options = {o["name"]: (o["value"], o["default"], o["automatic"]) for o in run["run"]["options"]}
    assert options["resume"] == ("base.pkl", "none", False) and options["loss.gamma"] == ("1", "auto", True)
    assert options["loss.name"] == ("rooted", "logistic", False) and "loss.k" not in options
    for package in ("stylegan-rooted", "python", "torch", "numpy", "scipy", "pillow"):
        assert result["environment"]["versions"][package]


def test_figures_are_the_evaluators_with_their_intervals(full: tuple[dict[str, Any], Path], place: Path) -> None:
    loaded = generate.open_network(place / "before.pkl", "cpu")
    rows = Evaluator(ImageDataset(place / "data"), settings(place), torch.device("cpu"), 0).measure(loaded.G)
    assert full[0]["metrics_before"] == {row.name: row.value for row in rows}
    assert set(full[0]["metrics"]) == {"fd", "kd"}
    for row in full[0]["subjects"][0]["figures"]:
        digest = report_runs.digest(place / "features.npz")
        assert row["provenance"]["digest"] == digest and row["provenance"]["num_fake"] == 14
        lowest = -math.inf if row["name"] == "kd" else 0.0
        assert row["low"] == max(row["value"] - 1.96 * row["std_error"], lowest)
        assert row["high"] == row["value"] + 1.96 * row["std_error"]
    # too few images for a Fréchet distance: the kernel distance leads, and a warning says why
    (leading,) = [row for row in full[0]["subjects"][0]["figures"] if row["headline"]]
    assert leading["name"] == "kd" and any(str(feature_net.NUM_FEATURES) in line for line in full[0]["warnings"])


def test_page_is_self_contained_and_hostile_words_stay_words(full: tuple[dict[str, Any], Path]) -> None:
    text = (full[1] / "report.html").read_text()
    page = Page(text)
    assert not {"iframe", "object", "embed", "base", "form"} & set(page.tags) and page.tags.count("script") == 1
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("srcset", "action", "style"), (tag, name)
        if name == "src":
            assert tag == "img" and re.match("data:image/(png|jpeg);base64,", value)
        if name == "href":
            assert value.startswith("#") or (tag, value) == ("link", "data:,")
    assert "url(" not in text and "http-equiv" in text
    assert page.text.count(NAUGHTY) >= 2  # title and credits, as text
    assert "49" not in page.text.split("CC-BY 4.0")[1][:80]


def test_every_picture_and_chart_speaks_and_headings_are_in_order(full: tuple[dict[str, Any], Path]) -> None:
    result, outdir = full
    page = page_of(outdir)
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == page.tags.count("img") and all(alts)
    assert set(alts) == {picture["alt"] for picture in result["pictures"].values()}
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == len(result["subjects"][0]["run"]["charts"])
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:]))
    assert sum(p["num_bytes"] for p in result["pictures"].values()) <= result["pictures_limit_bytes"]
    tables = page.tags.count("table")
    assert tables >= len(labels) and page.tags.count("details") >= len(labels)


def test_page_and_text_tell_the_same(full: tuple[dict[str, Any], Path]) -> None:
    result, outdir = full
    words, markdown = page_of(outdir).words, (outdir / "report.md").read_text()
    run = result["subjects"][0]["run"]
    sentences = [run["evidence"], *(c["sentence"] for c in run["charts"]), *(line for line in result["warnings"])]
    plain = html.unescape(markdown.replace("\\", ""))
    for text in [*sentences, result["data"]["fingerprint"], run["reproduce"]["command"], "floor of G (2)"]:
        assert " ".join(text.split()) in words, text
        assert " ".join(text.split()) in plain, text
    assert "<" not in markdown
    assert all(line.count("|") - line.count("\\|") in (0, *range(3, 12)) for line in markdown.splitlines())
    assert words.count("FID") == words.count("they are not FID or KID") == 1


def test_answers_stand_before_everything_else(full: tuple[dict[str, Any], Path]) -> None:
    words = page_of(full[1]).words
    assert words.index("Is it working?") < words.index("When do I stop?") < words.index("What was trained")
    assert "FD went from 9 ± 0.2 (0 kimg) to 5 ± 0.2 (4 kimg), 44% lower" in words


# --- what a run is asked


@pytest.mark.parametrize(
    ("values", "changes", "history", "mood", "working", "stop"),
    [
        ((9.0, 7.0, 5.0), {}, "finished", "good", "Yes: FD", "It ended early"),
        ((9.0, 7.0, 5.0), {}, "stopped", "good", "Yes: FD", "It ended early"),
        ((9.0, 5.1, 5.0), {}, "finished", "good", "Yes: FD", "About here"),
        ((9.0, 5.1, 5.0), {}, "continued", "good", "Yes: FD", "Soon: FD still falls"),
        ((9.0, 8.9), {}, "continued", "unclear", "Not visibly", "Too early to tell: 2 measurements"),
        ((9.0, 8.9, 8.8, 8.7), {}, "continued", "good", "Yes: FD", "Not yet. FD fell 3 times in a row, from 9 ± 0.2"),
        ((8.5, 8.7, 8.6, 8.55), {}, "finished", "unclear", "Not visibly", "It has levelled off"),
        ((9.0, 5.0, 5.1), {}, "finished", "good", "Yes: FD", "Perhaps now: the last FD, 5.1 ± 0.2, is within"),
        ((9.0, 5.0, 6.0), {}, "finished", "good", "Yes: FD", "Perhaps now: the last FD, 6 ± 0.2, is worse"),
        ((9.0, 5.0, 5.1, 5.2, 5.3), {}, "finished", "good", "Yes: FD", "It has levelled off"),
        ((5.0, 5.1, 5.2), {}, "finished", "unclear", "Not visibly", "Perhaps now"),
        ((5.0, 7.0, 9.0), {}, "finished", "bad", "No: FD", "Now: FD has only become worse"),
        ((9.0, 5.0, 7.0, 7.1, 7.2), {}, "finished", "unclear", "It was: FD 5 ± 0.2 at 2 kimg", "At 2 kimg"),
        ((9.0,), {}, "finished", "unclear", "Unclear: one measurement", "Too early"),
        ((), {}, "finished", "unclear", "Unclear: no FID or FD yet", "Nobody can tell"),
        ((9.0, 5.0), {"Watch__diversity": lambda i: 0.9 - 0.15 * i}, "finished", "bad", "No, it collapses", "Now"),
        ((9.0, 5.0), {"Loss__scores__real": lambda i: 9.0**i}, "failed", "bad", "No, it diverges", "Now"),
    ],
)  # fmt: skip
def test_answers_follow_the_figures_and_the_watchdog(
    values: tuple[float, ...],
    changes: dict[str, Any],
    history: str,
    mood: str,
    working: str,
    stop: str,
    tmp_path: Path,
) -> None:
    stats = stat_rows(11, **changes)
    for row in stats:
        del row["state"]
    run = read_run(make_run(tmp_path / "run", values=values, stats=stats, history=("started", history)))
    told = report_answer.answer(run)
    assert told.mood == mood and told.working.startswith(working), told
    assert told.stop.startswith(stop), told


def test_figures_measured_otherwise_stay_out_of_the_series(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", values=(9.0, 7.0, 6.0, 5.0))
    file = path / "metric-fd.jsonl"
    own = [json.loads(line) for line in file.read_text().splitlines()]
    answers = report_answer.answer(read_run(path))
    other = metric_row("fd", 2.0, 1.0, num_fake=2000) | {"added_by": "metrics"}
    for row in (other, metric_row("fd", 6.0, 1.0, digest="e") | {"added_by": "metrics"}):
        write_lines(file, [*own, row])
        run = read_run(path)
        assert report_answer.answer(run) == answers and run.verdict().state == "healthy"
        assert measured.distances(path) == ("fd", [9.0, 7.0, 6.0, 5.0]) and measured.best_of(path).value == 5.0
    assert run.figures_of("network-snapshot-000006.pkl")["fd"].value == 5.0
    write_lines(file, [*own, other])
    (plot,) = [p for p in report_curves.plots(read_run(path)) if p.title == "FD"]
    said = "Not in the curve, as measured otherwise: 1 ± 0.2 at 2 kimg (generated images: 2000)."
    assert plot.sentence.endswith(said) and [y for _, y in plot.series[0].points] == [9.0, 7.0, 6.0, 5.0]
    # Measured as the run measures, a line that was added later belongs to the curve.
    write_lines(file, [*own, metric_row("fd", 3.0, 4.0) | {"added_by": "metrics"}])
    assert [row.value for row in read_run(path).metrics["fd"]] == [9.0, 7.0, 4.0, 6.0, 5.0]
    assert measured.distances(path)[1] == [9.0, 7.0, 4.0, 6.0, 5.0]
    # Where the run itself measured nothing, the most frequent conditions make the curve.
    write_lines(file, [row | {"added_by": "metrics"} for row in (*own[:2], other)])
    assert measured.distances(path)[1] == [9.0, 7.0]
    # Another detector's figures, added for the newest snapshot, do not take the lead.
    write_lines(file, own)
    write_lines(path / "metric-fid.jsonl", [metric_row("fid", 6.0, 80.0) | {"added_by": "metrics"}])
    assert read_run(path).headline()[0] == measured.best_of(path).metric == "fd"
    # Continued with another number of images, the run goes by what it measures now.
    (path / "metric-fid.jsonl").unlink()
    write_lines(file, [*own, metric_row("fd", 8.0, 3.0, num_fake=50)])
    assert measured.distances(path)[1] == [3.0] and read_run(path).headline()[1][0].value == 3.0


def test_no_figure_speaks_under_anothers_name(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", values=(50.0, 38.0, 44.0, 45.0, 46.0), name="kd", stats=stat_rows(11))
    rows = [metric_row("fd", 2.0 * i, value) for i, value in enumerate((132.0, 160.0, 161.0, 162.0, 163.0))]
    write_lines(path / "metric-fd.jsonl", [row | {"warnings": ["fd: too few images"]} for row in rows])
    write_lines(path / "stats.jsonl", [row | {"state": "overfitting"} for row in stat_rows(11)])
    told = report_answer.answer(read_run(path))
    evidence = "the last 3 measurements of FD are 10% or more above the best FD, 132"
    assert told.working == f"It was: KD 38 ± 0.2 at 2 kimg; now {evidence}."
    plots = {p.title: p for p in report_curves.plots(read_run(path))}
    assert plots["FD"].state == "overfitting" and plots["KD"].state == "healthy"


def test_a_network_before_the_run_is_measured_as_the_run_measured(place: Path, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", data=place / "data", metric__detector_file=str(place / "features.npz"))
    loaded = generate.open_network(path / "network-snapshot-000004.pkl", "cpu")
    evaluator = Evaluator(ImageDataset(place / "data"), settings(place), torch.device("cpu"), 3)
    rows = evaluator.measure(loaded.G)
    for row in rows:
        line = metric_row(row.name, 4.0, row.value)
        line["provenance"] = row.as_dict() | {"data_fingerprint": evaluator.fingerprint}
        write_lines(path / f"metric-{row.name}.jsonl", [line])
    facts = report.compose(
        [path], Wanted(device="cpu", data=place / "data", sheet=False), before=place / "before.pkl"
    ).facts
    before = {row["name"]: row for row in facts["subjects"][1]["figures"]}
    assert {(row["provenance"]["num_fake"], row["provenance"]["seed"]) for row in before.values()} == {(14, 3)}
    assert facts["metrics_before"] == {name: row["value"] for name, row in before.items()} != {}
    assert facts["compare"]["problems"] == []
    # What cannot be measured alike gets no arrow and no percentage.
    for name in ("fd", "kd"):
        (line,) = map(json.loads, (path / f"metric-{name}.jsonl").read_text().splitlines())
        line["provenance"]["num_real"] = 11
        write_lines(path / f"metric-{name}.jsonl", [line])
    made = report.compose([path], wanted(place, sheet=False), before=place / "before.pkl")
    assert made.facts["metrics_before"] == {} and len(made.facts["compare"]["problems"]) == 2
    assert " → " not in report.page(made) and "than before" not in report.page(made)


def test_sentences_under_the_curves_come_from_the_watchdog(tmp_path: Path) -> None:
    healthy = {p.title: p for p in report_curves.plots(read_run(make_run(tmp_path / "a", augment__aug="ada")))}
    assert {p.state for p in healthy.values()} == {"healthy"} and all(p.sentence for p in healthy.values())
    assert list(healthy) == [
        *("FD", "Losses", "Discriminator scores", "Augmentation strength p", "Tail share", "Gradient norms"),
        *("Variety and distance", "Speed", "Memory"),
    ]
    assert "0.05, below its limit of 0.85" in healthy["Augmentation strength p"].sentence
    assert "G 1 above its floor of 2" in healthy["Losses"].sentence
    assert [s.name for s in healthy["Gradient norms"].series] == ["Gmain", "Dmain"]  # Greg did nothing
    wrong = stat_rows(
        6,
        Watch__diversity=lambda i: 0.9 - 0.1 * i,
        Gradient__Gmain=lambda i: 10.0 if i < 5 else 1000.0,
        Progress__augment=lambda i: 0.85,
        Loss__tail_share__generator=lambda i: 0.4,
        Watch__nearest=lambda i: 0.2,
    )
    run = read_run(make_run(tmp_path / "b", stats=wrong, augment__aug="ada", loss__k="2:8@4"))
    ill = {p.title: p for p in report_curves.plots(run)}
    assert ill["Gradient norms"].state == watchdog.DIVERGING and "100 times the usual" in ill["Gradient norms"].sentence
    assert ill["Discriminator scores"].state == "healthy"  # not what is wrong here
    assert ill["Augmentation strength p"].state == watchdog.SATURATED
    assert ill["Tail share"].state == watchdog.TAIL_DOMINATED
    assert ill["Variety and distance"].state == watchdog.COLLAPSING
    assert "k went from 2" in ill["Root k"].sentence


def test_states_are_those_recorded_or_judged_again(tmp_path: Path) -> None:
    stats = stat_rows(4, Watch__diversity=lambda i: 0.9 if i < 3 else 0.1)
    stats[1]["state"] = "augment-saturated"
    for row in stats[2:]:
        del row["state"]
    run = read_run(make_run(tmp_path / "run", stats=stats))
    assert [state for _, state in run.states()] == ["healthy", "augment-saturated", "healthy", "collapsing"]
    assert run.verdict().state == "collapsing" and "10%" in run.verdict().evidence


def test_losses_have_their_floors(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    floor_g, floor_d = report_curves.floors(run)
    assert {y for _, y in floor_g} == {2.0} and {y for _, y in floor_d} == {4.0} and len(floor_g) == 6
    assert run.config is not None
    run.config = run.config.replace(loss__k="2:8@4", loss__acts_on="D")
    floor_g, floor_d = report_curves.floors(run)
    assert {y for _, y in floor_g} == {0.0} and floor_d[0][1] == pytest.approx(4, rel=1e-2)
    assert floor_d[-1][1] == pytest.approx(16 * 4 ** (-0.79 / 4), rel=1e-6)
    run.config = None
    assert report_curves.floors(run) == ([], [])


def test_best_snapshot_is_shown_where_it_is_still_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", values=(9.0, 4.0, 5.0))
    facts = report.compose([run], Wanted(measure="none", device="cpu")).facts["subjects"][0]
    assert facts["snapshot"] == facts["run"]["best"]["snapshot"] == "network-snapshot-000004.pkl"
    gone = "Take the snapshot of 2 kimg, which is no longer there, or else network-snapshot-000004.pkl (4 kimg, FD 5"
    assert gone in facts["run"]["answer"]["stop"]
    save_network(run / "network-snapshot-000002.pkl", 5)
    facts = report.compose([run], Wanted(measure="none", device="cpu")).facts["subjects"][0]
    assert facts["snapshot"] == facts["run"]["answer"]["take"] == "network-snapshot-000002.pkl"
    assert "Take network-snapshot-000002.pkl (2 kimg)" in facts["run"]["answer"]["stop"]
    (row,) = facts["figures"]
    assert (row["value"], row["source"]) == (4.0, "recorded by the run")
    # A later snapshot within the same kimg has taken the best one's file name: its figure is the file's.
    rows = [metric_row("fd", kimg, value) for kimg, value in ((0.0, 9.0), (2.0, 4.0), (2.5, 8.0), (4.0, 5.0))]
    write_lines(run / "metric-fd.jsonl", rows)
    facts = report.compose([run], Wanted(measure="none", device="cpu")).facts["subjects"][0]
    assert facts["snapshot"] == "network-snapshot-000004.pkl" and gone in facts["run"]["answer"]["stop"]


# --- several, bare, unfinished, damaged


def test_several_are_set_side_by_side(place: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "00001-other", data=place / "data", values=(9.0, 8.0), loss__gamma=5.0)
    result = report.write(
        tmp_path / "o",
        [place / "00000-data", other, place / "after.pkl"],
        wanted(place, flags={"loss.gamma": "--gamma"}),
    )
    compare = result["compare"]
    assert [row["name"] for row in compare["rows"]] == ["00000-data", "00001-other", "after.pkl"]
    assert {"name": "--gamma", "values": ["1", "5"]} in compare["options"]
    assert "data.path" not in {o["name"] for o in compare["options"]}
    assert any("not measured alike" in line for line in compare["problems"])
    (fd,) = [c for c in compare["charts"] if c["title"] == "FD"]
    assert [(s["name"], s["style"]) for s in fd["series"]] == [("00000-data", 1), ("00001-other", 2)]
    assert fd["log"] is None
    far = make_run(tmp_path / "00002-far", values=(300.0, 200.0))
    charts = report.compose([place / "00000-data", far], wanted(place, measure="none", sheet=False)).facts["compare"]
    assert [c["log"] for c in charts["charts"] if c["title"] in ("FD", "Speed")] == [True, None]
    words = page_of(tmp_path / "o").words
    assert (
        "3 compared" in words
        and result["title"] == "3 compared"
        and "Images side by side" in words
        and "--gamma15" in words
    )
    alike = report.compose([place / "after.pkl", place / "before.pkl"], wanted(place, measure="all", sheet=False)).facts
    assert alike["compare"]["problems"] == [] and alike["data"]["check"] is None
    same = report.compose([place / "after.pkl", place / "after.pkl"], Wanted(measure="none", device="cpu")).facts
    assert [s["name"] for s in same["subjects"]] == ["after.pkl (1)", "after.pkl (2)"]


def test_a_bare_network_without_data(place: Path, tmp_path: Path) -> None:
    result = report.write(tmp_path / "o", [place / "after.pkl"], Wanted(device="cpu"))
    (subject,) = result["subjects"]
    assert subject["kind"] == "network" and subject["figures"] == [] and result["data"] is None
    assert (
        subject["pictures"]["samples"] and subject["pictures"]["nearest"] is None and "--data" in result["missing"][0]
    )
    assert "No figures: nothing was measured." in page_of(tmp_path / "o").words


@pytest.mark.parametrize(("channels", "said"), [(3, False), (4, True)])
def test_transparent_images_are_said_to_be_shown_on_white(channels: int, said: bool, tmp_path: Path) -> None:
    network = save_network(tmp_path / "rgba.pkl", 1, img_channels=channels)
    composed = report.compose([network], Wanted(measure="none", device="cpu"))
    assert ("(RGBA, shown on white)" in report.page(composed)) is said


def test_nearest_training_images_are_found_with_their_distance(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    loaded = generate.open_network(place / "after.pkl", "cpu")
    copied = generate.render(loaded, 5, torch.zeros([1, 0]))
    images.save_png(data / "copied.png", copied)
    result = report.compose([place / "after.pkl"], wanted(place, data=data, measure="none")).facts
    nearest = result["subjects"][0]["pictures"]["nearest"]
    pairs = {pair["seed"]: pair for pair in nearest["pairs"]}
    assert nearest["pairs"][0]["seed"] == 5 and nearest["num_train"] == 13
    assert pairs[5]["file"] == "copied.png" and pairs[5]["relative"] < 1e-3
    assert [p["distance"] for p in nearest["pairs"]] == sorted(p["distance"] for p in nearest["pairs"])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "stats.jsonl").unlink(), "stats.jsonl is missing"),
        (lambda run: (run / "training_options.json").write_text('{"loss": '), "training_options.json cannot be read"),
        (lambda run: (run / "environment.json").write_text("[1]"), "environment.json is no JSON object"),
        (lambda run: (run / "fakes000002.png").write_bytes(b"torn"), "fakes000002.png: not an image"),
        (lambda run: (run / "stats.jsonl").write_bytes(b"\xff\xfe{\n7\n" * 3), "stats.jsonl: 3 of 6 lines are damaged"),
        (lambda run: (run / "network-snapshot-000004.pkl").write_bytes(b"\x80"), "network-snapshot-000004.pkl cannot"),
        (lambda run: (run / "network-snapshot-000004.pkl").unlink(), "network-snapshot-*.pkl: none is there"),
        (lambda run: os.mkfifo(run / "metric-kd.jsonl"), "metric-kd.jsonl cannot be read (is no regular file)"),
        (lambda run: [p.unlink() for p in run.glob("fakes*.png")], "fakes*.png: none is there"),
        (lambda run: (run / "best-snapshot.json").write_text("{"), "best-snapshot.json cannot be read"),
        (lambda run: (run / "metric-kd.jsonl").write_text('[1]\n{}\n{"results": {"kd": 1}}\n'), "3 of 3 lines"),
        (lambda run: write_lines(run / "history.jsonl", [{"event": "finished", "nimg": 9000}]), "last lines are lost"),
        (lambda run: [(run / "reals.png").unlink(), (run / "reals.png").symlink_to("/dev/null")], "reals.png: leads"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named_and_the_rest_is_shown(damage: Any, said: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    damage(run)
    result = report.write(tmp_path / "o", [run], Wanted(device="cpu", measure="none"))
    missing = [*result["missing"], *result["subjects"][0]["missing"]]
    assert any(said in line for line in missing), missing
    words = page_of(tmp_path / "o").words
    assert said in words and "Is it working?" in words
    assert said in (tmp_path / "o" / "report.md").read_text().replace("\\", "")


def test_a_snapshot_that_cannot_be_opened_is_not_recommended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", values=(9.0, 7.0, 5.0))
    save_network(run / "network-snapshot-000002.pkl", 5)
    torn = run / "network-snapshot-000004.pkl"
    torn.write_bytes(torn.read_bytes()[:-100])
    subject = report.compose([run], Wanted(measure="none", device="cpu")).facts["subjects"][0]
    assert any("network-snapshot-000004.pkl cannot be opened" in line for line in subject["missing"])
    assert subject["snapshot"] == subject["run"]["answer"]["take"] == "network-snapshot-000002.pkl"
    said = "the snapshot of 4 kimg, which cannot be opened, or else network-snapshot-000002.pkl (2 kimg"
    assert said in subject["run"]["answer"]["stop"] and subject["pictures"]["samples"]


def test_a_steady_fall_within_the_error_is_progress_and_says_so(tmp_path: Path) -> None:
    told = report_answer.answer(read_run(make_run(tmp_path / "run", values=(9.0, 8.9, 8.8, 8.7))))
    assert "3% lower (within its error, but it fell 3 times in a row); the watchdog" in told.working, told
    assert told.stop.startswith("It ended early: a larger --kimg goes on with it. FD fell 3 times in a row")


def test_nobody_can_tell_early_in_a_run(tmp_path: Path) -> None:
    for i, values in enumerate(((9.0, 8.0, 7.9), (9.0, 5.0, 5.1), (9.0, 5.0, 5.1, 5.2, 5.3))):
        run = read_run(make_run(tmp_path / f"run{i}", values=values, history=("continued",), schedule__kimg=100.0))
        assert report_answer.answer(run).stop.startswith("Too early to tell: the run is at 4.01 of 100 kimg"), values


def test_options_that_were_given_are_not_folded(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", metric__patience=3, optim__batch=16, runtime__grid=(6, 4))
    environment = json.loads((path / "environment.json").read_text())
    environment["command"] += ["--batch=16"]
    (path / "environment.json").write_text(json.dumps(environment))
    flags = {"optim.batch": "--batch", "runtime.grid": "--grid", "loss.gamma": "--gamma"}
    subject = report.compose_from_files(path, flags=flags).facts["subjects"][0]
    options = {o["name"]: (o["value"], o["default"], o["automatic"]) for o in subject["run"]["options"]}
    assert options["metric.patience"] == ("3", "unset", False) and options["--batch"] == ("16", "auto", False)
    assert options["--gamma"] == ("1", "auto", True) and options["--grid"] == ("6x4", "auto", True)


def test_an_empty_run_folder_that_has_only_begun(tmp_path: Path) -> None:
    run = tmp_path / "00000-x"
    run.mkdir()
    (run / "training_options.json").write_text("{}")
    result = report.write(tmp_path / "o", [run], Wanted(device="cpu"))
    assert result["subjects"][0]["run"]["charts"] == [] and result["subjects"][0]["run"]["state"] == "healthy"
    assert "No curves" in page_of(tmp_path / "o").words


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ({"event": "finished"}, "finished"),
        ({"event": "stopped"}, "stopped"),
        ({"event": "failed"}, "failed"),
        ({"event": "continued", "pid": os.getpid()}, "running"),
        ({"event": "started", "pid": 2**30}, "interrupted"),
        ({"event": "started", "host": "elsewhere", "timestamp": 1.0}, "running"),  # its stats are fresh
        ({}, "unknown"),
    ],
)
def test_status(last: dict[str, Any], status: str, tmp_path: Path) -> None:
    import socket

    run = read_run(make_run(tmp_path / "run"))
    run.history = [{"host": socket.gethostname(), **last}] if last else []
    assert run.status() == status
    if last.get("host"):
        run.stats = []
        assert run.status() == "interrupted"


def test_run_folder_of_the_family(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "00003-family"
    run.mkdir()
    shutil.copy(place / "after.pkl", run / "network-snapshot-000040.pkl")
    (run / "training_options.json").write_text('{"loss_kwargs": {"r1_gamma": 10}, "total_kimg": 25000}')
    (run / "stats.jsonl").write_text('{"Loss/G/loss": {"mean": 1.0}, "Progress/kimg": {"mean": 40}}\n[1]\n"x"\n')
    (run / "metric-fid50k_full.jsonl").write_text(
        '{"results": {"fid50k_full": 12.5}, "snapshot_pkl": "network-snapshot-000040.pkl"}\n{"results": 3}\n7\n'
    )
    facts = report.compose([run / "network-snapshot-000040.pkl"], Wanted(device="cpu", measure="none")).facts
    (subject,) = facts["subjects"]
    assert subject["run"]["total_kimg"] == 25000 and subject["run"]["kimg"] == 40
    assert [c["title"] for c in subject["run"]["charts"]] == ["fid50k_full", "Losses"]
    assert subject["figures"][0]["value"] == 12.5 and subject["figures"][0]["headline"]
    assert {"name": "loss_kwargs.r1_gamma", "value": "10", "default": None, "automatic": False} in (
        subject["run"]["options"]
    )


def test_links_that_lead_out_of_the_run_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    images.save_grid(secret, tiles(40, seed=99), (8, 5))
    write_lines(tmp_path / "secret.jsonl", [metric_row("kd", 1.0, 42.4242)])
    run = make_run(tmp_path / "run")
    (run / "fakes000003.png").symlink_to(secret)
    (run / "metric-kd.jsonl").symlink_to(tmp_path / "secret.jsonl")
    made = report.compose_from_files(run)
    missing = made.facts["subjects"][0]["missing"]
    assert sum("leads out of the folder" in line for line in missing) == 2
    assert "42.42" not in json.dumps(made.facts) and len(made.facts["subjects"][0]["stages"]) == 3
    (run / "inside.png").write_bytes(secret.read_bytes())
    (run / "fakes000005.png").symlink_to("inside.png")  # stays inside
    assert len(report.compose_from_files(run).facts["subjects"][0]["stages"]) == 4


# --- what is refused


def test_what_cannot_be_mended_here_is_refused_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    (tmp_path / "small").mkdir()
    images.save_png(tmp_path / "small" / "a.png", np.zeros([3, 32, 32], np.uint8))
    for subject, config, words in (
        (place / "after.pkl", wanted(place, data=tmp_path / "small"), "dataset build"),
        (place / "00000-data", wanted(place, data=tmp_path / "no"), "no such folder"),
        (tmp_path / "no.pkl", wanted(place), "no such file or folder; name a network file or a run folder"),
        (tmp_path / "small", wanted(place), "small is no run folder: it has neither training_options.json"),
        (place, wanted(place), "name one of them, e.g. .*00000-data"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            report.write(out, [subject], config)
    conditional = save_network(tmp_path / "c.pkl", 4, c_dim=2)
    with pytest.raises(ValueError, match="no labels"):
        report.write(out, [conditional], wanted(place))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        report.write(tmp_path / "file", [place / "after.pkl"], wanted(place))
    with pytest.raises(ValueError, match="name a run folder"):
        report.write(out, [], wanted(place))
    with pytest.raises(ValueError, match="no run folder"):
        read_run(tmp_path)
    assert not out.exists()


def test_data_of_the_run_that_is_gone_or_changed_is_said(place: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data=tmp_path / "gone.zip")
    facts = report.compose([run], Wanted(device="cpu")).facts
    assert any("gone.zip" in line and "give --data" in line for line in facts["missing"])
    facts = report.compose([run], wanted(place, measure="none", sheet=False)).facts
    assert any("is not what this run was trained on" in line for line in facts["warnings"])
    environment = json.loads((run / "environment.json").read_text())
    environment["data"]["fingerprint"] = facts["data"]["fingerprint"]
    (run / "environment.json").write_text(json.dumps(environment))
    assert not report.compose([run], wanted(place, measure="none", sheet=False)).facts["warnings"]
    # as this run saw it, whatever the first one did with the same images
    mirrored = make_run(tmp_path / "mirrored", data=place / "data", data__mirror=True)
    both = report.compose([mirrored, run], wanted(place, measure="none", sheet=False)).facts
    assert [s["trained_on_data"] for s in both["subjects"]] == [False, True]


def test_a_missing_detector_leaves_a_report(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = MetricConfig(detector="inception", detector_file=str(tmp_path / "no.pt"))
    result = report.write(tmp_path / "o", [place / "after.pkl"], wanted(place, metric_config=config), say=said.append)
    assert result["metrics"] == {} and result["metrics_before"] is None and result["meaning"] is None
    missing = result["subjects"][0]["missing"]
    assert any("No figures" in line and "no.pt" in line for line in missing)
    assert any("No nearest" in line for line in missing) and any("no.pt" in line for line in said)


def test_conditional_networks_take_the_labels_of_the_data(place: Path, tmp_path: Path) -> None:
    network = save_network(tmp_path / "c.pkl", 4, c_dim=2)
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    (data / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.png", i % 2] for i in range(12)]}))
    result = report.write(tmp_path / "o", [network], wanted(place, data=data))
    assert result["data"]["label_dim"] == 2 and set(result["metrics"]) == {"fd", "kd"}
    assert dict(map(tuple, result["data"]["check"]["classes"])) == {"class 0": 6, "class 1": 6}
    report.compose([network], Wanted(device="cpu"))  # without data: a class a column


# --- pictures


def test_grids_are_cropped_to_whole_images(tmp_path: Path) -> None:
    images.save_grid(tmp_path / "grid.png", tiles(40), (8, 5))
    data = (tmp_path / "grid.png").read_bytes()
    part, size = report_pictures.crop_grid(data, R, (6, 4))
    assert size == (6, 4) and np.array_equal(part[6], tiles(40)[8])
    part, size = report_pictures.crop_grid(data, R, (60, 40))
    assert size == (8, 5) and np.array_equal(part, tiles(40))
    with pytest.raises(ValueError, match="no grid"):
        report_pictures.crop_grid(data, 24, (6, 4))


def test_pictures_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    album = report_pictures.Album()
    album.add("small", tiles(4), (2, 2), "a")
    small = album.pictures["small"]
    assert (small.mime, small.width, small.cell) == ("image/png", 2 * R, R)
    assert np.array_equal(images.from_pil(images.open_image(small.data))[:, :R, :R], tiles(1)[0])  # without losses
    noise = np.random.RandomState(0).randint(0, 256, [2, 3, 512, 512], dtype=np.uint8)
    album.add("large", noise, (2, 1), "b")
    assert (album.pictures["large"].mime, album.pictures["large"].width) == ("image/jpeg", 256)
    monkeypatch.setattr(report_pictures, "BUDGET_BYTES", 40_000)
    tight = report_pictures.Album()
    names = [tight.add(str(i), noise, (2, 1), "c") for i in range(60)]
    assert tight.num_bytes <= 40_000 and tight.num_left_out == names.count(None) > 0


def test_stages_are_spread_over_the_run(tmp_path: Path) -> None:
    assert report_pictures.spaced(range(0, 101), 5) == [0, 25, 50, 75, 100]
    assert report_pictures.spaced([1, 2, 3], 4) == [1, 2, 3] and report_pictures.spaced([], 3) == []
    run = make_run(tmp_path / "run")
    found = report_pictures.stages(report_pictures.Album(), run, R, "s", [])
    assert [s["label"] for s in found] == ["at the start", "after 2 kimg", "after 4 kimg"]
    for kimg in (2, 4):
        (run / f"fakes{kimg:06d}.png").unlink()
    found = report_pictures.stages(report_pictures.Album(), run, None, "s", [])
    assert [s["label"] for s in found] == ["at the start", "after less than 1 kimg"]


# --- charts


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_cover(low: float, span: float) -> None:
    high = low + span
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 9
    assert ticks[0] <= low + step * 1e-6 and ticks[-1] >= high - step * 1e-6
    inside = nice_ticks(low, high, within=True)
    assert inside and inside[0] >= low - step * 1e-6 and inside[-1] <= high + step * 1e-6
    assert nice_ticks(3.0, 3.0)[0] < 3 < nice_ticks(3.0, 3.0)[-1]


@given(
    st.lists(st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)), max_size=12),
    st.sampled_from([None, True, False]),
)
def test_whatever_is_plotted_stays_within_the_picture(values: list[float | None], log: bool | None) -> None:
    values = [v if v is None or not math.isfinite(v) or abs(v) < 1e12 else 1.0 for v in values]
    series = Series("a", [(float(i), y) for i, y in enumerate(values)], errors=[0.5] * len(values))
    drawn = chart("t", [series], log=log)
    if drawn is None:
        return
    left, top, right, bottom = drawn.box
    for path in (drawn.curves[0].path, drawn.curves[0].band):
        for x, y in coordinates(path):
            assert left <= x <= right and top <= y <= bottom
    assert all(top <= tick.at <= bottom for tick in drawn.y_ticks) and drawn.y_ticks


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def test_chart_puts_values_where_the_ticks_say() -> None:
    drawn = chart("t", [Series("a", [(0, 0.0), (10, 10.0)])])
    assert drawn is not None
    left, top, right, bottom = drawn.box
    assert coordinates(drawn.curves[0].path) == [(left, bottom), (right, top)]
    assert [tick.text for tick in drawn.y_ticks] == ["0", "2", "4", "6", "8", "10"]
    assert drawn.y_ticks[0].at == bottom and drawn.y_ticks[-1].at == top
    assert [dot.text for dot in drawn.curves[0].dots] == ["a 0 at 0 kimg", "a 10 at 10 kimg"]
    decades = chart("t", [Series("a", [(0, 1.0), (1, 10.0), (2, 1000.0)])], log=True)
    assert decades is not None and "Logarithmic" in decades.note
    assert [tick.text for tick in decades.y_ticks] == ["1", "10", "100", "1000"]
    (_, y0), (_, y1), (_, y2) = coordinates(decades.curves[0].path)
    assert y0 - y1 == pytest.approx((y1 - y2) / 2, abs=0.11)


def test_bands_show_the_errors() -> None:
    drawn = chart("t", [Series("a", [(0, 2.0), (1, 4.0)], errors=[1.0, 2.0])], lowest=0.0)
    assert drawn is not None
    scale = {tick.text: tick.at for tick in drawn.y_ticks}
    ys = [y for _, y in coordinates(drawn.curves[0].band)]
    assert ys == pytest.approx([scale["1"], scale["2"], scale["6"], scale["3"]], abs=0.11)
    assert drawn.curves[0].dots[0].text == "a 2 (1 to 3) at 0 kimg"  # ± would be one standard error
    flat = chart("t", [Series("a", [(0, 0.0), (1, 0.0)], errors=[1.0, 1.0])], lowest=0.0)
    assert flat is not None and flat.y_ticks[0].text == "0"


def test_gaps_nans_and_single_points() -> None:
    drawn = chart("t", [Series("a", [(0, 1.0), (1, None), (2, math.nan), (3, 2.0), (4, 3.0)])])
    assert drawn is not None and drawn.curves[0].path.count("M") == 2 and len(drawn.curves[0].dots) == 3
    single = chart("t", [Series("a", [(0, 5.0)], errors=[1.0])])
    assert single is not None and single.curves[0].dots[0].y0 is not None and single.curves[0].band == ""
    assert chart("t", [Series("a", [(0, None), (1, math.inf)])]) is None


def test_one_spike_does_not_flatten_the_curve() -> None:
    points = [(float(i), 2.0 + 0.01 * i) for i in range(50)] + [(50.0, 5000.0)]
    drawn = chart("t", [Series("a", points)])
    assert drawn is not None and "Logarithmic" in drawn.note


def test_thinning_keeps_extremes() -> None:
    rng = np.random.RandomState(0)
    points = [(float(i), float(y)) for i, y in enumerate(rng.randn(5000))]
    points[3210] = (3210.0, 99.0)
    points[17] = (17.0, None)
    kept = thinned(points)
    assert len(kept) <= 2 * report_charts.MAX_COLUMNS and (3210.0, 99.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert min(y for _, y in kept if y is not None) == min(y for _, y in points if y is not None)


def test_numbers_read_well() -> None:
    assert [number(x) for x in (0, 2, 140.3877, 12345.6, 0.0331, 1.5e-7, 3e9, -2.5)] == [
        *("0", "2", "140.4", "12346", "0.0331", "1.5e-07", "3e+09", "-2.5")
    ]


def test_runs_are_found_beside_pickles(place: Path) -> None:
    run = place / "00000-data"
    assert report_run.find_run(run / "network-snapshot-000004.pkl") == run and report_run.is_run(run)
    assert report_run.find_run(place / "after.pkl") is None and not report_run.is_run(place)
    assert report_run.find_run("https://x.y/network-snapshot-1.pkl") is None
