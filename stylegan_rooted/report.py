"""The report of runs and networks: one structure of facts, written as report.html, report.json and report.md.

Knows run folders, networks, data and how to measure; `report_answer` and `report_curves` say what a run shows,
`report_page` and `report_text` write it down.
"""

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.util import is_url
from metrics.evaluate import MetricResult
from metrics.features import MetricUnavailable
from stylegan_rooted import (
    __version__,
    dataset_check,
    generate,
    report_facts,
    report_page,
    report_pictures,
    report_run,
    report_text,
)
from stylegan_rooted.evaluation import Evaluator
from stylegan_rooted.finetune import check_outdir, resolve_device
from stylegan_rooted.report_pictures import GRID, Album, Picture
from stylegan_rooted.report_run import RunRecord
from training import network_file, run_dir
from training.config import MetricConfig
from training.dataset import DatasetError, ImageDataset, check_fits, grid_indices
from training.measured import BOTH
from training.network_pickle import NetworkFile

FORMAT = "stylegan-rooted report 2"
MEASURE = ("missing", "all", "none")
PACKAGES = ("torch", "numpy", "scipy", "pillow", "jinja2", "clean-fid", "torchvision")
SWEEP = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)
NUM_SWEEP_SEEDS = 4
NUM_SAMPLES = 48  # whose nearest training images are looked for
SLOW_SIDE = 512  # from here on a CPU takes seconds for an image: half as many are made
NUM_NEAREST = 6
MAX_SHEET_IMAGES = 5000  # of a data set that is looked at whole without being asked
MAX_NEAREST_IMAGES = 50_000
READING_ERRORS = (OSError, ValueError, MetricUnavailable)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a report is asked to show beside what the run folders say.

    Attributes:
        data: Folder or zip of real images; None takes the first run's own, where it still is.
        metric_config: Which figures are measured here, with what.
        measure: `missing` measures networks without recorded figures, `all` every one, alike; `none` nothing.
        sheet: Whether to look at every image of the data; None where they are at most `MAX_SHEET_IMAGES`.
        credits: Paragraphs about sources and licences.
        title: Heading; None makes one from the names.
        device: Where to compute.
        seed: Of the measurements.
        flags: Names of the command line's options by field.
    """

    data: str | Path | None = None
    metric_config: MetricConfig = field(default_factory=MetricConfig)
    measure: str = "missing"
    sheet: bool | None = None
    credits: Sequence[str] = ()
    title: str | None = None
    device: str = "auto"
    seed: int = 0
    flags: dict[str, str] = field(default_factory=dict)


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
    looks = [_look_at(path, device, say) for path in subjects]
    if before is not None:
        looks.append(_look_at(before, device, say, role="before"))
    album = Album(len(looks))
    missing: list[str] = []
    data = _open_data(wanted, looks, missing)
    _give_names(looks)
    as_run = _as_recorded(looks, wanted) if before is not None and wanted.measure == "missing" else wanted
    for look in looks:
        _measure(look, data, as_run if look.role == "before" else wanted, say)
    sheet = _data_sheet(data, wanted, album, say) if data is not None else None
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
    look = _Look("subject", str(path), report_run.read_run(path))
    _give_names([look])
    wanted, album = Wanted(measure="none", flags=flags or {}), Album()
    return _report([_facts(look, None, album, wanted, "s0")], None, album, [], wanted, None)


# --- what is looked at


@dataclass
class _Look:
    """A run or network while its facts are gathered."""

    role: str
    path: str
    run: RunRecord | None = None
    opened: NetworkFile | None = None
    loaded: generate.Loaded | None = None
    snapshot: str | None = None
    name: str = ""
    results: list[MetricResult] = field(default_factory=list)
    fingerprint: str | None = None
    missing: list[str] = field(default_factory=list)


def _look_at(path: str | Path, device: torch.device, say: Say, role: str = "subject") -> _Look:
    """Open a run folder with its best or newest snapshot, or a network file with the run it lies in."""
    look = _Look(role, str(path))
    if report_run.is_run(path):
        look.run = report_run.read_run(Path(path))
        _open_chosen(look, look.run, device)
    else:
        _refuse_other_folders(path)
        folder = report_run.find_run(path)
        if folder is not None and role == "subject":
            look.run, look.snapshot = report_run.read_run(folder), Path(path).name
        look.opened = network_file.load(path)
        look.loaded = generate.ready(look.opened, device)
    for note in look.opened.notes if look.opened is not None else ():
        say(f"Note: {look.snapshot or path}: {note}")
    return look


def _open_chosen(look: _Look, run: RunRecord, device: torch.device) -> None:
    """Open the best snapshot of a run that can be opened, if any; the others are named."""
    damaged = None
    while (name := _chosen_snapshot(run)) is not None:
        look.snapshot = name
        try:
            look.opened = network_file.load(run.path / name)
            look.loaded = generate.ready(look.opened, device)
            return
        except (OSError, ValueError) as error:
            look.missing.append(f"{name} cannot be opened ({report_run.one_line(error)}): left out")
            damaged = damaged or name
            run.unreadable.add(name)
    look.opened, look.snapshot = None, damaged
    if damaged is not None:
        look.missing.append("Nothing is generated: no snapshot can be opened")


def _refuse_other_folders(path: str | Path) -> None:
    """A folder that is neither a run's nor a model's; where run folders lie inside, name one.

    Raises:
        ValueError: It is one, or there is nothing of that name.
    """
    if is_url(str(path)):
        return
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file or folder; name a network file or a run folder, e.g. runs/00000-cats")
    if not Path(path).is_dir() or (Path(path) / network_file.FOLDER_WEIGHTS).exists():
        return
    runs = sorted(p for p in Path(path).iterdir() if p.is_dir() and report_run.is_run(p))
    if runs:
        raise ValueError(f"{path} is a folder of {len(runs)} run folders; name one of them, e.g. {runs[-1]}")
    parts = f"{report_run.OPTIONS_FILE} nor {report_run.STATS_FILE} nor snapshots"
    raise ValueError(f"{path} is no run folder: it has neither {parts}; it is no folder of a model, either")


def _chosen_snapshot(run: RunRecord) -> str | None:
    """The best snapshot by the headline figure where it is still there, else the newest; None where none is."""
    _, rows = run.headline()
    there = run.still_there(rows)
    if there:
        return min(there, key=lambda row: row.value).snapshot
    snapshots = run.snapshots
    return snapshots[max(snapshots)].name if snapshots else None


def _give_names(looks: Sequence[_Look]) -> None:
    """Short names that differ: the last part of the path, a number where that is not enough."""
    for look in looks:
        path = look.run.path if look.run is not None and look.snapshot != Path(look.path).name else Path(look.path)
        look.name = path.name or str(path)
    for look in looks:
        same = [other for other in looks if other.name == look.name]
        if len(same) > 1:
            for number, other in enumerate(same, 1):
                other.name = f"{other.name} ({number})"


def _open_data(wanted: Wanted, looks: Sequence[_Look], missing: list[str]) -> ImageDataset | None:
    """The data as the first run saw it.

    Raises:
        ValueError: Data that was named cannot be used, or does not fit a network.
    """
    configs = [look.run.config for look in looks if look.run is not None and look.run.config is not None]
    named = wanted.data is not None
    path = wanted.data if named else next((c.data.path for c in configs if c.data.path), None)
    if path is None:
        missing.append("--data was not given: no data sheet, nothing measured, no nearest training images")
        return None
    networks: list[Any] = [look.loaded.G for look in looks if look.loaded is not None]
    use_labels = any(G.c_dim > 0 for G in networks) if networks else any(c.data.cond for c in configs)
    own = next((c for c in configs if not named or c.data.path == str(path)), None)
    options: dict[str, Any] = {}
    if own is not None:
        options = {"max_size": own.data.subset, "xflip": own.data.mirror, "random_seed": own.runtime.seed}
    try:
        dataset = ImageDataset(path, use_labels=use_labels, **options)
        for look in looks:
            if look.loaded is not None:
                _check_fits(dataset, look.loaded)
    except (DatasetError, OSError) as error:
        if named:
            raise
        missing.append(
            f"The data cannot be read ({report_run.one_line(error)}): no data sheet, nothing measured; give --data"
        )
        return None
    return dataset


def _check_fits(dataset: ImageDataset, loaded: generate.Loaded) -> None:
    G: Any = loaded.G
    check_fits(
        resolution=dataset.resolution,
        num_channels=dataset.num_channels,
        label_dim=dataset.label_dim,
        want_resolution=G.img_resolution,
        want_channels=G.img_channels,
        want_label_dim=G.c_dim,
        data=dataset.path,
        network=loaded.path,
    )


def _as_recorded(looks: Sequence[_Look], wanted: Wanted) -> Wanted:
    """How the first run measured its figures, so that a network from before it is measured alike."""
    run, snapshot = looks[0].run, looks[0].snapshot
    recorded = run.figures_of(snapshot) if run is not None and snapshot is not None else {}
    provenance = next((recorded[name].provenance for name in BOTH if name in recorded), {})
    num, seed = provenance.get("num_fake"), provenance.get("seed")
    if run is None or run.config is None or not isinstance(num, int) or not isinstance(seed, int):
        return wanted
    default = MetricConfig()
    given = {f.name: getattr(wanted.metric_config, f.name) for f in dataclasses.fields(default)}
    given = {name: value for name, value in given.items() if value != getattr(default, name)} | {"num": num}
    config = dataclasses.replace(run.config.metric, **given)
    if config.detector_file is not None and not Path(config.detector_file).is_file():
        return wanted
    return dataclasses.replace(wanted, metric_config=config, seed=seed)


def _measure(look: _Look, data: ImageDataset | None, wanted: Wanted, say: Say) -> None:
    """Measure a network where that is wanted; a missing detector ends in a line, nothing worse."""
    config = wanted.metric_config
    recorded = look.run.figures_of(look.snapshot) if look.run is not None and look.snapshot else {}
    if wanted.measure == "none" or config.metrics == ("none",) or (wanted.measure == "missing" and recorded):
        return
    if look.loaded is None or data is None:
        return
    say(f"Measuring {look.loaded.path}: {config.num} generated against {data.num_source_images} real images")
    evaluator = Evaluator(data, config, look.loaded.device, wanted.seed)
    look.results, problem = evaluator.evaluate(look.loaded.G)
    look.fingerprint = evaluator.fingerprint
    for row in look.results:
        say(f"{row.text}  ({row.num_fake} generated against {row.num_real} real images; {row.extractor})")
    if problem:
        say(f"Metrics left out: {problem}")
        look.missing.append(f"No figures: {problem}")


# --- facts


def _facts(look: _Look, data: ImageDataset | None, album: Album, wanted: Wanted, prefix: str) -> dict[str, Any]:
    """Facts of one subject, its pictures put into the album under names with that prefix."""
    run, missing = look.run, [*(look.run.missing if look.run is not None else []), *look.missing]
    stages = (
        report_pictures.stages(album, run.path, _resolution(look, data), prefix, missing) if run is not None else []
    )
    pictures: dict[str, Any] = {"reals": None, "samples": None, "sweep": None, "nearest": None}
    if look.loaded is not None:
        pictures |= _generated(look, data, album, prefix, missing, wanted)
    if run is not None and pictures["reals"] is None and (run.path / "reals.png").exists():
        reals, alt = run.path / "reals.png", "Real images, from the run's reals.png"
        name = f"{prefix}-reals"
        try:
            pictures["reals"] = report_pictures.add_file(album, name, reals, _resolution(look, data), alt)
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
        "trained_on_data": _trained_on(run, data) if run is not None and data is not None else None,
        "figures": report_facts.figures(look.results, run, look.snapshot, look.fingerprint),
        "run": report_facts.run_facts(run, wanted.flags) if run is not None else None,
        "stages": stages,
        "pictures": pictures,
        "missing": missing,
    }


def _resolution(look: _Look, data: ImageDataset | None) -> int | None:
    if look.loaded is not None:
        return int(look.loaded.G.img_resolution)  # type: ignore[arg-type]
    recorded = [look.run.environment.get("data"), look.run.options.get("training_set_kwargs")] if look.run else []
    for record in recorded:
        if isinstance(record, dict) and isinstance(record.get("resolution"), int) and record["resolution"] > 0:
            return record["resolution"]
    return data.resolution if data is not None else None


def _trained_on(run: RunRecord, data: ImageDataset) -> bool | None:
    """Whether a run saw this very data, by fingerprint; None where it recorded none."""
    recorded = run.environment.get("data")
    if run.config is None or not isinstance(recorded, dict) or not recorded.get("fingerprint"):
        return None
    if recorded.get("num_images") not in (None, data.num_source_images):
        return False
    choice = run.config.data
    seen = ImageDataset(
        data.path,
        use_labels=choice.cond,
        max_size=choice.subset,
        xflip=choice.mirror,
        random_seed=run.config.runtime.seed,
        cache=False,
    )
    alike = np.array_equal(seen.raw_indices, data.raw_indices) and np.array_equal(seen.flips, data.flips)
    fingerprint = data.fingerprint() if alike and seen.has_labels == data.has_labels else seen.fingerprint()
    return fingerprint == recorded["fingerprint"]


def _generated(
    look: _Look, data: ImageDataset | None, album: Album, prefix: str, missing: list[str], wanted: Wanted
) -> dict[str, Any]:
    """Samples, truncation sweep and nearest training images of a network: names of pictures and numbers."""
    assert look.loaded is not None
    size, labels = GRID, torch.zeros([GRID[0] * GRID[1], int(look.loaded.G.c_dim)])  # type: ignore[arg-type]
    if labels.shape[1]:
        labels[torch.arange(len(labels)), torch.arange(len(labels)) % labels.shape[1]] = 1
    found: dict[str, Any] = {}
    if data is not None:
        size, indices = grid_indices(data, GRID)
        reals, labels = data.batch(indices)
        order = "one class a row" if data.label_dim else "drawn at random"
        alt = f"{len(indices)} real images of {data.name}, {order}"
        found["reals"] = album.add(f"{prefix}-reals", reals, size, alt)
    try:
        num = NUM_SAMPLES // 2 if _is_slow(look.loaded) else NUM_SAMPLES
        tiles = [_render(look.loaded, seed, labels) for seed in range(max(size[0] * size[1], num))]
        alt = f"Images generated by {look.name}: seeds 0 to {size[0] * size[1] - 1}, no truncation"
        found["samples"] = album.add(f"{prefix}-samples", torch.stack(tiles[: size[0] * size[1]]), size, alt)
        found["sweep"] = _sweep(look, labels, album, prefix)
    except ValueError as error:
        missing.append(f"{look.snapshot or look.path}: {report_run.one_line(error)}")
        return found
    if data is not None:
        try:
            found["nearest"] = _nearest(look, torch.stack(tiles[:num]), data, album, prefix, wanted)
        except READING_ERRORS as error:
            missing.append(f"No nearest training images: {report_run.one_line(error)}")
    return found


def _is_slow(loaded: generate.Loaded) -> bool:
    return loaded.device.type == "cpu" and int(loaded.G.img_resolution) >= SLOW_SIDE  # type: ignore[arg-type]


def _render(loaded: generate.Loaded, seed: int, labels: torch.Tensor, trunc: float = 1.0) -> torch.Tensor:
    index = seed % len(labels)
    return generate.render(loaded, seed, labels[index : index + 1], trunc=trunc)


def _sweep(look: _Look, labels: torch.Tensor, album: Album, prefix: str) -> dict[str, Any]:
    """A few seeds, a row each, at every truncation of `SWEEP`."""
    assert look.loaded is not None
    num_seeds = NUM_SWEEP_SEEDS // 2 if _is_slow(look.loaded) else NUM_SWEEP_SEEDS
    rows = [_render(look.loaded, seed, labels, psi) for seed in range(num_seeds) for psi in SWEEP]
    alt = f"Seeds 0 to {num_seeds - 1}, a row each, at truncation {', '.join(f'{psi:g}' for psi in SWEEP)}"
    name = album.add(f"{prefix}-sweep", torch.stack(rows), (len(SWEEP), num_seeds), alt)
    return {"psi": list(SWEEP), "num_seeds": num_seeds, "picture": name}


def _nearest(
    look: _Look, samples: torch.Tensor, data: ImageDataset, album: Album, prefix: str, wanted: Wanted
) -> dict[str, Any]:
    """The samples that come closest to a training image, above that image, with the distance."""
    assert look.loaded is not None
    evaluator = Evaluator(data, wanted.metric_config, look.loaded.device, wanted.seed)
    found = evaluator.nearest(samples, most=MAX_NEAREST_IMAGES)
    usual = float(np.median(found.distances)) / max(found.median_ratio, 1e-12)  # between training images
    order = np.argsort(found.distances, kind="stable")[:NUM_NEAREST]
    pairs = [
        {
            "seed": int(i),
            "index": int(found.nearest[i]),
            "file": data.file_name(int(found.nearest[i])),
            "mirrored": bool(data.flips[int(found.nearest[i])]),
            "distance": float(found.distances[i]),
            "relative": float(found.distances[i]) / usual if usual else None,
        }
        for i in order
    ]
    below = torch.stack([torch.from_numpy(data[int(found.nearest[i])][0]) for i in order])
    alt = "Above: the generated images closest to training images. Below: the training image nearest to each"
    tiles = torch.cat([samples[torch.from_numpy(order.copy())], below])
    return {
        "pairs": pairs,
        "num_samples": len(samples),
        "num_train": min(len(data), MAX_NEAREST_IMAGES),
        "median_relative": found.median_ratio,
        "detector": wanted.metric_config.detector,
        "picture": album.add(f"{prefix}-nearest", tiles, (len(pairs), 2), alt),
    }


def _data_sheet(data: ImageDataset, wanted: Wanted, album: Album, say: Say) -> dict[str, Any]:
    """What the data is, and what `dataset check` finds in it."""
    say(f"Reading the {data.num_source_images} images of {data.path}")
    size, indices = grid_indices(data, GRID)
    order = "one class a row" if data.label_dim else "drawn at random"
    alt = f"{len(indices)} images of {data.name}, {order}"
    sheet = {
        "path": data.path,
        "name": data.name,
        "num_images": data.num_source_images,
        "num_shown": len(data),
        "mirrored": bool(data.flips.any()),
        "resolution": data.resolution,
        "num_channels": data.num_channels,
        "label_dim": data.label_dim,
        "fingerprint": data.fingerprint(),
        "picture": album.add("data", data.batch(indices)[0], size, alt),
        "check": None,
    }
    if wanted.sheet or (wanted.sheet is None and data.num_source_images <= MAX_SHEET_IMAGES):
        found = dataset_check.check(data.path)
        sheet["check"] = {
            **{key: getattr(found, key) for key in ("num_files", "sizes", "modes", "classes", "mirror")},
            "findings": [
                {"code": f.code, "severity": f.severity, "title": f.title, "advice": f.advice, "num": len(f.files)}
                for f in found.findings
            ],
        }
    return sheet


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
