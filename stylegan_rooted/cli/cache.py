"""`stylegan-rooted cache list|clear`: statistics of data sets, downloads, compiled operators."""

import dataclasses
import json

import click

SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=SETTINGS)
def command() -> None:
    """Show or clear what is kept on disk: features of data sets, downloads, compiled operators.

    The folder is ~/.cache/stylegan-rooted, or the one that STYLEGAN_ROOTED_CACHE names.
    """


@command.command("list", context_settings=SETTINGS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def list_entries(as_json: bool) -> None:
    """List the files, their size and, for statistics, what they were computed from."""
    from stylegan_rooted import cache

    found = cache.entries()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(entry) for entry in found], indent=2))
        return
    for entry in found:
        click.echo(f"{entry.num_bytes / 2**20:9.2f} MiB  {entry.age_days:6.1f} days  {entry.part:<14} {entry.what}")
    total = sum(entry.num_bytes for entry in found) / 2**20
    click.echo(f"{len(found)} files, {total:.2f} MiB in {cache.root()}", err=True)


@command.command(context_settings=SETTINGS)
@click.option("--all", "everything", is_flag=True, help="Remove downloads and compiled operators too.")
def clear(everything: bool) -> None:
    """Remove the statistics of data sets; they are computed anew when they are needed."""
    from stylegan_rooted import cache

    num_files, num_bytes = cache.clear(everything=everything)
    click.echo(f"removed {num_files} files, {num_bytes / 2**20:.2f} MiB", err=True)
