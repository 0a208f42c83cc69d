"""The HTML sheet of `dataset check`: findings with thumbnails, in one file that needs nothing else."""

from pathlib import Path

import jinja2

from stylegan_rooted.dataset_check import Check

TEMPLATE = Path(__file__).parent / "assets" / "check.html.jinja"
MAX_NAMES = 200  # of one finding that are listed


def render(found: Check) -> str:
    """The page; every string of the data set is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(check=found, max_names=MAX_NAMES)
