"""`stylegan-rooted grid`: seeds in, one PNG with rows and columns out."""

import click

from stylegan_rooted.cli.generate import Seeds, image_bar, image_options
from stylegan_rooted.cli.options import GroupedCommand, GroupedOption, say, usage_errors

COLS, ROWS = 8, 4


@click.command("grid", cls=GroupedCommand)
@click.option("--network", required=True, cls=GroupedOption, group="Main", help="Network file: a path or URL.")
@click.option("--out", required=True, cls=GroupedOption, group="Main", help="PNG file to write.")
@click.option(
    "--seeds",
    type=Seeds(),
    cls=GroupedOption,
    group="Main",
    help="Seeds, e.g. 0-31 or 1,5,7-9.  [default: 0, 1, 2, ... to fill the grid]",
)
@click.option(
    "--cols",
    type=click.IntRange(1, 256),
    cls=GroupedOption,
    group="Main",
    help=f"Columns.  [default: {COLS}; with --seeds no more than needed]",
)
@click.option(
    "--rows",
    type=click.IntRange(1, 256),
    cls=GroupedOption,
    group="Main",
    help=f"Rows.  [default: {ROWS}; with --seeds as many as needed]",
)
@click.option("--labels", is_flag=True, cls=GroupedOption, group="Images", help="Write its seed above every image.")
@image_options
def command(
    network: str,
    out: str,
    seeds: list[int] | None,
    cols: int | None,
    rows: int | None,
    labels: bool,
    trunc: float,
    class_index: int | None,
    noise_mode: str,
    device: str,
) -> None:
    """Write one PNG with rows and columns of images; cells without a seed stay white.

    \b
    Example:
      stylegan-rooted grid --network snapshot.pkl --cols 8 --rows 4 --trunc 0.7 --labels --out grid.png
    """
    if not out.lower().endswith(".png"):
        raise click.UsageError(
            f"--out {out}: the grid is a PNG; name a file that ends in .png", click.get_current_context()
        )
    from stylegan_rooted import generate

    if seeds is None:
        seeds = list(range((cols or COLS) * (rows or ROWS)))
        cols, rows = cols or COLS, rows or ROWS
    with usage_errors():
        size = generate.grid_shape(len(seeds), cols, rows)
    loaded = generate.open_network(network, device, say=say)
    with image_bar(len(seeds)) as bar:
        generate.write_grid(
            loaded,
            seeds,
            out,
            size,
            class_index=class_index,
            trunc=trunc,
            noise_mode=noise_mode,
            labels=labels,
            say=say,
            progress=bar.update,
        )
    say(f"Wrote {out}: {size[0]} columns, {size[1]} rows")
