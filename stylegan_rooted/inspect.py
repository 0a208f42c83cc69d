"""What is in a network file, told without executing it; hostile and damaged files are described, not refused."""

import hashlib
import itertools
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dnnlib.util import open_url
from torch_utils import pickle_reader
from torch_utils.pickle_reader import Document, ObjectRecord, PersistentRecord, PickleError, printable
from training import augment, network_file, network_pickle, networks, recognise, weights_file

FAMILIES = {recognise.LEGACY_TF: "stylegan2-tensorflow", recognise.ROSINALITY: "rosinality"}
NETWORKS = ("G", "D", "G_ema", "augment_pipe")
SAFE = {
    "pickle": "nothing outside the allow-list; other programs may execute the embedded source",
    "safetensors": "the format holds no code, and this file is no pickle beside it",
}
NO_CONTAINER = "none"
SAFE_TORCH = "nothing outside the allow-list"
MAX_LISTED = 50  # globals and reasons shown in the text form


@dataclass(frozen=True)
class InspectReport:
    """What one file holds.

    Attributes:
        file: name as given.
        num_bytes: size of the file.
        sha256: digest of the file.
        container: 'pickle', 'torch-zip', 'torch-legacy' or 'safetensors'; 'none' for what is no network file at all.
        protocol: pickle protocol, 0 where there is none.
        kind: code of the format, as `recognise` gives it.
        description: the format in words.
        family: whose code wrote it: 'stylegan2-ada', 'stylegan3-repo', 'stylegan-rooted', 'stylegan2-tensorflow',
            'rosinality'; None where that can't be told.
        safe: whether everything it asks for is on the allow-list and it is not damaged.
        reasons: why it is not safe, one line each.
        loads: whether `network_file.load` accepts it.
        problem: why it doesn't, or None.
        notes: what the file does not say and would be assumed or estimated.
        globals: functions and classes it asks for.
        refused_globals: those of them, and of those inside tensors, that are not on the allow-list.
        sources: embedded source texts: SHA-256, size, classes, whether it is this program's own.
        networks: per network: class, sizes, numbers of parameters and buffer elements, constructor arguments.
        training_set_kwargs: recorded settings of the data set as a pickle holds them, or None.
        training_options: options of the training that the file records, or None.
        config: what a file of ours says of its origin (licences, training, ...), or None.
    """

    file: str
    num_bytes: int
    sha256: str
    container: str
    protocol: int
    kind: str
    description: str
    family: "str | None"
    safe: bool
    reasons: list[str]
    loads: bool
    problem: "str | None"
    notes: list[str]
    globals: list[str]
    refused_globals: list[str]
    sources: list[dict[str, Any]]
    networks: dict[str, dict[str, Any]]
    training_set_kwargs: "dict | None"
    training_options: "dict | None"
    config: "dict | None"

    def as_json(self) -> str:
        """One JSON object."""
        return json.dumps(_jsonable(asdict(self)), indent=2, allow_nan=False)


def inspect_file(path_or_url: "str | os.PathLike") -> InspectReport:
    """Describe a file; nothing in it is executed.

    Args:
        path_or_url: any file.

    Raises:
        OSError: the file cannot be read.
    """
    path = network_file.locate(path_or_url)
    with open_url(path) as stream:
        data = stream.read()
    found: dict[str, Any] = {}
    problem = None
    try:
        found = network_file.parse(data, path)
    except PickleError as error:
        problem = str(error)
    document, kind, description = _survey(data)
    records = _records(document)
    reasons = document.refusals + ([document.damage] if document.damage is not None else [])
    refused = [name for name in document.globals if name not in document.allowed]
    refused += [name for name in document.nested_globals if name not in pickle_reader.STORAGE_DTYPES]
    sources = _sources(records)
    described = {key: _network(record) for key, record in records.items()}
    if not described:
        described = {key: _module(found[key]) for key in NETWORKS if found.get(key) is not None}
    config = found.get("config") or {}
    return InspectReport(
        file=printable(os.fspath(path_or_url), 500),
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        container=document.container,
        protocol=document.protocol,
        kind=kind,
        description=description,
        family=_family(kind, records, sources, config),
        safe=not reasons,
        reasons=reasons,
        loads=problem is None,
        problem=problem,
        notes=list(found.get("notes", ())),
        globals=[printable(name) for name in document.globals],
        refused_globals=[printable(name) for name in refused],
        sources=sources,
        networks=described,
        training_set_kwargs=_training_set_kwargs(document) or found.get("training_set_kwargs"),
        training_options=_training_options(document, config),
        config={key: value for key, value in config.items() if key != "networks"} or None,
    )


def format_report(report: InspectReport) -> str:
    """The report as text for people."""
    lines = [
        f"file      {report.file}",
        f"size      {report.num_bytes} bytes, SHA-256 {report.sha256}",
        f"kind      {report.description}" + (f", written by {report.family}" if report.family else ""),
        f"container {report.container}" + (f", protocol {report.protocol}" if report.protocol else ""),
    ]
    for name, network in report.networks.items():
        sizes = "  ".join(f"{key} {value}" for key, value in network.items() if type(value) in (int, float, str))
        lines.append(f"{name:<9} {printable(sizes, 300)}")
        if "settings" in network:
            lines.append(f"          {_one_line(network['settings'])}")
    if report.training_set_kwargs is not None:
        lines.append(f"data set  {_one_line(report.training_set_kwargs)}")
    if report.training_options is not None:
        lines.append(f"options   {_one_line(report.training_options)}")
    if report.config is not None:
        lines.append(f"config    {_one_line(report.config)}")
    lines += [f"note      {note}" for note in report.notes]
    for source in report.sources:
        own = "this program's own, " if source["ours"] else ""
        classes = printable(", ".join(source["classes"]), 200)
        lines.append(f"source    {own}{source['num_bytes']} bytes, SHA-256 {source['sha256']} (classes {classes})")
    lines += [f"global    {name}" for name in report.globals[:MAX_LISTED]]
    lines += [f"refused   {name}" for name in report.refused_globals[:MAX_LISTED]]
    lines += [f"reason    {reason}" for reason in report.reasons[:MAX_LISTED]]
    if report.safe:
        lines.append(f"safe: yes ({SAFE.get(report.container, SAFE_TORCH)})")
    elif report.container == NO_CONTAINER:
        lines.append("safe: no (this is no network file, and nothing in it was checked)")
    else:
        lines.append("safe: no (do not open this file with an ordinary unpickler)")
    lines.append("loads: yes" if report.loads else f"loads: no ({report.problem})")
    return "\n".join(lines)


def _survey(data: bytes) -> tuple[Document, str, str]:
    """(what the file asks for, code and words of its format); a safetensors file asks for nothing."""
    stranger = recognise.stranger(data)
    if stranger is not None:
        document = Document()
        document.container, document.damage = NO_CONTAINER, f"this is {stranger[0]}: {stranger[1]}"
        return document, recognise.UNKNOWN, stranger[0]
    if recognise.is_safetensors(data):
        document = Document()
        document.container = recognise.SAFETENSORS
        try:
            _, config = weights_file.read(data)
        except PickleError as error:
            document.damage, config = str(error), None
        words = "our safetensors file" if weights_file.is_ours(config) else "a safetensors file"
        return document, recognise.SAFETENSORS, weights_file.ADAPTER if weights_file.is_adapter(config) else words
    document = recognise.survey(data)
    return document, *recognise.identify(document)


def _records(document: Document) -> dict[str, PersistentRecord]:
    root = document.root if isinstance(document.root, dict) else {}
    return {key: root[key] for key in NETWORKS if isinstance(root.get(key), PersistentRecord)}


def _network(record: PersistentRecord) -> dict[str, Any]:
    """Sizes and settings of one network, as far as the record tells them."""
    report: dict[str, Any] = {"class": printable(record.class_name)}
    for key in ("img_resolution", "img_channels", "z_dim", "c_dim", "w_dim"):
        if type(record.state.get(key)) is int:
            report[key] = record.state[key]
    for child in ("synthesis", "b8", "b4"):
        block = record.table("_modules").get(child)
        if child == "synthesis" and isinstance(block, PersistentRecord):
            block = block.table("_modules").get("b4")
        if isinstance(block, PersistentRecord) and isinstance(block.state.get("architecture"), str):
            report["architecture"] = printable(block.state["architecture"])
            break
    try:
        tensors = network_pickle.module_tensors(record)
        report["num_parameters"] = sum(t.numel for t in tensors.values() if t.is_parameter)
        report["num_buffer_elements"] = sum(t.numel for t in tensors.values() if not t.is_parameter)
        if record.class_name == "AugmentPipe" and "p" in tensors and tensors["p"].numel == 1:
            report["p"] = float(tensors["p"].tensor())
        report["settings"] = {
            "Generator": network_pickle.generator_settings,
            "Discriminator": network_pickle.discriminator_settings,
            "AugmentPipe": network_pickle.augment_settings,
        }.get(record.class_name, network_pickle.augment_settings)(record)
    except PickleError as error:
        report["problem"] = str(error)
    return report


def _module(net: Any) -> dict[str, Any]:
    """Sizes and settings of one network that was built."""
    report: dict[str, Any] = {"class": type(net).__name__}
    for key in ("img_resolution", "img_channels", "z_dim", "c_dim", "w_dim"):
        if hasattr(net, key):
            report[key] = getattr(net, key)
    block = getattr(getattr(net, "synthesis", net), "b4", None)
    if block is not None:
        report["architecture"] = block.architecture
    report["num_parameters"] = sum(p.numel() for p in net.parameters())
    report["num_buffer_elements"] = sum(b.numel() for b in net.buffers())
    if hasattr(net, "p"):
        report["p"] = float(net.p)
    report["settings"] = network_pickle.keyword_settings(net)
    return report


def _sources(records: dict[str, PersistentRecord]) -> list[dict[str, Any]]:
    """The distinct source texts among the modules, with the classes taken from each."""
    own = {hashlib.sha256(Path(module.__file__ or "").read_bytes()).hexdigest() for module in (networks, augment)}
    digests: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    pending: list[PersistentRecord] = list(records.values())
    seen: set[int] = set()
    for record in pending:  # grows while it is walked
        if id(record) in seen:
            continue
        seen.add(id(record))
        text = record.source
        if text:
            if text not in digests:
                raw = text.encode("utf-8", "surrogatepass")
                digests[text] = hashlib.sha256(raw).hexdigest()
                ours = digests[text] in own
                found[digests[text]] = {"sha256": digests[text], "num_bytes": len(raw), "classes": [], "ours": ours}
            names, name = found[digests[text]]["classes"], printable(record.class_name)
            if name not in names and len(names) < MAX_LISTED:
                names.append(name)
        if len(pending) < 4 * network_pickle.MAX_MODULES:
            children = itertools.islice(record.table("_modules").values(), network_pickle.MAX_MODULES)
            pending.extend(child for child in children if isinstance(child, PersistentRecord))
    return list(found.values())


def _family(kind: str, records: dict[str, PersistentRecord], sources: list[dict], config: dict) -> "str | None":
    """Who wrote a file: our source text or mark, or the attributes that only one repository stores."""
    if weights_file.is_ours(config):
        return "stylegan-rooted"
    if kind != recognise.SNAPSHOT:
        return FAMILIES.get(kind)
    if sources and all(source["ours"] for source in sources):
        return "stylegan-rooted"
    generator = records.get("G_ema") or records.get("G")
    node: Any = generator
    for child in ("synthesis", "b4", "conv1"):
        node = node.table("_modules").get(child) if isinstance(node, PersistentRecord) else None
    flat = isinstance(node, PersistentRecord) and "in_channels" in node.state
    return "stylegan3-repo" if flat else "stylegan2-ada"


def _training_options(document: Document, config: dict) -> "dict | None":
    """Options of the training: `args` of rosinality's checkpoints, the training summary of our own files."""
    if isinstance(config.get("training"), dict):
        return config["training"]
    args = document.root.get("args") if isinstance(document.root, dict) else None
    if not isinstance(args, ObjectRecord) or args.name != pickle_reader.NAMESPACE:
        return None
    try:
        return pickle_reader.plain(args.state, "the options") if isinstance(args.state, dict) else None
    except PickleError as error:
        return {"problem": str(error)}


def _training_set_kwargs(document: Document) -> "dict | None":
    value = document.root.get("training_set_kwargs") if isinstance(document.root, dict) else None
    try:
        return pickle_reader.plain(value, "training_set_kwargs") if isinstance(value, dict) else None
    except PickleError as error:
        return {"problem": str(error)}


def _jsonable(value: Any) -> Any:
    """JSON has no bytes, no infinite numbers and only text as keys."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(value: Any) -> str:
    return printable(json.dumps(_jsonable(value), allow_nan=False), 1000)
