"""Metrics against clean-fid's and torch-fidelity's own functions on the same features: seconds and ratios.

Prints one Markdown table; with --json FILE the same as JSON. What takes over 3 s is timed once, the rest by the median
of 5. Usage: python benchmarks/bench_metrics.py [--features 2048] [--num 2000] [--threads N] [--json FILE]
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from metrics.feature_net import load_feature_net
from metrics.features import MetricUnavailable, cleanfid_module, torch_fidelity_module
from metrics.frechet_inception_distance import FrechetReference, frechet_distance
from metrics.kernel_inception_distance import kernel_distance
from metrics.neighbours import manifolds
from stylegan_rooted.evaluation import FEATURE_NET

ONCE_SEC = 3.0


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of `work`."""
    times = []
    while len(times) < 5:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
        times.append(time.perf_counter() - start)
        if times[0] > ONCE_SEC:
            break
    return statistics.median(times)


def cases(num_features: int, num: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Figure: whose function: what to time. Ours comes first."""
    rng = np.random.RandomState(0)
    decay = np.exp(-np.arange(num_features) / (num_features / 8))
    real, fake = (np.abs(rng.randn(num, num_features) * decay * scale).astype(np.float32) for scale in (1.0, 1.1))
    # Covariances of more rows than features, so that clean-fid's root needs no second try.
    many = [np.abs(rng.randn(2 * num_features, num_features) * decay * scale) for scale in (1.0, 1.1)]
    (mu1, sigma1), (mu2, sigma2) = ((rows.mean(0), np.cov(rows, rowvar=False)) for rows in many)
    reference = FrechetReference(mu2, sigma2)
    out: dict[str, dict[str, Callable[[], Any]]] = {
        "Fréchet distance": {"ours": lambda: frechet_distance(mu1, sigma1, mu2, sigma2)},
        "its standard error": {"ours": lambda: reference.std_error(fake)},
        "kernel distance, 100 x 1000": {"ours": lambda: kernel_distance(real, fake)},
        "precision and recall": {"ours": lambda: manifolds(real, fake, k=3, density_k=3)},
        "... density and coverage too": {"ours": lambda: manifolds(real, fake)},
    }
    with contextlib.suppress(MetricUnavailable):
        theirs = cleanfid_module("fid")
        out["Fréchet distance"]["clean-fid"] = lambda: theirs.frechet_distance(mu1, sigma1, mu2, sigma2)
        out["kernel distance, 100 x 1000"]["clean-fid"] = lambda: theirs.kernel_distance(real, fake)
    with contextlib.suppress(ImportError):
        fid, kid, prc = (torch_fidelity_module(f"metric_{name}") for name in ("fid", "kid", "prc"))
        moments = [{"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}]
        out["Fréchet distance"]["torch-fidelity"] = lambda: fid.fid_statistics_to_metric(*moments, verbose=False)
        tensors = torch.from_numpy(fake), torch.from_numpy(real)
        options = {"kid_subsets": 100, "kid_subset_size": 1000, "verbose": False}
        out["kernel distance, 100 x 1000"]["torch-fidelity"] = lambda: kid.kid_features_to_metric(*tensors, **options)
        options_prc = {"prc_neighborhood": 3, "prc_batch_size": 10000, "save_cpu_ram": False, "verbose": False}
        out["precision and recall"]["torch-fidelity"] = lambda: prc.prc_features_to_metric(*tensors, **options_prc)
    net = load_feature_net(FEATURE_NET)
    images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    last = images.contiguous(memory_format=torch.channels_last)
    out["embedded features, 64 images of 64x64"] = {"ours": lambda: net(last), "NCHW": lambda: net(images)}
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=2048, help="D.")
    parser.add_argument("--num", type=int, default=2000, help="Rows of each side.")
    parser.add_argument("--threads", type=int, help="Default: torch's own choice.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"D = {options.features}, {options.num} rows a side, {torch.get_num_threads()} threads\n")
    print("| figure | whose | seconds | theirs / ours |\n|---|---|---|---|")
    rows = []
    for figure, contenders in cases(options.features, options.num).items():
        own = None
        for name, work in contenders.items():
            taken = seconds(work)
            own = own or taken
            rows.append({"figure": figure, "whose": name, "seconds": taken, "ratio": taken / own})
            ratio = "" if name == "ours" else f"{taken / own:.1f}"
            print(f"| {figure} | {name} | {taken:.3g} | {ratio} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": str(options.json), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
