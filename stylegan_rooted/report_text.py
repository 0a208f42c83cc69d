"""The report as Markdown, from the same facts as the page; pictures are named, not shown. Strings are escaped."""

import html
import re
from collections.abc import Sequence
from typing import Any

from stylegan_rooted.report_charts import number
from stylegan_rooted.report_page import table_of

SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!])")


def render(facts: dict[str, Any]) -> str:
    """The whole report."""
    lines = [f"# {text(facts['title'])}", "", f"{text(facts['created'])}, stylegan-rooted "
             f"{text(facts['environment']['versions']['stylegan-rooted'])}", ""]  # fmt: skip
    missing = [*facts["missing"], *(line for s in facts["subjects"] for line in s["missing"])]
    lines += _list("Before you believe the figures", facts["warnings"]) + _list("What is missing", missing)
    if facts["compare"]:
        lines += _compare(facts)
    for subject in facts["subjects"]:
        lines += _subject(subject)
    if facts["meaning"]:
        lines += [text(facts["meaning"]), ""]
    if facts["data"]:
        lines += _data(facts["data"])
    lines += _list("Credits and licences", facts["credits"])
    lines += ["## This report", ""] + _table(["what", "version"], list(facts["environment"]["versions"].items()))
    return "\n".join(lines).rstrip() + "\n"


def text(value: Any) -> str:
    """A string as Markdown shows it: one line, nothing in it a mark."""
    return html.escape(SPECIAL.sub(r"\\\1", " ".join(str(value).split())), quote=False)


def _subject(subject: dict[str, Any]) -> list[str]:
    before = " (before)" if subject["role"] == "before" else ""
    lines = [f"## {text(subject['name'])}{before}", "", text(subject["path"]), ""]
    run, origin = subject["run"], subject["origin"]
    if run:
        total = f" of {number(run['total_kimg'])}" if run["total_kimg"] else ""
        lines += [
            f"* Is it working? {text(run['answer']['working'])}",
            f"* When do I stop? {text(run['answer']['stop'])}",
            f"* {text(run['status'])}, at {number(run['kimg'])}{total} kimg; watchdog: {text(run['state'])}"
            + (f" ({text(run['evidence'])})" if run["evidence"] else ""),
            "",
        ]
    rows = [("base model", origin["base"]), ("its SHA-256", origin["base_sha256"])]
    rows += [("its licence", origin["base_licence"]), ("licence of these weights", origin["licence"])]
    rows += [(f"data: {key}", value) for key, value in (origin["data"] or {}).items()]
    rows += [(f"network: {key}", value) for key, value in (subject["network"] or {}).items() if value not in ([], "")]
    lines += ["### What was trained", "", *_table(["what", "value"], [row for row in rows if row[1] is not None])]
    if run:
        lines += _run(run)
    lines += ["### What came out", "", *_figures(subject["figures"])]
    nearest = subject["pictures"].get("nearest")
    if nearest:
        pairs = [
            (p["seed"], p["file"], number(p["relative"] if p["relative"] is not None else p["distance"]))
            for p in nearest["pairs"]
        ]
        lines += ["Closest to training images (1 is the usual distance within the data):", ""]
        lines += _table(["seed", "training image", "distance"], pairs)
    return lines


def _run(run: dict[str, Any]) -> list[str]:
    options = [(o["name"], o["value"], o["default"] if o["default"] is not None else "unknown") for o in run["options"]]
    lines = ["### How", "", *_table(["option", "value", "default"], options), "### How it went", ""]
    if run["states"]:
        lines += ["Watchdog: " + ", ".join(f"{state} from {number(kimg)} kimg" for kimg, state in run["states"]), ""]
    for chart in run["charts"]:
        table = table_of(chart)
        first, last = table.rows[0], table.rows[-1]
        lines += [f"**{text(chart['title'])}.** {text(chart['sentence'])}", ""]
        lines += _table(table.names, [first] if first == last else [first, last])
    again = run["reproduce"]
    lines += ["### How to reproduce it", ""]
    lines += [f"    {line}" for line in (again["command"], again["config_command"]) if line]
    rows = [("seed", again["seed"]), ("data fingerprint", again["data_fingerprint"])]
    rows += [("base model's SHA-256", again["base_sha256"]), *again["versions"].items()]
    return [*lines, "", *_table(["what", "value"], [row for row in rows if row[1] is not None])]


def _figures(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["No figures: nothing was measured.", ""]
    cells = [
        (
            row["label"] + (" (go by this one)" if row["headline"] else ""),
            number(row["value"]) + (f" ± {row['std_error']:.2g}" if row["std_error"] is not None else ""),
            "" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}",
            row["source"],
            row["warning"] or "",
        )
        for row in rows
    ]
    return _table(["figure", "value", "95 % interval", "source", "warning"], cells)


def _compare(facts: dict[str, Any]) -> list[str]:
    compare = facts["compare"]
    lines = ["## How they compare", ""] + _list("Figures that do not compare", compare["problems"])
    cells = []
    for row in compare["rows"]:
        values = [row["figures"].get(name) for name in compare["names"]]
        cells.append(
            (
                row["name"],
                row["state"] or "",
                "" if row["kimg"] is None else number(row["kimg"]),
                *("" if v is None else number(v["value"]) + _error(v) for v in values),
            )
        )
    lines += _table(["name", "state", "kimg", *(compare["labels"][name] for name in compare["names"])], cells)
    if compare["options"]:
        names = [s["name"] for s in facts["subjects"] if s["run"]]
        lines += _table(["option", *names], [(o["name"], *o["values"]) for o in compare["options"]])
    return lines


def _data(data: dict[str, Any]) -> list[str]:
    keys = ("path", "num_images", "resolution", "num_channels", "label_dim", "fingerprint")
    lines = ["## The data", "", *_table(["what", "value"], [(key, data[key]) for key in keys])]
    if data["check"]:
        rows = [(f"{kind}: {name}", num) for kind in ("sizes", "modes", "classes") for name, num in data["check"][kind]]
        rows.append(("left and right", data["check"]["mirror"]["verdict"]))
        lines += _table(["what", "value"], rows)
        found = [f"{f['severity']}: {f['title']}. {f['advice']}" for f in data["check"]["findings"]]
        lines += _list("Findings", found or ["None: nothing stands in the way of training."])
    return lines


def _error(row: dict[str, Any]) -> str:
    return f" ± {row['std_error']:.2g}" if row["std_error"] is not None else ""


def _list(title: str, rows: Sequence[str]) -> list[str]:
    return [f"**{title}**", "", *(f"* {text(row)}" for row in rows), ""] if rows else []


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    lines = [names, ["---"] * len(names), *([text(cell) for cell in row] for row in rows)]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]
