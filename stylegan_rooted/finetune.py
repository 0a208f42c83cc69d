"""Set up a fine-tuning run from its configuration and let `training.training_loop` train it."""

import os
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib import EasyDict
from metrics.evaluate import MetricResult
from metrics.features import MetricUnavailable
from stylegan_rooted import __version__, estimate, evaluation, losses, measuring, presets, resume, scalars
from stylegan_rooted.surgery_rules import discriminator_for
from torch_utils import distributed, images, misc, seeding
from torch_utils.distributed import DistEnv, Place, ProcessFailed
from torch_utils.ops import allocator
from training import checkpoint, data_record, execution, measured, network_file, run_dir, watchdog
from training.ada import AdaController
from training.adapters import LowRankAdapters
from training.augment import AUGMENT_PRESETS, AugmentPipe
from training.config import (
    MIN_RESOLUTION,
    AugmentConfig,
    FinetuneConfig,
    LossConfig,
    NetworkConfig,
    parse_train,
)
from training.dataset import ImageDataset, InfiniteSampler, UnreadableImages, check_fits, grid_indices, iterate_batches
from training.diversity import Comparison
from training.loss import GanLoss
from training.network_pickle import NetworkFile
from training.networks import Discriminator, Generator
from training.phases import build_phases
from training.stats import Scalar, StatsCollector
from training.trainable import generator_parameters
from training.training_loop import (
    ADA_INTERVAL,
    Grid,
    Progress,
    RollBack,
    Run,
    TrainingDiverged,
    render_grid,
    save_state,
    shared_images,
    shared_state,
    train,
)

Say = Callable[[str], None]
MACHINE_OPTIONS = ("data.path", "data.workers", "data.cache_gib", "runtime.outdir", "runtime.threads", "runtime.device")


@dataclass(frozen=True)
class Outcome:
    """How `execute` ended.

    Attributes:
        path: The run's folder.
        stopped_by: Name of the signal that stopped the training; None where it is over.
        signal: Name of a signal that came, also where training was over by then: no more work is wanted.
    """

    path: Path
    stopped_by: str | None = None
    signal: str | None = None


def run(
    config: FinetuneConfig,
    *,
    say: Say,
    progress_bar: Callable[..., Any] | None = None,
    restart: bool = False,
) -> Path:
    """Fine-tune as `config` says; returns the run directory. See `execute`."""
    return execute(config, say=say, progress_bar=progress_bar, restart=restart).path


def execute(
    config: FinetuneConfig,
    *,
    say: Say,
    progress_bar: Callable[..., Any] | None = None,
    restart: bool = False,
    flags: Mapping[str, str] | None = None,
) -> Outcome:
    """Fine-tune as `config` says, or go on with the run in its outdir that the same configuration began.

    Under torchrun every process calls this; they compute one run together, and only rank 0 writes and speaks.

    Args:
        config: Options; every None is resolved here from checkpoint and data.
        say: Receives lines for people.
        progress_bar: Context-manager factory `progress_bar(length)` with `.update(n)`; None shows none.
        restart: Start a new run whatever is in the outdir.
        flags: Names of the command line's options by field, for messages.

    Raises:
        ValueError, OSError: Something the user can mend; what had been saved is untouched.
        TrainingDiverged: See `training_loop.train`.
        ProcessFailed: Another process failed; the message is empty in all but one.
    """
    where = distributed.place()
    device = resolve_device(config.runtime.device, where)
    with distributed.start(where, device, timeout_sec=config.runtime.rank_timeout) as env:
        return run_process(config, env, say=say, progress_bar=progress_bar, restart=restart, flags=flags)


def run_process(
    config: FinetuneConfig,
    env: DistEnv,
    *,
    say: Say,
    progress_bar: Callable[..., Any] | None = None,
    restart: bool = False,
    flags: Mapping[str, str] | None = None,
) -> Outcome:
    """This process's part of `execute`."""
    if not env.is_main:
        say, progress_bar = silence, None
    with env.together("preparing"):
        plan = prepare(config, env)
    env.require_equal(plan.identity(), "at the start; all machines need the same options and files")
    configure_torch(plan.config, plan.device)
    opened: resume.Opened | None = None
    with env.together("opening the run folder"):
        if env.is_main:
            opened = resume.open_run(plan.wanted(), restart=restart, say=say, flags=flags)
    try:
        opened = resume.shared(opened, env)
        if opened.how == resume.FINISHED:
            say(opened.note)
            return Outcome(opened.path)
        return _train(plan, opened, say, progress_bar)
    finally:
        if opened is not None and opened.lock is not None:
            opened.lock.release()


def _train(plan: "Plan", opened: resume.Opened, say: Say, progress_bar: Callable[..., Any] | None) -> Outcome:
    """Build the run in its folder, train it, and keep its history."""
    path, env = opened.path, plan.env
    try:
        say(f"Run folder: {path}")
        say(describe_machine(env))
        for note in plan.checkpoint.notes if plan.checkpoint else ():
            say(f"Checkpoint: {note}")
        with env.together("building the networks"):
            training_run = build_run(plan, path, state=opened.state, say=say)
            if opened.state is None:
                checkpoint.seed_random_streams(plan.config.runtime.seed)
            if env.is_main:
                rewind(training_run, opened)
                if opened.state is None:
                    write_start(training_run, plan)
            say(describe_start(plan, opened))
            if training_run.snapshot_nimg < 1000:
                say(
                    f"A snapshot every {training_run.snapshot_nimg / 1000:g} kimg: files are named by whole kimg, so "
                    "snapshots within one kimg replace each other"
                )
            hooks = RunHooks(training_run, say, progress_bar)
        env.broadcast_tensors(shared_state(training_run))
    except BaseException:
        if env.is_main and opened.how == resume.NEW:
            shutil.rmtree(path, ignore_errors=True)  # nothing of worth is in it before the first step
        raise
    progress = training_run.progress
    log = partial(resume.log_event, path) if env.is_main else lambda *args, **facts: None
    state_name = opened.state_path.name if opened.state_path else None
    log(opened.how, progress.cur_nimg, state=state_name, environment=run_dir.environment(plan.device))
    try:
        with estimate.advice(training_run), flushed_denormals(), hooks, catch_signals(hooks):
            train_with_rollback(training_run, hooks, say, log)
    except BaseException as error:
        with suppress(OSError):  # the disk may be full
            log("failed", progress.cur_nimg, reason=" ".join(f"{type(error).__name__}: {error}".split()))
        say_what_is_saved(path, error, say if env.is_main else silence)
        raise
    if progress.cur_nimg < progress.total_nimg:
        reason = hooks.stop_requested or resume.PATIENCE
        log("stopped", progress.cur_nimg, reason=reason)
        goes_on = "the same command goes on" if hooks.stop_requested else "a larger --patience, or none, trains on"
        say(f"Stopped by {reason} at {progress.cur_nimg / 1000:g} kimg; {goes_on}")
        return Outcome(path, hooks.stop_requested, hooks.stop_requested)
    log(resume.FINISHED, progress.cur_nimg)
    say(f"Done: {path}")
    return Outcome(path, signal=hooks.stop_requested)


def train_with_rollback(run: Run, hooks: "RunHooks", say: Say, log: Callable[..., None]) -> None:
    """`training_loop.train`; where it asks to go back, go back and train on."""
    while True:
        try:
            return train(run, hooks)
        except RollBack as e:
            reason, nimg = str(e), run.progress.cur_nimg
        roll_back(run, reason)
        log("rolled back", run.progress.cur_nimg, reason=reason, diverged_nimg=nimg)
        say(
            f"Training diverged at {nimg / 1000:g} kimg ({reason}): back to the state of "
            f"{run.progress.cur_nimg / 1000:g} kimg, once, with other random draws from there on"
        )


def roll_back(run: Run, reason: str) -> None:
    """Put a run back, in place, to its newest state of a tick that was not diverging; later states are removed.

    Raises:
        TrainingDiverged: There is no such state.
    """
    env = run.env
    opened: resume.Opened | None = None
    with env.together("going back to the last good state"):
        if env.is_main:
            opened = resume.last_good(run.path)
    opened = env.broadcast(opened)
    if opened is None or opened.state is None:
        raise env.everywhere(TrainingDiverged(f"{reason}; there is no earlier state to go back to"))
    run.unreadable.names.clear()
    checkpoint.restore(run, opened.state)
    run.progress.num_rollbacks += 1
    run.batches = open_batches(run.config, run.dataset, run.env, run.unreadable, opened.state["data"]["drawn"])
    env.broadcast_tensors(shared_state(run))
    if env.is_main:
        rewind(run, opened)
    save_state(run)  # so that a run that is killed later does not go back again


def open_batches(
    config: FinetuneConfig, dataset: ImageDataset, env: DistEnv, unreadable: UnreadableImages, drawn: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's part of every batch, after `drawn` images of all processes."""
    return iterate_batches(
        dataset,
        InfiniteSampler(dataset, seed=config.runtime.seed, start=drawn),
        config.optim.batch,
        config.data.workers,
        unreadable,
        part=shared_images(env, config.optim.batch, config.optim.batch_gpu),
    )


def forecast(config: FinetuneConfig) -> estimate.Estimate:
    """What a new run of this configuration would take, from its first steps in memory; nothing is written.

    Raises:
        ValueError, OSError, OutOfMemory, ProcessFailed: See `execute`.
    """
    where = distributed.place()
    device = resolve_device(config.runtime.device, where)
    with distributed.start(where, device, timeout_sec=config.runtime.rank_timeout) as env:
        with env.together("preparing"):
            plan = prepare(config, env)
            configure_torch(plan.config, plan.device)
            run = build_run(plan, Path(plan.config.runtime.outdir))
        env.broadcast_tensors(shared_state(run))
        with estimate.advice(run), flushed_denormals():
            return estimate.from_steps(run)


def rewind(run: Run, opened: resume.Opened) -> None:
    """Cut a run's growing files back to where its state was saved, or to nothing where there is none."""
    if opened.state is None:
        run_dir.rewind(run.path, {})
        return
    progress, beside = run.progress, run.config.metric.run_async
    measured_again = progress.settled or snapshot_follows(run)
    run_dir.rewind(run.path, opened.state["files"], keep_metrics=beside or not measured_again)
    if beside:  # figures of earlier snapshots may have come after the state was saved
        run_dir.drop_metrics(run.path, progress.cur_nimg + (0 if snapshot_follows(run) else 1))


def snapshot_follows(run: Run) -> bool:
    """Whether a restored run has a snapshot of its last step still to make, again if need be."""
    return not run.progress.settled and run.progress.snapshot_due(run.config.schedule.snap)


def say_what_is_saved(path: Path, error: BaseException, say: Say) -> None:
    """One line before an error's own: where the same command goes on."""
    if isinstance(error, Exception) and not isinstance(error, TrainingDiverged | ProcessFailed):
        newest = next(iter(checkpoint.find(path)), None)
        if newest is not None:
            say(f"Saved up to {checkpoint.nimg_of(newest) / 1000:g} kimg; the same command goes on from there")


def describe_start(plan: "Plan", opened: resume.Opened) -> str:
    """One line that says where the numbers of this run begin."""
    if opened.state is not None:
        kimg = opened.state["progress"]["cur_nimg"] / 1000
        return f"Continuing at {kimg:g} kimg, exactly where {opened.state_path.name} was saved"
    if plan.checkpoint is None:
        return "New networks, from scratch"
    return f"Warm start: networks from {plan.config.resume}; optimiser, augmentation strength and clock begin anew"


def silence(text: str) -> None:
    """What processes other than rank 0 say."""


def describe_machine(env: DistEnv) -> str:
    """One line: the device, and how many processes share the work."""
    device = env.device
    name = (
        f"Device: {device}, {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else f"Device: {device} ({torch.cuda.get_device_name(device)})"
    )
    return name if env.world == 1 else f"{name}; {env.world} processes ({'gloo' if device.type == 'cpu' else 'NCCL'})"


@dataclass(frozen=True)
class Plan:
    """What `prepare` found: the resolved configuration, device, data, and the checkpoint (None from scratch)."""

    config: FinetuneConfig
    device: torch.device
    dataset: ImageDataset
    checkpoint: NetworkFile | None
    env: DistEnv = field(default_factory=DistEnv)

    def wanted(self) -> resume.Wanted:
        """What a run in the outdir must match to be continued."""
        sha256 = self.checkpoint.sha256 if self.checkpoint else None
        return resume.Wanted(self.config, self.dataset, describe(self), sha256)

    def identity(self) -> dict[str, Any]:
        """What must be equal in all processes before they begin. Images are compared by their number, not content."""
        options = self.config.to_dict()
        facts = {
            f"option {section}.{name}": value
            for section, values in options.items()
            if isinstance(values, dict)
            for name, value in values.items()
            if f"{section}.{name}" not in MACHINE_OPTIONS
        }
        return facts | {
            "code version": __version__,
            "number of images": self.dataset.num_source_images,
            "--resume file": self.checkpoint.sha256 if self.checkpoint else None,
        }


def check_options(config: FinetuneConfig) -> None:
    """Check what can be checked without checkpoint and data.

    Raises:
        ValueError: An option's value is wrong in itself.
    """
    losses.build_loss(config.loss.name, **loss_options(config))
    if config.augment.augpipe not in AUGMENT_PRESETS:
        raise ValueError(f"--augpipe {config.augment.augpipe} is unknown; one of {', '.join(AUGMENT_PRESETS)}")
    if config.cfg not in presets.CFG_NAMES:
        raise ValueError(f"--cfg {config.cfg} is unknown; one of {', '.join(presets.CFG_NAMES)}")
    counted = measured.KINDS[config.schedule.keep_best]
    if config.metric.patience is not None and not set(counted) & set(config.metric.metrics):
        kinds = {measured.FRECHET: "fid", measured.KERNEL: "kid"}.get(counted, "fid or kid")
        raise ValueError(
            f"--patience {config.metric.patience} counts measurements of {kinds}, and --metrics "
            f"{','.join(config.metric.metrics)} has none: add {kinds}, or drop --patience"
        )
    if config.schedule.keep_best in ("fid", "kid") and not set(counted) & set(config.metric.metrics):
        raise ValueError(
            f"--keep-best {config.schedule.keep_best} goes by measurements, and --metrics "
            f"{','.join(config.metric.metrics)} has none: add {config.schedule.keep_best}, or drop --keep-best"
        )
    if config.metric.budget is not None and config.metric.metrics == ("none",):
        raise ValueError(f"--metrics-budget {config.metric.budget} is for measuring, not --metrics none; drop one")
    config.metric.check_use()
    if config.loss.name != "rooted":
        defaults = LossConfig()
        for option in ("k", "tail", "tail_at", "scale", "acts_on"):
            if getattr(config.loss, option) != getattr(defaults, option):
                raise ValueError(
                    f"--{option.replace('_', '-')} is for --loss rooted, not --loss {config.loss.name}; drop one"
                )


def prepare(config: FinetuneConfig, env: DistEnv | None = None) -> Plan:
    """Open checkpoint and data, check that they fit, resolve the configuration. Writes nothing.

    Args:
        config: Options.
        env: The processes; None plans for as many as the environment names without joining them.
    """
    check_options(config)
    config = take_train_choice(config)
    where = distributed.place()
    device = resolve_device(config.runtime.device, where) if env is None else env.device
    execution.check_precision(config.runtime.precision, device)
    num_gpus = where.world if env is None else env.world
    if env is None or env.is_main:
        check_outdir(config.runtime.outdir or ".")
    scratch = config.resume in ("none", "noresume")
    checkpoint = None if scratch else complete(network_file.load(config.resume), config.runtime.seed)
    dataset = ImageDataset(
        config.data.path,
        resolution=None,
        use_labels=config.data.cond,
        max_size=config.data.subset,
        xflip=config.data.mirror,
        random_seed=config.runtime.seed,
        cache_bytes=int(config.data.cache_gib * 2**30),
    )
    if config.data.subset is not None and config.data.subset > dataset.num_source_images:
        raise ValueError(
            f"--subset {config.data.subset} is more than the {dataset.num_source_images} images of {config.data.path}"
        )
    if checkpoint:
        G: Any = checkpoint.G_ema
        network, wanted = config.resume, (G.img_resolution, G.img_channels, G.c_dim)
    else:
        side = config.network.resolution or max(1 << (dataset.resolution.bit_length() - 1), MIN_RESOLUTION)
        network = "--resolution" if config.network.resolution else "a new network"
        wanted = side, dataset.num_channels, dataset.label_dim
    check_fits(
        resolution=dataset.resolution,
        num_channels=dataset.num_channels,
        label_dim=dataset.label_dim,
        want_resolution=wanted[0],
        want_channels=wanted[1],
        want_label_dim=wanted[2],
        data=config.data.path,
        network=network,
    )
    facts = None
    if checkpoint:
        check_freezed(checkpoint.D, config.optim.freezed)
        generator_parameters(G, parse_train(config.optim.train))  # refuses what freezes every block
        mbstd = getattr(checkpoint.D.b4, "mbstd", None)
        facts = presets.Checkpoint(resolution=dataset.resolution, mbstd_group=mbstd.group_size if mbstd else None)
    config = presets.resolve(
        config, resolution=dataset.resolution, checkpoint=facts, device=device.type, num_gpus=num_gpus
    )
    return Plan(config=config, device=device, dataset=dataset, checkpoint=checkpoint, env=env or DistEnv(device))


def complete(opened: NetworkFile, seed: int) -> NetworkFile:
    """A checkpoint with what training needs: of a file with generators only, a new discriminator of their widths."""
    notes = list(opened.notes)
    G_ema, D = opened.G_ema, opened.D
    if D is None:
        D = discriminator_for(G_ema, seed)
        notes.append("no discriminator in the file: a new one starts from random weights")
    G = opened.G if opened.G is not None else deepcopy(G_ema)
    return replace(opened, G=G, D=D, notes=tuple(notes))


def take_train_choice(config: FinetuneConfig) -> FinetuneConfig:
    """`--train freezed:N` is `--freezed N`.

    Raises:
        ValueError: Parts of new networks frozen.
    """
    choice = parse_train(config.optim.train)
    if config.resume in ("none", "noresume") and (choice.part != "all" or not choice.mapping or choice.synthesis_from):
        raise ValueError(f"--train {choice.text} keeps parts of a trained network; with --resume none there is none")
    if choice.freezed is None:
        return config
    return replace(config, optim=replace(config.optim, freezed=choice.freezed))


def check_freezed(D: Any, freezed: int) -> None:
    """Refuse to freeze more layers than the discriminator has in front of its last block."""
    most = sum(getattr(D, f"b{resolution}").num_layers for resolution in D.block_resolutions)
    if freezed > most:
        raise ValueError(f"--freezed {freezed}: this discriminator has {most} layers that can be frozen")


def resolve_device(name: str, where: Place | None = None) -> torch.device:
    """`auto` is cuda where there is one; each of several processes on a machine takes a GPU of its own.

    Raises:
        ValueError: No such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if where is not None and where.world > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"--device {name}: each of the {where.world} processes takes its own; use --device cuda")
        if where.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"--device cuda: this machine has {torch.cuda.device_count()} CUDA devices for more processes; start "
                "one process per device (torchrun --nproc_per_node) or use --device cpu"
            )
        name = f"cuda:{where.local_rank}"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise ValueError(f"--device {name} is unknown; one of auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def check_outdir(outdir: str, option: str = "--outdir") -> None:
    """Refuse a folder that cannot be written, before any work."""
    path = Path(outdir)
    existing = next(p for p in [path, *path.absolute().parents] if p.exists() or p.is_symlink())
    if not existing.exists():
        target = os.readlink(existing)
        raise FileNotFoundError(f"{option} {outdir}: {existing} is a link to {target}, which is not there; make that")
    if not existing.is_dir():
        raise NotADirectoryError(f"{option} {outdir}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {outdir}: no permission to write in {existing}")


def configure_torch(config: FinetuneConfig, device: torch.device) -> None:
    """Threads and cuDNN modes of this process."""
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    if device.type == "cpu":
        misc.keep_freed_memory()
        allocator.keep_blocks()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not config.runtime.nobench
        torch.backends.cuda.matmul.allow_tf32 = config.runtime.tf32
        torch.backends.cudnn.allow_tf32 = config.runtime.tf32


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers too small to be normal count as zero inside: they slow a CPU down and carry nothing."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def loss_options(config: FinetuneConfig) -> dict[str, Any]:
    """Arguments of `losses.build_loss`."""
    if config.loss.name != "rooted":
        return {}
    kwargs = {
        "k": config.loss.k,
        "tail": config.loss.tail,
        "tail_at": config.loss.tail_at,
        "acts_on": config.loss.acts_on,
    }
    try:
        kwargs["scale"] = float(config.loss.scale)
    except ValueError:
        kwargs["scale"] = config.loss.scale
    return kwargs


def describe(plan: Plan) -> str:
    """The run's name after its number (spec section 2, "Run name")."""
    config, parts = plan.config, [plan.dataset.name or "data"]
    if config.data.cond:
        parts.append("cond")
    if is_subset(config, plan.dataset):
        parts.append(f"subset{config.data.subset}")
    if config.data.mirror:
        parts.append("mirror")
    parts.append(f"{config.cfg}{plan.env.world}" if config.cfg == "auto" else config.cfg)
    parts.append(config.loss.name if config.loss.name != "rooted" else f"rooted-k{config.loss.k}")
    parts.append(f"gamma{config.loss.gamma:g}")
    parts.append(f"kimg{config.schedule.kimg:g}")
    parts.append(f"batch{config.optim.batch}")
    if config.augment.aug != "ada":
        parts.append(config.augment.aug)
    if config.augment.p is not None:
        parts.append(f"p{config.augment.p:g}")
    if config.augment.target not in (None, presets.ADA_TARGET):
        parts.append(f"target{config.augment.target:g}")
    if config.augment.aug != "noaug" and config.augment.augpipe != AugmentConfig.augpipe:
        parts.append(config.augment.augpipe)
    parts.append("noresume" if plan.checkpoint is None else "resumecustom")
    if config.optim.freezed:
        parts.append(f"freezed{config.optim.freezed}")
    kept = [word for word in config.optim.train.split(",") if word != "all" and not word.startswith("freezed")]
    parts += [word.replace(":", "") for word in kept]
    if config.runtime.desc:
        parts.append(config.runtime.desc)
    return "-".join(parts)


def build_networks(plan: Plan) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """G, D, G_ema on the device: the checkpoint's own, or new ones of the configured architecture."""
    config, dataset = plan.config, plan.dataset
    if plan.checkpoint is None:
        with seeding.scoped(config.runtime.seed, "init"):
            G, D = new_networks(config.network, dataset, config.optim.freezed)
        check_freezed(D, config.optim.freezed)
        G_ema = deepcopy(G)
    else:
        G, D, G_ema = plan.checkpoint.G, plan.checkpoint.D, plan.checkpoint.G_ema
        kwargs = deepcopy(D.init_kwargs)
        block_kwargs = kwargs.get("block_kwargs", {})
        if block_kwargs.get("freeze_layers", 0) != config.optim.freezed:  # frozen layers of the checkpoint thaw
            kwargs.block_kwargs = EasyDict({**block_kwargs, "freeze_layers": config.optim.freezed})
            frozen = Discriminator(**kwargs)
            misc.copy_params_and_buffers(D, frozen.requires_grad_(False), require_all=True)
            D = frozen
    return tuple(net.to(plan.device).requires_grad_(False) for net in (G.train(), D.train(), G_ema.eval()))


def new_networks(net: NetworkConfig, dataset: ImageDataset, freezed: int) -> tuple[Generator, Discriminator]:
    """A generator and a discriminator of the configured architecture."""
    common = {"c_dim": dataset.label_dim, "img_resolution": dataset.resolution, "img_channels": dataset.num_channels}
    width = {
        "channel_base": net.channel_base,
        "channel_max": net.channel_max,
        "num_fp16_res": net.num_fp16_res,
        "conv_clamp": net.conv_clamp,
    }
    G = Generator(
        z_dim=net.z_dim,
        w_dim=net.w_dim,
        mapping_kwargs=EasyDict(num_layers=net.map_depth),
        synthesis_kwargs=EasyDict(width),
        **common,
    )
    D = Discriminator(
        architecture=net.d_architecture,
        **width,
        **common,
        block_kwargs=EasyDict(freeze_layers=freezed),
        mapping_kwargs=EasyDict(),
        epilogue_kwargs=EasyDict(mbstd_group_size=net.mbstd_group),
    )
    return G, D


def build_augmentation(
    config: AugmentConfig, device: torch.device, env: DistEnv
) -> tuple[AugmentPipe | None, AdaController | None]:
    """The pipe (None for noaug) and its controller (None unless ada)."""
    if config.aug == "noaug":
        return None, None
    pipe = AugmentPipe(**AUGMENT_PRESETS[config.augpipe]).train().requires_grad_(False).to(device)
    pipe.p.fill_(config.p or 0.0)
    if config.aug == "fixed":
        return pipe, None
    return pipe, AdaController(
        target=config.target, interval=ADA_INTERVAL, ada_kimg=config.ada_kimg, p_max=config.p_max, reduce=env.sum
    )


def build_run(
    plan: Plan, path: Path, *, state: dict[str, Any] | None = None, say: Say = lambda text: None
) -> Run:
    """Assemble networks, loss, phases and data into a `Run`, and put it where a training state was saved.

    Raises:
        StateError: The state belongs to another run.
    """
    config, dataset, device, env = plan.config, plan.dataset, plan.device, plan.env
    G, D, G_ema = build_networks(plan)
    choice = parse_train(config.optim.train)
    learning = generator_parameters(G, choice)
    if not choice.mapping:
        G.mapping.eval()  # its average of w stays, too

    def adapted(adam: Any) -> LowRankAdapters:
        return LowRankAdapters(G, G_ema, rank=choice.rank, adam=adam, seed=config.runtime.seed)

    phases = build_phases(
        G,
        D,
        lr_g=config.optim.glr,
        lr_d=config.optim.dlr,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
        g_reg_interval=config.optim.g_reg_interval,
        d_reg_interval=config.optim.d_reg_interval,
        g_parameters=learning,
        g_optimizer=adapted if choice.part == "adapters" else None,
    )
    for network in (G, D, G_ema):
        execution.accelerate(network, config.runtime.precision)
    pipe, ada = build_augmentation(config.augment, device, env)
    adversarial = losses.build_loss(config.loss.name, **loss_options(config))
    stats = StatsCollector()

    def report(name: str, value: torch.Tensor) -> None:
        stats.report(name, value)
        if ada is not None and name == "Loss/signs/real":
            ada.observe(value)

    unreadable = UnreadableImages(config.data.max_unreadable, say)
    loss = GanLoss(
        G,
        D,
        adversarial,
        augment_pipe=pipe,
        style_mixing_prob=config.loss.style_mixing,
        r1_gamma=config.loss.gamma,
        pl_weight=config.loss.pl_weight,
        report=report,
    )
    run = Run(
        comparison=Comparison(dataset.uncached()) if env.is_main else None,
        config=config,
        path=path,
        device=device,
        dataset=dataset,
        adversarial=adversarial,
        batches=open_batches(config, dataset, env, unreadable, state["data"]["drawn"] if state else 0),
        unreadable=unreadable,
        G=G,
        D=D,
        G_ema=G_ema,
        augment_pipe=pipe,
        ada=ada,
        stats=stats,
        loss=loss,
        phases=phases,
        adapters=next((phase.opt for phase in phases if isinstance(phase.opt, LowRankAdapters)), None),
        grid=fixed_grid(dataset, G.z_dim, config.runtime.seed, config.runtime.grid),
        progress=Progress(total_nimg=round(config.schedule.kimg * 1000), tick_nimg=round(config.schedule.tick * 1000)),
        training_set_kwargs=training_set_kwargs(config, dataset),
        env=env,
    )
    if state is not None:
        checkpoint.restore(run, state)
    return run


def fixed_grid(dataset: ImageDataset, z_dim: int, seed: int, size: tuple[int, int] | None) -> Grid:
    """Latents and labels behind every fakes*.png; labels are those of the images in reals.png."""
    size, indices = grid_indices(dataset, size)
    z = torch.randn([len(indices), z_dim], generator=seeding.generator(seed, "grid"))
    labels = torch.stack([torch.as_tensor(dataset.get_label(i), dtype=torch.float32) for i in indices])
    return Grid(size=size, z=z, c=labels, indices=indices)


def training_set_kwargs(config: FinetuneConfig, dataset: ImageDataset) -> dict[str, Any]:
    """The data set's record inside snapshots, in the family's form."""
    kwargs = {
        "class_name": data_record.CLASS_NAME,
        "path": config.data.path,
        "use_labels": config.data.cond,
        "max_size": config.data.subset or dataset.num_source_images,
        "xflip": config.data.mirror,
        "resolution": dataset.resolution,
    }
    return {**kwargs, "random_seed": config.runtime.seed} if is_subset(config, dataset) else kwargs


def is_subset(config: FinetuneConfig, dataset: ImageDataset) -> bool:
    """Whether images are left out: `--subset` with all of them is none."""
    return config.data.subset is not None and config.data.subset < dataset.num_source_images


def write_start(run: Run, plan: Plan) -> None:
    """What the folder holds before the first step: options, environment, reals.png, fakes_init.png."""
    record = run_dir.environment(run.device)
    record["data"] = {
        "path": str(run.config.data.path),
        "num_images": run.dataset.num_source_images,
        "resolution": run.dataset.resolution,
        "fingerprint": run.dataset.fingerprint(),
    }
    start = plan.checkpoint
    origin = {"path": run.config.resume, "sha256": start.sha256, "kind": start.kind} if start else None
    record["resume"] = {**origin, "notes": list(start.notes)} if origin and start and start.notes else origin
    run_dir.write_json(run.path / resume.ENVIRONMENT_FILE, record)
    reals = np.stack([run.dataset[i][0] for i in run.grid.indices])
    images.save_grid(run.path / "reals.png", torch.from_numpy(reals), grid_size=run.grid.size)
    images.save_grid(run.path / "fakes_init.png", render_grid(run), grid_size=run.grid.size)


class RunHooks:
    """Beside training: progress bar, tick lines, TensorBoard, metrics at snapshots, a clean stop on a signal."""

    def __init__(self, run: Run, say: Say, progress_bar: Callable[..., Any] | None) -> None:
        self.run = run
        self.say = say
        self.stop_requested: str | None = None
        self.measuring = False
        self._bar_factory = progress_bar or (lambda length: nullcontext())
        self._bar_context: Any = None
        self._bar: Any = None
        self._nonfinite_shown = 0
        self._state_shown = watchdog.HEALTHY
        self.plateau = False
        self._warned: set[str] = set()
        self._start_nimg = run.progress.cur_nimg
        self._evaluator = evaluation.for_run(run)
        self._budget = self._beside = None
        if self._evaluator is not None and run.env.is_main:
            metric = run.config.metric
            if metric.budget_share is not None:
                beside = metric.run_async
                self._budget = measuring.Budget(metric.budget_share, run.snapshot_nimg, metric.num, say, beside=beside)
                self._evaluator.choose_num = self._choose_num
            if metric.run_async:
                self._beside = measuring.Beside(run.config, run.path, self._budget)
        if run.env.is_main and self._beside is None:
            measuring.forget(run.path)
        self._writers: scalars.Writers | None = None
        if run.env.is_main:
            options = run.config.to_dict()
            self._writers = scalars.open_writers(run.path, wandb=run.config.runtime.wandb, options=options, say=say)
        self._stopwatch: estimate.Stopwatch | None = None

    def __enter__(self) -> "RunHooks":
        self._bar_context = self._bar_factory(self.run.progress.total_nimg - self.run.progress.cur_nimg)
        self._bar = self._bar_context.__enter__()
        self._stopwatch = estimate.Stopwatch(self.run)
        if self._beside is not None:
            self._beside.take_up(self.run.progress.cur_nimg - int(snapshot_follows(self.run)))
            if self._beside.num_pending:
                self.say(f"Measuring {self._beside.num_pending} snapshots that were left without figures")
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._beside is not None:
            self._beside.close(keep_waiting=self.run.progress.cur_nimg < self.run.progress.total_nimg)
        self._bar_context.__exit__(*exc)
        if self._writers is not None:
            self._writers.close()

    def on_step(self, run: Run) -> None:
        if self._bar is not None:
            self._bar.update(run.config.optim.batch)
        if self._stopwatch is not None:
            self._stopwatch.after_step()
            if self._stopwatch.done:
                if not run.progress.finished:
                    self.say(str(self._stopwatch.estimate()))
                self._stopwatch = None

    def on_tick(self, run: Run, means: dict[str, Scalar], status: str) -> None:
        self.say(status)
        self._collect(run)
        progress = run.progress
        if progress.num_nonfinite > self._nonfinite_shown:
            self._nonfinite_shown = progress.num_nonfinite
            self.say(
                f"Warning: {progress.num_nonfinite} steps so far had non-finite gradients and were left out "
                f"(the run ends past {run.config.optim.max_nonfinite})"
            )
        if run.verdict.state != self._state_shown:
            self._state_shown = run.verdict.state
            self.say(f"State: {run.verdict}")
        self._write(run, scalars.tick_row(means))

    def on_snapshot(self, run: Run, path: Path) -> None:
        evaluator = self._evaluator
        if evaluator is None:
            return
        if run.config.metric.run_async:
            self._measure_beside(run, path)
            return
        start = time.time()
        rows, problem = self._measure(evaluator, run)
        seconds = time.time() - start
        if self._budget is not None:
            self._budget.spent_sec += seconds
        nimg, fingerprint = run.progress.cur_nimg, evaluator.fingerprint
        self._publish(run, measuring.Measurement(path.name, nimg, rows, problem, seconds, fingerprint))

    def should_stop(self, run: Run) -> bool:
        number = run.env.max(signal.Signals[self.stop_requested] if self.stop_requested else 0)
        self.stop_requested = signal.Signals(number).name if number else None
        if self.stop_requested:
            self.say(f"{self.stop_requested}: stopping after this step with a snapshot")
        if run.config.metric.patience is not None and run.env.max(self.plateau):
            self.plateau = True
        return self.stop_requested is not None or self.plateau

    def _measure_beside(self, run: Run, path: Path) -> None:
        """Hand a snapshot to the process that measures; at the end of the run, wait for it."""
        if self._beside is None:
            return
        seconds = None
        if self._budget is not None:
            self._collect(run)  # what has ended counts
            try:
                self._budget.allow(self._seen(run), last=run.progress.finished)
                if self._beside.num_pending and not run.progress.finished:
                    raise MetricUnavailable("--metrics-budget keeps no queue, and a measurement is still going on")
            except MetricUnavailable as problem:
                self.say(f"Metrics left out: {problem} (training goes on)")
                return
            seconds = self._budget.share * self._budget.interval_sec(self._seen(run))
        self._beside.submit(path, run.progress.cur_nimg, budget_sec=seconds)
        if run.progress.finished and not self.stop_requested:
            self.say(f"Waiting for {self._beside.num_pending} measurements")
        self._collect(run, wait=run.progress.finished and not self.stop_requested)

    def _collect(self, run: Run, *, wait: bool = False) -> None:
        """Publish what the process that measures has finished."""
        if self._beside is None:
            return
        self.measuring = wait and run.env.world == 1
        try:
            for done in self._beside.collect(wait=wait, beat=run.env.beat):
                self._publish(run, done)
        except KeyboardInterrupt:
            if not self.stop_requested:
                raise
            self.say(f"Metrics left out: stopped by {self.stop_requested}")
        finally:
            self.measuring = False

    def _publish(self, run: Run, done: measuring.Measurement) -> None:
        """Say what came of a snapshot, record it, and see whether there is progress still."""
        if done.problem:
            ends = run.progress.finished or self.stop_requested
            self.say(f"Metrics left out: {done.problem}" + ("" if ends else " (training goes on)"))
        if not done.rows:
            measuring.record_best(run.path, run.config.schedule.keep_best)  # the one before may have been replaced
            return
        for name, record in evaluation.records(
            done.rows,
            snapshot=done.snapshot,
            nimg=done.nimg,
            seconds=done.seconds,
            fingerprint=done.fingerprint,
            num_processes=1 if run.config.metric.run_async else run.env.world,
        ):
            run_dir.append_jsonl(run.path / f"metric-{name}.jsonl", record)
        for row in done.rows:
            self.say(f"{row.text}  ({row.num_fake} generated against {row.num_real} real images; {row.extractor})")
        self._write(run, scalars.figure_row(done.rows), done.nimg)
        for warning in dict.fromkeys(row.warning for row in done.rows if row.warning):
            if warning not in self._warned:
                self._warned.add(warning)
                self.say(f"Warning: {warning}")
        best, patience = measuring.record_best(run.path, run.config.schedule.keep_best), run.config.metric.patience
        if best is not None and patience is not None and best.since >= patience and not self.plateau:
            self.plateau = True
            self.say(f"{best.plateau}: stopping (--patience {patience})")

    def _seen(self, run: Run) -> int:
        """Training images since this process began."""
        return run.progress.cur_nimg - self._start_nimg

    def _choose_num(self, evaluator: evaluation.Evaluator, G: torch.nn.Module) -> int:
        assert self._budget is not None
        return self._budget.choose(evaluator, G, seen_nimg=self._seen(self.run), last=self.run.progress.finished)

    def _measure(self, evaluator: evaluation.Evaluator, run: Run) -> tuple[list[MetricResult], str | None]:
        """(results, None) or ([], why there are none). Nothing that a measurement does may end the training."""
        if self.should_stop(run):
            return [], f"stopped by {self.stop_requested}"
        alone = run.env.world == 1  # several processes end a measurement together or not at all
        limit_sec = run.config.metric.max_minutes * 60
        self.measuring = alone
        try:
            with time_limit(limit_sec if alone else None):
                return evaluator.evaluate(run.G_ema)
        except TookTooLong:
            self._evaluator = None
            return [], f"took longer than --metric-minutes {limit_sec / 60:g}, and is left out from now on"
        except KeyboardInterrupt:
            if not self.stop_requested:
                raise
            return [], f"stopped by {self.stop_requested}"
        except ProcessFailed:
            raise
        except Exception as e:
            with open(run.path / "log.txt", "a", encoding="utf-8") as f:
                f.write(traceback.format_exc())
            return [], f"{type(e).__name__}: {' '.join(str(e).split())} (see log.txt)"
        finally:
            self.measuring = False

    def _write(self, run: Run, row: dict[str, float], nimg: int | None = None) -> None:
        """A row of the table of scalars, for whatever draws curves."""
        if self._writers is not None:
            seconds = time.time() - run.progress.start_time
            self._writers.write(row, nimg=run.progress.cur_nimg if nimg is None else nimg, seconds=seconds)


class TookTooLong(BaseException):
    """Raised inside `time_limit`; no Exception, so that nothing in between takes it for one of its own."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt the block with TookTooLong after `seconds`; None sets no limit.

    Interrupts Python and waiting system calls, not a compiled function that never returns. Without effect where there
    is no alarm signal (Windows, threads other than the main one).
    """

    def expire(number: int, frame: Any) -> None:
        raise TookTooLong

    try:
        previous = signal.signal(signal.SIGALRM, expire) if seconds else None
    except (AttributeError, ValueError):
        previous = None
    if previous is None:
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, min(seconds or 0, 1e8))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def catch_signals(hooks: RunHooks) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into a clean stop, which ends a measurement; the second interrupts at once."""

    def request_stop(number: int, frame: Any) -> None:
        interrupt_now = hooks.measuring or hooks.stop_requested is not None
        hooks.stop_requested = signal.Signals(number).name
        if interrupt_now:
            raise KeyboardInterrupt

    try:
        previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
