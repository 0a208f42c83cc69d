"""Click options made from dataclass fields (one default, one place), in groups, with every default shown."""

import contextlib
import dataclasses
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from training.config import DETECTOR_MODES, MAX_REPEATS


@dataclasses.dataclass(frozen=True)
class Field:
    """One command-line option and the configuration field it sets (`section.name`, or `name` at the top)."""

    flag: str
    target: str
    help: str
    type: Any = str
    group: str = "General"
    auto: str | None = None

    @property
    def parameter(self) -> str:
        """The click parameter's name."""
        return "opt_" + self.target.replace(".", "__")


class GroupedCommand(click.Command):
    """A command whose --help lists its options by group, in the order of their definition."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "General"), []).append(record)
        for name, rows in groups.items():
            with formatter.section(name):
                formatter.write_dl(rows)


class GroupedOption(click.Option):
    """An option that knows its group."""

    def __init__(self, *args: Any, group: str = "General", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


def field_options(fields: list[Field], defaults: Any) -> Callable:
    """Decorator: one option per field. Unset options are None, so that a --config file shows through."""

    def decorate(function: Callable) -> Callable:
        for f in reversed(fields):
            default = get_field(defaults, f.target)
            shown = f.auto or default_text(default)
            help_text = f"{f.help} [default: {shown}]" if shown != "" else f.help
            function = click.option(
                f.flag, f.parameter, type=f.type, default=None, help=help_text, cls=GroupedOption, group=f.group
            )(function)
        return function

    return decorate


def config_options(*, config_help: str, dry_run_help: str) -> Callable:
    """Decorator: the options `--config` and `--dry-run` of commands that take a configuration."""

    def decorate(function: Callable) -> Callable:
        for option in (
            click.option("-n", "--dry-run", is_flag=True, cls=GroupedOption, group="Other", help=dry_run_help),
            click.option(
                "--config",
                "config_file",
                type=click.Path(dir_okay=False),
                cls=GroupedOption,
                group="Other",
                help=config_help,
            ),
        ):
            function = option(function)
        return function

    return decorate


def default_text(value: Any) -> str:
    """A default as a user would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def get_field(config: Any, target: str) -> Any:
    """`config.section.name` for "section.name"."""
    for part in target.split("."):
        config = getattr(config, part)
    return config


def apply_fields(config: Any, fields: list[Field], values: dict[str, Any]) -> Any:
    """`config` with every option that was given replaced. Errors of a value itself are usage errors.

    Fields of one section are replaced together, since they are checked against each other.
    """
    sections: dict[str, dict[str, Any]] = {}
    for f in fields:
        value = values.get(f.parameter)
        if value is None:
            continue
        section, _, name = f.target.rpartition(".")
        sections.setdefault(section, {})[name] = None if value is NONE else value
    with usage_errors():
        for section, changes in sections.items():
            part = dataclasses.replace(getattr(config, section), **changes) if section else None
            config = dataclasses.replace(config, **({section: part} if section else changes))
    return config


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """ValueErrors inside are wrong usage (exit code 2)."""
    try:
        yield
    except ValueError as e:
        raise click.UsageError(str(e), click.get_current_context(silent=True)) from e


NONE = object()
"""What a user's `none` is until `apply_fields` stores it as None; None itself means that the option was not given."""


class IntOrNone(click.ParamType):
    """An integer, or `none`."""

    name = "INT|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value).lower() == "none":
            return NONE
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor none", param, ctx)


class GridSize(click.ParamType):
    """`12x6` as (columns, rows)."""

    name = "COLSxROWS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        columns, _, rows = str(value).lower().partition("x")
        if not (columns.isdecimal() and rows.isdecimal() and int(columns) and int(rows)):
            self.fail(f"{value} is not of the form 12x6", param, ctx)
        return int(columns), int(rows)


class CommaList(click.ParamType):
    """Comma-separated words as a tuple."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(v.strip() for v in str(value).split(",") if v.strip())


def say(message: str) -> None:
    """A line for people: stderr."""
    click.echo(message, err=True)


class TrainingBar:
    """A progress bar with ETA on stderr, redrawn at most ten times a second; silent where stderr is no terminal."""

    def __init__(self, length: int, label: str = "Training") -> None:
        self.length = max(length, 1)
        self.label = label
        self.done = 0
        self.start = time.monotonic()
        self.drawn = 0.0
        self.visible = sys.stderr.isatty()

    def __enter__(self) -> "TrainingBar":
        self.draw()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.visible:
            self.draw(force=True)
            sys.stderr.write("\n")

    def update(self, num: int) -> None:
        """`num` more images are done."""
        self.done += num
        self.draw()

    def say(self, message: str) -> None:
        """A line above the bar."""
        if self.visible:
            sys.stderr.write("\r\x1b[K")
        say(message)
        self.draw(force=True)

    def draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if not self.visible or (not force and now - self.drawn < 0.1):
            return
        self.drawn = now
        done = min(self.done, self.length)
        share = done / self.length
        rate = self.done / max(now - self.start, 1e-6)
        if not done:
            left = "ETA --:--"
        elif share < 1:
            left = f"ETA {clock_text((self.length - done) / rate)}"
        else:
            left = f"in {clock_text(now - self.start)}"
        text = f"{share:4.0%}  {done / 1000:.2f}/{self.length / 1000:.2f} kimg  {rate:.1f} img/s  {left}"
        width = max(min(30, shutil.get_terminal_size().columns - len(self.label) - len(text) - 6), 0)
        filled = int(share * width)
        sys.stderr.write(f"\r\x1b[K{self.label} [{'#' * filled}{'-' * (width - filled)}] {text}")
        sys.stderr.flush()


class Speaker:
    """What a long job is given to speak with: a bar's factory, and lines that keep above the bar that is shown."""

    def __init__(self, label: str = "Training") -> None:
        self._label = label
        self._bar: TrainingBar | None = None

    def progress_bar(self, length: int) -> TrainingBar:
        """A new bar; lines go above it from now on."""
        self._bar = TrainingBar(length, self._label)
        return self._bar

    def say(self, message: str) -> None:
        """A line for people: stderr."""
        (self._bar.say if self._bar else say)(message)


def exit_if_stopped(signal_name: str | None) -> None:
    """End with the exit code of a process that this signal ended; None does nothing."""
    if signal_name:
        sys.exit(128 + signal.Signals[signal_name])


def clock_text(seconds: float) -> str:
    """h:mm:ss or mm:ss."""
    hours, rest = divmod(max(int(seconds), 0), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"


METRICS_HELP = (
    "Comma list of fid, kid, fid_inf, pr (precision, recall), dc (density, coverage), is, ppl, memorisation; or of the "
    "ADA family's names: fid50k_full, kid50k_full, pr50k3_full, is50k, ppl2_wend, ...; or none."
)


def detector_fields(group: str, section: str = "") -> list[Field]:
    """The options that choose the feature network; `section` is what stands before the fields' names."""
    detector = "Feature network: embedded (gives FD and KD), inception, vgg16, torchscript or timm:MODEL."
    file = "Weights of the detector, instead of its own place: a file, or URL#sha256=DIGEST."
    vgg = "Weights of the vgg16 detector for the family's pr and ppl: a file, or URL#sha256=DIGEST."
    modes = click.Choice(list(DETECTOR_MODES))
    return [
        Field("--detector", f"{section}detector", detector, str, group),
        Field("--detector-mode", f"{section}detector_mode", "Resizing of the inception detector.", modes, group),
        Field("--detector-file", f"{section}detector_file", file, str, group, "unset"),
        Field("--vgg-file", f"{section}vgg_file", vgg, str, group, "unset"),
    ]


def repeats_field(flag: str, group: str, section: str = "") -> Field:
    """The option for repeated measurements; its flag differs between commands."""
    text = "Measure with so many generator seeds; the error is then what they show."
    return Field(flag, f"{section}repeats", text, click.IntRange(1, MAX_REPEATS), group)


def reference_fields(group: str, section: str = "") -> list[Field]:
    """The options for what is measured against."""
    reference = "Measure against this npz of clean-fid's or NVIDIA's kind (mu, sigma; feats) instead of the data."
    held_out = "For memorisation: images of the same kind that were not trained on."
    return [
        Field("--reference", f"{section}reference", reference, str, group, "unset"),
        Field("--held-out", f"{section}held_out", held_out, str, group, "what --subset leaves out"),
    ]
