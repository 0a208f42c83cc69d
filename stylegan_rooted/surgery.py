"""Change the shape of the networks in a file: classes, channels, resolution, mapping depth, float16 layers.

Owns the order of the rules of `surgery_rules`, what is measured of each, and the files. Every change is exact where
exactness is possible; how far the new images and logits are from what the old networks say is told.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stylegan_rooted import destination
from stylegan_rooted.surgery_rules import (
    NO_CLASS,
    Change,
    Networks,
    Rule,
    channels,
    classes,
    map_depth,
    merge_adapter,
    new_discriminator,
    num_fp16_res,
    resolution,
    samples,
)
from torch_utils import images, misc, seeding
from training import network_file, network_pickle

NUM_PROBES = 16
NUM_DRAWN = 8


@dataclass(frozen=True)
class Step:
    """What one rule did, and how far the result is from what the old networks say.

    Attributes:
        what: the change in words.
        rule: how new numbers were made.
        view: what happens to the old image ("" where it stays as it is).
        image_error: largest |new image - view(old image)|, images in [-1, 1], over `NUM_PROBES` seeded latents.
        image_rms: root mean square of that difference.
        logit_error: the same of the discriminator's logits on the new images, relative to their spread over images
            (a standard deviation) where that is above 1; None without a discriminator.
    """

    what: str
    rule: str
    view: str
    image_error: float
    image_rms: float
    logit_error: float | None


def operate(networks: Networks, changes: list[Rule], *, seed: int = 0) -> tuple[Networks, list[Step]]:
    """Apply changes one after the other, measuring each.

    Args:
        networks: in eval mode, float32 on the CPU.
        changes: results of `classes`, `channels`, `resolution`, …
        seed: of the latents used for measuring.
    """
    steps = []
    for change in changes:
        made = change(networks)
        steps.append(_measure(networks, made, seed))
        networks = made.networks
    return networks, steps


def plan(
    network: Networks,
    *,
    num_channels: int | None = None,
    num_classes: int | None = None,
    class_map: list[int | None] | None = None,
    keep_class: int | None = None,
    side: int | None = None,
    depth: int | None = None,
    fp16: int | None = None,
    adapter: str | None = None,
    fresh_d: bool = False,
    start_d: Any = None,
    seed: int = 0,
) -> list[Rule]:
    """The rules for a set of wishes, in an order in which they go together.

    A resolution that is several doublings or halvings away becomes as many steps. A file without a discriminator gets
    one at the end.

    Raises:
        ValueError: wishes that exclude each other, or none.
    """
    check_wishes(
        num_classes=num_classes,
        class_map=class_map,
        keep_class=keep_class,
        side=side,
        fresh_d=fresh_d,
        has_start_d=start_d is not None,
    )
    rules: list[Rule] = [] if adapter is None else [merge_adapter(adapter)]
    if num_channels is not None:
        rules.append(channels(num_channels))
    if num_classes is not None or class_map is not None:
        wanted = class_map if class_map is not None else num_classes
        rules.append(classes(wanted, keep_class=keep_class, seed=seed))  # type: ignore[arg-type]
    if depth is not None:
        rules.append(map_depth(depth))
    if side is not None:
        rules += [resolution(step, seed=seed) for step in _sides(network.G_ema.img_resolution, side)]
    if fp16 is not None:
        rules.append(num_fp16_res(fp16))
    if fresh_d or start_d is not None or network.D is None:
        rules.append(new_discriminator(start=start_d, seed=seed))
    if not rules:
        raise ValueError("nothing to change; see --help for what can be")
    return rules


def check_wishes(
    *,
    num_classes: int | None,
    class_map: list[int | None] | None,
    keep_class: int | None,
    side: int | None,
    fresh_d: bool,
    has_start_d: bool,
) -> None:
    """Check what can be checked without a network.

    Raises:
        ValueError: wishes that exclude each other, or a resolution that no network has.
    """
    if num_classes is not None and class_map is not None:
        raise ValueError("--classes and --map-classes exclude each other; a map tells the number of classes, too")
    if num_classes == 1 or (class_map is not None and len(class_map) < 2):
        raise ValueError("--classes: a conditional network has at least 2 classes; 0 makes it unconditional")
    if fresh_d and has_start_d:
        raise ValueError("--new-d and --d-from exclude each other: random numbers, or those of a file; give one")
    if keep_class is not None and num_classes != 0:
        raise ValueError("--keep-class is for --classes 0, which keeps one class")
    if num_classes == 0 and keep_class is None:
        raise ValueError("--classes 0 needs --keep-class, the class that remains")
    if side is not None and not (side >= 8 and side & (side - 1) == 0):
        raise ValueError(f"--resolution {side} is not a power of two from 8 up")


def parse_class_map(text: str) -> list[int | None]:
    """Read `0,2,new`: the old class that each new one starts as.

    Raises:
        ValueError: unreadable.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "new" or (part.isascii() and part.isdigit()) for part in parts):
        raise ValueError(f"--map-classes {text}: write the old class of each new one, or new, e.g. 0,2,new")
    return [None if part == "new" else int(part) for part in parts]


def run(
    source: str,
    dest: str,
    *,
    start_d: str | None = None,
    grid: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    **wishes: Any,
) -> list[Step]:
    """Open a file, change its networks, write them, and draw before and after.

    Args:
        source: any network file that `network_file.load` opens.
        dest: snapshot to write.
        start_d: network file whose discriminator a new one starts from.
        grid: PNG with the same latents before and after each step, or None.
        overwrite: whether existing files are replaced, when the new ones are complete; those read never are.
        seed: of new numbers and of the latents used for measuring.
        wishes: see `plan`.

    Raises:
        ValueError, OSError: a wish that cannot be fulfilled, or a file that cannot be read or written; nothing written.
    """
    sources = [given for given in (source, start_d, wishes.get("adapter")) if given is not None]
    destination.check_file(dest, name="DEST", sources=sources, overwrite=overwrite)
    if grid is not None:
        destination.check_file(grid, name="--grid", sources=sources, overwrite=overwrite)
    loaded = network_file.load(source)
    given = Networks(loaded.G if loaded.G is not None else loaded.G_ema, loaded.D, loaded.G_ema)
    other = network_file.load(start_d).D if start_d else None
    if start_d and other is None:
        raise ValueError(f"--d-from {start_d}: this file holds no discriminator; give a full snapshot")
    _check_finite(given, f"{source}: ")
    networks, steps = operate(given, plan(given, start_d=other, seed=seed, **wishes), seed=seed)
    _check_finite(networks, f"{source}, changed: ")
    if not all(math.isfinite(step.image_rms) for step in steps):
        raise ValueError(f"{source}, changed: its images are not finite; nothing was written")
    network_pickle.save(dest, G=networks.G, D=networks.D, G_ema=networks.G_ema, augment_pipe=loaded.augment_pipe)
    if grid is not None:
        draw(given.G_ema, networks.G_ema, grid, seed)
    return steps


def draw(before: Any, after: Any, path: str, seed: int) -> None:
    """Two rows of images of the same latents, the old network's above, enlarged to the larger side by repetition."""
    side = max(before.img_resolution, after.img_resolution)
    rows = []
    for G in (before, after):
        img = images.to_uint8(samples(G, NUM_DRAWN, seed))
        img = images.opaque(img).expand(-1, 3, -1, -1)
        rows.append(img.repeat_interleave(side // img.shape[2], 2).repeat_interleave(side // img.shape[3], 3))
    labels = images.GridLabels(["before", "after"], None)
    images.save_grid(path, torch.cat(rows), (NUM_DRAWN, 2), labels)


def _check_finite(networks: Networks, where: str) -> None:
    """Raises ValueError where a number of a network is NaN or infinite: what was measured of it would mean nothing."""
    for key in ("G", "D", "G_ema"):
        net = getattr(networks, key)
        name = None if net is None else misc.first_nonfinite(net)
        if name is not None:
            raise ValueError(f"{where}{key}.{name} holds numbers that are not finite; nothing was written")


def _sides(have: int, wanted: int) -> list[int]:
    """The resolutions on the way, doubling or halving; both are powers of two."""
    steps = []
    while have != wanted:
        have = have * 2 if wanted > have else have // 2
        steps.append(have)
    if not steps:
        raise ValueError(f"--resolution {wanted}: this network has that resolution already")
    return steps


@torch.no_grad()
def _measure(old: Networks, made: Change, seed: int) -> Step:
    new = made.networks
    num_classes = max(new.G_ema.c_dim, 1)
    pairs = [(index, made.old_class(index)) for index in range(num_classes)]
    pairs = [(index, was) for index, was in pairs if was != NO_CLASS]
    group = getattr(getattr(old.D, "b4", None), "mbstd", None)
    num = math.lcm(NUM_PROBES, (group.group_size or 1) if group else 1)
    z = torch.randn([num, new.G_ema.z_dim], generator=seeding.generator(seed, "surgery", "probes"))
    c_new = _labels([pairs[i % len(pairs)][0] for i in range(num)], new.G_ema)
    c_old = _labels([pairs[i % len(pairs)][1] or 0 for i in range(num)], old.G_ema)
    options = {"noise_mode": "const", "force_fp32": True}
    after, before = new.G_ema(z, c_new, **options), old.G_ema(z, c_old, **options)
    logit_error = None
    if old.D is not None and made.compares_logits:
        ours = new.D(after, c_new, force_fp32=True)
        theirs = old.D(made.back(after), c_old, force_fp32=True)
        logit_error = float((ours - theirs).abs().max() / max(float(theirs.std()), 1.0))
    difference = after - made.image(before)
    image_error, image_rms = float(difference.abs().max()), float(difference.square().mean().sqrt())
    return Step(made.what, made.rule, made.view, image_error, image_rms, logit_error)


def _labels(indices: list[int], G: Any) -> Tensor:
    if not G.c_dim:
        return torch.zeros([len(indices), 0])
    return torch.nn.functional.one_hot(torch.tensor(indices), G.c_dim).float()

