"""What the studies of networks found: tables, figures and sentences from results on disk. Computes no run anew."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stylegan_rooted import paired
from stylegan_rooted.study import classifiers, comparison, figures
from stylegan_rooted.study.cells import Cells, Result
from stylegan_rooted.study.classifiers import Size
from stylegan_rooted.study.comparison import Entry
from stylegan_rooted.study.data import NOISE_SHARE
from stylegan_rooted.study.linear_report import entries_table, marks_text
from stylegan_rooted.study.measures import first_reaching
from stylegan_rooted.study.objectives import BASELINE
from stylegan_rooted.study.page import Figure, Page, Section, Table

SHARES = (0.8, 0.9, 0.95)
CLEAN, NOISY = NOISES = (0.0, NOISE_SHARE)
SETTINGS = (
    "Seeds {seeds}; a seed decides split, weights, order and wrong labels, the same for all objectives. The test part "
    "is fixed: intervals do not cover which images are in it. {steps} steps of {batch} images with Adam, whose rate "
    "falls to 0 along half a cosine. Every objective is trained with every rate of {rates}; for each seed the one with "
    "the best accuracy on that seed's validation data is reported, so that the luck of this choice is part of the "
    "intervals. The same rate serves the run with wrong labels. A run is short: what it says of final accuracy holds "
    "for this budget."
)


@dataclass(frozen=True)
class Measure:
    """A figure of a run, and how to compare it.

    Attributes:
        title: For tables; sentences begin with it.
        lower_is_better: Whether small values are good.
        ratio: Whether ratios are compared instead of differences.
        form: Value -> text.
        noise: Which runs it is taken from.
    """

    title: str
    lower_is_better: bool
    ratio: bool
    form: Callable[[float], str]
    noise: float = CLEAN


MEASURES = {
    "accuracy": Measure("Test accuracy at the end, percent", False, False, "{:.1f}".format),
    "ece": Measure("Calibration error at the end, percent", True, False, "{:.1f}".format),
    **{
        f"steps {share:g}": Measure(f"Steps to {share:.0%} of cross-entropy's accuracy", True, True, "{:.0f}".format)
        for share in SHARES
    },
    f"seconds {SHARES[1]:g}": Measure(
        f"Processor seconds to {SHARES[1]:.0%} of cross-entropy's accuracy", True, True, "{:.3f}".format
    ),
    "noisy accuracy": Measure(
        f"Test accuracy with {NOISY:.0%} wrong labels, percent", False, False, "{:.1f}".format, NOISY
    ),
    "noisy ece": Measure(
        f"Calibration error with {NOISY:.0%} wrong labels, percent", True, False, "{:.1f}".format, NOISY
    ),
}
FAMILIES = {
    "inverse": "rooted inverse form",
    "direct": "rooted direct form",
    "focal": "focal",
    "mse": "squared error",
}
DRAWN = ("accuracy", "noisy accuracy", "ece", f"steps {SHARES[1]:g}")


class ClassifierReport:
    """Tables and figures of one study's results.

    Args:
        title: Of the page.
        size: What was run.
        seeds: Likewise.
        store: Holds every cell's result.
    """

    def __init__(self, title: str, size: Size, seeds: list[int], store: Cells) -> None:
        self.title = title
        self.size = size
        self.seeds = seeds
        self.store = store
        self.names = {setting: ", ".join(setting) for setting in size.settings}
        self.rates = {
            (s, name, seed): classifiers.chosen_rate(size, s, name, seed, store)
            for s in size.settings
            for name in size.objectives
            for seed in seeds
        }
        self.bounds = {s: self._baseline_accuracy(s) for s in size.settings}
        self.columns = {key: {self.names[s]: self._column(s, key) for s in size.settings} for key in MEASURES}

    def summary(self) -> dict[str, Any]:
        """All comparisons, for JSON."""
        found: dict[str, Any] = {
            key: {setting: {n: e.as_dict() for n, e in entries.items()} for setting, entries in columns.items()}
            for key, columns in self.columns.items()
        }
        found["rates"] = {
            self.names[s]: {n: [self.rates[s, n, seed] for seed in self.seeds] for n in self.size.objectives}
            for s in self.size.settings
        }
        return found

    def page(self) -> Page:
        """The whole report."""
        tables = [entries_table(m.title, self.columns[key], m.form, self._note(key)) for key, m in MEASURES.items()]
        details = [self._details(s) for s in self.size.settings]
        return Page(self.title, [
            Section("Verdict", points=self._sentences()),
            Section("Settings", [self._settings(), marks_text(len(self.size.objectives) - 1)]),
            Section("Results", blocks=tables),
            Section("Differences to cross-entropy with 95 % intervals", blocks=details),
            Section("Search for the learning rate", blocks=[self._search(s) for s in self.size.settings]),
            Section("Figures", blocks=self._figure_blocks()),
        ])  # fmt: skip

    def draw(self, folder: Path) -> None:
        """Write the figures."""
        rows = [
            [
                figures.Panel(self.names[s] + (f", {noise:.0%} wrong labels" if noise else ""), self._curves(s, noise))
                for s in self.size.settings
            ]
            for noise in NOISES
        ]
        figures.draw(folder, "accuracy-curves", rows, x_label="steps", y_label="test accuracy, percent", x_log=True)
        for key in DRAWN:
            panels = [figures.Panel(name, bars=bars_of(entries)) for name, entries in self.columns[key].items()]
            measure = MEASURES[key]
            label = "ratio to cross-entropy" if measure.ratio else "difference to cross-entropy, percentage points"
            name, neutral = key.replace(" ", "-"), float(measure.ratio)
            figures.draw(folder, name, [panels], x_label=label, x_log=measure.ratio, neutral=neutral)

    # --- parts

    def _results(self, setting: tuple[str, str], name: str, noise: float) -> list[Result]:
        """One per seed, each at its chosen rate."""
        return [
            self.store.result(
                classifiers.run_cell(self.size, setting, name, self.rates[setting, name, seed], seed, noise=noise)
            )
            for seed in self.seeds
        ]

    def _baseline_accuracy(self, setting: tuple[str, str]) -> float:
        """Cross-entropy's mean accuracy at the end, on the curves' images."""
        return statistics.mean(r["curve"][-1] or 0.0 for r in self._results(setting, BASELINE, CLEAN))

    def _column(self, setting: tuple[str, str], key: str) -> dict[str, Entry]:
        measure = MEASURES[key]
        values = {name: self._values(setting, name, key) for name in self.size.objectives}
        return comparison.column(values, lower_is_better=measure.lower_is_better, ratio=measure.ratio)

    def _values(self, setting: tuple[str, str], name: str, key: str) -> list[float | None]:
        """One value per seed."""
        results = self._results(setting, name, MEASURES[key].noise)
        what, _, share = key.partition(" ")
        if what in ("steps", "seconds"):
            bound = float(share) * self.bounds[setting]
            steps = [first_reaching(r["steps"], r["curve"], bound, rising=True) for r in results]
            # The middle run's time per step: one run's own is at the mercy of what else the machine was doing.
            per_step = statistics.median(r["seconds"] for r in results) / self.size.steps if what == "seconds" else 1.0
            return [None if s is None else s * per_step for s in steps]
        return [None if r[key.split()[-1]] is None else 100 * r[key.split()[-1]] for r in results]

    def _curves(self, setting: tuple[str, str], noise: float) -> list[figures.Curve]:
        curves = []
        for name in self.size.objectives:
            results = self._results(setting, name, noise)
            means = [None if None in at else 100 * sum(at) / len(at) for at in zip(*(r["curve"] for r in results))]
            curves.append(figures.Curve(name, results[0]["steps"], means))
        return curves

    def _sentences(self) -> list[str]:
        groups: dict[str, list[str]] = {}
        for name in self.size.objectives:
            if name != BASELINE:
                groups.setdefault(FAMILIES[name.partition(":")[0]], []).append(name)
        lines = []
        for key, measure in MEASURES.items():
            counts = [
                f"{group} in " + comparison.tally_text(
                    comparison.tally({n: c[n] for n in names} for c in self.columns[key].values())
                )
                for group, names in groups.items()
            ]  # fmt: skip
            lines.append(f"{measure.title}, against cross-entropy: {'; '.join(counts)}.")
        edges = sum(rate in (self.size.rates[0], self.size.rates[-1]) for rate in self.rates.values())
        lines.append(
            f"{edges} of {len(self.rates)} chosen learning rates lie on the grid's edge: a better one may lie beyond."
        )
        return lines

    def _settings(self) -> str:
        return SETTINGS.format(
            seeds=", ".join(map(str, self.seeds)),
            steps=self.size.steps,
            batch=self.size.batch,
            rates=", ".join(f"{rate:g}" for rate in self.size.rates),
        )

    def _note(self, key: str) -> str:
        if not MEASURES[key].ratio:
            return ""
        return "Geometric mean of the runs that got there; in brackets how many did, where not all."

    def _details(self, setting: tuple[str, str]) -> Table:
        entries = {key: self.columns[key][self.names[setting]] for key in MEASURES}
        shown = ("accuracy", "noisy accuracy", "ece", f"steps {SHARES[1]:g}")
        rows = [[name, *(interval_text(entries[key][name]) for key in shown)] for name in self.size.objectives]
        titles = [MEASURES[key].title + (" (ratio)" if MEASURES[key].ratio else "") for key in shown]
        header = ["objective", *titles]
        return Table(self.names[setting], header, rows)

    def _search(self, setting: tuple[str, str]) -> Table:
        rows = []
        for name in self.size.objectives:
            row = [name]
            for rate in self.size.rates:
                cells = [classifiers.run_cell(self.size, setting, name, rate, seed) for seed in self.seeds]
                found = [self.store.result(cell)["validation"] or 0.0 for cell in cells]
                times = sum(self.rates[setting, name, seed] == rate for seed in self.seeds)
                row.append(f"{100 * statistics.mean(found):.1f} ({times})")
            rows.append(row)
        header = ["objective", *(f"{rate:g}" for rate in self.size.rates)]
        note = "Mean over seeds, a diverged run counting 0; in brackets how many seeds chose the rate."
        return Table(f"{self.names[setting]}: validation accuracy, percent", header, rows, note)

    def _figure_blocks(self) -> list[Figure]:
        curves = Figure("Test accuracy on the way", "accuracy-curves", "Mean over seeds.")
        return [curves, *(
            Figure(f"{MEASURES[key].title}, beside cross-entropy", key.replace(" ", "-"), BARS_NOTE) for key in DRAWN
        )]  # fmt: skip


BARS_NOTE = (
    "Mean and Student's 95 % interval of paired differences; full dots where a difference is claimed. What reaches far "
    "beyond the others is cut off."
)


def bars_of(entries: dict[str, Entry]) -> list[figures.Bar]:
    """One per objective beside the baseline."""
    return [
        figures.Bar(name, e.effect, e.low, e.high, e.outcome in (paired.BETTER, paired.WORSE))
        for name, e in entries.items()
        if name != BASELINE
    ]


def interval_text(e: Entry) -> str:
    """`-1.2 [-2.0, -0.4] worse`; what there is, where there is no interval."""
    if e.outcome == comparison.BASE:
        return "baseline"
    if e.effect is None or e.low is None or e.high is None:
        return e.outcome
    mark = f" {e.outcome}" if e.outcome in (paired.BETTER, paired.WORSE) else ""
    failed = f" ({e.num_runs - e.num_failed} of {e.num_runs})" if e.num_failed else ""
    return f"{e.effect:.2f} [{e.low:.2f}, {e.high:.2f}]{failed}{mark}"
