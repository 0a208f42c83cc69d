"""The report of runs and networks: one structure of facts, written as report.html, report.json and report.md.

`report_subjects` opens what is looked at, `report_samples` makes pictures of it, `report_answer` and `report_curves`
say what a run shows, `report_page` and `report_text` write it down.
"""

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stylegan_rooted import (
    __version__,
    report_facts,
    report_page,
    report_pictures,
    report_run,
    report_text,
)
from stylegan_rooted.finetune import check_outdir, resolve_device
from stylegan_rooted.report_pictures import Album, Picture
from stylegan_rooted.report_samples import READING_ERRORS, data_sheet, generated
from stylegan_rooted.report_subjects import (
    Look,
    Say,
    Wanted,
    as_recorded,
    give_names,
    look_at,
    measure,
    open_data,
    resolution,
    trained_on,
)
from training import run_dir
from training.dataset import ImageDataset

FORMAT = "stylegan-rooted report 2"
MEASURE = ("missing", "all", "none")
PACKAGES = ("torch", "numpy", "scipy", "pillow", "jinja2", "clean-fid", "torchvision")


@dataclass(frozen=True)
class Report:
    """Everything that is written: facts of plain values, and the pictures they name."""

    facts: dict[str, Any]
    pictures: dict[str, Picture]


def write(
    outdir: str | Path,
    subjects: Sequence[str | Path],
    wanted: Wanted | None = None,
    *,
    before: str | Path | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Look at runs and networks, write report.html, report.json and report.md into a folder.

    Args:
        outdir: Folder for the files; may be the run folder itself.
        subjects: Run folders and network files (paths or URLs), the most important first.
        wanted: See there.
        before: Network that training started from; measured in the same way and shown beside the others.
        say: Receives lines for people.

    Returns:
        The object in report.json.

    Raises:
        ValueError, OSError: Something the user can mend. Missing or damaged parts of a run, or a missing detector,
            are none: the report names them.
    """
    check_outdir(str(outdir))
    report = compose(subjects, wanted or Wanted(), before=before, say=say or (lambda text: None))
    Path(outdir).mkdir(parents=True, exist_ok=True)
    run_dir.write_json(Path(outdir) / "report.json", report.facts)
    for name, text in (("report.md", report_text.render(report.facts)), ("report.html", page(report))):
        run_dir.write_atomic(Path(outdir) / name, text.encode("utf-8", "replace"))
    return report.facts


def page(report: Report, *, refresh_sec: int | None = None) -> str:
    """The report as one HTML file; with `refresh_sec` it asks its server for news."""
    return report_page.render(report.facts, report.pictures, refresh_sec=refresh_sec)


def compose(
    subjects: Sequence[str | Path], wanted: Wanted, *, before: str | Path | None = None, say: Say = lambda text: None
) -> Report:
    """Gather the facts and pictures of runs and networks; arguments and errors as in `write`."""
    if wanted.measure not in MEASURE:
        raise ValueError(f"measure is {wanted.measure!r}; one of {', '.join(MEASURE)}")
    if not subjects:
        raise ValueError("name a run folder or a network file")
    device = resolve_device(wanted.device)
    looks = [look_at(path, device, say) for path in subjects]
    if before is not None:
        looks.append(look_at(before, device, say, role="before"))
    album = Album(len(looks))
    missing: list[str] = []
    data = open_data(wanted, looks, missing)
    give_names(looks)
    as_run = as_recorded(looks, wanted) if before is not None and wanted.measure == "missing" else wanted
    for look in looks:
        measure(look, data, as_run if look.role == "before" else wanted, say)
    sheet = data_sheet(data, wanted, album, say) if data is not None else None
    facts = []
    for i, look in enumerate(looks):
        if look.loaded is not None:
            say(f"Generating with {look.loaded.path}")
        facts.append(_facts(look, data, album, wanted, f"s{i}"))
    return _report(facts, sheet, album, missing, wanted, device)


def compose_from_files(path: Path, *, flags: dict[str, str] | None = None) -> Report:
    """The report of a run from the small files in its folder alone: nothing is measured, generated or read elsewhere.

    Raises:
        ValueError: Not a run folder.
    """
    look = Look("subject", str(path), report_run.read_run(path))
    give_names([look])
    wanted, album = Wanted(measure="none", flags=flags or {}), Album()
    return _report([_facts(look, None, album, wanted, "s0")], None, album, [], wanted, None)


def _facts(look: Look, data: ImageDataset | None, album: Album, wanted: Wanted, prefix: str) -> dict[str, Any]:
    """Facts of one subject, its pictures put into the album under names with that prefix."""
    run, missing = look.run, [*(look.run.missing if look.run is not None else []), *look.missing]
    stages = report_pictures.stages(album, run.path, resolution(look, data), prefix, missing) if run is not None else []
    pictures: dict[str, Any] = {"reals": None, "samples": None, "sweep": None, "nearest": None}
    if look.loaded is not None:
        pictures |= generated(look, data, album, prefix, missing, wanted)
    if run is not None and pictures["reals"] is None and (run.path / "reals.png").exists():
        reals, alt = run.path / "reals.png", "Real images, from the run's reals.png"
        name = f"{prefix}-reals"
        try:
            pictures["reals"] = report_pictures.add_file(album, name, reals, resolution(look, data), alt)
        except READING_ERRORS as error:
            missing.append(f"{reals.name}: {report_run.one_line(error)}")
    return {
        "name": look.name,
        "role": look.role,
        "path": look.path,
        "kind": "run" if run is not None else "network",
        "snapshot": look.snapshot,
        "network": report_facts.network(look.loaded) if look.loaded is not None else None,
        "origin": report_facts.origin_of(look.opened, run),
        "trained_on_data": trained_on(run, data) if run is not None and data is not None else None,
        "figures": report_facts.figures(look.results, run, look.snapshot, look.fingerprint),
        "run": report_facts.run_facts(run, wanted.flags) if run is not None else None,
        "stages": stages,
        "pictures": pictures,
        "missing": missing,
    }


def _report(
    subjects: list[dict[str, Any]],
    sheet: dict[str, Any] | None,
    album: Album,
    missing: list[str],
    wanted: Wanted,
    device: torch.device | None,
) -> Report:
    """Put the facts of all subjects together."""
    if album.num_left_out:
        limit = report_pictures.BUDGET_BYTES >> 20
        missing.append(f"{album.num_left_out} pictures left out: the page's limit of {limit} MiB is reached")
    first, before = subjects[0], next((s for s in subjects if s["role"] == "before"), None)
    facts = {
        "format": FORMAT,
        "title": wanted.title or _title(subjects, sheet),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "metrics": {row["name"]: row["value"] for row in first["figures"]},
        "metrics_before": report_facts.before_values(first["figures"], before["figures"]) if before else None,
        "meaning": report_facts.meaning([row for s in subjects for row in s["figures"]]),
        "warnings": report_facts.warnings(subjects, sheet),
        "missing": missing,
        "subjects": subjects,
        "compare": report_facts.compare(subjects, wanted.flags) if len(subjects) > 1 else None,
        "data": sheet,
        "seed": wanted.seed,
        "settings": dataclasses.asdict(wanted.metric_config),
        "credits": list(wanted.credits),
        "environment": _environment(device),
        "pictures": {name: picture.as_dict() for name, picture in album.pictures.items()},
        "pictures_limit_bytes": report_pictures.BUDGET_BYTES,
    }
    return Report(run_dir.plain(facts), dict(album.pictures))


def _title(subjects: Sequence[dict[str, Any]], sheet: dict[str, Any] | None) -> str:
    names = [s["name"] for s in subjects if s["role"] == "subject"]
    against = f" against {sheet['name']}" if sheet is not None and subjects[0]["kind"] == "network" else ""
    return f"{names[0]}{against}" if len(names) == 1 else f"{len(names)} compared"


def _environment(device: torch.device | None) -> dict[str, Any]:
    """Machine, device and versions of the report itself."""
    versions = {"stylegan-rooted": __version__, "python": platform.python_version(), **dict(_versions())}
    return {**run_dir.environment(device or "cpu"), "versions": versions}


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)
