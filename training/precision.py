"""Half-precision blocks on and off. Networks keep what their checkpoint says; only the running copy is switched.

A checkpoint made for a GPU runs its highest resolutions in float16, which a CPU computes slowly and less exactly.
Training on a CPU therefore runs them in float32, and puts the flag back into the snapshots it writes.
"""

import contextlib
from collections.abc import Iterator

import torch


def half_precision_blocks(*networks: torch.nn.Module) -> list[torch.nn.Module]:
    """All blocks of the networks that are set to run in float16."""
    return [m for net in networks for m in net.modules() if getattr(m, "use_fp16", False)]


class FullPrecision:
    """Runs the given networks in float32; `original()` shows their own settings while a snapshot is written."""

    def __init__(self, *networks: torch.nn.Module) -> None:
        self._blocks = half_precision_blocks(*networks)
        self._set(False)

    @contextlib.contextmanager
    def original(self) -> Iterator[None]:
        """Inside the block the networks carry the flags of their checkpoint."""
        self._set(True)
        try:
            yield
        finally:
            self._set(False)

    def _set(self, value: bool) -> None:
        for block in self._blocks:
            block.use_fp16 = value
