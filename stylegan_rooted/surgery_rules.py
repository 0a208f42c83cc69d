"""The rules of network surgery: each makes new networks of another shape that say the same, exactly where that can be.

A rule takes networks and gives a `Change`: new networks and how to compare them with the old ones, which stay as they
are. What is not exact is for `surgery` to measure. The arithmetic is explained in docs/surgery.md.

Letters: z latents, c one-hot labels, w intermediate latents.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_utils import seeding
from torch_utils.ops import upfirdn2d
from training import adapters, weights_file
from training.networks import Discriminator

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's mode L and the data set tool use
LRELU_SLOPE = 0.2
NUM_FIT_IMAGES = 64
NUM_FIT_PIXELS = 1 << 16  # of small images more are needed
RIDGE = 1e-3  # of the mean square of a feature
MAX_RESOLUTION = 1024
NO_CLASS = -1  # a new class that no old one compares with
CHANNELS = {1: "grey", 3: "RGB", 4: "RGBA"}

View = Callable[[Tensor], Tensor]


def same(value: Any) -> Any:
    """Nothing changes."""
    return value


@dataclass(frozen=True)
class Networks:
    """G, D and G_ema; D is None where the file had none."""

    G: Any
    D: Any
    G_ema: Any


@dataclass(frozen=True)
class Change:
    """New networks and how to compare them with the old ones."""

    networks: Networks
    what: str
    rule: str
    view: str = ""
    compares_logits: bool = True
    image: View = same  # old image -> what the new generator should give
    back: View = same  # new image -> what the old discriminator would be shown
    old_class: Callable[[int], int | None] = same  # of a new one; None = unconditional


Rule = Callable[[Networks], Change]


def channels(wanted: int) -> Rule:
    """Grey, RGB or RGBA: exact, since the layers at the image are linear.

    Grey becomes RGB by repetition, RGB grey by luma; an added alpha is opaque, a dropped one counts as opaque.

    Raises:
        ValueError: not one of `CHANNELS`.
    """
    if wanted not in CHANNELS:
        raise ValueError(f"--channels {wanted} is unknown; one of {', '.join(map(str, CHANNELS))} (grey, RGB, RGBA)")

    def change(old: Networks) -> Change:
        have = old.G_ema.img_channels
        if have not in CHANNELS:
            raise ValueError(f"--channels: this network makes {have} channels; known are 1, 3 and 4")
        matrix, offset = _channel_map(have, wanted)
        back, back_offset = _channel_map(wanted, have)

        def generator(G: Any) -> Any:
            new = _rebuilt(G, img_channels=wanted)
            layers = [block.torgb for block in _synthesis_blocks(new) if hasattr(block, "torgb")]
            for layer, origin in zip(layers, (b.torgb for b in _synthesis_blocks(G) if hasattr(b, "torgb"))):
                layer.weight.copy_(torch.einsum("oc,cikl->oikl", matrix, origin.weight))
                layer.bias.copy_(matrix @ origin.bias)
            layers[-1].bias.add_(offset)  # once: the last one's output is not filtered any more
            return new

        def discriminator(D: Any) -> Any:
            new = _rebuilt(D, img_channels=wanted)
            for layer, origin in zip(_fromrgbs(new), _fromrgbs(D)):
                # The layer divides by the root of its inputs: that of the new number goes in, that of the old one out.
                layer.weight.copy_(
                    torch.einsum("ockl,cn->onkl", origin.weight, back) * (origin.weight_gain / layer.weight_gain)
                )
                shift = torch.einsum("ockl,c->o", origin.weight, back_offset) * origin.weight_gain
                layer.bias.copy_(origin.bias + shift)
            return new

        return Change(
            _each(old, generator, discriminator),
            what=f"{CHANNELS[have]} to {CHANNELS[wanted]}",
            rule="the layers at the image, multiplied by the matrix of the conversion",
            view=f"the old image as {CHANNELS[wanted]}",
            image=lambda img: _mix(img, matrix, offset),
            back=lambda img: _mix(img, back, back_offset),
        )

    return change


def resolution(wanted: int, *, seed: int = 0) -> Rule:
    """Twice or half the resolution.

    Doubling is exact: the new generator gives the old image upsampled with its own filter, because the new block's
    image layer starts at zero, and the new discriminator sees the image downsampled with its own filter. Halving drops
    the top block; the new last image layer is fitted to the old images, downsampled, and the discriminator's new first
    layer to what the dropped block gave.

    Raises:
        ValueError: neither twice nor half, or twice of a generator without image skips.
    """

    def change(old: Networks) -> Change:
        have = old.G_ema.img_resolution
        if wanted not in (2 * have, have // 2) or not 8 <= wanted <= MAX_RESOLUTION:
            raise ValueError(
                f"--resolution {wanted}: this network makes {have}x{have}; from there one step leads to {2 * have} or "
                f"{have // 2}, within 8 and {MAX_RESOLUTION}"
            )
        kind = _synthesis_blocks(old.G_ema)[-1].architecture
        if kind != "skip" and wanted > have:
            raise ValueError(f"--resolution: this generator is of the kind {kind!r}; only 'skip' ones can be doubled")
        taps = _synthesis_blocks(old.G_ema)[-1].resample_filter
        return _doubled(old, taps, seed) if wanted > have else _halved(old, taps, seed)

    return change


def classes(
    wanted: "int | list[int | None]", *, keep_class: int | None = None, seed: int = 0
) -> Rule:
    """Add, drop or re-map classes.

    Args:
        wanted: number of classes, 0 = unconditional; or for each new class the old one it starts as, None = a new one.
        keep_class: the old class that remains when a network becomes unconditional.
        seed: of the numbers that new classes start with.

    Unconditional to conditional: every class starts as the old network, exactly. To unconditional: the kept class,
    exactly. Re-mapped: exactly; new classes start from the mean of the old ones plus noise.

    Raises:
        ValueError: a class that does not exist, or a missing choice.
    """

    def change(old: Networks) -> Change:
        have = old.G_ema.c_dim
        if isinstance(wanted, int) and wanted == 0:
            return _unconditional(old, keep_class, seed)
        mapped: list[int | None] = (
            [i if i < have else None for i in range(wanted)] if isinstance(wanted, int) else list(wanted)
        )
        bad = [index for index in mapped if index is not None and not 0 <= index < max(have, 1)]
        if bad:
            raise ValueError(f"--map-classes names class {bad[0]}; this network has {have} classes, counted from 0")
        return _conditional(old, len(mapped), seed) if have == 0 else _remapped(old, mapped, seed)

    return change


def map_depth(wanted: int) -> Rule:
    """Another number of mapping layers, where that changes nothing.

    Layers with a linear activation, or relu behind relu, can be the identity; the leaky rectifier that nearly all
    networks have cannot, since it would bend negative values once more.

    Raises:
        ValueError: it would change the images.
    """

    def change(old: Networks) -> Change:
        mapping = old.G_ema.mapping
        have, activation = mapping.num_layers, mapping.fc0.activation
        last = getattr(mapping, f"fc{have - 1}")
        if wanted <= have or activation not in ("linear", "relu") or last.weight.shape[0] != mapping.w_dim:
            raise ValueError(
                f"--map-depth {wanted}: from {have} layers with activation {activation!r} this cannot be done without "
                "changing the images; only adding layers behind 'linear' or 'relu' ones can"
            )
        gain = 1.0 if activation == "linear" else math.sqrt(2)

        def generator(G: Any) -> Any:
            kwargs = deepcopy(G.init_kwargs)
            new = _rebuilt(G, mapping_kwargs={**(kwargs.get("mapping_kwargs") or {}), "num_layers": wanted})
            for index in range(have, wanted):
                layer = getattr(new.mapping, f"fc{index}")
                layer.weight.copy_(torch.eye(mapping.w_dim) / (layer.weight_gain * gain))
                layer.bias.zero_()
            return new

        return Change(
            _each(old, generator, lambda D: D),
            what=f"{have} to {wanted} mapping layers",
            rule="new layers start as the identity",
        )

    return change


def merge_adapter(path: str) -> Rule:
    """Low-rank adapters added to the generator they were trained on: exactly the G_ema of the run that wrote them.

    Raises:
        PickleError: no such file, or damaged.
        ValueError: made for another generator.
    """
    factors, base = weights_file.read_adapter(path)

    def change(old: Networks) -> Change:
        if adapters.fingerprint(old.G_ema) != base:
            raise ValueError(f"--merge {path}: it was made for another generator; SRC is what that run started from")

        def generator(G: Any) -> Any:
            new = deepcopy(old.G_ema)  # the base of both, as in the run
            try:
                adapters.merge(new, factors)
            except ValueError as error:
                raise ValueError(f"--merge {path}: {error}") from None
            return new

        return Change(
            _each(old, generator, same),
            what=f"an adapter of rank {max(len(down) for _, down in factors.values())}",
            rule="kernels plus the product of the factors",
            view="the image without adapter",
            compares_logits=False,
        )

    return change


def num_fp16_res(wanted: int) -> Rule:
    """Another number of resolutions that run in float16 on a GPU. The numbers stay; float32 images stay exactly.

    Raises:
        ValueError: more than there are.
    """

    def change(old: Networks) -> Change:
        most = int(math.log2(old.G_ema.img_resolution)) - 1
        if not 0 <= wanted <= most:
            raise ValueError(f"--num-fp16-res {wanted}: this network has {most} resolutions; 0 to {most}")

        def generator(G: Any) -> Any:
            return _rebuilt(G, synthesis_kwargs={**_widths(G), "num_fp16_res": wanted})

        return Change(
            _each(old, generator, lambda D: _rebuilt(D, num_fp16_res=wanted)),
            what=f"float16 in the {wanted} highest resolutions",
            rule="flags only",
        )

    return change


def new_discriminator(*, start: Any = None, seed: int = 0) -> Rule:
    """A discriminator for a file without one, or in place of the one there.

    Args:
        start: a discriminator whose numbers are taken wherever name and shape agree; None = all fresh.
        seed: of the fresh numbers.
    """

    def change(old: Networks) -> Change:
        D = discriminator_for(old.G_ema, seed, like=start)
        taken = _transplant(start, D) if start is not None else 0
        total = len(D.state_dict())
        rule = "fresh numbers" if start is None else f"{taken} of {total} tensors from the given one, the others fresh"
        return Change(replace(old, D=D), what="a new discriminator", rule=rule, compares_logits=False)

    return change


def discriminator_for(G: Any, seed: int, *, like: Any = None) -> Any:
    """A new discriminator of a generator's sizes and widths, in eval mode without gradients.

    Args:
        G: the generator.
        seed: of its numbers.
        like: a discriminator whose other settings (architecture, minibatch groups, …) it takes.
    """
    shared = ("channel_base", "channel_max", "num_fp16_res", "conv_clamp")
    kwargs = {} if like is None else deepcopy(dict(like.init_kwargs))
    kwargs |= {key: value for key, value in _widths(G).items() if key in shared}
    kwargs |= {"c_dim": G.c_dim, "img_resolution": G.img_resolution, "img_channels": G.img_channels}
    with seeding.scoped(seed, "init"):
        return Discriminator(**kwargs).eval().requires_grad_(False)


def _doubled(old: Networks, taps: Tensor, seed: int) -> Change:
    wanted = 2 * old.G_ema.img_resolution

    def generator(G: Any) -> Any:
        widths = _widths(G)
        if widths.get("num_fp16_res"):
            widths["num_fp16_res"] += 1  # what ran in float32 stays there
        with seeding.scoped(seed, "surgery", "resolution"):
            new = _rebuilt(G, img_resolution=wanted, synthesis_kwargs=widths)
        top = _synthesis_blocks(new)[-1]
        top.torgb.weight.zero_()
        top.torgb.bias.zero_()
        return new

    def discriminator(D: Any) -> Any:
        with seeding.scoped(seed, "surgery", "resolution"):
            new = _rebuilt(D, img_resolution=wanted, num_fp16_res=_one_more(D))
        _see_downsampled(getattr(new, f"b{wanted}"), getattr(D, f"b{wanted // 2}"))
        return new

    return Change(
        _each(old, generator, discriminator),
        what=f"{wanted // 2} to {wanted} pixels",
        rule="a new block whose image layer starts at zero; the discriminator's passes the image on, downsampled",
        view="the old image upsampled with the network's filter",
        image=lambda img: upfirdn2d.upsample2d(img, taps),
        back=lambda img: upfirdn2d.downsample2d(img, taps),
    )


def _see_downsampled(top: Any, below: Any) -> None:
    """Make the discriminator's new first block pass on what the old first block saw, of the downsampled image.

    The image travels through two leaky rectifiers as pairs: lrelu(u) - lrelu(-u) = (1 + slope) u. The last layer then
    computes the old first layer's response; all other weights from new channels into it start at zero and learn.
    """
    if top.architecture == "skip":  # the old first layer is still there and sees the downsampled image itself
        top.conv1.weight.zero_()
        top.conv1.bias.zero_()
        return
    num = top.img_channels
    width = top.fromrgb.weight.shape[0]
    if width < 2 * num or top.fromrgb.activation != "lrelu":
        raise ValueError(
            f"--resolution {top.resolution}: the discriminator's new block has {width} channels, {2 * num} or more are "
            "needed to pass the image on; start from a network with a larger channel_base"
        )
    undo = 1 / (math.sqrt(2) * (1 + LRELU_SLOPE))  # of a pair's difference, behind a rectifier of gain sqrt(2)
    sign = torch.tensor([1.0, -1.0])
    top.fromrgb.bias[: 2 * num].zero_()
    top.fromrgb.weight[: 2 * num].zero_()
    top.conv0.bias[: 2 * num].zero_()
    top.conv0.weight[: 2 * num].zero_()
    top.conv1.weight.zero_()
    # With image skips inside ('resnet') the layer's gain is sqrt(2) sqrt(1/2) = 1 and the shortcut adds; the old first
    # layer's was sqrt(2), and the rectifier is homogeneous, so the missing factor goes inside.
    inside = math.sqrt(2) if top.architecture == "resnet" else 1.0
    response = below.fromrgb.weight[:, :, 0, 0] * below.fromrgb.weight_gain  # [O, num]
    for channel in range(num):
        pair = slice(2 * channel, 2 * channel + 2)
        top.fromrgb.weight[pair, channel, 0, 0] = sign / top.fromrgb.weight_gain
        top.conv0.weight[pair, pair, 1, 1] = torch.outer(sign, sign) * undo / top.conv0.weight_gain
        weight = response[:, channel, None] * sign * undo * inside
        top.conv1.weight[:, pair, 1, 1] = weight / top.conv1.weight_gain
    top.conv1.bias.copy_(below.fromrgb.bias * inside)
    if top.architecture == "resnet":
        top.skip.weight.zero_()


def _halved(old: Networks, taps: Tensor, seed: int) -> Change:
    have = old.G_ema.img_resolution
    wanted = have // 2
    num = max(NUM_FIT_IMAGES, NUM_FIT_PIXELS // wanted**2)

    def generator(G: Any) -> Any:
        widths = _widths(G)
        if widths.get("num_fp16_res"):
            widths["num_fp16_res"] -= 1
        new = _rebuilt(G, img_resolution=wanted, synthesis_kwargs=widths)
        _fit_torgb(new, upfirdn2d.downsample2d(samples(G, num, seed), taps), seed)
        return new

    def discriminator(D: Any) -> Any:
        new = _rebuilt(D, img_resolution=wanted, num_fp16_res=max(_fp16(D) - 1, 0))
        first = getattr(new, f"b{wanted}")
        if first.architecture != "skip":
            img = samples(old.G_ema, NUM_FIT_IMAGES, seed)
            small = upfirdn2d.downsample2d(img, taps)
            features, _ = getattr(D, f"b{have}")(None, upfirdn2d.upsample2d(small, taps), force_fp32=True)
            _fit_fromrgb(first.fromrgb, small, features)
        return new

    return Change(
        _each(old, generator, discriminator),
        what=f"{have} to {wanted} pixels",
        rule="the top block dropped; the new last image layer fitted to the downsampled images, "
        "the discriminator's new first layer to what its dropped block gave",
        view="the old image downsampled with the network's filter",
        image=lambda img: upfirdn2d.downsample2d(img, taps),
        back=lambda img: upfirdn2d.upsample2d(img, taps),
    )


def _fit_torgb(G: Any, wanted: Tensor, seed: int) -> None:
    """Least squares: the last image layer, whose image is linear in its weights, for wanted images of `samples`.

    What is fitted is what the image lacks; a slight pull to nothing decides where the features do not.
    """
    layer = getattr(G.synthesis, f"b{G.img_resolution}").torgb
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda _, args, __: seen.append(args[:2]))
    try:
        lacking = wanted - samples(G, len(wanted), seed)
    finally:
        hook.remove()
    num = layer.weight.shape[1] + 1
    gram, moment = torch.zeros([num, num]).double(), torch.zeros([num, wanted.shape[1]]).double()
    for (x, w), rest in zip(seen, lacking.split(len(seen[0][0]))):
        x = x * (layer.affine(w) * layer.weight_gain)[:, :, None, None]
        rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).permute(0, 2, 3, 1).reshape(-1, num).double()
        gram += rows.t() @ rows
        moment += rows.t() @ rest.permute(0, 2, 3, 1).reshape(-1, wanted.shape[1]).double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, moment).float()  # [I + 1, C]
    layer.weight.add_(solution[:-1].t()[:, :, None, None])
    layer.bias.add_(solution[-1])


def _fit_fromrgb(layer: Any, img: Tensor, features: Tensor) -> None:
    """Least squares: what stands before the rectifier, as an affine function of the pixel, for wanted `features`."""
    pixels = img.permute(0, 2, 3, 1).reshape(-1, img.shape[1])
    wanted = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]) / math.sqrt(2)
    if layer.activation == "lrelu":
        wanted = torch.where(wanted < 0, wanted / LRELU_SLOPE, wanted)
    design = torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1).double()
    solution = torch.linalg.lstsq(design, wanted.double()).solution.float()  # [C + 1, O]
    layer.weight.copy_((solution[:-1].t() / layer.weight_gain)[:, :, None, None])
    layer.bias.copy_(solution[-1])


def _conditional(old: Networks, num: int, seed: int) -> Change:
    def generator(G: Any) -> Any:
        with seeding.scoped(seed, "surgery", "classes"):
            new = _rebuilt(G, c_dim=num)
        first, origin = new.mapping.fc0, G.mapping.fc0
        first.weight.zero_()  # what comes from the label starts without effect
        first.weight[:, : G.z_dim] = origin.weight * (origin.weight_gain / first.weight_gain)
        return new

    def discriminator(D: Any) -> Any:
        with seeding.scoped(seed, "surgery", "classes"):
            new = _rebuilt(D, c_dim=num)
            width = new.b4.cmap_dim
            noise = torch.randn([width, D.b4.out.weight.shape[1]])
        last = getattr(new.mapping, f"fc{new.mapping.num_layers - 1}")
        gain = 1.0 if last.activation == "linear" else math.sqrt(2)
        last.weight.zero_()  # every label is mapped to ones …
        last.bias.fill_(1 / (gain * last.bias_gain))
        # … so the logit is the sum of the rows over sqrt(width): the old row in each, plus noise that sums to zero,
        # without which all rows would learn the same for ever.
        new.b4.out.weight.copy_(D.b4.out.weight / math.sqrt(width) + noise - noise.mean(dim=0))
        new.b4.out.bias.copy_(D.b4.out.bias.expand(width) / math.sqrt(width))
        return new

    return Change(
        _each(old, generator, discriminator),
        what=f"unconditional to {num} classes",
        rule="every class starts as the old network",
        old_class=lambda index: None,
    )


def _unconditional(old: Networks, keep_class: int | None, seed: int) -> Change:
    have = old.G_ema.c_dim
    if have == 0:
        raise ValueError("--classes 0: this network is unconditional already")
    if keep_class is None or not 0 <= keep_class < have:
        raise ValueError(f"--classes 0 needs --keep-class, the class that remains: 0 to {have - 1}")
    label = torch.nn.functional.one_hot(torch.tensor([keep_class]), have).float()

    def generator(G: Any) -> Any:
        new = _rebuilt(G, c_dim=0)
        first, origin = new.mapping.fc0, G.mapping.fc0
        embedded = G.mapping.embed(label)
        embedded = embedded * (embedded.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        first.weight.copy_(origin.weight[:, : G.z_dim] * (origin.weight_gain / first.weight_gain))
        constant = embedded @ origin.weight[:, G.z_dim :].t() * origin.weight_gain
        first.bias.copy_(origin.bias + constant[0] / origin.bias_gain)
        if hasattr(new.mapping, "w_avg"):  # the old one is the mean over all classes
            z = torch.randn([10_000, G.z_dim], generator=seeding.generator(seed, "surgery", "w_avg"))
            new.mapping.w_avg.copy_(new.mapping(z, None)[:, 0].mean(dim=0))
        return new

    def discriminator(D: Any) -> Any:
        new = _rebuilt(D, c_dim=0)
        mapped = D.mapping(None, label)[0] / math.sqrt(D.b4.cmap_dim)  # [d]
        new.b4.out.weight.copy_((mapped @ D.b4.out.weight)[None])
        new.b4.out.bias.copy_((mapped @ D.b4.out.bias)[None])
        return new

    return Change(
        _each(old, generator, discriminator),
        what=f"class {keep_class} of {have}, unconditional",
        rule="the label's constant share folded into biases; the average of w measured anew for this class",
        old_class=lambda index: keep_class,
    )


def _remapped(old: Networks, mapped: list[int | None], seed: int) -> Change:
    have = old.G_ema.c_dim

    def embedding(new: Any, origin: Any) -> None:
        """Columns of the label embedding; it divides by the root of the number of classes."""
        scale = origin.weight_gain / new.weight_gain
        noise = torch.randn(
            [len(mapped), new.weight.shape[0]], generator=seeding.generator(seed, "surgery", "embedding")
        )
        mean, spread = origin.weight.mean(dim=1), origin.weight.std(dim=1)
        for index, old_class in enumerate(mapped):
            column = mean + spread * noise[index] if old_class is None else origin.weight[:, old_class]
            new.weight[:, index] = column * scale

    def generator(G: Any) -> Any:
        new = _rebuilt(G, c_dim=len(mapped))
        embedding(new.mapping.embed, G.mapping.embed)
        return new

    def discriminator(D: Any) -> Any:
        new = _rebuilt(D, c_dim=len(mapped))
        embedding(new.mapping.embed, D.mapping.embed)
        return new

    shown = ", ".join("new" if index is None else str(index) for index in mapped)
    return Change(
        _each(old, generator, discriminator),
        what=f"{have} to {len(mapped)} classes ({shown})",
        rule="columns of the label embeddings; new classes start from the mean of the old ones plus noise",
        old_class=lambda index: NO_CLASS if mapped[index] is None else mapped[index],
    )


def samples(G: Any, num: int, seed: int) -> Tensor:
    """Images of seeded latents and classes, float32 [num, C, R, R], in float32 arithmetic with constant noise."""
    random = seeding.generator(seed, "surgery", "samples")
    z = torch.randn([num, G.z_dim], generator=random)
    c = torch.zeros([num, 0])
    if G.c_dim:
        c = torch.nn.functional.one_hot(torch.randint(G.c_dim, [num], generator=random), G.c_dim).float()
    return torch.cat([G(a, b, noise_mode="const", force_fp32=True) for a, b in zip(z.split(8), c.split(8))])


def _each(old: Networks, generator: Callable[[Any], Any], discriminator: Callable[[Any], Any]) -> Networks:
    with torch.no_grad():
        return Networks(generator(old.G), None if old.D is None else discriminator(old.D), generator(old.G_ema))


def _rebuilt(module: Any, **changes: Any) -> Any:
    """A new module of other constructor arguments, with the old one's numbers wherever name and shape agree."""
    kwargs = {**deepcopy(dict(module.init_kwargs)), **changes}
    new = type(module)(*module.init_args, **kwargs).eval().requires_grad_(False)
    _transplant(module, new)
    return new


def _transplant(source: Any, target: Any) -> int:
    """Copy what agrees in name and shape; returns how many tensors did."""
    have, count = source.state_dict(), 0
    with torch.no_grad():
        for name, tensor in target.state_dict().items():
            if name in have and have[name].shape == tensor.shape:
                tensor.copy_(have[name])
                count += 1
    return count


def _synthesis_blocks(G: Any) -> list[Any]:
    return [getattr(G.synthesis, f"b{res}") for res in G.synthesis.block_resolutions]


def _fromrgbs(D: Any) -> list[Any]:
    blocks = [getattr(D, f"b{res}") for res in (*D.block_resolutions, 4)]
    return [block.fromrgb for block in blocks if hasattr(block, "fromrgb")]


def _widths(G: Any) -> dict[str, Any]:
    """Constructor arguments of the synthesis network."""
    return dict(G.init_kwargs.get("synthesis_kwargs") or {})


def _fp16(D: Any) -> int:
    return D.init_kwargs.get("num_fp16_res") or 0


def _one_more(D: Any) -> int:
    return _fp16(D) + 1 if _fp16(D) else 0


def _channel_map(have: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Matrix [wanted, have] and offset [wanted] of a conversion of images in [-1, 1]."""
    colours = {1: torch.tensor([LUMA]), 3: torch.eye(3), 4: torch.cat([torch.eye(3), torch.zeros(1, 3)])}
    from_rgb = colours[wanted]  # [wanted, 3]
    to_rgb = {1: torch.ones(3, 1), 3: torch.eye(3), 4: torch.cat([torch.eye(3), torch.zeros(3, 1)], dim=1)}[have]
    matrix, offset = from_rgb @ to_rgb, torch.zeros(wanted)
    if have == wanted:
        matrix = torch.eye(have)
    elif wanted == 4:
        offset[3] = 1
    return matrix, offset


def _mix(img: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    return torch.einsum("oc,nchw->nohw", matrix, img) + offset[:, None, None]
