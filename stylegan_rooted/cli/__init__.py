"""The command line. A lazy group: `--help` imports no torch, and a command's module is imported when it is called.

Exit codes: 0 done, 1 the work could not be done (one line `Error: …`), 2 wrong usage, 3 training diverged, 130 and 143
stopped by SIGINT and SIGTERM.
"""

import importlib
import os
import sys

import click

from stylegan_rooted import __version__

COMMANDS = {
    "demo": "Fine-tune the embedded network on emoji, with a report; needs nothing else.",
    "finetune": "Fine-tune a network pickle on a folder or zip of images (or train from scratch).",
    "compare": "Train several losses on several seeds, all else equal, and say what the differences show.",
    "generate": "Write one PNG per seed.",
    "grid": "Write one PNG with rows and columns of images.",
    "report": "Is it working, when to stop: runs and networks as one page, with figures, curves and images.",
    "watch": "Serve a run's report on this machine as it trains; its state in one line.",
    "convert": "Write a network file in another format.",
    "metrics": "Measure a network: FID, KID, precision, recall, copies, path length; each with its error.",
    "inspect": "Tell what is in a pickle without executing it.",
    "surgery": "Change a network: classes, channels, resolution, layers; exact where possible.",
    "dataset": "Check images, build a training zip from them, tell what is in one.",
    "cache": "List or clear what is kept on disk: features of data sets, downloads.",
    "study": "Compare the rooted objective with cross-entropy on classifiers, paired by seed; with a report.",
    "doctor": "Tell what this installation and machine can do, with remedies.",
    "ops": "Build, show or remove the compiled operators.",
}
USER_ERRORS = (ValueError, OSError)


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"stylegan_rooted.cli.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="stylegan-rooted")
def group() -> None:
    """Fine-tune StyleGAN2-ADA networks with the logistic loss or the Rooted Logistic Objective.

    Each command has its own --help. Messages go to stderr, results that machines read go to stdout.
    """


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit; user errors become one line on stderr."""
    try:
        run(argv)
    except SystemExit as e:
        leave(e.code)
        raise
    leave(0)


def leave(code: int | str | None) -> None:
    """Under torchrun, end this process here: now and then torch's threads abort the interpreter's own end."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def run(argv: list[str] | None = None) -> None:
    """`main` without its end."""
    try:
        code = group.main(args=argv, prog_name="stylegan-rooted", standalone_mode=False)
        if isinstance(code, int) and code:  # of click's Exit, which does not reach us as an exception
            sys.exit(code)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.UsageError as e:
        hint = f" (see {e.ctx.command_path} --help)" if e.ctx is not None else ""
        fail(f"{one_line(e.format_message())}{hint}", 2)
    except click.ClickException as e:
        fail(one_line(e.format_message()), e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # the reader of our output left: nothing to say, nobody to say it to
        sys.exit(1)
    except USER_ERRORS as e:
        if os.environ.get("STYLEGAN_ROOTED_TRACEBACK"):
            raise
        fail(describe(e), 1)
    except (ImportError, AttributeError):
        fail_for_strangers()
        raise
    except MemoryError as e:
        fail(describe(e), 1)
    except RuntimeError as e:
        kind = type(e).__name__
        if kind == "ProcessFailed":  # without text: another process of the run says why
            if str(e):
                click.echo(f"Error: {e}", err=True)
            sys.exit(1)
        if kind not in ("TrainingDiverged", "OutOfMemoryError") or os.environ.get("STYLEGAN_ROOTED_TRACEBACK"):
            raise
        remedy = "; with finetune, a smaller --batch-gpu needs less" if kind == "OutOfMemoryError" else ""
        fail(f"{one_line(str(e))}{remedy}", 3 if kind == "TrainingDiverged" else 1)


def fail_for_strangers() -> None:
    """Where other repositories' packages hide this project's, that is why something could not be imported: say so."""
    from stylegan_rooted import doctor

    found = doctor.strangers()
    if found and not os.environ.get("STYLEGAN_ROOTED_TRACEBACK"):
        listed, remedy = doctor.describe_strangers(found)
        fail(f"found {listed}; {remedy}", 1)


def fail(message: str, code: int) -> None:
    """One line on stderr, then exit."""
    if first_here():
        click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def first_here() -> bool:
    """Whether this process speaks for its machine: under torchrun, all of them meet the same wrong options."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0"


def main_process() -> bool:
    """Whether this process prints results: the only one, or rank 0 under torchrun."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def describe(error: BaseException) -> str:
    """An exception as one line that names the file where the system did."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return one_line(f"{name}{error.strerror}")
    return one_line(str(error) or type(error).__name__)


def one_line(text: str) -> str:
    """White space folded, line breaks gone."""
    return " ".join(text.split())
