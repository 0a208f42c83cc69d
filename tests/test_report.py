"""`stylegan_rooted.report`: figures with provenance, a page that is self-contained and safe, grids and curves."""

import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metrics import feature_net
from stylegan_rooted import generate, report, report_charts
from stylegan_rooted.evaluation import Evaluator
from stylegan_rooted.report_charts import Series, chart, nice_ticks, number, thinned
from torch_utils import images
from training import network_pickle, networks
from training.config import FinetuneConfig, MetricConfig

R = 16
NAUGHTY = "<script>alert('x')</script><img src=http://x.y/z> \"&amp;"


def save_network(path: Path, seed: int, c_dim: int = 0) -> Path:
    torch.manual_seed(seed)
    common = dict(img_resolution=R, img_channels=3, c_dim=c_dim)
    G = networks.Generator(z_dim=8, w_dim=8, synthesis_kwargs=dict(channel_base=128, channel_max=8), **common).eval()
    D = networks.Discriminator(channel_base=128, channel_max=8, **common).eval()
    network_pickle.save(path, G=G, D=D, G_ema=G)
    return path


def tiles(num: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, [num, 3, R, R], dtype=np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks, twelve images, weights of a feature network."""
    place = tmp_path_factory.mktemp("report")
    save_network(place / "before.pkl", 1)
    save_network(place / "after.pkl", 2)
    (place / "data").mkdir()
    for i, image in enumerate(tiles(12)):
        images.save_png(place / "data" / f"{i}.png", image)
    rng = np.random.RandomState(0)
    weights = {
        name: rng.randn(*shape).astype(np.float32) * 0.1 for name, shape in feature_net.expected_shapes().items()
    }
    feature_net.save_feature_net(place / "features.npz", weights)
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEGAN_ROOTED_CACHE", str(tmp_path / "cache"))


def settings(place: Path, **changes: Any) -> MetricConfig:
    return MetricConfig(**{"num": 14, "detector_file": str(place / "features.npz"), **changes})


@pytest.fixture(scope="module")
def run_folder(place: Path) -> Path:
    """A run folder as `finetune` leaves it, with a non-finite loss in its third tick and a torn last line."""
    folder = place / "00000-data"
    folder.mkdir()
    save_network(folder / "network-snapshot-000004.pkl", 3)
    config = FinetuneConfig().replace(loss__gamma=1.0)
    (folder / "training_options.json").write_text(json.dumps(config.to_dict()))
    lines = []
    for i in range(6):
        values = {
            "Progress/kimg": 0.8 * i + 0.01,
            "Progress/augment": 0.01 * i,
            "Loss/G/loss": 2.5 + 0.1 * i,
            "Loss/D/loss": None if i == 2 else 4.4,
            "Loss/scores/real": 0.5 * i,
            "Loss/scores/fake": -0.5 * i,
        }
        lines.append(json.dumps({name: {"num": 1, "mean": value, "std": 0} for name, value in values.items()}))
    (folder / "stats.jsonl").write_text("\n".join(lines) + '\n{"Progress/kimg": {"me')
    digest = hashlib.sha256((place / "features.npz").read_bytes()).hexdigest()
    same = {"num_real": 12, "num_fake": 14, "digest": digest, "resize": "antialiased bilinear to 32", "seed": 0}
    for name, spread, covariance in (("fd", None, "cleanfid"), ("kd", 0.2, None)):
        rows = [
            {
                "results": {name: 9.0 - kimg},
                "metric": name,
                "kimg": kimg,
                "provenance": {**same, "spread": spread, "covariance": covariance},
            }
            for kimg in (1.6, 4.0)
        ]
        (folder / f"metric-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("fakes_init", "fakes000000", "fakes000001", "fakes000002", "fakes000004", "fakes000009"):
        images.save_grid(folder / f"{name}.png", tiles(8 * 5), (8, 5))
    return folder


@pytest.fixture(scope="module")
def full(place: Path, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report of a run, as the demo makes it: before and after, credits, hostile words in every free text."""
    outdir = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLEGAN_ROOTED_CACHE", str(outdir / "cache"))
        result = report.write(
            outdir,
            network=run_folder / "network-snapshot-000004.pkl",
            data=place / "data",
            metric_config=settings(place),
            before=place / "before.pkl",
            title=NAUGHTY,
            credits=[f"Pictures CC-BY 4.0 {NAUGHTY}"],
            device="cpu",
        )
    return result, outdir


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._hidden = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._hidden = tag if tag == "style" else self._hidden

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


# --- report.json


def test_provenance(full: tuple[dict[str, Any], Path], place: Path, run_folder: Path) -> None:
    result, outdir = full
    assert json.loads((outdir / "report.json").read_text()) == result
    assert sorted(p.name for p in outdir.iterdir() if p.is_file()) == ["report.html", "report.json"]
    pickle = run_folder / "network-snapshot-000004.pkl"
    assert result["network"]["sha256"] == hashlib.sha256(pickle.read_bytes()).hexdigest()
    assert result["network"]["path"] == str(pickle) and result["network"]["resolution"] == R
    assert result["data"]["num_images"] == 12 and re.fullmatch("[0-9a-f]{64}", result["data"]["fingerprint"])
    assert result["seed"] == 0 and result["settings"]["num"] == 14
    assert [e["role"] for e in result["evaluations"]] == ["before", "network"]
    digest = hashlib.sha256((place / "features.npz").read_bytes()).hexdigest()
    for evaluation in result["evaluations"]:
        assert [row["label"] for row in evaluation["results"]] == ["FD", "KD"]
        for row in evaluation["results"]:
            assert (row["num_real"], row["num_fake"], row["seed"], row["digest"]) == (12, 14, 0, digest)
            assert row["resize"] and math.isfinite(row["value"])
    for package in ("stylegan-rooted", "python", "torch", "numpy", "scipy", "pillow"):
        assert result["environment"]["versions"][package]
    assert result["run"]["ticks"] == 6 and result["run"]["options"]["loss"]["name"] == "rooted"
    assert "NaN" not in (outdir / "report.json").read_text()


def test_figures_are_the_evaluators(full: tuple[dict[str, Any], Path], place: Path) -> None:
    loaded = generate.open_network(place / "before.pkl", "cpu")
    rows = Evaluator(report.open_data(place / "data", loaded), settings(place), torch.device("cpu"), 0).measure(
        loaded.G
    )
    assert full[0]["metrics_before"] == {row.name: row.value for row in rows}
    assert full[0]["metrics"] != full[0]["metrics_before"] and set(full[0]["metrics"]) == {"fd", "kd"}


def test_embedded_figures_are_never_called_fid(full: tuple[dict[str, Any], Path]) -> None:
    words = page_of(full[1]).words
    assert words.count("FID") == words.count("they are not FID or KID") == 1


def test_too_few_images_are_warned_of(full: tuple[dict[str, Any], Path], place: Path) -> None:
    (line,) = full[0]["warnings"]
    need = feature_net.NUM_FEATURES
    assert "14 generated and 12 real" in line and str(need) in line and f"--num {need + 1}" in line
    assert line in page_of(full[1]).words
    many = report.Evaluation("network", "", "", [], None)
    assert report.warnings_of([many], settings(place)) == []


def test_a_missing_detector_leaves_a_report(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = MetricConfig(detector="inception", detector_file=str(tmp_path / "no.pt"))
    result = report.write(
        tmp_path / "o",
        network=place / "after.pkl",
        data=place / "data",
        metric_config=config,
        device="cpu",
        say=said.append,
    )
    assert result["metrics"] == {} and result["metrics_before"] is None and result["meaning"] is None
    assert "no.pt" in result["evaluations"][0]["problem"] and any("no.pt" in line for line in said)
    page = page_of(tmp_path / "o")
    assert "no.pt" in page.words and page.tags.count("img") == 2
    assert result["run"] is None and "Curves" not in page.text
    assert not (tmp_path / "cache").exists()


def test_no_metrics_wanted(place: Path, tmp_path: Path) -> None:
    result = report.write(
        tmp_path,
        network=place / "after.pkl",
        data=place / "data",
        device="cpu",
        metric_config=MetricConfig(metrics=("none",)),
    )
    assert result["metrics"] == {} and "--metrics none" in result["warnings"][0]


def test_conditional_networks_take_the_labels_of_the_data(place: Path, tmp_path: Path) -> None:
    network = save_network(tmp_path / "c.pkl", 4, c_dim=2)
    with pytest.raises(ValueError, match="no labels"):
        report.write(tmp_path / "o", network=network, data=place / "data", metric_config=settings(place), device="cpu")
    assert not (tmp_path / "o").exists()
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    (data / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.png", i % 2] for i in range(12)]}))
    result = report.write(tmp_path / "o", network=network, data=data, metric_config=settings(place), device="cpu")
    assert result["data"]["label_dim"] == 2 and set(result["metrics"]) == {"fd", "kd"}


def test_data_that_does_not_fit_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    images.save_png(tmp_path / "data" / "a.png", np.zeros([3, 32, 32], np.uint8))
    with pytest.raises(ValueError, match="dataset build"):
        report.write(tmp_path / "o", network=place / "after.pkl", data=tmp_path / "data", metric_config=settings(place))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        report.write(tmp_path / "file", network=place / "after.pkl", data=place / "data", metric_config=settings(place))
    with pytest.raises(ValueError, match="no run folder"):
        report.write(
            tmp_path / "o",
            network=place / "after.pkl",
            data=place / "data",
            metric_config=settings(place),
            run_path=tmp_path,
        )
    assert not (tmp_path / "o").exists()


# --- report.html


def test_page_is_self_contained_and_safe(full: tuple[dict[str, Any], Path]) -> None:
    page = page_of(full[1])
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("href", "srcset", "action"), (tag, name)
        if name == "src":
            assert tag == "img" and value.startswith("data:image/png;base64,")
    assert "url(" not in (full[1] / "report.html").read_text()
    assert NAUGHTY in page.text and page.text.count(NAUGHTY) >= 2  # title and credits, as text
    assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes


def test_page_shows_grids_curves_and_provenance(full: tuple[dict[str, Any], Path]) -> None:
    result, outdir = full
    page = page_of(outdir)
    titles = [grid["title"] for grid in result["grids"]]
    assert titles == [
        "Real",
        "Generated before",
        "Generated after",
        "Start",
        "After 1 kimg",
        "After 2 kimg",
        "After 4 kimg",
    ]
    assert page.tags.count("img") == len(titles)
    assert result["charts"] == ["Losses", "Discriminator scores", "Augmentation strength", "FD", "KD"]
    for text in [
        *titles,
        *result["charts"],
        "floor of G (2)",
        "floor of D (4)",
        result["network"]["sha256"],
        result["data"]["fingerprint"],
        "Credits and licences",
        "rooted, k = 2",
    ]:
        assert text in page.words, text
    for tile in ("FD", "KD"):
        before, after = result["metrics_before"][tile.lower()], result["metrics"][tile.lower()]
        assert f"{number(before)} → {number(after)}" in page.words
        assert f"{abs(100 * (after - before) / before):.1f} % {'lower' if after < before else 'higher'}" in page.words


def test_start_joins_the_curve_only_if_measured_alike(run_folder: Path, full: tuple[dict[str, Any], Path]) -> None:
    run = report.read_run(run_folder)
    assert run is not None
    row = {key: value for key, value in full[0]["evaluations"][0]["results"][0].items() if key != "label"}
    before = report.Evaluation("before", "", "", [report.MetricResult(**row)], None)
    (start,) = report.starting_row([before], "fd", run.metrics["fd"])
    assert (start.kimg, start.value) == (0.0, row["value"])
    other = report.Evaluation("before", "", "", [report.MetricResult(**{**row, "num_fake": 15})], None)
    assert report.starting_row([other], "fd", run.metrics["fd"]) == []
    assert (
        report.starting_row([report.Evaluation("network", "", "", before.results, None)], "fd", run.metrics["fd"]) == []
    )


def test_losses_have_their_floors(run_folder: Path) -> None:
    run = report.read_run(run_folder)
    assert run is not None and run.config is not None
    floor_g, floor_d = report.floors(run)
    assert {y for _, y in floor_g} == {2.0} and {y for _, y in floor_d} == {4.0} and len(floor_g) == 6
    run.config = run.config.replace(loss__k="2:8@4", loss__acts_on="D")
    floor_g, floor_d = report.floors(run)
    assert {y for _, y in floor_g} == {0.0}
    assert floor_d[0][1] == pytest.approx(4, rel=1e-2) and floor_d[-1][1] == pytest.approx(
        16 * 4 ** (-0.79 / 4), rel=1e-6
    )
    run.config = None
    assert report.floors(run) == ([], [])


def test_grids_are_cropped_to_whole_images(run_folder: Path, tmp_path: Path) -> None:
    part, size = report.crop_grid(run_folder / "fakes_init.png", R, (6, 4))
    assert size == (6, 4) and np.array_equal(part[6], tiles(40)[8])
    part, size = report.crop_grid(run_folder / "fakes_init.png", R, (60, 40))
    assert size == (8, 5) and np.array_equal(part, tiles(40))
    with pytest.raises(ValueError, match="no grid"):
        report.crop_grid(run_folder / "fakes_init.png", 24, (6, 4))
    (run_folder / "fakes000003.png").write_bytes(b"torn")
    try:
        run = report.read_run(run_folder)
        assert run is not None
        titles = [p.title for p in report.stage_pictures(run, "elsewhere.pkl", R)]
        assert titles == ["Start", "After 1 kimg", "After 2 kimg", "After 4 kimg", "After 9 kimg"]
    finally:
        (run_folder / "fakes000003.png").unlink()


def test_a_run_shorter_than_1_kimg_still_has_a_last_grid(run_folder: Path, tmp_path: Path) -> None:
    for name in ("training_options.json", "stats.jsonl", "fakes_init.png", "fakes000000.png"):
        shutil.copy(run_folder / name, tmp_path / name)
    run = report.read_run(tmp_path)
    assert run is not None
    titles = [p.title for p in report.stage_pictures(run, "network-snapshot-000000.pkl", R)]
    assert titles == ["Start", "After less than 1 kimg"]


def test_captions_say_what_is_shown(place: Path) -> None:
    loaded = generate.open_network(place / "after.pkl", "cpu")
    (reals,) = report.Pages(report.open_data(place / "data", loaded)).grids
    assert reals.note == "data: all 12, some more than once, drawn at random"
    for augment, wanted in (
        ({"aug": "noaug", "augpipe": "bgc"}, "none"),
        ({"aug": "ada", "augpipe": "bgc", "p": None}, "ada, bgc"),
        ({"aug": "fixed", "augpipe": "bg", "p": 0.2}, "fixed, bg, p = 0.2"),
    ):
        run = {"path": "x", "kimg": None, "options": {"augment": augment}, "started_from": None}
        assert ("augmentation", wanted) in report.run_facts(run)


def test_stages_are_spread_over_the_run() -> None:
    assert report.spaced(range(1, 100), 100) == [20, 40, 60, 80]
    assert report.spaced([1, 2, 3], 4) == [1, 2, 3]
    assert report.spaced([], 0) == []


def test_large_images_are_reduced() -> None:
    shown = report.picture("t", "n", np.zeros([2, 3, 512, 512], np.uint8), (2, 1))
    assert (shown.width, shown.cell) == (256, 128)


def test_run_folder_of_the_family(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "after.pkl", tmp_path / "network-snapshot-000040.pkl")
    (tmp_path / "training_options.json").write_text('{"loss_kwargs": {"r1_gamma": 10}, "total_kimg": 25000}')
    (tmp_path / "stats.jsonl").write_text('{"Loss/G/loss": {"mean": 1.0}, "Progress/kimg": {"mean": 40}}\n[1]\n"x"\n')
    (tmp_path / "metric-fid50k_full.jsonl").write_text(
        '{"results": {"fid50k_full": 12.5}, "snapshot_pkl": "network-snapshot-000040.pkl"}\n{"results": 3}\n7\n'
    )
    run = report.read_run(report.find_run(tmp_path / "network-snapshot-000040.pkl"))
    assert run is not None and run.config is None
    (row,) = run.metrics["fid50k_full"]
    assert (row.kimg, row.value) == (40, 12.5)
    assert [c.title for c in report.draw_charts(run, [report.Evaluation("network", "", "", [], None)])] == [
        "Losses",
        "fid50k_full",
    ]
    assert (
        report.find_run(place / "after.pkl") is None and report.find_run("https://x.y/network-snapshot-1.pkl") is None
    )


def test_page_renders_in_a_browser(full: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    picture = tmp_path / "page.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        "--window-size=900,1400",
        (full[1] / "report.html").as_uri(),
    ]
    try:
        subprocess.run(command, capture_output=True, timeout=100, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("Chromium did not finish in time here")
    if not picture.is_file():
        pytest.skip("Chromium made no screenshot here")
    pixels = images.from_pil(images.to_grey_or_rgb(images.open_image(picture.read_bytes())))
    assert pixels.shape == (3, 1400, 900)
    spread = pixels.max(axis=(0, 2)).astype(int) - pixels.min(axis=(0, 2))
    assert (spread > 60).mean() > 0.4, "most of the page is blank"
    white_noise = pixels[:, 400:].std(axis=0) > 60  # the random real images are the only colourful thing
    assert white_noise.sum() > 5000, "the inline grids are not drawn"


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


def test_gaps_nans_and_single_points() -> None:
    drawn = chart("t", [Series("a", [(0, 1.0), (1, None), (2, math.nan), (3, 2.0), (4, 3.0)])])
    assert drawn is not None and drawn.curves[0].path.count("M") == 2 and len(drawn.curves[0].dots) == 3
    single = chart("t", [Series("a", [(0, 5.0)], spread=[1.0])])
    assert single is not None and single.curves[0].dots[0].y0 is not None and "± 1" in single.curves[0].dots[0].text
    assert chart("t", [Series("a", [(0, None), (1, math.inf)])]) is None


def test_one_spike_does_not_flatten_the_curve() -> None:
    points = [(float(i), 2.0 + 0.01 * i) for i in range(50)] + [(50.0, 5000.0)]
    drawn = chart("t", [Series("a", points)])
    assert drawn is not None and "Logarithmic" in drawn.note
    assert all(drawn.box[1] <= y <= drawn.box[3] for _, y in coordinates(drawn.curves[0].path))


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
        "0",
        "2",
        "140.4",
        "12346",
        "0.0331",
        "1.5e-07",
        "3e+09",
        "-2.5",
    ]
