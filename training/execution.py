"""How the running copies of the networks compute: precision, order of operations, what is kept between two images.

`training.networks` defines the networks and travels inside snapshots, so it stays plain. `accelerate` lets a network in
memory compute the same numbers, up to rounding, from the same parameters with fewer passes over memory: styles of all
layers at once, one ordinary convolution for the whole batch, and everything behind it in one operator. Names, state and
pickles of the network are untouched; copies of it are plain networks again.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act, conv2d_resample, epilogue, upfirdn2d
from training import networks
from training.config import PRECISIONS


def accelerate(network: torch.nn.Module, precision: str = "auto") -> torch.nn.Module:
    """Let a generator or discriminator compute the fast way, in place.

    On a CPU `auto` and `fp32` are float32 throughout, whatever the checkpoint says. On a GPU `auto` and `fp16` are what
    the checkpoint says. `bf16` runs all blocks in bfloat16 with float32 parameters, styles and sums of images;
    mapping networks and the discriminator's last block stay float32.

    Args:
        network: Generator or discriminator; only parts of this project's own classes are changed.
        precision: One of `PRECISIONS`.

    Returns:
        The same object.

    Raises:
        ValueError: Unknown precision, or one that the network's device does not have.
    """
    check_precision(precision, next(network.parameters()).device)
    for module in network.modules():
        plain = type(module)
        compute = _FAST.get(plain)
        if compute is not None:
            module.__class__ = _running_class(plain, compute, precision)
    return network


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse an arithmetic that a device does not have or is slow at.

    Raises:
        ValueError: Unknown precision, or the device is no good for it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision} is unknown; one of {', '.join(PRECISIONS)}")
    if device.type == "cpu" and precision == "fp16":
        raise ValueError("--precision fp16 is for GPUs, a CPU is slow at it; use fp32, or bf16 where there is one")
    if device.type == "cpu" and precision == "bf16" and not has_fast_bf16():
        raise ValueError(
            "--precision bf16: this processor has no bfloat16 arithmetic (avx512_bf16, amx_bf16): slower "
            "than fp32; use fp32"
        )


@functools.cache
def has_fast_bf16() -> bool:
    """Whether this processor computes in bfloat16; false where the system doesn't tell."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].split())
    except OSError:
        return False
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})  # the last is Arm's name


def _running_class(plain: type, compute: Callable[..., Any], precision: str) -> type:
    """A subclass with another forward pass that says of itself to be `plain`, so that copies and pickles are plain."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(self, precision, *args, **kwargs)

    namespace = {"forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (plain,), {**namespace, "__doc__": plain.__doc__, "_is_persistent_class": True})


def _plan(module: torch.nn.Module, precision: str, force_fp32: bool) -> tuple[torch.dtype | None, bool]:
    """(dtype of the fast way, or None for the plain forward pass; force_fp32 of that)."""
    on_cpu = next(module.parameters()).device.type == "cpu"
    exact = force_fp32 or precision == "fp32" or (on_cpu and precision != "bf16")
    if custom_ops.fast_paths() and (on_cpu or precision == "bf16"):
        return torch.float32 if exact else torch.bfloat16, exact
    return None, exact


def _map(
    self: Any,
    _precision: str,
    z: torch.Tensor | None,
    c: torch.Tensor | None,
    truncation_psi: float = 1,
    truncation_cutoff: int | None = None,
    skip_w_avg_update: bool = False,
) -> torch.Tensor:
    """`MappingNetwork.forward`."""
    return networks.MappingNetwork.forward(self, z, c, truncation_psi, truncation_cutoff, skip_w_avg_update)


def _synthesize(
    self: Any,
    precision: str,
    ws: torch.Tensor,
    noise_mode: str = "random",
    force_fp32: bool = False,
    fused_modconv: bool | None = None,
    **others: Any,
) -> torch.Tensor:
    """`SynthesisNetwork.forward`."""
    dtype, force_fp32 = _plan(self, precision, force_fp32)
    if dtype is None or fused_modconv or others or noise_mode not in networks.NOISE_MODES:
        return networks.SynthesisNetwork.forward(
            self, ws, noise_mode=noise_mode, force_fp32=force_fp32, fused_modconv=fused_modconv, **others
        )
    ws = ws.to(torch.float32) * (1 / math.sqrt(self.w_dim))  # the gain of every affine layer
    latents = ws.unbind(dim=1)
    x = img = None
    start = 0
    for res in self.block_resolutions:
        block = getattr(self, f"b{res}")
        x, img = _synthesis_block(block, x, img, latents[start:], dtype, noise_mode)
        start += block.num_conv
    assert img is not None
    return img


def _synthesis_block(
    block: Any,
    x: torch.Tensor | None,
    img: torch.Tensor | None,
    latents: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    noise_mode: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`SynthesisBlock.forward`."""
    if x is None:
        x = block.const.to(dtype).unsqueeze(0).expand(len(latents[0]), -1, -1, -1)
        x = _modulated(block.conv1, x, latents[0], noise_mode)
    elif block.architecture == "resnet":
        gain = math.sqrt(0.5)
        shortcut = _convolved(block.skip, x, gain)
        x = _modulated(block.conv0, x, latents[0], noise_mode)
        x = shortcut + _modulated(block.conv1, x, latents[1], noise_mode, gain)
    else:
        x = _modulated(block.conv0, x, latents[0], noise_mode)
        x = _modulated(block.conv1, x, latents[1], noise_mode)
    if img is not None:
        img = upfirdn2d.upsample2d(img, block.resample_filter)
    if block.num_torgb > 0:
        rgb = _to_rgb(block.torgb, x, latents[block.num_conv])
        img = rgb if img is None else img + rgb
    return x, img


def _modulated(layer: Any, x: torch.Tensor, w: torch.Tensor, noise_mode: str, gain: float = 1) -> torch.Tensor:
    """`SynthesisLayer.forward`, where w has the affine layer's gain already."""
    styles = torch.addmm(layer.affine.bias, w, layer.affine.weight.t())  # [N, I]
    noise = strength = None
    if layer.use_noise and noise_mode != "none":
        strength = layer.noise_strength
        shape = [len(x), 1, layer.resolution, layer.resolution]
        noise = torch.randn(shape, device=x.device) if noise_mode == "random" else layer.noise_const
    # Eq. 3, Karras et al. 2020: sum_{i,k} (W s)^2 = sum_i s_i^2 (sum_k W^2).
    scales = (styles.square() @ layer.weight.square().sum(dim=(2, 3)).t() + 1e-8).rsqrt()  # [N, O]
    y = conv2d_resample.conv2d_resample(
        x=epilogue.epilogue(x, styles),
        w=layer.weight.to(x.dtype),
        f=layer.resample_filter,
        up=layer.up,
        padding=layer.padding,
        flip_weight=layer.up == 1,
    )
    return epilogue.epilogue(
        y,
        scales,
        noise,
        strength,
        layer.bias,
        act=layer.activation,
        gain=layer.act_gain * gain,
        clamp=None if layer.conv_clamp is None else layer.conv_clamp * gain,
    )


def _to_rgb(layer: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`ToRGBLayer.forward`: few outputs, so the modulated kernels of a batch are small, and one product does it."""
    num, channels, height, width = x.shape
    styles = torch.addmm(layer.affine.bias, w, layer.affine.weight.t()) * layer.weight_gain  # [N, I]
    kernels = (layer.weight.flatten(1) * styles.unsqueeze(1)).to(x.dtype)  # [N, O, I]
    pixels = x.permute(0, 2, 3, 1).reshape(num, height * width, channels)
    y = torch.bmm(kernels, pixels.transpose(1, 2)).reshape(num, -1, height, width).to(torch.float32)
    return bias_act.bias_act(y, layer.bias, clamp=layer.conv_clamp)


def _discriminate(
    self: Any,
    precision: str,
    img: torch.Tensor,
    c: torch.Tensor | None,
    force_fp32: bool = False,
    **others: Any,
) -> torch.Tensor:
    """`Discriminator.forward`."""
    dtype, force_fp32 = _plan(self, precision, force_fp32)
    if dtype is None or others:
        return networks.Discriminator.forward(self, img, c, force_fp32=force_fp32, **others)
    x = None
    image: torch.Tensor | None = img
    for res in self.block_resolutions:
        x, image = _discriminator_block(getattr(self, f"b{res}"), x, image, dtype)
    return self.b4(x, image, self.mapping(None, c) if self.c_dim > 0 else None)


def _discriminator_block(
    block: Any, x: torch.Tensor | None, img: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`DiscriminatorBlock.forward`."""
    if block.in_channels == 0 or block.architecture == "skip":
        assert img is not None
        y = _convolved(block.fromrgb, img.to(dtype))
        x = y if x is None else x + y
        img = upfirdn2d.downsample2d(img, block.resample_filter) if block.architecture == "skip" else None
    assert x is not None
    if block.architecture == "resnet":
        gain = math.sqrt(0.5)
        shortcut = _convolved(block.skip, x, gain)
        return shortcut + _convolved(block.conv1, _convolved(block.conv0, x), gain), img
    return _convolved(block.conv1, _convolved(block.conv0, x)), img


def _convolved(layer: Any, x: torch.Tensor, gain: float = 1) -> torch.Tensor:
    """`Conv2dLayer.forward`."""
    bare = layer.bias is None and layer.activation == "linear" and layer.conv_clamp is None
    weight = layer.weight * (layer.weight_gain * (gain if bare else 1))
    y = conv2d_resample.conv2d_resample(
        x=x,
        w=weight.to(x.dtype),
        f=layer.resample_filter,
        up=layer.up,
        down=layer.down,
        padding=layer.padding,
        flip_weight=layer.up == 1,
    )
    if bare:
        return y
    return epilogue.epilogue(
        y,
        bias=layer.bias,
        act=layer.activation,
        gain=layer.act_gain * gain,
        clamp=None if layer.conv_clamp is None else layer.conv_clamp * gain,
    )


_FAST: dict[type, Callable[..., Any]] = {
    networks.SynthesisNetwork: _synthesize,
    networks.Discriminator: _discriminate,
}
