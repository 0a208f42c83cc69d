"""Names the format of a file by what is in it: containers, globals, keys and shapes. Builds nothing, executes nothing.

Source: other-checkpoints.md section 2; networks-and-pickles.md sections 3, 5 and 6.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch_utils import pickle_reader
from torch_utils.pickle_reader import Document, ObjectRecord, PersistentRecord, TensorRecord

SNAPSHOT = "snapshot"
LEGACY_TF = "legacy-tf"
ROSINALITY = "rosinality"
STATE_DICT = "state-dict"
SAFETENSORS = "safetensors"
UNKNOWN = "unknown"
READABLE = (SNAPSHOT, LEGACY_TF, ROSINALITY, STATE_DICT, SAFETENSORS)
MAX_SAFETENSORS_HEADER_BYTES = 16 << 20
NETWORK_KEYS = ("G", "D", "G_ema", "g", "d", "g_ema")

# Formats that are known and not read: name in words, why not.
FOREIGN = {
    "stylegan3": (
        "a StyleGAN3 pickle",
        "its generator starts from Fourier features and has no counterpart among StyleGAN2's layers",
    ),
    "stylegan-xl": ("a StyleGAN-XL pickle", "its generator is StyleGAN3's with class embeddings"),
    "r3gan": ("an R3GAN pickle", "its networks have neither styles nor a mapping as StyleGAN2's"),
    "stylegan1-tf": ("a TensorFlow StyleGAN1 pickle", "it normalises features (AdaIN) where StyleGAN2 scales kernels"),
    "stylegan1-rosinality": (
        "a rosinality StyleGAN1 checkpoint",
        "it normalises features (AdaIN) where StyleGAN2 scales kernels",
    ),
    "swagan-rosinality": ("a rosinality SWAGAN checkpoint", "it draws wavelet coefficients, not pixels"),
    "lucidrains": (
        "a lucidrains stylegan2-pytorch checkpoint",
        "its layers differ from StyleGAN2's in noise, styles and residuals",
    ),
}
# What comes in place of a network file, by its first bytes: pattern, name in words, what to do.
_DOWNLOAD = "download it anew, from a direct link"
_UNPACK = "unpack it and give what was inside"
_PICTURE = "pictures to learn from go to --data, as a folder or zip"
_STRANGERS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`"),
    (rb"(\xef\xbb\xbf)?\s*<(!doctype|\?xml|html|head|body|svg|!--)", "a web page (HTML or XML), not the file itself",
     f"the server answered with a page, e.g. that of a login; {_DOWNLOAD}"),
    (rb"(\xef\xbb\xbf)?\s*[{\[]\s*([\"{\[\]}]|-?\d)", "JSON text, not the weights themselves",
     "give the file of the weights; if this is a server's answer, " + _DOWNLOAD),
    (rb"\x1f\x8b", "a gzip archive", f"{_UNPACK} (gunzip; tar xzf)"),
    (rb"\xfd7zXZ\0|BZh[1-9]1AY|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|(?!\x80).{257}ustar",
     "an archive", _UNPACK),
    (rb"\x08[\x01-\x20][\x12\x3a]", "an ONNX graph",
     "graphs are only written; give the network that it was made from"),
    (rb"\x89PNG", "a PNG image", _PICTURE),
    (rb"\xff\xd8\xff", "a JPEG image", _PICTURE),
    (rb"GIF8[79]a|RIFF.{4}WEBP", "an image", _PICTURE),
    (rb"\x89HDF\r\n", "an HDF5 file", "networks of Keras are not read"),
    (rb"\x7fELF|MZ\x90|%PDF", "a program or document", "give a network file"),
    (rb"\0{64}", "a file that begins with zeros, as broken downloads do", _DOWNLOAD),
)  # fmt: skip
_WORDS = {
    SNAPSHOT: "a StyleGAN2 snapshot",
    LEGACY_TF: "a TensorFlow StyleGAN2 pickle",
    ROSINALITY: "a rosinality stylegan2-pytorch checkpoint",
    STATE_DICT: "a state dict of StyleGAN2 networks",
    "torch": "a file of torch.save",
    UNKNOWN: "no known kind of network file",
}


def survey(data: bytes) -> Document:
    """Read a pickle or a file of torch.save against the allow-list of its kind; see `pickle_reader.survey`."""
    document = pickle_reader.survey(data)
    if pickle_reader.TF_NETWORK in document.globals:
        return pickle_reader.survey(data, allowed=pickle_reader.TENSORFLOW_GLOBALS)
    return document


def identify(document: Document) -> tuple[str, str]:
    """Name the format of a pickle or a file of torch.save.

    Args:
        document: result of `survey`.

    Returns:
        A code (one of `READABLE` or `FOREIGN`; 'torch' or 'unknown' if nothing fits) and a description in words.
    """
    code = _identify_pickle(document) if document.container == "pickle" else _identify_torch(document.root)
    words = FOREIGN[code][0] if code in FOREIGN else _WORDS[code]
    if code == "stylegan1-tf":
        words += f" (version {_tf_version(document.root)})"
    return code, words


def is_safetensors(data: bytes) -> bool:
    """Whether the bytes begin as a safetensors file does: the length of a JSON object, then the object."""
    length = int.from_bytes(data[:8], "little") if len(data) > 8 else 0
    return 2 <= length <= min(MAX_SAFETENSORS_HEADER_BYTES, len(data) - 8) and data[8:9] == b"{"


def stranger(data: bytes) -> "tuple[str, str] | None":
    """What a file is that holds no networks at all, told by its first bytes: its name in words, and what to do.

    None for whatever might be a network file. No snapshot and no file of torch.save begins in one of these ways.
    """
    if not data:
        return "an empty file", _DOWNLOAD
    if is_safetensors(data):  # their first bytes are a number, which may look like anything
        return None
    if data[8:9] == b"{" and len(data) - 8 < int.from_bytes(data[:8], "little") <= MAX_SAFETENSORS_HEADER_BYTES:
        return "the beginning of a safetensors file, cut off inside its header", _DOWNLOAD
    for pattern, name, remedy in _STRANGERS:
        if re.match(pattern, data[:512], re.IGNORECASE | re.DOTALL):
            return name, remedy
    return None


def family(names: Mapping[str, Any]) -> "str | None":
    """Whose generator or discriminator a flat mapping of tensor names describes; a format's code or None.

    Args:
        names: mapping from tensor names; the tensors' shapes are not needed.
    """
    if "iwt.ll" in names or "dwt.ll" in names:
        return "swagan-rosinality"
    if "input.input" in names or "final_linear.1.weight" in names:
        return ROSINALITY
    if "synthesis.input.freqs" in names:
        return "stylegan-xl" if "mapping.embed_proj.weight" in names else "stylegan3"
    if "synthesis.b4.const" in names or "b4.out.weight" in names:
        return STATE_DICT
    if any(isinstance(name, str) and name.startswith("generator.progression.") for name in names):
        return "stylegan1-rosinality"
    if any(isinstance(name, str) and name.startswith("G.blocks.0.to_style1") for name in names):
        return "lucidrains"
    return None


def state_dicts(root: Any) -> dict[str, dict]:
    """The state dicts inside the value of a file of torch.save: by the names G, D, G_ema, whatever the file calls them.

    A bare state dict of a generator counts as G_ema, of a discriminator as D; names with a network's name in front
    (`G_ema.mapping.fc0.weight`) are sorted apart.
    """
    if not isinstance(root, dict):
        return {}
    names = {"g": "G", "d": "D", "g_ema": "G_ema"}
    found = {names.get(key, key): root[key] for key in NETWORK_KEYS if isinstance(root.get(key), dict)}
    if found:
        return {key: dict(value) for key, value in found.items()}
    prefixed: dict[str, dict] = {}
    for key, value in root.items():
        net, _, rest = key.partition(".") if isinstance(key, str) else ("", "", "")
        if net in NETWORK_KEYS:
            prefixed.setdefault(names.get(net, net), {})[rest] = value
    if any(family(state) in (ROSINALITY, STATE_DICT) for state in prefixed.values()):
        return prefixed
    if family(root) is None:
        return {}
    is_generator = "input.input" in root or "synthesis.b4.const" in root
    return {"G_ema" if is_generator else "D": {k: v for k, v in root.items() if _is_tensor(v)}}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorRecord) or hasattr(value, "shape")


def _tf_records(root: Any) -> list[ObjectRecord]:
    records = root if isinstance(root, (tuple, list)) else [root]
    return [r for r in records[:3] if isinstance(r, ObjectRecord) and r.name == pickle_reader.TF_NETWORK]


def _tf_version(root: Any) -> Any:
    state = _tf_records(root)[0].state
    return state.get("version") if isinstance(state, dict) else None


def _identify_pickle(document: Document) -> str:
    root = document.root
    tf = _tf_records(root)
    if tf:
        version = _tf_version(root)
        return "stylegan1-tf" if type(version) is int and version < 4 else LEGACY_TF
    if any(name.startswith("R3GAN.") for name in document.globals):
        return "r3gan"
    if not isinstance(root, dict):
        return UNKNOWN
    generator = next((root[key] for key in ("G_ema", "G") if isinstance(root.get(key), PersistentRecord)), None)
    if generator is not None:
        children = generator.table("_modules")
        synthesis, mapping = children.get("synthesis"), children.get("mapping")
        if isinstance(synthesis, PersistentRecord) and "input" in synthesis.table("_modules"):
            with_classes = isinstance(mapping, PersistentRecord) and "embed_proj" in mapping.table("_modules")
            return "stylegan-xl" if with_classes else "stylegan3"
        if isinstance(synthesis, PersistentRecord) and "b4" in synthesis.table("_modules"):
            return SNAPSHOT
    return UNKNOWN


def _identify_torch(root: Any) -> str:
    """Checkpoints of other code bases, all made with torch.save."""
    keys = root if isinstance(root, dict) else {}
    if "GAN" in keys and "version" in keys:
        return "lucidrains"
    if {"generator", "discriminator", "g_running"} <= set(keys) or family(keys) == "stylegan1-rosinality":
        return "stylegan1-rosinality"
    found = [family(state) for state in state_dicts(root).values()]
    for code in found:
        if code in FOREIGN:
            return code
    return next((code for code in found if code is not None), family(keys) or "torch")
