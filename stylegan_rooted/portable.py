"""Generators for other programs: one function of z, labels and truncation, written with torch.export as `.pt2`.

The exported graph holds ordinary tensor operations only: the plain definition of every operator, one convolution per
layer for the whole batch, constant noise, float32, any batch size. No TorchScript: PyTorch has deprecated it.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dnnlib.util import atomic_file
from stylegan_rooted.convert_options import PARTS
from torch_utils import custom_ops

TOLERANCE = 2e-5  # largest difference of the outputs, relative to the largest value; float32 sums in another order
EXAMPLE_BATCH = 2
CHECKED_BATCHES = (1, 3)


class Whole(torch.nn.Module):
    """z [N, z_dim], c [N, c_dim] (conditional networks), truncation_psi [] -> image [N, C, R, R] of about [-1, 1]."""

    def __init__(self, G: torch.nn.Module, part: str = "generator") -> None:
        super().__init__()
        self.G = G
        self.part = part
        self.is_conditional = bool(G.c_dim)

    def forward(self, z: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        """The image, or ws [N, num_ws, w_dim] for the part `mapping`."""
        c = rest[0] if self.is_conditional else None
        ws = self.G.mapping(z, c)  # type: ignore[operator]
        w_avg = self.G.mapping.w_avg  # type: ignore[union-attr]
        ws = w_avg + rest[-1] * (ws - w_avg)
        return ws if self.part == "mapping" else _image(self.G, ws)


class Synthesis(torch.nn.Module):
    """ws [N, num_ws, w_dim] -> image [N, C, R, R] of about [-1, 1]."""

    def __init__(self, G: torch.nn.Module) -> None:
        super().__init__()
        self.G = G

    def forward(self, ws: torch.Tensor) -> torch.Tensor:
        """The image."""
        return _image(self.G, ws)


@dataclass(frozen=True)
class Exported:
    """A graph and how to call it.

    Attributes:
        program: what torch.export made.
        module: the module that was exported; it computes the same with PyTorch.
        inputs: names of the inputs, in order: z, c, truncation_psi or ws.
        output: name of the output: image or ws.
    """

    program: torch.export.ExportedProgram
    module: torch.nn.Module
    inputs: tuple[str, ...]
    output: str

    def example(self, batch: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Inputs for so many images."""
        return _example(self.module.G, self.inputs, batch, seed)  # type: ignore[arg-type]


def export(G: torch.nn.Module, part: str = "generator") -> Exported:
    """Turn a plain generator, or a part of it, into a graph.

    Args:
        G: generator on the CPU, in eval mode.
        part: one of `PARTS`.

    Raises:
        ValueError: unknown part.
    """
    if part not in PARTS:
        raise ValueError(f"--part {part} is unknown; one of {', '.join(PARTS)}")
    names: tuple[str, ...] = ("ws",) if part == "synthesis" else ("z", "c", "truncation_psi")
    if not G.c_dim:
        names = tuple(name for name in names if name != "c")
    module = (Synthesis(G) if part == "synthesis" else Whole(G, part)).eval().requires_grad_(False)
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = [None if name == "truncation_psi" else {0: batch} for name in names]
    if part != "synthesis":  # `*rest` of `Whole.forward` is one argument
        shapes = [shapes[0], tuple(shapes[1:])]
    with plain_operators(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts among each other
        program = torch.export.export(module, _example(G, names, EXAMPLE_BATCH, 0), dynamic_shapes=tuple(shapes))
    return Exported(program, module, names, "ws" if part == "mapping" else "image")


def save(exported: Exported, path: "str | os.PathLike") -> None:
    """Write the graph as torch.export's `.pt2`, atomically."""
    with atomic_file(path) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported.program, stream)  # type: ignore[arg-type]


def load(path: "str | os.PathLike") -> torch.nn.Module:
    """The function in a `.pt2` file. Only for files that you wrote yourself: torch.export's format is not made safe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(os.fspath(path)).module()


def check(exported: Exported, function: Any) -> float:
    """Compare a function with the module that was exported, for several batch sizes and truncations.

    Args:
        exported: what was written.
        function: takes the inputs as tensors, returns a tensor; of the file as another program runs it.

    Returns:
        Largest difference, relative to the largest value.

    Raises:
        ValueError: it is over `TOLERANCE`, or a value is not finite, of which nothing can be said.
    """
    worst = 0.0
    for seed, batch in enumerate(CHECKED_BATCHES):
        inputs = exported.example(batch, seed)
        with torch.no_grad(), plain_operators():
            wanted = exported.module(*inputs)
        got = function(*inputs)
        if not (wanted.isfinite().all() and got.isfinite().all()):
            whose = "the exported file" if wanted.isfinite().all() else "the network"
            raise ValueError(f"what {whose} computes is not finite, so it can't be checked; nothing was written")
        worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
    if not worst <= TOLERANCE:
        raise ValueError(
            f"the exported file differs from the network by {worst:.2g} of the largest value, more than {TOLERANCE:g}; "
            "nothing was written"
        )
    return worst


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Inside, every operator is its plain definition: a graph of it needs nothing of this program."""
    before = os.environ.get(custom_ops.VARIABLE)
    os.environ[custom_ops.VARIABLE] = "ref"
    try:
        yield
    finally:
        if before is None:
            del os.environ[custom_ops.VARIABLE]
        else:
            os.environ[custom_ops.VARIABLE] = before


def _image(G: Any, ws: torch.Tensor) -> torch.Tensor:
    return G.synthesis(ws, noise_mode="const", force_fp32=True, fused_modconv=False)


def _example(G: Any, names: tuple[str, ...], batch: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    psi = torch.tensor(1.0 if seed == 0 else 0.7)
    classes = torch.eye(max(G.c_dim, 1))[torch.arange(batch) % max(G.c_dim, 1)]
    values = {
        "z": torch.randn([batch, G.z_dim], generator=generator),
        "c": classes,
        "truncation_psi": psi,
        "ws": torch.randn([batch, G.num_ws, G.w_dim], generator=generator),
    }
    return tuple(values[name] for name in names)
