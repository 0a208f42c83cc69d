"""conv2d_resample: stored numbers, and every fast path against the definition."""

import json

import helpers
import numpy as np
import pytest
import torch

from torch_utils.ops import conv2d_resample as ops
from torch_utils.ops import upfirdn2d

REL = 2e-6
FUNCTIONS = [ops.conv2d_resample_ref, ops.conv2d_resample]
FILTERS = {
    "none": None,
    "default4": upfirdn2d.setup_filter([1, 3, 3, 1]),
    "three": upfirdn2d.setup_filter([1, 2, 1]),
    "asym": upfirdn2d.setup_filter([[1, 2, 0.5, -1], [3, 1, 0, 2], [0.5, -0.25, 1, 1]]),
    "sep9": upfirdn2d.setup_filter([0.1, 0.4, -0.2, 1, 1.5, 0.3, 0.2, -0.1, 0.6]),
}


def check_goldens(path) -> None:
    data = np.load(path, allow_pickle=False)
    for case in json.loads(str(data["meta"]))["cases"]:
        key, kwargs = case["key"], {k: v for k, v in case.items() if k not in ("key", "filter")}
        f = torch.from_numpy(data[f"{key}/f"]) if case["filter"] is not None else None
        for function in FUNCTIONS:
            x, w = (torch.from_numpy(data[f"{key}/{n}"]).requires_grad_() for n in ("x", "w"))
            y = function(x, w, f, **kwargs)
            dx, dw = torch.autograd.grad(y, [x, w], torch.from_numpy(data[f"{key}/dy"]))
            for name, value in (("y", y), ("dx", dx), ("dw", dw)):
                helpers.assert_close(value, data[f"{key}/{name}"], REL, f"{key}/{name} {function.__name__}")


def test_goldens(goldens) -> None:
    check_goldens(goldens / "ops_conv2d_resample.npz")


def test_goldens_small_copy(data_dir) -> None:
    check_goldens(data_dir / "ops_conv2d_resample.npz")


@pytest.mark.parametrize("padding", [0, 1, [2, 1], [1, 0, 2, 1], [-1, 0, 2, -2]])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (1, 4)])
def test_fast_paths_equal_the_definition(kernel, padding) -> None:
    rng = torch.Generator().manual_seed(0)
    count = 0
    for up, down in ((1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (3, 2)):
        for groups, flip_w, flip_f in ((1, True, False), (1, False, True), (2, True, True), (2, False, False)):
            name = list(FILTERS)[count % len(FILTERS)]
            count += 1
            x = torch.randn(2, 4, 8, 7, generator=rng, dtype=torch.float64).requires_grad_()
            w = torch.randn(6, 4 // groups, *kernel, generator=rng, dtype=torch.float64).requires_grad_()
            results = []
            for function in FUNCTIONS:
                y = function(x, w, FILTERS[name], up, down, padding, groups, flip_w, flip_f)
                v = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
                dx, dw = torch.autograd.grad(y, [x, w], v, create_graph=True)
                ddx, ddw = torch.autograd.grad(dx.square().sum() + dw.square().sum(), [x, w])
                results.append((y, dx, dw, ddx, ddw))
            for part, a, b in zip(("y", "dx", "dw", "ddx", "ddw"), results[1], results[0]):
                helpers.assert_close(a, b, 1e-10, f"{part} up {up} down {down} groups {groups} filter {name}")


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_gradients_by_finite_differences(up, down) -> None:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(1, 2, 4, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, generator=rng, dtype=torch.float64, requires_grad=True)

    def call(x, w):
        return ops.conv2d_resample(x, w, FILTERS["default4"], up=up, down=down, padding=1)

    assert torch.autograd.gradcheck(call, (x, w))
    assert torch.autograd.gradgradcheck(call, (x, w))


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_single_precision_at_real_widths(up, down, kernel, channels) -> None:
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(2, channels, 16, 16, generator=rng, requires_grad=True)
    w = torch.randn(32, channels, kernel, kernel, generator=rng, requires_grad=True)
    results = []
    for function, dtype in ((ops.conv2d_resample, torch.float32), (ops.conv2d_resample_ref, torch.float64)):
        a, b = x.detach().to(dtype).requires_grad_(), w.detach().to(dtype).requires_grad_()
        y = function(a, b, FILTERS["default4"], up=up, down=down, padding=kernel // 2, flip_weight=up == 1)
        dx, dw = torch.autograd.grad(y.square().sum(), [a, b], create_graph=True)
        results.append((y, dx, dw, *torch.autograd.grad(dx.square().sum(), [a, b])))
    for part, a, b in zip(("y", "dx", "dw", "ddx", "ddw"), *results):
        helpers.assert_close(a, b, 3e-6, part)


def test_half_precision() -> None:
    rng = torch.Generator().manual_seed(5)
    x, w = torch.randn(2, 8, 8, 8, generator=rng), torch.randn(4, 8, 3, 3, generator=rng) / 8
    for dtype, rel in ((torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
        for up, down in ((2, 1), (1, 2), (1, 1)):
            kwargs = dict(f=FILTERS["default4"], up=up, down=down, padding=1)
            y = ops.conv2d_resample(x.to(dtype), w.to(dtype), **kwargs)
            assert y.dtype == dtype
            helpers.assert_close(y.float(), ops.conv2d_resample(x, w, **kwargs), rel, f"{dtype} {up} {down}")


def test_wrong_use_is_explained() -> None:
    x, w = torch.zeros(1, 4, 4, 4), torch.zeros(2, 4, 3, 3)
    for bad in (
        lambda: ops.conv2d_resample(x[0], w),
        lambda: ops.conv2d_resample(x, w.half()),
        lambda: ops.conv2d_resample(x, w, up=0),
        lambda: ops.conv2d_resample(x, w, down=1.5),
        lambda: ops.conv2d_resample(x, w, groups=2),
        lambda: ops.conv2d_resample(x, w, padding=[1, 2, 3]),
    ):
        with pytest.raises(ValueError, match="wanted|convert|fit"):
            bad()
