"""`stylegan-rooted generate`: seeds in, PNG files out."""

import sys
from collections.abc import Callable
from typing import Any

import click

from stylegan_rooted.cli.options import GroupedCommand, GroupedOption, say, usage_errors
from training.config import RuntimeConfig

NOISE_MODES = ["const", "random", "none"]


class Seeds(click.ParamType):
    """`0-31`, `1,5,7-9`: a list of whole numbers."""

    name = "SEEDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        from stylegan_rooted.generate import parse_seeds

        if isinstance(value, list):
            return value
        with usage_errors():
            return parse_seeds(value)


class Finite(click.ParamType):
    """A finite number."""

    name = "FLOAT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = click.FLOAT.convert(value, param, ctx)
        if not abs(number) < float("inf"):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Device(click.ParamType):
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    name = "DEVICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        with usage_errors():
            return RuntimeConfig(device=value).device


def image_options(function: Callable) -> Callable:
    """The options that `generate` and `grid` share beside --network and --seeds."""
    for option in reversed(
        [
            click.option(
                "--trunc",
                type=Finite(),
                default=1.0,
                show_default=True,
                cls=GroupedOption,
                group="Images",
                help="Truncation psi: 1 is everything the network can do, 0.7 plays safe.",
            ),
            click.option(
                "--class",
                "class_index",
                type=click.IntRange(min=0),
                cls=GroupedOption,
                group="Images",
                help="Class to draw; conditional networks need it.",
            ),
            click.option(
                "--noise-mode",
                type=click.Choice(NOISE_MODES),
                default="const",
                show_default=True,
                cls=GroupedOption,
                group="Images",
                help="Noise inputs: the network's own, fresh ones keyed by the seed, or none.",
            ),
            click.option(
                "--device",
                type=Device(),
                default="auto",
                show_default=True,
                cls=GroupedOption,
                group="Machine",
                help="auto, cpu, cuda or cuda:N.",
            ),
        ]
    ):
        function = option(function)
    return function


@click.command("generate", cls=GroupedCommand)
@click.option("--network", required=True, cls=GroupedOption, group="Main", help="Network file: a path or URL.")
@click.option(
    "--seeds", type=Seeds(), required=True, cls=GroupedOption, group="Main", help="Seeds, e.g. 0-31 or 1,5,7-9."
)
@click.option("--outdir", required=True, cls=GroupedOption, group="Main", help="Folder for seedNNNN.png.")
@image_options
def command(
    network: str, seeds: list[int], outdir: str, trunc: float, class_index: int | None, noise_mode: str, device: str
) -> None:
    """Write one PNG per seed.

    An image depends on its seed and these options only, never on its neighbours.

    \b
    Example:
      stylegan-rooted generate --network snapshot.pkl --seeds 0-31 --trunc 0.7 --outdir out
    """
    from stylegan_rooted import generate

    seeds = list(dict.fromkeys(seeds))
    generate.check_outdir(outdir)
    loaded = generate.open_network(network, device, say=say)
    paths = generate.write_images(
        loaded, seeds, outdir, class_index=class_index, trunc=trunc, noise_mode=noise_mode, say=say
    )
    with image_bar(len(seeds)) as bar:
        for _ in paths:
            bar.update(1)
    say(f"Wrote {len(seeds)} image{'s' if len(seeds) != 1 else ''} to {outdir}")


def image_bar(length: int) -> Any:
    """A progress bar on stderr; silent where stderr is no terminal."""
    return click.progressbar(length=length, label="Generating", file=sys.stderr, hidden=not sys.stderr.isatty())
