"""`stylegan-rooted metrics`: figures of a network, with their errors."""

import json
from typing import Any

import click

from stylegan_rooted.cli.generate import Device
from stylegan_rooted.cli.options import (
    METRICS_HELP,
    CommaList,
    Field,
    GroupedCommand,
    GroupedOption,
    apply_fields,
    detector_fields,
    field_options,
    reference_fields,
    repeats_field,
    say,
    usage_errors,
)
from training.config import MetricConfig

FIELDS = [
    Field("--metrics", "metrics", METRICS_HELP, CommaList(), "Figures"),
    Field("--num", "num", "Generated images of the short names.", click.IntRange(min=2), "Figures"),
    repeats_field("--repeats", "Figures"),
    *reference_fields("Figures"),
    *detector_fields("Detector"),
]


@click.command("metrics", cls=GroupedCommand)
@click.option("--network", required=True, cls=GroupedOption, group="Main", help="Network file: a path or URL.")
@click.option("--data", required=True, cls=GroupedOption, group="Main", help="Folder or zip of real images.")
@click.option(
    "--subset",
    type=click.IntRange(min=1),
    cls=GroupedOption,
    group="Main",
    help="The network was trained on so many of them: memorisation looks among those.  [default: all]",
)
@click.option("--mirror", type=bool, default=False, cls=GroupedOption, group="Main", help="... and on their mirrors.")
@click.option("--json", "as_json", is_flag=True, cls=GroupedOption, group="Main", help="Print JSON on stdout.")
@field_options(FIELDS, MetricConfig())
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    cls=GroupedOption,
    group="Figures",
    help="Seed of the generated images, and of --subset.",
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
    subset: int | None,
    mirror: bool,
    as_json: bool,
    seed: int,
    device: str,
    **values: Any,
) -> None:
    """Measure a network against data: FID, KID, precision, recall, copies, ..., each with its error and provenance.

    Where the pickle lies in its run folder, the figures are also added to the metric-NAME.jsonl files there.

    \b
    Example:
      stylegan-rooted metrics --network cats.pkl --data cats.zip --metrics fid,kid,pr,memorisation --num 5000
    """
    config = apply_fields(MetricConfig(), FIELDS, values)
    if config.metrics == ("none",):
        raise click.UsageError("--metrics none measures nothing; name some, e.g. --metrics fid,kid")
    with usage_errors():
        config.check_use()
    from stylegan_rooted import measure

    records = measure.run(network, data, config, subset=subset, mirror=mirror, seed=seed, device=device, say=say)
    if as_json:
        click.echo(json.dumps(records, indent=2))
