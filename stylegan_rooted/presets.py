"""Fills every "auto" of a configuration from the checkpoint and the data. Pure arithmetic; knows nothing of torch.

Values: spec training-and-metrics.md section 3 (the family's `--cfg` presets).
"""

from dataclasses import dataclass, replace
from typing import Any

from training.config import FinetuneConfig

CPU_PIXELS_PER_STEP = 16 * 64 * 64
ADA_TARGET = 0.6


@dataclass(frozen=True)
class Preset:
    """One row of the preset table; `auto` computes its row from the resolution."""

    batch: int
    ref_gpus: int
    mbstd: int
    fmaps: float
    lr: float
    gamma: float
    ema_kimg: float
    ema_rampup: float | None
    map_depth: int
    pl_weight: float = 2.0
    style_mixing: float = 0.9
    d_architecture: str = "resnet"


PRESETS = {
    "stylegan2": Preset(32, 8, 4, 1, 0.002, 10, 10, None, 8),
    "paper256": Preset(64, 8, 8, 0.5, 0.0025, 1, 20, None, 8),
    "paper512": Preset(64, 8, 8, 1, 0.0025, 0.5, 20, None, 8),
    "paper1024": Preset(32, 8, 4, 1, 0.002, 2, 10, None, 8),
    "cifar": Preset(64, 2, 32, 1, 0.0025, 0.01, 500, 0.05, 2, 0.0, 0.0, "orig"),
}
CFG_NAMES = ("auto", *PRESETS)


@dataclass(frozen=True)
class Checkpoint:
    """What presets need to know of a checkpoint; None in its place means training from scratch."""

    resolution: int
    mbstd_group: int | None


def auto_preset(resolution: int, num_gpus: int = 1) -> Preset:
    """The `auto` row: batch, widths, learning rate and gamma that suit a resolution (spec section 3).

    The family knows powers of two; for other numbers of GPUs the batch is rounded down so that every GPU gets as many
    whole groups of the minibatch standard deviation.
    """
    batch = max(min(num_gpus * min(4096 // resolution, 32), 64), num_gpus)
    per_round = num_gpus * min(batch // num_gpus, 4)
    batch = batch // per_round * per_round
    return Preset(
        batch=batch,
        ref_gpus=num_gpus,
        mbstd=min(batch // num_gpus, 4),
        fmaps=1 if resolution >= 512 else 0.5,
        lr=0.002 if resolution >= 1024 else 0.0025,
        gamma=0.0002 * resolution**2 / batch,
        ema_kimg=batch * 10 / 32,
        ema_rampup=0.05,
        map_depth=2,
    )


def resolve(
    config: FinetuneConfig, *, resolution: int, checkpoint: Checkpoint | None, device: str, num_gpus: int = 1
) -> FinetuneConfig:
    """Return `config` with every None that means "auto" replaced by a number.

    Args:
        config: What the user asked for.
        resolution: Of the data, in pixels per side.
        checkpoint: Of `--resume`; None for `--resume none`.
        device: Resolved device, "cpu" or "cuda…".
        num_gpus: Processes; CPUs count as GPUs here.

    Raises:
        ValueError: An unknown `--cfg`, a batch that the minibatch standard deviation cannot be split into, or one that
            does not give every process something to do.
    """
    if config.cfg not in CFG_NAMES:
        raise ValueError(f"--cfg {config.cfg} is unknown; one of {', '.join(CFG_NAMES)}")
    preset = auto_preset(resolution, num_gpus) if config.cfg == "auto" else PRESETS[config.cfg]
    batch = config.optim.batch or preset.batch
    batch_gpu = config.optim.batch_gpu or min(
        batch, default_batch_gpu(preset, batch, resolution, device, num_gpus)
    )
    if batch % batch_gpu:
        raise ValueError(f"--batch {batch} is not a multiple of --batch-gpu {batch_gpu}")
    if batch // batch_gpu < num_gpus:
        raise ValueError(
            f"--batch {batch} with --batch-gpu {batch_gpu} is work for {batch // batch_gpu} of the {num_gpus} "
            "processes; use a larger --batch, a smaller --batch-gpu or fewer processes"
        )
    group = checkpoint.mbstd_group if checkpoint else (config.network.mbstd_group or min(preset.mbstd, batch_gpu))
    if group is not None and batch_gpu % min(group, batch_gpu):
        raise ValueError(
            f"--batch {batch} gives {batch_gpu} images at a time, which the discriminator's groups of {group} "
            f"do not divide; use a multiple of {group}"
        )
    auto = config.cfg == "auto"  # its formulas take the batch that is used, not the one they would propose
    gamma = _first(config.loss.gamma, 0.0002 * resolution**2 / batch if auto else preset.gamma)
    ema_kimg = _first(config.optim.ema_kimg, batch * 10 / 32 if auto else preset.ema_kimg)
    scratch = checkpoint is None
    network, exact = config.network, config.runtime.precision == "fp32"
    if scratch:
        network = replace(
            network,
            resolution=network.resolution or resolution,
            channel_base=network.channel_base or int(preset.fmaps * 32768),
            map_depth=network.map_depth or preset.map_depth,
            mbstd_group=group,
            d_architecture=preset.d_architecture if config.cfg == "cifar" else network.d_architecture,
            num_fp16_res=_first(network.num_fp16_res, 0 if device == "cpu" or exact else 4),
            conv_clamp=None if exact else network.conv_clamp,
        )
    return replace(
        config,
        network=network,
        loss=replace(
            config.loss,
            gamma=gamma,
            pl_weight=_first(config.loss.pl_weight, preset.pl_weight),
            style_mixing=_first(config.loss.style_mixing, preset.style_mixing),
        ),
        augment=replace(
            config.augment,
            target=_first(config.augment.target, ADA_TARGET if config.augment.aug == "ada" else None),
            ada_kimg=config.augment.ada_kimg or (500.0 if scratch else 100.0),
        ),
        optim=replace(
            config.optim,
            batch=batch,
            batch_gpu=batch_gpu,
            glr=config.optim.glr or preset.lr,
            dlr=config.optim.dlr or preset.lr,
            ema_kimg=ema_kimg,
            ema_rampup=_first(config.optim.ema_rampup, preset.ema_rampup if scratch else None),
        ),
    )


def default_batch_gpu(preset: Preset, batch: int, resolution: int, device: str, num_gpus: int = 1) -> int:
    """Images in memory at a time: the preset's share of one reference GPU; on a CPU also bounded by pixels."""
    share = max(preset.batch // preset.ref_gpus, 1)
    if device == "cpu":
        share = max(min(share, CPU_PIXELS_PER_STEP // resolution**2), 4)
    share = min(share, max(batch // num_gpus, 1))
    while batch % share:
        share -= 1
    return share


def _first(given: Any, automatic: Any) -> Any:
    """What the user gave, else the automatic value; 0 counts as given."""
    return automatic if given is None else given
