"""`stylegan-rooted convert SRC DEST`: a network file in another format."""

from typing import Any

import click

from stylegan_rooted.cli.options import GroupedCommand, GroupedOption, say, usage_errors
from stylegan_rooted.convert_options import DTYPES, FORMATS, PARTS, ConvertOptions, choose_format


@click.command("convert", cls=GroupedCommand)
@click.argument("source", metavar="SRC")
@click.argument("dest", metavar="DEST")
@click.option("--to", type=click.Choice(list(FORMATS)), cls=GroupedOption, group="Main",
              help="Format of DEST.  [default: by its ending: .pkl, .safetensors, / (folder), .pt (rosinality), "
              ".onnx, .pt2 (torch-export)]")
@click.option("--overwrite", is_flag=True, cls=GroupedOption, group="Main", help="Replace DEST if it exists.")
@click.option("--only-ema", is_flag=True, cls=GroupedOption, group="Content",
              help="Leave G and D out: enough to make images, a third of the size.")
@click.option("--dtype", type=click.Choice(DTYPES), default=ConvertOptions.dtype, show_default=True, cls=GroupedOption,
              group="Content", help="Of the weights, for safetensors and folder; float16 halves the size.")
@click.option("--part", type=click.Choice(PARTS), default=ConvertOptions.part, show_default=True, cls=GroupedOption,
              group="Content", help="What onnx and torch-export compute: images of z, ws of z, images of ws.")
@click.option("--any-channels", is_flag=True, cls=GroupedOption, group="Content",
              help="For rosinality: also widths that its table of channels does not have, for code with another one.")
@click.option("--licence", cls=GroupedOption, group="Model card", help="Of these weights, e.g. Apache-2.0.")
@click.option("--base-model", cls=GroupedOption, group="Model card",
              help="Name of the model that training started from.  [default: what the run folder records]")
@click.option("--base-licence", cls=GroupedOption, group="Model card", help="Licence of the base model.")
def command(source: str, dest: str, to: str | None, licence: str | None, **options: Any) -> None:
    """Write the networks of SRC (a path, URL or folder) to DEST in another format.

    SRC may be a pickle of StyleGAN2-ADA, of the StyleGAN3 repository's StyleGAN2 or of the TensorFlow code, a
    rosinality checkpoint, a state dict of torch.save, a safetensors file, or a folder with model.safetensors. Nothing
    in it is executed. What is lost, assumed or estimated is said; graphs are compared with the network before they
    stay.

    \b
    Examples:
      stylegan-rooted convert old.pkl new.safetensors --only-ema
      stylegan-rooted convert runs/00000-x/network-snapshot-000200.pkl my-model/ --licence CC-BY-4.0
      stylegan-rooted convert network.pkl generator.onnx
    """
    given = {"weights": licence, "base_model": options.pop("base_model"), "base_licence": options.pop("base_licence")}
    settings = ConvertOptions(**options, licences={key: value for key, value in given.items() if value})
    with usage_errors():
        settings.check(choose_format(dest, to))
    from stylegan_rooted import convert

    for path in convert.convert(source, dest, to, settings, say=say):
        say(f"Wrote {path} ({path.stat().st_size} bytes)")
