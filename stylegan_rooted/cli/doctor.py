"""`stylegan-rooted doctor`: what this installation and machine can do."""

import json
import sys

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(as_json: bool) -> None:
    """Examine the installation and the machine, and say what would help where something is missing.

    Looks at versions, devices, driver, compiler, compiled operators, second derivatives, precisions, memory, disk,
    detector files and which `torch_utils` Python finds. Changes nothing. The text is made to be pasted into a report;
    it holds paths and variables of this machine. Exit code 0 without problems, else 1.
    """
    from stylegan_rooted import doctor

    findings = doctor.examine()
    record = doctor.as_record(findings)
    click.echo(json.dumps(record) if as_json else doctor.as_text(findings))
    if not record["healthy"]:
        sys.exit(1)
