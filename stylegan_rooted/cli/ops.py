"""`stylegan-rooted ops build|info|clean`: the compiled operators."""

import json

import click

SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=SETTINGS)
def command() -> None:
    """Compile the C++ operators ahead of time, show what there is, or remove it.

    They run where STYLEGAN_ROOTED_OPS=native is set, which compiles them by itself on first use, too.
    """


@command.command(context_settings=SETTINGS)
def build() -> None:
    """Compile the operators for this machine and print the library's path."""
    from stylegan_rooted import ops

    click.echo(ops.build())


@command.command(context_settings=SETTINGS)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def info(as_json: bool) -> None:
    """Show what is asked for, the compiler, and where the library is or would be."""
    from stylegan_rooted import ops

    record = ops.info()
    if as_json:
        click.echo(json.dumps(record))
        return
    width = max(map(len, record))
    for key, value in record.items():
        text = {None: "none", True: "yes", False: "no"}.get(value, value) if not isinstance(value, str) else value
        click.echo(f"{key:<{width}}  {text}")


@command.command(context_settings=SETTINGS)
def clean() -> None:
    """Remove all compiled operators from the cache folder."""
    from stylegan_rooted import ops

    click.echo(f"removed {ops.clean()}", err=True)
