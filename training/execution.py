"""How the running copies of the networks compute: precision, order of operations, what is kept between two images.

`training.networks` defines the networks and travels inside snapshots, so it stays plain. `accelerate` lets a network in
memory compute the same numbers, up to rounding, from the same parameters with fewer passes over memory: styles of all
layers at once, one ordinary convolution for the whole batch, and everything behind it in one operator. Names, state and
pickles of the network are untouched; copies of it are plain networks again.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act, colours, conv2d_resample, dense, epilogue, upfirdn2d
from torch_utils.ops.packed_conv2d import PackedConv2d
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


def freeze(network: torch.nn.Module) -> torch.nn.Module:
    """Let an accelerated generator on a CPU keep what it computes from its weights alone, for images without gradients.

    Worth it where several batches are made with the same weights. What is kept is made on first use, and anew after
    weights were changed by torch's operations; writing to `parameter.data` goes unnoticed, so `thaw` it before.

    Returns:
        The same object.
    """
    for module in network.modules():
        if "kept" in vars(type(module)):
            kind = _Kept if isinstance(module, networks.SynthesisNetwork) else _KeptDense
            type(module).kept = kind(module)  # type: ignore[attr-defined]
    return network


def thaw(network: torch.nn.Module) -> torch.nn.Module:
    """Undo `freeze`; its memory is given back."""
    for module in network.modules():
        if "kept" in vars(type(module)):
            type(module).kept = None  # type: ignore[attr-defined]
    return network


@contextlib.contextmanager
def frozen(network: torch.nn.Module) -> Iterator[None]:
    """`freeze` inside the block, for a network that is in training otherwise."""
    freeze(network)
    try:
        yield
    finally:
        thaw(network)


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

    namespace: dict[str, Any] = {"forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    namespace.update(__doc__=plain.__doc__, _is_persistent_class=True)
    if plain in (networks.SynthesisNetwork, networks.FullyConnectedLayer):
        namespace["kept"] = None  # a `_Kept` or `_KeptDense` after `freeze`
    return type(plain.__name__, (plain,), namespace)


def _plan(module: torch.nn.Module, precision: str, force_fp32: bool) -> tuple[torch.dtype | None, bool]:
    """(dtype of the fast way, or None for the plain forward pass; force_fp32 of that)."""
    on_cpu = next(module.parameters()).device.type == "cpu"
    exact = force_fp32 or precision == "fp32" or (on_cpu and precision != "bf16")
    if custom_ops.fast_paths() and (on_cpu or precision == "bf16"):
        return torch.float32 if exact else torch.bfloat16, exact
    return None, exact


def _dense(self: Any, _precision: str, x: torch.Tensor) -> torch.Tensor:
    """`FullyConnectedLayer.forward`."""
    if x.dtype != self.weight.dtype or x.ndim != 2 or not custom_ops.fast_paths():
        return networks.FullyConnectedLayer.forward(self, x)
    if _may_use(self.kept, x):
        return self.kept(x)
    return dense.dense(x, self.weight, self.bias, self.weight_gain, self.bias_gain, self.activation)


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
    ws = ws.to(torch.float32)
    parts = self.kept.parts(ws, dtype) if _may_use(self.kept, ws) else _live_parts(self, ws, dtype)
    x = img = None
    for res in self.block_resolutions:
        x, img = _synthesis_block(getattr(self, f"b{res}"), x, img, parts, dtype, noise_mode)
    assert img is not None
    return img


def _may_use(kept: Any, x: torch.Tensor) -> bool:
    """Whether what was kept of the weights serves this call."""
    return (
        kept is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a modulated convolution takes from weights and latents."""

    styles: torch.Tensor  # [N, I]; a torgb's own gain is in it
    scales: torch.Tensor | None  # [N, O]: demodulation; None for a torgb
    convolve: Callable[[torch.Tensor], torch.Tensor] | None  # modulated images to images; None for a torgb
    modulate: Callable[..., torch.Tensor] = epilogue.epilogue  # of images and styles
    finish: Callable[..., torch.Tensor] | None = None  # of images, scales, noise, strength, bias; None = `epilogue`
    whole: Callable[..., torch.Tensor] | None = None  # all three at once; None = one after the other


def _modulated_layers(net: Any) -> Iterator[tuple[int, Any]]:
    """Index of the latent and layer, in the order in which the layers run."""
    start = 0
    for res in net.block_resolutions:
        block = getattr(net, f"b{res}")
        names = ["conv0"] * (block.in_channels > 0) + ["conv1"] + ["torgb"] * block.num_torgb
        yield from enumerate([getattr(block, name) for name in names], start)
        start += block.num_conv


def _live_parts(net: Any, ws: torch.Tensor, dtype: torch.dtype) -> Iterator[_Part]:
    """The parts of all layers in their order, made from the parameters as they are."""
    latents = ws.unbind(dim=1)
    for index, layer in _modulated_layers(net):
        affine, gain = layer.affine, layer.weight_gain if isinstance(layer, networks.ToRGBLayer) else 1
        styles = dense.dense(latents[index], affine.weight, affine.bias, affine.weight_gain * gain, gain)
        if isinstance(layer, networks.ToRGBLayer):
            yield _Part(styles, None, None)
            continue
        scales = dense.demodulation(styles, layer.weight)
        yield _Part(styles, scales, functools.partial(_resampled, layer, layer.weight.to(dtype)))


def _resampled(layer: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The convolution of a layer, with resampling."""
    return conv2d_resample.conv2d_resample(
        x=x, w=weight, f=layer.resample_filter, up=layer.up, padding=layer.padding, flip_weight=layer.up == 1
    )


MAX_BATCHES = 2  # sizes for which calls are kept: a batch's and that of the last one, which may be smaller


class _Kept:
    """What a synthesis network computes from its weights alone; made on first use and after weights have changed."""

    def __init__(self, net: Any) -> None:
        self._net = net
        self._tensors = list(net.parameters())
        self._made_for: tuple | None = None

    def parts(self, ws: torch.Tensor, dtype: torch.dtype) -> Iterator[_Part]:
        """The parts of all layers in their order: few products for all layers at once."""
        state = (dtype, custom_ops.requested(), _version(self._tensors))
        if state != self._made_for:
            self._make(dtype)
            self._made_for = state
        num = len(ws)
        if num not in self._calls:
            if len(self._calls) == MAX_BATCHES:
                self._calls.clear()
            self._calls[num] = [_bound_calls(layer, convolve, num, dtype) for layer, convolve in self._layers]
        latents = ws.transpose(0, 1).index_select(0, self._latent)  # [L, N, w_dim]
        all_styles = torch.baddbmm(self._bias, latents, self._affine)  # [L, N, I at most]
        all_scales = dense.demodulated(all_styles, self._energy).unbind(0)  # [N, O at most] each
        layers = zip(self._layers, self._calls[num], all_styles.unbind(0), all_scales)
        for (layer, _), calls, styles, scales in layers:
            out_channels, in_channels = layer.weight.shape[:2]
            is_torgb = isinstance(layer, networks.ToRGBLayer)
            yield _Part(styles[:, :in_channels], None if is_torgb else scales[:, :out_channels], *calls)

    def _make(self, dtype: torch.dtype) -> None:
        layers = list(_modulated_layers(self._net))
        widest_in = max(layer.weight.shape[1] for _, layer in layers)
        widest_out = max(layer.weight.shape[0] for _, layer in layers)
        new = self._tensors[0].new_zeros
        self._latent = torch.tensor([index for index, _ in layers])
        self._affine = new([len(layers), self._net.w_dim, widest_in])
        self._bias = new([len(layers), 1, widest_in])
        self._energy = new([len(layers), widest_in, widest_out])
        self._layers: list[tuple[Any, PackedConv2d | None]] = []
        self._calls: dict[int, list[tuple]] = {}  # by the size of the batch, the last four fields of all parts
        for k, (_, layer) in enumerate(layers):
            out_channels, in_channels = layer.weight.shape[:2]
            gain = layer.weight_gain if isinstance(layer, networks.ToRGBLayer) else 1
            self._affine[k, :, :in_channels] = layer.affine.weight.t() * (layer.affine.weight_gain * gain)
            self._bias[k, :, :in_channels] = layer.affine.bias * gain
            self._energy[k, :in_channels, :out_channels] = layer.weight.square().sum(dim=(2, 3)).t()
            self._layers.append((layer, _packed(layer, dtype)))


class _KeptDense:
    """The weights of a fully connected layer with their gains, laid out for products; made as in `_Kept`."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._tensors = list(layer.parameters())
        self._made_for: tuple | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output [N, O] of x [N, I]."""
        layer, state = self._layer, _version(self._tensors)
        if state != self._made_for:
            self._weight = (layer.weight.detach() * layer.weight_gain).t().contiguous()
            self._bias = None if layer.bias is None else layer.bias.detach() * layer.bias_gain
            self._made_for = state
        y = x @ self._weight if self._bias is None else torch.addmm(self._bias, x, self._weight)
        return y if layer.activation == "linear" else bias_act.bias_act(y, act=layer.activation)


def _version(tensors: list[torch.Tensor]) -> tuple[int, int]:
    """Differs after a tensor was changed by torch's operations, or all moved."""
    return sum(t._version for t in tensors), tensors[0].data_ptr()


def _packed(layer: Any, dtype: torch.dtype) -> PackedConv2d | None:
    """The convolution of a layer with its weights as they are; None where there is more to it, and for a torgb."""
    if isinstance(layer, networks.ToRGBLayer):
        return None
    if layer.up != 2 and (layer.up != 1 or layer.padding != layer.weight.shape[2] // 2):
        return None
    return PackedConv2d(layer.weight.detach().to(dtype), transposed=layer.up == 2)


def _bound_calls(layer: Any, packed: PackedConv2d | None, num: int, dtype: torch.dtype) -> tuple:
    """The calls of a part for batches of `num` images, with nothing left to decide."""
    if isinstance(layer, networks.ToRGBLayer):
        return (None,)
    side = layer.resolution // layer.up
    images = _images(num, layer.weight.shape[1], side, dtype)
    out = _images(num, layer.weight.shape[0], layer.resolution, dtype)
    finish = epilogue.bound(out, layer.activation, layer.act_gain, layer.conv_clamp)
    modulate, whole = epilogue.bound(images), None
    if packed is None:
        convolve: Callable = functools.partial(_resampled, layer, layer.weight.detach().to(dtype))
    elif layer.up == 1:
        convolve = packed.bound(images)
        whole = packed.bound_layer(images, layer.activation, layer.act_gain, layer.conv_clamp)
    else:
        resample, finished = _filtered(layer, images)
        deconvolve, at_once = packed.bound(images), packed.bound_modulated(images)
        convolve = lambda x: resample(deconvolve(x))  # noqa: E731
        last = finished or (lambda x, *others: finish(resample(x), *others))
        modulated = at_once or (lambda x, styles: deconvolve(modulate(x, styles, None, None, None)))
        whole = lambda x, styles, *others: last(modulated(x, styles), *others)  # noqa: E731
    return convolve, lambda x, styles: modulate(x, styles, None, None, None), finish, whole


def _images(num: int, channels: int, side: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty([num, channels, side, side], dtype=dtype, memory_format=torch.channels_last)


def _filtered(layer: Any, images: torch.Tensor) -> tuple[Callable, Callable | None]:
    """The filter behind the transposed convolution of a layer that doubles the resolution, for such images.

    The second is it and `finish` at once, or None where they are two calls.
    """
    kernel, up, taps = layer.weight.shape[2], 2, layer.resample_filter
    px0, px1, py0, py1 = upfirdn2d.upsample_padding(taps, up)
    low, high = layer.padding - (kernel - 1), layer.padding - (kernel - up)  # the transposed convolution's own borders
    pads = [px0 + low, px1 + high, py0 + low, py1 + high]
    convolved = _images(len(images), layer.weight.shape[0], up * (images.shape[2] - 1) + kernel, images.dtype)
    finished = None
    if layer.activation in epilogue.NATIVE_ACTS:
        settings = epilogue.native_settings(layer.activation, layer.act_gain, layer.conv_clamp)
        finished = upfirdn2d.bound_epilogue(convolved, taps, pads, up**2, settings)
    return upfirdn2d.bound(convolved, taps, pads, up**2), finished


def _synthesis_block(
    block: Any,
    x: torch.Tensor | None,
    img: torch.Tensor | None,
    parts: Iterator[_Part],
    dtype: torch.dtype,
    noise_mode: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`SynthesisBlock.forward`."""
    if x is None:
        part = next(parts)
        x = block.const.to(dtype).unsqueeze(0).expand(len(part.styles), -1, -1, -1)
        x = _modulated(block.conv1, x, part, noise_mode)
    elif block.architecture == "resnet":
        gain = math.sqrt(0.5)
        shortcut = _convolved(block.skip, x, gain)
        x = _modulated(block.conv0, x, next(parts), noise_mode)
        x = shortcut + _modulated(block.conv1, x, next(parts), noise_mode, gain)
    else:
        x = _modulated(block.conv0, x, next(parts), noise_mode)
        x = _modulated(block.conv1, x, next(parts), noise_mode)
    if img is not None:
        img = upfirdn2d.upsample2d(img, block.resample_filter)
    if block.num_torgb > 0:
        rgb = _to_rgb(block.torgb, x, next(parts))
        img = rgb if img is None else img + rgb
    return x, img


def _modulated(layer: Any, x: torch.Tensor, part: _Part, noise_mode: str, gain: float = 1) -> torch.Tensor:
    """`SynthesisLayer.forward`."""
    assert part.convolve is not None
    noise = strength = None
    if layer.use_noise and noise_mode != "none":
        strength = layer.noise_strength
        shape = [len(x), 1, layer.resolution, layer.resolution]
        noise = torch.randn(shape, device=x.device) if noise_mode == "random" else layer.noise_const
    if part.whole is not None and gain == 1:
        return part.whole(x, part.styles, part.scales, noise, strength, layer.bias)
    x = part.convolve(part.modulate(x, part.styles))
    if part.finish is not None and gain == 1:
        return part.finish(x, part.scales, noise, strength, layer.bias)
    return epilogue.epilogue(
        x,
        part.scales,
        noise,
        strength,
        layer.bias,
        act=layer.activation,
        gain=layer.act_gain * gain,
        clamp=None if layer.conv_clamp is None else layer.conv_clamp * gain,
    )


def _to_rgb(layer: Any, x: torch.Tensor, part: _Part) -> torch.Tensor:
    """`ToRGBLayer.forward`: few outputs, so the modulated kernels of a batch are small, and one product does it."""
    kernels = layer.weight.flatten(1) * part.styles.unsqueeze(1)  # [N, O, I]
    return bias_act.bias_act(colours.few(x, kernels), layer.bias, clamp=layer.conv_clamp)


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
        y = _from_rgb(block.fromrgb, img, dtype)
        x = y if x is None else x + y
        img = upfirdn2d.downsample2d(img, block.resample_filter) if block.architecture == "skip" else None
    assert x is not None
    if block.architecture == "resnet":
        gain = math.sqrt(0.5)
        shortcut = _convolved(block.skip, x, gain)
        return shortcut + _convolved(block.conv1, _convolved(block.conv0, x), gain), img
    return _convolved(block.conv1, _convolved(block.conv0, x)), img


def _from_rgb(layer: Any, img: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`Conv2dLayer.forward` of a layer that reads a picture."""
    if layer.weight.shape[2] != 1 or not colours.suits(img.device, dtype, img.shape[1]):
        return _convolved(layer, img.to(dtype))
    kernels = (layer.weight * layer.weight_gain).flatten(1).t()  # [O, C]: from the pixel's point of view
    x = colours.many(img.to(torch.float32), kernels.expand(len(img), -1, -1), dtype)
    return _activated(layer, x, 1)


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
    return y if bare else _activated(layer, y, gain)


def _activated(layer: Any, y: torch.Tensor, gain: float) -> torch.Tensor:
    """What follows the convolution of a `Conv2dLayer`."""
    return epilogue.epilogue(
        y,
        bias=layer.bias,
        act=layer.activation,
        gain=layer.act_gain * gain,
        clamp=None if layer.conv_clamp is None else layer.conv_clamp * gain,
    )


_FAST: dict[type, Callable[..., Any]] = {
    networks.FullyConnectedLayer: _dense,
    networks.SynthesisNetwork: _synthesize,
    networks.Discriminator: _discriminate,
}
