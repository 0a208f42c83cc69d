"""Train the embedded feature network (stylegan_rooted/assets/feature-net.npz) on the Noto emoji images.

The images come from the npm package `emoji-datasource-google` 16.0.0 (artwork Apache-2.0), fetched and unpacked by
hand:

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz     # makes ./package
    OMP_NUM_THREADS=1 python scripts/train_feature_net.py package stylegan_rooted/assets/feature-net.npz

Two classification tasks share the feature vector: the emoji's subcategory (about a hundred) and its identity (every
training image is a class of its own), both under mild geometric and colour augmentation, so that the features tell
shapes and colours apart. A tenth of the emoji, with all their skin tones, is held out: the subcategory accuracy on
them is printed.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metrics.feature_net import LAYERS, NUM_FEATURES, load_feature_net, prepare_images, save_feature_net  # noqa: E402


def load_emoji(package: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """All images flattened on white, uint8 [N, 3, 64, 64]; subcategory [N] and emoji [N] indices; subcategory names.

    The skin-tone variants of one emoji share its emoji index.
    """
    rows = []
    for emoji, entry in enumerate(json.loads((package / "emoji.json").read_text())):
        variants = [entry, *entry.get("skin_variations", {}).values()]
        rows += [(variant["image"], f"{entry['category']}/{entry['subcategory']}", emoji) for variant in variants]
    rows = [row for row in sorted(rows) if (package / "img/google/64" / row[0]).is_file()]
    names = sorted({subcategory for _, subcategory, _ in rows})
    images = []
    for file, _, _ in rows:
        rgba = Image.open(package / "img/google/64" / file).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        images.append(np.asarray(Image.alpha_composite(white, rgba).convert("RGB")).transpose(2, 0, 1))
    labels = torch.tensor([names.index(subcategory) for _, subcategory, _ in rows])
    emoji_ids = torch.tensor([emoji for _, _, emoji in rows])
    return torch.from_numpy(np.stack(images)), labels, emoji_ids, names


class TrainableNet(torch.nn.Module):
    """The architecture of `metrics.feature_net.LAYERS` with batch norm, and the two heads that are thrown away."""

    def __init__(self, num_subcategories: int, num_identities: int) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(row.in_channels, row.out_channels, row.kernel, row.stride, row.kernel // 2, bias=False)
            for row in LAYERS
        )
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(row.out_channels) for row in LAYERS)
        self.head_norm = torch.nn.BatchNorm1d(NUM_FEATURES)
        self.subcategory = torch.nn.Linear(NUM_FEATURES, num_subcategories)
        self.identity = torch.nn.Linear(NUM_FEATURES, num_identities)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        taps = []
        for row, conv, norm in zip(LAYERS, self.convs, self.norms):
            x = norm(conv(x)).relu()
            if row.tap:
                taps.append(x.mean(dim=(2, 3)))
        return torch.cat(taps, dim=1)  # [N, NUM_FEATURES]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.head_norm(self.features(x))
        return self.subcategory(h), self.identity(h)

    def folded(self) -> dict[str, np.ndarray]:
        """Convolution weights and biases with batch norm folded in; `scale` is all ones."""
        arrays = {"scale": np.ones(NUM_FEATURES, dtype=np.float32)}
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
            arrays[f"conv{i}.weight"] = (conv.weight.detach() * gain[:, None, None, None]).numpy()
            arrays[f"conv{i}.bias"] = (norm.bias.detach() - norm.running_mean * gain).numpy()
        return arrays


def augment(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Flip, scale, rotate, shift, jitter colours, add noise; all mild. float32 [N, 3, 32, 32] in [-1, 1]."""
    n = x.shape[0]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=rng) * (high - low) + low

    flip = (torch.rand(n, generator=rng) < 0.5).float() * -2 + 1
    scale, angle = torch.exp(uniform(-0.2, 0.2)), uniform(-0.2, 0.2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = uniform(-0.2, 0.2, 2)
    theta = torch.stack([cos * flip, -sin, shift[:, 0], sin * flip, cos, shift[:, 1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1  # white outside
    gain, offset = torch.exp(uniform(-0.15, 0.15, 1, 1, 1)), uniform(-0.1, 0.1, 1, 1, 1)
    tint = torch.exp(uniform(-0.07, 0.07, 3, 1, 1))
    x = ((x + 1) * tint - 1) * gain + offset
    strength = 0.1 * torch.rand(n, 1, 1, 1, generator=rng) ** 2
    return (x + strength * torch.randn(x.shape, generator=rng)).clamp(-1, 1)


def train(package: Path, dest: Path, *, num_epochs: int, batch_size: int, lr: float, seed: int) -> None:
    """Train, fold, scale and save; print progress, held-out accuracy and the file's digest."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    images, labels, emoji_ids, names = load_emoji(package)
    x_all = torch.cat([prepare_images(chunk) for chunk in images.split(256)])
    num_emoji = int(emoji_ids.max()) + 1
    is_held_out = torch.zeros(num_emoji, dtype=torch.bool)
    is_held_out[torch.randperm(num_emoji, generator=rng)[: num_emoji // 10]] = True  # whole emoji, all skin tones
    held_out, kept = is_held_out[emoji_ids].nonzero()[:, 0], (~is_held_out[emoji_ids]).nonzero()[:, 0]
    x, y = x_all[kept].contiguous(), labels[kept]
    net = TrainableNet(len(names), len(kept)).to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.02)
    num_steps = num_epochs * (len(kept) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=lr, total_steps=num_steps, pct_start=0.15)
    start, step = time.process_time(), 0
    for epoch in range(num_epochs):
        net.train()
        shuffled = torch.randperm(len(kept), generator=rng)
        total, hits = 0.0, 0
        for i in range(len(kept) // batch_size):
            rows = shuffled[i * batch_size : (i + 1) * batch_size]
            batch = augment(x[rows], rng).to(memory_format=torch.channels_last)
            by_subcategory, by_identity = net(batch)
            loss = F.cross_entropy(by_subcategory, y[rows], label_smoothing=0.1)
            loss = loss + 0.5 * F.cross_entropy(by_identity, rows)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            schedule.step()
            step += 1
            total += float(loss.detach())
            hits += int((by_identity.argmax(1) == rows).sum())
        net.eval()
        with torch.no_grad():
            correct = sum(
                int((net(x_all[part])[0].argmax(1) == labels[part]).sum()) for part in held_out.split(256)
            ) / len(held_out)
        mean_loss, seen = total / (step / (epoch + 1)), len(kept) // batch_size * batch_size
        print(
            f"epoch {epoch + 1}/{num_epochs}  loss {mean_loss:.3f}  identity {hits / seen:.3f}  "
            f"held-out subcategory accuracy {correct:.3f}  {time.process_time() - start:.0f} CPU-s",
            flush=True,
        )
        if not math.isfinite(mean_loss):
            raise SystemExit("the loss is not finite")
    arrays = net.folded()
    with torch.no_grad():
        std = torch.cat([net.features(part) for part in x.split(256)]).std(dim=0).numpy()
    if not (std > 1e-3 * np.median(std)).all():
        num_dead = int((std <= 1e-3 * np.median(std)).sum())
        raise SystemExit(f"{num_dead} features are dead; train again with another seed")
    arrays["scale"] = (1 / std).astype(np.float32)  # unit variance of every feature over the training images
    digest = save_feature_net(dest, arrays)
    feats = load_feature_net(dest)(images[:256])
    with torch.no_grad():
        expected = net.features(x_all[:256]) * torch.from_numpy(arrays["scale"])
    print(f"folding error {float((feats - expected).abs().max()):.1e}")
    print(f"{len(kept)} training images, {len(held_out)} held out, {len(names)} subcategories, {NUM_FEATURES} features")
    print(f"{dest}: {dest.stat().st_size} bytes, sha256 {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded feature network on the Noto emoji images.")
    parser.add_argument("package", type=Path, help="folder of the unpacked npm package emoji-datasource-google")
    parser.add_argument("dest", type=Path, help="weights file to write (.npz)")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.package, args.dest, num_epochs=args.epochs, batch_size=args.batch, lr=args.lr, seed=args.seed)


if __name__ == "__main__":
    main()
