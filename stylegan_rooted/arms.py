"""What a comparison is asked for, as text: arms, seeds, a grid of settings, a share of the work. Knows no runs.

losses = item {"," item}
item   = arm | setting                     a setting alone belongs to the arm before it
arm    = ("logistic" | "rooted") [":" setting]
setting = key "=" value
key    = "k" | "tail" | "scale" | "acts-on" | "gamma"

k        a number >= 1, or a:b@kimg (geometric from a to b over the first kimg)
tail     none, or T: linear beyond the margin -T
scale    paper, calibrated, or a factor
acts-on  both, D or G
gamma    weight of R1 in this arm, instead of the shared one
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from stylegan_rooted.losses import exact_text, parse_k
from training.config import MAX_SEED, LossConfig

NAMES = ("logistic", "rooted")
KEYS = ("k", "tail", "scale", "acts-on", "gamma")
GRID_KEYS = ("lr", "gamma")
MAX_SEEDS = 1000
MAX_POINTS = 100


@dataclass(frozen=True)
class Arm:
    """One objective of a comparison, under its canonical name; equal objectives have equal names."""

    name: str
    loss: LossConfig
    given: tuple[str, ...] = ()
    """Keys that its text sets."""

    @property
    def slug(self) -> str:
        """The name as a part of a folder's name."""
        return slug(self.name)


@dataclass(frozen=True)
class Point:
    """One setting of a grid: learning rate of both networks, weight of R1; None leaves the shared setting."""

    lr: float | None = None
    gamma: float | None = None

    @property
    def name(self) -> str:
        """E.g. `lr=0.002,gamma=0.5`."""
        values = (("lr", self.lr), ("gamma", self.gamma))
        return ",".join(f"{key}={exact_text(value)}" for key, value in values if value is not None)

    @property
    def slug(self) -> str:
        """The name as a part of a folder's name."""
        return slug(self.name)


def slug(name: str) -> str:
    """`rooted:k=2,tail=4` as `rooted-k2-tail4`."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", name.replace("=", ""))


def parse_losses(text: str, base: LossConfig) -> tuple[Arm, ...]:
    """Read `--losses`. What an arm does not set, it has from `base` (regularisers) or the defaults (objective).

    Raises:
        ValueError: A word that the grammar does not have, a key twice in an arm, or two arms that are the same.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for item in (part.strip() for part in text.split(",")):
        name, _, rest = item.partition(":")
        if name in NAMES:
            found.append((name, {}))
            setting = rest if ":" in item else None
        elif not found or "=" not in item:
            raise ValueError(
                f"--losses: {item!r} is no arm; write {' or '.join(NAMES)}, or e.g. rooted:k=2,tail=4 (docs/compare.md)"
            )
        else:
            setting = item
        if setting is not None:
            _add(found[-1], setting)
    arms = [_arm(name, settings, base) for name, settings in found]
    for i, arm in enumerate(arms):
        if any(arm.loss == other.loss for other in arms[:i]):
            raise ValueError(f"--losses: {arm.name} stands there twice")
    return tuple(arms)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0-4`, `0,2,5` or both mixed, in order.

    Raises:
        ValueError: Not of that form, out of range, or a seed twice.
    """
    seeds: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part, re.ASCII)
        if match is None:
            raise ValueError(f"--seeds {text}: {part!r} is neither a number nor a range; write 0-4 or 0,2,5")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last > MAX_SEED:
            raise ValueError(f"--seeds {text}: {part} is outside 0 to {MAX_SEED}, or runs backwards")
        if last - first >= MAX_SEEDS:
            raise ValueError(f"--seeds {text}: more than {MAX_SEEDS} seeds")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: a seed stands there twice")
    return tuple(seeds)


def parse_grid(text: str) -> tuple[Point, ...]:
    """Read `--tune`, e.g. `lr=0.001,0.002;gamma=0.1,0.5`: every combination, the last key fastest.

    Raises:
        ValueError: An unknown key, a value that is no positive number (gamma may be 0), or nothing to choose between.
    """
    usage = "write e.g. lr=0.001,0.002;gamma=0.1,0.5"
    lists: dict[str, list[float]] = {}
    for part in (part.strip() for part in text.split(";")):
        key, _, values = part.partition("=")
        if key not in GRID_KEYS or key in lists:
            raise ValueError(f"--tune {text}: {part!r} is unknown or stands there twice; {usage}")
        lists[key] = [_number(f"--tune {key}", v, 0, zero=key == "gamma") for v in values.split(",")]
        if len(set(lists[key])) < len(lists[key]):
            raise ValueError(f"--tune {text}: a value of {key} stands there twice")
    points = [Point()]
    for key, values_ in lists.items():
        points = [replace(point, **{key: value}) for point in points for value in values_]
    if not 2 <= len(points) <= MAX_POINTS:
        raise ValueError(f"--tune {text}: {len(points)} settings; between 2 and {MAX_POINTS} can be compared")
    return tuple(points)


def parse_share(text: str) -> tuple[int, int]:
    """Read `--only i/n` as (i, n), 1 <= i <= n.

    Raises:
        ValueError: Not of that form.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--only {text}: write i/n with i from 1 to n, e.g. 1/4")
    return int(match[1]), int(match[2])


def _add(arm: tuple[str, dict[str, str]], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if key not in KEYS or not equals or not value:
        raise ValueError(f"--losses: {setting!r} is no setting of an arm; key=value with key one of {', '.join(KEYS)}")
    if arm[0] == "logistic" and key != "gamma":
        raise ValueError(f"--losses: {key} is for rooted, not for logistic")
    if key in arm[1]:
        raise ValueError(
            f"--losses: {key} stands twice in one arm; begin a new arm with its loss, e.g. rooted:{setting}"
        )
    arm[1][key] = value


def _arm(name: str, settings: dict[str, str], base: LossConfig) -> Arm:
    """The arm of these settings, named by those that differ from the defaults (k always)."""
    defaults = LossConfig(gamma=base.gamma, pl_weight=base.pl_weight, style_mixing=base.style_mixing)
    loss = replace(defaults, name=name)
    for key, value in settings.items():
        loss = _READ[key](loss, value)
    shown = {"k": loss.k} if name == "rooted" else {}
    if loss.tail_at is not None:
        shown["tail"] = exact_text(loss.tail_at)
    if loss.scale != defaults.scale:
        shown["scale"] = loss.scale
    if loss.acts_on != defaults.acts_on:
        shown["acts-on"] = loss.acts_on
    if "gamma" in settings and loss.gamma is not None:
        shown["gamma"] = exact_text(loss.gamma)
    text = ",".join(f"{key}={value}" for key, value in shown.items())
    return Arm(f"{name}:{text}" if text else name, loss, tuple(settings))


def _read_k(loss: LossConfig, value: str) -> LossConfig:
    try:
        return replace(loss, k=str(parse_k(value)))
    except ValueError as error:
        raise ValueError(f"--losses: {error}") from None


def _read_tail(loss: LossConfig, value: str) -> LossConfig:
    if value == "none":
        return loss
    return replace(loss, tail="linear", tail_at=_number("--losses: tail", value, 0))


def _read_scale(loss: LossConfig, value: str) -> LossConfig:
    if value in ("paper", "calibrated"):
        return replace(loss, scale=value)
    return replace(loss, scale=exact_text(_number("--losses: scale", value, 0)))


def _read_acts_on(loss: LossConfig, value: str) -> LossConfig:
    if value not in ("both", "D", "G"):
        raise ValueError(f"--losses: acts-on={value} is unknown; one of both, D, G")
    return replace(loss, acts_on=value)


def _read_gamma(loss: LossConfig, value: str) -> LossConfig:
    return replace(loss, gamma=_number("--losses: gamma", value, 0, zero=True))


_READ: dict[str, Callable[[LossConfig, str], Any]] = {
    "k": _read_k,
    "tail": _read_tail,
    "scale": _read_scale,
    "acts-on": _read_acts_on,
    "gamma": _read_gamma,
}


def _number(what: str, text: str, low: float, *, zero: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (low < value < math.inf or (zero and value == low)):
        raise ValueError(
            f"{what} {text!r} is not a number {'from' if zero else 'above'} {low:g}{' up' if zero else ''}"
        )
    return value
