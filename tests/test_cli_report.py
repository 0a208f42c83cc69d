"""`stylegan-rooted report`: machines read stdout, people read stderr; wrong use is one line."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from report_runs import make_run

from stylegan_rooted.cli import main
from torch_utils import images


@pytest.fixture(scope="module")
def place(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional snapshot with three classes of 8x8 images, and six labelled images."""
    place = tmp_path_factory.mktemp("cli_report")
    (place / "net.pkl").write_bytes(gzip.decompress((data_dir / "pickles" / "snapshot_b.pkl.gz").read_bytes()))
    (place / "data").mkdir()
    for i, image in enumerate(np.random.RandomState(0).randint(0, 256, [6, 3, 8, 8], dtype=np.uint8)):
        images.save_png(place / "data" / f"{i}.png", image)
    (place / "data" / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.png", i % 3] for i in range(6)]}))
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEGAN_ROOTED_CACHE", str(tmp_path / "cache"))


def arguments(place: Path, outdir: Path, **changes: str) -> list[str]:
    options = {"network": str(place / "net.pkl"), "data": str(place / "data"), "outdir": str(outdir), **changes}
    network = options.pop("network")
    return ["report", network, *(text for name, value in options.items() for text in (f"--{name}", value))]


def fail(capsys: pytest.CaptureFixture, code: int, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == code and out == "" and err.startswith("Error: ") and err.count("\n") == 1, err
    return err


def test_json_on_stdout_and_words_on_stderr(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    credits = ["--credit", "From A", "--credit", "From B"]
    main([*arguments(place, tmp_path / "o", num="8", seed="3", title="Mine"), "--json", *credits])
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert printed == json.loads((tmp_path / "o" / "report.json").read_text())
    assert printed["title"] == "Mine" and printed["seed"] == 3 and printed["settings"]["num"] == 8
    assert {row["provenance"]["num_fake"] for row in printed["subjects"][0]["figures"]} == {8}
    assert set(printed["metrics"]) == {"fd", "kd"} and printed["credits"] == ["From A", "From B"]
    assert "Measuring" in err and "FD " in err and str(tmp_path / "o" / "report.html") in err


def test_without_json_stdout_stays_empty(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(arguments(place, tmp_path / "o", metrics="none"))
    assert capsys.readouterr().out == ""
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["report.html", "report.json", "report.md"]


def test_a_run_needs_nothing_else(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "00000-run")
    main(["report", str(run)])
    err = capsys.readouterr().err
    assert "00000-run: Yes: FD went from" in err and "When to stop: It ended early" in err
    facts = json.loads((run / "report" / "report.json").read_text())
    assert {"--gamma", "--resume", "--kimg"} <= {o["name"] for o in facts["subjects"][0]["run"]["options"]}
    assert "Measuring" not in err and facts["subjects"][0]["figures"][0]["source"] == "recorded by the run"


def test_a_missing_detector_is_no_failure(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(arguments(place, tmp_path / "o", detector="inception", **{"detector-file": str(tmp_path / "no.pt")}))
    assert "Metrics left out" in capsys.readouterr().err
    assert (tmp_path / "o" / "report.json").is_file()


def test_wrong_use(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "o"
    assert "RUN_DIR|NETWORK" in fail(capsys, 2, ["report", "--outdir", str(out)])
    for change in (
        {"num": "1"},
        {"metrics": "fid,lpips"},
        {"metrics": "none,fid"},
        {"detector": "vgg"},
        {"seed": "-1"},
        {"device": "tpu"},
        {"sheet": "some"},
    ):
        (name,) = change
        assert f"--{name}" in fail(capsys, 2, arguments(place, out, **change))
    assert "no such file or folder" in fail(capsys, 1, arguments(place, out, network=str(tmp_path / "no.pkl")))
    assert "no such folder" in fail(capsys, 1, arguments(place, out, data=str(tmp_path / "no")))
    (tmp_path / "empty").mkdir()
    assert "no image" in fail(capsys, 1, arguments(place, out, data=str(tmp_path / "empty")))
    assert "is a file" in fail(capsys, 1, arguments(place, place / "net.pkl"))
    assert not out.exists()


def test_help_shows_defaults(capsys: pytest.CaptureFixture) -> None:
    main(["report", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("[default: 1000]", "[default: embedded]", "[default: fid,kid]", "[default: 0;", "--json", "--before"):
        assert words in text
