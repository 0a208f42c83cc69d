"""What `convert` can be asked for; checked without importing torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = {
    "pickle": ".pkl",
    "safetensors": ".safetensors",
    "folder": "",
    "rosinality": ".pt",
    "onnx": ".onnx",
    "torch-export": ".pt2",
}
FORMATS = {
    "pickle": "network-snapshot pickle of the StyleGAN2-ADA family",
    "safetensors": "our own form, with NAME.config.json beside it",
    "folder": "folder in the hub's form, with model card and samples",
    "rosinality": "checkpoint for rosinality's stylegan2-pytorch",
    "onnx": "the generator for ONNX runtimes",
    "torch-export": "the generator as a graph of torch.export",
}
GRAPHS = ("onnx", "torch-export")
DTYPES = ("float32", "float16")
PARTS = ("generator", "mapping", "synthesis")


@dataclass(frozen=True)
class ConvertOptions:
    """How to write.

    Attributes:
        only_ema: leave G and D out where the format allows it: for making images, a third of the size.
        dtype: of safetensors weights: float32 or float16.
        part: of graphs: generator, mapping or synthesis.
        any_channels: write channel counts that rosinality's own table does not have.
        overwrite: replace what is there.
        licences: what the model card and header say: `weights`, `base_model`, `base_licence`.
        seed: of a new discriminator, for formats that need one the source does not have.
    """

    only_ema: bool = False
    dtype: str = "float32"
    part: str = "generator"
    any_channels: bool = False
    overwrite: bool = False
    licences: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype} is unknown; one of {', '.join(DTYPES)}")
        if self.part not in PARTS:
            raise ValueError(f"--part {self.part} is unknown; one of {', '.join(PARTS)}")

    def check(self, to: str) -> None:
        """Refuse options that the format has no use for.

        Raises:
            ValueError: one of them.
        """
        if self.dtype != "float32" and to not in ("safetensors", "folder"):
            raise ValueError(f"--dtype {self.dtype} is for --to safetensors and folder, not {to}")
        if self.part != "generator" and to not in GRAPHS:
            raise ValueError(f"--part {self.part} is for --to {' and '.join(GRAPHS)}, not {to}")
        if self.any_channels and to != "rosinality":
            raise ValueError(f"--any-channels is for --to rosinality, whose code has a table of channels, not {to}")
        if self.only_ema and to not in ("safetensors", "folder", "rosinality"):
            reason = "a pickle of that family holds G, D and G_ema" if to == "pickle" else "a graph holds G_ema only"
            raise ValueError(f"--only-ema is for --to safetensors, folder and rosinality: {reason}")


def choose_format(dest: "str | os.PathLike", to: "str | None") -> str:
    """The format that `to` or else the name of DEST asks for.

    Raises:
        ValueError: neither tells.
    """
    if to is not None:
        if to not in FORMATS:
            raise ValueError(f"--to {to} is unknown; one of {', '.join(FORMATS)}")
        return to
    name = os.fspath(dest)
    if name.endswith(("/", os.sep)) or os.path.isdir(name):
        return "folder"
    suffix = Path(name).suffix.lower()
    for known, ending in SUFFIXES.items():
        if ending and suffix == ending:
            return known
    endings = ", ".join(ending for ending in SUFFIXES.values() if ending)
    raise ValueError(f"DEST {name} does not tell the format: end it in {endings} or / (a folder), or say --to")
