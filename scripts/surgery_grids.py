"""Draw what surgery does: one row of images per change of the embedded network, the same latents in every row.

Every row is made by the command `surgery` on a file, read back from the file it wrote, and enlarged by repetition to
the largest resolution. Prints how far each is from the old images (rows below "exact" are rounding).

Usage: python scripts/surgery_grids.py [docs/surgery.png]
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from stylegan_rooted import surgery  # noqa: E402
from stylegan_rooted.surgery_rules import samples  # noqa: E402
from torch_utils import images  # noqa: E402
from training import network_file  # noqa: E402

SOURCE = ROOT / "stylegan_rooted" / "assets" / "emoji32.pkl"
NUM_IMAGES = 10
SEED = 0
CHANGES: dict[str, list[dict[str, Any]]] = {  # what is asked for, one command after the other
    "before": [],
    "--channels 1": [{"num_channels": 1}],
    "--channels 4": [{"num_channels": 4}],
    "--channels 1, then 3": [{"num_channels": 1}, {"num_channels": 3}],
    "--classes 3": [{"num_classes": 3}],
    "--map-classes 2,new": [{"num_classes": 3}, {"class_map": [2, None]}],
    "--classes 0": [{"num_classes": 3}, {"num_classes": 0, "keep_class": 1}],
    "--num-fp16-res 2": [{"fp16": 2}],
    "--resolution 64": [{"side": 64}],
    "--resolution 16": [{"side": 16}],
}


def changed(wishes: list[dict[str, Any]], folder: Path) -> tuple[Any, float, float]:
    """(the generator after these commands, largest difference and largest root mean square that the commands told)."""
    path, worst, rms = SOURCE, 0.0, 0.0
    for number, wish in enumerate(wishes):
        dest = folder / f"{number}.pkl"
        steps = surgery.run(str(path), str(dest), overwrite=True, seed=SEED, **wish)
        worst = max([worst, *(step.image_error for step in steps)])
        rms = max([rms, *(step.image_rms for step in steps)])
        path = dest
    return network_file.load(path).G_ema, worst, rms


def main(dest: str) -> None:
    """Draw and print."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, wishes in CHANGES.items():
            G, worst, rms = changed(wishes, Path(folder))
            img = images.opaque(images.to_uint8(samples(G, NUM_IMAGES, SEED))).expand(-1, 3, -1, -1)
            rows.append(img)
            size = f"{G.img_resolution} px, {G.img_channels} channels, {G.c_dim} classes"
            print(f"{name:<22} {size}: largest {worst:.2g}, root mean square {rms:.2g}")
    side = max(img.shape[-1] for img in rows)
    rows = [img.repeat_interleave(side // img.shape[2], 2).repeat_interleave(side // img.shape[3], 3) for img in rows]
    images.save_grid(dest, torch.cat(rows), (NUM_IMAGES, len(rows)), images.GridLabels(list(CHANGES), None))
    print(f"{dest}: {Path(dest).stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "docs" / "surgery.png"))
