"""bias_act: stored numbers with second derivatives, finite differences, behaviour at the edges."""

import json
import math

import helpers
import numpy as np
import pytest
import torch

from torch_utils.ops.bias_act import activation_funcs, bias_act

IMPLS = ["ref", "cuda"]
REL = 2e-6


def check_goldens(path) -> None:
    data = np.load(path, allow_pickle=False)
    meta = json.loads(str(data["meta"]))
    for name, row in meta["defaults"].items():
        assert float(activation_funcs[name].def_alpha) == pytest.approx(row["def_alpha"], rel=1e-12)
        assert float(activation_funcs[name].def_gain) == pytest.approx(row["def_gain"], rel=1e-12)
    for case in meta["cases"]:
        key, kwargs = case["key"], {k: v for k, v in case.items() if k not in ("key", "bias")}
        for impl in IMPLS:
            x, dy, v = (torch.from_numpy(data[f"{key}/{n}"]) for n in ("x", "dy", "v"))
            b = torch.from_numpy(data[f"{key}/b"]) if case["bias"] else None
            leaves = [t.requires_grad_() for t in (x, b) if t is not None]
            dy.requires_grad_()
            y = bias_act(x, b, impl=impl, **kwargs)
            first = torch.autograd.grad((y * dy).sum(), leaves, create_graph=True)
            second = torch.autograd.grad((first[0] * v).sum(), [dy, *leaves], allow_unused=True, materialize_grads=True)
            results = {"y": y, "dx": first[0], "d2_dy": second[0], "d2_x": second[1]}
            if b is not None:
                results |= {"db": first[1], "d2_b": second[2]}
            for name, value in results.items():
                helpers.assert_close(value, data[f"{key}/{name}"], REL, f"{key}/{name} {case['act']} {impl}")


def test_goldens(goldens) -> None:
    check_goldens(goldens / "ops_bias_act.npz")


def test_goldens_small_copy(data_dir) -> None:
    check_goldens(data_dir / "ops_bias_act.npz")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("act", list(activation_funcs))
def test_gradients_by_finite_differences(act, impl) -> None:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 2, 2, generator=rng, dtype=torch.float64)
    x = (x + 0.1 * x.sign()).requires_grad_()  # away from the kink
    b = torch.tensor([0.02, -0.03, 0.01], dtype=torch.float64, requires_grad=True)

    def call(x, b):
        return bias_act(x, b, act=act, gain=0.8, clamp=1.1, impl=impl)

    assert torch.autograd.gradcheck(call, (x, b))
    assert torch.autograd.gradgradcheck(call, (x, b))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("act", ["lrelu", "relu", "linear"])
def test_layout_is_kept_and_both_paths_agree(act, memory_format, impl) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, 3, generator=rng).contiguous(memory_format=memory_format)
    b = torch.randn(5, generator=rng)
    y = bias_act(x, b, act=act, impl=impl)
    assert y.is_contiguous(memory_format=memory_format)
    helpers.assert_close(y, bias_act(x.double(), b.double(), act=act, impl="ref"), 5e-7, act)
    views = x.permute(2, 0, 3, 1)[::2]  # neither layout, with holes
    helpers.assert_close(bias_act(views, b, dim=3, act=act), bias_act(views, b, dim=3, act=act, impl="ref"), 5e-7, act)


@pytest.mark.parametrize("impl", IMPLS)
def test_edges(impl) -> None:
    # At exactly +-clamp the gradient passes, beyond it does not.
    x = torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0], requires_grad=True)
    y = bias_act(x, clamp=1.0, impl=impl)
    y.sum().backward()
    assert y.tolist() == [-1.0, -1.0, 0.5, 1.0, 1.0] and x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert bias_act(x, clamp=0, impl=impl).tolist() == [0.0] * 5
    # At 0 lrelu has the negative slope, relu none.
    for act, slope in (("lrelu", 0.2), ("relu", 0.0)):
        x = torch.zeros(1, requires_grad=True)
        bias_act(x, act=act, gain=2, impl=impl).sum().backward()
        assert x.grad.item() == pytest.approx(2 * slope)
    # NaN stays NaN; infinity is clamped.
    y = bias_act(torch.tensor([math.nan, math.inf, -math.inf]), act="lrelu", clamp=3, impl=impl)
    assert y.isnan().tolist() == [True, False, False] and y[1:].tolist() == [3.0, -3.0]
    # A gain <= 0 and a negative slope are legal.
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    y = bias_act(x, act="lrelu", alpha=-0.5, gain=-2, impl=impl)
    y.sum().backward()
    assert y.tolist() == [-1.0, -4.0] and x.grad.tolist() == [1.0, -2.0]
    assert bias_act(x, act="lrelu", gain=0, impl=impl).abs().tolist() == [0.0, 0.0]
    # Empty batches.
    assert bias_act(torch.zeros(0, 3), torch.zeros(3), act="lrelu", impl=impl).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", list(activation_funcs))
def test_half_precision(act, dtype) -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    b = torch.tensor([0.5, -0.25, 1.0])
    h = x.to(dtype).requires_grad_()
    y = bias_act(h, b.to(dtype), act=act, clamp=256)
    y.float().sum().backward()
    assert y.dtype == dtype and h.grad.dtype == dtype
    helpers.assert_close(y.float(), bias_act(x, b, act=act), 2e-2, f"{act} {dtype}")


def test_gains_are_plain_floats() -> None:
    for row in activation_funcs.values():
        assert type(row.def_gain) in (int, float) and type(row.def_alpha) in (int, float)
    assert [row.cuda_idx for row in activation_funcs.values()] == list(range(1, 10))
    assert activation_funcs["lrelu"].func(torch.tensor(-1.0), alpha=0.2).item() == pytest.approx(-0.2)


def test_wrong_use_is_explained() -> None:
    x = torch.zeros(2, 3)
    for bad in (
        lambda: bias_act(x, act="gelu"),
        lambda: bias_act(x, clamp=-1),
        lambda: bias_act(x, clamp=math.nan),
        lambda: bias_act(x, torch.zeros(2)),
        lambda: bias_act(x, torch.zeros(3), dim=2),
        lambda: bias_act(x, torch.zeros(1, 3)),
        lambda: bias_act(x, impl="native"),
    ):
        with pytest.raises(ValueError, match="wanted"):
            bad()
