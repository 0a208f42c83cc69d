"""Feature extractors: what turns uint8 images into rows of numbers that distances are measured on.

The only file that knows clean-fid and torchvision, and it imports them on use. Inception's figures are FID and KID;
those of the embedded network are FD and KD of that network.
"""

import contextlib
import hashlib
import importlib
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch

from dnnlib.util import is_url, make_cache_dir_path, open_url
from metrics import feature_net

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_MODES = ("clean", "legacy_tensorflow", "legacy_pytorch")
PYTORCH_FILE = "pt_inception-2015-12-05-6726825d.pth"
PYTORCH_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{PYTORCH_FILE}"
VGG16_FILE = "vgg16.pt"
VGG16_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{VGG16_FILE}"
EXTRACTORS = ("inception", "embedded", "vgg16", "torchscript", "timm:MODEL")

_libraries: list[torch.library.Library] = []  # schemas live as long as the object that declared them


class MetricUnavailable(Exception):
    """A figure cannot be had here and now; one line says why and what would help. Training goes on without it."""


class FeatureExtractor(Protocol):
    """Images to features.

    Attributes:
        name: `inception`, `embedded`, `vgg16`, `torchscript` or `timm:MODEL`.
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
) -> FeatureExtractor:
    """Build a feature extractor.

    Args:
        name: `inception` (clean-fid's), `embedded` (the network that ships with the project), `vgg16` (the ADA family's
            TorchScript file, for precision, recall and path length), `torchscript` (any such file that maps float
            [N, 3, H, W] in [0, 255] to rows of numbers) or `timm:MODEL` (a model of the timm package, DINOv2 among
            them, with weights from a file).
        mode: For `inception`, clean-fid's resizing: `clean` (antialiased bicubic to 299), `legacy_tensorflow` (the
            network's own, comparable with figures of the ADA family) or `legacy_pytorch` (bilinear without
            antialiasing; other weights).
        detector: Weights: a file, or a URL that ends in `#sha256=DIGEST`. Only `inception` and `vgg16` have a place of
            their own where None looks.
        device: Where to compute.

    Raises:
        ValueError: For an unknown name or mode, or a missing or unusable `detector`.
        MetricUnavailable: If weights or packages are missing or unusable.
    """
    if name == "inception" and mode not in INCEPTION_MODES:
        raise ValueError(f"got mode {mode!r}, wanted one of {', '.join(INCEPTION_MODES)}")
    if name == "inception":
        return (
            PytorchInception(detector, device)
            if mode == "legacy_pytorch"
            else InceptionExtractor(mode, detector, device)
        )
    if name == "vgg16":
        return Vgg16Extractor(detector, device)
    if detector is None and name in ("embedded", "torchscript"):
        raise ValueError(f"the {name} detector needs its weights: name the file with --detector-file FILE")
    if name == "embedded":
        return EmbeddedExtractor(str(detector), device=device)
    if name == "torchscript":
        return TorchScriptExtractor(str(detector), device)
    if name.startswith("timm:"):
        return TimmExtractor(name.removeprefix("timm:"), detector, device)
    raise ValueError(f"got extractor {name!r}, wanted one of {', '.join(EXTRACTORS)}")


def weights_file(where: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The local file behind a path or a URL; a download happens once, and only against a digest.

    Args:
        where: A path, or `https://…#sha256=DIGEST`.
        cache_dir: Where downloads are kept; None takes the folder `detectors` of the cache.

    Raises:
        ValueError: A URL without a digest.
        MetricUnavailable: No such file, no network, or another digest.
    """
    if not is_url(str(where)):
        path = Path(where)
        if not path.is_file():
            raise MetricUnavailable(f"{path} is no file; name the detector's weights with --detector-file FILE")
        return _checked_name(path)
    url, _, digest = str(where).partition("#sha256=")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ValueError(f"{where}: weights are downloaded only against their digest; write {url}#sha256=DIGEST")
    folder = cache_dir or make_cache_dir_path("detectors")
    try:
        return Path(open_url(url, cache_dir=folder, verbose=False, return_filename=True, sha256=digest.lower()))
    except (OSError, ValueError) as error:
        raise MetricUnavailable(f"cannot fetch the detector: {' '.join(str(error).split())}") from error


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
        self, mode: str = "clean", detector: str | Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        path = find_inception(detector)
        self.resize = mode
        self.digest = _sha256(path)
        self._device = torch.device(device)
        self._resize_image = cleanfid_module("resize").build_resizer(mode)
        self._model = _load_inception(path, resize_inside=mode == "legacy_tensorflow").to(self._device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = self._prepared(images)
        with torch.no_grad(), _quiet(), _failing_as_unavailable("Inception", x):
            return self._model(x).to(torch.float32)

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Class probabilities float32 [N, 1008], without the last layer's bias, for the Inception score.

        The network's own resize is used whatever the mode, as its classifier expects; it runs once more for this.
        """
        x = images.expand(-1, 3, -1, -1).to(self._device, torch.float32)
        with torch.no_grad(), _quiet(), _failing_as_unavailable("Inception", x):
            return self._model.base(x, no_output_bias=True).to(torch.float32)

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        x = images.expand(-1, 3, -1, -1)
        if self.resize == "clean":
            x = _resized(x, self._resize_image)
        return x.to(self._device, torch.float32, memory_format=torch.channels_last)


class PytorchInception:
    """Inception-v3 features [N, 2048] as pytorch-fid computed them, through clean-fid's `legacy_pytorch`."""

    name = "inception"
    headline = "FID"
    num_features = 2048
    resize = "legacy_pytorch"

    def __init__(self, detector: str | Path | None, device: torch.device | str = "cpu") -> None:
        place = Path(torch.hub.get_dir()) / "checkpoints" / PYTORCH_FILE
        if detector is None and not place.is_file():
            raise MetricUnavailable(
                f"--detector-mode legacy_pytorch needs its own Inception weights: fetch {PYTORCH_URL} and put them at "
                f"{place}, or name the file with --detector-file FILE"
            )
        path = weights_file(detector or place)
        self.digest = _sha256(path)
        self._device = torch.device(device)
        self._resize_image = cleanfid_module("resize").build_resizer(self.resize)
        self._model = _load_pytorch_inception(path).to(self._device, memory_format=torch.channels_last)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = _resized(images.expand(-1, 3, -1, -1), self._resize_image).to(self._device) / 255
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), _quiet(), _failing_as_unavailable("Inception", x):
            return self._model(x)[0].flatten(1).to(torch.float32)


class TorchScriptExtractor:
    """Any TorchScript file that maps float [N, 3, H, W] in [0, 255] to rows of numbers.

    TorchScript is a program: whoever names a file runs it. It has no access to files or the network of its own.
    """

    headline = "FD"
    resize = "the network's own"
    name = "torchscript"

    def __init__(self, detector: str | Path, device: torch.device | str = "cpu") -> None:
        path = weights_file(detector)
        self.digest = _sha256(path)
        self._device = torch.device(device)
        self._path = path
        self._module = _load_torchscript(path).to(self._device)
        self.num_features = self(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape[1]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = images.expand(-1, 3, -1, -1).to(self._device, torch.float32, memory_format=torch.channels_last)
        with torch.no_grad(), _quiet(), _failing_as_unavailable(str(self._path), x):
            features = self._features(x)
        if not isinstance(features, torch.Tensor) or features.ndim < 2 or len(features) != len(images):
            raise MetricUnavailable(f"{self._path} gives no row of numbers for each image, as a detector should")
        if not torch.isfinite(features).all():
            raise MetricUnavailable(f"{self._path} gives non-finite features, so there is nothing to measure")
        return features.flatten(1).to(torch.float32)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        return self._module(x)


class Vgg16Extractor(TorchScriptExtractor):
    """The ADA family's VGG16: features [N, 4096] for precision and recall, LPIPS features for the path length."""

    name = "vgg16"

    def __init__(self, detector: str | Path | None, device: torch.device | str = "cpu") -> None:
        place = Path(make_cache_dir_path("detectors")) / VGG16_FILE
        if detector is None and not place.is_file():
            raise MetricUnavailable(
                f"the vgg16 detector needs its weights: fetch {VGG16_URL} and put them at {place}, "
                "or name the file with --vgg-file FILE"
            )
        super().__init__(detector or place, device)

    def perceive(self, images: torch.Tensor) -> torch.Tensor:
        """Rows whose squared Euclidean distance is LPIPS, of images float [N, 3, H, W] in [0, 255]."""
        with torch.no_grad(), _quiet(), _failing_as_unavailable(str(self._path), images):
            return self._module(images.to(self._device), resize_images=False, return_lpips=True)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        return self._module(x, return_features=True)


class TimmExtractor:
    """A model of the timm package without its classifier; weights from a file of tensors, never fetched by name."""

    headline = "FD"

    def __init__(self, model: str, detector: str | Path | None, device: torch.device | str = "cpu") -> None:
        self.name = f"timm:{model}"
        try:
            with _quiet():
                timm = _beside_torchvision("timm")
        except ImportError as error:
            raise MetricUnavailable(f"{self.name} needs the package timm ({error}): pip install timm") from error
        if detector is None:
            raise MetricUnavailable(f"{self.name} needs its weights: name the file with --detector-file FILE")
        path = weights_file(detector)
        self.digest = _sha256(path)
        self._device = torch.device(device)
        try:
            with _quiet():
                self._model = timm.create_model(model, pretrained=False, num_classes=0).eval()
                missing = self._model.load_state_dict(_tensors_of(path), strict=False).missing_keys
                if missing:  # more than it needs, as a classifier, is fine
                    raise KeyError(f"it lacks {len(missing)} tensors, {missing[0]} among them")
                config = timm.data.resolve_model_data_config(self._model)
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            reason = _first_sentence(error)
            raise MetricUnavailable(f"{path} does not serve {self.name}: {reason}") from error
        self._model.to(self._device, memory_format=torch.channels_last)
        self._size = tuple(config["input_size"][1:])
        self._mean, self._std = (torch.tensor(config[key]).view(1, 3, 1, 1).to(self._device) for key in ("mean", "std"))
        self.resize = f"antialiased bicubic to {self._size[0]}"
        self.num_features = int(self._model.num_features)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = images.expand(-1, 3, -1, -1).to(self._device, torch.float32) / 255
        x = torch.nn.functional.interpolate(x, self._size, mode="bicubic", antialias=True).clamp_(0, 1)
        x = ((x - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), _quiet(), _failing_as_unavailable(self.name, x):
            return self._model(x).to(torch.float32)


def inception_home() -> Path:
    """The folder in which clean-fid itself looks for the Inception weights."""
    return Path("./") if platform.system() == "Windows" else Path("/tmp")  # as in cleanfid.features 0.1.35


def find_inception(detector: str | Path | None = None) -> Path:
    """The Inception weights file: the given one, else the one in clean-fid's own place.

    Raises:
        MetricUnavailable: If there is none, saying what to fetch and where to put it.
    """
    if detector is not None:
        if not is_url(str(detector)) and not Path(detector).is_file():
            raise MetricUnavailable(
                f"{detector} is no file; fetch {INCEPTION_URL} and name the file with --detector-file"
            )
        return weights_file(detector)
    path = inception_home() / INCEPTION_FILE
    if not path.is_file():
        raise MetricUnavailable(
            f"the inception detector needs its weights: fetch {INCEPTION_URL} and put it at {path}, "
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
        reason = _first_sentence(error)
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
            reason = _first_sentence(error)
            raise MetricUnavailable(
                f"{path} is not the TorchScript Inception network ({reason}); fetch {INCEPTION_URL} anew"
            ) from error


def _load_pytorch_inception(path: Path) -> Any:
    """clean-fid's class, which fetches its weights by itself: hand it those of the file instead."""
    module: Any = cleanfid_module("inception_pytorch")
    weights, own = _tensors_of(path), module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *args, **kwargs: weights
    try:
        with _quiet():
            return module.InceptionV3(output_blocks=[3], resize_input=False).eval()
    except (RuntimeError, KeyError, TypeError) as error:
        reason = _first_sentence(error)
        raise MetricUnavailable(f"{path} does not hold the weights of pytorch-fid ({reason})") from error
    finally:
        module.load_state_dict_from_url = own


def _load_torchscript(path: Path) -> Any:
    try:
        with _quiet():
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = _first_sentence(error)
        raise MetricUnavailable(f"{path} is no TorchScript file ({reason})") from error


def _tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """A state dict of tensors, from a safetensors or a torch file; nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise many kinds
        reason = type(error).__name__
        raise MetricUnavailable(f"{path} is no file of weights that can be read safely ({reason})") from error
    if not isinstance(state, dict):
        raise MetricUnavailable(f"{path} holds {type(state).__name__}, wanted a dict of tensors")
    return state


def _checked_name(path: Path) -> Path:
    """Hold a file named NAME-XXXXXXXX.pth, as torch's hub names them, to these first digits of its SHA-256."""
    match = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if match and not _sha256(path).startswith(match[1]):
        raise MetricUnavailable(f"{path} is damaged: its SHA-256 does not start with {match[1]} as its name says")
    return path


def _resized(images: torch.Tensor, resize_image: Any) -> torch.Tensor:
    """clean-fid's resize to float32 [N, 3, 299, 299] in [0, 255], image by image on the CPU."""
    with _quiet():
        resized = [resize_image(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


@contextlib.contextmanager
def _failing_as_unavailable(what: str, x: torch.Tensor) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise MetricUnavailable(f"{what} failed on {list(x.shape)} images: {reason}") from error


def _first_sentence(error: Exception) -> str:
    """What went wrong; torch goes on with what might be the reason and other remedies than ours."""
    return re.split(r"[.!?]\s|\n", str(error).strip())[0]


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
