"""`stylegan-rooted finetune`: options in, run directory out."""

import json
from typing import Any

import click

from dnnlib.util import open_regular
from stylegan_rooted.cli import main_process
from stylegan_rooted.cli.options import (
    METRICS_HELP,
    CommaList,
    Field,
    GridSize,
    GroupedCommand,
    GroupedOption,
    IntOrNone,
    Speaker,
    apply_fields,
    config_options,
    detector_fields,
    exit_if_stopped,
    field_options,
    reference_fields,
    repeats_field,
    usage_errors,
)
from training.config import AUG_MODES, KEEP_BEST, ON_DIVERGENCE, PRECISIONS, WANDB_MODES, FinetuneConfig

PL_AUTO = "auto: 2, 0 with --cfg cifar"
MIXING_AUTO = "auto: 0.9, 0 with --cfg cifar"
FIELDS = [
    Field("--data", "data.path", "Folder or zip of training images.", group="Main"),
    Field(
        "--resume",
        "resume",
        "Network file to start from: a path, a URL, or none to train from scratch.",
        group="Main",
        auto="required, unless --resolution, --cfg or --config is given: none",
    ),
    Field("--outdir", "runtime.outdir", "Where run folders are made.", group="Main"),
    Field("--cfg", "cfg", "Base configuration: auto, stylegan2, paper256, paper512, paper1024, cifar.", group="Main"),
    Field("--kimg", "schedule.kimg", "Length in thousands of real images shown; fractions allowed.", float, "Schedule"),
    Field("--tick", "schedule.tick", "Progress is recorded every so many kimg; fractions allowed.", float, "Schedule"),
    Field("--snap", "schedule.snap", "Snapshot (grid, pickle, metrics) every so many ticks.", int, "Schedule"),
    Field(
        "--autosave-min",
        "schedule.autosave_min",
        "Minutes between two training states beside those of the snapshots; 0: after every step.",
        float,
        "Schedule",
    ),
    Field(
        "--keep-last",
        "schedule.keep_last",
        "Keep so many of the newest snapshots; beside them the best and every --keep-every-th.",
        int,
        "Schedule",
        "all",
    ),
    Field("--keep-every", "schedule.keep_every", "Every so many-th snapshot is kept for good.", int, "Schedule", "off"),
    Field(
        "--keep-best",
        "schedule.keep_best",
        "Figure that chooses the best snapshot, which --keep-last spares: auto (FID, or KID where images are too few), "
        "fid, kid; none spares none.",
        click.Choice(list(KEEP_BEST)),
        "Schedule",
    ),
    Field("--loss", "loss.name", "Adversarial objective.", click.Choice(["logistic", "rooted"]), "Objective"),
    Field(
        "--k",
        "loss.k",
        "Root of the rooted loss: a number >= 1, or a:b@kimg for a geometric schedule.",
        str,
        "Objective",
    ),
    Field(
        "--tail",
        "loss.tail",
        "Far-off scores: none (the paper) or linear beyond --tail-at.",
        click.Choice(["none", "linear"]),
        "Objective",
    ),
    Field("--tail-at", "loss.tail_at", "Margin -T beyond which the tail is linear.", float, "Objective"),
    Field(
        "--scale",
        "loss.scale",
        "paper, calibrated (slope 1/2 at 0, as the logistic loss), or a factor.",
        str,
        "Objective",
    ),
    Field(
        "--acts-on",
        "loss.acts_on",
        "Which side the rooted loss trains; the other keeps the logistic loss.",
        click.Choice(["both", "D", "G"]),
        "Objective",
    ),
    Field("--gamma", "loss.gamma", "R1 weight.", float, "Objective", "auto: 0.0002 * resolution^2 / batch"),
    Field("--pl-weight", "loss.pl_weight", "Path-length weight; 0 switches it off.", float, "Objective", PL_AUTO),
    Field("--style-mixing", "loss.style_mixing", "Probability of style mixing.", float, "Objective", MIXING_AUTO),
    Field("--cond", "data.cond", "Train on the labels of dataset.json.", bool, "Data"),
    Field("--subset", "data.subset", "Use only so many images.", int, "Data", "all"),
    Field("--mirror", "data.mirror", "Also show every image mirrored left to right.", bool, "Data"),
    Field("--workers", "data.workers", "Threads that read ahead; 0 reads in step.", int, "Data"),
    Field(
        "--cache-gib",
        "data.cache_gib",
        "Memory for decoded images; where they don't fit, files are read every time (--workers then helps).",
        float,
        "Data",
    ),
    Field(
        "--max-unreadable",
        "data.max_unreadable",
        "Image files that may become unreadable during a run; they are named and replaced by their neighbours.",
        int,
        "Data",
    ),
    Field(
        "--aug",
        "augment.aug",
        "Augmentation: adaptive, fixed probability, or none.",
        click.Choice(list(AUG_MODES)),
        "Augmentation",
    ),
    Field(
        "--augpipe",
        "augment.augpipe",
        "blit, geom, color, filter, noise, cutout, bg, bgc, bgcf, bgcfn, bgcfnc.",
        str,
        "Augmentation",
    ),
    Field("--p", "augment.p", "Probability for --aug fixed.", float, "Augmentation", "unset"),
    Field(
        "--target", "augment.target", "ADA target for the mean sign of real scores.", float, "Augmentation", "auto: 0.6"
    ),
    Field("--p-max", "augment.p_max", "Upper clamp of ADA's p.", float, "Augmentation"),
    Field(
        "--ada-kimg",
        "augment.ada_kimg",
        "kimg in which ADA's p can move by 1.",
        float,
        "Augmentation",
        "auto: 500 from scratch, 100 with --resume",
    ),
    Field("--batch", "optim.batch", "Images per step.", int, "Optimisation", "auto"),
    Field(
        "--batch-gpu", "optim.batch_gpu", "Images in memory at a time; divides --batch.", int, "Optimisation", "auto"
    ),
    Field("--glr", "optim.glr", "Generator learning rate.", float, "Optimisation", "auto: 0.0025, 0.002 from 1024 px"),
    Field("--dlr", "optim.dlr", "Discriminator learning rate.", float, "Optimisation", "auto, as --glr"),
    Field(
        "--g-reg-interval",
        "optim.g_reg_interval",
        "Path length every so many steps; none: every step, with the main loss.",
        IntOrNone(),
        "Optimisation",
    ),
    Field(
        "--d-reg-interval",
        "optim.d_reg_interval",
        "R1 every so many steps; none: every step, with the main loss.",
        IntOrNone(),
        "Optimisation",
    ),
    Field(
        "--ema-kimg", "optim.ema_kimg", "Half-life of G_ema in kimg.", float, "Optimisation", "auto: batch * 10 / 32"
    ),
    Field(
        "--ema-rampup",
        "optim.ema_rampup",
        "Half-life at most this share of the images seen.",
        float,
        "Optimisation",
        "auto: 0.05 from scratch, off with --resume",
    ),
    Field("--freezed", "optim.freezed", "Freeze so many of D's highest-resolution layers.", int, "Optimisation"),
    Field(
        "--train",
        "optim.train",
        "What learns: all, or of freezed:N, freeze-mapping, freeze-synthesis:R (blocks below R pixels), affines, "
        "lora:RANK, separated by commas.",
        str,
        "Optimisation",
    ),
    Field(
        "--max-nonfinite",
        "optim.max_nonfinite",
        "Steps with non-finite gradients that a run survives.",
        int,
        "Optimisation",
    ),
    Field(
        "--on-divergence",
        "optim.on_divergence",
        "When training diverges: say so, go back to the last good state once and then stop, or stop.",
        click.Choice(list(ON_DIVERGENCE)),
        "Optimisation",
    ),
    Field("--metrics", "metric.metrics", METRICS_HELP, CommaList(), "Metrics"),
    *detector_fields("Metrics", "metric."),
    Field("--metric-num", "metric.num", "Generated images per measurement.", int, "Metrics"),
    repeats_field("--metric-repeats", "Metrics", "metric."),
    *reference_fields("Metrics", "metric."),
    Field(
        "--metrics-async",
        "metric.run_async",
        "Measure beside training, in a process of its own (one thread on a CPU).",
        bool,
        "Metrics",
    ),
    Field("--metrics-device", "metric.device", "Device of --metrics-async.", str, "Metrics", "the run's"),
    Field(
        "--metrics-budget",
        "metric.budget",
        "Measure within this share of the training time, e.g. 5%: chooses the number of images, at most --metric-num.",
        str,
        "Metrics",
        "unset",
    ),
    Field(
        "--patience",
        "metric.patience",
        "Stop after so many measurements without a better FID (KID where images are few).",
        int,
        "Metrics",
        "off",
    ),
    Field(
        "--metric-minutes", "metric.max_minutes", "A measurement that takes longer is left out.", float, "Metrics"
    ),
    Field(
        "--resolution",
        "network.resolution",
        "From scratch: pixels per side.",
        int,
        "Network (only with --resume none)",
        "the data's",
    ),
    Field(
        "--cbase",
        "network.channel_base",
        "From scratch: channels are cbase / resolution ...",
        int,
        "Network (only with --resume none)",
        "auto: 16384, 32768 from 512 px",
    ),
    Field("--cmax", "network.channel_max", "... up to this many.", int, "Network (only with --resume none)"),
    Field("--zdim", "network.z_dim", "Width of z.", int, "Network (only with --resume none)"),
    Field("--wdim", "network.w_dim", "Width of w.", int, "Network (only with --resume none)"),
    Field(
        "--map-depth",
        "network.map_depth",
        "Layers of the mapping network.",
        int,
        "Network (only with --resume none)",
        "auto: 2, 8 for the paper's",
    ),
    Field(
        "--mbstd-group",
        "network.mbstd_group",
        "Group of the minibatch standard deviation.",
        int,
        "Network (only with --resume none)",
        "auto: 4",
    ),
    Field("--seed", "runtime.seed", "Seed of every random stream.", int, "Machine"),
    Field("--device", "runtime.device", "auto, cpu, cuda or cuda:N.", str, "Machine"),
    Field("--threads", "runtime.threads", "CPU threads, of each process.", int, "Machine", "all"),
    Field(
        "--rank-timeout",
        "runtime.rank_timeout",
        "Under torchrun: seconds that processes wait for one that does not come before the run ends.",
        float,
        "Machine",
    ),
    Field(
        "--precision",
        "runtime.precision",
        "Of layers' arithmetic: fp32, fp16 (GPU: the blocks that the checkpoint marks), bf16 (all blocks; on a CPU "
        "that has it, faster and less exact), or auto: fp32 on a CPU, as the checkpoint says on a GPU.",
        click.Choice(list(PRECISIONS)),
        "Machine",
    ),
    Field("--fp32", "runtime.fp32", "Short for --precision fp32.", bool, "Machine"),
    Field("--allow-tf32", "runtime.tf32", "TF32 on a GPU: faster, less exact.", bool, "Machine"),
    Field("--nobench", "runtime.nobench", "Switch cuDNN's benchmarking off.", bool, "Machine"),
    Field(
        "--grid",
        "runtime.grid",
        "Columns x rows of the image grids, e.g. 12x6.",
        GridSize(),
        "Schedule",
        "as many as fit 7680x4320",
    ),
    Field("--desc", "runtime.desc", "Text at the end of the run folder's name.", str, "Machine", "unset"),
    Field(
        "--wandb",
        "runtime.wandb",
        "Weights & Biases (extra wandb): offline writes below the run folder, online sends what stats.jsonl holds.",
        click.Choice(WANDB_MODES),
        "Machine",
    ),
]
SCRATCH_ONLY = "Network (only with --resume none)"


@click.command("finetune", cls=GroupedCommand)
@field_options(FIELDS, FinetuneConfig())
@click.option(
    "--restart",
    is_flag=True,
    cls=GroupedOption,
    group="Other",
    help="Start a new run even if the outdir holds one that this command would continue.",
)
@click.option(
    "--estimate",
    "only_estimate",
    is_flag=True,
    cls=GroupedOption,
    group="Other",
    help="Take a few steps in memory, print what the run would take in time, memory and disk, and stop.",
)
@config_options(
    config_help="Read settings from a JSON or YAML file, as --dry-run prints them; options given beside it win.",
    dry_run_help="Print the resolved configuration as JSON and stop; nothing is written.",
)
def command(config_file: str | None, restart: bool, only_estimate: bool, dry_run: bool, **values: Any) -> None:
    """Fine-tune a network pickle on your images, or train from scratch with --resume none.

    The same command in the same outdir continues its run exactly where the last training state was saved.

    \b
    Example:
      stylegan-rooted finetune --data cats.zip --resume ffhq256.pkl --outdir runs --loss rooted --k 2 --kimg 200
    """
    config = read_config(config_file) if config_file else FinetuneConfig()
    config = apply_fields(config, FIELDS, values)
    check_usage(config, dry_run, values)
    from stylegan_rooted import finetune

    with usage_errors():
        finetune.check_options(config)
    if dry_run:
        resolved = finetune.prepare(config).config.to_dict()
        if main_process():
            click.echo(json.dumps(resolved, indent=2))
        return
    if only_estimate:
        forecast = finetune.forecast(config)
        if main_process():
            click.echo(str(forecast))
        return
    speaker = Speaker()
    outcome = finetune.execute(
        config,
        say=speaker.say,
        progress_bar=speaker.progress_bar,
        restart=restart,
        flags={f.target: f.flag for f in FIELDS},
    )
    exit_if_stopped(outcome.stopped_by)


def check_usage(config: FinetuneConfig, dry_run: bool, values: dict[str, Any]) -> None:
    """Options that need each other."""
    ctx = click.get_current_context()
    if not config.data.path:
        raise click.UsageError("missing option --data: a folder or zip of images", ctx)
    if not config.runtime.outdir and not dry_run:
        raise click.UsageError("missing option --outdir: where the run folder is made", ctx)
    if config.resume == "" or (
        values["opt_resume"] is None
        and values["opt_network__resolution"] is None
        and values["opt_cfg"] is None
        and ctx.params["config_file"] is None
    ):
        raise click.UsageError("missing option --resume: a network pickle, or none to train from scratch", ctx)
    for parameter, modes in (("augpipe", ("ada", "fixed")), ("p_max", ("ada",)), ("ada_kimg", ("ada",))):
        if values[f"opt_augment__{parameter}"] is not None and config.augment.aug not in modes:
            option = f"--{parameter.replace('_', '-')}"
            raise click.UsageError(
                f"{option} is for --aug {' or '.join(modes)}, not --aug {config.augment.aug}; drop one", ctx
            )
    if config.resume not in ("none", "noresume"):
        for f in FIELDS:
            if f.group == SCRATCH_ONLY and values[f.parameter] is not None:
                raise click.UsageError(
                    f"{f.flag} is for --resume none: with a checkpoint the architecture comes from it", ctx
                )


def read_config(path: str) -> FinetuneConfig:
    """A configuration from a JSON or YAML file."""
    with open_regular(path) as file:
        content = file.read()
    with usage_errors():
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"--config {path} is not a text file in UTF-8") from None
        if path.lower().endswith((".yaml", ".yml")):
            try:
                import yaml
            except ImportError:
                raise ValueError(
                    f"--config {path}: YAML needs the package pyyaml (pip install pyyaml), or use JSON"
                ) from None
            try:
                values = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError, RecursionError) as e:
                raise ValueError(f"--config {path} is not YAML: {e}") from None
        else:
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"--config {path} is not JSON: {e}") from None
        return FinetuneConfig.from_dict(values)
