"""The HTML page of a report: one file that fetches nothing. Knows facts, pictures and the template.

Every string of the facts is escaped. The page's only script and style are its own, allowed by their digests.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from stylegan_rooted.report_charts import Chart, Series, chart, number
from stylegan_rooted.report_pictures import Picture

ASSETS = Path(__file__).parent / "assets"
MAX_TABLE_ROWS = 24


def render(facts: dict[str, Any], pictures: Mapping[str, Picture], *, refresh_sec: int | None = None) -> str:
    """The page; with `refresh_sec` it asks the server that it came from for news so often."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"num": _number, "when": _when, "pairs": _pairs}
    template = environment.from_string((ASSETS / "report.html.jinja").read_text(encoding="utf-8"))
    style, script = ((ASSETS / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return template.render(
        report=facts,
        pictures=pictures,
        picture_bytes=sum(len(picture.data) for picture in pictures.values()),
        policy=policy(live=refresh_sec is not None),
        style=style,
        script=script,
        refresh_sec=refresh_sec,
        version=version(facts),
        lay_out=lay_out,
        table_of=table_of,
        first_words=first_words,
    )


def policy(*, live: bool = False) -> str:
    """The Content-Security-Policy: nothing from anywhere but the page's own style, script and pictures."""
    digests = {}
    for kind in ("css", "js"):
        content = (ASSETS / f"report.{kind}").read_bytes()
        digests[kind] = f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
    parts = ["default-src 'none'", "img-src data:", f"style-src {digests['css']}", f"script-src {digests['js']}"]
    parts += ["connect-src 'self'"] if live else []
    return "; ".join([*parts, "base-uri 'none'", "form-action 'none'"])


def version(facts: dict[str, Any]) -> str:
    """A digest of everything shown but the time of writing."""
    shown = {key: value for key, value in facts.items() if key not in ("created", "environment")}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def lay_out(facts: dict[str, Any]) -> Chart | None:
    """The geometry of a chart's facts."""
    series = [
        Series(s["name"], [(x, y) for x, y in s["points"]], (s["style"] - 1) % 6 + 1, s["reference"], s["errors"])
        for s in facts["series"]
    ]
    return chart(facts["title"], series, log=facts["log"], lowest=facts["lowest"])


@dataclass(frozen=True)
class Table:
    """A chart's numbers as text: column names, rows, and how many rows there would be."""

    names: list[str]
    rows: list[list[str]]
    num: int

    @property
    def thinned(self) -> bool:
        return self.num > len(self.rows)


def table_of(facts: dict[str, Any]) -> Table:
    """The numbers behind a chart, evenly thinned to `MAX_TABLE_ROWS`, the first and the last among them."""
    columns = [
        {x: (y, error) for (x, y), error in zip(s["points"], [*s["errors"], *[None] * len(s["points"])])}
        for s in facts["series"]
    ]
    kimgs = sorted({x for column in columns for x in column})
    kept = kimgs
    if len(kimgs) > MAX_TABLE_ROWS:
        kept = [kimgs[round(i * (len(kimgs) - 1) / (MAX_TABLE_ROWS - 1))] for i in range(MAX_TABLE_ROWS)]
    rows = [[number(x), *(_cell(*column.get(x, (None, None))) for column in columns)] for x in kept]
    return Table(["kimg", *(s["name"] for s in facts["series"])], rows, len(kimgs))


def first_words(text: str) -> tuple[str, str]:
    """The answer, and what follows it."""
    match = re.match(r"(.*?)(?:: |\. )(.*)", text, re.DOTALL)
    if match is None:
        return text, ""
    rest = match[2]
    return match[1], rest[:1].upper() + rest[1:]


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return number(value) + (f" ({number(value - error)} to {number(value + error)})" if error is not None else "")


def _number(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def _when(value: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(value)) if isinstance(value, int | float) else str(value)


def _pairs(rows: list[list[Any]]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in rows[:12]) + (" …" if len(rows) > 12 else "")
