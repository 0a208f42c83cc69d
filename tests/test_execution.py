"""The fast way through the networks against the plain one: stored numbers, gradients, pickles, precisions."""

import copy
import io
import pickle
from types import SimpleNamespace

import helpers
import pytest
import test_gan_loss
import test_networks
import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act, conv2d_cpu
from training import execution, network_pickle, networks

OPS = ("torch", "native")
fixed_noise = test_gan_loss.fixed_noise


def fast_pair(path) -> SimpleNamespace:
    """A golden file's networks, sped up."""
    plain = test_networks.load_pair(path)
    G, D = (execution.accelerate(copy.deepcopy(network)) for network in (plain.G, plain.D))
    assert type(G.synthesis) is not networks.SynthesisNetwork and type(D) is not networks.Discriminator
    return SimpleNamespace(meta=plain.meta, data=plain.data, call=plain.call, G=G, D=D)


@pytest.mark.parametrize("name", test_networks.NAMES)
def test_golden_networks(name, goldens, ops) -> None:
    pair = fast_pair(goldens / f"networks_{name}.npz")
    with torch.no_grad():
        test_networks.check_outputs(pair)
    test_networks.check_gradients(pair, False)


def test_local_copy(data_dir, ops) -> None:
    pair = fast_pair(data_dir / test_networks.LOCAL)
    with torch.no_grad():
        test_networks.check_outputs(pair)
    test_networks.check_gradients(pair, False)


@pytest.mark.parametrize("name", test_networks.NAMES)
def test_golden_networks_frozen(name, goldens, ops) -> None:
    """With what depends on weights alone kept, and laid out for this processor."""
    pair = fast_pair(goldens / f"networks_{name}.npz")
    with torch.inference_mode():
        plain = pair.G(pair.data["z"], pair.data["c"], noise_mode="const", **pair.call)
        execution.freeze(pair.G)
        for _ in range(2):  # makes what it keeps, then uses it
            test_networks.check_outputs(pair)
        frozen = pair.G(pair.data["z"], pair.data["c"], noise_mode="const", **pair.call)
        one = pair.G(pair.data["z"][:1], pair.data["c"][:1], noise_mode="const", **pair.call)  # another size
    helpers.assert_close(one, plain[:1], 5e-6, "one image")
    execution.thaw(pair.G)
    with torch.no_grad():
        assert torch.equal(pair.G(pair.data["z"], pair.data["c"], noise_mode="const", **pair.call), plain)
    helpers.assert_close(frozen, plain, 5e-6, "frozen")


def test_frozen_networks_notice_new_weights(ops) -> None:
    G, _ = small()
    execution.accelerate(G)
    z, c = torch.randn(2, 16), torch.zeros(2, 0)
    with execution.frozen(G), torch.no_grad():
        before = G(z, c, noise_mode="const")
        G.synthesis.b8.conv0.weight.mul_(torch.linspace(0.5, 2, 32)[:, None, None, None])
        G.synthesis.b16.torgb.affine.bias.add_(1)
        after = G(z, c, noise_mode="const")
        execution.thaw(G)
        helpers.assert_close(after, G(z, c, noise_mode="const"), 5e-6, "changed weights")
        assert not torch.allclose(before, after, rtol=0.1)
    G(z, c, noise_mode="const").sum().backward()  # a frozen time leaves nothing behind that autograd minds
    assert type(G.synthesis).kept is None


def test_half_precision_blocks_run_in_float32_on_a_cpu(goldens) -> None:
    pair = fast_pair(goldens / "half_skip_resnet_r32_c3.npz")
    d = pair.data
    with torch.no_grad():
        image = pair.G(d["z"], d["c"], noise_mode="const")
        helpers.assert_close(image, d["img_const_fp32"], test_networks.OUTPUT_BOUND, "img_const_fp32")
        helpers.assert_close(pair.D(d["img_in"], d["c"]), d["d_logits_fp32"], test_networks.OUTPUT_BOUND, "logits")


def small(**kwargs) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A new generator and discriminator of 16 x 16 pixels."""
    torch.manual_seed(0)
    width = {"channel_base": 512, "channel_max": 32, **kwargs}
    G = networks.Generator(16, 0, 16, 16, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=width)
    return G, networks.Discriminator(0, 16, 3, **width)


def test_pickles_and_copies_are_those_of_the_plain_network(tmp_path) -> None:
    G, D = small()
    before = pickle.dumps((G, D))
    network_pickle.save(tmp_path / "a.pkl", G=G, D=D, G_ema=G)
    names = list(G.state_dict())
    for network in (G, D):
        assert execution.accelerate(network) is network
        execution.accelerate(network)  # twice is once
    network_pickle.save(tmp_path / "b.pkl", G=G, D=D, G_ema=G)
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()
    assert pickle.dumps((G, D)) == before and list(G.state_dict()) == names
    assert isinstance(D, networks.Discriminator) and type(D).__name__ == "Discriminator"
    assert type(copy.deepcopy(D)) is networks.Discriminator
    assert type(pickle.load(io.BytesIO(before))[1]) is networks.Discriminator
    assert D.init_kwargs == copy.deepcopy(D).init_kwargs


def test_random_noise_is_drawn_in_the_plain_order(ops) -> None:
    plain, _ = small()
    for name, parameter in plain.named_parameters():
        if name.endswith("noise_strength"):
            parameter.data.fill_(0.3)
    fast = execution.accelerate(copy.deepcopy(plain))
    images = []
    for G in (plain, fast):
        torch.manual_seed(1)
        images.append(G(torch.randn(3, 16), torch.zeros(3, 0)))
    helpers.assert_close(images[1], images[0], 5e-6, "random noise")
    torch.manual_seed(1)
    assert not torch.equal(fast(torch.randn(3, 16), torch.zeros(3, 0), noise_mode="none"), images[1])


@pytest.mark.parametrize("clamp", [None, 0.8])
def test_second_derivatives(clamp, ops) -> None:
    """R1 and path length as the losses make them. The median over seeds: an activation may change sides by rounding."""
    errors = []
    for seed in range(5):
        results = []
        for prepare in (lambda network: network, execution.accelerate):
            G, D = small(conv_clamp=clamp)
            prepare(G), prepare(D)
            results.append(second_order_of_g(G, seed) + second_order_of_d(D, seed))
        errors.append([float((a - b).norm() / (b.norm() + 1e-8)) for a, b in zip(*results, strict=True)])
    medians = torch.tensor(errors).median(dim=0).values
    assert medians.max() < 2e-5, medians


def second_order_of_d(D: torch.nn.Module, seed: int) -> list[torch.Tensor]:
    """Gradients of R1."""
    img = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    logits = D(img, None)
    (gradient,) = torch.autograd.grad([logits.sum()], [img], create_graph=True)
    penalty = gradient.square().sum() + (logits * 0).sum()
    return list(torch.autograd.grad(penalty, list(D.parameters())))


def second_order_of_g(G: torch.nn.Module, seed: int) -> list[torch.Tensor]:
    """Gradients of a path length."""
    torch.manual_seed(seed)
    ws = torch.randn(2, G.num_ws, 16).requires_grad_()
    img = G.synthesis(ws, noise_mode="const")
    (jacobian,) = torch.autograd.grad([(img * torch.randn(img.shape)).sum()], [ws], create_graph=True)
    penalty = jacobian.square().sum() + (img * 0).sum()
    return list(torch.autograd.grad(penalty, list(G.synthesis.parameters())))


def test_golden_phases(goldens, monkeypatch, fixed_noise, ops) -> None:
    """Every stored loss, report and gradient, phase by phase and in a row."""
    full = test_gan_loss.Goldens(goldens / "loss_phases.npz")
    plain = full.networks
    monkeypatch.setattr(full, "networks", lambda: tuple(execution.accelerate(network) for network in plain()))
    for check in ("every_golden_phase", "three_path_lengths_in_a_row", "four_phases_in_a_row"):
        getattr(test_gan_loss, f"test_{check}")(full, fixed_noise)


def test_precisions_that_a_device_lacks_are_refused(monkeypatch) -> None:
    G, _ = small()
    with pytest.raises(ValueError, match="--precision fp8 is unknown"):
        execution.accelerate(G, "fp8")
    with pytest.raises(ValueError, match="--precision fp16 is for GPUs"):
        execution.accelerate(G, "fp16")
    monkeypatch.setattr(execution, "has_fast_bf16", lambda: False)
    with pytest.raises(ValueError, match="--precision bf16: this processor has no bfloat16"):
        execution.accelerate(G, "bf16")


def test_bf16_is_near_fp32_and_leaves_float32_where_it_belongs(monkeypatch, ops) -> None:
    monkeypatch.setattr(execution, "has_fast_bf16", lambda: True)
    G, D = small()
    z, c = torch.randn(4, 16), torch.zeros(4, 0)
    with torch.no_grad():
        exact, logits = G(z, c, noise_mode="const"), D(torch.randn(4, 3, 16, 16), c)
        torch.manual_seed(0)
        rough = execution.accelerate(copy.deepcopy(G), "bf16")(z, c, noise_mode="const")
    assert rough.dtype == torch.float32
    assert 1e-4 < float((rough - exact).norm() / exact.norm()) < 2e-2
    assert logits.dtype == torch.float32
    execution.accelerate(G, "bf16"), execution.accelerate(D, "bf16")
    D(G(z, c), c).sum().backward()
    for name, parameter in [*G.named_parameters(), *D.named_parameters()]:
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("size", ["as measured", "every size"])
def test_compiled_convolutions_differ_by_rounding_alone(size, monkeypatch) -> None:
    """Without kinks gradients agree to 5e-6, also where compiled convolutions are not chosen."""
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    if size == "every size":
        monkeypatch.setattr(conv2d_cpu, "pays", lambda kind, n, c, o, h, w, stride, dtype: stride == 1)
    torch.manual_seed(0)
    width = {"channel_base": 2048, "channel_max": 96}
    flat = {"activation": "linear"}
    G = networks.Generator(
        32, 0, 32, 32, 3, mapping_kwargs={"num_layers": 2, **flat}, synthesis_kwargs={**width, **flat}
    )
    D = networks.Discriminator(0, 32, 3, **width, block_kwargs=flat, epilogue_kwargs=flat)
    z = torch.randn(8, 32, requires_grad=True)
    leaves = [z, *[p for name, p in G.named_parameters() if "noise" not in name], *D.parameters()]
    gradients = {}
    for ops in OPS:
        monkeypatch.setenv(custom_ops.VARIABLE, ops)
        logits = D(G(z, torch.zeros(8, 0), noise_mode="none"), torch.zeros(8, 0))
        gradients[ops] = torch.autograd.grad((logits * torch.linspace(0.5, 2, 8)[:, None]).sum(), leaves)
    for index, (a, b) in enumerate(zip(gradients["native"], gradients["torch"])):
        helpers.assert_close(a, b, 5e-6, f"gradient {index}")


@pytest.mark.parametrize("name", test_networks.NAMES)
def test_what_differs_more_are_values_on_the_other_side_of_a_kink(name, goldens, monkeypatch) -> None:
    """Stored networks with compiled convolutions at every size against torch's; `pytest -s` prints what was counted.

    A value that rounding puts on the other side of a slope or clamp changes a gradient by 1e-4 and more.
    """
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    pair = test_networks.load_pair(goldens / f"networks_{name}.npz")
    plain, decisions = bias_act.bias_act, []

    def watched(x, b=None, dim=1, act="linear", gain=None, clamp=None, **others):
        y = plain(x, b, dim=dim, act=act, gain=gain, clamp=clamp, **others)
        decisions.append(y > 0 if clamp is None else (y > 0).int() + (y.abs() < clamp))
        return y

    monkeypatch.setattr(bias_act, "bias_act", watched)
    found = {}
    for ops in OPS:
        monkeypatch.setenv(custom_ops.VARIABLE, ops)
        if ops == "native":
            monkeypatch.setattr(conv2d_cpu, "pays", lambda kind, n, c, o, h, w, stride, dtype: stride == 1)
        decisions = []
        z = pair.data["z"].clone().requires_grad_(True)
        img = pair.G(z, pair.data["c"], noise_mode="const", fused_modconv=False, **pair.call)
        scalar = (pair.D(img, pair.data["c"], **pair.call) * pair.data["v"]).sum()
        found[ops] = torch.autograd.grad(scalar, z)[0], decisions
    (expected, one), (gradient, other) = found["torch"], found["native"]
    flipped = sum(int((a != b).sum()) for a, b in zip(one, other, strict=True))
    error = float((gradient - expected).abs().max() / expected.abs().max())
    print(f"{name}: {flipped} of {sum(d.numel() for d in one)} values on the other side, gradient {error:.1e}")  # noqa: T201
    assert error <= 1e-5 or 1 <= flipped <= 5
