"""Small networks, data and run folders for the tests of reports: made, not trained."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metrics import feature_net
from torch_utils import images
from training import network_pickle, networks
from training.config import FinetuneConfig

R = 16
NAUGHTY = "<script>alert('x')</script><img src=http://x.y/z onerror=alert(1)> \"&amp; {{ 7*7 }} | *b* `c`"


def save_network(path: Path, seed: int, c_dim: int = 0, img_channels: int = 3) -> Path:
    """A generator of random weights with its discriminator."""
    torch.manual_seed(seed)
    common = dict(img_resolution=R, img_channels=img_channels, c_dim=c_dim)
    G = networks.Generator(z_dim=8, w_dim=8, synthesis_kwargs=dict(channel_base=128, channel_max=8), **common).eval()
    D = networks.Discriminator(channel_base=128, channel_max=8, **common).eval()
    network_pickle.save(path, G=G, D=D, G_ema=G)
    return path


def tiles(num: int, seed: int = 0) -> np.ndarray:
    """Noise, uint8 [num, 3, R, R]."""
    return np.random.RandomState(seed).randint(0, 256, [num, 3, R, R], dtype=np.uint8)


def save_data(folder: Path, num: int = 12) -> Path:
    """A folder of noise images."""
    folder.mkdir(parents=True)
    for i, image in enumerate(tiles(num)):
        images.save_png(folder / f"{i}.png", image)
    return folder


def save_features(path: Path) -> Path:
    """Weights of a feature network, small and random."""
    rng = np.random.RandomState(0)
    shapes = feature_net.expected_shapes()
    feature_net.save_feature_net(
        path, {name: rng.randn(*shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}
    )
    return path


def stat_rows(num: int, **changes: Any) -> list[dict[str, Any]]:
    """Lines of stats.jsonl of a healthy run, 0.8 kimg apart; a change is a function of the tick."""
    rows = []
    for i in range(num):
        values = {
            "Progress/kimg": 0.8 * i + 0.01,
            "Progress/augment": 0.01 * i,
            "Progress/nonfinite": 0.0,
            "Loss/G/loss": 2.5 + 0.1 * i,
            "Loss/D/loss": None if i == 2 else 4.4,
            "Loss/scores/real": 0.5 + 0.01 * i,
            "Loss/scores/fake": -0.5 - 0.01 * i,
            "Loss/signs/real": 0.5,
            "Loss/top1_share/generator": 0.05,
            "Loss/tail_share/generator": 0.0,
            "Gradient/Gmain": 10.0 + i,
            "Gradient/Greg": 0.0,
            "Gradient/Dmain": 1.0,
            "Watch/diversity": 0.9,
            "Watch/nearest": 1.2,
            "Timing/sec_per_kimg": 9.5,
            "Timing/total_sec": 8.0 * i,
            "Resources/cpu_mem_gb": 0.7,
            "Resources/peak_gpu_mem_gb": 0.0,
        }
        values |= {name.replace("__", "/"): change(i) for name, change in changes.items()}
        row: dict[str, Any] = {name: {"num": 400, "mean": value, "std": 1.0} for name, value in values.items()}
        rows.append({**row, "state": "healthy", "timestamp": time.time()})
    return rows


def metric_row(name: str, kimg: float, value: float, error: float | None = 0.2, **provenance: Any) -> dict[str, Any]:
    """A line of metric-NAME.jsonl."""
    return {
        "results": {name: value},
        "metric": name,
        "kimg": kimg,
        "snapshot_pkl": f"network-snapshot-{int(kimg):06d}.pkl",
        "errors": {name: error},
        "warnings": [],
        "provenance": {
            "num_real": 12,
            "num_fake": 14,
            "digest": "d",
            "resize": "r",
            "extractor": "embedded",
            **provenance,
        },
    }


def write_lines(path: Path, rows: list[dict[str, Any]], torn: str = "") -> None:
    """A JSON-lines file, with a torn last line where wanted."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn, encoding="utf-8")


def make_run(
    folder: Path,
    *,
    data: Path | str = "",
    values: tuple[float, ...] = (9.0, 7.0, 5.0),
    stats: list[dict[str, Any]] | None = None,
    history: tuple[str, ...] = ("started", "finished"),
    name: str = "fd",
    **options: Any,
) -> Path:
    """A run folder as `finetune` leaves it, of 4 kimg with a snapshot at 0, 2 and 4."""
    folder.mkdir(parents=True)
    config = FinetuneConfig(resume="base.pkl").replace(
        **{"loss__name": "rooted", "loss__gamma": 1.0, "schedule__kimg": 4.0, "data__path": str(data), **options}
    )
    (folder / "training_options.json").write_text(json.dumps(config.to_dict()))
    environment = {
        "command": ["__main__.py", "finetune", "--data", "a b.zip"],
        "torch": "2.x",
        "resume": {"path": "/somewhere/base.pkl", "sha256": "5" * 64, "kind": "snapshot"},
        "data": {"path": str(data), "num_images": 12, "resolution": R, "fingerprint": "f" * 64},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    write_lines(folder / "stats.jsonl", stat_rows(6) if stats is None else stats, torn='{"Progress/kimg": {"me')
    kimgs = (0.0, 2.0, 4.0, 6.0, 8.0)[: len(values)]
    write_lines(folder / f"metric-{name}.jsonl", [metric_row(name, k, v) for k, v in zip(kimgs, values)])
    write_lines(folder / "history.jsonl", [{"event": e, "nimg": 0, "timestamp": 1.5e9} for e in history])
    for seed, grid in enumerate(("fakes_init", "fakes000000", "fakes000002", "fakes000004", "reals")):
        images.save_grid(folder / f"{grid}.png", tiles(8 * 5, seed), (8, 5))
    save_network(folder / "network-snapshot-000004.pkl", 3)
    return folder


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
