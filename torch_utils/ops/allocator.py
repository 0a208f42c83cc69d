"""Whether freed memory of tensors waits for the next tensor of its size (allocator_cpu.cpp), for long runs on a CPU.

An extra over `misc.keep_freed_memory`, worth a few percent of a small network's step, and off unless asked for: at 256
pixels it costs a quarter more memory. To be rid of it, remove both files and the lines that name them.
"""

import os

import torch

from torch_utils import custom_ops

VARIABLE = "STYLEGAN_ROOTED_ALLOCATOR"
CHOICES = ("system", "blocks")


def keep_blocks() -> bool:
    """Let freed blocks wait, 128 MiB at most, for the rest of the process, if the environment says `blocks`.

    Returns:
        Whether it was done; False where there are no compiled operators, or nobody asked.

    Raises:
        ValueError: The variable holds what is not a choice.
    """
    value = os.environ.get(VARIABLE, "").strip().lower() or "system"
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE} is {value!r}, wanted one of {', '.join(CHOICES)}")
    if value == "system" or custom_ops.selected() != "native":
        return False
    torch.ops.stylegan_rooted.keep_blocks(True)
    return True


def kept_bytes() -> int:
    """How many bytes wait; 0 without compiled operators."""
    return torch.ops.stylegan_rooted.kept_bytes() if custom_ops.selected() == "native" else 0


def give_back() -> None:
    """Hand back what waits, and let nothing wait any more."""
    if custom_ops.selected() == "native":
        torch.ops.stylegan_rooted.keep_blocks(False)
