"""The pickle contract: what a snapshot asks for, what its source uses, who can open it, and that no file executes.

house.md section 3, L1-L6. Import lists of the two source files are also guarded by test_architecture.py.
"""

import ast
import gzip
import io
import json
import pickletools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torch_utils import pickle_reader
from training import augment, network_pickle, networks

ROOT = Path(__file__).resolve().parent.parent
OUR_GLOBALS = {
    "torch_utils.persistence _reconstruct_persistent_obj",
    "dnnlib.util EasyDict",
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch.storage _load_from_bytes",
}
CONTRACT = {  # what embedded source may use of the library it wakes up in
    "torch_utils.persistence": ["persistent_class"],
    "torch_utils.misc": ["assert_shape", "constant", "profiled_function", "suppress_tracer_warnings"],
    "torch_utils.ops.bias_act": ["bias_act", "activation_funcs"],
    "torch_utils.ops.conv2d_resample": ["conv2d_resample"],
    "torch_utils.ops.conv2d_gradfix": ["conv2d"],
    "torch_utils.ops.grid_sample_gradfix": ["grid_sample"],
    "torch_utils.ops.fma": ["fma"],
    "torch_utils.ops.upfirdn2d": ["setup_filter", "upfirdn2d", "filter2d", "upsample2d", "downsample2d"],
}
FORBIDDEN_EVENTS = (
    *("exec", "compile", "pickle.find_class", "import", "marshal.loads", "ctypes.dlopen", "socket.connect"),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.putenv", "subprocess.Popen", "code.__new__"),
)


def small_networks() -> dict[str, Any]:
    torch.manual_seed(0)
    common = dict(img_resolution=8, img_channels=3, c_dim=2)
    synthesis = dict(channel_base=64, channel_max=8, num_fp16_res=1, conv_clamp=256)
    G = networks.Generator(z_dim=8, w_dim=8, mapping_kwargs=dict(num_layers=2), synthesis_kwargs=synthesis, **common)
    D = networks.Discriminator(**common, **synthesis, epilogue_kwargs=dict(mbstd_group_size=2))
    for parameter in [*G.parameters(), *D.parameters()]:
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return dict(G=G, D=D, G_ema=G, augment_pipe=augment.AugmentPipe(**augment.AUGMENT_PRESETS["bgc"]))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contract") / "network-snapshot-000000.pkl"
    network_pickle.save(path, **small_networks(), training_set_kwargs=dict(path="/data.zip", xflip=False))
    return path


def asked_globals(data: bytes) -> set[str]:
    """Globals of a pickle, found with the standard library's disassembler."""
    found, strings, memo, last = set(), [], {}, None
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            found.add(argument)
        elif opcode.name == "STACK_GLOBAL":
            found.add(" ".join(strings[-2:]))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            last = memo.get(argument)
            strings.append(last)
            continue
        elif isinstance(argument, str):
            strings.append(argument)
        last = argument if isinstance(argument, str) else None
    return found


def test_globals_of_a_fresh_snapshot(snapshot: Path) -> None:
    data = snapshot.read_bytes()
    assert asked_globals(data) == OUR_GLOBALS
    assert data[:2] == b"\x80\x04", "protocol 4"
    document = pickle_reader.read(data)
    assert {name.replace(".", " ") for name in document.globals} == {name.replace(".", " ") for name in OUR_GLOBALS}
    assert list(document.root) == ["G", "D", "G_ema", "augment_pipe", "training_set_kwargs"]


def test_embedded_text_is_our_own_and_appears_once(snapshot: Path) -> None:
    data = snapshot.read_bytes()
    root = pickle_reader.read(data).root
    for record, module in ((root["G"], networks), (root["D"], networks), (root["augment_pipe"], augment)):
        text = Path(module.__file__).read_text(encoding="utf-8")
        assert record.source == text and data.count(text.encode()) == 1
    assert root["G"].state["_init_args"] == () and root["G"].state["training"] is False


def test_tensor_bytes_are_what_stock_torch_reads(snapshot: Path) -> None:
    """The storages we write ourselves, opened by torch's own weights-only reader."""
    records = network_pickle.module_tensors(pickle_reader.read(snapshot.read_bytes()).root["G"])
    data = snapshot.read_bytes()
    starts = [position for opcode, _, position in pickletools.genops(data) if opcode.name.endswith("BINBYTES")]
    ends = [position for _, _, position in pickletools.genops(data)]
    assert len(starts) > len(records)
    for record in records.values():
        start = max(position for position in starts if position < record.storage.blob.start)
        payload_start = start + (5 if data[start : start + 1] == b"B" else 2)
        assert record.storage.blob.end in ends
        storage = torch.load(io.BytesIO(data[payload_start : record.storage.blob.end]), weights_only=True)
        numbers = torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage)
        assert storage.dtype == record.dtype and torch.equal(numbers, record.tensor().flatten())


@pytest.mark.parametrize("path", ["training/networks.py", "training/augment.py"])
def test_sources_are_python_38(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 8))
    for node in ast.walk(tree):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        for place in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            assert place is None or not any(isinstance(n, ast.BitOr) for n in ast.walk(place)), f"{where}: X | Y"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            assert not isinstance(node.left, (ast.Dict, ast.DictComp)), f"{where}: dict | dict needs Python 3.9"
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            assert node.value.id not in ("list", "dict", "tuple", "set", "type"), f"{where}: subscripted builtin type"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("removeprefix", "removesuffix"), f"{where}: str.{node.attr} needs Python 3.9"
        if isinstance(node, ast.Call):
            names = [keyword.arg for keyword in node.keywords]
            assert not (isinstance(node.func, ast.Name) and node.func.id == "zip" and "strict" in names), where


@pytest.mark.parametrize("path", ["training/networks.py", "training/augment.py"])
def test_sources_use_only_contract_names(path: str) -> None:
    aliases = {name.split(".")[-1]: name for name in CONTRACT}
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            assert node.attr in CONTRACT[aliases[node.value.id]], f"{path}:{node.lineno}: {node.value.id}.{node.attr}"


def test_state_holds_no_numpy_scalar() -> None:
    def check(value: Any, where: str) -> None:
        assert not isinstance(value, np.generic), f"{where} is a {type(value)}"
        if isinstance(value, dict):
            for key, item in value.items():
                check(item, f"{where}.{key}")
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(item, where)

    for name, net in small_networks().items():
        for path, module in net.named_modules():
            tables = ("_parameters", "_buffers", "_modules")
            state = {key: value for key, value in vars(module).items() if key not in tables}
            check(state, f"{name}.{path}")


LIBRARY = '''
"""A checkout of the family as section 3.1 of the format describes it: it executes the embedded text."""
import copy, sys, types, uuid

_modules = {}
_source = {}

def persistent_class(orig_class):
    if getattr(orig_class, "_decorated", None) is orig_class:
        return orig_class
    source = _source.get(orig_class.__module__)
    class Decorator(orig_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = copy.deepcopy(args), copy.deepcopy(kwargs)
        @property
        def init_kwargs(self):
            return copy.deepcopy(self._init_kwargs)
        def __reduce__(self):
            meta = dict(type="class", version=6, module_src=source, class_name=orig_class.__name__)
            return (_reconstruct_persistent_obj, ({**meta, "state": dict(self.__dict__)},), None)
    Decorator.__name__ = orig_class.__name__
    Decorator._decorated = Decorator
    return Decorator

def _reconstruct_persistent_obj(meta):
    assert meta["version"] == 6 and meta["type"] == "class"
    module = _modules.get(meta["module_src"])
    if module is None:
        name = "_imported_module_" + uuid.uuid4().hex
        module = types.ModuleType(name)
        sys.modules[name] = module
        _modules[meta["module_src"]] = module
        _source[name] = meta["module_src"]
        exec(meta["module_src"], module.__dict__)
    cls = persistent_class(getattr(module, meta["class_name"]))
    obj = cls.__new__(cls)
    obj.__setstate__(dict(meta["state"]))
    return obj
'''

VISITOR = '''
import copy, pickle, sys
import torch
real, fake, snapshot, output = sys.argv[1:]
sys.path.insert(0, real)
import _fill                                       # our operators, under other names
for name in [n for n in sys.modules if n.split(".")[0] in ("torch_utils", "dnnlib", "training", "stylegan_rooted")]:
    _fill.keep.append(sys.modules.pop(name))
sys.path.remove(real)
sys.path.insert(0, fake)
data = pickle.load(open(snapshot, "rb"))
import torch_utils, dnnlib
assert torch_utils.__file__.startswith(fake) and "training" not in sys.modules
G, D, pipe = data["G_ema"], data["D"], data["augment_pipe"]
assert not G.training and type(G).__name__ == "Generator" and type(G).__module__ != "training.networks"
again = pickle.loads(pickle.dumps(copy.deepcopy(data)))
fresh = type(D)(**D.init_kwargs)                   # what force_fp16 and friends do
fresh.load_state_dict(D.state_dict())
z, c = torch.linspace(-2, 2, 16).reshape(2, 8), torch.eye(2)
with torch.no_grad():
    image = G(z, c, noise_mode="const", force_fp32=True)
    assert torch.equal(again["G_ema"](z, c, noise_mode="const", force_fp32=True), image)
    result = dict(image=image, logits=D(image, c, force_fp32=True), logits_fresh=fresh(image, c, force_fp32=True),
                  augmented=pipe(image, debug_percentile=0.3), p=pipe.p, w_avg=G.mapping.w_avg)
torch.save(result, output)
'''


def fake_checkout(folder: Path) -> tuple[Path, Path]:
    """Two folders: a library that offers the contract names only, and a bridge that lends it our operators."""
    lines = ["keep = []", "import importlib"]
    for module, names in CONTRACT.items():
        path = folder / "fake" / Path(*module.split(".")).with_suffix(".py")
        for parent in list(path.relative_to(folder / "fake").parents)[:-1]:
            (folder / "fake" / parent).mkdir(parents=True, exist_ok=True)
            (folder / "fake" / parent / "__init__.py").touch()
        alias = module.replace(".", "_")
        lines.append(f"{alias} = importlib.import_module({module!r})")
        path.write_text("import _fill\n" + "".join(f"{name} = _fill.{alias}.{name}\n" for name in names))
    (folder / "fake" / "torch_utils" / "persistence.py").write_text(LIBRARY)
    (folder / "fake" / "dnnlib").mkdir()
    (folder / "fake" / "dnnlib" / "__init__.py").write_text("from .util import EasyDict\n")
    (folder / "fake" / "dnnlib" / "util.py").write_text(
        "class EasyDict(dict):\n"
        "    def __getattr__(self, name):\n"
        "        try: return self[name]\n"
        "        except KeyError: raise AttributeError(name)\n"
        "    def __setattr__(self, name, value): self[name] = value\n"
    )
    (folder / "bridge").mkdir()
    (folder / "bridge" / "_fill.py").write_text("\n".join(lines))
    return folder / "fake", folder / "bridge"


def test_our_snapshot_opens_in_a_checkout_of_the_family(snapshot: Path, tmp_path: Path) -> None:
    fake, bridge = fake_checkout(tmp_path)
    arguments = [str(ROOT), str(fake), str(snapshot), str(tmp_path / "result.pt")]
    program = f"import sys; sys.path.insert(0, {str(bridge)!r})\n{VISITOR}"
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    theirs = torch.load(tmp_path / "result.pt", weights_only=True)
    ours = network_pickle.load(snapshot)
    z, c = torch.linspace(-2, 2, 16).reshape(2, 8), torch.eye(2)
    image = ours.G_ema(z, c, noise_mode="const", force_fp32=True)
    assert torch.equal(theirs["image"], image) and torch.equal(theirs["w_avg"], ours.G_ema.mapping.w_avg)
    assert torch.equal(theirs["logits"], ours.D(image, c, force_fp32=True))
    assert torch.equal(theirs["logits_fresh"], theirs["logits"])
    assert torch.equal(theirs["augmented"], ours.augment_pipe(image, debug_percentile=0.3))


HOSTILE = '''
import json, os, resource, sys, time
from training import network_file, network_pickle
from stylegan_rooted.inspect import inspect_file
folder, warm_up, forbidden = sys.argv[1], sys.argv[2], tuple(json.loads(sys.argv[3]))
network_pickle.load(warm_up)
inspect_file(warm_up).as_json()
watching, events = False, []
def watch(event, args):
    if watching and event in forbidden:
        events.append(f"{event} {args!r}"[:200])
sys.addaudithook(watch)
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
verdicts = {}
for name in sorted(os.listdir(folder)):
    path = os.path.join(folder, name)
    start, message = time.monotonic(), None
    watching = True
    try:
        network_pickle.load(path)
    except network_pickle.PickleError as error:
        message = str(error)
    try:
        opens = network_file.load(path) is not None
    except network_pickle.PickleError:
        opens = False  # also where inert networks do not fit each other
    report = inspect_file(path)
    watching = False
    verdicts[name] = dict(message=message, opens=opens, safe=report.safe, loads=report.loads,
                          refused=report.refused_globals,
                          seconds=time.monotonic() - start, events=list(events))
    events.clear()
time.sleep(0.5)
print(json.dumps(verdicts))
'''


def hostile_verdicts(files: dict[str, bytes], warm_up: Path, folder: Path) -> dict[str, dict]:
    """Load and inspect files in one watched process with 6 GiB of address space; the marker must stay absent."""
    (folder / "hostile").mkdir()
    for name, data in files.items():
        (folder / "hostile" / name).write_bytes(data)
    marker = folder / "MARKER"
    result = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(folder / "hostile"), str(warm_up), json.dumps(FORBIDDEN_EVENTS)],
        cwd=ROOT, env={"MARKER": str(marker), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert not marker.exists(), "a payload ran"
    return json.loads(result.stdout)


def check_verdicts(index: list[dict], verdicts: dict[str, dict]) -> None:
    for entry in index:
        verdict = verdicts[entry["file"]]
        name, message = entry["file"], verdict["message"]
        assert verdict["events"] == [], f"{name}: {verdict['events']}"
        assert verdict["seconds"] < 10, f"{name} took {verdict['seconds']} s"
        assert verdict["loads"] == verdict["opens"] and not (verdict["opens"] and message)
        if message is not None:
            assert message.isprintable() and name in message and len(message) < 600, message
        if entry["kind"] == "code":
            assert "allow-list" in message and not verdict["safe"] and verdict["refused"], name
            assert verdict["refused"][0] in message
        elif entry["kind"] == "malformed":
            assert "truncated" in message and not verdict["safe"], name
        elif entry["kind"] in ("source", "data"):
            assert message is None and verdict["safe"], f"{name} is inert, yet refused: {message}"
        elif name[:2] in ("23", "24"):
            assert "announces" in message or "memo index" in message
        else:
            assert "not a network snapshot" in message


def test_hostile_goldens(goldens: Path, snapshot: Path, tmp_path: Path) -> None:
    folder = goldens / "pickles" / "malicious"
    index = json.loads((folder / "index.json").read_text())["files"]
    files = {entry["file"]: (folder / entry["file"]).read_bytes() for entry in index}
    assert len(index) == 27
    check_verdicts(index, hostile_verdicts(files, snapshot, tmp_path))


def test_hostile_local_copies(data_dir: Path, snapshot: Path, tmp_path: Path) -> None:
    folder = data_dir / "pickles" / "malicious"
    index = json.loads((folder / "index.json").read_text())["files"]
    files = {path.name: path.read_bytes() for path in folder.glob("*.pkl")}
    files |= {path.stem: gzip.decompress(path.read_bytes()) for path in folder.glob("*.pkl.gz")}
    assert set(files) == {entry["file"] for entry in index} and len(files) > 20
    check_verdicts(index, hostile_verdicts(files, snapshot, tmp_path))


_watch: dict[str, Any] = {"on": False, "installed": False, "events": []}


def _hook(event: str, arguments: tuple) -> None:
    if _watch["on"] and event in FORBIDDEN_EVENTS and event != "import":
        _watch["events"].append(event)


@pytest.fixture(scope="module")
def victim(data_dir: Path) -> bytes:
    """A genuine snapshot of 28 kB whose embedded text must never run."""
    data = gzip.decompress((data_dir / "pickles/malicious/21_embedded_source_writes_marker.pkl.gz").read_bytes())
    network_pickle.parse(data)  # imports and caches are warm before anything is watched
    if not _watch["installed"]:
        sys.addaudithook(_hook)
        _watch["installed"] = True
    return data


KINDS = ["replace", "insert", "cut", "repeat"]
MUTATION = st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4), st.sampled_from(KINDS))


@settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4))
def test_mutated_snapshots_never_execute(victim: bytes, mutations: list) -> None:
    data = victim
    for place, piece, kind in mutations:
        at = min(int(place * len(data)), len(data) - 1)
        stop = {"replace": at + len(piece), "insert": at, "cut": at + 40 * len(piece), "repeat": at}[kind]
        data = data[:at] + (b"" if kind == "cut" else data[at : at + 200] if kind == "repeat" else piece) + data[stop:]
    _watch["events"].clear()
    _watch["on"] = True
    try:
        result = network_pickle.parse(data)
        assert type(result["G"]) is networks.Generator and type(result["D"]) is networks.Discriminator
    except network_pickle.PickleError as error:
        assert str(error).isprintable()
    finally:
        _watch["on"] = False
    assert _watch["events"] == []


def test_the_watch_sees_an_execution(victim: bytes) -> None:
    """The two tests above are able to fail."""
    import pickle

    _watch["on"] = True
    try:
        pickle.loads(b"c_codecs\nencode\n0N.")
        exec("pass")
    finally:
        _watch["on"] = False
    assert {"pickle.find_class", "compile", "exec"} <= set(_watch["events"])
    _watch["events"].clear()
