"""Which implementation of the operators runs, and the one place that loads and declares compiled ones.

The one switch is the environment variable STYLEGAN_ROOTED_OPS. `auto` (the default) uses compiled operators where they
are faster: libraries that are kept in the user's cache folder, or that a compiler can make, once, on first use; where
neither is to be had, equal but faster paths made of torch calls. `native` does the same and warns if it can't, `torch`
keeps to the torch calls, `ref` to the plain definitions of every operator. No operator fails for want of a compiler.

Nothing happens at import. What came of the first use is remembered for the process: a library is never tried twice.
"""

import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_utils import op_build

VARIABLE = "STYLEGAN_ROOTED_OPS"
CHOICES = ("auto", "native", "torch", "ref")
NAMESPACE = "stylegan_rooted"

_lock = threading.RLock()
_outcomes: dict[str, "Outcome"] = {}  # of this process's one attempt per library
_declared: dict[str, Any] = {}


@dataclass(frozen=True)
class Outcome:
    """What came of the attempt to get a library: loaded from `path`, or not for `reason`."""

    path: Path | None
    reason: str


def requested() -> str:
    """What the environment asks for: `auto`, `native`, `torch` or `ref`.

    Raises:
        ValueError: The variable holds anything else.
    """
    value = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE} is {value!r}, wanted one of {', '.join(CHOICES)}")
    return value


def selected(library: str = "cpu") -> str:
    """The family of implementations in use: `native` (compiled) or `ref` (torch calls). The first call may compile.

    Args:
        library: A key of `op_build.PLUGINS`, as the types of devices that have one; any other is served by torch.

    Raises:
        ValueError: The variable is not understood.
    """
    may = requested() in ("auto", "native") and library in op_build.PLUGINS
    return "native" if may and available(library) else "ref"


def fast_paths(impl: str = "cuda") -> bool:
    """Whether an operator called with `impl` may take its faster path instead of its plain definition.

    Args:
        impl: The operator's argument: `cuda` (the default: whatever is fastest) or `ref` (the plain definition).

    Raises:
        ValueError: `impl` or the environment variable is not understood.
    """
    if impl not in ("cuda", "ref"):
        raise ValueError(f"impl is {impl!r}, wanted 'cuda' or 'ref'")
    return requested() != "ref" and impl != "ref"


def available(library: str = "cpu") -> bool:
    """Whether a library is loaded; the first call finds or compiles it, or says once why not."""
    outcome = _outcomes.get(library)
    return (outcome or _resolve(library)).path is not None


def problem(library: str = "cpu") -> str:
    """Why a library is not loaded; empty if it is. The first call may compile."""
    return "" if available(library) else _outcomes[library].reason


def describe(library: str = "cpu") -> str:
    """One line for logs: what is asked for and what runs on a type of device. The first call may compile."""
    asked = requested()
    if asked == "ref":
        return "ref: plain definitions"
    if asked == "torch":
        return "torch: fast paths made of torch calls"
    if library not in op_build.PLUGINS:
        return f"{asked}: torch calls; there are no compiled operators for {library}"
    reason = problem(library)
    if not reason:
        return f"{asked}: compiled operators"
    return f"{asked}: torch calls; compiled operators are not available: {reason.splitlines()[0]}"


def declare(
    name: str,
    schema: str,
    shape: Callable[..., Any],
    setup_context: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """The compiled operator `name`, made known to torch with schema, shape function and gradient on the first call.

    Without a `backward` it has none, or the library's own (derivatives_cpu.cpp).

    The libraries hold its implementations, one per kind of device; all share what is declared here.
    torch.compile cannot trace that first call, so have one call outside of it before.
    """
    op = _declared.get(name)
    if op is not None:
        return op
    with _lock:
        if name not in _declared:
            qualified = f"{NAMESPACE}::{name}"
            torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(qualified, shape)
            if backward is not None:
                torch.library.register_autograd(qualified, backward, setup_context=setup_context)
            _declared[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
        return _declared[name]


def declared(name: str) -> Any:
    """What `declare` gave for that name; None before."""
    return _declared.get(name)


def _resolve(library: str) -> Outcome:
    """Get a library, once per process; remember a failure and tell of it once."""
    with _lock:
        if library in _outcomes:
            return _outcomes[library]
        is_broken = True
        try:
            outcome = Outcome(_load(op_build.PLUGINS[library]), "")
        except op_build.NoToolsError as e:
            outcome, is_broken = Outcome(None, str(e)), False
        except op_build.BuildError as e:
            outcome = Outcome(None, str(e))
        except Exception as e:  # whatever it is, torch calls do the same work
            outcome = Outcome(None, f"{type(e).__name__}: {e}")
        _outcomes[library] = outcome
    if outcome.path is None:
        text = f"compiled operators are not available, torch calls do their work: {outcome.reason}"
        if is_broken or requested() == "native":
            warnings.warn(text, stacklevel=2)
        else:
            op_build.say(text)
    return outcome


def _load(plugin: op_build.Plugin) -> Path:
    """Load a library, which is compiled before if need be, and once again if the kept one does not load."""
    path = op_build.build(plugin)
    try:
        torch.ops.load_library(str(path))
        return path
    except OSError as e:
        broken = str(e)
    op_build.discard(path)
    path = op_build.build(plugin)
    try:
        torch.ops.load_library(str(path))
    except OSError as e:
        raise op_build.BuildError(f"{path} does not load: {e} (before: {broken})") from None
    return path
