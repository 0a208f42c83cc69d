"""Runs one study in a folder: computes the cells missing there, then writes study.json, study.md and study.html."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from stylegan_rooted import __version__
from stylegan_rooted.finetune import check_outdir
from stylegan_rooted.study import classifiers, linear
from stylegan_rooted.study.cells import FILE, Cell, Cells, Result
from stylegan_rooted.study.classifier_report import ClassifierReport
from stylegan_rooted.study.linear_report import LinearReport
from stylegan_rooted.study.page import Page, html, markdown
from training import run_dir
from training.run_lock import FALLBACK_NAME, FolderLock

FORMAT = "stylegan-rooted study 1"
KEPT_FROM_ENVIRONMENT = ("python", "torch", "numpy", "device_name", "cpu_capability")

Bar = Callable[[int], AbstractContextManager[Any]]


class Report(Protocol):
    """What a study makes of its results."""

    def summary(self) -> dict[str, Any]:
        """All comparisons, for JSON."""

    def page(self) -> Page:
        """Text, tables, references to figures."""

    def draw(self, folder: Path) -> None:
        """Write the figures."""


class Study(Protocol):
    """A study: its cells, in stages that may depend on the results before, and its report."""

    size: Any

    def num_cells(self) -> int:
        """Of all stages together."""

    def stages(self, store: Cells) -> Iterable[list[Cell]]:
        """Cells to compute; each stage is asked for when the one before is done."""

    def report(self, store: Cells) -> Report:
        """The report, when all is done."""


class LinearStudy:
    """The linear study: one stage."""

    def __init__(self, size: linear.Size, seeds: list[int]) -> None:
        self.size = size
        self.seeds = seeds

    def num_cells(self) -> int:
        """Of all stages together."""
        return len(linear.cells(self.size, self.seeds))

    def stages(self, store: Cells) -> Iterator[list[Cell]]:
        """Everything at once."""
        yield linear.cells(self.size, self.seeds)

    def report(self, store: Cells) -> LinearReport:
        """The report, when all is done."""
        return LinearReport(self.size, self.seeds, store)


class ClassifierStudy:
    """A study of networks: every learning rate, then wrong labels at the chosen ones."""

    def __init__(self, title: str, size: classifiers.Size, seeds: list[int]) -> None:
        self.title = title
        self.size = size
        self.seeds = seeds

    def num_cells(self) -> int:
        """Of all stages together."""
        num_noisy = len(self.size.settings) * len(self.size.objectives) * len(self.seeds)
        return len(classifiers.search_cells(self.size, self.seeds)) + num_noisy

    def stages(self, store: Cells) -> Iterator[list[Cell]]:
        """Every rate, then wrong labels at the chosen ones."""
        yield classifiers.search_cells(self.size, self.seeds)
        yield classifiers.noisy_cells(self.size, self.seeds, store)

    def report(self, store: Cells) -> ClassifierReport:
        """The report, when all is done."""
        return ClassifierReport(self.title, self.size, self.seeds, store)


def build(name: str, seeds: list[int], *, full: bool) -> Study:
    """The study called `name`.

    Raises:
        ValueError: Unknown name, or fewer than two seeds.
    """
    if len(set(seeds)) < 2:
        raise ValueError(f"--seeds {','.join(map(str, seeds))}: an interval needs at least two different seeds")
    if name not in STUDIES:
        raise ValueError(f"study {name!r} is unknown; one of {', '.join(STUDIES)}")
    return STUDIES[name](list(dict.fromkeys(seeds)), full)


def check_folder(outdir: str | Path) -> None:
    """Refuse a folder that is neither new, nor empty, nor a study's, before any work.

    Raises:
        ValueError: It holds something else.
        OSError: It cannot be written.
    """
    check_outdir(str(outdir), option="--out")
    folder = Path(outdir)
    names = {file.name for file in folder.iterdir()} - {FALLBACK_NAME} if folder.exists() else set()
    if names and not names & {FILE, "study.json"}:
        raise ValueError(f"--out {folder} is no study's folder: it holds {min(names)} but no {FILE}; "
                         "name a new or an empty folder")


def run(
    study: Study, outdir: str | Path, *, num_workers: int = 1, bar: Bar, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Compute what is missing in `outdir` and write the report there.

    Args:
        study: What `build` returned.
        outdir: Folder; results of an earlier call there are used.
        num_workers: Processes.
        bar: Makes a progress bar of so many cells, with `update(1)`.
        say: Receives lines for people.

    Returns:
        The object in study.json.

    Raises:
        ValueError: A package is missing, or the folder is no study's.
        OSError: The folder cannot be written, or another process works in it.
    """
    check_folder(outdir)
    folder = Path(outdir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(folder, wait=False)
    except BlockingIOError as e:
        raise BlockingIOError(f"--out {folder}: another study is running there; wait, or name another folder") from e
    try:
        store = Cells(folder, compute, num_workers=num_workers)
        num_before = len(store)
        start = time.monotonic()
        stages = iter(study.stages(store))
        first = next(stages)
        num_there = len(first) - len(store.missing(first))
        # Cells that are there are left out of the bar's length: done in no time, they would spoil its time left.
        with bar(study.num_cells() - num_there) as progress:
            store.compute(first, lambda: progress.update(1))
            for cells in stages:
                progress.update(len(cells) - len(store.missing(cells)))
                store.compute(cells, lambda: progress.update(1))
        say(f"{len(store) - num_before} cells computed in {time.monotonic() - start:.0f} s, {num_before} were there")
        return write(study, store, folder)
    finally:
        lock.release()


def write(study: Study, store: Cells, folder: Path) -> dict[str, Any]:
    """Write figures, study.json, study.md and study.html."""
    report = study.report(store)
    report.draw(folder)
    page = report.page()
    environment = run_dir.environment("cpu")
    content = {
        "format": FORMAT,
        "version": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": {name: environment[name] for name in KEPT_FROM_ENVIRONMENT},
        "size": asdict(study.size),
        "title": page.title,
        "comparisons": report.summary(),
    }
    run_dir.write_json(folder / "study.json", content)
    run_dir.write_atomic(folder / "study.md", markdown(page))
    run_dir.write_atomic(folder / "study.html", html(page, folder))
    return content


def compute(cell: Cell) -> Result:
    """Any study's cell."""
    return COMPUTE[cell["study"]](cell)


COMPUTE: dict[str, Callable[[Cell], Result]] = {"linear": linear.compute, "classifiers": classifiers.compute}
STUDIES: dict[str, Callable[[list[int], bool], Study]] = {
    "linear": lambda seeds, full: LinearStudy(linear.FULL if full else linear.DEFAULT, seeds),
    "mlp": lambda seeds, full: ClassifierStudy(
        "Fully connected networks and the rooted objective",
        classifiers.MLP_FULL if full else classifiers.MLP,
        seeds,
    ),
    "vision": lambda seeds, full: ClassifierStudy(
        "Image classifiers and the rooted objective",
        classifiers.VISION_FULL if full else classifiers.VISION,
        seeds,
    ),
}
