"""What rides along in a network file: settings that name code, and a pickle inside a format without code."""

import json
import pickle
import random
import struct
from pathlib import Path

import pytest
import safetensors
from foreign_files import make_pair

from stylegan_rooted import inspect
from stylegan_rooted.cli import main
from torch_utils import pickle_reader, polyglot
from torch_utils.pickle_reader import PickleError
from training import data_record, network_file, network_pickle, weights_file

SCRIPTS = str(Path(__file__).resolve().parent.parent / "scripts")
HOSTILE = {
    "class_name": "subprocess.Popen",
    "args": ["sh", "-c", "touch executed"],
    "path": "x.zip",
    "xflip": True,
    "resolution": "8; touch executed",
}
CLEAN = {"class_name": data_record.CLASS_NAME, "path": "x.zip", "xflip": True}


def write_hostile(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network file whose record of the data set is not what this family writes."""
    path = folder / f"hostile.{kind}"
    if kind == "pkl":
        monkeypatch.syspath_prepend(SCRIPTS)
        import build_hostile

        path.write_bytes(build_hostile.with_entries(training_set_kwargs=HOSTILE))
    else:
        weights_file.save(path, **make_pair(8))
        rewrite(path, lambda config: config.update(training_set_kwargs=HOSTILE))
    return path


def rewrite(path: Path, edit: object) -> None:
    """Change the configuration in the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    config = json.loads(header["__metadata__"]["config"])
    edit(config)  # type: ignore[operator]
    header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("kind", ["pkl", "safetensors"])
def test_settings_that_name_code_are_not_passed_on(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_hostile(kind, tmp_path, monkeypatch)
    assert network_file.load(source).training_set_kwargs == CLEAN
    for target in ("a.pkl", "a.safetensors", "folder/"):
        main(["convert", str(source), f"{tmp_path}/{target}"])
        said = capsys.readouterr().err
        assert "subprocess.Popen" in said and "left out: args, resolution" in said
        dest = network_file.locate(tmp_path / target)
        assert network_file.load(dest).training_set_kwargs == CLEAN
        if target == "a.pkl":
            root = pickle_reader.survey(Path(dest).read_bytes()).root
            assert pickle_reader.plain(root["training_set_kwargs"]) == CLEAN
        else:
            assert network_file.load(dest).config["training_set_kwargs"] == CLEAN
    report = inspect.inspect_file(source)
    assert any("subprocess.Popen" in note for note in report.notes), "told, though nothing here would call it"


def test_writers_hold_the_record_against_the_list_themselves(tmp_path: Path) -> None:
    network_pickle.save(tmp_path / "a.pkl", **make_pair(8), training_set_kwargs=HOSTILE)
    root = pickle_reader.survey((tmp_path / "a.pkl").read_bytes()).root
    assert pickle_reader.plain(root["training_set_kwargs"]) == CLEAN
    config = weights_file.save(tmp_path / "a.safetensors", **make_pair(8), about={"training_set_kwargs": HOSTILE})
    assert config["training_set_kwargs"] == CLEAN


def test_the_familys_own_records_stay_whole() -> None:
    record = {**CLEAN, "use_labels": False, "max_size": 123, "yflip": False, "resolution": 16, "random_seed": 3}
    assert data_record.known(record) == (record, ())
    assert data_record.known(None) == (None, ())
    kept, notes = data_record.known({i: i for i in range(9)})
    assert kept == {} and notes[0].endswith("0, 1, 2, 3, 4 and 4 more")
    assert data_record.known({"path": "x" * 5000})[0] == {}


def as_pickle_too(data: bytes, payload: bytes) -> bytes:
    """A safetensors file that an unpickler takes for a LONG4, a UNICODE up to the header's last byte, and `payload`.

    The header's size is 0x8b + 256 n. 0x8b is LONG4, which swallows n bytes from byte 5 on: up to a V in the metadata.
    """
    length = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    numbers[: len(payload)] = payload
    start = '{"__metadata__":{"a":"'
    config = header.pop("__metadata__")["config"]
    rest = f'V","config":{json.dumps(config)}}},{json.dumps(header)[1:]}'
    for n in range(len(start), 1000):
        text = (start + "x" * (n - 3 - len(start)) + rest).encode()
        size = 0x8B + 256 * n
        if len(text) < size:
            return struct.pack("<Q", size) + text + b" " * (size - 1 - len(text)) + b"\n" + bytes(numbers)
    raise AssertionError("the header is too large for this trick")


PAYLOADS = {
    "cbuiltins\nprint\n(S'executed'\ntR.": "builtins.print",
    "(S'executed'\nibuiltins\nprint\n.": "builtins.print",
    "\x80\x04\x8c\x08builtins\x8c\x05print\x93\x8c\x08executed\x85R.": "its stack",
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_safetensors_file_that_is_a_pickle_too(payload: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights_file.save(tmp_path / "good.safetensors", **make_pair(8))
    path = tmp_path / "both.pkl"
    path.write_bytes(as_pickle_too((tmp_path / "good.safetensors").read_bytes(), payload.encode("latin-1")))
    with open(path, "rb") as stream:
        pickle.load(stream, encoding="latin-1")  # noqa: S301  (what the file is about: it only prints)
    assert capsys.readouterr().out == "executed\n"
    assert safetensors_itself_takes(path)
    report = inspect.inspect_file(path)
    assert not report.safe and not report.loads and PAYLOADS[payload] in report.reasons[0]
    with pytest.raises(PickleError, match="a pickle as well, which imports"):
        network_file.load(path)
    main(["inspect", str(path)])
    assert "safe: no (do not open this file with an ordinary unpickler)" in capsys.readouterr().out


def safetensors_itself_takes(path: Path) -> bool:
    with safetensors.safe_open(path, framework="pt") as file:
        return "G_ema.mapping.w_avg" in file.keys()


def test_honest_files_are_not_called_pickles(tmp_path: Path) -> None:
    """Also those whose first byte happens to be an opcode: sizes of headers are multiples of 8."""
    random_bytes = random.Random(0)
    for number in range(2000):
        size = 8 * number + 64
        data = struct.pack("<Q", size) + b'{"a": 0}' + b" " * (size - 8) + random_bytes.randbytes(300)
        assert polyglot.imported_name(data) is None, size
    weights_file.save(tmp_path / "good.safetensors", **make_pair(8))
    report = inspect.inspect_file(tmp_path / "good.safetensors")
    assert report.safe and report.loads


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", None),
        (b"N.", None),
        (b"\x8b\xff\xff\xff\xffcos\nsystem\n", None),  # a length beyond the end
        (b"c\0\nx\n", None),  # no module is called so
        (b"cos\nsystem", None),  # an unfinished line
        (b"cos\nsystem\n", "os.system"),
        (b"\x80\x04cnt\nsystem\n", "nt.system"),
        (b"N.\x95" + bytes(8) + b"cos\nsystem\n", "os.system"),  # behind the end of a first pickle
        (b"N0" * 20_000, "something after 10000 opcodes"),
    ],
)
def test_names_in_opcodes(data: bytes, name: str | None) -> None:
    assert polyglot.imported_name(data) == name
