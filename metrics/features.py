"""Feature extractors: what turns uint8 images into rows of numbers that distances are measured on.

The only file that knows clean-fid and torchvision, and it imports them on use. Inception's figures are FID and KID;
those of the embedded network are FD and KD of that network.
"""

import contextlib
import hashlib
import importlib
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from metrics import feature_net

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_MODES = ("clean", "legacy_tensorflow")
EXTRACTORS = ("inception", "embedded")

_libraries: list[torch.library.Library] = []  # schemas live as long as the object that declared them


class MetricUnavailable(Exception):
    """A figure cannot be had here and now; one line says why and what would help. Training goes on without it."""


class FeatureExtractor(Protocol):
    """Images to features.

    Attributes:
        name: `inception` or `embedded`.
        digest: SHA-256 of the weights file.
        num_features: Length D of a feature row.
        headline: `FID` where the figures may be called FID and KID, `FD` where they are called FD and KD.
        resize: How images reach the network's input size.
    """

    name: str
    digest: str
    num_features: int
    headline: str
    resize: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 [N, D] of images uint8 [N, 3 or 1, H, W]; grey is repeated to three channels."""
        ...


def get_extractor(
    name: str,
    *,
    mode: str = "clean",
    detector: str | Path | None = None,
    device: torch.device | str = "cpu",
    allow_download: bool = False,
) -> FeatureExtractor:
    """Build a feature extractor.

    Args:
        name: `inception` (clean-fid's) or `embedded` (the network that ships with the project).
        mode: For `inception`, clean-fid's resizing: `clean` (antialiased bicubic to 299) or `legacy_tensorflow` (the
            network's own, comparable with figures of the ADA family).
        detector: Weights file. Required for `embedded`; for `inception` None means clean-fid's own place.
        device: Where to compute.
        allow_download: Let clean-fid fetch the Inception weights if, and only if, they are not in its own place.

    Raises:
        ValueError: For an unknown name or mode, or `embedded` without its file.
        MetricUnavailable: If weights or clean-fid are missing or unusable.
    """
    if name == "embedded":
        if detector is None:
            raise ValueError("the embedded extractor needs the path of its weights file as `detector`")
        return EmbeddedExtractor(detector, device=device)
    if name == "inception":
        return InceptionExtractor(mode=mode, detector=detector, device=device, allow_download=allow_download)
    raise ValueError(f"got extractor {name!r}, wanted one of {', '.join(EXTRACTORS)}")


class EmbeddedExtractor:
    """The small network of `metrics.feature_net`; for its arguments and errors see `get_extractor`."""

    name = "embedded"
    headline = "FD"
    num_features = feature_net.NUM_FEATURES
    resize = f"antialiased bilinear to {feature_net.RESOLUTION}"

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu") -> None:
        try:
            self._net = feature_net.load_feature_net(path, device=device)
        except (OSError, ValueError) as error:
            raise MetricUnavailable(f"cannot read the embedded feature network: {error}") from error
        self.digest = self._net.digest

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self._net(images)


class InceptionExtractor:
    """Inception-v3 features [N, 2048] through clean-fid; for arguments and errors see `get_extractor`."""

    name = "inception"
    headline = "FID"
    num_features = 2048

    def __init__(
        self,
        *,
        mode: str = "clean",
        detector: str | Path | None = None,
        device: torch.device | str = "cpu",
        allow_download: bool = False,
    ) -> None:
        if mode not in INCEPTION_MODES:
            raise ValueError(f"got mode {mode!r}, wanted one of {', '.join(INCEPTION_MODES)}")
        path = find_inception(detector, allow_download=allow_download)
        self.resize = mode
        self.digest = _sha256(path)
        self._device = torch.device(device)
        self._resize_image = cleanfid_module("resize").build_resizer(mode)
        self._model = _load_inception(path, resize_inside=mode == "legacy_tensorflow").to(self._device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = images.expand(-1, 3, -1, -1)
        if self.resize == "clean":
            x = self._resized(x)
        with torch.no_grad(), _quiet():
            try:
                return self._model(x.to(self._device, torch.float32)).to(torch.float32)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise MetricUnavailable(f"the Inception network failed on {list(x.shape)} images: {reason}") from error

    def _resized(self, images: torch.Tensor) -> torch.Tensor:
        """clean-fid's resize to float32 [N, 3, 299, 299] in [0, 255], image by image on the CPU."""
        with _quiet():
            resized = [self._resize_image(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def inception_home() -> Path:
    """The folder in which clean-fid itself looks for the Inception weights."""
    return Path("./") if platform.system() == "Windows" else Path("/tmp")  # as in cleanfid.features 0.1.35


def find_inception(detector: str | Path | None = None, *, allow_download: bool = False) -> Path:
    """The Inception weights file: the given one, else the one in clean-fid's own place.

    Raises:
        MetricUnavailable: If there is none, saying what to fetch and where to put it.
    """
    if detector is not None:
        if not Path(detector).is_file():
            raise MetricUnavailable(f"{detector} is no file; fetch {INCEPTION_URL} and name the file with --detector")
        return Path(detector)
    path = inception_home() / INCEPTION_FILE
    if not path.is_file() and allow_download:
        _download_inception(path)
    if not path.is_file():
        raise MetricUnavailable(
            f"FID and KID need the Inception weights: fetch {INCEPTION_URL} and put it at {path}, "
            "or name the file with --detector-file FILE"
        )
    return path


def cleanfid_module(name: str) -> ModuleType:
    """Import `cleanfid.<name>`, helping torchvision over a torch build that its wheel was not made for.

    Raises:
        MetricUnavailable: If it cannot be imported.
    """
    try:
        return _beside_torchvision(f"cleanfid.{name}")
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MetricUnavailable(
            f"clean-fid cannot be used here ({reason}); install it with: pip install 'clean-fid>=0.1.35' torchvision"
        ) from error


def torch_fidelity_module(name: str) -> ModuleType:
    """Import `torch_fidelity.<name>`: a second opinion for tests and benchmarks, which needs the same help.

    Raises:
        ImportError: It is not installed.
    """
    return _beside_torchvision(f"torch_fidelity.{name}")


def _beside_torchvision(name: str) -> ModuleType:
    """Import a module that imports torchvision.

    torchvision's PyPI wheels are CUDA builds. Beside a CPU-only torch their operators are never registered, and the
    import stops at the first of the two schemas it needs; declaring both is enough (seen with torchvision 0.28.0,
    torch 2.13.0+cpu).
    """
    with _quiet():
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
        _declare_torchvision_schemas()
        broken = ("torchvision", name.split(".")[0])
        for imported in [key for key in sys.modules if key.split(".")[0] in broken]:
            del sys.modules[imported]  # half-initialised
        return importlib.import_module(name)


def _declare_torchvision_schemas() -> None:
    if _libraries:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")  # noqa: TOR901
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def _load_inception(path: Path, *, resize_inside: bool) -> Any:
    """clean-fid's wrapper, which takes a folder and insists on the file's name: give it a folder with a link."""
    wrapper = cleanfid_module("inception_torchscript").InceptionV3W
    with tempfile.TemporaryDirectory() as folder, _quiet():
        link = Path(folder) / INCEPTION_FILE
        try:
            os.symlink(path.resolve(), link)
        except OSError:  # Windows without the privilege
            link.write_bytes(path.read_bytes())
        try:
            return wrapper(folder, download=False, resize_inside=resize_inside).eval()
        except (RuntimeError, AttributeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise MetricUnavailable(
                f"{path} is not the TorchScript Inception network ({reason}); fetch {INCEPTION_URL} anew"
            ) from error


def _download_inception(path: Path) -> None:
    """Fetch through clean-fid into a private folder, then move into place: a broken download leaves nothing behind."""
    fetch = cleanfid_module("downloads_helper").check_download_inception
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            os.replace(fetch(fpath=folder), path)
    except OSError as error:
        raise MetricUnavailable(
            f"could not fetch {INCEPTION_URL} ({error}); put the file at {path} or name it with --detector-file FILE"
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet():
    """Keep other people's deprecation warnings out of our output, and their global filters out of our process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
