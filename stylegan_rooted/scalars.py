"""The scalars of a run for programs that draw curves: one table, the means in stats.jsonl, for all of them.

Knows TensorBoard and Weights & Biases; both are optional, and nothing that they do ends a run.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from metrics.evaluate import MetricResult
from training.stats import Scalar

KIMG = "Progress/kimg"
WANDB_HINT = "install: pip install 'stylegan-rooted[wandb]'"

Say = Callable[[str], None]


class Writer(Protocol):
    """Takes rows of the table; `nimg` is where they belong, `seconds` when, since the run began."""

    def write(self, row: Mapping[str, float], *, nimg: int, seconds: float) -> None: ...
    def close(self) -> None: ...


def tick_row(scalars: Mapping[str, Scalar]) -> dict[str, float]:
    """The row of a tick: of every name in its line of stats.jsonl, the mean."""
    return {name: scalar.mean for name, scalar in scalars.items()}


def figure_row(results: Sequence[MetricResult]) -> dict[str, float]:
    """The row of a measurement."""
    return {f"Metrics/{result.label}": result.value for result in results}


class Writers:
    """All writers of a run. One that fails is said once and left out from then on.

    Args:
        writers: By name, for messages.
        say: Receives lines for people.
    """

    def __init__(self, writers: Mapping[str, Writer], say: Say) -> None:
        self._writers, self._say = dict(writers), say

    def write(self, row: Mapping[str, float], *, nimg: int, seconds: float) -> None:
        """Hand a row to all of them."""
        self._each(lambda writer: writer.write(row, nimg=nimg, seconds=seconds))

    def close(self) -> None:
        """The run ends."""
        self._each(lambda writer: writer.close())
        self._writers.clear()

    def _each(self, call: Callable[[Writer], None]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                call(writer)
            except Exception as error:  # whatever a foreign program raises, training goes on
                del self._writers[name]
                self._say(f"{name} left out from now on: {_one_line(error)} (training goes on)")


def open_writers(path: Path, *, wandb: str, options: dict[str, Any], say: Say) -> Writers:
    """TensorBoard where it is installed; Weights & Biases where it is asked for.

    Args:
        path: The run folder; everything is written below it.
        wandb: `none`, `offline` or `online`.
        options: The run's options, for the record.
        say: Receives one line about a writer that cannot be had.
    """
    writers: dict[str, Writer] = {}
    openers: dict[str, Callable[[], Writer | None]] = {"TensorBoard": lambda: TensorBoard.open(path)}
    if wandb != "none":
        openers["Weights & Biases"] = lambda: WandB.open(path, wandb, options)
    for name, opener in openers.items():
        try:
            writer = opener()
        except Exception as error:
            say(f"{name} left out: {_one_line(error)} (training goes on)")
            continue
        if writer is not None:
            writers[name] = writer
    return Writers(writers, say)


class TensorBoard:
    """Events in the run folder: over whole kimg and seconds since the start (spec section 2)."""

    def __init__(self, events: Any) -> None:
        self._events = events

    @classmethod
    def open(cls, path: Path) -> "TensorBoard | None":
        """None where the extra is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return cls(SummaryWriter(str(path)))

    def write(self, row: Mapping[str, float], *, nimg: int, seconds: float) -> None:
        for name, value in row.items():
            self._events.add_scalar(name, value, global_step=nimg // 1000, walltime=seconds)

    def close(self) -> None:
        self._events.close()


class WandB:
    """A run of Weights & Biases over kimg; offline nothing leaves the machine: `wandb sync` sends it later."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def open(cls, path: Path, mode: str, options: dict[str, Any]) -> "WandB":
        """Start one; its files lie in the run folder.

        Raises:
            ImportError: The extra is not installed; the message is the line that installs it.
        """
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"{error}; {WANDB_HINT}") from error
        run = wandb.init(
            project="stylegan-rooted",
            name=path.name,
            dir=str(path),
            mode=mode,
            config=options,
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("*", step_metric=KIMG)
        return cls(run)

    def write(self, row: Mapping[str, float], *, nimg: int, seconds: float) -> None:
        self._run.log({**row, KIMG: nimg / 1000})

    def close(self) -> None:
        self._run.finish()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
