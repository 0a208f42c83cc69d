"""What must hold for the augmentation pipe whatever the numbers: symmetry, identity, gates, draws, derivatives."""

import copy
import math
import warnings

import pytest
import torch

from training import augment

ALL = augment.AUGMENT_PRESETS["bgcfnc"]
CPU = torch.device("cpu")


def images(num: int = 2, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn([num, channels, height, width], generator=torch.Generator().manual_seed(seed))


def smooth_images(num: int = 2, size: int = 32) -> torch.Tensor:
    """Low frequencies only, which every resampling must keep."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = [torch.sin(0.2 * x + 0.06 * k * y + k) for k in range(3 * num)]
    return torch.stack(waves).reshape(num, 3, size, size)


def pipe_at(p: float, **kwargs: float) -> augment.AugmentPipe:
    pipe = augment.AugmentPipe(**kwargs)
    pipe.p.fill_(p)
    return pipe


# --- geometry


@pytest.mark.parametrize("percentile", [0.05, 0.2, 0.65, 0.97])
def test_whole_pixel_shift_moves_the_content(percentile: float) -> None:
    x = images()
    moved = augment.AugmentPipe(xint=1)(x, debug_percentile=percentile)
    shift = round((2 * percentile - 1) * 0.125 * 32)
    expected = torch.roll(x, [shift, shift], dims=[2, 3])  # positive: right and down
    edge = abs(shift) or 1
    inner = slice(edge, -edge)
    torch.testing.assert_close(moved[:, :, inner, inner], expected[:, :, inner, inner], atol=1e-5, rtol=0)


def test_shift_reflects_at_the_border() -> None:
    x = images()
    moved = augment.AugmentPipe(xint=1)(x, debug_percentile=0.97)  # 4 pixels
    torch.testing.assert_close(moved[:, :, 4:, :4], x[:, :, :-4, 1:5].flip(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_are_counter_clockwise(turns: int) -> None:
    """Up to the asymmetry of the 12-tap filter, which low frequencies hardly notice."""
    x = smooth_images()
    turned = augment.AugmentPipe(rotate90=1)(x, debug_percentile=(turns + 0.5) / 4)
    difference = (turned - torch.rot90(x, turns, dims=[2, 3]))[:, :, 4:-4, 4:-4]  # reflections kink at the border
    assert difference.abs().max() < 0.05


def test_mirroring() -> None:
    x = smooth_images()
    torch.testing.assert_close(augment.AugmentPipe(xflip=1)(x, debug_percentile=0.7), x.flip(3), atol=0.05, rtol=0)


def test_geometry_on_oblong_images_agrees_with_transposing() -> None:
    """An anisotropic stretch of the transposed image is the inverse stretch of the image."""
    x = images(height=24, width=40)
    wide = augment.AugmentPipe(aniso=1)(x, debug_percentile=0.7)
    tall = augment.AugmentPipe(aniso=1)(x.transpose(2, 3), debug_percentile=0.3).transpose(2, 3)
    torch.testing.assert_close(wide, tall, atol=1e-4, rtol=0)


def test_scale_magnifies_content_for_values_above_one() -> None:
    """s = 2 maps output offset d to input offset d / 2; a map of the parameters, not of pixels."""
    sampler = augment.ParameterSampler(1, CPU, torch.tensor(0.5 + 0.5 * math.erf(1)))  # e = 1
    linear, _ = augment.AugmentPipe(scale=1, scale_std=1).sample_geometry(sampler, 32, 32)
    torch.testing.assert_close(linear[0], torch.eye(2) / 2, atol=1e-6, rtol=0)


def test_factors_multiply_from_the_right() -> None:
    """The seven factors as 3 x 3 matrices, in the order of the specification, against the incremental form."""
    q, width, height = 0.62, 40, 24
    e = float(torch.erfinv(torch.tensor(2 * q - 1)))

    def translation(x: float, y: float) -> torch.Tensor:
        return torch.tensor([[1.0, 0, x], [0, 1, y], [0, 0, 1]])

    def diagonal(x: float, y: float) -> torch.Tensor:
        return torch.diag(torch.tensor([x, y, 1.0]))

    def rotation(t: float) -> torch.Tensor:
        return torch.tensor([[math.cos(t), -math.sin(t), 0], [math.sin(t), math.cos(t), 0], [0, 0, 1]])

    t = (2 * q - 1) * 0.125
    expected = (
        diagonal(1 / (1 - 2 * math.floor(2 * q)), 1)
        @ rotation(math.pi / 2 * math.floor(4 * q))
        @ translation(-round(t * width), -round(t * height))
        @ diagonal(2 ** (-e * 0.2), 2 ** (-e * 0.2))
        @ rotation((2 * q - 1) * math.pi)
        @ diagonal(2 ** (-e * 0.2), 2 ** (e * 0.2))
        @ translation(-e * 0.125 * width, -e * 0.125 * height)
    )
    pipe = augment.AugmentPipe(**augment.AUGMENT_PRESETS["bg"])
    linear, offset = pipe.sample_geometry(augment.ParameterSampler(1, CPU, torch.tensor(q)), height, width)
    torch.testing.assert_close(torch.cat([linear, offset[:, :, None]], dim=2)[0], expected[:2], atol=1e-5, rtol=1e-5)


# --- colour


def test_brightness_adds_a_constant() -> None:
    x = images()
    added = augment.AugmentPipe(brightness=1)(x, debug_percentile=0.8) - x
    expected = float(torch.erfinv(torch.tensor(0.6))) * 0.2
    torch.testing.assert_close(added, torch.full_like(added, expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["hue", "saturation"])
def test_chroma_transforms_keep_the_luma_axis(name: str) -> None:
    x = images()
    grey = x[:, :1].expand(-1, 3, -1, -1)
    changed = augment.AugmentPipe(**{name: 1})(x, debug_percentile=0.8)
    torch.testing.assert_close(changed.mean(dim=1), x.mean(dim=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(augment.AugmentPipe(**{name: 1})(grey, debug_percentile=0.8), grey, atol=1e-6, rtol=0)
    assert (changed - x).abs().max() > 0.1


def test_hue_is_an_isometry() -> None:
    x = images()
    turned = augment.AugmentPipe(hue=1)(x, debug_percentile=0.8)
    torch.testing.assert_close(turned.square().sum(dim=1), x.square().sum(dim=1), atol=1e-5, rtol=1e-5)


def test_luma_flip_is_an_involution_that_mirrors_grey() -> None:
    x = images()
    pipe = augment.AugmentPipe(lumaflip=1)
    flipped = pipe(x, debug_percentile=0.7)
    torch.testing.assert_close(flipped.mean(dim=1), -x.mean(dim=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(pipe(flipped, debug_percentile=0.7), x, atol=1e-6, rtol=0)


def test_grey_image_equals_grey_rgb_image() -> None:
    """A single channel is treated as the mean of an RGB image with equal channels."""
    x = images(channels=1)
    pipe = augment.AugmentPipe(**augment.AUGMENT_PRESETS["color"])
    rgb = pipe(x.expand(-1, 3, -1, -1), debug_percentile=0.8)
    torch.testing.assert_close(pipe(x, debug_percentile=0.8), rgb.mean(dim=1, keepdim=True), atol=1e-6, rtol=1e-6)


def test_color_matrix_against_plain_products() -> None:
    """The reduced form against 4 x 4 matrices multiplied one after the other."""
    q = 0.8
    e = float(torch.erfinv(torch.tensor(2 * q - 1)))
    v = torch.tensor([1.0, 1, 1]) / math.sqrt(3)
    outer = torch.outer(v, v)
    cross = torch.linalg.cross(v.expand(3, 3), torch.eye(3)).T
    angle = (2 * q - 1) * math.pi
    turn = torch.eye(3) * math.cos(angle) + cross * math.sin(angle) + outer * (1 - math.cos(angle))
    steps = [torch.eye(3) * 2 ** (e * 0.5), torch.eye(3) - 2 * outer, turn, outer + 2**e * (torch.eye(3) - outer)]
    x = images()
    expected = x + e * 0.2
    for step in steps:
        expected = torch.einsum("ij,njhw->nihw", step, expected)
    result = augment.AugmentPipe(**augment.AUGMENT_PRESETS["color"])(x, debug_percentile=q)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


# --- filter, noise, cutout


def test_band_filter_scales_flat_images_by_the_lowest_gain_per_axis() -> None:
    x = torch.full([1, 3, 24, 24], 0.5)
    pipe = augment.AugmentPipe(imgfilter=1)
    gains = pipe.sample_band_gains(augment.ParameterSampler(1, CPU, torch.tensor(0.8)))
    torch.testing.assert_close(pipe(x, debug_percentile=0.8), x * gains[0, 0].square(), atol=1e-6, rtol=0)


def test_band_strength_zero_is_off_under_a_percentile() -> None:
    x = images(height=24, width=24)
    pipe = augment.AugmentPipe(imgfilter=1, imgfilter_bands=[0, 0, 0, 0])
    torch.testing.assert_close(pipe(x, debug_percentile=0.8), x, atol=1e-6, rtol=0)


def test_noise_has_the_drawn_strength() -> None:
    torch.manual_seed(0)
    x = torch.zeros([400, 3, 16, 16])
    sigma = augment.AugmentPipe(noise=1)(x).std(dim=[1, 2, 3])
    assert float(sigma.square().mean().sqrt()) == pytest.approx(0.1, rel=0.15)  # sigma is half-normal with scale 0.1
    assert float(sigma.mean()) == pytest.approx(0.1 * math.sqrt(2 / math.pi), rel=0.15)


def test_cutout_blanks_a_rectangle() -> None:
    x = torch.ones([1, 3, 32, 32])
    kept = augment.AugmentPipe(cutout=1)(x, debug_percentile=0.5)
    assert kept[:, :, 8:24, 8:24].eq(0).all()
    assert int(kept.eq(0).sum()) == 3 * 16 * 16


# --- p, gates and draws


@pytest.mark.parametrize("name", ["blit", "geom", "bg"])
def test_geometry_is_identity_at_p_zero(name: str) -> None:
    x = images()
    torch.testing.assert_close(pipe_at(0, **augment.AUGMENT_PRESETS[name])(x), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["color", "noise", "cutout"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_rest_is_exactly_identity_at_p_zero(name: str, channels: int) -> None:
    x = images(channels=channels)
    assert torch.equal(pipe_at(0, **augment.AUGMENT_PRESETS[name])(x), x)


def test_band_filter_is_identity_at_p_zero() -> None:
    x = images()
    torch.testing.assert_close(pipe_at(0, imgfilter=1)(x), x, atol=1e-5, rtol=0)


def test_no_transform_returns_the_images() -> None:
    x = images(channels=5, height=3, width=2)
    assert augment.AugmentPipe()(x) is x


def open_gates(p: float, name: str, num: int = 4000) -> float:
    """Share of samples that a gate lets through."""
    pipe = pipe_at(p, **{name: 1})
    sampler = augment.ParameterSampler(num, CPU)
    if name in ("scale", "aniso", "xint", "xfrac"):
        linear, offset = pipe.sample_geometry(sampler, 1 << 20, 1 << 20)
        moved = (linear - torch.eye(2)).flatten(1).ne(0).any(dim=1) | offset.ne(0).any(dim=1)
    elif name == "imgfilter":
        moved = pipe.sample_band_gains(sampler).ne(1).any(dim=1)
    elif name in ("brightness", "contrast", "hue", "saturation"):
        values = torch.cat(pipe.sample_color(sampler, 3), dim=1)
        moved = (values - torch.tensor([1.0, 1, 0, 0])).ne(0).any(dim=1)
    else:
        moved = (pipe(torch.ones([num, 3, 4, 4])) != 1).flatten(1).any(dim=1)
    return float(moved.float().mean())


def within(share: float, expected: float, num: int = 4000) -> bool:
    """Four and a half standard deviations of a binomial share."""
    return abs(share - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / num)


@pytest.mark.parametrize(
    "name", ["scale", "aniso", "xint", "xfrac", "brightness", "contrast", "hue", "saturation", "noise"]
)
def test_gate_opens_with_probability_p(name: str) -> None:
    torch.manual_seed(1)
    assert within(open_gates(0.5, name), 0.5)
    assert within(open_gates(0.1, name), 0.1)


def test_gates_of_discrete_transforms() -> None:
    """One of the two or four values is the identity itself."""
    torch.manual_seed(2)
    sampler = augment.ParameterSampler(4000, CPU)
    linear, _ = pipe_at(0.5, xflip=1).sample_geometry(sampler, 8, 8)
    assert within(float(linear[:, 0, 0].lt(0).float().mean()), 0.25)
    linear, _ = pipe_at(0.5, rotate90=1).sample_geometry(sampler, 8, 8)
    assert within(float((linear - torch.eye(2)).flatten(1).ne(0).any(dim=1).float().mean()), 0.375)
    grey = pipe_at(0.5, lumaflip=1).sample_color(sampler, 3)[0]
    assert within(float(grey.lt(0).float().mean()), 0.25)


def test_rotation_gates_open_together_with_probability_p() -> None:
    """Each of the two rotations passes with 1 - sqrt(1 - p), so that at least one does with probability p."""
    torch.manual_seed(3)
    pipe = pipe_at(0.5, rotate=1)
    linear, _ = pipe.sample_geometry(augment.ParameterSampler(4000, CPU), 8, 8)
    assert within(float((linear - torch.eye(2)).flatten(1).ne(0).any(dim=1).float().mean()), 0.5)

    # A stretch between the two shows them apart: linear = R1 S R2 with S fixed, and R2 alone decides linear^T linear.
    pipe = pipe_at(0.5, rotate=1)
    pipe.aniso, pipe.aniso_std = 1e6, 1.0  # the gate of this one is always open
    linear, _ = pipe.sample_geometry(augment.ParameterSampler(4000, CPU), 8, 8)
    gram = linear.transpose(1, 2) @ linear
    second = gram[:, 0, 1].abs() > 1e-3 * gram.diagonal(dim1=1, dim2=2).amax(dim=1)
    assert within(float(second.float().mean()), 1 - math.sqrt(0.5))


def test_band_filter_gate() -> None:
    """Four bands, each with its own gate."""
    torch.manual_seed(4)
    assert within(open_gates(0.25, "imgfilter"), 1 - 0.75**4)


def test_band_strength_scales_the_gate_of_its_band() -> None:
    torch.manual_seed(14)
    pipe = pipe_at(0.8, imgfilter=1, imgfilter_bands=[0, 0, 0.5, 0])
    gains = pipe.sample_band_gains(augment.ParameterSampler(4000, CPU))
    assert within(float(gains[:, 2].ne(1).float().mean()), 0.4)
    others = gains[:, [0, 1, 3]]
    torch.testing.assert_close(others, others[:, :1].expand_as(others))  # all share what keeps the power


def test_hue_and_saturation_are_skipped_for_grey() -> None:
    """Nothing happens and nothing is drawn."""
    torch.manual_seed(15)
    before = torch.get_rng_state()
    x = images(channels=1)
    assert torch.equal(augment.AugmentPipe(hue=1, saturation=1)(x), x)
    assert torch.equal(before, torch.get_rng_state())


def test_cutout_gate_and_center() -> None:
    torch.manual_seed(5)
    blank = pipe_at(0.5, cutout=1)(torch.ones([4000, 1, 8, 8])).eq(0).flatten(1)
    assert within(float(blank.any(dim=1).float().mean()), 0.5)
    share = blank.float().mean(dim=1)[blank.any(dim=1)].mean()
    assert float(share) == pytest.approx((0.5 - 0.0625) ** 2, rel=0.05)  # mean overlap of half a side with the image


def test_multiplier_scales_p() -> None:
    torch.manual_seed(6)
    pipe = pipe_at(0.5, brightness=0.5)
    shift = pipe.sample_color(augment.ParameterSampler(4000, CPU), 3)[3]
    assert within(float(shift.ne(0).float().mean()), 0.25)


@pytest.mark.parametrize("name", augment.AUGMENT_PRESETS)
def test_p_does_not_change_how_much_is_drawn(name: str) -> None:
    """Two training arms with different p stay in step: after a call the generator is in the same state."""
    states = []
    for p in (0.0, 0.3, 1.0):
        torch.manual_seed(7)
        pipe_at(p, **augment.AUGMENT_PRESETS[name])(images())
        states.append(torch.get_rng_state())
    torch.manual_seed(7)
    augment.AugmentPipe(**augment.AUGMENT_PRESETS[name])(images(), debug_percentile=0.4)
    states.append(torch.get_rng_state())
    assert all(torch.equal(states[0], state) for state in states[1:])
    torch.manual_seed(7)
    assert not torch.equal(states[0], torch.get_rng_state())


def test_growing_p_keeps_values_and_only_opens_gates() -> None:
    torch.manual_seed(8)
    few = pipe_at(0.3, brightness=1).sample_color(augment.ParameterSampler(200, CPU), 3)[3]
    torch.manual_seed(8)
    many = pipe_at(0.8, brightness=1).sample_color(augment.ParameterSampler(200, CPU), 3)[3]
    opened = few.ne(0)
    assert torch.equal(few[opened], many[opened])
    assert int(many.ne(0).sum()) > int(opened.sum())


def test_same_seed_same_images() -> None:
    pipe = augment.AugmentPipe(**ALL)
    torch.manual_seed(9)
    first = pipe(images())
    second = pipe(images())
    torch.manual_seed(9)
    assert torch.equal(first, pipe(images()))
    assert not torch.equal(first, second)


def test_percentile_treats_all_samples_alike_and_ignores_p() -> None:
    presets = {name: multipliers for name, multipliers in ALL.items() if name != "noise"}
    x = images(num=1).expand(3, -1, -1, -1)
    result = pipe_at(0.0, **presets)(x, debug_percentile=0.3)
    torch.testing.assert_close(result, result[:1].expand_as(result), atol=1e-6, rtol=0)
    torch.testing.assert_close(result, pipe_at(1.0, **presets)(x, debug_percentile=0.3), atol=0, rtol=0)
    assert (result[0] - x[0]).abs().max() > 0.1


def test_random_samples_differ() -> None:
    torch.manual_seed(10)
    x = images(num=1).expand(3, -1, -1, -1)
    result = augment.AugmentPipe(**augment.AUGMENT_PRESETS["bgc"])(x)
    assert (result[0] - result[1]).abs().max() > 0.1
    assert torch.isfinite(result).all()


# --- derivatives


def test_first_and_second_derivatives() -> None:
    """Numerical differences in float64 through every transform; the second derivative through a nonlinearity behind."""
    kwargs = {name: multipliers for name, multipliers in ALL.items() if name not in ("noise", "imgfilter")}
    pipe = augment.AugmentPipe(**kwargs)
    x = images(num=1, height=4, width=5).double().requires_grad_()

    def penalised(x: torch.Tensor) -> torch.Tensor:
        return pipe(x, debug_percentile=0.3).tanh()

    assert torch.autograd.gradcheck(penalised, [x], fast_mode=True)
    assert torch.autograd.gradgradcheck(penalised, [x], fast_mode=True)


def test_band_filter_derivatives() -> None:
    pipe = augment.AugmentPipe(imgfilter=1)
    x = images(num=2, channels=1, height=22, width=23).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pipe(x, debug_percentile=0.8).tanh(), [x], fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: pipe(x, debug_percentile=0.8).tanh(), [x], fast_mode=True)


def test_gradient_penalty_through_the_pipe() -> None:
    """R1: the penalty on the gradient by the un-augmented images reaches the weights behind the pipe."""
    torch.manual_seed(11)
    pipe = augment.AugmentPipe(**ALL)
    score = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Conv2d(4, 1, 30))
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(score(pipe(x)).sum(), x, create_graph=True)
    grad.square().sum([1, 2, 3]).mean().backward()
    for parameter in score[0].parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().max() > 0


def test_float64_images_stay_float64() -> None:
    torch.manual_seed(12)
    assert augment.AugmentPipe(**ALL)(images().double()).dtype == torch.float64


# --- refusals and persistence


@pytest.mark.parametrize(("height", "width"), [(21, 32), (32, 21), (16, 16)])
def test_small_images_with_the_band_filter_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{width} x {height} pixels.*at least 22 x 22.*bgc"):
        augment.AugmentPipe(imgfilter=1)(images(height=height, width=width))
    augment.AugmentPipe(**augment.AUGMENT_PRESETS["bgc"])(images(height=height, width=width))


def test_colour_leaves_alpha_alone() -> None:
    x = images(channels=4)
    pipe = augment.AugmentPipe(brightness=1, contrast=1, lumaflip=1, hue=1, saturation=1)
    torch.manual_seed(0)
    changed = pipe(x)
    torch.manual_seed(0)
    assert torch.equal(changed[:, :3], pipe(x[:, :3])) and torch.equal(changed[:, 3:], x[:, 3:])
    assert not torch.equal(changed[:, :3], x[:, :3])


def test_colour_needs_one_or_three_channels() -> None:
    with pytest.raises(ValueError, match="2 channels.*1 .grey., 3 .RGB. or 4"):
        augment.AugmentPipe(brightness=1)(images(channels=2))
    augment.AugmentPipe(**augment.AUGMENT_PRESETS["bg"])(images(channels=2))


@pytest.mark.parametrize("bad", [torch.zeros([3, 32, 32]), torch.zeros([1, 3, 32, 32], dtype=torch.uint8)])
def test_other_inputs_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="floating-point batch"):
        augment.AugmentPipe(xflip=1)(bad)


@pytest.mark.parametrize(
    "kwargs", [{"xflip": -1}, {"scale_std": float("nan")}, {"noise": float("inf")}, {"imgfilter_bands": [1, 1]}]
)
def test_bad_arguments_are_refused(kwargs: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        augment.AugmentPipe(**kwargs)


def test_state_and_attributes_of_the_exchange_format() -> None:
    pipe = augment.AugmentPipe(xflip=1, imgfilter_bands=[1, 0, 1, 1])
    shapes = {name: list(buffer.shape) for name, buffer in pipe.named_buffers()}
    assert shapes == {"p": [], "Hz_geom": [12], "Hz_fbank": [4, 43]}
    assert not list(pipe.parameters())
    assert all(buffer.dtype == torch.float32 for buffer in pipe.buffers())
    plain = {k: v for k, v in vars(pipe).items() if not k.startswith("_") and k != "training"}
    assert plain.pop("imgfilter_bands") == [1.0, 0.0, 1.0, 1.0]
    assert len(plain) == 27
    assert all(type(value) is float for value in plain.values())


def test_deep_copy_behaves_alike() -> None:
    pipe = pipe_at(0.6, **ALL)
    twin = copy.deepcopy(pipe)
    torch.manual_seed(13)
    first = pipe(images())
    torch.manual_seed(13)
    assert torch.equal(first, twin(images()))
    assert twin is not pipe


def test_no_warnings_in_any_preset() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for preset in augment.AUGMENT_PRESETS.values():
            augment.AugmentPipe(**preset)(images(height=22, width=26)).shape  # noqa: B018
