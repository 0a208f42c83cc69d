"""What a report looks at: runs and networks that are opened, the data they saw, figures that are measured for them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.util import is_url
from metrics.evaluate import MetricResult
from stylegan_rooted import generate, report_run
from stylegan_rooted.evaluation import Evaluator
from stylegan_rooted.report_run import RunRecord
from training import network_file
from training.config import MetricConfig
from training.dataset import DatasetError, ImageDataset
from training.measured import BOTH
from training.network_pickle import NetworkFile

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


@dataclass
class Look:
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


def look_at(path: str | Path, device: torch.device, say: Say, role: str = "subject") -> Look:
    """Open a run folder with its best or newest snapshot, or a network file with the run it lies in."""
    look = Look(role, str(path))
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


def _open_chosen(look: Look, run: RunRecord, device: torch.device) -> None:
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


def give_names(looks: Sequence[Look]) -> None:
    """Short names that differ: the last part of the path, a number where that is not enough."""
    for look in looks:
        path = look.run.path if look.run is not None and look.snapshot != Path(look.path).name else Path(look.path)
        look.name = path.name or str(path)
    for look in looks:
        same = [other for other in looks if other.name == look.name]
        if len(same) > 1:
            for number, other in enumerate(same, 1):
                other.name = f"{other.name} ({number})"


def open_data(wanted: Wanted, looks: Sequence[Look], missing: list[str]) -> ImageDataset | None:
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
                generate.check_data(look.loaded, dataset)
    except (DatasetError, OSError) as error:
        if named:
            raise
        missing.append(
            f"The data cannot be read ({report_run.one_line(error)}): no data sheet, nothing measured; give --data"
        )
        return None
    return dataset


def as_recorded(looks: Sequence[Look], wanted: Wanted) -> Wanted:
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


def measure(look: Look, data: ImageDataset | None, wanted: Wanted, say: Say) -> None:
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


def resolution(look: Look, data: ImageDataset | None) -> int | None:
    if look.loaded is not None:
        return int(look.loaded.G.img_resolution)  # type: ignore[arg-type]
    recorded = [look.run.environment.get("data"), look.run.options.get("training_set_kwargs")] if look.run else []
    for record in recorded:
        if isinstance(record, dict) and isinstance(record.get("resolution"), int) and record["resolution"] > 0:
            return record["resolution"]
    return data.resolution if data is not None else None


def trained_on(run: RunRecord, data: ImageDataset) -> bool | None:
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
