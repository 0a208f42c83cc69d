"""Runs that take a second: their images and their configuration."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from training.config import (
    AugmentConfig,
    DataConfig,
    FinetuneConfig,
    LossConfig,
    MetricConfig,
    NetworkConfig,
    OptimConfig,
    RuntimeConfig,
    ScheduleConfig,
)

NUM_PICTURES = 12


def write_pictures(folder: Path, num: int = NUM_PICTURES, side: int = 8) -> Path:
    """Random RGB images, 00.png and on, of two labelled classes; returns the folder."""
    draw = np.random.RandomState(0)
    names = [f"{i:02d}.png" for i in range(num)]
    for name in names:
        Image.fromarray(draw.randint(0, 256, [side, side, 3], dtype=np.uint8)).save(folder / name)
    labels = [[name, i % 2] for i, name in enumerate(names)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def tiny(pictures: Path, outdir: Path, **changes) -> FinetuneConfig:
    """A new network's first four steps, with nothing on that can be off; `changes` as for `FinetuneConfig.replace`."""
    return FinetuneConfig(
        data=DataConfig(path=str(pictures)),
        network=NetworkConfig(channel_base=64, channel_max=8, z_dim=8, w_dim=8),
        loss=LossConfig(name="logistic"),
        augment=AugmentConfig(aug="noaug"),
        optim=OptimConfig(batch=4),
        schedule=ScheduleConfig(kimg=0.016, tick=0.008, snap=1),
        metric=MetricConfig(metrics=("none",)),
        runtime=RuntimeConfig(outdir=str(outdir), device="cpu", grid=(2, 2), rank_timeout=20),
    ).replace(**changes)


def quiet(text: str) -> None:
    """Says nothing."""
