"""The helpers that network and augmentation sources call, and copying of parameters by name."""

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch

Function = TypeVar("Function", bound=Callable)

nan_to_num = torch.nan_to_num
symbolic_assert = torch._assert


def assert_shape(tensor: torch.Tensor, ref_shape: Sequence[int | None]) -> None:
    """Check the shape of a tensor inside a network.

    Args:
        tensor: The tensor.
        ref_shape: Its wanted sizes; None = any size.

    Raises:
        AssertionError: Another number of axes, or another size on one of them.
    """
    if tensor.ndim != len(ref_shape):
        raise AssertionError(f"tensor has {tensor.ndim} axes {tuple(tensor.shape)}, wanted {len(ref_shape)}")
    for axis, (size, wanted) in enumerate(zip(tensor.shape, ref_shape)):
        if wanted is not None and size != wanted:
            raise AssertionError(f"axis {axis} of {tuple(tensor.shape)} has size {int(size)}, wanted {int(wanted)}")


def constant(
    value: Any,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """A tensor of fixed values, made once and shared by all callers: treat it as read-only.

    Args:
        value: Number, nested list or array.
        shape: Broadcast to this shape; None = as given.
        dtype: None = torch's default dtype.
        device: None = CPU.
        memory_format: None = contiguous.
    """
    values = np.asarray(value)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    device = torch.device("cpu" if device is None else device)
    memory_format = torch.contiguous_format if memory_format is None else memory_format
    key = (values.shape, values.dtype.str, values.tobytes(), None if shape is None else tuple(shape), dtype, device)
    return _constant((*key, memory_format), values)


def profiled_function(fn: Function) -> Function:
    """Decorate a function so that its calls appear under its name in torch's profiler."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.profiler.record_function(fn.__name__):
            return fn(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


@contextlib.contextmanager
def suppress_tracer_warnings() -> Iterator[None]:
    """Silence `torch.jit.TracerWarning` inside the block, and nothing else."""
    rule = ("ignore", None, torch.jit.TracerWarning, None, 0)
    warnings.filters.insert(0, rule)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            warnings.filters.remove(rule)  # type: ignore[attr-defined]


def keep_freed_memory() -> bool:
    """Ask the C library to reuse freed memory instead of handing it back to the system; for long runs on a CPU.

    Large tensors are otherwise mapped and cleared afresh by the kernel every time: a tenth of a small network's
    training step, more than a third of one at 256 pixels. Where the system lets a process ask for huge pages, half of
    the machine's memory is set aside for the heap and huge pages are asked for in it; only what is used is taken.
    Affects the whole process and cannot be undone.

    Returns:
        Whether it was done; False on systems without glibc's `mallopt`.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, TypeError, AttributeError):
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h; a threshold of -1 is none
    settings = {mmap_max: 0, trim_threshold: -1, top_pad: 2**27}
    done = all([bool(mallopt(parameter, value)) for parameter, value in settings.items()])
    if done:
        _ask_for_huge_pages(libc)
    return done


def _ask_for_huge_pages(libc: Any) -> None:
    """Let the heap grow once, to half of the machine's memory, and tell the kernel to back it with huge pages."""
    try:
        if "[madvise]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            return  # always, never, or no such thing: nothing to ask for
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return  # what is set aside would be taken from everybody else
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        start = libc.sbrk(ctypes.c_ssize_t(0))
        libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2))))
        end = libc.sbrk(ctypes.c_ssize_t(0))
    except (OSError, ValueError, AttributeError):
        return
    start -= start % mmap.PAGESIZE
    if end > start:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_HUGEPAGE))


def params_and_buffers(module: torch.nn.Module) -> list[torch.Tensor]:
    """All parameters, then all buffers."""
    return [*module.parameters(), *module.buffers()]


def named_params_and_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters, then all buffers, with their names."""
    return [*module.named_parameters(), *module.named_buffers()]


def first_nonfinite(module: torch.nn.Module) -> str | None:
    """Name of the first parameter or buffer with a number that is NaN or infinite; None if all are finite."""
    tensors = named_params_and_buffers(module)
    return next((name for name, tensor in tensors if not bool(tensor.isfinite().all())), None)


def copy_params_and_buffers(
    src_module: torch.nn.Module, dst_module: torch.nn.Module, require_all: bool = False
) -> None:
    """Copy the tensors that both modules have, by name, in place.

    Args:
        src_module: Where values come from.
        dst_module: What is overwritten; `requires_grad` of its tensors stays as it is.
        require_all: Every tensor of `dst_module` must exist in `src_module`.

    Raises:
        ValueError: A tensor is missing although `require_all`, or has another shape.
    """
    source = dict(named_params_and_buffers(src_module))
    pairs = []
    for name, tensor in named_params_and_buffers(dst_module):
        if name not in source:
            if require_all:
                raise ValueError(f"{type(dst_module).__name__} has a tensor {name!r} that the source lacks")
        elif source[name].shape != tensor.shape:
            shapes = f"{tuple(source[name].shape)} in the source, {tuple(tensor.shape)} in the destination"
            raise ValueError(f"tensor {name!r} has shape {shapes}")
        else:
            pairs.append((tensor, source[name]))
    with torch.no_grad():
        for tensor, value in pairs:
            tensor.copy_(value.detach())


def print_module_summary(
    module: torch.nn.Module,
    inputs: Sequence[Any],
    max_nesting: int = 3,
    skip_redundant: bool = True,
    file: TextIO | None = None,
) -> Any:
    """Run a module once and write a table of its parts: parameters, buffers, output shapes.

    Args:
        module: The module.
        inputs: Its positional arguments.
        max_nesting: How deep to look, in levels below the module.
        skip_redundant: Leave out parts that own no tensor and only repeat the output of what they contain.
        file: Where to write; None = stderr.

    Returns:
        What the module returned.
    """
    rows: list[tuple[str, torch.nn.Module, list[torch.Tensor]]] = []
    handles = []

    def remember(name: str) -> Callable:
        def hook(part: torch.nn.Module, _: Any, output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else [output]
            rows.append((name, part, [t for t in outputs if isinstance(t, torch.Tensor)]))

        return hook

    for name, part in module.named_modules():
        if (name.count(".") + 1 if name else 0) <= max_nesting:
            handles.append(part.register_forward_hook(remember(name)))
    try:
        outputs = module(*inputs)
    finally:
        for handle in handles:
            handle.remove()

    table = [["", "parameters", "buffers", "output", "dtype"]]
    for name, part, tensors in rows:
        is_own = bool(list(part.parameters(recurse=False)) or list(part.buffers(recurse=False)))
        if skip_redundant and name and not is_own and not tensors:
            continue
        table.append([
            name or type(module).__name__,
            str(sum(p.numel() for p in part.parameters(recurse=not name))),
            str(sum(b.numel() for b in part.buffers(recurse=not name))),
            " ".join(str(list(t.shape)) for t in tensors),
            " ".join(str(t.dtype).removeprefix("torch.") for t in tensors),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    stream = sys.stderr if file is None else file
    stream.write("\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table) + "\n")
    return outputs


_constants: dict[tuple, torch.Tensor] = {}


def _constant(key: tuple, values: np.ndarray) -> torch.Tensor:
    """Look up or make the tensor of `constant`."""
    if key not in _constants:
        *_, shape, dtype, device, memory_format = key
        with torch.inference_mode(False):  # a tensor born in inference mode would be refused by autograd later
            tensor = torch.as_tensor(values.copy(), dtype=dtype, device=device)
            if shape is not None:
                tensor = tensor.expand(shape)
            _constants[key] = tensor.contiguous(memory_format=memory_format)
    return _constants[key]
