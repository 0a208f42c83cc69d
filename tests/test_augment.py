"""The augmentation pipe against golden numbers: transforms, presets, gradients, p = 0, buffers, margins, probes."""

import json
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from training import augment

BOUND = 1e-5  # of the largest value; the stored float32 results are themselves up to 5.4e-6 off

# key: (q = 0.3: sum, value at [0, 0, 5, 7], value at [1, 2, 20, 3]), the same for q = 0.7
PROBES = {
    "rotate90": ((-33.17325, -0.696400, 0.951715), (-33.34915, 0.299347, 0.878293)),
    "xint": ((-23.72920, -0.676637, 0.238133), (-32.62267, 0.001593, 0.756512)),
    "scale": ((-19.19925, -0.785508, -0.906684), (-45.76758, -0.992989, -0.956030)),
    "rotate": ((-62.23882, 0.048636, 0.486450), (-265.32808, -0.535041, 0.927588)),
    "xfrac": ((-27.47615, -0.868348, -0.301514), (-35.34122, -0.303865, 0.292170)),
    "hue": ((-33.19437, -1.150867, 0.284906), (-33.19437, 0.235978, -1.108937)),
    "saturation": ((-33.19437, -0.775978, -0.775357), (-33.19436, -1.132512, -1.182044)),
    "filter": ((-31.57675, -0.886069, -0.906284), (-31.45345, -0.882609, -0.902745)),
    "bgc": ((-404.57906, -0.042573, 0.056876), (-596.33881, 0.424168, 0.937954)),
    "bgcf": ((-384.86330, -0.040499, 0.054104), (-565.06306, 0.401922, 0.888762)),
}


def noise_field(shape: tuple[int, ...]) -> torch.Tensor:
    """The fixed numbers that stand in for the random pixels of the additive noise."""
    i = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy((np.sqrt(2) * np.sin(0.7 * i + 0.2)).astype(np.float32).reshape(shape))


def make_pipe(monkeypatch: pytest.MonkeyPatch, **kwargs: float) -> augment.AugmentPipe:
    """A pipe whose additive noise has the fixed pixels."""
    pipe = augment.AugmentPipe(**kwargs)
    monkeypatch.setattr(pipe, "_pixel_noise", lambda images: noise_field(tuple(images.shape)))
    return pipe


def check_cases(npz: np.lib.npyio.NpzFile, cases: list[dict], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run every case, with its gradient where one is stored; returns the number of arrays compared."""
    compared = 0
    for case in cases:
        key = case["key"]
        images = torch.from_numpy(npz[case["batch"]]).requires_grad_(key + "/grad" in npz)
        result = make_pipe(monkeypatch, **case["kwargs"])(images, debug_percentile=case["debug_percentile"])
        helpers.assert_close(result, npz[key], BOUND, key)
        compared += 1
        if images.requires_grad:
            (grad,) = torch.autograd.grad((result * noise_field(tuple(result.shape))).sum(), images)
            helpers.assert_close(grad, npz[key + "/grad"], BOUND, key + "/grad")
            compared += 1
    return compared


def check_p0(npz: np.lib.npyio.NpzFile, presets: dict, monkeypatch: pytest.MonkeyPatch) -> int:
    """Normal mode with p = 0: identity parameters, but geometry is still resampled."""
    keys = [key for key in npz.files if key.startswith("p0/")]
    for key in keys:
        _, preset, batch = key.split("/")
        pipe = make_pipe(monkeypatch, **presets[preset])
        pipe.p.zero_()
        helpers.assert_close(pipe(torch.from_numpy(npz[batch])), npz[key], BOUND, key)
    return len(keys)


def test_every_golden(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz = np.load(goldens / "augment.npz")
    meta = json.loads(str(npz["meta"]))
    compared = check_cases(npz, meta["cases"], monkeypatch) + check_p0(npz, meta["presets"], monkeypatch)
    # What is left: two inputs, two noise fields, two filters, meta.
    assert compared == len(npz.files) - 7
    assert meta["presets"] == augment.AUGMENT_PRESETS
    for name in ("Hz_geom", "Hz_fbank"):
        helpers.assert_close(getattr(augment.AugmentPipe(), name), npz[name], 1e-7, name)
    defaults = {name: getattr(augment.AugmentPipe(), name) for name in meta["default_params"]}
    assert defaults == meta["default_params"]


def test_carried_goldens(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of the golden arrays that travel with the repository."""
    npz = np.load(data_dir / "augment.npz")
    meta = json.loads(str(npz["meta"]))
    assert check_cases(npz, meta["cases"], monkeypatch) >= 15
    assert check_p0(npz, meta["presets"], monkeypatch) == 1
    for name in ("Hz_geom", "Hz_fbank"):
        helpers.assert_close(getattr(augment.AugmentPipe(), name), npz[name], 1e-7, name)


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("which", [0, 1])
def test_probes(name: str, which: int) -> None:
    """Sums and single values of a wave pattern, from outside the golden file (specification, table 4.4)."""
    n, c, y, x = np.meshgrid(np.arange(2), np.arange(3), np.arange(32), np.arange(32), indexing="ij")
    wave = np.sin(0.37 * (x + 1) + 0.23 * (y + 1) * (c + 1) + n).astype(np.float32)
    assert wave.sum(dtype=np.float64) == pytest.approx(-33.19437, abs=1e-5)
    kwargs = augment.AUGMENT_PRESETS.get(name, {name: 1})
    result = augment.AugmentPipe(**kwargs)(torch.from_numpy(wave), debug_percentile=(0.3, 0.7)[which])
    total, a, b = PROBES[name][which]
    assert float(result.double().sum()) == pytest.approx(total, abs=2e-3)  # a sum of 6144 float32 numbers
    assert float(result[0, 0, 5, 7]) == pytest.approx(a, abs=4e-6)
    assert float(result[1, 2, 20, 3]) == pytest.approx(b, abs=4e-6)


@pytest.mark.parametrize(
    ("kwargs", "percentile", "margins"),
    [
        ({"xflip": 1}, 0.3, [6, 6, 6, 6]),
        ({"xflip": 1}, 0.7, [6, 6, 6, 6]),
        ({"rotate90": 1}, 0.3, [6, 6, 6, 6]),
        ({"xint": 1}, 0.9, [9, 3, 9, 3]),
        (augment.AUGMENT_PRESETS["bg"], 0.3, [13, 11, 7, 15]),
    ],
)
def test_margins(kwargs: dict, percentile: float, margins: list[int]) -> None:
    """Left, right, top and bottom padding of a 32 x 32 image (specification 4.1)."""
    sampler = augment.ParameterSampler(2, torch.device("cpu"), torch.tensor(percentile))
    linear, offset = augment.AugmentPipe(**kwargs).sample_geometry(sampler, 32, 32)
    left, top, right, bottom = augment.resampling_margins(linear, offset, 32, 32).tolist()
    assert [left, right, top, bottom] == margins


def test_margins_are_shared_and_limited() -> None:
    """The farthest corner of any sample decides; a margin is neither negative nor more than a reflection can fill."""
    identity = torch.eye(2).expand(2, 2, 2)
    offset = torch.tensor([[5.0, -100.0], [-2.0, 0.5]])
    assert augment.resampling_margins(identity, offset, 16, 32).tolist() == [8, 15, 11, 7]
    assert augment.resampling_margins(identity, torch.full([2, 2], 20.0), 16, 32).tolist() == [0, 0, 26, 15]


def test_whole_pixel_shift_rounds_a_float32_value() -> None:
    """At q = 0.45 and 40 pixels the shift is -0.50000012, which rounds to -1; float64 arithmetic would give 0."""
    sampler = augment.ParameterSampler(1, torch.device("cpu"), torch.tensor(0.45))
    _, offset = augment.AugmentPipe(xint=1).sample_geometry(sampler, 24, 40)
    assert offset.tolist() == [[1, 0]]


def test_filter_bank() -> None:
    bank = augment.filter_bank()
    impulse = np.zeros(43)
    impulse[21] = 1
    assert bank.shape == (4, 43)
    np.testing.assert_allclose(bank.sum(axis=0), impulse, atol=1e-16)
    np.testing.assert_allclose(bank, bank[:, ::-1], atol=0)
