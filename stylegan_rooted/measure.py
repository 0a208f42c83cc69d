"""Measure one network against one data set, outside a run: the body of the command `metrics`."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnnlib.util import is_url
from metrics.evaluate import headline
from metrics.features import MetricUnavailable
from stylegan_rooted import evaluation, generate
from training import measured, run_dir
from training.config import MetricConfig
from training.dataset import ImageDataset

Say = Callable[[str], None]


def run(
    network: str,
    data: str,
    config: MetricConfig,
    *,
    subset: int | None = None,
    mirror: bool = False,
    seed: int = 0,
    device: str = "auto",
    say: Say,
) -> list[dict[str, Any]]:
    """Measure, say each figure, append them to the run folder that the pickle lies in.

    Args:
        network: Pickle, path or URL.
        data: Folder or zip.
        config: Which figures, how; one at least.
        subset: How many of the images were trained on, drawn with `seed`.
        mirror: Whether their mirrors were, too.
        seed: Of the generated images.
        device: Where to compute.
        say: Receives lines for people.

    Returns:
        The lines of the metric-*.jsonl files.

    Raises:
        ValueError, OSError: Something the user can mend, a missing detector among them.
    """
    loaded = generate.open_network(network, device)
    G: Any = loaded.G
    dataset = ImageDataset(data, use_labels=G.c_dim > 0, max_size=subset, xflip=mirror, random_seed=seed)
    if subset is not None and subset > dataset.num_source_images:
        raise ValueError(f"--subset {subset} is more than the {dataset.num_source_images} images of {data}")
    if dataset.num_source_images < 2:
        raise ValueError(f"{data} holds {dataset.num_source_images} image; distances need at least 2")
    generate.check_data(loaded, dataset)
    evaluator = evaluation.Evaluator(dataset, config, loaded.device, seed)
    start = time.time()
    try:
        rows = evaluator.measure(G)
    except MetricUnavailable as error:
        raise ValueError(str(error)) from error
    for row in rows:
        background = f"; alpha on {row.details['background']}" if "background" in row.details else ""
        say(f"{row.text}  ({row.num_fake} generated, {row.num_real} real; {row.extractor}{background})")
    for warning in dict.fromkeys(row.warning for row in rows if row.warning):
        say(f"Warning: {warning}")
    leading = headline(rows)
    biased = leading is not None and leading.name.startswith(("fid", "fd")) and leading.warning
    if leading is not None and len(rows) > 1 and not biased:  # where it is, the warning names what to go by
        say(f"Go by: {leading.text}")
    folder = Path(network).parent
    in_run = not is_url(network) and (folder / "training_options.json").is_file()
    number = re.search(r"network-snapshot-(\d+)\.pkl$", network)
    kimg = measured.kimg_in(folder, network) if in_run else None  # a name holds whole kimg only
    if kimg is None and number:
        kimg = int(number[1])
    lines = []
    for name, record in evaluation.records(
        rows,
        snapshot=Path(network).name if in_run else None,
        nimg=None if kimg is None else round(kimg * 1000),
        seconds=time.time() - start,
        fingerprint=evaluator.fingerprint,
    ):
        record[measured.ADDED] = "metrics"
        lines.append(run_dir.plain(record))
        if in_run:
            run_dir.append_jsonl(folder / f"metric-{name}.jsonl", record)
    return lines
