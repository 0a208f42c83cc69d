"""Generator and discriminator against themselves: invariances, closed forms, naming rules, self-containedness."""

import ast
import builtins
import copy
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_utils.ops import upfirdn2d
from training import networks

SOURCE = Path(networks.__file__)
SMALL = {"channel_base": 256, "channel_max": 16}
ARCHITECTURES = ["orig", "skip", "resnet"]
CONTRACT = {"math", "torch", "numpy", "scipy.signal", "dnnlib", "torch_utils.persistence", "torch_utils.misc"} | {
    f"torch_utils.ops.{name}"
    for name in ("bias_act", "upfirdn2d", "conv2d_resample", "conv2d_gradfix", "grid_sample_gradfix", "fma")
}


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give biases, noise strengths and the average latent values that make their absence visible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith(("bias", "noise_strength", "w_avg", "weight", "const", "noise_const")):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return module


def make_g(resolution=16, c_dim=0, mapping_kwargs=None, **synthesis_kwargs) -> networks.Generator:
    torch.manual_seed(1)
    mapping_kwargs = {"num_layers": 2, **(mapping_kwargs or {})}
    G = networks.Generator(8, c_dim, 12, resolution, 3, mapping_kwargs, {**SMALL, **synthesis_kwargs})
    return randomize(G).eval().requires_grad_(False)


def make_d(resolution=16, c_dim=0, **kwargs) -> networks.Discriminator:
    torch.manual_seed(2)
    D = networks.Discriminator(c_dim, resolution, 3, mapping_kwargs={"num_layers": 2}, **{**SMALL, **kwargs})
    return randomize(D).eval().requires_grad_(False)


def inputs(n=3, z_dim=8, c_dim=0, seed=3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn([n, z_dim], generator=generator), torch.eye(max(c_dim, 1))[:, :c_dim].repeat(n, 1)[:n]


# Invariances


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fused", [True, False])
def test_generator_batch_invariance(architecture, fused):
    """Image i of a batch is image i alone."""
    G = make_g(c_dim=3, architecture=architecture, conv_clamp=2.0)
    z, c = inputs(4, c_dim=3)
    together = G(z, c, noise_mode="const", fused_modconv=fused)
    for i in range(4):
        alone = G(z[i : i + 1], c[i : i + 1], noise_mode="const", fused_modconv=fused)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_discriminator_batch_invariance_without_minibatch_std(architecture):
    D = make_d(c_dim=3, architecture=architecture, epilogue_kwargs={"mbstd_num_channels": 0})
    assert D.b4.mbstd is None
    img = torch.randn([4, 3, 16, 16], generator=torch.Generator().manual_seed(4))
    c = inputs(4, c_dim=3)[1]
    together = D(img, c)
    assert together.shape == (4, 1)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], D(img[i : i + 1], c[i : i + 1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_equals_unfused_to_second_order(architecture):
    """Image, path-length gradient and the gradient of its square do not depend on the modulation path."""
    results = []
    for fused in (True, False):
        G = make_g(architecture=architecture).requires_grad_(True)
        ws = G.mapping(*inputs())
        img = G.synthesis(ws, noise_mode="const", fused_modconv=fused)
        field = torch.randn(img.shape, generator=torch.Generator().manual_seed(5))
        (slope,) = torch.autograd.grad((img * field).sum(), ws, create_graph=True)
        weights = [p for n, p in G.named_parameters() if n.endswith(("conv1.weight", "torgb.weight", "const"))]
        results.append([img, slope, *torch.autograd.grad(slope.square().sum(), weights, allow_unused=True)])
    for fused_tensor, plain_tensor in zip(*results):
        if fused_tensor is None:
            assert plain_tensor is None
            continue
        scale = float(plain_tensor.detach().abs().max())
        torch.testing.assert_close(fused_tensor / scale, plain_tensor / scale, rtol=0, atol=2e-5)


def loop_modulated_conv(x, weight, styles, demodulate):
    """Eq. 1-3 of Karras et al. 2020, one sample and one output channel at a time, in float64."""
    x, weight, styles = x.double(), weight.double(), styles.double()
    rows = []
    for sample, style in zip(x, styles):
        planes = []
        for kernel in weight:
            kernel = kernel * style[:, None, None]
            if demodulate:
                kernel = kernel / (kernel.square().sum() + 1e-8).sqrt()
            plane = torch.nn.functional.conv2d(sample[None], kernel[None], padding=weight.shape[2] // 2)
            planes.append(plane[0, 0])
        rows.append(torch.stack(planes))
    return torch.stack(rows)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]), st.booleans(), st.booleans(),
    st.integers(0, 1000),
)  # fmt: skip
def test_modulated_convolution_is_the_formula(n, in_ch, out_ch, kernel, demodulate, fused, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, styles, noise = (
        torch.randn(shape, generator=generator)
        for shape in ([n, in_ch, 5, 5], [out_ch, in_ch, kernel, kernel], [n, in_ch], [n, 1, 5, 5])
    )
    y = networks.modulated_conv2d(
        x, weight, styles, noise, padding=kernel // 2, demodulate=demodulate, fused_modconv=fused
    )
    expected = loop_modulated_conv(x, weight, styles, demodulate) + noise.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_demodulation_forgets_the_scale():
    x, weight, styles = torch.randn([2, 4, 6, 6]), torch.randn([5, 4, 3, 3]), torch.randn([2, 4])
    y = networks.modulated_conv2d(x, weight, styles, padding=1)
    torch.testing.assert_close(networks.modulated_conv2d(x, 7 * weight, 9 * styles, padding=1), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("noise_shape", [None, [6, 6], [2, 1, 6, 6]])
def test_float16_survives_factors_that_overflow(fused, noise_shape):
    """Weights and styles of 1e4 overflow float16 as a product; the pre-normalisation makes them harmless."""
    x, weight, styles = torch.randn([2, 4, 6, 6]), torch.randn([5, 4, 3, 3]) * 1e4, torch.randn([2, 4]) * 1e4
    noise = None if noise_shape is None else torch.randn(noise_shape)
    exact = networks.modulated_conv2d(x, weight, styles, noise, padding=1, fused_modconv=fused)
    half = networks.modulated_conv2d(x.half(), weight, styles, noise, padding=1, fused_modconv=fused)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.02)


def test_minibatch_std_by_hand():
    """Sample n is in group n mod (N/G); population deviation, averaged, replicated, appended last."""
    x = torch.randn([6, 4, 3, 3], generator=torch.Generator().manual_seed(6))
    y = networks.MinibatchStdLayer(group_size=3, num_channels=2)(x)
    assert torch.equal(y[:, :4], x)
    for n in range(6):
        group = x.double()[n % 2 :: 2]
        deviation = (group.var(dim=0, unbiased=False) + 1e-8).sqrt()
        for channel in range(2):
            expected = deviation[2 * channel : 2 * channel + 2].mean().item()
            assert y[n, 4 + channel].flatten().tolist() == pytest.approx([expected] * 9, rel=1e-5)


def test_minibatch_std_group_sizes():
    layer = networks.MinibatchStdLayer(group_size=4)
    assert layer(torch.randn(3, 2, 4, 4)).shape == (3, 3, 4, 4)
    assert layer(torch.randn(8, 2, 4, 4)).shape == (8, 3, 4, 4)
    assert networks.MinibatchStdLayer(group_size=None)(torch.randn(5, 2, 4, 4)).shape == (5, 3, 4, 4)
    with pytest.raises(ValueError, match="minibatch of 6 .* group size 4"):
        layer(torch.randn(6, 2, 4, 4))
    with pytest.raises(ValueError, match="3 channels .* 2"):
        networks.MinibatchStdLayer(4, num_channels=2)(torch.randn(4, 3, 4, 4))


# Latents, truncation, noise


def test_moving_average_of_latents():
    G = make_g(mapping_kwargs={"w_avg_beta": 0.9})
    z, c = inputs(5)
    start = G.mapping.w_avg.clone()
    w = G.mapping(z, c)[:, 0]
    assert torch.equal(G.mapping.w_avg, start), "evaluation must not move the average"
    G.train()
    G.mapping(z, c, skip_w_avg_update=True)
    assert torch.equal(G.mapping.w_avg, start)
    G(z, c, noise_mode="none")
    torch.testing.assert_close(G.mapping.w_avg, 0.9 * start + 0.1 * w.mean(0), rtol=1e-5, atol=1e-6)
    assert not G.mapping.w_avg.requires_grad


def test_mapping_without_average_or_broadcast():
    mapping = networks.MappingNetwork(4, 0, 6, num_ws=None)
    assert mapping(torch.randn(2, 4), None).shape == (2, 6) and not list(mapping.buffers())
    frozen = networks.MappingNetwork(4, 0, 6, num_ws=3, w_avg_beta=None).train()
    assert frozen(torch.randn(2, 4), None).shape == (2, 3, 6) and not list(frozen.buffers())
    for module in (mapping, frozen):
        with pytest.raises(ValueError, match="truncation_psi=0.5"):
            module(torch.randn(2, 4), None, truncation_psi=0.5)


def test_truncation_ends():
    G = make_g()
    z, c = inputs()
    w = G.mapping(z, c)
    assert torch.equal(G.mapping(z, c, truncation_psi=0), G.mapping.w_avg.expand_as(w))
    half = G.mapping(z, c, truncation_psi=0.5, truncation_cutoff=2)
    assert torch.equal(half[:, 2:], w[:, 2:])
    torch.testing.assert_close(half[:, :2], (w[:, :2] + G.mapping.w_avg) / 2)


def test_latents_scale_and_labels():
    """Latents are normalised, so their length does not matter; labels do."""
    G = make_g(c_dim=3)
    z, c = inputs(3, c_dim=3)
    torch.testing.assert_close(G.mapping(5 * z, c), G.mapping(z, c), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(G.mapping(z, c.roll(1, 0)), G.mapping(z, c), atol=1e-3)
    with pytest.raises(ValueError, match=r"labels c \[N, 3\]"):
        G(z, None)
    with pytest.raises(ValueError, match="no input"):
        networks.MappingNetwork(0, 0, 4, num_ws=2)
    unconditional = make_g()
    assert torch.equal(unconditional.mapping(z, None), unconditional.mapping(z, c[:, :0]))


def test_noise_modes():
    G = make_g()
    z, c = inputs(2)
    z = z[:1].repeat(2, 1)
    torch.manual_seed(0)
    first = G(z, c)
    assert not torch.allclose(first[0], first[1], atol=1e-3), "random noise differs between the samples of a batch"
    torch.manual_seed(0)
    assert torch.equal(first, G(z, c, noise_mode="random")), "random is the default and follows the global generator"
    for mode in ("const", "none"):
        state = torch.get_rng_state()
        img = G(z, c, noise_mode=mode)
        torch.testing.assert_close(img[0], img[1], rtol=1e-5, atol=1e-5)
        assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="noise_mode is 'constant'; choose one of random, const, none"):
        G(z, c, noise_mode="constant")
    silent = make_g(use_noise=False)
    assert not [name for name, _ in silent.named_parameters() if "noise" in name]
    assert not [name for name, _ in silent.named_buffers() if "noise" in name]
    assert torch.equal(silent(z, c), silent(z, c, noise_mode="none"))


def test_style_mixing_reaches_only_later_layers():
    """Latents from index k on leave the features of earlier blocks alone; the last one only colours the image."""
    G = make_g(architecture="orig")
    ws = G.mapping(*inputs(2))
    features = {}
    for res in G.synthesis.block_resolutions:
        block = getattr(G.synthesis, f"b{res}")
        block.register_forward_hook(lambda module, _, output: features.update({module.resolution: output[0]}))
    before = G.synthesis(ws, noise_mode="const")
    kept = dict(features)
    mixed = ws.clone()
    mixed[:, 3:] = ws.roll(1, 0)[:, 3:]
    G.synthesis(mixed, noise_mode="const")
    assert torch.equal(kept[8], features[8]) and not torch.allclose(kept[16], features[16])
    mixed = ws.clone()
    mixed[:, -1] = 0
    after = G.synthesis(mixed, noise_mode="const")
    assert torch.equal(kept[16], features[16]) and not torch.allclose(before, after)


# Which path runs in which precision


@pytest.mark.parametrize(
    "default, training, half, batch, expected",
    [
        (None, False, False, 4, True),
        (None, False, True, 4, False),
        (None, False, True, 1, True),
        (None, True, False, 1, False),
        (True, True, True, 4, True),
        (False, False, False, 1, False),
        ("inference_only", True, False, 1, False),
        ("inference_only", False, True, 4, True),
    ],
)
def test_choice_of_modulation_path(monkeypatch, default, training, half, batch, expected):
    options = {} if default is None else {"fused_modconv_default": default}
    G = make_g(8, num_fp16_res=1 if half else 0, **options).train(training)
    chosen = []
    plain = networks.modulated_conv2d

    def spy(*args, **kwargs):
        chosen.append(kwargs["fused_modconv"])
        return plain(*args, **kwargs)

    monkeypatch.setitem(networks.SynthesisLayer.forward.__globals__, "modulated_conv2d", spy)
    ws = torch.randn(batch, G.num_ws, G.w_dim)
    G.synthesis(ws)
    assert chosen[-3:] == [expected] * 3
    G.synthesis(ws, fused_modconv=not expected)
    assert chosen[-3:] == [not expected] * 3


@pytest.mark.parametrize("num_fp16_res", range(8))
def test_float16_rule(num_fp16_res):
    """Block r is float16 iff r >= max(2^(log2 R + 1 - num_fp16_res), 8); resolution 4 never is."""
    expected = {r: r >= max(2 ** (6 - num_fp16_res), 8) for r in (4, 8, 16, 32)}
    G = networks.SynthesisNetwork(4, 32, 3, channel_base=32, channel_max=4, num_fp16_res=num_fp16_res)
    assert {r: getattr(G, f"b{r}").use_fp16 for r in expected} == expected
    D = networks.Discriminator(0, 32, 3, channel_base=32, channel_max=4, num_fp16_res=num_fp16_res)
    assert {r: getattr(D, f"b{r}").use_fp16 for r in (8, 16, 32)} == {r: expected[r] for r in (8, 16, 32)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_channels_last(architecture):
    """Needs both flags, changes memory layout of weights and float16 activations, and not the numbers."""
    options = {"architecture": architecture, "num_fp16_res": 1, "conv_clamp": 256}
    plain_g = make_g(16, **options)
    G = make_g(16, fp16_channels_last=True, **options)
    G.load_state_dict(plain_g.state_dict())
    assert [G.synthesis.b8.channels_last, G.synthesis.b16.channels_last] == [False, True]
    assert G.synthesis.b16.conv0.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain_g.synthesis.b16.conv0.weight.is_contiguous()
    layouts = []
    G.synthesis.b16.conv1.register_forward_pre_hook(
        lambda module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    z, c = inputs(2)
    img = G(z, c, noise_mode="const")
    assert layouts == [True] and img.is_contiguous()
    torch.testing.assert_close(img, plain_g(z, c, noise_mode="const"), rtol=0, atol=0.02)
    exact = plain_g(z, c, noise_mode="const", force_fp32=True)
    torch.testing.assert_close(G(z, c, noise_mode="const", force_fp32=True), exact, rtol=1e-5, atol=1e-5)

    plain_d = make_d(16, **options)
    D = make_d(16, block_kwargs={"fp16_channels_last": True}, **options)
    D.load_state_dict(plain_d.state_dict())
    assert [D.b8.channels_last, D.b16.channels_last] == [False, True]
    assert D.b16.conv0.weight.is_contiguous(memory_format=torch.channels_last)
    logits = D(img, c)
    torch.testing.assert_close(logits, plain_d(img, c), rtol=0.02, atol=0.02)


# Names of the state


def test_state_of_64_pixels(monkeypatch):
    """The key table of the format description, section 2.5."""
    monkeypatch.setattr(torch, "randn", torch.empty)  # only names and shapes matter here
    G = networks.Generator(512, 0, 512, 64, 3, synthesis_kwargs={"channel_base": 16384})
    D = networks.Discriminator(0, 64, 3, channel_base=16384)
    conditional_g = networks.Generator(512, 10, 512, 64, 3, synthesis_kwargs={"channel_base": 16384})
    conditional_d = networks.Discriminator(10, 64, 3, channel_base=16384)
    assert G.num_ws == 10
    state = {name: list(value.shape) for name, value in G.state_dict().items()}
    assert len(state) == 106
    assert sum(p.numel() for p in G.parameters()) == 23_819_544
    assert sum(b.numel() for b in G.buffers()) == 11_632
    expected: dict[str, list[int]] = {}
    for r in (4, 8, 16, 32, 64):
        out, block = (256 if r == 64 else 512), f"synthesis.b{r}"
        if r == 4:
            expected[f"{block}.const"] = [512, 4, 4]
        expected[f"{block}.resample_filter"] = [4, 4]
        for layer, width in ((("conv0", 512),) if r > 4 else ()) + (("conv1", out),):
            expected[f"{block}.{layer}.weight"] = [out, width, 3, 3]
            expected[f"{block}.{layer}.noise_strength"] = []
            expected[f"{block}.{layer}.bias"] = [out]
            expected[f"{block}.{layer}.resample_filter"] = [4, 4]
            expected[f"{block}.{layer}.noise_const"] = [r, r]
            expected[f"{block}.{layer}.affine.weight"] = [width, 512]
            expected[f"{block}.{layer}.affine.bias"] = [width]
        expected[f"{block}.torgb.weight"] = [3, out, 1, 1]
        expected[f"{block}.torgb.bias"] = [3]
        expected[f"{block}.torgb.affine.weight"] = [out, 512]
        expected[f"{block}.torgb.affine.bias"] = [out]
    expected["mapping.w_avg"] = [512]
    for i in range(8):
        expected[f"mapping.fc{i}.weight"] = [512, 512]
        expected[f"mapping.fc{i}.bias"] = [512]
    assert list(state.items()) == list(expected.items())

    state = {name: list(value.shape) for name, value in D.state_dict().items()}
    assert len(state) == 46
    assert sum(p.numel() for p in D.parameters()) == 23_407_361
    assert sum(b.numel() for b in D.buffers()) == 288
    expected = {}
    for r in (64, 32, 16, 8):
        width = 256 if r == 64 else 512
        expected[f"b{r}.resample_filter"] = [4, 4]
        layers = {"fromrgb": [256, 3, 1, 1]} if r == 64 else {}
        layers.update(conv0=[width, width, 3, 3], conv1=[512, width, 3, 3], skip=[512, width, 1, 1])
        for layer, shape in layers.items():
            expected[f"b{r}.{layer}.weight"] = shape
            if layer != "skip":
                expected[f"b{r}.{layer}.bias"] = shape[:1]
            expected[f"b{r}.{layer}.resample_filter"] = [4, 4]
    expected.update({"b4.conv.weight": [512, 513, 3, 3], "b4.conv.bias": [512], "b4.conv.resample_filter": [4, 4]})
    expected.update({"b4.fc.weight": [512, 8192], "b4.fc.bias": [512], "b4.out.weight": [1, 512], "b4.out.bias": [1]})
    assert list(state.items()) == list(expected.items())

    state = {name: list(value.shape) for name, value in conditional_g.state_dict().items()}
    assert len(state) == 108
    assert state["mapping.embed.weight"] == [512, 10] and state["mapping.fc0.weight"] == [512, 1024]
    state = {name: list(value.shape) for name, value in conditional_d.state_dict().items()}
    assert len(state) == 64 and state["b4.out.weight"] == [512, 512] and state["mapping.embed.weight"] == [512, 10]
    assert list(dict(conditional_d.named_children())) == ["b64", "b32", "b16", "b8", "mapping", "b4"]
    assert list(dict(conditional_g.named_children())) == ["synthesis", "mapping"]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 10, 13, 100])
def test_freeze_d_turns_parameters_into_buffers(count):
    """Layers count from the image: fromrgb, conv0, conv1, skip of b64, then three a block; 13 is everything but b4."""
    whole = networks.Discriminator(0, 64, 3, channel_base=128, channel_max=4)
    D = networks.Discriminator(0, 64, 3, channel_base=128, channel_max=4, block_kwargs={"freeze_layers": count})
    order = [f"b64.{name}" for name in ("fromrgb", "conv0", "conv1", "skip")]
    order += [f"b{r}.{name}" for r in (32, 16, 8) for name in ("conv0", "conv1", "skip")]
    assert len(order) == 13
    trained = {name.rsplit(".", 1)[0] for name, _ in D.named_parameters() if not name.startswith("b4.")}
    assert trained == set(order[count:])
    assert set(D.state_dict()) == set(whole.state_dict())
    D.load_state_dict(whole.state_dict())
    img = torch.randn([2, 3, 64, 64])
    assert torch.equal(D(img, None), whole(img, None))
    D(img, None).sum().backward()
    assert all(p.grad is not None for p in D.parameters())


def test_filters_reach_their_places():
    """Blocks, conv0 and skip of G, conv1 and skip of D take the given filter; the rest keep the default."""
    taps = [1, 2, 3, 4, 4, 3, 2, 1]
    G = make_g(architecture="resnet", resample_filter=taps)
    D = make_d(architecture="resnet", block_kwargs={"resample_filter": taps})
    default = upfirdn2d.setup_filter([1, 3, 3, 1])
    for module, special in ((G, ("b4", "b8", "b16", "conv0", "skip")), (D, ("b8", "b16", "conv1", "skip"))):
        for name, buffer in module.named_buffers():
            if name.endswith("resample_filter"):
                if name.split(".")[-2] in special:
                    assert torch.equal(buffer, upfirdn2d.setup_filter(taps)) and buffer.ndim == 1, name
                else:
                    assert torch.equal(buffer, default), name
    assert taps == [1, 2, 3, 4, 4, 3, 2, 1]


def test_clamps_reach_their_places():
    G = make_g(architecture="resnet", conv_clamp=3.5)
    D = make_d(architecture="skip", conv_clamp=3.5)
    for module in (G, D):
        for name, layer in module.named_modules():
            if hasattr(layer, "conv_clamp"):
                free = name.endswith("skip") or name == "b4.fromrgb"
                assert layer.conv_clamp == (None if free else 3.5), name


def test_initial_statistics():
    """Raw weights have unit deviation, or 1/lr where the multiplier is lr; noise starts silent; styles start at 1."""
    torch.manual_seed(0)
    layer = networks.FullyConnectedLayer(200, 300, lr_multiplier=0.01, bias_init=1)
    assert layer.weight.std().item() == pytest.approx(100, rel=0.02) and layer.bias.tolist() == [1.0] * 300
    assert (layer.weight_gain, layer.bias_gain) == (pytest.approx(0.01 / math.sqrt(200)), 0.01)
    layer = networks.SynthesisLayer(64, 64, 8, 4)
    assert layer.weight.std().item() == pytest.approx(1, rel=0.02)
    assert layer.noise_strength.item() == 0 and layer.affine.bias.tolist() == [1.0] * 64
    y = layer(torch.randn([8, 64, 4, 4]), torch.zeros([8, 8]), noise_mode="none")
    assert y.square().mean().item() == pytest.approx(1, rel=0.4), "signals keep their size at the start"


def test_no_numpy_scalar_in_state():
    for module in [*make_g(c_dim=3, architecture="resnet").modules(), *make_d(c_dim=3, architecture="skip").modules()]:
        for name, value in vars(module).items():
            assert not isinstance(value, (np.generic, np.ndarray)), (type(module).__name__, name)


def test_copies_are_equal_and_independent():
    G = make_g(c_dim=3)
    twin = copy.deepcopy(G)
    z, c = inputs(2, c_dim=3)
    assert torch.equal(G(z, c, noise_mode="const"), twin(z, c, noise_mode="const"))
    twin.synthesis.b4.const.add_(1)
    assert not torch.equal(G(z, c, noise_mode="const"), twin(z, c, noise_mode="const"))
    rebuilt = type(G)(*G.init_args, **G.init_kwargs)
    rebuilt.load_state_dict(G.state_dict())
    assert torch.equal(G(z, c, noise_mode="const"), rebuilt.eval()(z, c, noise_mode="const"))


def test_other_image_channels_and_sizes():
    for resolution, channels in ((4, 1), (8, 2), (32, 4)):
        G = networks.Generator(4, 0, 4, resolution, channels, synthesis_kwargs=SMALL)
        img = G(torch.randn(2, 4), None)
        assert img.shape == (2, channels, resolution, resolution)
        if resolution >= 8:
            D = networks.Discriminator(0, resolution, channels, **SMALL)
            assert D(img, None).shape == (2, 1)


def test_wrong_configurations_are_named():
    for resolution in (48, 2, 0, -4):
        with pytest.raises(ValueError, match=f"img_resolution is {resolution}; it must be a power of two >= 4"):
            networks.SynthesisNetwork(4, resolution, 3)
    with pytest.raises(ValueError, match="img_resolution is 4; it must be a power of two >= 8"):
        networks.Discriminator(0, 4, 3)
    with pytest.raises(ValueError, match="architecture is 'swagan'; choose one of orig, skip, resnet"):
        make_g(architecture="swagan")
    with pytest.raises(ValueError, match="architecture is 'swagan'"):
        make_d(architecture="swagan")
    with pytest.raises(AssertionError):
        make_g()(torch.randn(2, 9), None)
    with pytest.raises(AssertionError):
        make_d()(torch.randn(2, 3, 32, 32), None)


# Self-containedness


def imported_names(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            if node.module in ("torch_utils", "torch_utils.ops", "scipy"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


def test_source_is_python_3_8_and_imports_only_the_contract():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 8))
    assert imported_names(tree) <= CONTRACT
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert [ast.unparse(d) for d in node.decorator_list] == ["persistence.persistent_class"], node.name
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            # Evaluated when the file runs, so newer operators and subscripts of builtins must stay in quotes.
            assert not isinstance(annotation, (ast.BinOp, ast.Subscript)), ast.unparse(annotation)


def test_source_runs_under_exec_with_only_the_contract(monkeypatch):
    """A fresh module made of the text alone, whose imports are watched, gives the same images."""
    plain_import = builtins.__import__
    asked = set()

    def watched_import(name, globals=None, locals=None, fromlist=(), level=0):
        if (globals or {}).get("__name__") == "fresh_networks":
            names = {f"{name}.{item}" for item in fromlist} if name in ("torch_utils", "torch_utils.ops") else {name}
            if not names <= CONTRACT:
                raise ImportError(f"{names - CONTRACT} is not in the contract")
            asked.update(names)
        return plain_import(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", watched_import)
    G, D = make_g(c_dim=3, architecture="resnet"), make_d(c_dim=3, architecture="skip")
    fresh = types.ModuleType("fresh_networks")
    monkeypatch.setitem(sys.modules, "fresh_networks", fresh)
    exec(compile(SOURCE.read_text(encoding="utf-8"), "fresh_networks", "exec"), vars(fresh))
    assert "torch" in asked and "torch_utils.persistence" in asked
    G2 = fresh.Generator(*G.init_args, **G.init_kwargs).eval()
    D2 = fresh.Discriminator(*D.init_args, **D.init_kwargs).eval()
    assert type(G2) is not type(G)
    G2.load_state_dict(G.state_dict())
    D2.load_state_dict(D.state_dict())
    z, c = inputs(3, c_dim=3)
    img = G(z, c, 0.7, noise_mode="const")
    assert torch.equal(G2(z, c, 0.7, noise_mode="const"), img)
    assert torch.equal(D2(img, c), D(img, c))
