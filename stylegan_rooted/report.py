"""The report of a network against data: report.json with provenance and one self-contained report.html.

Knows evaluation, the generator and the run folder; draws nothing itself (`report_charts` lays out, the template draws).
The page holds no script and fetches nothing; every string in it is escaped.
"""

import base64
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import math
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from dnnlib.util import is_url
from metrics.evaluate import MetricResult
from metrics.features import EmbeddedExtractor, InceptionExtractor
from stylegan_rooted import __version__, generate, losses
from stylegan_rooted.evaluation import ASSETS, Evaluator
from stylegan_rooted.finetune import check_outdir, loss_options, resolve_device
from stylegan_rooted.report_charts import Chart, Point, Series, chart, number
from torch_utils import images
from training import run_dir
from training.config import FinetuneConfig, MetricConfig
from training.dataset import ImageDataset, check_fits, grid_indices

FORMAT = "stylegan-rooted report 1"
TEMPLATE = "report.html.jinja"
PACKAGES = ("torch", "numpy", "scipy", "pillow", "jinja2", "clean-fid", "torchvision")
GRID = (6, 5)
STAGE_GRID = (6, 4)
MAX_DURING = 4
MAX_CELL_PX = 128  # larger images are shown reduced, so that the page stays a few megabytes
NUM_FEATURES = {"embedded": EmbeddedExtractor.num_features, "inception": InceptionExtractor.num_features}
MEANING = {
    "embedded": (
        "FD and KD are distances between what a small feature network, shipped with this software, sees in real and in "
        "generated images: they rank snapshots measured in the same way, they are not FID or KID, and compare with "
        "nobody else's figures."
    ),
    "inception": (
        "FID and KID are distances between Inception-v3 features of real and generated images: they compare with other "
        "figures only where data, number of images and resizing are the same."
    ),
}

Say = Callable[[str], None]


def write(
    outdir: str | Path,
    *,
    network: str | Path,
    data: str | Path,
    metric_config: MetricConfig,
    before: str | Path | None = None,
    run_path: str | Path | None = None,
    credits: Sequence[str] = (),
    title: str | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    say: Say | None = None,
) -> dict[str, Any]:
    """Measure a network against data, write `outdir/report.json` and `outdir/report.html`.

    Args:
        outdir: Folder for the two files; may be the run folder itself.
        network: Pickle to report on (path or URL).
        data: Folder or zip of real images that fits the network.
        metric_config: Detector, figures and number of generated images.
        before: Pickle that training started from; measured in the same way, so that the report shows before and after.
        run_path: Run folder for grids and curves; None takes the pickle's own folder if it is one.
        credits: Paragraphs about sources and licences of data.
        title: Heading; None makes one from the names.
        device: Where to compute.
        seed: Seed of the evaluation.
        say: Receives lines for people.

    Returns:
        The object in report.json.

    Raises:
        ValueError, OSError: Something the user can mend. A missing detector is none: the report says why it has no
            figures.
    """
    say = say or (lambda text: None)
    check_outdir(str(outdir))
    device = resolve_device(str(device))
    run = read_run(Path(run_path) if run_path is not None else find_run(network))
    final = generate.open_network(network, device, say=say)
    dataset = open_data(data, final)
    if run:
        run.stages = stage_pictures(run, str(network), dataset.resolution)
    pages = Pages(dataset)
    evaluator = Evaluator(dataset, metric_config, device, seed)
    evaluations = []
    if before is not None:
        start = generate.open_network(before, device)
        open_data(data, start)
        evaluations.append(evaluate("before", start, evaluator, say))
        pages.add("Generated before", f"{Path(start.path).name}; seeds 0 to {pages.num - 1}, no truncation", start)
        del start
    evaluations.append(evaluate("network", final, evaluator, say))
    pages.add(
        "Generated after" if before is not None else "Generated",
        f"{Path(final.path).name}; seeds 0 to {pages.num - 1}, no truncation",
        final,
    )
    charts = draw_charts(run, evaluations) if run else []
    report: dict[str, Any] = {
        "format": FORMAT,
        "title": title or f"{Path(final.path).stem} against {dataset.name}",
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "metrics": flat(evaluations[-1]),
        "metrics_before": flat(evaluations[0]) if before is not None else None,
        "evaluations": [e.as_dict() for e in evaluations],
        "meaning": MEANING.get(metric_config.detector) if any(e.results for e in evaluations) else None,
        "warnings": [f"{Path(final.path).name}: {note}." for note in final.notes]
        + warnings_of(evaluations, metric_config),
        "seed": seed,
        "settings": dataclasses.asdict(metric_config),
        "network": network_facts(final),
        "data": {
            "path": str(data),
            "name": dataset.name,
            "num_images": len(dataset),
            "resolution": dataset.resolution,
            "num_channels": dataset.num_channels,
            "label_dim": dataset.label_dim,
            "fingerprint": dataset.fingerprint(),
        },
        "run": run.as_dict() if run else None,
        "grids": [{"title": g.title, "note": g.note} for g in [*pages.grids, *(run.stages if run else [])]],
        "charts": [c.title for c in charts],
        "credits": list(credits),
        "environment": environment(device),
    }
    report = run_dir.plain(report)
    html = render(report, grids=pages.grids, run=run, charts=charts)
    Path(outdir).mkdir(parents=True, exist_ok=True)
    run_dir.write_json(Path(outdir) / "report.json", report)
    run_dir.write_atomic(Path(outdir) / "report.html", html.encode("utf-8", "replace"))
    return report


# --- what is measured


@dataclass(frozen=True)
class Evaluation:
    """The figures of one network, or one line that says why there are none."""

    role: str
    path: str
    sha256: str
    results: list[MetricResult]
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "results": [{**row.as_dict(), "label": row.label} for row in self.results]}


def open_data(data: str | Path, loaded: generate.Loaded) -> ImageDataset:
    """The data set as the metrics see it, refused where it does not fit the network."""
    G: Any = loaded.G
    dataset = ImageDataset(data, use_labels=G.c_dim > 0)
    check_fits(
        resolution=dataset.resolution,
        num_channels=dataset.num_channels,
        label_dim=dataset.label_dim,
        want_resolution=G.img_resolution,
        want_channels=G.img_channels,
        want_label_dim=G.c_dim,
        data=data,
        network=loaded.path,
    )
    return dataset


def evaluate(role: str, loaded: generate.Loaded, evaluator: Evaluator, say: Say) -> Evaluation:
    """Measure one network; a missing detector ends in `problem`, nothing worse."""
    config = evaluator.config
    if config.metrics == ("none",):
        return Evaluation(role, loaded.path, loaded.sha256, [], "nothing was measured (--metrics none)")
    say(f"Measuring {loaded.path}: {config.num} generated against {len(evaluator.dataset)} real images")
    results, problem = evaluator.evaluate(loaded.G)
    for row in results:
        spread = f" ± {row.spread:.2g}" if row.spread is not None else ""
        say(f"{row.label} {row.value:.4g}{spread}  ({row.extractor})")
    if problem:
        say(f"Metrics left out: {problem}")
    return Evaluation(role, loaded.path, loaded.sha256, results, problem)


def flat(evaluation: Evaluation) -> dict[str, float]:
    """Name of figure -> value."""
    return {row.name: row.value for row in evaluation.results}


def warnings_of(evaluations: Sequence[Evaluation], config: MetricConfig) -> list[str]:
    """What a reader must know before believing the figures."""
    lines = list(dict.fromkeys(f"No figures: {e.problem}" for e in evaluations if e.problem))
    rows = [row for row in evaluations[-1].results if row.name in ("fd", "fid")]
    for row in rows:
        need = NUM_FEATURES.get(config.detector, 0)
        few = [
            f"{count} {what}" for count, what in ((row.num_fake, "generated"), (row.num_real, "real")) if count <= need
        ]
        if few:
            remedy = f"use --num {need + 1} or more" if row.num_fake <= need else "more real images would help"
            lines.append(
                f"{row.label} was estimated from {' and '.join(few)} images with {need} features: its covariance is "
                f"rank-deficient and the figure biased upwards; {remedy}, and rely on "
                f"{'KD' if row.name == 'fd' else 'KID'}, which has no such bias."
            )
    return lines


def network_facts(loaded: generate.Loaded) -> dict[str, Any]:
    """What the network is: where from, digest, sizes."""
    G: Any = loaded.G
    return {
        "path": loaded.path,
        "sha256": loaded.sha256,
        "kind": loaded.kind,
        "notes": list(loaded.notes),
        "resolution": G.img_resolution,
        "num_channels": G.img_channels,
        "z_dim": G.z_dim,
        "w_dim": G.w_dim,
        "c_dim": G.c_dim,
        "num_ws": G.num_ws,
        "num_parameters": sum(p.numel() for p in G.parameters()),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, device and versions."""
    versions = {"stylegan-rooted": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {**run_dir.environment(device), "versions": versions}


# --- pictures


@dataclass(frozen=True)
class Picture:
    """An inline PNG with its caption; `width` is its own in pixels, `cell` that of one image."""

    title: str
    note: str
    uri: str
    width: int
    cell: int


class Pages:
    """The grids of reals and of what networks make from equal seeds and labels."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.size, indices = grid_indices(dataset, GRID)
        self.num = len(indices)
        reals, self.labels = dataset.batch(indices)
        order = "one class a row" if dataset.label_dim else "drawn at random"
        share = f"{self.num} of {len(dataset)}" if self.num < len(dataset) else f"all {len(dataset)}"
        again = ", some more than once" if self.num > len(dataset) else ""
        self.grids = [picture("Real", f"{dataset.name}: {share}{again}, {order}", reals, self.size)]

    def add(self, title: str, note: str, loaded: generate.Loaded) -> None:
        """Render a network's grid."""
        tiles = [generate.render(loaded, seed, self.labels[seed : seed + 1]) for seed in range(self.num)]
        self.grids.append(picture(title, note, torch.stack(tiles), self.size))


def picture(title: str, note: str, tiles: torch.Tensor | np.ndarray, size: tuple[int, int]) -> Picture:
    """Tile uint8 images [cols * rows, C, H, W], reduced to at most `MAX_CELL_PX` a side, as an inline PNG."""
    image = images.draw_grid(tiles, size)
    cell = int(tiles.shape[-1])
    factor = math.ceil(cell / MAX_CELL_PX)
    if factor > 1:
        image = image.reduce(factor)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(title, note, uri, image.width, cell // factor)


def crop_grid(path: Path, resolution: int, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """The upper left images [N, C, R, R] of a grid file, and how many (columns, rows) that are.

    Raises:
        ValueError: Not an image, or not a grid of that resolution.
    """
    array = images.from_pil(images.to_grey_or_rgb(images.open_image(path.read_bytes())))
    channels, height, width = array.shape
    if height % resolution or width % resolution:
        raise ValueError(f"{path.name} is {width}x{height}, no grid of {resolution}x{resolution} images")
    cols, rows = min(size[0], width // resolution), min(size[1], height // resolution)
    part = array[:, : rows * resolution, : cols * resolution].reshape(channels, rows, resolution, cols, resolution)
    return part.transpose(1, 3, 0, 2, 4).reshape(rows * cols, channels, resolution, resolution), (cols, rows)


# --- the run folder


@dataclass(frozen=True)
class MetricRow:
    """One line of a metric-*.jsonl."""

    kimg: float
    value: float
    spread: float | None
    provenance: dict[str, Any]


@dataclass
class RunRecord:
    """What a run folder tells. Folders of the StyleGAN2-ADA family serve too; what they lack is left out."""

    path: Path
    options: dict[str, Any]
    config: FinetuneConfig | None
    stats: list[dict[str, Any]]
    metrics: dict[str, list[MetricRow]]
    environment: dict[str, Any]
    stages: list[Picture] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the curves stay in the run's own files."""
        last = self.stats[-1] if self.stats else {}
        return {
            "path": str(self.path),
            "kimg": mean_of(last, "Progress/kimg"),
            "ticks": len(self.stats),
            "options": self.options,
            "started_from": self.environment.get("resume"),
            "data": self.environment.get("data"),
            "metrics": {
                name: [{"kimg": r.kimg, "value": r.value, "spread": r.spread} for r in rows]
                for name, rows in self.metrics.items()
            },
        }


def find_run(network: str | Path) -> Path | None:
    """The run folder that a pickle lies in, if it lies in one."""
    if is_url(str(network)):
        return None
    folder = Path(network).parent
    return folder if (folder / "stats.jsonl").is_file() and (folder / "training_options.json").is_file() else None


def read_run(path: Path | None) -> RunRecord | None:
    """Options, statistics and figures of a run folder; None for None.

    Raises:
        ValueError: Not a run folder.
    """
    if path is None:
        return None
    if not (path / "training_options.json").is_file():
        raise ValueError(f"{path} is no run folder: it has no training_options.json")
    options = read_object(path / "training_options.json")
    config = None
    with contextlib.suppress(ValueError, TypeError):
        config = FinetuneConfig.from_dict(options)
    metrics: dict[str, list[MetricRow]] = {}
    for file in sorted(path.glob("metric-*.jsonl")):
        for row in run_dir.read_jsonl(file):
            add_metric_row(metrics, row)
    for rows in metrics.values():
        rows.sort(key=lambda r: r.kimg)
    stats = [row for row in run_dir.read_jsonl(path / "stats.jsonl") if isinstance(row, dict)]
    return RunRecord(path, options, config, stats, metrics, read_object(path / "environment.json"))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} where there is none or it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def add_metric_row(metrics: dict[str, list[MetricRow]], row: Any) -> None:
    """Sort one line of a metric file in; lines that lack what is needed are passed over."""
    if not isinstance(row, dict) or not isinstance(row.get("results"), dict):
        return
    kimg = row.get("kimg")
    if kimg is None and (match := re.search(r"(\d+)\.pkl$", str(row.get("snapshot_pkl")))):
        kimg = int(match[1])
    provenance = row.get("provenance") if isinstance(row.get("provenance"), dict) else {}
    for name, value in row["results"].items():
        if isinstance(kimg, int | float) and isinstance(value, int | float) and math.isfinite(value):
            spread = provenance.get("spread")  # type: ignore[union-attr]
            metrics.setdefault(str(name), []).append(
                MetricRow(
                    float(kimg),
                    float(value),
                    float(spread) if isinstance(spread, int | float) else None,
                    provenance or {},
                )
            )


def stage_pictures(run: RunRecord, network: str, resolution: int) -> list[Picture]:
    """Grids of the run: at the start, at a few snapshots, and the last one up to the network reported on."""
    numbered = {int(m[1]): p for p in run.path.glob("fakes*.png") if (m := re.fullmatch(r"fakes(\d+)\.png", p.name))}
    if (match := re.search(r"network-snapshot-(\d+)\.pkl$", network)) and int(match[1]) in numbered:
        numbered = {kimg: p for kimg, p in numbered.items() if kimg <= int(match[1])}
    # The grid of 0 kimg is a step after fakes_init.png, unless the whole run is shorter than 1 kimg.
    kimgs = sorted(kimg for kimg in numbered if kimg) or sorted(numbered)
    during = spaced(kimgs[:-1], kimgs[-1] if kimgs else 0)
    files = [("Start", "fakes_init.png, 0 kimg", run.path / "fakes_init.png")]
    files += [(f"After {kimg} kimg", numbered[kimg].name, numbered[kimg]) for kimg in during]
    files += [
        (f"After {kimg or 'less than 1'} kimg", f"{numbered[kimg].name}, the last", numbered[kimg])
        for kimg in kimgs[-1:]
    ]
    pictures = []
    for title, note, path in files:
        with contextlib.suppress(ValueError, OSError):  # a grid that is missing or broken is no reason for no report
            pictures.append(picture(title, note, *crop_grid(path, resolution, STAGE_GRID)))
    return pictures


def spaced(kimgs: Sequence[int], last: int) -> list[int]:
    """At most `MAX_DURING` of the snapshots, as evenly as can be between 0 and the last one."""
    left = list(kimgs)
    chosen = []
    for i in range(min(MAX_DURING, len(left))):
        nearest = min(left, key=lambda kimg: abs(kimg - last * (i + 1) / (MAX_DURING + 1)))
        left.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen)


def mean_of(row: dict[str, Any], key: str) -> float | None:
    """The mean of one statistic in a line of stats.jsonl; None where it is missing or not a number."""
    value = row.get(key)
    value = value.get("mean") if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


def curve(run: RunRecord, key: str) -> list[Point]:
    """(kimg, mean) of one statistic at every tick."""
    points = [(mean_of(row, "Progress/kimg"), mean_of(row, key)) for row in run.stats]
    return [(x, y) for x, y in points if x is not None]


def floors(run: RunRecord) -> tuple[list[Point], list[Point]]:
    """What the losses of G and D can't go below, tick by tick; ([], []) where the run's options don't tell the loss.

    Within a tick a scheduled k moves; the lower of its two ends holds for the tick's mean.
    """
    if run.config is None:
        return [], []
    try:
        loss = losses.build_loss(run.config.loss.name, **loss_options(run.config))
    except (ValueError, TypeError):
        return [], []
    lower: tuple[list[Point], list[Point]] = ([], [])
    previous = 0.0
    for kimg, _ in curve(run, "Progress/kimg"):
        ends = []
        for position in (previous, kimg):
            loss.advance(int(position * 1000))
            ends.append((loss.floor_generator, loss.floor_discriminator))
        for points, values in zip(lower, zip(*ends)):
            points.append((kimg, min(values)))
        previous = kimg
    return lower


def draw_charts(run: RunRecord, evaluations: Sequence[Evaluation]) -> list[Chart]:
    """Losses with their floors, scores, ADA's p, and every figure measured along the way."""
    floor_g, floor_d = floors(run)
    loss_curves = [Series("G", curve(run, "Loss/G/loss"), 1), Series("D", curve(run, "Loss/D/loss"), 2)]
    for name, color, points in (("G", 1, floor_g), ("D", 2, floor_d)):
        if points:
            low, high = min(y for _, y in points if y is not None), max(y for _, y in points if y is not None)
            shown = number(low) if low == high else f"{number(low)} to {number(high)}"
            loss_curves.append(Series(f"floor of {name} ({shown})", points, color, dashed=True))
    wanted = [
        chart("Losses", loss_curves, note="Means per tick, regularisers not included."),
        chart(
            "Discriminator scores",
            [Series("real", curve(run, "Loss/scores/real"), 1), Series("generated", curve(run, "Loss/scores/fake"), 2)],
            note="Means per tick, of augmented images.",
        ),
    ]
    p = curve(run, "Progress/augment")
    if any(y for _, y in p):
        wanted.append(chart("Augmentation strength", [Series("p", p, 1)]))
    for name, rows in run.metrics.items():
        rows = starting_row(evaluations, name, rows) + rows
        spread = [r.spread for r in rows] if any(r.spread is not None for r in rows) else []
        note = "Lower is better." + (" Bars: spread over subsets." if spread else "")
        label = name.upper() if name in ("fd", "kd", "fid", "kid") else name
        wanted.append(chart(label, [Series(label, [(r.kimg, r.value) for r in rows], 1, spread=spread)], note=note))
    return [c for c in wanted if c is not None]


def starting_row(evaluations: Sequence[Evaluation], name: str, rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The starting network's figure as the point at 0 kimg, where it was measured exactly as the run's own."""
    if not rows or rows[0].kimg == 0 or evaluations[0].role != "before":
        return []
    same = ("num_real", "num_fake", "digest", "resize", "seed", "covariance")
    for row in evaluations[0].results:
        if row.name == name and all(row.as_dict()[key] == rows[0].provenance.get(key) for key in same):
            return [MetricRow(0.0, row.value, row.spread, row.as_dict())]
    return []


# --- the page


def render(report: dict[str, Any], *, grids: Sequence[Picture], run: RunRecord | None, charts: Sequence[Chart]) -> str:
    """The HTML page of a report."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["num"] = number
    template = environment.from_string((ASSETS / TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        report=report,
        tiles=tiles_of(report),
        grids=grids,
        stages=run.stages if run else [],
        charts=charts,
        facts=facts_of(report),
    )


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    label: str
    value: float
    spread: float | None
    before: float | None

    @property
    def change(self) -> float | None:
        """Relative change in percent, where that makes sense."""
        return None if self.before is None or self.before <= 0 else 100 * (self.value - self.before) / self.before


def tiles_of(report: dict[str, Any]) -> list[Tile]:
    """The headline figures."""
    before = report["metrics_before"] or {}
    return [
        Tile(row["label"], row["value"], row["spread"], before.get(row["name"]))
        for row in report["evaluations"][-1]["results"]
        if row["value"] is not None
    ]


def facts_of(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Provenance as tables of (name, value)."""
    net, data, env, settings = report["network"], report["data"], report["environment"], report["settings"]
    tables = [
        (
            "Network",
            [
                ("file", net["path"]),
                ("SHA-256", net["sha256"]),
                ("images", f"{net['resolution']}×{net['resolution']}, {net['num_channels']} channels"),
                ("classes", str(net["c_dim"] or "none")),
                ("parameters of G", f"{net['num_parameters']:,}"),
            ],
        ),
        (
            "Data",
            [
                ("path", data["path"]),
                ("images", f"{data['num_images']:,} of {data['resolution']}×{data['resolution']}"),
                ("fingerprint", data["fingerprint"]),
            ],
        ),
    ]
    if len(report["evaluations"]) > 1:
        start = report["evaluations"][0]
        tables.insert(1, ("Network before", [("file", start["path"]), ("SHA-256", start["sha256"])]))
    rows = report["evaluations"][-1]["results"]
    measured = [
        ("detector", settings["detector"]),
        ("generated images", f"{settings['num']:,}"),
        ("seed", str(report["seed"])),
    ]
    if rows:
        measured += [
            ("real images", f"{rows[0]['num_real']:,}"),
            ("detector's SHA-256", rows[0]["digest"]),
            ("resizing", rows[0]["resize"]),
        ]
        for row in rows:
            if row["covariance"]:
                measured.append(
                    (
                        f"covariance of {row['label']}",
                        "divided by n - 1" if row["covariance"] == "cleanfid" else "divided by n",
                    )
                )
            if row["num_subsets"]:
                measured.append((f"subsets of {row['label']}", f"{row['num_subsets']} of {row['subset_size']} images"))
    tables.append(("Evaluation", measured))
    if report["run"]:
        tables.append(("Run", run_facts(report["run"])))
    tables.append(
        (
            "Machine",
            [
                ("device", f"{env['device']} ({env['device_name']}), {env['num_threads']} threads"),
                ("system", env["platform"]),
                *env["versions"].items(),
            ],
        )
    )
    return tables


def run_facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """The run's folder, length and the options that matter most."""
    rows = [("folder", run["path"])]
    if run["kimg"] is not None:
        rows.append(("length", f"{number(run['kimg'])} kimg, {run['ticks']} ticks"))
    options = run["options"]
    if isinstance(options.get("loss"), dict):
        loss = options["loss"]
        words = str(loss.get("name"))
        if loss.get("name") == "rooted":
            tail = f", linear tail at {loss.get('tail_at')}" if loss.get("tail") == "linear" else ""
            words += f", k = {loss.get('k')}{tail}, scale {loss.get('scale')}, acts on {loss.get('acts_on')}"
        rows.append(("loss", words))
        rows.append(("R1 gamma", str(loss.get("gamma"))))
    if isinstance(options.get("optim"), dict):
        optim = options["optim"]
        rows.append(("batch", str(optim.get("batch"))))
        rows.append(("learning rates", f"G {optim.get('glr')}, D {optim.get('dlr')}"))
    if isinstance(options.get("augment"), dict):
        augment = options["augment"]
        mode, strength = augment.get("aug"), f", p = {augment.get('p')}" if augment.get("aug") == "fixed" else ""
        rows.append(("augmentation", "none" if mode == "noaug" else f"{mode}, {augment.get('augpipe')}{strength}"))
    if isinstance(options.get("runtime"), dict):
        rows.append(("seed", str(options["runtime"].get("seed"))))
    if isinstance(run["started_from"], dict):
        rows.append(("started from", f"{run['started_from'].get('path')} ({run['started_from'].get('sha256')})"))
    return rows
