"""The compiled operators as a user sees them: build, show, remove. The work is done by torch_utils.custom_ops."""

import platform
from typing import Any

import torch

from torch_utils import custom_ops


def build() -> str:
    """Compile the operators for this machine unless they are kept already; returns the library's path.

    Raises:
        ValueError: They cannot be compiled, kept or loaded; says why.
    """
    try:
        path = custom_ops.build()
    except custom_ops.BuildError as e:
        raise ValueError(str(e)) from None
    return str(path)


def info() -> dict[str, Any]:
    """What is asked for, what would run, with which compiler, and where the library is. Compiles nothing."""
    record: dict[str, Any] = {
        custom_ops.VARIABLE: custom_ops.requested(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cache": str(custom_ops.cache_dir()),
        "compiler": None,
        "library": None,
        "built": False,
        "problem": None,
    }
    try:
        record["compiler"] = custom_ops.find_compiler()
        path = custom_ops.library_path(record["compiler"])
    except custom_ops.BuildError as e:
        return {**record, "problem": str(e)}
    return {**record, "library": str(path), "built": path.is_file()}


def clean() -> int:
    """Remove every compiled library from the cache; returns how many there were."""
    return custom_ops.clean()
