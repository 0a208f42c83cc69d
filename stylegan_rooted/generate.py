"""Images of a network: one PNG per seed, or a grid. Knows network pickles and pixels; knows no data set and no metric.

Every image is made alone, in a batch of one: to the last bit it depends on its seed and the options, and nothing else.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylegan_rooted.finetune import check_outdir, resolve_device
from torch_utils import images, seeding
from training import execution, network_file
from training.dataset import ImageDataset, check_fits
from training.network_pickle import NetworkFile

NOISE_MODES = ("const", "random", "none")
MAX_SEED = 2**32 - 1  # NumPy's RandomState takes no more
MAX_SEEDS = 1_000_000
BLANK = 255

Say = Callable[[str], None]


def parse_seeds(text: str) -> list[int]:
    """Seeds from `0-3`, `1,5,7-9` and the like, in the order given.

    Raises:
        ValueError: Unreadable, a range that runs backwards, a seed out of [0, 2^32), no seed or too many.
    """
    seeds: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, re.ASCII)
        if match is None:
            raise ValueError(f"--seeds {text}: {part.strip()!r} is neither a seed nor a range; write 0-31 or 1,5,7-9")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise ValueError(f"--seeds {text}: the range {part.strip()} runs backwards; write {last}-{first}")
        if last > MAX_SEED:
            raise ValueError(f"--seeds {text}: {last} is above {MAX_SEED}")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise ValueError(f"--seeds {text}: more than {MAX_SEEDS} seeds; ask for fewer at a time")
        seeds.extend(range(first, last + 1))
    return seeds


def check_trunc(trunc: float) -> float:
    """Return the truncation psi.

    Raises:
        ValueError: Not finite.
    """
    if not math.isfinite(trunc):
        raise ValueError(f"--trunc {trunc} is not a finite number; 1 is the whole distribution, 0.7 plays safe")
    return trunc


@dataclass(frozen=True)
class Loaded:
    """A generator ready to run: G_ema of a file in eval mode on its device; on a CPU all of it in float32.

    `notes` are sentences on what the file did not say and was assumed or estimated.
    """

    G: torch.nn.Module
    device: torch.device
    path: str
    sha256: str
    kind: str = ""
    notes: tuple[str, ...] = ()


def open_network(network: str | Path, device: str | torch.device = "auto", *, say: Say | None = None) -> Loaded:
    """Load the moving average of the generator (path or URL; see docs/formats.md); nothing in the file is executed.

    Args:
        network: Path or URL.
        device: Where to compute.
        say: Receives what the file did not say and was assumed or estimated.

    Raises:
        ValueError: No such device, or not a file of StyleGAN2 networks.
        OSError: The file cannot be read.
    """
    device = resolve_device(str(device))
    opened = network_file.load(network)
    if say is not None:
        for note in opened.notes:
            say(f"Note: {network}: {note}")
    return ready(opened, device)


def ready(opened: NetworkFile, device: torch.device) -> Loaded:
    """The generator of an opened file, ready to run."""
    G = execution.freeze(execution.accelerate(opened.G_ema.eval().requires_grad_(False).to(device)))
    return Loaded(G, device, str(opened.path), opened.sha256, opened.kind, opened.notes)


def check_data(loaded: Loaded, dataset: ImageDataset) -> None:
    """Refuse data that does not fit a network.

    Raises:
        DatasetError: Resolution, channels or labels differ; one line with both sides and what would fix it.
    """
    G: Any = loaded.G
    check_fits(
        resolution=dataset.resolution,
        num_channels=dataset.num_channels,
        label_dim=dataset.label_dim,
        want_resolution=G.img_resolution,
        want_channels=G.img_channels,
        want_label_dim=G.c_dim,
        data=dataset.path,
        network=loaded.path,
    )


def class_label(loaded: Loaded, class_index: int | None, say: Say | None = None) -> torch.Tensor:
    """The label [1, c_dim] of one class; [1, 0] for an unconditional network, which ignores a class with a warning.

    Raises:
        ValueError: A conditional network without a class, or a class that it does not have.
    """
    c_dim = int(loaded.G.c_dim)  # type: ignore[arg-type]
    label = torch.zeros([1, c_dim])
    if not c_dim:
        if class_index is not None and say is not None:
            say(f"Warning: --class {class_index} is ignored: {loaded.path} knows no classes")
        return label
    if class_index is None:
        raise ValueError(f"{loaded.path} is conditional: choose a class with --class 0 to --class {c_dim - 1}")
    if not 0 <= class_index < c_dim:
        raise ValueError(f"--class {class_index} is out of range: {loaded.path} has the classes 0 to {c_dim - 1}")
    label[0, class_index] = 1
    return label


def latent(seed: int, z_dim: int) -> torch.Tensor:
    """z of a seed, float32 [1, z_dim]: one float64 draw of NumPy's RandomState, as in the StyleGAN2-ADA family."""
    return torch.from_numpy(np.random.RandomState(seed).randn(1, z_dim)).to(torch.float32)


@torch.inference_mode()
def render(
    loaded: Loaded, seed: int, label: torch.Tensor, *, trunc: float = 1.0, noise_mode: str = "const"
) -> torch.Tensor:
    """The image of one seed.

    Args:
        seed: Of z (see `latent`) and of random noise.
        label: [1, c_dim].
        trunc: Truncation psi; 1 is none.
        noise_mode: `const` takes the network's own noise, `random` fresh noise keyed by the seed, `none` no noise.

    Returns:
        uint8 [C, H, W] on the CPU, by the family's truncation rule (spec training-and-metrics 8.13).

    Raises:
        ValueError: Unknown noise mode, or the network gives non-finite pixels.
    """
    if noise_mode not in NOISE_MODES:
        raise ValueError(f"--noise-mode {noise_mode} is unknown; one of {', '.join(NOISE_MODES)}")
    z = latent(seed, int(loaded.G.z_dim))  # type: ignore[arg-type]
    with seeding.scoped(seed, "generate", "noise"):
        x = loaded.G(z.to(loaded.device), label.to(loaded.device), truncation_psi=trunc, noise_mode=noise_mode)
    if not torch.isfinite(x).all():
        raise ValueError(
            f"{loaded.path} gives non-finite pixels for seed {seed}: its weights are broken; take another snapshot"
        )
    return images.to_uint8(x[0], rounding="truncate").cpu()


def write_images(
    loaded: Loaded,
    seeds: Iterable[int],
    outdir: str | Path,
    *,
    class_index: int | None = None,
    trunc: float = 1.0,
    noise_mode: str = "const",
    say: Say | None = None,
) -> Iterator[Path]:
    """Write `outdir/seedNNNN.png` for every seed, yielding each path when its file is complete.

    Raises:
        ValueError, OSError: See `class_label`, `render`, `check_outdir`; raised before the first image where possible.
    """
    check_trunc(trunc)
    label = class_label(loaded, class_index, say)
    check_outdir(str(outdir))
    Path(outdir).mkdir(parents=True, exist_ok=True)
    return _write_images(loaded, seeds, Path(outdir), label, trunc, noise_mode)


def _write_images(
    loaded: Loaded, seeds: Iterable[int], outdir: Path, label: torch.Tensor, trunc: float, noise_mode: str
) -> Iterator[Path]:
    for seed in seeds:
        path = outdir / f"seed{seed:04d}.png"
        images.save_png(path, render(loaded, seed, label, trunc=trunc, noise_mode=noise_mode))
        yield path


def grid_shape(num_images: int, cols: int | None, rows: int | None) -> tuple[int, int]:
    """(columns, rows) that hold so many images; what is None is chosen, columns first and at most 8.

    Raises:
        ValueError: The given shape is too small.
    """
    if cols is None:
        cols = min(num_images, 8) if rows is None else math.ceil(num_images / rows)
    if rows is None:
        rows = math.ceil(num_images / cols)
    if cols * rows < num_images:
        raise ValueError(
            f"{num_images} seeds don't fit --cols {cols} x --rows {rows}; leave out --rows or give fewer seeds"
        )
    return cols, rows


def write_grid(
    loaded: Loaded,
    seeds: Sequence[int],
    out: str | Path,
    size: tuple[int, int],
    *,
    class_index: int | None = None,
    trunc: float = 1.0,
    noise_mode: str = "const",
    labels: bool = False,
    say: Say | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write one PNG with the images of the seeds, row by row; cells without a seed stay white.

    Args:
        size: (columns, rows), see `grid_shape`.
        labels: Write each image's seed above it.
        progress: Called with 1 after every image.

    Raises:
        ValueError, OSError: As `write_images`.
    """
    check_trunc(trunc)
    label = class_label(loaded, class_index, say)
    out = Path(out)
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder; name a PNG file")
    check_outdir(str(out.parent), option="--out: folder")
    tiles = []
    for seed in seeds:
        tiles.append(render(loaded, seed, label, trunc=trunc, noise_mode=noise_mode))
        if progress is not None:
            progress(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    cols, rows = size
    tiles += [torch.full_like(tiles[0], BLANK)] * (cols * rows - len(tiles))
    captions = [str(seed) for seed in seeds] + [""] * (cols * rows - len(seeds)) if labels else None
    images.save_png(out, draw(torch.stack(tiles), size, captions))
    return out


def draw(tiles: torch.Tensor, size: tuple[int, int], captions: Sequence[str] | None = None) -> np.ndarray:
    """Tile uint8 images [cols * rows, C, H, W] into one [C, H', W'], with a caption above each where given."""
    cols, rows = size
    if captions is None:
        return images.from_pil(images.draw_grid(tiles, size))
    strips = [
        images.from_pil(
            images.draw_grid(
                tiles[row * cols : (row + 1) * cols],
                (cols, 1),
                images.GridLabels(cols=captions[row * cols : (row + 1) * cols]),
            )
        )
        for row in range(rows)
    ]
    height = max(strip.shape[1] for strip in strips)
    strips = [np.pad(s, [(0, 0), (0, height - s.shape[1]), (0, 0)], constant_values=BLANK) for s in strips]
    return np.concatenate(strips, axis=1)
