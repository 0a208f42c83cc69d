"""`stylegan-rooted report`: a network and data in, report.json and report.html out."""

import json
from typing import Any

import click

from stylegan_rooted.cli.generate import Device
from stylegan_rooted.cli.options import (
    CommaList,
    Field,
    GroupedCommand,
    GroupedOption,
    apply_fields,
    field_options,
    say,
)
from training.config import DETECTORS, MetricConfig

GROUP = "Figures"
FIELDS = [
    Field("--num", "num", "Generated images.", click.IntRange(min=2), GROUP),
    Field("--metrics", "metrics", "Comma list of fid, kid; or none.", CommaList(), GROUP),
    Field(
        "--detector",
        "detector",
        "Feature network; embedded ships with this software and gives FD and KD.",
        click.Choice(list(DETECTORS)),
        GROUP,
    ),
    Field(
        "--detector-mode",
        "detector_mode",
        "Resizing of the inception detector.",
        click.Choice(["clean", "legacy_tensorflow"]),
        GROUP,
    ),
    Field(
        "--detector-file", "detector_file", "Weights of the detector, instead of its own place.", str, GROUP, "unset"
    ),
]


@click.command("report", cls=GroupedCommand)
@click.option("--network", required=True, cls=GroupedOption, group="Main", help="Network file: a path or URL.")
@click.option("--data", required=True, cls=GroupedOption, group="Main", help="Folder or zip of real images.")
@click.option(
    "--outdir", required=True, cls=GroupedOption, group="Main", help="Folder for report.json and report.html."
)
@click.option(
    "--before",
    cls=GroupedOption,
    group="Main",
    help="Pickle that training started from, to be measured too.  [default: none]",
)
@click.option("--title", cls=GroupedOption, group="Main", help="Heading of the page.  [default: from the names]")
@click.option(
    "--json", "as_json", is_flag=True, cls=GroupedOption, group="Main", help="Also print report.json on stdout."
)
@field_options(FIELDS, MetricConfig())
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    cls=GroupedOption,
    group=GROUP,
    help="Seed of the generated images and of the subsets.",
)
@click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    cls=GroupedOption,
    group="Machine",
    help="auto, cpu, cuda or cuda:N.",
)
def command(
    network: str,
    data: str,
    outdir: str,
    before: str | None,
    title: str | None,
    as_json: bool,
    seed: int,
    device: str,
    **values: Any,
) -> None:
    """Measure a network against data; write report.json (provenance included) and report.html.

    Where the pickle lies in its run folder, the page also shows the run's grids and curves.

    \b
    Example:
      stylegan-rooted report --network runs/00000-cats/network-snapshot-000200.pkl --data cats.zip --outdir report
    """
    config = apply_fields(MetricConfig(), FIELDS, values)
    from stylegan_rooted import report

    result = report.write(
        outdir,
        network=network,
        data=data,
        metric_config=config,
        before=before,
        title=title,
        device=device,
        seed=seed,
        say=say,
    )
    if as_json:
        click.echo(json.dumps(result, indent=2))
    say(f"Report: {outdir.rstrip('/')}/report.html")
