"""The slow path that ratios are taken against: what StyleGAN2-ADA code does on a CPU when nothing is done for it.

An honest stand-in, not an implementation to use: NCHW, float32, a demodulation tensor [N, O, I, k, k] per layer,
grouped convolutions with one kernel per sample in inference, zero insertion and depthwise FIR filters, every bias,
slope and gain a pass of its own, fakes and reals through D one after the other, gradients cleaned and averages moved
tensor by tensor, plain Adam. It computes with the parameters of this project's networks, so it gives the same images to
rounding (`tests/test_benchmarks.py`) and only the path differs. `bench.py` prints what it costs beside what the
original was measured to cost.

Supports what the benchmarks run: unconditional 'skip' generators and 'resnet' discriminators, no clamp.
Source: spec networks-and-pickles.md sections 1 and 2, training-and-metrics.md sections 1 and 2.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training import augment

SLOPE = 0.2
GAIN = math.sqrt(2)


def upfirdn(x: Tensor, taps: Tensor, up: int = 1, down: int = 1, pad: tuple = (0, 0), gain: float = 1) -> Tensor:
    """Insert zeros, pad (before, after) along both axes, filter every channel by itself, decimate.

    Args:
        x: Images [N, C, H, W].
        taps: Filter [k, k], or [k] to be applied along both axes.
        up: Zero-insertion factor.
        down: Decimation factor.
        pad: Zeros before and after, the same along both axes; negative values crop.
        gain: Factor on the result.
    """
    n, c, h, w = sizes(x)
    if up > 1 or not torch.onnx.is_in_onnx_export():  # the copy where nothing is inserted is part of the slow path
        x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(n, c, h * up, w * up)
    x = F.pad(x, [max(pad[0], 0), max(pad[1], 0)] * 2)
    if min(pad) < 0:
        crop = [max(-p, 0) for p in pad]
        x = x[:, :, crop[0] : x.shape[2] - crop[1], crop[0] : x.shape[3] - crop[1]]
    taps = (taps * gain ** (taps.ndim / 2)).flip(list(range(taps.ndim)))
    kernels = [taps] if taps.ndim == 2 else [taps[None, :], taps[:, None]]
    for kernel in kernels:
        x = F.conv2d(x, kernel.repeat(c, 1, 1, 1), groups=c)
    return x if down == 1 else x[:, :, ::down, ::down]


def sizes(x: Tensor) -> list[int]:
    """The shape as numbers, also for a tracer, which would otherwise hand out tensors."""
    return [int(size) for size in x.shape]


def resampled_conv(x: Tensor, weight: Tensor, taps: Tensor, up: int = 1, down: int = 1, groups: int = 1) -> Tensor:
    """Convolution of side k with padding k // 2, before it or after it a change of resolution by `up` or `down`."""
    k = sizes(weight)[-1]
    if down == 2 and k == 1:
        return F.conv2d(upfirdn(x, taps, down=2, pad=(1, 1)), weight, groups=groups)
    if down == 2:
        return F.conv2d(upfirdn(x, taps, pad=(2, 2)), weight, stride=2, groups=groups)
    if up == 2:  # the kernel as a true convolution, in and out channels swapped within every group
        out_channels, in_channels = sizes(weight)[:2]
        swapped = weight.reshape(groups, out_channels // groups, in_channels, k, k).transpose(1, 2)
        swapped = swapped.reshape(groups * in_channels, out_channels // groups, k, k)
        return upfirdn(F.conv_transpose2d(x, swapped, stride=2, groups=groups), taps, pad=(1, 1), gain=4)
    return F.conv2d(x, weight, padding=k // 2, groups=groups)


def activate(x: Tensor, bias: Tensor, gain: float = 1, *, linear: bool = False) -> Tensor:
    """Bias, leaky rectifier (unless linear) and gain, each a pass of its own."""
    x = x + bias.reshape([1, -1] + [1] * (x.ndim - 2))
    if not linear:
        x = F.leaky_relu(x, SLOPE)
        gain = gain * GAIN
    return x * gain if gain != 1 else x


def dense(layer: Any, x: Tensor) -> Tensor:
    """A fully connected layer of this project's networks."""
    weight, bias = layer.weight * layer.weight_gain, layer.bias * layer.bias_gain
    if layer.activation == "linear":
        return torch.addmm(bias.unsqueeze(0), x, weight.t())
    return activate(x.matmul(weight.t()), bias)


def modulated(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor | None, taps: Tensor | None, up: int, *,
    demodulate: bool, fused: bool,
) -> Tensor:  # fmt: skip
    """Modulated convolution; kernels per sample [N, O, I, k, k] are convolved with if fused, else only summed."""
    (n, _, height, width), (_, in_channels, k, _) = sizes(x), sizes(weight)
    scales = kernels = None
    is_cheap = torch.onnx.is_in_onnx_export() and not fused  # another runtime gets the best graph that we know
    if demodulate and is_cheap:
        scales = (styles.square() @ weight.square().sum(dim=[2, 3]).t() + 1e-8).rsqrt()
    elif demodulate or fused:
        kernels = weight.unsqueeze(0) * styles.reshape(n, 1, -1, 1, 1)  # [N, O, I, k, k]
    if demodulate and not is_cheap:
        scales = (kernels.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt()  # [N, O]
    if fused:
        if demodulate:
            kernels = kernels * scales.reshape(n, -1, 1, 1, 1)
        x = x.reshape(1, -1, height, width)
        x = resampled_conv(x, kernels.reshape(-1, in_channels, k, k), taps, up=up, groups=n)
        x = x.reshape(n, -1, height * up, width * up)
        return x if noise is None else x.add_(noise)
    x = resampled_conv(x * styles.reshape(n, -1, 1, 1), weight, taps, up=up)
    if demodulate:
        x = x * scales.reshape(n, -1, 1, 1) if noise is None else torch.addcmul(noise, x, scales.reshape(n, -1, 1, 1))
    return x


def synthesis_layer(layer: Any, x: Tensor, w: Tensor, noise_mode: str, fused: bool) -> Tensor:
    """Modulated convolution, noise, bias, activation."""
    if noise_mode == "random":
        noise = torch.randn([len(x), 1, layer.resolution, layer.resolution]) * layer.noise_strength
    else:
        noise = layer.noise_const * layer.noise_strength
    styles = dense(layer.affine, w)
    x = modulated(
        x, layer.weight, styles, noise, layer.resample_filter, layer.up, demodulate=True, fused=fused
    )  # fmt: skip
    return activate(x, layer.bias)


class ReferenceGenerator:
    """The reference path over a generator's parameters: `mapping` and `synthesis` as in the network itself.

    Args:
        G: The generator.
        is_fused: Convolve with per-sample kernels; None = in evaluation mode.
    """

    def __init__(self, G: Any, *, is_fused: bool | None = None) -> None:
        self.G = G
        self.is_fused = is_fused

    def __call__(self, z: Tensor, noise_mode: str = "random") -> Tensor:
        return self.synthesis(self.mapping(z), noise_mode)

    def mapping(self, z: Tensor, *, update_average: bool = False) -> Tensor:
        """Latents z [N, z_dim] to ws [N, num_ws, w_dim]."""
        net = self.G.mapping
        x = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        for index in range(net.num_layers):
            x = dense(getattr(net, f"fc{index}"), x)
        if update_average:
            net.w_avg.copy_(x.detach().mean(dim=0).lerp(net.w_avg, net.w_avg_beta))
        return x.unsqueeze(1).repeat([1, net.num_ws, 1])

    def synthesis(self, ws: Tensor, noise_mode: str = "random") -> Tensor:
        """ws [N, num_ws, w_dim] to images [N, C, R, R]."""
        net, fused = self.G.synthesis, not self.G.training if self.is_fused is None else self.is_fused
        img: Any = None
        x: Any = None
        latents = iter(range(ws.shape[1]))
        for resolution in net.block_resolutions:
            block = getattr(net, f"b{resolution}")
            if block.in_channels == 0:
                x = block.const.unsqueeze(0).repeat([sizes(ws)[0], 1, 1, 1])
            else:
                x = synthesis_layer(block.conv0, x, ws[:, next(latents)], noise_mode, fused)
            index = next(latents)
            x = synthesis_layer(block.conv1, x, ws[:, index], noise_mode, fused)
            styles = dense(block.torgb.affine, ws[:, index + 1]) * block.torgb.weight_gain
            y = modulated(x, block.torgb.weight, styles, None, None, 1, demodulate=False, fused=fused)
            y = activate(y, block.torgb.bias, linear=True)
            img = y if img is None else upfirdn(img, block.resample_filter, up=2, pad=(2, 1), gain=4) + y
        return img


def conv_layer(layer: Any, x: Tensor, gain: float = 1) -> Tensor:
    """A convolution layer of the discriminator."""
    x = resampled_conv(x, layer.weight * layer.weight_gain, layer.resample_filter, down=layer.down)
    if layer.bias is None:
        return x * gain
    return activate(x, layer.bias, gain)


class ReferenceDiscriminator:
    """The reference path over a discriminator's parameters."""

    def __init__(self, D: Any) -> None:
        self.D = D

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [N, 1] of images [N, C, R, R]."""
        for resolution in self.D.block_resolutions:
            block, gain = getattr(self.D, f"b{resolution}"), math.sqrt(0.5)
            if block.in_channels == 0:
                x = conv_layer(block.fromrgb, x)
            shortcut = conv_layer(block.skip, x, gain)
            x = shortcut.add_(conv_layer(block.conv1, conv_layer(block.conv0, x), gain))
        last = self.D.b4
        n, c, h, w = x.shape
        group = min(last.mbstd.group_size, n)
        y = x.reshape(group, -1, 1, c, h, w)
        y = ((y - y.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt().mean(dim=[2, 3, 4]).reshape(-1, 1, 1, 1)
        x = conv_layer(last.conv, torch.cat([x, y.repeat(group, 1, h, w)], dim=1))
        return dense(last.out, dense(last.fc, x.flatten(1)))


def augmented(pipe: Any, images: Tensor) -> Tensor:
    """Geometry and colour of an `AugmentPipe`, its 12-tap filters as depthwise convolutions of zero-filled images."""
    n, _, height, width = images.shape
    sampler = augment.ParameterSampler(n, images.device)
    linear, offset = pipe.sample_geometry(sampler, height, width)
    margins = augment.resampling_margins(linear, offset, height, width)
    left, top, right, bottom = [int(m) for m in margins.tolist()]
    taps = pipe.Hz_geom
    reach = len(taps) // 2
    images = F.pad(images, [left, right, top, bottom], mode="reflect")
    images = upfirdn(images, taps, up=2, pad=(reach, reach - 1), gain=4)
    size = torch.tensor([width, height], dtype=torch.float32)
    in_size, out_size = 2 * (size + margins[:2] + margins[2:]), 2 * (size + reach)
    offset = 2 * offset + (margins[:2] - margins[2:]) + linear.sum(dim=2) / 2 - 0.5
    theta = torch.cat([linear * (out_size / in_size[:, None]), (offset * 2 / in_size)[:, :, None]], dim=2)
    shape = [n, images.shape[1], 2 * (height + reach), 2 * (width + reach)]
    images = F.grid_sample(images, F.affine_grid(theta, shape, align_corners=False), align_corners=False)
    images = upfirdn(images, taps.flip(0), down=2, pad=(-1, -1))
    grey, chroma_re, chroma_im, shift = pipe.sample_color(sampler, images.shape[1])
    matrix = augment.color_matrix(grey, chroma_re, chroma_im)
    return (matrix @ images.flatten(2) + shift[:, :, None]).reshape(images.shape)


class ReferenceTrainer:
    """Logistic loss, R1 and path length of one micro-batch, then Adam, on the reference path.

    Args:
        G, D, G_ema: This project's networks; their parameters are trained.
        pipe: An `AugmentPipe` of geometry and colour, or None.
        lr, gamma: Learning rate and weight of R1.
        g_interval, d_interval: Lazy regularisation; they scale Adam's settings and the regularisers' losses.
    """

    def __init__(
        self, G: Any, D: Any, G_ema: Any, *, pipe: Any = None, lr: float = 0.0025, gamma: float = 10.0,
        g_interval: int = 4, d_interval: int = 16,
    ) -> None:  # fmt: skip
        self.nets = {"G": G, "D": D}
        self.G_ema = G_ema
        self.generator, self.discriminator = ReferenceGenerator(G), ReferenceDiscriminator(D)
        self.pipe, self.gamma = pipe, gamma
        self.interval = {"Gmain": 1, "Greg": g_interval, "Dmain": 1, "Dreg": d_interval}
        self.pl_mean = torch.zeros([])
        self.opt = {}
        for letter, interval in (("G", g_interval), ("D", d_interval)):
            ratio = interval / (interval + 1)
            self.opt[letter] = torch.optim.Adam(
                self.nets[letter].parameters(), lr=lr * ratio, betas=(0.0, 0.99**ratio), eps=1e-8, foreach=False
            )

    def phase(self, name: str, real: Tensor, z: Tensor) -> None:
        """Gradients of one phase and its optimiser's step."""
        net, opt = self.nets[name[0]], self.opt[name[0]]
        opt.zero_grad(set_to_none=True)
        net.requires_grad_(True)
        getattr(self, f"_{name.lower()}")(real, z, float(self.interval[name]))
        net.requires_grad_(False)
        for parameter in net.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        opt.step()

    @torch.no_grad()
    def update_average(self, beta: float) -> None:
        """Move G_ema towards G, tensor by tensor, and copy its buffers."""
        for average, parameter in zip(self.G_ema.parameters(), self.nets["G"].parameters()):
            average.copy_(parameter.lerp(average, beta))
        for copy, buffer in zip(self.G_ema.buffers(), self.nets["G"].buffers()):
            copy.copy_(buffer)

    def _fakes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        ws = self.generator.mapping(z, update_average=True)
        cutoff = torch.randint(1, ws.shape[1], [])
        cutoff = torch.where(torch.rand([]) < 0.9, cutoff, torch.full_like(cutoff, ws.shape[1]))
        ws[:, cutoff:] = self.generator.mapping(torch.randn_like(z))[:, cutoff:]
        return self.generator.synthesis(ws), ws

    def _logits(self, img: Tensor) -> Tensor:
        return self.discriminator(img if self.pipe is None else augmented(self.pipe, img))

    def _gmain(self, real: Tensor, z: Tensor, gain: float) -> None:
        F.softplus(-self._logits(self._fakes(z)[0])).mean().mul(gain).backward()

    def _greg(self, real: Tensor, z: Tensor, gain: float) -> None:
        img, ws = self._fakes(z[: max(len(z) // 2, 1)])
        noise = torch.randn_like(img) / math.sqrt(img.shape[2] * img.shape[3])
        (jacobian,) = torch.autograd.grad([(img * noise).sum()], [ws], create_graph=True)
        lengths = jacobian.square().sum(2).mean(1).sqrt()
        mean = self.pl_mean.lerp(lengths.mean(), 0.01)
        self.pl_mean = mean.detach()
        ((lengths - mean).square() * 2 + img[:, 0, 0, 0] * 0).mean().mul(gain).backward()

    def _dmain(self, real: Tensor, z: Tensor, gain: float) -> None:
        F.softplus(self._logits(self._fakes(z)[0].detach())).mean().mul(gain).backward()
        F.softplus(-self._logits(real)).mean().mul(gain).backward()

    def _dreg(self, real: Tensor, z: Tensor, gain: float) -> None:
        real = real.detach().requires_grad_(True)
        logits = self._logits(real)
        (gradient,) = torch.autograd.grad([logits.sum()], [real], create_graph=True)
        penalty = gradient.square().sum([1, 2, 3]) * (self.gamma / 2)
        (logits * 0 + penalty[:, None]).mean().mul(gain).backward()
