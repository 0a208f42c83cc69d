"""Everything that decides a training run, as frozen dataclasses that validate themselves.

One default, one place: the fields here. The command line reads its options and defaults from them and prints them back
as JSON (`--dry-run`). A value of None means "auto": `stylegan_rooted.presets.resolve` fills it from the checkpoint and
data. Knows nothing of torch.
"""

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any

ON_DIVERGENCE = ("warn", "rollback", "stop")
AUG_MODES = ("ada", "fixed", "noaug")
SHORT_METRICS = ("fid", "kid", "fid_inf", "pr", "dc", "is", "ppl", "memorisation")
FAMILY_METRICS = (
    *("fid50k_full", "kid50k_full", "pr50k3_full", "is50k", "ppl2_wend", "fid50k", "kid50k", "pr50k3"),
    *("ppl_zfull", "ppl_wfull", "ppl_zend", "ppl_wend"),
)
METRICS = (*SHORT_METRICS, *FAMILY_METRICS, "none")
DETECTORS = ("embedded", "inception", "vgg16", "torchscript")
DETECTOR_MODES = ("clean", "legacy_tensorflow", "legacy_pytorch")
MAX_REPEATS = 1000
KEEP_BEST = ("auto", "fid", "kid", "none")
D_ARCHITECTURES = ("orig", "skip", "resnet")
WANDB_MODES = ("none", "offline", "online")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
MIN_RESOLUTION = 8
MAX_KIMG = 1e9
MAX_CACHE_GIB = 1e6
DEVICES = r"auto|cpu|cuda(:[0-9]{1,3})?"
MAX_THREADS = 1024  # far more end OpenMP, and the process with it
MAX_RANK_TIMEOUT_SEC = 1e6
MAX_GRID = 256  # columns or rows, as with the command `grid`
MAX_SEED = 2**32 - 1  # NumPy's RandomState takes no more


@dataclass(frozen=True)
class DataConfig:
    """Which images are shown."""

    path: str = ""
    cond: bool = False
    subset: int | None = None
    mirror: bool = False
    workers: int = 0
    max_unreadable: int = 10
    cache_gib: float = 1.0

    def __post_init__(self) -> None:
        _at_least("--subset", self.subset, 1)
        _at_least("--workers", self.workers, 0)
        _at_least("--max-unreadable", self.max_unreadable, 0)
        _between("--cache-gib", self.cache_gib, 0, MAX_CACHE_GIB)


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture of a run from scratch. With a checkpoint all of it comes from the checkpoint."""

    resolution: int | None = None
    channel_base: int | None = None
    channel_max: int = 512
    z_dim: int = 512
    w_dim: int = 512
    map_depth: int | None = None
    mbstd_group: int | None = None
    d_architecture: str = "resnet"
    conv_clamp: float | None = 256.0
    num_fp16_res: int | None = None

    def __post_init__(self) -> None:
        _at_least("--cbase", self.channel_base, 4)
        _at_least("--cmax", self.channel_max, 1)
        _at_least("--zdim", self.z_dim, 1)
        _at_least("--wdim", self.w_dim, 1)
        _at_least("--map-depth", self.map_depth, 1)
        _at_least("--mbstd-group", self.mbstd_group, 1)
        side = MIN_RESOLUTION if self.resolution is None else self.resolution
        if side < MIN_RESOLUTION or side & (side - 1):
            raise ValueError(f"--resolution {side} is not a power of two of at least {MIN_RESOLUTION}")
        _at_least("network.num_fp16_res", self.num_fp16_res, 0)
        _between("network.conv_clamp", self.conv_clamp, 0, math.inf)
        _one_of("network.d_architecture", self.d_architecture, D_ARCHITECTURES)


@dataclass(frozen=True)
class LossConfig:
    """The adversarial objective and its regularisers."""

    name: str = "logistic"
    k: str = "2"
    tail: str = "none"
    tail_at: float | None = None
    scale: str = "paper"
    acts_on: str = "both"
    gamma: float | None = None
    pl_weight: float | None = None
    style_mixing: float | None = None

    def __post_init__(self) -> None:
        _between("--gamma", self.gamma, 0, math.inf)
        _between("--pl-weight", self.pl_weight, 0, math.inf)
        _between("--style-mixing", self.style_mixing, 0, 1)


@dataclass(frozen=True)
class AugmentConfig:
    """Discriminator augmentation (Karras et al. 2020a)."""

    aug: str = "ada"
    augpipe: str = "bgc"
    p: float | None = None
    target: float | None = None
    p_max: float = 0.85
    ada_kimg: float | None = None

    def __post_init__(self) -> None:
        _one_of("--aug", self.aug, AUG_MODES)
        _positive("--ada-kimg", self.ada_kimg)
        _between("--p", self.p, 0, 1)
        _between("--target", self.target, 0, 1)
        _between("--p-max", self.p_max, 0, 1)
        if self.aug == "fixed" and self.p is None:
            raise ValueError("--aug fixed needs --p, the fixed augmentation probability in [0, 1]")
        if self.aug != "fixed" and self.p is not None:
            raise ValueError(f"--p is for --aug fixed only, not --aug {self.aug}; drop one of the two")
        if self.aug != "ada" and self.target is not None:
            raise ValueError(f"--target is for --aug ada only, not --aug {self.aug}; drop one of the two")


@dataclass(frozen=True)
class TrainChoice:
    """What learns, as `--train` says.

    Attributes:
        text: as given.
        part: of the generator: "all", "affines" (style affines only) or "adapters" (low-rank, on the convolutions).
        rank: of the adapters, 0 without.
        mapping: whether the mapping network learns.
        synthesis_from: the lowest resolution whose synthesis block learns.
        freezed: layers of the discriminator that are frozen, from the image on; None = `--freezed` says it.
    """

    text: str
    part: str = "all"
    rank: int = 0
    mapping: bool = True
    synthesis_from: int = 0
    freezed: int | None = None


def parse_train(text: str) -> TrainChoice:
    """Read `all`, or words separated by commas: freezed:N, freeze-mapping, freeze-synthesis:R, affines, lora:RANK.

    Raises:
        ValueError: an unknown word, a number out of range, or words that exclude each other.
    """
    usage = "all, or of freezed:N, freeze-mapping, freeze-synthesis:R, affines, lora:RANK, separated by commas"
    found: dict[str, int] = {}
    for word in str(text).split(","):
        name, colon, number = word.strip().partition(":")
        wants_number = name in ("freezed", "freeze-synthesis", "lora")
        if name not in ("all", "freeze-mapping", "affines") and not wants_number:
            raise ValueError(f"--train {text}: {word.strip()!r} is unknown; {usage}")
        if wants_number != bool(colon) or (wants_number and not (number.isascii() and number.isdigit())):
            raise ValueError(f"--train {text}: {word.strip()!r} is not complete or says too much; {usage}")
        if name in found:
            raise ValueError(f"--train {text}: {name} stands there twice")
        found[name] = int(number) if wants_number else 1
    if found.get("lora") == 0:
        raise ValueError(f"--train {text}: the rank of the adapters is at least 1")
    parts: list[str] = [name for name in ("all", "affines", "lora") if name in found]
    frozen: list[str] = [name for name in ("freeze-mapping", "freeze-synthesis") if name in found]
    if len(parts) > 1 or (parts and frozen):
        raise ValueError(f"--train {text}: {' and '.join(parts + frozen)} exclude each other")
    return TrainChoice(
        text=str(text),
        part="adapters" if "lora" in found else "affines" if "affines" in found else "all",
        rank=found.get("lora", 0),
        mapping="freeze-mapping" not in found and not {"affines", "lora"} & set(found),
        synthesis_from=found.get("freeze-synthesis", 0),
        freezed=found.get("freezed"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """Adam, batch, moving average."""

    batch: int | None = None
    batch_gpu: int | None = None
    glr: float | None = None
    dlr: float | None = None
    beta1: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-8
    g_reg_interval: int | None = 4
    d_reg_interval: int | None = 16
    ema_kimg: float | None = None
    ema_rampup: float | None = None
    freezed: int = 0
    train: str = "all"
    max_nonfinite: int = 20
    on_divergence: str = "warn"

    def __post_init__(self) -> None:
        _at_least("--batch", self.batch, 1)
        _at_least("--batch-gpu", self.batch_gpu, 1)
        _at_least("--freezed", self.freezed, 0)
        chosen = parse_train(self.train).freezed
        if chosen is not None and self.freezed not in (0, chosen):
            raise ValueError(f"--train freezed:{chosen} and --freezed {self.freezed} differ; give one of them")
        _at_least("--max-nonfinite", self.max_nonfinite, 0)
        _one_of("--on-divergence", self.on_divergence, ON_DIVERGENCE)
        _at_least("--g-reg-interval", self.g_reg_interval, 1)
        _at_least("--d-reg-interval", self.d_reg_interval, 1)
        _positive("--glr", self.glr)
        _positive("--dlr", self.dlr)
        _positive("optim.eps", self.eps)
        for name, beta in (("optim.beta1", self.beta1), ("optim.beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} {beta} is outside [0, 1)")
        _between("--ema-kimg", self.ema_kimg, 0, math.inf)
        _between("--ema-rampup", self.ema_rampup, 0, math.inf)
        if self.batch is not None and self.batch_gpu is not None and self.batch % self.batch_gpu:
            raise ValueError(f"--batch {self.batch} is not a multiple of --batch-gpu {self.batch_gpu}")


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, how often, how much is kept.

    `autosave_min` are minutes between two training states beside those of the snapshots; 0 saves one after every step.
    `keep_last` None keeps every snapshot; otherwise that many of the newest, every `keep_every`-th and the best by
    `keep_best`.
    """

    kimg: float = 1000.0
    tick: float = 4.0
    snap: int = 10
    autosave_min: float = 10.0
    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: str = "auto"

    def __post_init__(self) -> None:
        for option, kimg in (("--kimg", self.kimg), ("--tick", self.tick)):
            _positive(option, kimg)
            _between(option, kimg, 0, MAX_KIMG)
        _at_least("--snap", self.snap, 1)
        _between("--autosave-min", self.autosave_min, 0, math.inf)
        _at_least("--keep-last", self.keep_last, 1)
        _at_least("--keep-every", self.keep_every, 1)
        _one_of("--keep-best", self.keep_best, KEEP_BEST)
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("--keep-every is what --keep-last spares; without --keep-last every snapshot is kept")


@dataclass(frozen=True)
class MetricConfig:
    """What is measured at snapshots."""

    metrics: tuple[str, ...] = ("fid", "kid")
    detector: str = "embedded"
    detector_mode: str = "clean"
    detector_file: str | None = None
    vgg_file: str | None = None
    num: int = 1000
    max_minutes: float = 120.0
    repeats: int = 1
    reference: str | None = None
    held_out: str | None = None
    run_async: bool = False
    device: str | None = None
    budget: str | None = None
    patience: int | None = None

    def check_use(self) -> None:
        """Refuse what is said to no effect; records of runs, which are read again, may hold it.

        Raises:
            ValueError: Held-out images without a figure that looks at them, or a figure named twice.
        """
        twice = next((name for name in self.metrics if self.metrics.count(name) > 1), None)
        if twice:
            raise ValueError(f"--metrics names {twice} more than once; name it once")
        if self.held_out is not None and "memorisation" not in self.metrics:
            raise ValueError(f"--held-out {self.held_out} is for --metrics memorisation; add it, or drop --held-out")

    @property
    def budget_share(self) -> float | None:
        """`--metrics-budget` as a share of the training time."""
        return None if self.budget is None else parse_share("--metrics-budget", self.budget)

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError(f"--metrics is empty; a comma list of {', '.join(METRICS)}")
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"--metrics {name} is unknown; a comma list of {', '.join(METRICS)}")
        if "none" in self.metrics and len(self.metrics) > 1:
            raise ValueError("--metrics none cannot be combined with others")
        if self.detector not in DETECTORS and not re.fullmatch(r"timm:[\w.]+", self.detector):
            known = ", ".join((*DETECTORS, "timm:MODEL"))
            raise ValueError(f"--detector {self.detector} is unknown; one of {known}")
        _one_of("--detector-mode", self.detector_mode, DETECTOR_MODES)
        _at_least("--metric-num", self.num, 2)
        _positive("--metric-minutes", self.max_minutes)
        _between("--metric-repeats", self.repeats, 1, MAX_REPEATS)
        _at_least("--patience", self.patience, 1)
        if self.device is not None and not re.fullmatch(DEVICES, self.device):
            raise ValueError(f"--metrics-device {self.device} is unknown; one of auto, cpu, cuda, cuda:N")
        if self.device is not None and not self.run_async:
            raise ValueError("--metrics-device is for --metrics-async true; drop one of the two")
        if self.budget is not None:
            parse_share("--metrics-budget", self.budget)


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and with what it runs."""

    outdir: str = ""
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    rank_timeout: float = 600.0
    precision: str = "auto"
    fp32: bool = False
    tf32: bool = False
    nobench: bool = False
    grid: tuple[int, int] | None = None
    desc: str | None = None
    wandb: str = "none"

    def __post_init__(self) -> None:
        _one_of("--wandb", self.wandb, WANDB_MODES)
        _between("--threads", self.threads, 1, MAX_THREADS)
        _between("--rank-timeout", self.rank_timeout, 1, MAX_RANK_TIMEOUT_SEC)
        _one_of("--precision", self.precision, PRECISIONS)
        if self.fp32 and self.precision not in ("auto", "fp32"):
            raise ValueError(f"--fp32 is short for --precision fp32, not {self.precision}; drop one of the two")
        if self.fp32:
            object.__setattr__(self, "precision", "fp32")
        _between("--seed", self.seed, 0, MAX_SEED)
        if self.grid is not None and not 1 <= min(self.grid) <= max(self.grid) <= MAX_GRID:
            raise ValueError(f"--grid {self.grid[0]}x{self.grid[1]}: columns and rows lie in [1, {MAX_GRID}]")
        if not re.fullmatch(DEVICES, self.device):
            raise ValueError(f"--device {self.device} is unknown; one of auto, cpu, cuda, cuda:N")


@dataclass(frozen=True)
class FinetuneConfig:
    """One run, whole. `to_dict` and `from_dict` are exact inverses; the JSON of `--dry-run` is `to_dict`."""

    resume: str = "none"
    cfg: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuneConfig":
        """Build from `to_dict`'s form; absent fields take their defaults, unknown ones raise ValueError by name."""
        return _build(cls, values, "")

    def replace(self, **sections: Any) -> "FinetuneConfig":
        """Copy with whole sections, or single fields given as `section__field=value`, replaced."""
        direct = {k: v for k, v in sections.items() if "__" not in k}
        nested: dict[str, dict[str, Any]] = {}
        for key, value in sections.items():
            if "__" in key:
                section, name = key.split("__", 1)
                nested.setdefault(section, {})[name] = value
        for section, fields in nested.items():
            direct[section] = dataclasses.replace(direct.get(section, getattr(self, section)), **fields)
        return dataclasses.replace(self, **direct)


def parse_share(option: str, text: str) -> float:
    """`5%` or `0.05` as 0.05.

    Raises:
        ValueError: It is neither, or outside (0, 1].
    """
    percent = text.strip().endswith("%")
    try:
        share = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        raise ValueError(f"{option} {text} is no share; write 5% or 0.05") from None
    if not 0 < share <= 1:
        raise ValueError(f"{option} {text} is outside (0, 100%]")
    return share


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(
            f"--config: {where or 'the file'} should be an object of settings, got {type(values).__name__}"
        )
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"--config: unknown setting {where + unknown[0]!r}; known here: {', '.join(known)}")
    arguments = {}
    for name, value in values.items():
        section = known[name].default_factory
        if section is not dataclasses.MISSING and dataclasses.is_dataclass(section):
            value = _build(section, value, f"{where}{name}.")  # type: ignore[arg-type]
        else:
            value = _typed(cls, name, value, where)
        arguments[name] = value
    return cls(**arguments)


def _typed(cls: type, name: str, value: Any, where: str) -> Any:
    """`value` as the field wants it; ValueError if it is of another kind. A list becomes a tuple, and what YAML reads
    as the wrong one of text and number (`k: 2`, `1e-08`) is put right."""
    annotation = typing.get_type_hints(cls)[name]
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = next(option for option in options if option is not type(None))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None and type(None) in options:
        return None
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and _fills(typing.get_args(kind), value):
            return tuple(value)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is str:
        if isinstance(value, str) or number:
            return str(value)
    elif kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    elif number and (kind is float or isinstance(value, int)):
        return value
    wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    raise ValueError(f"--config: {where}{name} should be {wanted}, got {value!r}")


def _fills(kinds: tuple[Any, ...], values: list | tuple) -> bool:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    return len(kinds) == len(values) and all(type(v) is kind for v, kind in zip(values, kinds))


def _at_least(option: str, value: float | None, low: float) -> None:
    if value is not None and not value >= low:
        raise ValueError(f"{option} {value} is below {low}")


def _between(option: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{option} {value} is outside [{low}, {high}]")


def _positive(option: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{option} {value} is not a positive number")


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} {value} is unknown; one of {', '.join(known)}")
