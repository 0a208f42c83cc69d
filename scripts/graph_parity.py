"""How equal exported graphs are to the network: ONNX in onnxruntime, and torch.export's `.pt2`, both on the CPU.

Each network is written by `convert` in both forms, opened again, and compared for several batch sizes and truncations
with what `generate` computes, in float32 with constant noise: the largest difference, relative to the largest value.
Prints a table in Markdown; ends with 1 where something is over the bound. Needs `pip install -e '.[onnx]'`.

Usage: python scripts/graph_parity.py [NETWORK ...]
The default is the embedded network and a stored one with classes, residual blocks and float16 layers asked for.
"""

import gzip
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from stylegan_rooted import convert, onnx_file, portable  # noqa: E402
from training import network_file  # noqa: E402

EMBEDDED = ROOT / "stylegan_rooted" / "assets" / "emoji32.pkl"
CONDITIONAL = ROOT / "tests" / "data" / "pickles" / "snapshot_b.pkl.gz"
BATCHES = (1, 2, 5, 16)
PSIS = (1.0, 0.7, 0.5, 0.0)
GRAPHS = {"onnx": ("x.onnx", onnx_file.load), "torch-export": ("x.pt2", portable.load)}


def errors(source: Path, to: str, folder: Path) -> dict[int, list[float]]:
    """Batch size: largest relative difference for each of PSIS."""
    name, load = GRAPHS[to]
    (path,) = convert.convert(source, folder / name, to, say=lambda text: None)
    function, G = load(path), network_file.load(source).G_ema
    out: dict[int, list[float]] = {}
    for batch in BATCHES:
        z = torch.randn([batch, G.z_dim], generator=torch.Generator().manual_seed(batch))
        c = torch.eye(G.c_dim)[torch.arange(batch) % G.c_dim] if G.c_dim else torch.zeros([batch, 0])
        for psi in PSIS:
            inputs = (z, c, torch.tensor(psi)) if G.c_dim else (z, torch.tensor(psi))
            with torch.inference_mode():
                wanted = G(z, c, truncation_psi=psi, noise_mode="const", force_fp32=True)
            got = function(*inputs)
            assert got.shape == wanted.shape
            out.setdefault(batch, []).append(float((got - wanted).abs().max() / wanted.abs().max()))
    return out


def main(names: list[str]) -> int:
    """Print the table; returns the exit code."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / CONDITIONAL.stem
        stored.write_bytes(gzip.decompress(CONDITIONAL.read_bytes()))
        heads = " | ".join(f"psi {psi:g}" for psi in PSIS)
        print(f"| network | graph | N | {heads} |\n|{'---|' * (3 + len(PSIS))}")
        for source in [Path(name) for name in names] or [EMBEDDED, stored]:
            G = network_file.load(source).G_ema
            classes = f", {G.c_dim} classes" if G.c_dim else ""
            for to in GRAPHS:
                inside = Path(folder) / f"{source.name}-{to}"
                inside.mkdir()
                for batch, row in errors(source, to, inside).items():
                    cells = " | ".join(f"{error:.1e}" for error in row)
                    print(f"| {source.name}, {G.img_resolution} px{classes} | {to} | {batch} | {cells} |")
                    worst = max(worst, *row)
    print(f"\nworst {worst:.1e}, bound {portable.TOLERANCE:g}")
    return int(not worst <= portable.TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
