"""Facts of a report as plain values: figures with intervals, options, origin, how to reproduce, how runs compare.

Knows what was read and measured; writes nothing and draws nothing.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from metrics.evaluate import HIGHER_IS_BETTER, MetricResult
from stylegan_rooted import origin, report_answer, report_curves
from stylegan_rooted.generate import Loaded
from stylegan_rooted.report_run import MetricRow, RunRecord, mean_of
from training.config import FinetuneConfig
from training.measured import ALIKE, BOTH, FRECHET
from training.network_pickle import NetworkFile

NOT_RECORDED = "not recorded"
FAR_APART = 10  # a largest value this many times the smallest: a logarithmic axis for curves of several runs
INTERVAL = 1.96  # standard errors on each side of a 95 % interval
PLACES = ("data.path", "runtime.outdir")  # options that say where, not how
MEANING = {
    True: (
        "FID and KID are distances between Inception-v3 features of real and generated images: they compare with other "
        "figures only where data, number of images and resizing are the same."
    ),
    False: (
        "FD and KD are distances between what a small feature network, shipped with this software, sees in real and in "
        "generated images: they rank snapshots measured in the same way, they are not FID or KID, and compare with "
        "nobody else's figures."
    ),
}


def network(loaded: Loaded) -> dict[str, Any]:
    """What the network is: where from, digest, sizes."""
    G: Any = loaded.G
    return {
        "path": loaded.path,
        "sha256": loaded.sha256,
        "kind": loaded.kind,
        "notes": list(loaded.notes),
        "resolution": G.img_resolution,
        "num_channels": G.img_channels,
        "z_dim": G.z_dim,
        "w_dim": G.w_dim,
        "c_dim": G.c_dim,
        "num_ws": G.num_ws,
        "num_parameters": sum(p.numel() for p in G.parameters()),
    }


def origin_of(opened: NetworkFile | None, run: RunRecord | None) -> dict[str, Any]:
    """What it was trained from, on what, under which licences: `base`, `data`, `licence`; "not recorded" is said."""
    record = origin.describe(opened) if opened is not None else {}
    base = dict(record.get("base_model") or {})
    start = run.environment.get("resume") if run is not None else None
    if isinstance(start, dict):
        known = origin.KNOWN_MODELS.get(str(start.get("sha256")), {})
        base = {"name": origin.name_of(start.get("path", "")), "sha256": start.get("sha256"), **base, **known}
    scratch = run is not None and run.config is not None and run.config.resume in ("none", "noresume")
    licences = record.get("licences") or {}
    data = (run.environment.get("data") if run is not None else None) or record.get("data")
    return {
        "base": "none: trained from scratch" if scratch else str(base.get("name") or NOT_RECORDED),
        "base_sha256": base.get("sha256"),
        "base_licence": None if scratch else str(base.get("licence") or NOT_RECORDED),
        "licence": str(licences.get("weights") or NOT_RECORDED),
        "data": data if isinstance(data, dict) else None,
    }


def figures(
    results: Sequence[MetricResult], run: RunRecord | None, snapshot: str | None, fingerprint: str | None
) -> list[dict[str, Any]]:
    """Rows of the figures of one network: measured for the report, else recorded by its run."""
    rows = [
        _figure(row.name, row.value, row.std_error, row.warning, row.as_dict(), "measured for this report")
        for row in results
    ]
    for row in rows:
        row["provenance"]["data_fingerprint"] = fingerprint
    if not rows and run is not None and snapshot:
        for name, found in run.figures_of(snapshot).items():
            warning = "; ".join(w.split(": ", 1)[-1] for w in found.warnings) or None
            rows.append(_figure(name, found.value, found.error, warning, dict(found.provenance), "recorded by the run"))
    leading = _headline(rows)
    for row in rows:
        row["headline"] = row["name"] == leading
    return sorted(rows, key=lambda row: not row["headline"])


def run_facts(run: RunRecord, flags: dict[str, str]) -> dict[str, Any]:
    """State, answers, options, curves and provenance of a run."""
    verdict = run.verdict()
    name, rows = run.headline()
    best = min(run.still_there(rows) or rows, key=lambda row: row.value) if rows else None
    return {
        "path": str(run.path),
        "status": run.status(),
        "kimg": run.kimg,
        "total_kimg": run.total_kimg,
        "ticks": len(run.stats),
        "state": verdict.state,
        "evidence": verdict.evidence,
        "advice": verdict.advice,
        "signs": run.signs(),
        "states": [list(change) for change in run.states()],
        "answer": asdict(report_answer.answer(run)),
        "headline": report_curves.label_of(name) if name else None,
        "best": _best(name, best) if best is not None else None,
        "timestamp": run.stats[-1].get("timestamp") if run.stats else None,
        "sec_per_kimg": mean_of(run.stats[-1], "Timing/sec_per_kimg") if run.stats else None,
        "options": options(run, flags),
        "charts": [plot.as_dict() for plot in report_curves.plots(run)],
        "reproduce": reproduce(run),
    }


def options(run: RunRecord, flags: dict[str, str]) -> list[dict[str, Any]]:
    """Options that differ from the defaults; `automatic` are those that were filled from checkpoint and data."""
    if run.config is None:
        return [
            {"name": name, "value": _text(value), "default": None, "automatic": False}
            for name, value in _flat(run.options).items()
        ]
    defaults = _flat(FinetuneConfig().to_dict())
    command = run.environment.get("command")
    given = {str(word).split("=", 1)[0] for word in command} if isinstance(command, list) else set()
    unset = {name for name in defaults if defaults[name] is None and name.startswith("metric.")}  # never filled in
    return [
        {
            "name": flags.get(name, name),
            "value": _text(value, "x" if name == "runtime.grid" else ","),
            "default": "unset" if name in unset else "auto" if defaults[name] is None else _text(defaults[name]),
            "automatic": defaults[name] is None and name not in unset and flags.get(name) not in given,
        }
        for name, value in _flat(run.config.to_dict()).items()
        if value != defaults[name]
    ]


def reproduce(run: RunRecord) -> dict[str, Any]:
    """Command, versions, fingerprints and history of a run."""
    environment = run.environment
    command = environment.get("command")
    words = [str(word) for word in command] if isinstance(command, list) else []
    if words and words[0] in ("__main__.py", "stylegan-rooted"):
        words[0] = "stylegan-rooted"
    start, data = environment.get("resume"), environment.get("data")
    names = ("python", "torch", "numpy", "cuda", "platform", "device", "device_name", "num_threads", "operators")
    return {
        "command": shlex.join(words) or None,
        "config_command": f"stylegan-rooted finetune --config {shlex.quote(str(run.path / 'training_options.json'))}"
        if run.config is not None
        else None,
        "seed": run.config.runtime.seed if run.config is not None else None,
        "versions": {name: environment[name] for name in names if environment.get(name) is not None},
        "data_fingerprint": data.get("fingerprint") if isinstance(data, dict) else None,
        "base_sha256": start.get("sha256") if isinstance(start, dict) else None,
        "history": [
            {key: row[key] for key in ("event", "nimg", "timestamp", "reason") if row.get(key) is not None}
            for row in run.history
        ],
    }


def meaning(rows: Sequence[dict[str, Any]]) -> str | None:
    """What the distances mean, where there are any."""
    kinds = {row["name"].startswith(("fid", "kid")) for row in rows if row["name"][:2] in ("fd", "kd", "fi", "ki")}
    return " ".join(MEANING[kind] for kind in sorted(kinds, reverse=True)) or None


def warnings(subjects: Sequence[dict[str, Any]], sheet: dict[str, Any] | None) -> list[str]:
    """What a reader must know before believing the figures."""
    lines = []
    for subject in subjects:
        of = f"{subject['name']}: " if len(subjects) > 1 else ""
        for note in (subject["network"] or {}).get("notes", []):
            lines.append(f"{of}{note}.")
        for row in subject["figures"]:
            if row["warning"]:
                lines.append(f"{of}{row['label']}: {row['warning']}.")
        if sheet is not None and subject["trained_on_data"] is False:
            lines.append(f"{of}{sheet['path']} is not what this run was trained on: the fingerprints differ.")
    return list(dict.fromkeys(lines))


def compare(subjects: Sequence[dict[str, Any]], flags: dict[str, str]) -> dict[str, Any]:
    """Subjects side by side: a row each, the options in which runs differ, and whether their figures compare."""
    names = list(dict.fromkeys(row["name"] for s in subjects for row in s["figures"]))
    labels = {row["name"]: row["label"] for s in subjects for row in s["figures"]}
    rows = [
        {
            "name": s["name"],
            "role": s["role"],
            "state": s["run"]["state"] if s["run"] else None,
            "status": s["run"]["status"] if s["run"] else None,
            "kimg": s["run"]["kimg"] if s["run"] else None,
            "sec_per_kimg": s["run"]["sec_per_kimg"] if s["run"] else None,
            "snapshot": s["snapshot"],
            "figures": {row["name"]: row for row in s["figures"]},
        }
        for s in subjects
    ]
    runs = [s for s in subjects if s["run"] is not None]
    return {
        "names": names,
        "labels": labels,
        "rows": rows,
        "problems": _not_alike(subjects, names),
        "options": _differing(runs) if len(runs) > 1 else [],
        "charts": _overlaid(runs) if len(runs) > 1 else [],
    }


def before_values(figures: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Figures from before the training, by name, that were measured as those after it."""
    after = {row["name"]: row["provenance"] for row in figures}
    return {
        row["name"]: row["value"]
        for row in before
        if row["name"] in after
        and all(str(row["provenance"].get(key)) == str(after[row["name"]].get(key)) for key in ALIKE)
    }


def _not_alike(subjects: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Lines that say which figures do not compare, and why."""
    lines = []
    for name in names:
        found = [row for s in subjects for row in s["figures"] if row["name"] == name]
        differing = [key for key in ALIKE if len({str(row["provenance"].get(key)) for row in found}) > 1]
        if differing:
            lines.append(
                f"{found[0]['label']} was not measured alike ({', '.join(differing)} differ): do not compare; "
                "--metrics fid,kid measures all of them again"
            )
    return lines


def _differing(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Options in which runs differ, with each run's value; places do not count."""
    tables = [{o["name"]: o["value"] for o in s["run"]["options"]} for s in runs]
    defaults = {o["name"]: o["default"] for s in runs for o in s["run"]["options"]}
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = [{"name": name, "values": [table.get(name, defaults[name]) for table in tables]} for name in names]
    return [row for row in rows if len(set(row["values"])) > 1 and row["name"] not in ("--outdir", *PLACES)]


def _overlaid(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts with one curve per run, of everything that at least two of them have in one curve."""
    titles = list(dict.fromkeys(chart["title"] for s in runs for chart in s["run"]["charts"]))
    charts = []
    for title in titles:
        found = [(s, c) for s in runs for c in s["run"]["charts"] if c["title"] == title]
        if len(found) < 2 or any(len([x for x in c["series"] if not x["reference"]]) != 1 for _, c in found):
            continue
        series = [
            {**next(x for x in c["series"] if not x["reference"]), "name": s["name"], "style": style}
            for style, (s, c) in enumerate(found, 1)
        ]
        values = [y for one in series for _, y in one["points"] if y is not None]
        far_apart = min(values) > 0 and max(values) > FAR_APART * min(values)
        merged = {"series": series, "sentence": "", "state": "healthy", "log": far_apart or None}
        charts.append({**found[0][1], **merged})
    return charts


def _figure(
    name: str, value: float, error: float | None, warning: str | None, provenance: dict[str, Any], source: str
) -> dict[str, Any]:
    return {
        "name": name,
        "label": report_curves.label_of(name),
        "value": value,
        "std_error": error,
        "low": None if error is None else max(value - INTERVAL * error, -math.inf if name in ("kid", "kd") else 0.0),
        "high": None if error is None else value + INTERVAL * error,
        "lower_is_better": not name.endswith(HIGHER_IS_BETTER),
        "warning": warning,
        "source": source,
        "provenance": provenance,
    }


def _headline(rows: Sequence[dict[str, Any]]) -> str | None:
    """The figure to go by, by the rule that also chooses the best snapshot."""
    for name in BOTH:
        for row in rows:
            if row["name"] == name and not (name in FRECHET and row["warning"]):
                return name
    return rows[0]["name"] if rows else None


def _best(name: str, row: MetricRow) -> dict[str, Any]:
    return {
        "metric": report_curves.label_of(name),
        "value": row.value,
        "std_error": row.error,
        "kimg": row.kimg,
        "snapshot": row.snapshot,
    }


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """`{"loss.k": …}` of nested settings; lists as tuples."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{where}{key}.")
        else:
            found[f"{where}{key}"] = tuple(value) if isinstance(value, list) else value
    return found


def _text(value: Any, separator: str = ",") -> str:
    if isinstance(value, list | tuple):
        return separator.join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
