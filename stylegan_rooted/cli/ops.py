"""`stylegan-rooted ops build|info|clean`: the compiled operators."""

import json

import click

SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=SETTINGS)
def command() -> None:
    """Compile the C++ and CUDA operators ahead of time, show what there is, or remove it.

    They compile by themselves on first use. STYLEGAN_ROOTED_OPS=ref does without them, =native warns if it has to.
    """


@command.command(context_settings=SETTINGS)
def build() -> None:
    """Compile the operators for this machine and print the libraries' paths."""
    from stylegan_rooted import ops

    built = ops.build()
    for path in built.paths:
        click.echo(path)
    for name, problem in built.problems.items():
        click.echo(f"{name}: not compiled: {problem}", err=True)


@command.command(context_settings=SETTINGS)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def info(as_json: bool) -> None:
    """Show what is asked for, the compilers, and where the libraries are or would be."""
    from stylegan_rooted import ops

    record = ops.info()
    if as_json:
        click.echo(json.dumps(record))
        return
    libraries = record.pop("libraries")
    rows = [*record.items(), *((f"{name} {key}", v) for name, lib in libraries.items() for key, v in lib.items())]
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        text = {None: "none", True: "yes", False: "no"}.get(value, value) if not isinstance(value, str) else value
        click.echo(f"{key:<{width}}  {text}")


@command.command(context_settings=SETTINGS)
def clean() -> None:
    """Remove all compiled operators from the cache folder."""
    from stylegan_rooted import ops

    click.echo(f"removed {ops.clean()}", err=True)
