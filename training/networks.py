"""StyleGAN2 generator and discriminator, self-contained because snapshots carry this very text.

Whoever opens a snapshot of ours runs this file with *their* `torch_utils`: so it imports only names that every
repository of the family has, is written in Python 3.8 syntax, and keeps no NumPy scalar in the state of a module.
Attribute, parameter and buffer names are the file format and must not change.

Letters in shapes: N batch, I/O input/output channels, k kernel size, r resolution of a block, R image resolution.

Sources: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020 (arXiv:1912.04958);
Karras et al., "Training Generative Adversarial Networks with Limited Data", 2020 (arXiv:2006.06676).
"""

import math

import torch

from torch_utils import misc, persistence
from torch_utils.ops import bias_act, conv2d_resample, fma, upfirdn2d

ARCHITECTURES = ("orig", "skip", "resnet")
NOISE_MODES = ("random", "const", "none")
DEFAULT_FILTER = (1, 3, 3, 1)


def normalize_2nd_moment(x: torch.Tensor) -> torch.Tensor:
    """Scale every row of x [N, C] to a mean square of one."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    noise: "torch.Tensor | None" = None,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    resample_filter: "torch.Tensor | None" = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    fused_modconv: bool = True,
) -> torch.Tensor:
    """Convolve with a kernel whose input channels are scaled per sample, outputs brought back to unit variance.

    Args:
        x: Input [N, I, H, W].
        weight: Kernel [O, I, k, k], float32.
        styles: Scale of each input channel [N, I], float32.
        noise: Added to the demodulated output; broadcastable to it, or None.
        up: Integer upsampling factor.
        down: Integer downsampling factor.
        padding: Zero padding with respect to the upsampled image.
        resample_filter: Prepared filter for up- and downsampling, None = none.
        demodulate: Divide by the expected standard deviation of each output channel (Eq. 3, Karras et al. 2020).
        flip_weight: False rotates the kernel by 180 degrees (True = what torch's conv2d does).
        fused_modconv: One grouped convolution with per-sample kernels, instead of scaling activations before and after
            one ordinary convolution. Same result up to rounding.

    Returns:
        Output [N, O, H', W'] of the dtype of x.
    """
    batch_size = x.shape[0]
    out_channels, in_channels, kernel_h, kernel_w = weight.shape
    misc.assert_shape(x, [batch_size, in_channels, None, None])
    misc.assert_shape(styles, [batch_size, in_channels])

    # Demodulation undoes any scale, so bring both factors near 1 where float16 could overflow.
    if x.dtype == torch.float16 and demodulate:
        fan_in = in_channels * kernel_h * kernel_w
        weight = weight * (1 / math.sqrt(fan_in) / weight.abs().amax(dim=(1, 2, 3), keepdim=True))
        styles = styles / styles.abs().amax(dim=1, keepdim=True)

    # sum_{i,k} (W s)^2 = sum_i s_i^2 (sum_k W^2): a small matrix product instead of the tensor [N, O, I, k, k].
    scales = None  # [N, O]
    if demodulate:
        scales = (styles.square() @ weight.square().sum(dim=(2, 3)).t() + 1e-8).rsqrt()

    if fused_modconv:
        kernels = weight.unsqueeze(0) * styles.reshape(batch_size, 1, in_channels, 1, 1)  # [N, O, I, k, k]
        if scales is not None:
            kernels = kernels * scales.reshape(batch_size, out_channels, 1, 1, 1)
        y = conv2d_resample.conv2d_resample(
            x=x.reshape(1, batch_size * in_channels, *x.shape[2:]),
            w=kernels.reshape(batch_size * out_channels, in_channels, kernel_h, kernel_w).to(x.dtype),
            f=resample_filter,
            up=up,
            down=down,
            padding=padding,
            groups=batch_size,
            flip_weight=flip_weight,
        )
        y = y.reshape(batch_size, out_channels, *y.shape[2:])
        return y if noise is None else (y + noise).to(x.dtype)

    y = conv2d_resample.conv2d_resample(
        x=x * styles.to(x.dtype).reshape(batch_size, in_channels, 1, 1),
        w=weight.to(x.dtype),
        f=resample_filter,
        up=up,
        down=down,
        padding=padding,
        flip_weight=flip_weight,
    )
    if scales is not None:
        factor = scales.to(x.dtype).reshape(batch_size, out_channels, 1, 1)
        return y * factor if noise is None else fma.fma(y, factor, noise.to(x.dtype))
    return y if noise is None else y + noise.to(x.dtype)


@persistence.persistent_class
class FullyConnectedLayer(torch.nn.Module):
    """Linear layer with weights scaled at run time (equalised learning rate)."""

    bias: "torch.Tensor | None"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "linear",
        lr_multiplier: float = 1,
        bias_init: float = 0,
    ):
        """Create the layer.

        Args:
            in_features: Width of the input.
            out_features: Width of the output.
            bias: Whether to add a bias before the activation.
            activation: Name in `bias_act.activation_funcs`.
            lr_multiplier: Learning rate relative to other layers; stored weights are larger by its inverse.
            bias_init: Stored initial bias (the multiplier applies on top).
        """
        super().__init__()
        self.activation = activation
        self.weight = torch.nn.Parameter(torch.randn([out_features, in_features]) / lr_multiplier)
        self.bias = torch.nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, in_features] to [N, out_features]."""
        w = self.weight.to(x.dtype) * self.weight_gain
        b = self.bias
        if b is not None:
            b = b.to(x.dtype)
            if self.bias_gain != 1:
                b = b * self.bias_gain
            if self.activation == "linear":
                return torch.addmm(b.unsqueeze(0), x, w.t())
        return bias_act.bias_act(x.matmul(w.t()), b, act=self.activation)


@persistence.persistent_class
class Conv2dLayer(torch.nn.Module):
    """Convolution with optional resampling, bias, activation and clamp."""

    resample_filter: torch.Tensor
    weight: torch.Tensor
    bias: "torch.Tensor | None"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        up: int = 1,
        down: int = 1,
        resample_filter: "list | tuple | None" = DEFAULT_FILTER,
        conv_clamp: "float | None" = None,
        channels_last: bool = False,
        trainable: bool = True,
    ):
        """Create the layer.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            kernel_size: Side of the square kernel; padding keeps the size for odd ones.
            bias: Whether to add a bias before the activation.
            activation: Name in `bias_act.activation_funcs`.
            up: Integer upsampling factor.
            down: Integer downsampling factor.
            resample_filter: Taps of the low-pass filter for `up` and `down`.
            conv_clamp: Limit of the absolute output, None = none.
            channels_last: Store the weight in that memory format.
            trainable: False makes weight and bias buffers of the same names (Freeze-D).
        """
        super().__init__()
        self.activation = activation
        self.up = up
        self.down = down
        self.conv_clamp = conv_clamp
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = _activation_gain(activation)
        weight = _initial_kernel(out_channels, in_channels, kernel_size, channels_last)
        if trainable:
            self.weight = torch.nn.Parameter(weight)
            self.bias = torch.nn.Parameter(torch.zeros([out_channels])) if bias else None
        else:
            self.register_buffer("weight", weight)
            if bias:
                self.register_buffer("bias", torch.zeros([out_channels]))
            else:
                self.bias = None

    def forward(self, x: torch.Tensor, gain: float = 1) -> torch.Tensor:
        """Convolve x [N, I, H, W]; `gain` scales the output and the clamp alike."""
        x = conv2d_resample.conv2d_resample(
            x=x,
            w=(self.weight * self.weight_gain).to(x.dtype),
            f=self.resample_filter,
            up=self.up,
            down=self.down,
            padding=self.padding,
            flip_weight=(self.up == 1),
        )
        return bias_act.bias_act(
            x,
            None if self.bias is None else self.bias.to(x.dtype),
            act=self.activation,
            gain=self.act_gain * gain,
            clamp=None if self.conv_clamp is None else self.conv_clamp * gain,
        )


@persistence.persistent_class
class MappingNetwork(torch.nn.Module):
    """Latents and labels to intermediate latents w; keeps their moving average for truncation."""

    w_avg: torch.Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: "int | None",
        num_layers: int = 8,
        embed_features: "int | None" = None,
        layer_features: "int | None" = None,
        activation: str = "lrelu",
        lr_multiplier: float = 0.01,
        w_avg_beta: "float | None" = 0.995,
    ):
        """Create the network.

        Args:
            z_dim: Width of the latents, 0 = no latents.
            c_dim: Width of the labels, 0 = no labels.
            w_dim: Width of the output.
            num_ws: Copies of the output to return, None = [N, w_dim] without that axis.
            num_layers: Number of fully connected layers.
            embed_features: Width of the label embedding, None = w_dim.
            layer_features: Width of the hidden layers, None = w_dim.
            activation: Name in `bias_act.activation_funcs`.
            lr_multiplier: Learning rate of the layers relative to other networks.
            w_avg_beta: Decay of the moving average of w per forward pass in training, None = no average.
        """
        super().__init__()
        if z_dim == 0 and c_dim == 0:
            raise ValueError("mapping with z_dim=0 and c_dim=0 has no input; give it latents or labels")
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.num_ws = num_ws
        self.num_layers = num_layers
        self.w_avg_beta = w_avg_beta

        if c_dim == 0:
            embed_features = 0
        elif embed_features is None:
            embed_features = w_dim
        if layer_features is None:
            layer_features = w_dim
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        widths = [z_dim + embed_features] + [layer_features] * (num_layers - 1) + [w_dim]
        for idx in range(num_layers):
            layer = FullyConnectedLayer(
                widths[idx], widths[idx + 1], activation=activation, lr_multiplier=lr_multiplier
            )
            setattr(self, "fc%d" % idx, layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))

    def forward(
        self,
        z: "torch.Tensor | None",
        c: "torch.Tensor | None",
        truncation_psi: float = 1,
        truncation_cutoff: "int | None" = None,
        skip_w_avg_update: bool = False,
    ) -> torch.Tensor:
        """Compute intermediate latents.

        Args:
            z: Latents [N, z_dim]; ignored if z_dim is 0.
            c: Labels [N, c_dim]; ignored if c_dim is 0.
            truncation_psi: Pull towards the average: 1 = none, 0 = the average itself.
            truncation_cutoff: Number of leading layers to truncate, None = all.
            skip_w_avg_update: Leave the moving average alone in training mode.

        Returns:
            float32 [N, num_ws, w_dim], or [N, w_dim] if num_ws is None.

        Raises:
            ValueError: Missing latents or labels; truncation asked of a network without an average.
        """
        parts = []
        if self.z_dim > 0:
            if z is None:
                raise ValueError("this network needs latents z [N, %d]; got None" % self.z_dim)
            misc.assert_shape(z, [None, self.z_dim])
            parts.append(normalize_2nd_moment(z.to(torch.float32)))
        if self.c_dim > 0:
            if c is None:
                raise ValueError("this network is conditional and needs labels c [N, %d]; got None" % self.c_dim)
            misc.assert_shape(c, [None, self.c_dim])
            parts.append(normalize_2nd_moment(self.embed(c.to(torch.float32))))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        for idx in range(self.num_layers):
            x = getattr(self, "fc%d" % idx)(x)

        if self.training and self.w_avg_beta is not None and self.num_ws is not None and not skip_w_avg_update:
            self.w_avg.copy_(x.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))

        if self.num_ws is not None:
            x = x.unsqueeze(1).repeat([1, self.num_ws, 1])
        if truncation_psi != 1:
            if self.num_ws is None or self.w_avg_beta is None:
                raise ValueError(
                    "truncation_psi=%s needs an average of w, which this mapping network does not keep; use 1"
                    % (truncation_psi,)
                )
            cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
            head = self.w_avg.lerp(x[:, :cutoff], truncation_psi)
            x = torch.cat([head, x[:, cutoff:]], dim=1)
        return x


@persistence.persistent_class
class SynthesisLayer(torch.nn.Module):
    """Modulated convolution with noise, bias, activation and clamp."""

    resample_filter: torch.Tensor
    noise_const: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        kernel_size: int = 3,
        up: int = 1,
        use_noise: bool = True,
        activation: str = "lrelu",
        resample_filter: "list | tuple | None" = DEFAULT_FILTER,
        conv_clamp: "float | None" = None,
        channels_last: bool = False,
    ):
        """Create the layer.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            w_dim: Width of the intermediate latent.
            resolution: Side of the output.
            kernel_size: Side of the square kernel.
            up: Integer upsampling factor.
            use_noise: Whether there is a noise input.
            activation: Name in `bias_act.activation_funcs`.
            resample_filter: Taps of the low-pass filter for `up`.
            conv_clamp: Limit of the absolute output, None = none.
            channels_last: Store the weight in that memory format.
        """
        super().__init__()
        self.resolution = resolution
        self.up = up
        self.use_noise = use_noise
        self.activation = activation
        self.conv_clamp = conv_clamp
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.padding = kernel_size // 2
        self.act_gain = _activation_gain(activation)

        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(_initial_kernel(out_channels, in_channels, kernel_size, channels_last))
        if use_noise:
            self.register_buffer("noise_const", torch.randn([resolution, resolution]))
            self.noise_strength = torch.nn.Parameter(torch.zeros([]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def forward(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        noise_mode: str = "random",
        fused_modconv: bool = True,
        gain: float = 1,
    ) -> torch.Tensor:
        """Compute the layer.

        Args:
            x: Input [N, I, r/up, r/up].
            w: Intermediate latents [N, w_dim].
            noise_mode: 'random' (fresh per sample, global generator), 'const' (stored map for all) or 'none'.
            fused_modconv: See `modulated_conv2d`.
            gain: Scales the output and the clamp alike.

        Raises:
            ValueError: Unknown noise mode.
        """
        _require_choice("noise_mode", noise_mode, NOISE_MODES)
        in_resolution = self.resolution // self.up
        misc.assert_shape(x, [None, self.weight.shape[1], in_resolution, in_resolution])

        noise = None
        if self.use_noise and noise_mode == "random":
            shape = [x.shape[0], 1, self.resolution, self.resolution]
            noise = torch.randn(shape, device=x.device) * self.noise_strength
        elif self.use_noise and noise_mode == "const":
            noise = self.noise_const * self.noise_strength

        x = modulated_conv2d(
            x=x,
            weight=self.weight,
            styles=self.affine(w),
            noise=noise,
            up=self.up,
            padding=self.padding,
            resample_filter=self.resample_filter,
            flip_weight=(self.up == 1),
            fused_modconv=fused_modconv,
        )
        return bias_act.bias_act(
            x,
            self.bias.to(x.dtype),
            act=self.activation,
            gain=self.act_gain * gain,
            clamp=None if self.conv_clamp is None else self.conv_clamp * gain,
        )


@persistence.persistent_class
class ToRGBLayer(torch.nn.Module):
    """Features to image channels: modulated, neither demodulated nor activated."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        kernel_size: int = 1,
        conv_clamp: "float | None" = None,
        channels_last: bool = False,
    ):
        """Create the layer.

        Args:
            in_channels: Channels of the features.
            out_channels: Channels of the image.
            w_dim: Width of the intermediate latent.
            kernel_size: Side of the square kernel.
            conv_clamp: Limit of the absolute output, None = none.
            channels_last: Store the weight in that memory format.
        """
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(_initial_kernel(out_channels, in_channels, kernel_size, channels_last))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x: torch.Tensor, w: torch.Tensor, fused_modconv: bool = True) -> torch.Tensor:
        """Map features x [N, I, r, r] with latents w [N, w_dim] to an image [N, img_channels, r, r]."""
        styles = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x=x, weight=self.weight, styles=styles, demodulate=False, fused_modconv=fused_modconv)
        return bias_act.bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)


@persistence.persistent_class
class SynthesisBlock(torch.nn.Module):
    """All layers of the generator at one resolution."""

    resample_filter: torch.Tensor

    # Kept by the instance only where it was given: None = not in training and (float32 or a single image);
    # True or False = always that; 'inference_only' = not in training.
    fused_modconv_default = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        is_last: bool,
        architecture: str = "skip",
        resample_filter: "list | tuple | None" = DEFAULT_FILTER,
        conv_clamp: "float | None" = None,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        fused_modconv_default: "bool | str | None" = None,
        **layer_kwargs
    ):
        """Create the block.

        Args:
            in_channels: Channels of the input, 0 = first block, which starts from a learned constant.
            out_channels: Channels of the features.
            w_dim: Width of the intermediate latent.
            resolution: Side of the output.
            img_channels: Channels of the image.
            is_last: Whether this block makes the final image.
            architecture: 'orig', 'skip' or 'resnet' (Figure 7, Karras et al. 2020).
            resample_filter: Taps of the low-pass filter for upsampling features and image.
            conv_clamp: Limit of absolute layer outputs, None = none.
            use_fp16: Run the block in float16.
            fp16_channels_last: With float16, use the channels-last memory format.
            fused_modconv_default: What `forward` does unless told: see the class attribute.
            **layer_kwargs: For `SynthesisLayer`.

        Raises:
            ValueError: Unknown architecture.
        """
        super().__init__()
        _require_choice("architecture", architecture, ARCHITECTURES)
        self.in_channels = in_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.img_channels = img_channels
        self.is_last = is_last
        self.architecture = architecture
        self.use_fp16 = use_fp16
        self.channels_last = bool(use_fp16 and fp16_channels_last)
        if fused_modconv_default is not None:
            self.fused_modconv_default = fused_modconv_default
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.num_conv = 0
        self.num_torgb = 0

        shared: dict = {"conv_clamp": conv_clamp, "channels_last": self.channels_last}
        if in_channels == 0:
            self.const = torch.nn.Parameter(torch.randn([out_channels, resolution, resolution]))
        else:
            self.conv0 = SynthesisLayer(
                in_channels,
                out_channels,
                w_dim=w_dim,
                resolution=resolution,
                up=2,
                resample_filter=resample_filter,
                **shared,
                **layer_kwargs
            )
            self.num_conv += 1
        self.conv1 = SynthesisLayer(
            out_channels, out_channels, w_dim=w_dim, resolution=resolution, **shared, **layer_kwargs
        )
        self.num_conv += 1
        if is_last or architecture == "skip":
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim=w_dim, **shared)
            self.num_torgb += 1
        if in_channels != 0 and architecture == "resnet":
            self.skip = Conv2dLayer(
                in_channels,
                out_channels,
                kernel_size=1,
                bias=False,
                up=2,
                resample_filter=resample_filter,
                channels_last=self.channels_last,
            )

    def forward(
        self,
        x: "torch.Tensor | None",
        img: "torch.Tensor | None",
        ws: torch.Tensor,
        force_fp32: bool = False,
        fused_modconv: "bool | None" = None,
        **layer_kwargs
    ) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Compute the block.

        Args:
            x: Features [N, in_channels, r/2, r/2]; ignored by the first block.
            img: Image so far [N, img_channels, r/2, r/2] or None.
            ws: Latents of this block's layers [N, num_conv + num_torgb, w_dim].
            force_fp32: Run in float32 whatever the constructor said.
            fused_modconv: See `modulated_conv2d`; None = the block's default.
            **layer_kwargs: For the forward pass of `SynthesisLayer`.

        Returns:
            Features [N, out_channels, r, r] and float32 image [N, img_channels, r, r] (None before the first one).
        """
        misc.assert_shape(ws, [None, self.num_conv + self.num_torgb, self.w_dim])
        latents = list(ws.unbind(dim=1))
        dtype, memory_format = _block_format(self, force_fp32)
        if fused_modconv is None:
            fused_modconv = self._fuses(dtype, ws.shape[0])
        layer_kwargs = dict(layer_kwargs, fused_modconv=fused_modconv)

        if self.in_channels == 0:
            x = self.const.to(dtype=dtype).unsqueeze(0).repeat([ws.shape[0], 1, 1, 1])
            x = x.to(memory_format=memory_format)
            x = self.conv1(x, latents[0], **layer_kwargs)
        else:
            assert x is not None
            half = self.resolution // 2
            misc.assert_shape(x, [None, self.in_channels, half, half])
            x = x.to(dtype=dtype, memory_format=memory_format)
            if self.architecture == "resnet":
                gain = math.sqrt(0.5)
                shortcut = self.skip(x, gain=gain)
                x = self.conv0(x, latents[0], **layer_kwargs)
                x = shortcut + self.conv1(x, latents[1], gain=gain, **layer_kwargs)
            else:
                x = self.conv0(x, latents[0], **layer_kwargs)
                x = self.conv1(x, latents[1], **layer_kwargs)

        if img is not None:
            img = upfirdn2d.upsample2d(img, self.resample_filter)
        if self.num_torgb > 0:
            rgb = self.torgb(x, latents[-1], fused_modconv=fused_modconv)
            rgb = rgb.to(dtype=torch.float32, memory_format=torch.contiguous_format)
            img = rgb if img is None else img + rgb
        return x, img

    def _fuses(self, dtype: torch.dtype, batch_size: int) -> bool:
        if self.fused_modconv_default is None:
            return not self.training and (dtype == torch.float32 or batch_size == 1)
        if self.fused_modconv_default == "inference_only":
            return not self.training
        return bool(self.fused_modconv_default)


@persistence.persistent_class
class SynthesisNetwork(torch.nn.Module):
    """Intermediate latents to image."""

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        **block_kwargs
    ):
        """Create the blocks b4 ... bR.

        Args:
            w_dim: Width of the intermediate latents.
            img_resolution: Side of the image, a power of two >= 4.
            img_channels: Channels of the image.
            channel_base: Channels of a block times its resolution, before the limit.
            channel_max: Upper limit of the channels.
            num_fp16_res: Run that many of the highest resolutions in float16 (never below 8).
            **block_kwargs: For `SynthesisBlock`.

        Raises:
            ValueError: Resolution that is no power of two or too small.
        """
        super().__init__()
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_resolution_log2 = _resolution_log2(img_resolution, 4)
        self.img_channels = img_channels
        self.block_resolutions = [2**i for i in range(2, self.img_resolution_log2 + 1)]
        self.num_ws = 2 * self.img_resolution_log2 - 2
        for res in self.block_resolutions:
            block = SynthesisBlock(
                0 if res == 4 else _num_channels(res // 2, channel_base, channel_max),
                _num_channels(res, channel_base, channel_max),
                w_dim=w_dim,
                resolution=res,
                img_channels=img_channels,
                is_last=(res == img_resolution),
                use_fp16=_runs_fp16(res, self.img_resolution_log2, num_fp16_res),
                **block_kwargs
            )
            setattr(self, "b%d" % res, block)

    def forward(self, ws: torch.Tensor, **block_kwargs) -> torch.Tensor:
        """Render latents ws [N, num_ws, w_dim] to images, float32 [N, img_channels, R, R] of about [-1, 1].

        The keyword arguments go to the blocks and on to their layers: `noise_mode`, `force_fp32`, `fused_modconv`.
        """
        misc.assert_shape(ws, [None, self.num_ws, self.w_dim])
        ws = ws.to(torch.float32)
        x = img = None
        start = 0  # index of the block's first latent
        for res in self.block_resolutions:
            block = getattr(self, "b%d" % res)
            # The torgb of a block and the first convolution of the next one share a latent.
            x, img = block(x, img, ws.narrow(1, start, block.num_conv + block.num_torgb), **block_kwargs)
            start += block.num_conv
        assert img is not None
        return img


@persistence.persistent_class
class Generator(torch.nn.Module):
    """Mapping network followed by synthesis network."""

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        mapping_kwargs: "dict | None" = None,
        synthesis_kwargs: "dict | None" = None,
    ):
        """Create both networks.

        Args:
            z_dim: Width of the latents.
            c_dim: Width of the labels, 0 = unconditional.
            w_dim: Width of the intermediate latents.
            img_resolution: Side of the image, a power of two >= 4.
            img_channels: Channels of the image.
            mapping_kwargs: For `MappingNetwork`.
            synthesis_kwargs: For `SynthesisNetwork`.
        """
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.synthesis = SynthesisNetwork(
            w_dim=w_dim, img_resolution=img_resolution, img_channels=img_channels, **(synthesis_kwargs or {})
        )
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(
            z_dim=z_dim, c_dim=c_dim, w_dim=w_dim, num_ws=self.num_ws, **(mapping_kwargs or {})
        )

    def forward(
        self,
        z: torch.Tensor,
        c: "torch.Tensor | None",
        truncation_psi: float = 1,
        truncation_cutoff: "int | None" = None,
        **synthesis_kwargs
    ) -> torch.Tensor:
        """Make images, float32 [N, img_channels, R, R] of about [-1, 1], from z [N, z_dim] and c [N, c_dim].

        For truncation see `MappingNetwork.forward`, for the rest `SynthesisNetwork.forward`.
        """
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        return self.synthesis(ws, **synthesis_kwargs)


@persistence.persistent_class
class DiscriminatorBlock(torch.nn.Module):
    """All layers of the discriminator at one resolution, ending at half of it."""

    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        tmp_channels: int,
        out_channels: int,
        resolution: int,
        img_channels: int,
        first_layer_idx: int,
        architecture: str = "resnet",
        activation: str = "lrelu",
        resample_filter: "list | tuple | None" = DEFAULT_FILTER,
        conv_clamp: "float | None" = None,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        freeze_layers: int = 0,
    ):
        """Create the block.

        Args:
            in_channels: Channels of the input, 0 = first block, which sees only the image.
            tmp_channels: Channels within the block.
            out_channels: Channels of the output.
            resolution: Side of the input.
            img_channels: Channels of the image.
            first_layer_idx: Number of layers in the blocks before this one.
            architecture: 'orig', 'skip' or 'resnet' (Figure 7, Karras et al. 2020).
            activation: Name in `bias_act.activation_funcs`.
            resample_filter: Taps of the low-pass filter for downsampling features and image.
            conv_clamp: Limit of absolute layer outputs, None = none.
            use_fp16: Run the block in float16.
            fp16_channels_last: With float16, use the channels-last memory format.
            freeze_layers: Layers of the whole discriminator, counted from the image, that are not trained.

        Raises:
            ValueError: Unknown architecture.
        """
        super().__init__()
        _require_choice("architecture", architecture, ARCHITECTURES)
        self.in_channels = in_channels
        self.resolution = resolution
        self.img_channels = img_channels
        self.first_layer_idx = first_layer_idx
        self.architecture = architecture
        self.use_fp16 = use_fp16
        self.channels_last = bool(use_fp16 and fp16_channels_last)
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.num_layers = 0

        def layer(in_ch, out_ch, kernel_size, **kwargs):
            trainable = first_layer_idx + self.num_layers >= freeze_layers
            self.num_layers += 1
            return Conv2dLayer(
                in_ch, out_ch, kernel_size, trainable=trainable, channels_last=self.channels_last, **kwargs
            )

        shared: dict = {"activation": activation, "conv_clamp": conv_clamp}
        if in_channels == 0 or architecture == "skip":
            self.fromrgb = layer(img_channels, tmp_channels, 1, **shared)
        self.conv0 = layer(tmp_channels, tmp_channels, 3, **shared)
        self.conv1 = layer(tmp_channels, out_channels, 3, down=2, resample_filter=resample_filter, **shared)
        if architecture == "resnet":
            self.skip = layer(tmp_channels, out_channels, 1, bias=False, down=2, resample_filter=resample_filter)

    def forward(
        self, x: "torch.Tensor | None", img: "torch.Tensor | None", force_fp32: bool = False
    ) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Compute the block.

        Args:
            x: Features [N, in_channels, r, r]; None for the first block.
            img: Image [N, img_channels, r, r] where the block looks at one, else None.
            force_fp32: Run in float32 whatever the constructor said.

        Returns:
            Features [N, out_channels, r/2, r/2], and the image for the next block ('skip') or None.
        """
        dtype, memory_format = _block_format(self, force_fp32)
        if x is not None:
            misc.assert_shape(x, [None, self.in_channels, self.resolution, self.resolution])
            x = x.to(dtype=dtype, memory_format=memory_format)

        if self.in_channels == 0 or self.architecture == "skip":
            assert img is not None
            misc.assert_shape(img, [None, self.img_channels, self.resolution, self.resolution])
            img = img.to(dtype=dtype, memory_format=memory_format)
            y = self.fromrgb(img)
            x = y if x is None else x + y
            img = upfirdn2d.downsample2d(img, self.resample_filter) if self.architecture == "skip" else None

        if self.architecture == "resnet":
            gain = math.sqrt(0.5)
            shortcut = self.skip(x, gain=gain)
            x = shortcut + self.conv1(self.conv0(x), gain=gain)
        else:
            x = self.conv1(self.conv0(x))
        return x, img


@persistence.persistent_class
class MinibatchStdLayer(torch.nn.Module):
    """Appends the standard deviation over small groups of the batch as extra channels."""

    def __init__(self, group_size: "int | None", num_channels: int = 1):
        """Create the layer.

        Args:
            group_size: Images per group, at most; None = the whole batch.
            num_channels: Number of channels to append.
        """
        super().__init__()
        self.group_size = group_size
        self.num_channels = num_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Append to x [N, C, H, W]: [N, C + num_channels, H, W].

        Sample n belongs to group n mod (number of groups).

        Raises:
            ValueError: The group size does not divide the batch, or num_channels the channels.
        """
        num, channels, height, width = x.shape
        group = num if self.group_size is None else min(self.group_size, num)
        if num % group != 0:
            raise ValueError(
                "minibatch of %d is not a multiple of the minibatch-std group size %d; change one of them"
                % (num, group)
            )
        if channels % self.num_channels != 0:
            raise ValueError(
                "%d channels cannot be split into the %d of minibatch-std; choose a divisor"
                % (channels, self.num_channels)
            )
        parts = self.num_channels
        y = x.reshape(group, num // group, parts, channels // parts, height, width)
        y = y - y.mean(dim=0)
        y = (y.square().mean(dim=0) + 1e-8).sqrt()  # [N/G, F, C/F, H, W]
        y = y.mean(dim=(2, 3, 4)).reshape(num // group, parts, 1, 1)
        return torch.cat([x, y.repeat(group, 1, height, width)], dim=1)


@persistence.persistent_class
class DiscriminatorEpilogue(torch.nn.Module):
    """The discriminator's last block, 4x4 features to logits; always in float32."""

    def __init__(
        self,
        in_channels: int,
        cmap_dim: int,
        resolution: int,
        img_channels: int,
        architecture: str = "resnet",
        mbstd_group_size: "int | None" = 4,
        mbstd_num_channels: int = 1,
        activation: str = "lrelu",
        conv_clamp: "float | None" = None,
    ):
        """Create the block.

        Args:
            in_channels: Channels of the input.
            cmap_dim: Width of the mapped label, 0 = unconditional.
            resolution: Side of the input.
            img_channels: Channels of the image.
            architecture: 'orig', 'skip' or 'resnet' (Figure 7, Karras et al. 2020).
            mbstd_group_size: Images per group for the standard deviation, None = the whole batch.
            mbstd_num_channels: Channels of standard deviation, 0 = none.
            activation: Name in `bias_act.activation_funcs`.
            conv_clamp: Limit of the absolute output of the convolution, None = none.

        Raises:
            ValueError: Unknown architecture.
        """
        super().__init__()
        _require_choice("architecture", architecture, ARCHITECTURES)
        self.in_channels = in_channels
        self.cmap_dim = cmap_dim
        self.resolution = resolution
        self.img_channels = img_channels
        self.architecture = architecture
        if architecture == "skip":
            self.fromrgb = Conv2dLayer(img_channels, in_channels, kernel_size=1, activation=activation)
        self.mbstd = None
        if mbstd_num_channels > 0:
            self.mbstd = MinibatchStdLayer(group_size=mbstd_group_size, num_channels=mbstd_num_channels)
        self.conv = Conv2dLayer(
            in_channels + mbstd_num_channels, in_channels, kernel_size=3, activation=activation, conv_clamp=conv_clamp
        )
        self.fc = FullyConnectedLayer(in_channels * resolution**2, in_channels, activation=activation)
        self.out = FullyConnectedLayer(in_channels, 1 if cmap_dim == 0 else cmap_dim)

    def forward(
        self,
        x: torch.Tensor,
        img: "torch.Tensor | None",
        cmap: "torch.Tensor | None",
        force_fp32: bool = False,
    ) -> torch.Tensor:
        """Compute logits [N, 1].

        Args:
            x: Features [N, in_channels, r, r].
            img: Image [N, img_channels, r, r], used by 'skip' only.
            cmap: Mapped label [N, cmap_dim], used if cmap_dim > 0.
            force_fp32: Without effect; the block always runs in float32.
        """
        misc.assert_shape(x, [None, self.in_channels, self.resolution, self.resolution])
        x = x.to(dtype=torch.float32, memory_format=torch.contiguous_format)
        if self.architecture == "skip":
            assert img is not None
            misc.assert_shape(img, [None, self.img_channels, self.resolution, self.resolution])
            x = x + self.fromrgb(img.to(dtype=torch.float32, memory_format=torch.contiguous_format))
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.conv(x)
        x = self.out(self.fc(x.flatten(1)))
        if self.cmap_dim > 0:
            # Projection discriminator (Miyato & Koyama, 2018).
            assert cmap is not None
            misc.assert_shape(cmap, [None, self.cmap_dim])
            x = (x * cmap).sum(dim=1, keepdim=True) * (1 / math.sqrt(self.cmap_dim))
        return x


@persistence.persistent_class
class Discriminator(torch.nn.Module):
    """Images, and labels if conditional, to logits."""

    def __init__(
        self,
        c_dim: int,
        img_resolution: int,
        img_channels: int,
        architecture: str = "resnet",
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        conv_clamp: "float | None" = None,
        cmap_dim: "int | None" = None,
        block_kwargs: "dict | None" = None,
        mapping_kwargs: "dict | None" = None,
        epilogue_kwargs: "dict | None" = None,
    ):
        """Create the blocks bR ... b8, the label mapping if c_dim > 0, and b4.

        Args:
            c_dim: Width of the labels, 0 = unconditional.
            img_resolution: Side of the image, a power of two >= 8.
            img_channels: Channels of the image.
            architecture: 'orig', 'skip' or 'resnet' (Figure 7, Karras et al. 2020).
            channel_base: Channels of a block times its resolution, before the limit.
            channel_max: Upper limit of the channels.
            num_fp16_res: Run that many of the highest resolutions in float16 (never below 8).
            conv_clamp: Limit of absolute layer outputs, None = none.
            cmap_dim: Width of the mapped label, None = channels at resolution 4.
            block_kwargs: For `DiscriminatorBlock`.
            mapping_kwargs: For `MappingNetwork`.
            epilogue_kwargs: For `DiscriminatorEpilogue`.

        Raises:
            ValueError: Resolution that is no power of two or too small, unknown architecture.
        """
        super().__init__()
        self.c_dim = c_dim
        self.img_resolution = img_resolution
        self.img_resolution_log2 = _resolution_log2(img_resolution, 8)
        self.img_channels = img_channels
        self.block_resolutions = [2**i for i in range(self.img_resolution_log2, 2, -1)]
        if c_dim == 0:
            cmap_dim = 0
        elif cmap_dim is None:
            cmap_dim = _num_channels(4, channel_base, channel_max)

        shared: dict = {"img_channels": img_channels, "architecture": architecture, "conv_clamp": conv_clamp}
        layer_idx = 0
        for res in self.block_resolutions:
            channels = _num_channels(res, channel_base, channel_max)
            block = DiscriminatorBlock(
                0 if res == img_resolution else channels,
                channels,
                _num_channels(res // 2, channel_base, channel_max),
                resolution=res,
                first_layer_idx=layer_idx,
                use_fp16=_runs_fp16(res, self.img_resolution_log2, num_fp16_res),
                **shared,
                **(block_kwargs or {})
            )
            setattr(self, "b%d" % res, block)
            layer_idx += block.num_layers
        if c_dim > 0:
            self.mapping = MappingNetwork(
                z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, w_avg_beta=None, **(mapping_kwargs or {})
            )
        self.b4 = DiscriminatorEpilogue(
            _num_channels(4, channel_base, channel_max),
            cmap_dim=cmap_dim,
            resolution=4,
            **shared,
            **(epilogue_kwargs or {})
        )

    def forward(self, img: torch.Tensor, c: "torch.Tensor | None", **block_kwargs) -> torch.Tensor:
        """Score images.

        Args:
            img: Images [N, img_channels, R, R] of about [-1, 1].
            c: Labels [N, c_dim]; ignored if c_dim is 0.
            **block_kwargs: For the forward pass of `DiscriminatorBlock`: `force_fp32`.

        Returns:
            float32 logits [N, 1], larger = more real.
        """
        x = None
        for res in self.block_resolutions:
            x, img = getattr(self, "b%d" % res)(x, img, **block_kwargs)
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        return self.b4(x, img, cmap)


def _activation_gain(activation: str) -> float:
    return float(bias_act.activation_funcs[activation].def_gain)


def _initial_kernel(out_channels: int, in_channels: int, kernel_size: int, channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn([out_channels, in_channels, kernel_size, kernel_size]).to(memory_format=memory_format)


def _block_format(block: torch.nn.Module, force_fp32: bool) -> "tuple[torch.dtype, torch.memory_format]":
    """What a block computes in: dtype and memory format of its activations."""
    dtype = torch.float16 if block.use_fp16 and not force_fp32 else torch.float32
    if block.channels_last and not force_fp32:
        return dtype, torch.channels_last
    # On a CPU the convolutions choose the layout; converting it back between blocks would only cost time.
    on_cpu = block.resample_filter.device.type == "cpu"
    return dtype, torch.preserve_format if on_cpu else torch.contiguous_format


def _num_channels(resolution: int, channel_base: int, channel_max: int) -> int:
    return min(int(channel_base // resolution), channel_max)


def _runs_fp16(resolution: int, img_resolution_log2: int, num_fp16_res: int) -> bool:
    return resolution >= max(2 ** (img_resolution_log2 + 1 - num_fp16_res), 8)


def _resolution_log2(img_resolution: int, smallest: int) -> int:
    log2 = int(img_resolution).bit_length() - 1
    if img_resolution < smallest or img_resolution != 2**log2:
        raise ValueError("img_resolution is %s; it must be a power of two >= %d" % (img_resolution, smallest))
    return log2


def _require_choice(name: str, value: str, choices: tuple) -> None:
    if value not in choices:
        raise ValueError("%s is %r; choose one of %s" % (name, value, ", ".join(choices)))
