"""Look at a data set before training on it: what would be left out, what is there twice, what does not belong.

Owns the findings; knows nothing of HTML (`report_data`) and builds nothing (`dataset_tool`). Every rule has its
threshold among the constants below. One pass over the files; per image a few small arrays are kept, no pixels.
"""

import base64
import hashlib
import io
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from metrics.features import get_extractor
from stylegan_rooted.build_options import FITS
from stylegan_rooted.dataset_tool import fit
from stylegan_rooted.evaluation import FEATURE_NET
from torch_utils import images, seeding
from training.dataset import LABELS_FILE, DatasetError, open_source, parse_labels, read_meta

NEAR_BITS = 4  # of the 64 of a difference hash that may differ between near duplicates
FLAT_BITS = 4  # a hash with fewer set, or unset, bits belongs to a picture without features: not compared
NEAR_SIDE = 8
NEAR_COLOUR = 6.0  # most root mean square difference of so many colours, in levels of 255, of near duplicates
BORDER_SHARE = 0.04  # of the side that must be of one colour, on two opposite sides
BORDER_SPREAD = 6  # largest range of grey levels within a border
GREY_SPREAD = 8  # largest difference between channels of a grey image stored in colour
GREY_AMONG = 0.5  # grey images are a finding where they are fewer than this share
BORDER_WHITE = 248  # a stripe at least so light is a margin of the page, as behind transparent pixels: no bar
BLUR_RATIO = 0.004  # `_detail` below which an image counts as enlarged
REPEATED_LINES = 8  # fewer lines or columns that differ from the one before may be a plain drawing
BLANK_SPREAD = 2  # largest range of levels of an image of one colour
SMALL_AMONG = 0.5  # short sides below this share of the usual one are named
EXTREME_ASPECT = 1.6
IMBALANCE = 10.0  # largest class over smallest
SMALL_CLASS = 50
ASYMMETRY_SIDE = 32
ASYMMETRY_DRAWS = 500
ASYMMETRY_P = 0.01
ASYMMETRY_SHARE = 0.01  # common to all images, of what sets them apart from their mirror images: large from here on
ASYMMETRY_MIN_IMAGES = 20
MAX_ASYMMETRY_IMAGES = 2000
THUMB_SIDE = 112
MAX_THUMBS = 24  # per finding



@dataclass
class Finding:
    """One thing found.

    Attributes:
        code: short name for scripts.
        severity: "error" (files that cannot be used), "warning" (worth a decision) or "note".
        title: one line.
        advice: what to do.
        files: names concerned, all of them.
        groups: for duplicates: which belong together.
        thumbs: up to `MAX_THUMBS` pictures: (name, PNG as base64).
    """

    code: str
    severity: str
    title: str
    advice: str
    files: list[str] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)
    thumbs: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Check:
    """What `check` found, and the figures beside it."""

    source: str
    num_files: int
    num_images: int
    sizes: list[tuple[str, int]]
    modes: list[tuple[str, int]]
    classes: list[tuple[str, int]]
    mirror: dict[str, Any]
    findings: list[Finding]

    @property
    def clean(self) -> bool:
        """No errors and no warnings."""
        return all(finding.severity == "note" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without thumbnails."""
        record = asdict(self)
        for finding in record["findings"]:
            del finding["thumbs"]
        return {**record, "clean": self.clean}


@dataclass
class _Seen:
    """What is kept of one image."""

    name: str
    size: tuple[int, int]
    mode: str
    digest: str
    bits: int
    grey: bool
    blank: bool
    border: bool
    detail: float
    repeated: bool  # every pixel stands for several: enlarged without smoothing
    transparent: bool
    colours: np.ndarray  # uint8 [NEAR_SIDE, NEAR_SIDE, 3]
    small: np.ndarray  # [S, S] grey levels in [0, 1]


def check(
    path: str, *, resolution: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Check:
    """Look at every file of a folder (recursive) or zip.

    Args:
        path: folder or .zip.
        resolution: what it is to be trained at; images below it are named. None leaves that question out.
        progress: called with (files done, files to do).

    Raises:
        DatasetError: no such path, or no image in it.
    """
    source = open_source(path)
    seen, unreadable = [], [(name, "not an image file") for name in source.others if name != LABELS_FILE]
    for done, name in enumerate(source.names):
        try:
            seen.append(_look(name, source.read(name)))
        except (ValueError, DatasetError) as error:
            unreadable.append((name, " ".join(str(error).split())))
        if progress:
            progress(done + 1, len(source.names))
    thumbs = _Thumbs(source)
    findings = [
        *_unreadable(unreadable),
        *_duplicates(seen, thumbs),
        *_blank(seen, thumbs),
        *_sizes(seen, resolution, thumbs),
        *_colours(seen, thumbs),
        *_borders(seen, thumbs),
    ]
    classes, class_findings = _classes(source, [s.name for s in seen])
    mirror = asymmetry(np.stack([s.small for s in seen])) if seen else {"verdict": "too few images"}
    findings += class_findings + _mirror(mirror)
    return Check(
        source=path,
        num_files=len(source.names) + sum(name != LABELS_FILE for name in source.others),
        num_images=len(seen),
        sizes=[(f"{w}x{h}", n) for (w, h), n in Counter(s.size for s in seen).most_common(12)],
        modes=Counter(s.mode for s in seen).most_common(),
        classes=classes,
        mirror=mirror,
        findings=findings,
    )


def asymmetry(small: np.ndarray) -> dict[str, Any]:
    """Test whether mirroring changes what the images are, as a set.

    If the set were symmetric, an image would be as likely as its mirror image: so each difference of the two might as
    well have the other sign. The statistic is the squared length of the mean difference, of pixels and of the embedded
    feature network's features, against random signs.

    Args:
        small: [N, S, S] in [0, 1].

    Returns:
        `verdict` ("mirror looks safe", "mirror changes the images", "... a little", "too few images"), `p_pixels`,
        `p_features` (the share of random signs with a statistic at least as large; Phipson & Smyth 2010 add one),
        `share` (how large the difference is, which p does not say: see `_sign_test`), `num_images`.
    """
    if len(small) < ASYMMETRY_MIN_IMAGES:
        return {"verdict": "too few images", "num_images": len(small)}
    random = np.random.default_rng(seeding.derive(0, "asymmetry"))
    if len(small) > MAX_ASYMMETRY_IMAGES:
        small = small[random.choice(len(small), MAX_ASYMMETRY_IMAGES, replace=False)]
    p_pixels, pixels = _sign_test((small - small[:, :, ::-1]).reshape(len(small), -1), random)
    p_features, features = _sign_test(_features(small) - _features(small[:, :, ::-1]), random)
    verdict = "mirror looks safe"
    if min(p_pixels, p_features) < ASYMMETRY_P / 2:  # two looks
        large = max(pixels, features) >= ASYMMETRY_SHARE
        verdict = "mirror changes the images" + ("" if large else " a little")
    return {
        "verdict": verdict,
        "p_pixels": p_pixels,
        "p_features": p_features,
        "share": max(pixels, features),
        "num_images": len(small),
    }


def difference_hash(grey: np.ndarray) -> int:
    """64 bits: whether each of 8x8 cells is darker than its right neighbour; grey [8, 9]."""
    bits = (grey[:, :-1] < grey[:, 1:]).flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(hashes: list[int], most: int = NEAR_BITS) -> list[tuple[int, int]]:
    """Pairs of positions whose hashes differ in at most `most` bits; featureless ones are left out."""
    kept = [i for i, h in enumerate(hashes) if FLAT_BITS <= bin(h).count("1") <= 64 - FLAT_BITS]
    values = np.array([hashes[i] for i in kept], dtype=np.uint64)
    table = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)
    pairs = []
    for at, value in enumerate(values):
        differing = (values[at + 1 :] ^ value).view(np.uint8).reshape(-1, 8)
        for other in np.flatnonzero(table[differing].sum(axis=1) <= most):
            pairs.append((kept[at], kept[at + 1 + int(other)]))
    return pairs


# One image.


def _look(name: str, data: bytes) -> _Seen:
    """Everything that is kept of one file.

    Raises:
        ValueError: it cannot be decoded.
    """
    image = images.open_image(data)
    mode = image.mode
    transparent = images.has_alpha(image)
    image = images.to_grey_or_rgb(image)
    pixels = np.asarray(image.convert("RGB"))
    grey = np.asarray(image.convert("L"))
    if min(grey.shape) < 1:
        raise ValueError("has no pixels")
    coloured = image.mode == "RGB"
    return _Seen(
        name=name,
        size=image.size,
        mode=mode,
        digest=hashlib.sha256(str(image.size).encode() + pixels.tobytes()).hexdigest(),
        bits=difference_hash(np.asarray(image.convert("L").resize((9, 8), 3 if min(image.size) > 16 else 1))),
        grey=coloured and int(np.ptp(pixels.astype(np.int16), axis=2).max(initial=0)) <= GREY_SPREAD,
        blank=int(np.ptp(pixels.reshape(-1, 3), axis=0).max()) <= BLANK_SPREAD,
        border=_has_border(grey),
        detail=_detail(grey),
        repeated=_is_repeated(pixels),
        transparent=transparent,
        colours=np.asarray(image.convert("RGB").resize((NEAR_SIDE, NEAR_SIDE), 4)),  # box: the mean of each cell
        small=np.asarray(image.convert("L").resize((ASYMMETRY_SIDE, ASYMMETRY_SIDE), 3), dtype=np.float32) / 255,
    )


def _has_border(grey: np.ndarray) -> bool:
    """Stripes of one colour along two opposite sides, and between straight edges something that fills the width.

    White stripes are margins. So is what lies around a subject that does not reach the other two sides.
    """
    for lines in (grey, grey.T):
        width = max(math.ceil(BORDER_SHARE * len(lines)), 2)
        stripes = np.stack([lines[:width], lines[-width:]])
        if len(lines) < 4 * width or int(np.ptp(stripes)) > BORDER_SPREAD or np.median(stripes) >= BORDER_WHITE:
            continue
        unlike = np.abs(lines.astype(np.int16) - int(np.median(stripes))) > BORDER_SPREAD
        begun, filled = np.flatnonzero(unlike.any(axis=1)), np.flatnonzero(unlike.mean(axis=1) > 0.5)
        if len(filled) < len(lines) // 4:
            continue
        straight = filled[0] - begun[0] <= width and begun[-1] - filled[-1] <= width
        body, end = unlike[filled[0] : filled[-1] + 1], lines.shape[1] // 16 or 1
        if straight and min(body[:, :end].mean(), body[:, -end:].mean()) > 0.5:
            return True
    return False


def _is_repeated(pixels: np.ndarray) -> bool:
    """Whether [H, W, 3] was enlarged to twice its size or more by repeating pixels.

    Then no two lines in a row differ from the one before each, and no two columns; a plain drawing has few that do.
    """
    for axis in (0, 1):
        changes = np.asarray(np.diff(pixels.astype(np.int16), axis=axis).any(axis=(1 - axis, 2)))
        if changes.sum() < REPEATED_LINES or (changes[1:] & changes[:-1]).any():
            return False
    return True


def _detail(grey: np.ndarray) -> float:
    """Mean power of the finest frequencies (0.35 to 0.5 cycles a pixel) over that at a third of them.

    Next to nothing for what was enlarged to two to four times its size; more than that also empties the middle.
    """
    side = min(*grey.shape, 512)
    if side < 32:
        return 1.0
    top, left = (grey.shape[0] - side) // 2, (grey.shape[1] - side) // 2
    window = np.hanning(side)
    part = grey[top : top + side, left : left + side].astype(np.float64)
    power = np.abs(np.fft.fft2((part - part.mean()) * window[:, None] * window[None, :])) ** 2
    frequency = np.abs(np.fft.fftfreq(side))
    radius = np.maximum(frequency[:, None], frequency[None, :])
    middle = power[(radius > 0.10) & (radius <= 0.16)].mean()
    return float(power[radius > 0.35].mean() / middle) if middle > 1 else 1.0


# The findings.


def _unreadable(bad: list[tuple[str, str]]) -> list[Finding]:
    if not bad:
        return []
    reasons = "; ".join(f"{name}: {why}" for name, why in bad[:3])
    return [Finding("unreadable", "error", f"{len(bad)} files cannot be used", f"Remove or mend them ({reasons}).",
                    [name for name, _ in bad])]  # fmt: skip


def _duplicates(seen: list[_Seen], thumbs: "_Thumbs") -> list[Finding]:
    findings = []
    by_digest: dict[str, list[str]] = {}
    for s in seen:
        by_digest.setdefault(s.digest, []).append(s.name)
    same = [names for names in by_digest.values() if len(names) > 1]
    if same:
        extra = sum(len(names) - 1 for names in same)
        findings.append(Finding(
            "duplicate", "warning", f"{extra} images are there twice or more",
            "Keep one of each group: a repeated image weighs more, and is what a network memorises first.",
            [name for names in same for name in names], same, thumbs.of([n for names in same for n in names]),
        ))  # fmt: skip
    firsts = [s for s in seen if by_digest[s.digest][0] == s.name]
    pairs = [(a, b) for a, b in near_pairs([s.bits for s in firsts]) if _alike(firsts[a].colours, firsts[b].colours)]
    groups = _groups(pairs, [s.name for s in firsts])
    if groups:
        findings.append(Finding(
            "near-duplicate", "warning", f"{sum(map(len, groups)) - len(groups)} images are nearly copies of others",
            "Look at the groups: other sizes and re-saved files of one picture count like duplicates.",
            [name for names in groups for name in names], groups, thumbs.of([n for names in groups for n in names]),
        ))  # fmt: skip
    return findings


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether colours differ as little as those of one picture saved twice; a hash of grey levels cannot tell."""
    return float(np.sqrt(np.mean((a.astype(np.float32) - b) ** 2))) <= NEAR_COLOUR


def _blank(seen: list[_Seen], thumbs: "_Thumbs") -> list[Finding]:
    blank = [s.name for s in seen if s.blank]
    if not blank:
        return []
    return [Finding(
        "blank", "warning", f"{len(blank)} images are of one colour", "Leave them out: nothing is to be seen on them.",
        blank, thumbs=thumbs.of(blank),
    )]  # fmt: skip


def _sizes(seen: list[_Seen], resolution: int | None, thumbs: "_Thumbs") -> list[Finding]:
    findings = []
    if resolution is not None:
        tiny = [s.name for s in seen if min(s.size) < resolution]
        if tiny:
            findings.append(Finding(
                "too-small", "warning", f"{len(tiny)} images are smaller than {resolution} pixels",
                "They would be enlarged, and the network would learn their blur; leave them out or train smaller.",
                tiny, thumbs=thumbs.of(tiny),
            ))  # fmt: skip
    elif seen:
        usual = int(np.median([min(s.size) for s in seen]))
        tiny = [s.name for s in seen if min(s.size) < SMALL_AMONG * usual]
        if tiny:
            findings.append(Finding(
                "too-small", "warning", f"{len(tiny)} images are smaller than half of the usual {usual} pixels",
                "They would be enlarged; leave them out, or say --resolution to have all named that are too small.",
                tiny, thumbs=thumbs.of(tiny),
            ))  # fmt: skip
    large = [s for s in seen if resolution is None or min(s.size) >= resolution]
    blurred = [s.name for s in large if (s.detail < BLUR_RATIO and not s.blank) or s.repeated]
    if blurred:
        findings.append(Finding(
            "enlarged", "warning", f"{len(blurred)} images look enlarged: there is no detail at their own size",
            "Their true resolution is half or less; leave them out or train smaller.",
            blurred, thumbs=thumbs.of(blurred),
        ))  # fmt: skip
    sizes, shapes = {s.size for s in seen}, [s.name for s in seen if s.size[0] != s.size[1]]
    extreme = [s.name for s in seen if max(s.size) > EXTREME_ASPECT * min(s.size)]
    if len(sizes) > 1:
        findings.append(Finding(
            "mixed-sizes", "note", f"{len(sizes)} different sizes",
            "`dataset build --resolution N` makes them equal.",
        ))  # fmt: skip
    if shapes:
        severity = "warning" if extreme else "note"
        shown = extreme or shapes
        findings.append(Finding(
            "not-square", severity, f"{len(shapes)} images are not square, {len(extreme)} of them by far",
            "Choose how they become square: `dataset build --fit crop`, `pad` or `stretch`, in this order below.",
            shown, thumbs=thumbs.fitted(shown),
        ))  # fmt: skip
    return findings


def _colours(seen: list[_Seen], thumbs: "_Thumbs") -> list[Finding]:
    findings = []
    grey = [s.name for s in seen if s.grey or s.mode in ("L", "1", "LA", "I;16", "I")]
    if grey and len(grey) < GREY_AMONG * len(seen):
        findings.append(Finding(
            "grey-among-colour", "warning", f"{len(grey)} grey images among colour ones",
            "Leave them out, or expect grey samples; or make all grey with `dataset build --grey`.",
            grey, thumbs=thumbs.of(grey),
        ))  # fmt: skip
    modes = Counter(s.mode for s in seen)
    if len(modes) > 1:
        rare = [s.name for s in seen if modes[s.mode] < len(seen) / 2]
        findings.append(Finding(
            "mixed-modes", "note", "kinds of pixels: " + ", ".join(f"{n} {m}" for m, n in modes.most_common()),
            "`dataset build` converts them; look whether colours come out right, CMYK above all.",
            rare, thumbs=thumbs.of(rare),
        ))  # fmt: skip
    transparent = [s.name for s in seen if s.transparent]
    if transparent:
        findings.append(Finding(
            "transparent", "note", f"{len(transparent)} images have transparency",
            "It is laid on --background (white); `dataset build --rgba` keeps it.",
            transparent, thumbs=thumbs.of(transparent),
        ))  # fmt: skip
    return findings


def _borders(seen: list[_Seen], thumbs: "_Thumbs") -> list[Finding]:
    framed = [s.name for s in seen if s.border]
    if not framed or len(framed) > len(seen) / 2:  # where most have one, it is part of the subject
        return []
    return [Finding(
        "border", "warning", f"{len(framed)} images have bars of one colour along opposite sides",
        "Crop them: a generator learns bars quickly and draws them on others.", framed, thumbs=thumbs.of(framed),
    )]  # fmt: skip


def _classes(source: Any, names: list[str]) -> tuple[list[tuple[str, int]], list[Finding]]:
    """Images per class, from dataset.json or else from folders, and what is wrong with that."""
    folders = [name.split("/", 1)[0] for name in names if "/" in name]
    try:
        meta = read_meta(source)
        labels = parse_labels(meta, source.names, source.path)
    except DatasetError as error:
        return [], [Finding("labels", "error", "the labels cannot be used", str(error))]
    if labels is not None and labels.ndim == 1:
        counts = Counter(f"class {i}" for i in labels)
    elif len(folders) == len(names) and "build" not in meta:  # `dataset build` numbers its folders, a thousand each
        counts = Counter(folders)
    else:
        counts = Counter()
    table = counts.most_common()
    if len(table) < 2:
        return [], []
    largest, smallest = table[0][1], table[-1][1]
    findings = []
    if largest > IMBALANCE * smallest or smallest < SMALL_CLASS:
        few = [name for name, count in table if count < SMALL_CLASS]
        findings.append(Finding(
            "class-balance", "warning", f"{len(table)} classes of {smallest} to {largest} images",
            "If you mean to train with --cond: gather more of the small ones or join them"
            + (f" ({', '.join(few[:5])}{' …' if len(few) > 5 else ''} below {SMALL_CLASS})." if few else "."),
        ))  # fmt: skip
    return table, findings


def _mirror(result: dict[str, Any]) -> list[Finding]:
    if not result["verdict"].startswith("mirror changes"):
        return []
    small = result["verdict"].endswith("a little")
    p, share = min(result["p_pixels"], result["p_features"]), 100 * result["share"]
    size = f"{share:.2g} % of what sets an image apart from its mirror image is common to all"
    return [Finding(
        "asymmetric", "note", f"left and right differ{' a little' if small else ''} ({size}; by chance: p ≤ {p:.2g})",
        "No chance, but small: --mirror costs little, unless text, flags or faces in profile are what you train on."
        if small else
        "Do not use --mirror: text, faces in profile or light from one side would be drawn both ways.",
    )]  # fmt: skip


# Tools.


def _groups(pairs: list[tuple[int, int]], names: list[str]) -> list[list[str]]:
    """Connected components of pairs."""
    parent = list(range(len(names)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        parent[root(b)] = root(a)
    members: dict[int, list[str]] = {}
    for i, name in enumerate(names):
        members.setdefault(root(i), []).append(name)
    return [group for group in members.values() if len(group) > 1]


def _sign_test(differences: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    """Whether the mean of differences [N, D] is zero, each being as likely with the other sign.

    Returns:
        (p-value; share of the mean squared difference that is common to all, at least 0, without the 1/N that chance
        gives).
    """
    num = len(differences)
    gram = differences.astype(np.float64) @ differences.astype(np.float64).T
    signs = random.choice([-1.0, 1.0], size=[ASYMMETRY_DRAWS, num])
    drawn = np.einsum("dn,dn->d", signs @ gram, signs)
    observed = gram.sum()
    if observed <= 1e-12 * np.trace(gram) or not np.trace(gram):
        return 1.0, 0.0
    p = float((1 + (drawn >= observed * (1 - 1e-12)).sum()) / (1 + ASYMMETRY_DRAWS))
    return p, float(max(observed / (num * np.trace(gram)) - 1 / num, 0) / (1 - 1 / num))


def _features(small: np.ndarray) -> np.ndarray:
    extractor = get_extractor("embedded", detector=FEATURE_NET)
    pixels = torch.from_numpy(np.ascontiguousarray(np.rint(small * 255).astype(np.uint8)))[:, None]
    return torch.cat([extractor(batch) for batch in pixels.split(64)]).numpy()


class _Thumbs:
    """Small pictures of files, made when a finding shows them."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._made: dict[str, str] = {}

    def of(self, names: list[str]) -> list[tuple[str, str]]:
        """The first `MAX_THUMBS` of the names."""
        return [(name, self._one(name)) for name in names[:MAX_THUMBS]]

    def fitted(self, names: list[str]) -> list[tuple[str, str]]:
        """For the first few: cropped, padded, stretched."""
        found = []
        for name in names[: MAX_THUMBS // len(FITS)]:
            image = images.to_grey_or_rgb(images.open_image(self._source.read(name)))
            for short, transform in FITS.items():
                found.append((f"{short}: {name}", _png(fit(image, THUMB_SIDE, transform))))
        return found

    def _one(self, name: str) -> str:
        if name not in self._made:
            image = images.to_grey_or_rgb(images.open_image(self._source.read(name))).copy()
            image.thumbnail((THUMB_SIDE, THUMB_SIDE))
            self._made[name] = _png(image)
        return self._made[name]


def _png(image: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=6)
    return base64.b64encode(stream.getvalue()).decode()
