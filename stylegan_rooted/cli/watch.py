"""`stylegan-rooted watch`: a run's report in the browser while it trains, a line in the terminal."""

import threading
from pathlib import Path

import click

from stylegan_rooted.cli.finetune import FIELDS
from stylegan_rooted.cli.options import say


@click.command("watch")
@click.argument("run_dir")
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65535),
    default=8765,
    show_default=True,
    help="Of 127.0.0.1; 0 takes a free one.",
)
@click.option(
    "--refresh",
    type=click.FloatRange(min=1, max=3600),
    default=10,
    show_default=True,
    help="Seconds after which the page and the line may change.",
)
@click.option("--once", is_flag=True, help="Print the line on stdout and end; no server.")
@click.option("--terminal", is_flag=True, help="Print the line whenever it changes; no server.")
def command(run_dir: str, port: int, refresh: float, once: bool, terminal: bool) -> None:
    """Serve the report of a run on this machine, refreshed as the run goes; print its state in one line.

    Reads the small files of the run's folder and nothing else, measures and generates nothing, and does not disturb
    the run. Ctrl-C ends it.

    \b
    Examples:
      stylegan-rooted watch runs/00000-cats
      stylegan-rooted watch runs/00000-cats --once
    """
    if once and terminal:
        raise click.UsageError("--once and --terminal exclude each other; drop one")
    from stylegan_rooted import watch

    watched = watch.Watched(Path(run_dir), refresh_sec=refresh, flags={field.target: field.flag for field in FIELDS})
    if once:
        click.echo(watched.pages().line)
        return
    ended = threading.Event()
    server = None
    if not terminal:
        server = watch.serve(watched, port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        say(f"Report: {server.url}  (this machine only; Ctrl-C ends)")
    try:
        watch.follow(watched, say, stop=ended.wait, refresh_sec=refresh)
    except KeyboardInterrupt:
        say("Ended; the run goes on.")
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
