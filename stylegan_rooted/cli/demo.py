"""`stylegan-rooted demo`: what `make demo` runs."""

import click

from stylegan_rooted.cli.generate import Device
from stylegan_rooted.cli.options import Speaker

DEFAULT_KIMG = 16.0


@click.command("demo")
@click.option("--outdir", default="demo-run", show_default=True, help="Where the run folder is made.")
@click.option(
    "--kimg",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT_KIMG,
    show_default=True,
    help="Thousands of images to train on; more gives better images.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every random stream.")
@click.option(
    "--device", type=Device(), default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
@click.option("--restart", is_flag=True, help="Train anew, even if the outdir holds a run to go on with.")
def command(outdir: str, kimg: float, seed: int, device: str, restart: bool) -> None:
    """Fine-tune the embedded 32x32 network on Twemoji with the rooted loss: grids, FD/KD before and after, report.

    Needs the extra `demo` (pip install 'stylegan-rooted[demo]') and nothing else: no GPU, no download, no compiler.
    """
    from stylegan_rooted import demo

    speaker = Speaker()
    result = demo.run(
        outdir,
        kimg=kimg,
        seed=seed,
        device=device,
        say=speaker.say,
        progress_bar=speaker.progress_bar,
        restart=restart,
    )
    click.echo(f"Images:  {result.run_path}  (reals.png, fakes_init.png, fakes*.png)")
    click.echo(f"Report:  {result.report_path / 'report.html'}")
