"""A page of text, tables and figures, as Markdown and as one self-contained HTML file. Knows no study."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

TEMPLATE = "study.html.jinja"
ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """`figures/NAME.png` and `.svg` beside the page."""

    title: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs and points of a list, then tables and figures."""

    title: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    blocks: Sequence[Table | Figure] = ()


@dataclass(frozen=True)
class Page:
    """A title with sections."""

    title: str
    sections: Sequence[Section]


def markdown(page: Page) -> str:
    """The page as Markdown; figures are linked."""
    lines = [f"# {page.title}", ""]
    for section in page.sections:
        lines += [f"## {section.title}", ""]
        for paragraph in section.paragraphs:
            lines += [paragraph, ""]
        lines += [*(f"- {point}" for point in section.points), *([""] if section.points else [])]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += [f"**{block.title}** {block.note}".rstrip(), ""]
                lines += [_row(block.header), _row(["---"] * len(block.header)), *map(_row, block.rows), ""]
            else:
                caption = f"{block.title}. {block.note}".rstrip()
                lines += [f"![{block.title}](figures/{block.name}.png)", "", caption, ""]
    return "\n".join(lines)


def html(page: Page, folder: Path) -> str:
    """The page as HTML that needs nothing else; `folder` holds `figures/`."""
    pictures = {
        block.name: base64.b64encode((folder / "figures" / f"{block.name}.png").read_bytes()).decode()
        for section in page.sections
        for block in section.blocks
        if isinstance(block, Figure)
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE).render(page=page, pictures=pictures)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
