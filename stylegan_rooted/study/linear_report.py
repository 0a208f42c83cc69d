"""What the linear study found: tables, figures and sentences from the results of its cells. Computes nothing anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stylegan_rooted.study import comparison, figures
from stylegan_rooted.study.cells import Cell, Cells, Result
from stylegan_rooted.study.comparison import Entry
from stylegan_rooted.study.linear import METHODS, NUM_STARTS, SAME_MINIMISER, Size, cells
from stylegan_rooted.study.measures import first_reaching
from stylegan_rooted.study.objectives import BASELINE
from stylegan_rooted.study.page import Figure, Page, Section, Table

SMALL_GAP = 1e-2
ROUNDING = 1e-12
"""Relative gaps below it are called equal to it: there is no more to see in double precision."""
SETTINGS = (
    "Seeds {seeds}; a seed draws synthetic data, the start and the order of samples, the same for all objectives. On "
    "real data it draws start and order only: their intervals say nothing about other data. {passes} passes over the "
    "data; learning rates {rates} in units of 1 / (largest eigenvalue of the mean of z z'), the same grid for all "
    "objectives; a rate at which any seed ends in something that is no number cannot be chosen. The relative loss "
    "(gap) is the training loss less its infimum, divided by the same at w = 0: each objective in its own units."
)
CRITERIA = {
    "loss": "learning rate with the smallest final training loss",
    "angle": "learning rate with the smallest final angle",
    "equal": "learning rate 1 for all",
}


class LinearReport:
    """Tables and figures of one study's results.

    Args:
        size: What was run.
        seeds: Likewise.
        store: Holds every cell's result.
    """

    def __init__(self, size: Size, seeds: list[int], store: Cells) -> None:
        self.size = size
        self.seeds = seeds
        self.objectives = size.objectives
        self.results: dict[tuple[str, str, str], Result] = {
            _place(cell): store.result(cell) for cell in cells(size, seeds)
        }
        first = {d: self.results[d, METHODS[0], BASELINE] for d in size.data}
        self.separable = [d for d in size.data if first[d]["separable"]]
        self.overlapping = [d for d in size.data if not first[d]["separable"]]

    def summary(self) -> dict[str, Any]:
        """All comparisons, for JSON."""
        return {
            f"{measure}, {method}, {criterion}": {
                d: {name: e.as_dict() for name, e in entries.items()} for d, entries in columns.items()
            }
            for (measure, method, criterion), columns in self.columns().items()
        }

    def columns(self) -> dict[tuple[str, str, str], dict[str, dict[str, Entry]]]:
        """(measure, method, criterion of the rate) -> data -> objective -> entry."""
        found = {}
        for method in METHODS:
            for criterion in CRITERIA if self.separable else ():
                found["angle", method, criterion] = {
                    d: self._column(d, method, criterion, "angle") for d in self.separable
                }
            for criterion in ("loss", "equal") if self.overlapping else ():
                found["gap", method, criterion] = {
                    d: self._column(d, method, criterion, "gap") for d in self.overlapping
                }
            found["passes", method, "loss"] = {d: self._column(d, method, "loss", "passes") for d in self.size.data}
        return found

    def page(self) -> Page:
        """The whole report."""
        columns = self.columns()
        sections = [Section("Verdict", points=self._sentences(columns)), self._settings()]
        for method in METHODS:
            blocks: list[Table | Figure] = []
            for criterion, meaning in CRITERIA.items():
                if ("angle", method, criterion) in columns:
                    title = f"Final angle to the hard-margin direction in degrees, {method}; {meaning}"
                    blocks.append(entries_table(title, columns["angle", method, criterion], "{:.2f}".format))
                if ("gap", method, criterion) in columns:
                    title = f"Final relative optimality gap, {method}; {meaning}"
                    blocks.append(entries_table(title, columns["gap", method, criterion], "{:.1e}".format))
            title = f"Passes until the relative training loss falls to {SMALL_GAP:g}, {method}; {CRITERIA['loss']}"
            blocks.append(entries_table(title, columns["passes", method, "loss"], "{:.1f}".format))
            blocks.append(self._rates(method))
            sections.append(Section(method.capitalize(), blocks=blocks))
        if self.overlapping:
            sections.append(Section("Is the minimiser unique?", blocks=[self._minimisers()]))
        sections.append(Section("Curves", blocks=self._figure_blocks()))
        return Page("Linear classifiers and the rooted objective", sections)

    def draw(self, folder: Path) -> None:
        """Write the figures."""
        for criterion in CRITERIA if self.separable else ():
            rows = [
                [figures.Panel(f"{d}\n{method}", self._curves(d, method, criterion, "angle")) for method in METHODS]
                for d in self.separable
            ]
            figures.draw(folder, f"angle-{criterion}", rows, x_label="passes", y_label="degrees", x_log=True)
        if self.overlapping:
            rows = [
                [figures.Panel(f"{d}\n{method}", self._curves(d, method, "loss", "gap")) for method in METHODS]
                for d in self.overlapping
            ]
            figures.draw(folder, "gap", rows, x_label="passes", y_label="relative gap", x_log=True, y_log=True)

    # --- parts

    def _figure_blocks(self) -> list[Figure]:
        found = [
            Figure(f"Angle to the hard-margin direction; {meaning}", f"angle-{criterion}", "Mean over seeds.")
            for criterion, meaning in CRITERIA.items()
            if self.separable
        ]
        if self.overlapping:
            found.append(Figure("Relative optimality gap", "gap", "Mean over seeds; rate by training loss."))
        return found

    def _choice(self, d: str, method: str, name: str, criterion: str) -> dict[str, Any]:
        return self.results[d, method, name]["choices"][criterion]

    def _column(self, d: str, method: str, criterion: str, measure: str) -> dict[str, Entry]:
        values = {name: self._values(d, method, criterion, measure, name) for name in self.objectives}
        return comparison.column(values, lower_is_better=True, ratio=measure != "angle")

    def _values(self, d: str, method: str, criterion: str, measure: str, name: str) -> list[float | None]:
        """One value per seed."""
        result, choice = self.results[d, method, name], self._choice(d, method, name, criterion)
        if measure == "passes":
            return [first_reaching(result["steps"], gap, SMALL_GAP, rising=False) for gap in choice["gap"]]
        finals = [curve[-1] for curve in choice[measure]]
        if measure == "angle":
            return finals
        # Below the solver's minimum by more than rounding: possible for the direct form, which is not convex.
        return [None if v is None or v < -ROUNDING else max(v, ROUNDING) for v in finals]

    def _curves(self, d: str, method: str, criterion: str, measure: str) -> list[figures.Curve]:
        curves = []
        for name in self.objectives:
            steps = self.results[d, method, name]["steps"]
            seeds = self._choice(d, method, name, criterion)[measure]
            means = [None if None in at else sum(at) / len(at) for at in zip(*seeds)]
            curves.append(figures.Curve(name, steps[1:], means[1:]))
        return curves

    def _sentences(self, columns: dict[tuple[str, str, str], dict[str, dict[str, Entry]]]) -> list[str]:
        what = {"angle": "Final angle to the hard-margin direction", "gap": "Final relative optimality gap"}
        lines = []
        for measure, criterion in dict.fromkeys((m, c) for m, _, c in columns if m in what):
            mine = [of_data for key, of_data in columns.items() if key[::2] == (measure, criterion)]
            settings = [entries for of_data in mine for entries in of_data.values()]
            for form in ("inverse", "direct"):
                counts = comparison.tally({n: e for n, e in c.items() if n.startswith(form)} for c in settings)
                lines.append(
                    f"{what[measure]}, {CRITERIA[criterion]}: rooted {form} form against cross-entropy in "
                    f"{comparison.tally_text(counts)}."
                )
        for criterion, measure in (("loss", "every data set"), ("angle", "separable data")):
            chosen = [r["choices"][criterion]["rate"] for r in self.results.values() if criterion in r["choices"]]
            edges = sum(rate in (min(self.size.rates), max(self.size.rates)) for rate in chosen)
            if chosen:
                lines.append(
                    f"{CRITERIA[criterion].capitalize()}, {measure}: {edges} of {len(chosen)} lie on the grid's edge: "
                    "a better one may lie beyond."
                )
        return lines

    def _settings(self) -> Section:
        rates = ", ".join(f"{r:g}" for r in self.size.rates)
        return Section("Settings", [SETTINGS.format(
            seeds=", ".join(map(str, self.seeds)), passes=self.size.passes, rates=rates
        ), marks_text(len(self.objectives) - 1)])  # fmt: skip

    def _rates(self, method: str) -> Table:
        rows = []
        for name in self.objectives:
            row = [name]
            for d in self.size.data:
                of_criteria = self.results[d, method, name]["choices"]
                chosen = [of_criteria[c]["rate"] for c in ("loss", "angle") if c in of_criteria]
                row.append(" / ".join(f"{rate:g}" for rate in chosen))
            rows.append(row)
        return Table(
            f"Chosen learning rates, {method}", ["objective", *self.size.data], rows,
            "By training loss / by angle, where there is one. The ends of the grid were there to be chosen.",
        )  # fmt: skip

    def _minimisers(self) -> Table:
        rows = []
        for name in self.objectives:
            row = [name]
            for d in self.overlapping:
                found = self.results[d, METHODS[0], name]["minimisers"]
                row.append(f"{max(f['num_different'] for f in found)} ({max(f['spread'] for f in found):.0e})")
            rows.append(row)
        return Table(
            f"End points of a second-order solver from {NUM_STARTS} random starts that differ",
            ["objective", *self.overlapping],
            rows,
            f"The most over seeds; in brackets the largest distance relative to their norm, which counts beyond "
            f"{SAME_MINIMISER:g}.",
        )


def entries_table(title: str, columns: dict[str, dict[str, Entry]], form: Any, note: str = "") -> Table:
    """Objectives down, settings across: the mean, a mark where a difference was seen, and failures."""
    names: Sequence[str] = list(next(iter(columns.values())))
    rows = [[name, *(cell_text(c[name], form) for c in columns.values())] for name in names]
    return Table(title, ["objective", *columns], rows, note)


def marks_text(num_comparisons: int) -> str:
    """What the marks in tables mean."""
    return (
        'In tables, "better" and "worse" mark differences to cross-entropy where the bootstrap\'s and Student\'s 95 % '
        f"interval and one corrected for the {num_comparisons} comparisons of the column (Bonferroni) exclude zero; "
        'no mark is "no difference seen". Where there is no real difference at all, about one column in twenty has one.'
    )


def cell_text(e: Entry, form: Any) -> str:
    """`4.42 better`, `0.1 (4 of 5)`, `none of 5`."""
    if e.mean is None:
        return f"none of {e.num_runs}"
    mark = f" {e.outcome}" if e.outcome in ("better", "worse") else ""
    failed = f" ({e.num_runs - e.num_failed} of {e.num_runs})" if e.num_failed else ""
    return f"{form(e.mean)}{failed}{mark}"


def _place(cell: Cell) -> tuple[str, str, str]:
    return cell["data"], cell["method"], cell["objective"]
