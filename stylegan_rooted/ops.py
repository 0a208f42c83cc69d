"""The compiled operators as a user sees them: build, show, remove. The work is done by torch_utils.op_build."""

import platform
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_utils import custom_ops, op_build


@dataclass(frozen=True)
class Built:
    """Paths of the libraries that are kept now, and why the others are not."""

    paths: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def build() -> Built:
    """Compile all operators that this machine can use, unless they are kept already.

    Raises:
        ValueError: Those of the processor cannot be compiled or kept, or those of a graphics card fail; says why.
    """
    built = Built()
    for name, plugin in op_build.PLUGINS.items():
        try:
            built.paths.append(str(op_build.build(plugin)))
        except op_build.NoToolsError as e:
            if plugin.device == "cpu":
                raise ValueError(str(e)) from None
            built.problems[name] = str(e)
        except op_build.BuildError as e:
            raise ValueError(str(e)) from None
    return built


def info() -> dict[str, Any]:
    """What is asked for, with what it would be compiled, and where the libraries are. Compiles nothing."""
    return {
        custom_ops.VARIABLE: custom_ops.requested(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cache": str(op_build.cache_dir()),
        "libraries": {name: _library_info(plugin) for name, plugin in op_build.PLUGINS.items()},
    }


def clean() -> int:
    """Remove every compiled library from the cache; returns how many there were."""
    return op_build.clean()


def _library_info(plugin: op_build.Plugin) -> dict[str, Any]:
    """One library: is it kept, where is it or would it be, and what compiles it."""
    record: dict[str, Any] = {"built": False, "path": None, "compiler": None, "cuda_home": None, "problem": None}
    try:
        kept = op_build.find(plugin)
        record |= {"built": kept is not None, "path": str(kept) if kept else None}
        tools = op_build.find_tools(plugin)
        record |= {"compiler": tools.compiler, "cuda_home": tools.cuda_home}
        record["path"] = record["path"] or str(op_build.library_path(plugin))
    except op_build.BuildError as e:
        record["problem"] = str(e)
    return record
