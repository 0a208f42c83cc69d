"""`stylegan-rooted study`: classifiers with the rooted objective against cross-entropy, paired by seed."""

import os
import sys
from typing import Any

import click

from stylegan_rooted.cli.generate import Seeds
from stylegan_rooted.cli.options import say, usage_errors

NAMES = ("linear", "mlp", "vision")


@click.command("study")
@click.argument("name", type=click.Choice(NAMES), metavar="linear|mlp|vision")
@click.option("--out", default=None, help="Folder of results and report.  [default: study-NAME]")
@click.option("--seeds", type=Seeds(), default="0-4", show_default=True, help="Seeds, at least two, e.g. 0-4.")
@click.option("--full", is_flag=True, help="More data sets, longer training, a finer grid of learning rates: hours.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=None,
    help="Processes, each with one thread.  [default: as many as processors]",
)
def command(name: str, out: str | None, seeds: list[int], full: bool, workers: int | None) -> None:
    """Compare cross-entropy, focal loss, squared error and rooted objectives on classifiers.

    linear: first-order methods on separable and overlapping data. mlp: fully connected networks on digits. vision: a
    small vision transformer and a small residual network on digits and emoji.

    Every objective gets the same search for its learning rate, the same seeds and the same budget. Writes study.json,
    study.md, study.html and figures. Killed and started again, it goes on. Needs the extra `study`.
    """
    from stylegan_rooted.study import run

    out = f"study-{name}" if out is None else out
    with usage_errors():
        study = run.build(name, seeds, full=full)
        run.check_folder(out)
    run.run(study, out, num_workers=workers or os.cpu_count() or 1, bar=progress_bar, say=say)
    click.echo(f"Report:  {os.path.join(out, 'study.html')}")


def progress_bar(length: int) -> Any:
    """With the time left, on stderr; silent where stderr is no terminal."""
    return click.progressbar(
        length=length, label="Cells", file=sys.stderr, show_pos=True, hidden=not sys.stderr.isatty()
    )
