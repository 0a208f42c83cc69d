"""`stylegan-rooted dataset`: build a data set from images, and tell what is in one."""

import json
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from stylegan_rooted.build_options import FITS, LABELS, RESIZE_FILTERS, TRANSFORMS, BuildOptions

FOUND_SOMETHING = 3


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look at images, build a training zip from them, tell what is in one."""


@command.command()
@click.argument("source", type=click.Path())
@click.argument("dest", type=click.Path(), metavar="DEST.zip")
@click.option("--resolution", type=int, required=True, metavar="N",
              help="Side of the images, a power of two from 4 up.")
@click.option("--transform", type=click.Choice(list(TRANSFORMS)), default=BuildOptions.transform, show_default=True,
              help="; ".join(f"{name}: {what}" for name, what in TRANSFORMS.items()) + ".")
@click.option("--fit", type=click.Choice(list(FITS)), help="The same in short: crop, pad or stretch.")
@click.option("--resize-filter", type=click.Choice(RESIZE_FILTERS), default=BuildOptions.resize_filter,
              show_default=True, help="Filter for resizing; it is recorded in the zip.")
@click.option("--background", default=BuildOptions.background, show_default=True, metavar="COLOUR",
              help="Behind transparent pixels and padding: white, black, grey or #rrggbb.")
@click.option("--rgb", "channels", flag_value="rgb", help="Write colour images.")
@click.option("--grey", "channels", flag_value="grey", help="Write grey images.  [default: where all are grey]")
@click.option("--rgba", "channels", flag_value="rgba", help="Keep transparency: colour and alpha.")
@click.option("--labels", type=click.Choice(list(LABELS)), default=BuildOptions.labels, show_default=True,
              help="; ".join(f"{name}: {what}" for name, what in LABELS.items()) + ".")
@click.option("--max-images", type=int, metavar="N", help="Stop after N images.  [default: all]")
@click.option("--overwrite", is_flag=True, help="Replace DEST.zip if it exists.")
def build(source: str, dest: str, channels: str | None, fit: str | None, overwrite: bool, **options: Any) -> None:
    """Crop and resize the images of SOURCE (a folder, searched recursively, or a zip) into DEST.zip.

    Palette, transparent, CMYK, 16-bit and EXIF-rotated images are converted. Files that can't be used are left out
    and listed at the end with the reason.
    """
    options["channels"] = channels or "auto"
    if fit is not None:
        chosen = click.get_current_context().get_parameter_source("transform") is not ParameterSource.DEFAULT
        if chosen and options["transform"] != FITS[fit]:
            raise click.UsageError(f"--fit {fit} is --transform {FITS[fit]}, not {options['transform']}; give one")
        options["transform"] = FITS[fit]
    try:
        BuildOptions(**options)
    except ValueError as err:
        raise click.UsageError(str(err)) from err
    if not dest.lower().endswith(".zip"):
        raise click.UsageError(f"DEST is {dest}; it must end in .zip")
    from stylegan_rooted import dataset_tool

    if sys.stderr.isatty():
        with click.progressbar(length=1, label="Building", file=sys.stderr) as bar:

            def advance(done: int, total: int) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            result = dataset_tool.build(source, dest, overwrite=overwrite, progress=advance, **options)
    else:
        result = dataset_tool.build(source, dest, overwrite=overwrite, **options)

    _list_skipped(result.skipped)
    kind = {1: "grey", 4: "RGBA"}.get(result.num_channels, "RGB")
    classes = f", {len(result.classes)} classes" if result.classes else ""
    size = f"{result.resolution}x{result.resolution}"
    click.echo(f"Wrote {result.num_written} {kind} images of {size}{classes} to {result.dest}", err=True)
    if result.num_enlarged:
        click.echo(f"Note: {result.num_enlarged} of them were smaller and had to be enlarged.", err=True)


@command.command()
@click.argument("data", type=click.Path())
def info(data: str) -> None:
    """Print what DATA (a folder or zip) holds, as one JSON object."""
    from training.dataset import ImageDataset, open_source, read_meta

    meta = read_meta(open_source(data))
    dataset = ImageDataset(data, use_labels=meta.get("labels") is not None)
    record = {
        "name": dataset.name,
        "num_images": len(dataset),
        "resolution": dataset.resolution,
        "num_channels": dataset.num_channels,
        "label_dim": dataset.label_dim,
        "fingerprint": dataset.fingerprint(),
        "build": meta.get("build"),
    }
    click.echo(json.dumps(record, indent=2))


@command.command()
@click.argument("data", type=click.Path())
@click.option("--resolution", type=click.IntRange(4), metavar="N", help="Name images smaller than N pixels.")
@click.option("--html", metavar="FILE", help="Write a sheet with thumbnails of each finding.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(data: str, resolution: int | None, html: str | None, as_json: bool) -> None:
    """Look for what spoils training in DATA (a folder, searched recursively, or a zip).

    Unreadable files, duplicates and near duplicates, small or enlarged images, bars, grey among colour, odd shapes and
    kinds of pixels, unbalanced classes, and whether --mirror is safe. Exit code 0: nothing found; 3: something was.
    """
    if html is not None and not html.lower().endswith((".html", ".htm")):
        raise click.UsageError(f"--html {html}: name a file that ends in .html")
    from stylegan_rooted import dataset_check, report_data
    from training.run_dir import write_atomic

    if sys.stderr.isatty():
        with click.progressbar(length=1, label="Looking", file=sys.stderr) as bar:

            def advance(done: int, total: int) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            found = dataset_check.check(data, resolution=resolution, progress=advance)
    else:
        found = dataset_check.check(data, resolution=resolution)
    for finding in found.findings:
        click.echo(printable(f"{finding.severity}: {finding.title}"), err=True)
        click.echo(printable(f"  {finding.advice}"), err=True)
    sides = found.mirror["verdict"]
    sides += " to tell whether --mirror is safe" if sides == "too few images" else ""
    click.echo(f"{found.num_images} of {found.num_files} files can be used; {sides}", err=True)
    if html is not None:
        write_atomic(Path(html), report_data.render(found))
        click.echo(f"Wrote {html}", err=True)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    if not found.clean:
        sys.exit(FOUND_SOMETHING)


def printable(text: str) -> str:
    """One line that a terminal can show."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _list_skipped(skipped: list[tuple[str, str]]) -> None:
    if not skipped:
        return
    skipped = [(printable(name), reason) for name, reason in skipped]
    width = max(len(name) for name, _ in skipped)
    click.echo(f"Left out {len(skipped)} file{'s' if len(skipped) > 1 else ''}:", err=True)
    for name, reason in skipped:
        click.echo(f"  {name:<{width}}  {reason}", err=True)
