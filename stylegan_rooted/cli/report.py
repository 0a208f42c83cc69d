"""`stylegan-rooted report`: runs and networks in; report.html, report.json and report.md out."""

import json
from pathlib import Path
from typing import Any

import click

from stylegan_rooted.cli.finetune import FIELDS as FINETUNE_FIELDS
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
    say,
)
from training.config import MetricConfig

GROUP = "Figures"
FIELDS = [
    Field(
        "--metrics",
        "metrics",
        f"{METRICS_HELP} Where given, all are measured, alike; else those without recorded figures, with",
        CommaList(),
        GROUP,
    ),
    Field("--num", "num", "Generated images.", click.IntRange(min=2), GROUP),
    *detector_fields(GROUP),
]
SHEETS = {"auto": None, "full": True, "none": False}


@click.command("report", cls=GroupedCommand)
@click.argument("subjects", metavar="RUN_DIR|NETWORK...", nargs=-1, required=True)
@click.option(
    "--data",
    cls=GroupedOption,
    group="Main",
    help="Folder or zip of real images.  [default: what the first run was trained on]",
)
@click.option(
    "--outdir",
    cls=GroupedOption,
    group="Main",
    help="Folder for the files.  [default: report in the first run's folder]",
)
@click.option(
    "--before",
    cls=GroupedOption,
    group="Main",
    help="Network that training started from, to be measured too.  [default: none]",
)
@click.option("--title", cls=GroupedOption, group="Main", help="Heading of the page.  [default: from the names]")
@click.option(
    "--credit",
    "credits",
    multiple=True,
    cls=GroupedOption,
    group="Main",
    help="A paragraph about sources and licences; may be given several times.",
)
@click.option(
    "--sheet",
    type=click.Choice(list(SHEETS)),
    default="auto",
    show_default=True,
    cls=GroupedOption,
    group="Main",
    help="Whether to look at every image of the data; auto: up to 5000 of them.",
)
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
    subjects: tuple[str, ...],
    outdir: str | None,
    before: str | None,
    sheet: str,
    as_json: bool,
    data: str | None,
    title: str | None,
    credits: tuple[str, ...],
    seed: int,
    device: str,
    **values: Any,
) -> None:
    """Is it working, when do I stop? One page on runs and networks: report.html, report.json, report.md.

    Run folders are shown with their curves, grids and recorded figures; network files with what they generate. Several
    are set side by side. Parts that are missing or damaged are named and left out.

    \b
    Examples:
      stylegan-rooted report runs/00000-cats
      stylegan-rooted report runs/00000-cats runs/00001-cats --metrics fid,kid,pr
      stylegan-rooted report cats.pkl --data cats.zip --outdir report
    """
    config = apply_fields(MetricConfig(), FIELDS, values)
    from stylegan_rooted import report, report_run

    if outdir is None:
        run = Path(subjects[0]) if report_run.is_run(subjects[0]) else report_run.find_run(subjects[0])
        outdir = str(run / "report") if run is not None else "report"
    wanted = report.Wanted(
        data=data,
        metric_config=config,
        measure="missing" if values["opt_metrics"] is None else "all",
        sheet=SHEETS[sheet],
        credits=credits,
        title=title,
        device=device,
        seed=seed,
        flags={field.target: field.flag for field in FINETUNE_FIELDS},
    )
    facts = report.write(outdir, subjects, wanted, before=before, say=say)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    for subject in facts["subjects"]:
        if subject["run"]:
            answer = subject["run"]["answer"]
            say(f"{subject['name']}: {answer['working']} When to stop: {answer['stop']}")
    say(f"Report: {Path(outdir) / 'report.html'}")
