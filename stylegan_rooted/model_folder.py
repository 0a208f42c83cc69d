"""A folder in the form of the Hugging Face hub: model.safetensors, config.json, README.md (model card), samples.png.

Nothing is uploaded. The card says what is recorded, and where something is not recorded it says so.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from stylegan_rooted import generate
from torch_utils import images
from training import execution, run_dir, weights_file
from training.network_file import FOLDER_CONFIG, FOLDER_WEIGHTS

CARD = "README.md"
SAMPLES = "samples.png"
FILES = (FOLDER_WEIGHTS, FOLDER_CONFIG, SAMPLES, CARD)
GRID = (6, 3)
NOT_RECORDED = "not recorded"


def save(folder: "str | Path", nets: dict[str, Any], about: dict[str, Any], dtype: str = "float32") -> list[Path]:
    """Write the folder; its files are replaced one by one, the weights first.

    Args:
        folder: made where it does not exist.
        nets: G_ema, and G, D, augment_pipe or None.
        about: record of `origin.describe`.
        dtype: of the weights, see `weights_file.save`.

    Returns:
        The files.

    Raises:
        ValueError, OSError: it could not be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = dict(about)
    if isinstance(about.get("training_set_kwargs"), dict):
        path = about["training_set_kwargs"].get("path")
        about["training_set_kwargs"] = {**about["training_set_kwargs"], "path": Path(str(path)).name}
    config = weights_file.save(folder / FOLDER_WEIGHTS, **nets, about=about, dtype=dtype)
    run_dir.write_json(folder / FOLDER_CONFIG, config)
    draw_samples(nets["G_ema"], folder / SAMPLES)
    run_dir.write_atomic(folder / CARD, card(folder.resolve().name, nets, config))
    return [folder / name for name in FILES]


def draw_samples(G_ema: torch.nn.Module, path: Path) -> None:
    """A grid of seeds 0, 1, ..., constant noise, no truncation; classes in turn."""
    cols, rows = GRID
    runner = execution.accelerate(copy.deepcopy(G_ema))
    loaded = generate.Loaded(runner, torch.device("cpu"), "the network", "")
    c_dim: int = G_ema.c_dim  # type: ignore[assignment]
    tiles = []
    for seed in range(cols * rows):
        label = torch.eye(c_dim)[seed % c_dim][None] if c_dim else torch.zeros([1, 0])
        tiles.append(generate.render(loaded, seed, label))
    images.save_grid(path, torch.stack(tiles), (cols, rows))


def card(title: str, nets: dict[str, Any], config: dict[str, Any]) -> str:
    """The model card as Markdown with the hub's header."""
    base, licences = config.get("base_model") or {}, config.get("licences") or {}
    parts = [
        _header(licences.get("weights")),
        f"# {_text(title)}",
        "",
        _what(nets),
        "",
        f"![seeds 0 to {GRID[0] * GRID[1] - 1}, constant noise, no truncation]({SAMPLES})",
        "",
        "## Use",
        "",
        "```bash",
        "stylegan-rooted generate --network . --seeds 0-31 --trunc 0.7 --outdir out",
        "stylegan-rooted convert . network.pkl      # for code of the StyleGAN2-ADA family",
        "```",
        "",
        f"`{FOLDER_WEIGHTS}` holds no code. `{FOLDER_CONFIG}` says the architecture, as the weights' header does.",
        "",
        "## Base model and licences",
        "",
        f"* Base model: {_text(base.get('name') or NOT_RECORDED)}" + _digest(base.get("sha256")),
        f"* Licence of the base model: {_text(base.get('licence') or NOT_RECORDED)}",
        f"* Licence of these weights: {_text(licences.get('weights') or NOT_RECORDED)}",
        "",
    ]
    if not base.get("licence"):
        parts += ["Where a licence is not recorded, ask the base model's author before you pass this on.", ""]
    parts += _training(config) + _data(config) + _metrics(config) + _notes(config)
    return "\n".join(parts).rstrip() + "\n"


def _header(licence: "str | None") -> str:
    lines = ["---", "library_name: stylegan-rooted", "pipeline_tag: unconditional-image-generation"]
    lines += ["tags:", "- stylegan2", "- stylegan2-ada", "- gan"]
    lines.append(f"license: {json.dumps(licence.lower())}" if licence else "license: other")
    return "\n".join([*lines, "---", ""])


def _what(nets: dict[str, Any]) -> str:
    G = nets["G_ema"]
    count = sum(p.numel() for p in G.parameters())
    held = [key for key in ("G_ema", "G", "D", "augment_pipe") if nets.get(key) is not None]
    classes = f", {G.c_dim} classes" if G.c_dim else ""
    colour = {1: "grey", 3: "RGB", 4: "RGBA"}.get(G.img_channels, f"{G.img_channels}-channel")
    return (
        f"A StyleGAN2 generator of {colour} images, {G.img_resolution}x{G.img_resolution}{classes}; z {G.z_dim}, "
        f"w {G.w_dim}, {count:,} parameters. The weights hold {', '.join(held)}."
    )


def _training(config: dict[str, Any]) -> list[str]:
    training, source = config.get("training") or {}, config.get("source") or {}
    lines = ["## Training", "", f"Written by {_text(config.get('written_by', NOT_RECORDED))} from "
             f"`{_text(source.get('file', NOT_RECORDED))}`{_digest(source.get('sha256'))}."]  # fmt: skip
    options = training.get("options")
    if "kimg" in training:
        lines.append(f"Thousands of real images shown: {training['kimg']}.")
    if isinstance(options, dict):
        lines += ["", "```json", json.dumps(options, indent=1), "```"]
    else:
        lines.append("Its options are not recorded.")
    return [*lines, ""]


def _data(config: dict[str, Any]) -> list[str]:
    data = config.get("data")
    if not isinstance(data, dict):
        return ["## Data", "", "Not recorded.", ""]
    rows = [f"* {_text(str(key).replace('_', ' '))}: {_text(value)}" for key, value in data.items()]
    return ["## Data", "", *rows, ""]


def _metrics(config: dict[str, Any]) -> list[str]:
    rows = config.get("metrics") or []
    if not rows:
        return ["## Figures", "", "None recorded for this snapshot.", ""]
    lines = ["## Figures", "", "| figure | value | generated | real | features | resize | data fingerprint |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        where = row.get("provenance") or {}
        for name, value in (row.get("results") or {}).items():
            cells = [str(name).upper(), f"{value:.4g}" if isinstance(value, float) else value]
            cells += [where.get(key, "?") for key in ("num_fake", "num_real")]
            cells += [f"{where.get('extractor', '?')} {str(where.get('digest', ''))[:12]}", where.get("resize", "?")]
            cells.append(str(where.get("data_fingerprint"))[:16])
            lines.append("| " + " | ".join(_text(cell) for cell in cells) + " |")
    lines += [
        "",
        "FD and KD are distances of a small feature network that comes with stylegan-rooted; they are not FID and KID.",
        "",
    ]
    return lines


def _notes(config: dict[str, Any]) -> list[str]:
    notes = config.get("notes") or []
    return ["## Notes", "", *(f"* {_text(note)}" for note in notes), ""] if notes else []


def _digest(sha256: Any) -> str:
    return f" (SHA-256 `{_text(sha256)}`)" if sha256 else ""


def _text(value: Any) -> str:
    """One line that Markdown shows as it is."""
    line = "".join(ch if ch.isprintable() else "?" for ch in str(value))[:300]
    return "".join(f"\\{ch}" if ch in "\\`*[]<>|" else ch for ch in line)
