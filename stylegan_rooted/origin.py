"""What is known of a network's origin: its run's options, data and figures, base model, licences. Plain JSON values.

Paths are cut down to names: the record is made to be given away.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from stylegan_rooted import __version__
from stylegan_rooted.report_run import find_run, read_object
from training import run_dir
from training.network_pickle import NetworkFile

CARRIED = ("training", "data", "metrics", "licences", "base_model", "notes")
KNOWN_MODELS = {  # digests of files whose licence is known
    "a42cf1e012f678176f2cd8e4a128a7bff5c29140cf580c1bbc5a9242de393c94": {
        "name": "stylegan-rooted's embedded network (emoji32.pkl)",
        "licence": "Apache-2.0",
    },
}
_PATH_OPTIONS = ("path", "outdir", "resume", "detector_file", "cache")


def describe(opened: NetworkFile, licences: "Mapping[str, str] | None" = None) -> dict[str, Any]:
    """The record of an opened file, for `weights_file.save` and model cards.

    Args:
        opened: the file; if it lies in a run folder, the run's files are read.
        licences: what the user says: `weights`, `base_model` (a name), `base_licence`; over what is recorded.

    Returns:
        Entries where something is known: source, written_by, training, data, metrics, base_model, licences,
        training_set_kwargs, notes.
    """
    record: dict[str, Any] = {key: (opened.config or {})[key] for key in CARRIED if key in (opened.config or {})}
    record["written_by"] = f"stylegan-rooted {__version__}"
    record["source"] = {"file": name_of(opened.path), "sha256": opened.sha256, "kind": opened.kind}
    if opened.training_set_kwargs is not None:
        record["training_set_kwargs"] = run_dir.plain(opened.training_set_kwargs)
    if opened.notes:
        record["notes"] = list(opened.notes)
    run = find_run(opened.path)
    if run is not None:
        record |= _of_run(run, name_of(opened.path))
    base = record.get("base_model") or {}
    known = KNOWN_MODELS.get(str(base.get("sha256"))) or {}
    record["base_model"] = {**base, **known} if base else dict(KNOWN_MODELS.get(opened.sha256, {}))
    if opened.sha256 in KNOWN_MODELS:  # converted only: the licence stays
        record.setdefault("licences", {"weights": KNOWN_MODELS[opened.sha256]["licence"]})
    given = dict(licences or {})
    if given.get("base_model"):
        record["base_model"]["name"] = given["base_model"]
    if given.get("base_licence"):
        record["base_model"]["licence"] = given["base_licence"]
    if given.get("weights"):
        record["licences"] = {**record.get("licences", {}), "weights": given["weights"]}
    return {key: value for key, value in record.items() if value not in ({}, [], None)}


def name_of(path: Any) -> str:
    """The last part of a path or URL, of whatever system."""
    return PureWindowsPath(str(path).rstrip("/\\")).name or PurePath(str(path)).name


def _of_run(run: Path, snapshot: str) -> dict[str, Any]:
    """Options, data, base model and figures that a run folder records."""
    environment = read_object(run / "environment.json")
    options = _without_paths(read_object(run / "training_options.json"))
    training = {"run": run.resolve().name, "options": options}
    if match := re.search(r"(\d{6,})\.\w+$", snapshot):
        training["kimg"] = int(match[1])
    record: dict[str, Any] = {"training": training}
    data = environment.get("data")
    if isinstance(data, dict):
        record["data"] = {**data, "path": name_of(data.get("path", ""))}
    start = environment.get("resume")
    if isinstance(start, dict):
        record["base_model"] = {"name": name_of(start.get("path", "")), "sha256": start.get("sha256")}
    record["metrics"] = _metrics(run, snapshot)
    return record


def _metrics(run: Path, snapshot: str) -> list[dict[str, Any]]:
    """Of every figure the row of this snapshot or its inference file; those of other snapshots say nothing about it."""
    rows = []
    for path in sorted(run.glob("metric-*.jsonl")):
        found = [
            row
            for row in run_dir.read_jsonl(path)
            if isinstance(row, dict) and PurePath(name_of(row.get("snapshot_pkl", ""))).stem == PurePath(snapshot).stem
        ]
        if found:
            keep = ("metric", "results", "kimg", "provenance")
            rows.append({key: found[-1][key] for key in keep if key in found[-1]})
    return rows


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: name_of(item) if key in _PATH_OPTIONS and isinstance(item, str) else _without_paths(item)
            for key, item in value.items()
        }
    return value
