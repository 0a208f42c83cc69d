"""`stylegan-rooted inspect FILE`: what is in a network file, without executing it."""

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(file: str, as_json: bool) -> None:
    """Tell what is in FILE (a path, URL or folder) without executing anything in it.

    Shows the format, the networks with their sizes and settings, the recorded data set and training options, the
    functions and classes the file asks for, the digest of embedded source text, and two verdicts: whether the file is
    safe (nothing outside the format's allow-list) and whether it loads here. Hostile and damaged files are described,
    too; exit code 0.
    """
    from stylegan_rooted.inspect import format_report, inspect_file

    report = inspect_file(file)
    click.echo(report.as_json() if as_json else format_report(report))
