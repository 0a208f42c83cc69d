"""What is timed: training steps and inference of this project and of the reference path, behind one small interface.

A subject has names of pieces (`Gmain`, `infer`, ...) and runs one piece per call. It is built in a process of its own
(`worker.py`), because the allocator's settings hold for a whole process. The project's side is built by the same code
that the commands use, so what is timed is what ships.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import onnx_export, reference
from stylegan_rooted import finetune
from torch_utils import images
from training import execution, network_pickle, networks, training_loop, weights_file
from training.config import FinetuneConfig, RuntimeConfig
from training.ema import ema_beta, update_ema


@dataclasses.dataclass(frozen=True)
class NetworkSize:
    """Resolution in pixels, channels times resolution, channels at most, layers of the mapping network."""

    resolution: int
    channel_base: int
    channel_max: int
    map_depth: int


SIZES = {
    "s64": NetworkSize(64, 4096, 128, 2),
    "m64": NetworkSize(64, 16384, 512, 2),
    "l256": NetworkSize(256, 16384, 512, 8),
    "tiny": NetworkSize(16, 256, 16, 2),  # for tests and for looking whether everything runs
}
PHASES = {"Gmain": 1, "Greg": 4, "Dmain": 1, "Dreg": 16}  # name: interval
NUM_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of doing the work.

    Args:
        path: `ours` or `reference`; for inference also `onnxruntime`.
        precision: `fp32` or `bf16`; the reference knows fp32 only.
        allocator: `project` = the settings that this project's commands make for their process, `system` = none.
        size: A key of SIZES.
        batch: Images per step or call.
        threads: Of torch.
        augment: With geometry and colour augmentation at p = 0.5.
        ops: Value of STYLEGAN_ROOTED_OPS; empty = as it is.
        channel_base, channel_max, resolution: Instead of the size's own, for scaling; 0 = the size's.
        train: Words of `--train`, for fine-tuning from a snapshot; empty = from scratch, everything learns.
    """

    path: str = "ours"
    precision: str = "fp32"
    allocator: str = "project"
    size: str = "s64"
    batch: int = 8
    threads: int = 2
    augment: bool = False
    ops: str = ""
    channel_base: int = 0
    channel_max: int = 0
    resolution: int = 0
    train: str = ""

    @property
    def network(self) -> NetworkSize:
        """The size, with what is given instead."""
        given = {
            name: getattr(self, name) for name in ("channel_base", "channel_max", "resolution") if getattr(self, name)
        }
        return dataclasses.replace(SIZES[self.size], **given)


def knows_precision(precision: str) -> bool:
    """Whether this revision of the project can train and generate in that precision on this processor."""
    return precision == "fp32" or "precision" in {f.name for f in dataclasses.fields(RuntimeConfig)}


def run_config(variant: Variant, data: Path, outdir: Path) -> FinetuneConfig:
    """A run as `finetune --fp32`/`--precision` would have it: no clamp, logistic loss."""
    net, known = variant.network, {f.name for f in dataclasses.fields(RuntimeConfig)}
    precision: dict[str, Any] = {"precision": variant.precision} if "precision" in known else {"fp32": True}
    config = FinetuneConfig().replace(
        data__path=str(data),
        network__resolution=net.resolution,
        network__channel_base=net.channel_base,
        network__channel_max=net.channel_max,
        network__map_depth=net.map_depth,
        network__mbstd_group=min(variant.batch, 4),
        network__conv_clamp=None,
        loss__name="logistic",
        augment__aug="fixed" if variant.augment else "noaug",
        augment__p=0.5 if variant.augment else None,
        optim__batch=variant.batch,
        optim__batch_gpu=variant.batch,
        metric__metrics=("none",),
        runtime__outdir=str(outdir),
        runtime__device="cpu",
        runtime__threads=variant.threads,
    )
    if variant.train:
        start = write_snapshot(outdir / "start.pkl", net)
        config = config.replace(resume=str(start), optim__train=variant.train, network=FinetuneConfig().network)
    return config.replace(**{f"runtime__{name}": value for name, value in precision.items()})


def write_snapshot(path: Path, net: NetworkSize) -> Path:
    """Networks of that size with random weights, to fine-tune from."""
    width = {"channel_base": net.channel_base, "channel_max": net.channel_max}
    mapping = {"num_layers": net.map_depth}
    G = networks.Generator(512, 0, 512, net.resolution, 3, mapping_kwargs=mapping, synthesis_kwargs=width)
    D = networks.Discriminator(0, net.resolution, 3, **width)
    network_pickle.save(path, G=G, D=D, G_ema=copy.deepcopy(G))
    return path


def write_images(folder: Path, resolution: int, num: int = NUM_IMAGES) -> Path:
    """A data set of smooth random colours, seeded."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(num):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((resolution, resolution), Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")
    return folder


class TrainingSubject:
    """Pieces Dreg, Greg, Dmain, Gmain (gradients and Adam) and ema of one variant; its files lie in `root`."""

    names = ("Dreg", "Greg", "Dmain", "Gmain", "ema")  # what comes first after a pause should weigh least

    def __init__(self, variant: Variant, root: Path) -> None:
        self.variant = variant
        data = write_images(root / "data", variant.network.resolution)
        plan = finetune.prepare(run_config(variant, data, root))
        if variant.allocator == "project":
            finetune.configure_torch(plan.config, plan.device)
        torch.set_num_threads(variant.threads)
        self.run = finetune.build_run(plan, root)
        self.phases = {phase.name: phase for phase in self.run.phases}
        real, self.labels = next(self.run.batches)
        self.real = images.from_uint8(real)
        self.trainer = None
        if variant.path == "reference":
            self.trainer = reference.ReferenceTrainer(
                self.run.G, self.run.D, self.run.G_ema, pipe=self.run.augment_pipe, lr=plan.config.optim.glr,
                gamma=plan.config.loss.gamma,
            )  # fmt: skip
        else:
            torch.set_flush_denormal(True)  # as `finetune.run` does

    def __call__(self, name: str) -> None:
        """Run one piece."""
        if self.trainer is not None:
            if name == "ema":
                self.trainer.update_average(0.999)
            else:
                self.trainer.phase(name, self.real, torch.randn(self.variant.batch, self.run.G.z_dim))
        elif name == "ema":
            update_ema(self.run.G_ema, self.run.G, ema_beta(self.variant.batch, 10000, 10.0, 0.05))
        else:
            training_loop.step_phase(self.run, self.phases[name], self.real, self.labels)
            self.run.progress.cur_nimg += self.variant.batch  # other latents next time


class ChoiceSubject(TrainingSubject):
    """The same of a run with `--train`; `facts` says what it keeps, once every phase has run."""

    def __init__(self, variant: Variant, root: Path) -> None:
        super().__init__(variant, root)
        self.root = root

    @property
    def facts(self) -> dict[str, float]:
        """Numbers with gradients and bytes of optimiser state, of G and of D; bytes of the snapshot and the adapter."""
        out = {}
        for letter in "GD":
            phase = self.phases[f"{letter}main"]
            out[f"gradients {letter}"] = sum(parameter.numel() for parameter in phase.parameters)
            out[f"optimizer {letter}"] = num_bytes(phase.opt.state_dict().get("adam", phase.opt.state_dict()))
        path = self.root / "snapshot.pkl"
        network_pickle.save(path, G=self.run.G, D=self.run.D, G_ema=self.run.G_ema)
        out["snapshot"] = path.stat().st_size
        if self.run.adapters is not None:
            path = self.root / "adapter.safetensors"
            weights_file.save_adapter(path, self.run.adapters.averaged, base=self.run.adapters.base_fingerprint)
            out["adapter"] = path.stat().st_size
        return out


def num_bytes(value: Any) -> int:
    """Of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(num_bytes(item) for item in items)


class InferenceSubject:
    """Pieces `b8` and `b1`: so many images at once from the generator, constant noise, without gradients."""

    names = ("b8", "b1")

    def __init__(self, variant: Variant, root: Path) -> None:
        training = TrainingSubject(variant, root)
        if variant.path == "reference" and variant.network.resolution < 256:
            # The original was measured in a process that had trained. In a fresh one the C library hands memory back
            # after every image, which makes small networks up to 1.7 times slower and our ratios that much nicer.
            for name in PHASES:
                training(name)
        self.G = training.run.G_ema.eval().requires_grad_(False)
        if variant.path == "ours":
            execution.freeze(self.G)  # as `generate` does
        self.path, self.threads = variant.path, variant.threads
        self.calls: dict[str, Callable[[], Any]] = {name: self.renderer(int(name[1:])) for name in self.names}

    def renderer(self, batch: int) -> Callable[[], Any]:
        """What makes so many images [N, C, R, R] of the same latents every time."""
        z = torch.from_numpy(np.random.RandomState(0).randn(batch, self.G.z_dim)).float()
        if self.path == "onnxruntime":
            session = onnx_export.session(onnx_export.exported(self.G, batch), self.threads)
            return lambda: session.run(None, {"z": z.numpy()})[0]
        if self.path == "reference":
            generator = reference.ReferenceGenerator(self.G)
            return lambda: generator(z, "const")
        return lambda: self.G(z, torch.zeros(batch, 0), noise_mode="const")

    @torch.inference_mode()
    def __call__(self, name: str) -> Any:
        """Make images."""
        return self.calls[name]()


SUBJECTS: dict[str, Any] = {"train": TrainingSubject, "infer": InferenceSubject, "choice": ChoiceSubject}
