"""The augmentation pipe of adaptive discriminator augmentation. Owns the transforms; knows nothing of data or loop.

Every image passes, in this order, through pixel blitting and general geometry (one affine map, resampled once), colour,
frequency-band filtering, additive noise and cutout. Each transform has a probability multiplier (0 = absent); the
buffer `p` scales all of them.

Source: Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (section 2, appendix B).
"""

import math

import numpy as np
import torch

from torch_utils import misc, persistence
from torch_utils.ops import conv2d_gradfix, grid_sample_gradfix, upfirdn2d

# Low-pass taps of the orthogonal 12-tap wavelet 'sym6' (Daubechies, "Ten Lectures on Wavelets", table 6.3).
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)

# Half the autocorrelation of 'sym2' and of its alternating-sign twin: complementary zero-phase filters, LOW + HIGH = 1.
SYM2_LOW = (-1 / 32, 0, 9 / 32, 16 / 32, 9 / 32, 0, -1 / 32)
SYM2_HIGH = (1 / 32, 0, -9 / 32, 16 / 32, -9 / 32, 0, 1 / 32)

# Share of each frequency band, lowest first, in the power spectrum of a natural image (Karras et al. 2020, appendix B).
BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)


def _merge(*parts: dict) -> dict:
    merged = {}
    for part in parts:
        merged.update(part)
    return merged


def _presets() -> dict:
    blit = dict(xflip=1, rotate90=1, xint=1)
    geom = dict(scale=1, rotate=1, aniso=1, xfrac=1)
    color = dict(brightness=1, contrast=1, lumaflip=1, hue=1, saturation=1)
    band_filter = dict(imgfilter=1)
    noise = dict(noise=1)
    cutout = dict(cutout=1)
    return dict(
        blit=blit,
        geom=geom,
        color=color,
        filter=band_filter,
        noise=noise,
        cutout=cutout,
        bg=_merge(blit, geom),
        bgc=_merge(blit, geom, color),
        bgcf=_merge(blit, geom, color, band_filter),
        bgcfn=_merge(blit, geom, color, band_filter, noise),
        bgcfnc=_merge(blit, geom, color, band_filter, noise, cutout),
    )


# Name of a preset -> probability multipliers to hand to AugmentPipe.
AUGMENT_PRESETS = _presets()


@persistence.persistent_class
class AugmentPipe(torch.nn.Module):
    """Augment a batch of images, differentiably, every sample with its own random parameters.

    The pipe is twice differentiable in the images. Random numbers come from torch's global generator of the images'
    device; how many are drawn depends on the batch's shape and on which transforms are enabled, never on `p`.

    Args:
        xflip, rotate90, xint: probability multipliers (0 = absent) of mirroring, quarter turns, whole-pixel shifts.
        xint_max: largest whole-pixel shift, as a fraction of the image's size.
        scale, rotate, aniso, xfrac: multipliers of scaling, rotation, anisotropic scaling, fractional shifts.
        scale_std, aniso_std: standard deviations of log2 of the scale.
        rotate_max: largest angle as a fraction of half a turn.
        xfrac_std: standard deviation of the shift, as a fraction of the image's size.
        brightness, contrast, lumaflip, hue, saturation: multipliers of the colour transforms.
        brightness_std: standard deviation of the added value. contrast_std, saturation_std: of log2 of the factor.
        hue_max: largest hue angle as a fraction of half a turn.
        imgfilter: multiplier of frequency-band amplification.
        imgfilter_bands: strength per band, multiplies `imgfilter`; four numbers, lowest band first.
        imgfilter_std: standard deviation of log2 of the amplification.
        noise, cutout: multipliers of additive noise and of blanking out a rectangle.
        noise_std: standard deviation of the noise's standard deviation.
        cutout_size: side of the rectangle, as a fraction of the image's.

    Raises:
        ValueError: a negative or non-finite number, or not four band strengths.
    """

    p: torch.Tensor
    Hz_geom: torch.Tensor
    Hz_fbank: torch.Tensor

    def __init__(
        self,
        xflip: float = 0,
        rotate90: float = 0,
        xint: float = 0,
        xint_max: float = 0.125,
        scale: float = 0,
        rotate: float = 0,
        aniso: float = 0,
        xfrac: float = 0,
        scale_std: float = 0.2,
        rotate_max: float = 1,
        aniso_std: float = 0.2,
        xfrac_std: float = 0.125,
        brightness: float = 0,
        contrast: float = 0,
        lumaflip: float = 0,
        hue: float = 0,
        saturation: float = 0,
        brightness_std: float = 0.2,
        contrast_std: float = 0.5,
        hue_max: float = 1,
        saturation_std: float = 1,
        imgfilter: float = 0,
        imgfilter_bands=(1, 1, 1, 1),
        imgfilter_std: float = 1,
        noise: float = 0,
        cutout: float = 0,
        noise_std: float = 0.1,
        cutout_size: float = 0.5,
    ):
        super().__init__()
        self.register_buffer("p", torch.ones([]))  # overall probability; the training loop moves it

        self.xflip = _magnitude("xflip", xflip)
        self.rotate90 = _magnitude("rotate90", rotate90)
        self.xint = _magnitude("xint", xint)
        self.xint_max = _magnitude("xint_max", xint_max)

        self.scale = _magnitude("scale", scale)
        self.rotate = _magnitude("rotate", rotate)
        self.aniso = _magnitude("aniso", aniso)
        self.xfrac = _magnitude("xfrac", xfrac)
        self.scale_std = _magnitude("scale_std", scale_std)
        self.rotate_max = _magnitude("rotate_max", rotate_max)
        self.aniso_std = _magnitude("aniso_std", aniso_std)
        self.xfrac_std = _magnitude("xfrac_std", xfrac_std)

        self.brightness = _magnitude("brightness", brightness)
        self.contrast = _magnitude("contrast", contrast)
        self.lumaflip = _magnitude("lumaflip", lumaflip)
        self.hue = _magnitude("hue", hue)
        self.saturation = _magnitude("saturation", saturation)
        self.brightness_std = _magnitude("brightness_std", brightness_std)
        self.contrast_std = _magnitude("contrast_std", contrast_std)
        self.hue_max = _magnitude("hue_max", hue_max)
        self.saturation_std = _magnitude("saturation_std", saturation_std)

        self.imgfilter = _magnitude("imgfilter", imgfilter)
        self.imgfilter_bands = [_magnitude("imgfilter_bands", strength) for strength in imgfilter_bands]
        self.imgfilter_std = _magnitude("imgfilter_std", imgfilter_std)
        if len(self.imgfilter_bands) != len(BAND_POWER):
            raise ValueError(
                "imgfilter_bands has %d entries; wanted %d, one strength per frequency band"
                % (len(self.imgfilter_bands), len(BAND_POWER))
            )

        self.noise = _magnitude("noise", noise)
        self.cutout = _magnitude("cutout", cutout)
        self.noise_std = _magnitude("noise_std", noise_std)
        self.cutout_size = _magnitude("cutout_size", cutout_size)

        self.register_buffer("Hz_geom", upfirdn2d.setup_filter(list(SYM6)))  # [12], sum 1, separable
        self.register_buffer("Hz_fbank", torch.as_tensor(filter_bank(), dtype=torch.float32))  # [4, 43]

    def forward(self, images: torch.Tensor, debug_percentile=None) -> torch.Tensor:
        """Augment the images.

        Args:
            images: [N, C, H, W] floating point, nominally in [-1, 1]; 1, 3 or 4 channels where a colour transform is
                enabled, at least 22 x 22 pixels where the band filter is.
            debug_percentile: None, or a number q in (0, 1): every random parameter of every enabled transform becomes
                its "percentile" q for all samples, whatever `p` is: q itself where it is uniform, erfinv(2q - 1), not
                scaled by sqrt(2), where it is normal; the second arbitrary rotation is absent. Only the pixels of the
                noise stay random.

        Returns:
            Augmented images, same shape and dtype.

        Raises:
            ValueError: images of another kind than described.
        """
        self._check(images)
        if debug_percentile is not None:
            debug_percentile = torch.as_tensor(debug_percentile, dtype=torch.float32, device=images.device)
        sampler = ParameterSampler(images.shape[0], images.device, debug_percentile)

        if max(self.xflip, self.rotate90, self.xint, self.scale, self.rotate, self.aniso, self.xfrac) > 0:
            linear, offset = self.sample_geometry(sampler, images.shape[2], images.shape[3])
            images = resample_affine(images, linear, offset, self.Hz_geom)
        if max(self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation) > 0:
            images = apply_color(images, *self.sample_color(sampler, images.shape[1]))
        if self.imgfilter > 0:
            images = apply_separable(images, self.sample_band_gains(sampler) @ self.Hz_fbank)
        if self.noise > 0:
            images = self._add_noise(images, sampler)
        if self.cutout > 0:
            images = self._cut_out(images, sampler)
        return images

    def sample_geometry(self, sampler: "ParameterSampler", height: int, width: int) -> tuple:
        """Draw the maps from output to input pixels, x_in = linear @ x_out + offset, origin at the image's centre.

        Factors multiply from the right: the first one listed is the outermost in input space.

        Returns:
            (linear [N, 2, 2], offset [N, 2]) in pixels, horizontal first.
        """
        size = misc.constant([width, height], dtype=torch.float32, device=sampler.device)
        linear = torch.eye(2, device=sampler.device).expand(sampler.num_samples, 2, 2)
        offset = torch.zeros([sampler.num_samples, 2], device=sampler.device)

        if self.xflip > 0:
            flip = sampler.uniform(lambda u: torch.floor(u * 2), 0, self.xflip * self.p)  # [N, 1]
            linear = linear * torch.cat([1 - 2 * flip, torch.ones_like(flip)], dim=1)[:, None, :]
        if self.rotate90 > 0:
            turns = sampler.uniform(lambda u: torch.floor(u * 4), 0, self.rotate90 * self.p)
            linear = linear @ _rotation(turns * (math.pi / 2)).round()  # quarter turns are exact
        if self.xint > 0:
            shift = sampler.uniform(lambda u: (u * 2 - 1) * self.xint_max, 0, self.xint * self.p, num=2)
            offset = offset - _apply(linear, torch.round(shift * size))

        # Two rotations, before and after the anisotropic scaling; at least one happens with probability rotate * p.
        rotate_gate = 1 - torch.sqrt((1 - self.rotate * self.p).clamp(0, 1))
        if self.scale > 0:
            factor = sampler.normal(lambda n: torch.exp2(n * self.scale_std), 1, self.scale * self.p)
            linear = linear / factor[:, :, None]
        if self.rotate > 0:
            angle = sampler.uniform(lambda u: (u * 2 - 1) * (math.pi * self.rotate_max), 0, rotate_gate)
            linear = linear @ _rotation(angle)
        if self.aniso > 0:
            factor = sampler.normal(lambda n: torch.exp2(n * self.aniso_std), 1, self.aniso * self.p)
            linear = linear * torch.cat([1 / factor, factor], dim=1)[:, None, :]
        if self.rotate > 0:
            angle = sampler.uniform(lambda u: (u * 2 - 1) * (math.pi * self.rotate_max), 0, rotate_gate)
            if sampler.percentile is None:
                linear = linear @ _rotation(angle)
        if self.xfrac > 0:
            shift = sampler.normal(lambda n: n * self.xfrac_std, 0, self.xfrac * self.p, num=2)
            offset = offset - _apply(linear, shift * size)
        return linear, offset

    def sample_color(self, sampler: "ParameterSampler", num_channels: int) -> tuple:
        """Draw the colour map, reduced to four numbers per sample (see `color_matrix`).

        All five transforms are combinations of the projection on the grey axis, its complement and the turn about that
        axis. Such matrices commute and multiply like a real number (grey part) beside a complex number (chroma part).

        Returns:
            (grey, chroma_re, chroma_im, shift), each [N, 1]; shift is what is added to every channel.
        """
        grey = torch.ones([sampler.num_samples, 1], device=sampler.device)
        shift = torch.zeros_like(grey)
        chroma_re, chroma_im = grey, shift

        if self.brightness > 0:
            shift = shift + sampler.normal(lambda n: n * self.brightness_std, 0, self.brightness * self.p)
        if self.contrast > 0:
            factor = sampler.normal(lambda n: torch.exp2(n * self.contrast_std), 1, self.contrast * self.p)
            grey, chroma_re, shift = grey * factor, chroma_re * factor, shift * factor
        if self.lumaflip > 0:
            sign = 1 - 2 * sampler.uniform(lambda u: torch.floor(u * 2), 0, self.lumaflip * self.p)
            grey, shift = grey * sign, shift * sign
        if self.hue > 0 and num_channels > 1:
            angle = sampler.uniform(lambda u: (u * 2 - 1) * (math.pi * self.hue_max), 0, self.hue * self.p)
            chroma_re, chroma_im = chroma_re * torch.cos(angle), chroma_re * torch.sin(angle)
        if self.saturation > 0 and num_channels > 1:
            factor = sampler.normal(lambda n: torch.exp2(n * self.saturation_std), 1, self.saturation * self.p)
            chroma_re, chroma_im = chroma_re * factor, chroma_im * factor
        return grey, chroma_re, chroma_im, shift

    def sample_band_gains(self, sampler: "ParameterSampler") -> torch.Tensor:
        """Draw the amplification of each frequency band, [N, 4]; each band's change keeps a natural image's power."""
        power = misc.constant(BAND_POWER, dtype=torch.float32, device=sampler.device)
        gains = torch.ones([sampler.num_samples, len(BAND_POWER)], device=sampler.device)
        for band, strength in enumerate(self.imgfilter_bands):
            factor = sampler.normal(lambda n: torch.exp2(n * self.imgfilter_std), 1, self.imgfilter * self.p * strength)
            if strength == 0:
                factor = torch.ones_like(factor)  # also under a debug percentile
            single = torch.ones_like(gains)
            single[:, band : band + 1] = factor
            gains = gains * single / (power * single.square()).sum(dim=1, keepdim=True).sqrt()
        return gains

    def _add_noise(self, images: torch.Tensor, sampler: "ParameterSampler") -> torch.Tensor:
        fixed = None if sampler.percentile is None else torch.erfinv(sampler.percentile)
        sigma = sampler.normal(lambda n: n.abs() * self.noise_std, 0, self.noise * self.p, fixed=fixed)
        return images + self._pixel_noise(images) * sigma[:, :, None, None].to(images.dtype)

    def _pixel_noise(self, images: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(images)

    def _cut_out(self, images: torch.Tensor, sampler: "ParameterSampler") -> torch.Tensor:
        height, width = images.shape[2:]
        full_size = torch.full([images.shape[0], 1], self.cutout_size, device=images.device)
        size = sampler.gate(full_size, 0, self.cutout * self.p)
        if sampler.percentile is not None:
            size = full_size
        center = sampler.uniform(lambda u: u, 0, 1, num=2)
        x = (torch.arange(width, device=images.device) + 0.5) / width
        y = (torch.arange(height, device=images.device) + 0.5) / height
        keep_x = (x - center[:, :1]).abs() >= size / 2  # [N, W]
        keep_y = (y - center[:, 1:]).abs() >= size / 2  # [N, H]
        keep = keep_x[:, None, None, :] | keep_y[:, None, :, None]
        return images * keep.to(images.dtype)

    def _check(self, images: torch.Tensor) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                "got images of shape %s and type %s; wanted a floating-point batch [N, C, H, W]"
                % (list(images.shape), images.dtype)
            )
        num_channels, height, width = images.shape[1:]
        color = max(self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation)
        if color > 0 and num_channels not in (1, 3, 4):
            raise ValueError(
                "got images with %d channels; colour augmentation needs 1 (grey), 3 (RGB) or 4 (RGBA); "
                "choose transforms without colour, for instance 'bg'" % num_channels
            )
        smallest = self.Hz_fbank.shape[1] // 2 + 1  # reflection cannot reach farther than the image
        if self.imgfilter > 0 and min(height, width) < smallest:
            raise ValueError(
                "got images of %d x %d pixels; the band filter (imgfilter) needs at least %d x %d; "
                "choose transforms without it, for instance 'bgc'" % (width, height, smallest, smallest)
            )


class ParameterSampler:
    """Draws gated random parameters for a batch; with a percentile the draws still occur and are then replaced."""

    def __init__(self, num_samples: int, device: torch.device, percentile=None):
        self.num_samples = num_samples
        self.device = device
        self.percentile = percentile  # None or a float32 scalar tensor

    def uniform(self, to_value, off: float, prob, num: int = 1) -> torch.Tensor:
        """to_value(u), u uniform in [0, 1), with probability `prob`, else `off`; [N, num]."""
        raw = torch.rand([self.num_samples, num], device=self.device)
        return self._gated(raw, self.percentile, to_value, off, prob)

    def normal(self, to_value, off: float, prob, num: int = 1, fixed=None) -> torch.Tensor:
        """to_value(n), n standard normal, with probability `prob`, else `off`; [N, num]."""
        raw = torch.randn([self.num_samples, num], device=self.device)
        if fixed is None and self.percentile is not None:
            fixed = torch.erfinv(self.percentile * 2 - 1)
        return self._gated(raw, fixed, to_value, off, prob)

    def gate(self, value: torch.Tensor, off: float, prob) -> torch.Tensor:
        """`value` [N, num] with probability `prob`, else `off`; one decision per sample."""
        return torch.where(torch.rand([self.num_samples, 1], device=self.device) < prob, value, off)

    def _gated(self, raw: torch.Tensor, fixed, to_value, off: float, prob) -> torch.Tensor:
        value = self.gate(to_value(raw), off, prob)
        if self.percentile is not None:
            value = to_value(fixed.expand_as(raw))
        return value


def resampling_margins(linear: torch.Tensor, offset: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """How far the batch's sampling points, with the resampling filter's support, reach beyond the image.

    Args:
        linear, offset: maps from output to input pixels, [N, 2, 2] and [N, 2].
        height, width: size of the image in pixels.

    Returns:
        Whole numbers of pixels (float32 [4]) to pad at the left, top, right and bottom; the same for all samples, at
        most the image's size minus one (the limit of a reflection).
    """
    center = misc.constant([(width - 1) / 2, (height - 1) / 2], dtype=torch.float32, device=linear.device)
    reach = _apply(linear.abs(), center)  # [N, 2]: half the bounding box of the mapped corners
    beyond = torch.cat([reach - offset, reach + offset], dim=1).amax(dim=0)  # left, top, right, bottom
    support = len(SYM6) // 2  # each of the two passes reaches 6 samples, 3 pixels, to either side
    limit = (center * 2).repeat(2)
    return torch.minimum((beyond + (support - center).repeat(2)).clamp(min=0), limit).ceil()


def resample_affine(
    images: torch.Tensor, linear: torch.Tensor, offset: torch.Tensor, taps: torch.Tensor
) -> torch.Tensor:
    """Resample under affine maps: reflect, double the resolution, interpolate bilinearly, halve the resolution.

    Args:
        images: [N, C, H, W].
        linear, offset: maps from output to input pixels, [N, 2, 2] and [N, 2], origin at the image's centre.
        taps: [12] low-pass filter for both changes of resolution.

    Returns:
        [N, C, H, W]; outside of the reflected margins the input counts as zero.
    """
    num_samples, num_channels, height, width = images.shape
    support = taps.shape[0] // 2
    # The one wait for the device: the size of the padded image is a number of the host.
    margins = resampling_margins(linear, offset, height, width)
    left, top, right, bottom = [int(margin) for margin in margins.tolist()]
    images = torch.nn.functional.pad(images, [left, right, top, bottom], mode="reflect")
    images = upfirdn2d.upsample2d(images, taps, up=2)
    out_height, out_width = 2 * (height + support), 2 * (width + support)
    size = misc.constant([width, height], dtype=torch.float32, device=linear.device)
    in_size = 2 * (size + margins[:2] + margins[2:])
    out_size = 2 * (size + support)

    # Account for unequal margins, for the doubled resolution, whose samples lie half a pixel off, and for the sampling
    # grid's axes, which run from -1 to 1 on either side.
    offset = 2 * offset + (margins[:2] - margins[2:]) + linear.sum(dim=2) / 2 - 0.5
    linear = linear * (out_size / in_size[:, None])
    theta = torch.cat([linear, (offset * 2 / in_size)[:, :, None]], dim=2).to(images.dtype)  # [N, 2, 3]
    out_shape = [num_samples, num_channels, out_height, out_width]
    grid = torch.nn.functional.affine_grid(theta, out_shape, align_corners=False)
    images = grid_sample_gradfix.grid_sample(images, grid)
    return upfirdn2d.downsample2d(images, taps, down=2, padding=-support, flip_filter=True)


def color_matrix(grey: torch.Tensor, chroma_re: torch.Tensor, chroma_im: torch.Tensor) -> torch.Tensor:
    """grey * P + chroma_re * (I - P) + chroma_im * X: P projects on the grey axis v, X turns about it (X a = v x a).

    Args:
        grey, chroma_re, chroma_im: [N, 1].

    Returns:
        [N, 3, 3], acting on RGB columns. Rodrigues' rotation about v is grey = 1, chroma = (cos, sin).
    """
    device = grey.device
    axis = 1 / math.sqrt(3)
    projection = torch.full([3, 3], 1 / 3, device=device)
    turn = misc.constant([[0, -axis, axis], [axis, 0, -axis], [-axis, axis, 0]], dtype=torch.float32, device=device)
    grey, chroma_re, chroma_im = grey[:, :, None], chroma_re[:, :, None], chroma_im[:, :, None]
    # Written about I, not I - P, so that grey = chroma_re = 1 is exactly the identity.
    return chroma_re * torch.eye(3, device=device) + (grey - chroma_re) * projection + chroma_im * turn


def apply_color(
    images: torch.Tensor, grey: torch.Tensor, chroma_re: torch.Tensor, chroma_im: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """Apply the colour map of `sample_color` to images [N, 1, 3 or 4, H, W]; a fourth channel, alpha, stays."""
    if images.shape[1] == 4:
        return torch.cat([apply_color(images[:, :3], grey, chroma_re, chroma_im, shift), images[:, 3:]], dim=1)
    num_samples, num_channels, height, width = images.shape
    shift = shift[:, :, None].to(images.dtype)
    if num_channels == 1:
        return images * grey[:, :, None, None].to(images.dtype) + shift[:, :, :, None]
    matrix = color_matrix(grey, chroma_re, chroma_im).to(images.dtype)
    pixels = torch.baddbmm(shift, matrix, images.reshape(num_samples, num_channels, height * width))
    return pixels.reshape(images.shape)


def apply_separable(images: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Filter each image along both axes with its own odd symmetric kernel, reflecting at the borders.

    Args:
        images: [N, C, H, W], H and W larger than half a kernel.
        kernels: [N, taps].
    """
    num_samples, num_channels, height, width = images.shape
    taps = kernels.shape[1]
    reach = taps // 2
    groups = num_samples * num_channels
    weight = kernels.to(images.dtype).repeat_interleave(num_channels, dim=0)  # [N * C, taps]
    images = torch.nn.functional.pad(images, [reach] * 4, mode="reflect")
    images = images.reshape(1, groups, height + 2 * reach, width + 2 * reach)
    images = conv2d_gradfix.conv2d(images, weight.reshape(groups, 1, 1, taps), groups=groups)
    images = conv2d_gradfix.conv2d(images, weight.reshape(groups, 1, taps, 1), groups=groups)
    return images.reshape(num_samples, num_channels, height, width)


def filter_bank() -> np.ndarray:
    """Zero-phase filters of four octave bands, lowest first, centred in 43 taps; together they make a unit impulse."""
    low, low2, low4 = [_stretch(SYM2_LOW, step) for step in (1, 2, 4)]
    high, high2, high4 = [_stretch(SYM2_HIGH, step) for step in (1, 2, 4)]
    low_low2 = np.convolve(low, low2)
    bands = [np.convolve(low_low2, low4), np.convolve(low_low2, high4), np.convolve(low, high2), high]
    length = len(bands[0])
    return np.stack([np.pad(band, (length - len(band)) // 2) for band in bands])


def _stretch(taps: tuple, step: int) -> np.ndarray:
    stretched = np.zeros((len(taps) - 1) * step + 1)
    stretched[::step] = taps
    return stretched


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """[N, 1] radians -> [N, 2, 2]."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.cat([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)


def _apply(linear: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """[N, 2, 2] times [N, 2] or [2]."""
    return (linear * vector.reshape(-1, 1, 2)).sum(dim=2)


def _magnitude(name: str, value: float) -> float:
    value = float(value)
    if not (0 <= value < math.inf):
        raise ValueError("%s is %s; wanted a finite number of at least 0" % (name, value))
    return value
