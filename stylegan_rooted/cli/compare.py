"""`stylegan-rooted compare`: losses against each other, fairly."""

import functools
from typing import Any

import click

from stylegan_rooted.cli.finetune import FIELDS as FINETUNE_FIELDS
from stylegan_rooted.cli.finetune import check_usage, read_config
from stylegan_rooted.cli.options import (
    GroupedCommand,
    GroupedOption,
    Speaker,
    apply_fields,
    config_options,
    exit_if_stopped,
    field_options,
    usage_errors,
)
from training.config import FinetuneConfig

LEFT_OUT = {
    *("loss.name", "loss.k", "loss.tail", "loss.tail_at", "loss.scale", "loss.acts_on"),
    *("runtime.seed", "runtime.desc"),
    *("metric.run_async", "metric.device", "metric.budget", "metric.patience"),
}
"""Options of `finetune` that arms, seeds and fairness decide."""

FIELDS = [field for field in FINETUNE_FIELDS if field.target not in LEFT_OUT]
option = functools.partial(click.option, cls=GroupedOption, group="Comparison")


@click.command("compare", cls=GroupedCommand)
@option(
    "--losses",
    required=True,
    help="Arms, the first of which is the baseline: logistic, or rooted with settings, e.g. "
    "logistic,rooted:k=2,rooted:k=2,tail=4,rooted:k=2:64@20. Settings: k, tail, scale, acts-on, gamma.",
)
@option(
    "--seeds",
    default="0-4",
    show_default=True,
    help="Seeds, of which every arm gets each: 0-4 or 0,2,5.",
)
@option(
    "--tune",
    help="Choose settings for every arm from the same grid, e.g. lr=0.001,0.002;gamma=0.1,0.5 (lr: of G and D).",
)
@option(
    "--tune-seed",
    type=click.IntRange(0, 2**32 - 1),
    default=1_000_000,
    show_default=True,
    help="The seed on which --tune chooses; not one of --seeds.",
)
@option(
    "--tune-kimg",
    type=click.FloatRange(0, min_open=True),
    help="Length of the runs of --tune. [default: --kimg]",
)
@option(
    "--only",
    help="i/n: do the i-th of n shares of the runs, to spread them over processes or machines; without it, the same "
    "command does what is left and writes the results.",
)
@option(
    "--retry-failed",
    is_flag=True,
    help="Train runs that failed once more, from their last state, instead of counting them.",
)
@field_options(FIELDS, FinetuneConfig())
@config_options(
    config_help="Read shared settings from a JSON or YAML file, as finetune --dry-run prints them.",
    dry_run_help="Print arms, seeds, what is done and how long the rest will take, and stop; nothing is written.",
)
def command(
    losses: str,
    seeds: str,
    tune: str | None,
    tune_seed: int,
    tune_kimg: float | None,
    only: str | None,
    retry_failed: bool,
    config_file: str | None,
    dry_run: bool,
    **values: Any,
) -> None:
    """Train several losses on several seeds with everything else equal, and say what the differences show.

    The same command in the same --outdir goes on where it was interrupted; runs that are done are not repeated. The
    shared options are those of finetune. Writes compare.json, compare.md and compare.html; see docs/compare.md.

    \b
    Example:
      stylegan-rooted compare --losses logistic,rooted:k=2,rooted:k=8 --seeds 0-4 --data cats.zip \\
        --resume ffhq256.pkl --outdir comparison --kimg 200
    """
    config = read_config(config_file) if config_file else FinetuneConfig()
    config = apply_fields(config, FIELDS, values)
    check_usage(config, False, values)
    from stylegan_rooted import arms, compare

    with usage_errors():
        if tune_kimg is not None and tune is None:
            raise ValueError("--tune-kimg is for --tune; drop it")
        share = arms.parse_share(only) if only is not None else None
        request = compare.Request(
            config=config,
            arms=arms.parse_losses(losses, config.loss),
            seeds=arms.parse_seeds(seeds),
            grid=arms.parse_grid(tune) if tune is not None else (),
            tune_seed=tune_seed,
            tune_kimg=tune_kimg,
        )
    flags = {field.target: field.flag for field in FINETUNE_FIELDS}
    if dry_run:
        click.echo(compare.outline(request, flags=flags))
        return
    speaker = Speaker("All runs")
    outcome = compare.run(
        request,
        say=speaker.say,
        progress_bar=speaker.progress_bar,
        only=share,
        retry_failed=retry_failed,
        flags=flags,
    )
    exit_if_stopped(outcome.stopped_by)
