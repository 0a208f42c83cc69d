"""Genuine network files for the fuzzer, one or more of each format of docs/formats.md; always the same bytes."""

import argparse
import gzip
import io
import pickle
import pickletools
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import foreign_files  # noqa: E402

from training import network_pickle, rosinality, weights_file  # noqa: E402
from training.augment import AugmentPipe  # noqa: E402

DATA = ROOT / "tests" / "data"
STORED = {
    "snapshot, stylegan2-ada": "pickles/snapshot_b.pkl.gz",
    "snapshot, stylegan3 repository": "pickles/snapshot_c_stylegan3repo.pkl.gz",
    "TensorFlow": "other/legacy_tf.pkl.gz",
    "rosinality, converted, old container": "other/ros-gonly-legacyzip.pt.gz",
}
NARROW = {"channel_base": 32, "channel_max": 4}


def genuine() -> dict[str, bytes]:
    """By name: stored files, and small ones written here."""
    files = {name: gzip.decompress((DATA / path).read_bytes()) for name, path in STORED.items()}
    nets = foreign_files.make_pair(8, synthesis=NARROW, discriminator=NARROW, z_dim=4, w_dim=4)
    pipe = AugmentPipe(xflip=1)
    files["TensorFlow, protocol 2"] = foreign_files.tensorflow_pickle(nets, protocol=2)
    files["TensorFlow, protocol 5"] = foreign_files.tensorflow_pickle(nets, protocol=5)
    whole = {**nets, "augment_pipe": pipe}
    files["snapshot, ours"] = _written(network_pickle.save, **whole, training_set_kwargs={"path": "x"})
    files["safetensors, ours"] = _written(weights_file.save, **whole, about={"licences": {}})
    training = _rosinality_training(nets)
    files["rosinality, training"] = _torch_file(training)
    files["rosinality, training, old container"] = _old_torch_file(training)
    files["rosinality, converted"] = _written(rosinality.save, G_ema=nets["G_ema"], any_channels=True)
    state = {key: foreign_files.state(net) for key, net in nets.items()}
    files["state dict"] = _torch_file(state)
    files["safetensors, bare"] = safetensors.torch.save(state["G_ema"])
    files["state dict, old container"] = _old_torch_file(state["G_ema"])
    return files


def _written(save: Any, **content: Any) -> bytes:
    """The bytes of what `save(path, ...)` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        save(path, **content)
        return path.read_bytes()


def _rosinality_training(nets: dict[str, Any]) -> dict[str, Any]:
    """The dict that rosinality's training saves (other-checkpoints.md 1.1)."""
    content: dict[str, Any] = {
        "g": rosinality.generator_to_theirs(nets["G"]),
        "d": rosinality.discriminator_to_theirs(nets["D"]),
        "g_ema": rosinality.generator_to_theirs(nets["G_ema"]),
    }
    for key in ("g", "d"):
        numbers = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.Adam([numbers], lr=0.002, betas=(0.0, 0.99))
        numbers.sum().backward()
        optimizer.step()
        content[f"{key}_optim"] = optimizer.state_dict()
    args = argparse.Namespace(path="data.lmdb", arch="stylegan2", size=8, latent=4, n_mlp=2, augment=True, lr=0.002)
    return {**content, "args": args, "ada_aug_p": 0.1}


def _torch_file(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _old_torch_file(content: Any) -> bytes:
    """PyTorch's container from before its zip format, float32 numbers only.

    It names storages by their address and sorts them by it; here they are counted, so that the bytes repeat.
    """
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    data = stream.getvalue()
    stream.seek(0)
    for _ in range(4):  # magic number, version, system, value
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
    head, value = data[:start], data[start : stream.tell()]
    keys = [argument for _, argument, _ in pickletools.genops(stream) if isinstance(argument, str)]
    at = stream.tell()
    numbers = {}
    for key in keys:
        stop = at + 8 + 4 * struct.unpack_from("<q", data, at)[0]
        numbers[key], at = data[at:stop], stop
    assert at == len(data), "storages of another type than float32"
    keys.sort(key=lambda key: value.index(_text(key)))
    for i, key in enumerate(keys):
        value = value.replace(_text(key), _text(str(i)))
    return head + value + pickle.dumps([str(i) for i in range(len(keys))], 2) + b"".join(numbers[key] for key in keys)


def _text(text: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()
