"""The small feature network that ships with the project, for machines that have nothing else.

Owns its architecture and its file format. Knows nothing of where the file lies, of training it, or of Inception:
distances measured with it are its own and must never be called FID or KID.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dnnlib.util import open_regular

RESOLUTION = 32
"""Side of the square to which every image is resized before the first convolution."""


@dataclass(frozen=True)
class Layer:
    """One convolution followed by ReLU; `tap` says that its spatial mean is part of the feature vector."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    tap: bool = False


LAYERS = (
    Layer(3, 24, 3, 1),
    Layer(24, 32, 3, 2),
    Layer(32, 32, 3, 1, tap=True),
    Layer(32, 64, 3, 2),
    Layer(64, 96, 3, 1),
    Layer(96, 128, 3, 2),
    Layer(128, 64, 1, 1, tap=True),
)
NUM_FEATURES = sum(layer.out_channels for layer in LAYERS if layer.tap)
FORMAT = "stylegan-rooted feature net 1"


def prepare_images(images: torch.Tensor) -> torch.Tensor:
    """Bring images of any size to the network's input: RGB, 32 x 32, range [-1, 1].

    Args:
        images: uint8 or float [0, 255], [N, 3, H, W] or [N, 1, H, W]; grey is repeated to three channels.

    Returns:
        float32 [N, 3, 32, 32]. Reduction is antialiased bilinear, enlargement bilinear.

    Raises:
        ValueError: For another number of axes or channels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"got images of shape {list(images.shape)}, wanted [N, 3, H, W] or [N, 1, H, W]")
    x = images.to(torch.float32) / 127.5 - 1
    if x.shape[2:] != (RESOLUTION, RESOLUTION):
        x = F.interpolate(x, size=(RESOLUTION, RESOLUTION), mode="bilinear", align_corners=False, antialias=True)
    return x.expand(-1, 3, -1, -1)


class FeatureNet:
    """The network in evaluation form: batch norm folded into the convolutions, features scaled to unit variance.

    Args:
        weights: `conv<i>.weight`, `conv<i>.bias` for every row of `LAYERS`, and `scale` [NUM_FEATURES].
        digest: SHA-256 of the file they came from.
        device: Where to compute.

    Raises:
        ValueError: If an array is missing or has another shape.
    """

    def __init__(self, weights: dict[str, np.ndarray], *, digest: str, device: torch.device | str = "cpu") -> None:
        for name, shape in expected_shapes().items():
            if name not in weights or weights[name].shape != shape:
                got = weights[name].shape if name in weights else "nothing"
                raise ValueError(f"feature net: got {got} for {name}, wanted {shape}; the file is not of this format")
        self.digest = digest
        self.device = torch.device(device)
        self.weights = {
            name: torch.from_numpy(np.asarray(weights[name], dtype=np.float32).copy()).to(self.device)
            for name in expected_shapes()
        }

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of a batch.

        Args:
            images: uint8 [N, 3 or 1, H, W].

        Returns:
            float32 [N, NUM_FEATURES] on `device`; each image's features depend on that image alone.
        """
        x = prepare_images(images.to(self.device))
        taps = []
        for i, layer in enumerate(LAYERS):
            weight, bias = self.weights[f"conv{i}.weight"], self.weights[f"conv{i}.bias"]
            x = F.conv2d(x, weight, bias, stride=layer.stride, padding=layer.kernel // 2).relu_()
            if layer.tap:
                taps.append(x.mean(dim=(2, 3)))
        return torch.cat(taps, dim=1) * self.weights["scale"]


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays in a weights file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, layer in enumerate(LAYERS):
        shapes[f"conv{i}.weight"] = (layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
        shapes[f"conv{i}.bias"] = (layer.out_channels,)
    shapes["scale"] = (NUM_FEATURES,)
    return shapes


def save_feature_net(path: str | Path, weights: dict[str, np.ndarray]) -> str:
    """Write a weights file (npz without pickles, equal bytes for equal weights) and return its SHA-256."""
    buffer = io.BytesIO()
    arrays = {name: np.asarray(weights[name], dtype=np.float32) for name in expected_shapes()}
    np.savez(buffer, allow_pickle=False, format=np.array(json.dumps(FORMAT)), **arrays)
    Path(path).write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def load_feature_net(path: str | Path, *, device: torch.device | str = "cpu") -> FeatureNet:
    """Read a weights file; nothing in it is executed.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a feature-net file.
    """
    with open_regular(path) as file:
        data = file.read()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged zip raises many kinds
        raise ValueError(f"{path} is not a feature-net file ({type(error).__name__})") from error
    if "format" not in arrays or str(arrays["format"]) != json.dumps(FORMAT):
        raise ValueError(f"{path} is not a feature-net file (wanted format {FORMAT!r})")
    return FeatureNet(arrays, digest=hashlib.sha256(data).hexdigest(), device=device)
