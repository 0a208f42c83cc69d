"""`stylegan-rooted surgery SRC DEST`: change the shape of a network."""

import json
from dataclasses import asdict
from typing import Any

import click

from stylegan_rooted.cli.options import GroupedCommand, GroupedOption, say, usage_errors


def option(group: str, *names: str, **settings: Any) -> Any:
    """A click option in a group of the help."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


@click.command("surgery", cls=GroupedCommand)
@click.argument("src")
@click.argument("dest")
@option("Image", "--resolution", type=int, help="New resolution: doubled or halved as often as needed.")
@option("Image", "--channels", type=click.Choice(["1", "3", "4"]), help="1 = grey, 3 = RGB, 4 = RGBA.")
@option("Classes", "--classes", type=click.IntRange(0), help="Number of classes; 0 = unconditional.")
@option("Classes", "--keep-class", type=int, help="With --classes 0: the class that remains.")
@option("Classes", "--map-classes", metavar="LIST", help="Old class of each new one, or new, e.g. 0,2,new.")
@option("Layers", "--map-depth", type=click.IntRange(1), help="Mapping layers, where that is exact.")
@option("Layers", "--num-fp16-res", type=click.IntRange(0), help="Highest resolutions that run in float16 on a GPU.")
@option("Layers", "--merge", "adapter", metavar="FILE", help="Add the adapter that finetune --train lora:N wrote.")
@option("Discriminator", "--new-d", is_flag=True, help="A fresh discriminator.")
@option("Discriminator", "--d-from", metavar="FILE", help="A new one, from this file's where names and shapes agree.")
@option("Output", "--grid", metavar="PNG", help="Draw the same latents before and after.")
@option("Output", "--overwrite", is_flag=True, help="Replace DEST and the PNG of --grid if they exist.")
@option("Output", "--seed", type=int, default=0, show_default=True, help="Of new numbers and of the latents measured.")
@option("Output", "--json", "as_json", is_flag=True, help="Print the steps as JSON.")
def command(
    src: str,
    dest: str,
    resolution: int | None,
    channels: str | None,
    classes: int | None,
    keep_class: int | None,
    map_classes: str | None,
    map_depth: int | None,
    num_fp16_res: int | None,
    adapter: str | None,
    new_d: bool,
    d_from: str | None,
    grid: str | None,
    overwrite: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Change the shape of the networks in SRC and write them to DEST.

    Every change follows a written rule (docs/surgery.md) and is exact where that is possible; how far the new images
    and logits are from what the old networks say is measured and printed. The result can be fine-tuned.

    \b
    Examples:
      stylegan-rooted surgery ffhq256.pkl ffhq512.pkl --resolution 512 --grid check.png
      stylegan-rooted surgery cats.pkl cats-by-breed.pkl --classes 12
      stylegan-rooted surgery breeds.pkl two.pkl --map-classes 3,7
      stylegan-rooted surgery photo.pkl drawing.pkl --channels 1
    """
    with usage_errors():
        if not dest.lower().endswith(".pkl"):
            raise ValueError(f"DEST {dest}: surgery writes a snapshot; name a file that ends in .pkl")
        if grid is not None and not grid.lower().endswith(".png"):
            raise ValueError(f"--grid {grid}: name a file that ends in .png")
    from stylegan_rooted import surgery

    with usage_errors():
        class_map = None if map_classes is None else surgery.parse_class_map(map_classes)
        surgery.check_wishes(
            num_classes=classes,
            class_map=class_map,
            keep_class=keep_class,
            side=resolution,
            fresh_d=new_d,
            has_start_d=d_from is not None,
        )
    steps = surgery.run(
        src,
        dest,
        num_channels=None if channels is None else int(channels),
        num_classes=classes,
        class_map=class_map,
        keep_class=keep_class,
        side=resolution,
        depth=map_depth,
        fp16=num_fp16_res,
        adapter=adapter,
        fresh_d=new_d,
        start_d=d_from,
        grid=grid,
        overwrite=overwrite,
        seed=seed,
    )
    for step in steps:
        say(f"{step.what}: {step.rule}")
        view = step.view or "the old image"
        logits = "" if step.logit_error is None else f"; logits differ by {step.logit_error:.2g} (relative)"
        size = f"{step.image_error:.2g}, root mean square {step.image_rms:.2g}"
        say(f"  largest difference to {view}: {size} (images in [-1, 1]){logits}")
    say(f"Wrote {dest}")
    if as_json:
        click.echo(json.dumps([asdict(step) for step in steps], indent=2))
