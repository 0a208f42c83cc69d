"""The door for network files: tells the format by the content, hands the bytes to its reader, checks what comes back.

Every command opens its networks here. Nothing in a file is executed, whatever it is.
Documented in docs/formats.md.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from dnnlib.util import is_url, open_url
from torch_utils.pickle_reader import PickleError, printable
from training import legacy_tf, network_pickle, recognise, rosinality, state_dict, weights_file
from training.network_pickle import NetworkFile

FOLDER_WEIGHTS = "model.safetensors"
FOLDER_CONFIG = "config.json"
REMEDY = "give a file that docs/formats.md lists"


def load(path_or_url: "str | os.PathLike") -> NetworkFile:
    """Open networks in whatever format, by content and not by name, without executing anything.

    Args:
        path_or_url: a snapshot pickle of StyleGAN2-ADA, of the StyleGAN3 repository's StyleGAN2 or ours; a TensorFlow
            StyleGAN2 pickle; a rosinality checkpoint; a state dict of torch.save; a safetensors file; or a folder with
            `model.safetensors`.

    Raises:
        PickleError: none of these, damaged, or hostile; one line with what was found and what to do.
        OSError: the file cannot be read.
    """
    path = locate(path_or_url)
    with open_url(path) as stream:
        data = stream.read()
    try:
        return _network_file(parse(data, path), path=os.fspath(path_or_url), sha256=hashlib.sha256(data).hexdigest())
    except PickleError as error:
        raise PickleError(f"{printable(os.fspath(path_or_url), 500)}: {error}") from None


def locate(path_or_url: "str | os.PathLike") -> str:
    """The file to read: of a folder its `model.safetensors`.

    Raises:
        FileNotFoundError: a folder without one.
    """
    path = os.fspath(path_or_url)
    if is_url(path) or not os.path.isdir(path):
        return path
    inside = os.path.join(path, FOLDER_WEIGHTS)
    if not os.path.isfile(inside):
        raise FileNotFoundError(f"{path} is a folder without {FOLDER_WEIGHTS}; give a file, or a folder that has one")
    return inside


def parse(data: bytes, path: "str | None" = None) -> dict[str, Any]:
    """Build our networks from the bytes of a file.

    Args:
        data: the whole file.
        path: where it was read from (see `locate`), for the `config.json` that may lie beside a safetensors file.

    Returns:
        The fields of `NetworkFile` except path and sha256; those the format does not have may be missing.

    Raises:
        PickleError: see `load`; the message lacks the file's name.
    """
    found = _parse(data, path)
    for key in ("G", "D"):
        for name in ("img_resolution", "img_channels", "c_dim"):
            got, wanted = (getattr(found.get(which), name, None) for which in (key, "G_ema"))
            if found.get(key) is not None and got != wanted:
                raise PickleError(f"{name} of {key} is {got}, of G_ema {wanted}; the networks do not belong together")
    return found


def _parse(data: bytes, path: "str | None") -> dict[str, Any]:
    """`parse` without regard to whether the networks fit each other."""
    stranger = recognise.stranger(data)
    if stranger is not None:
        raise PickleError(f"this is {stranger[0]}: {stranger[1]}")
    if recognise.is_safetensors(data):
        beside = None if path is None or is_url(path) else Path(path).with_name(FOLDER_CONFIG)
        tensors, config = weights_file.read(data, beside)
        if weights_file.is_adapter(config):
            raise PickleError(f"this is {weights_file.ADAPTER}, not a network: {weights_file.ADAPTER_REMEDY}")
        weights_file.check_known(config)
        if weights_file.is_ours(config):
            of_folder = path is not None and Path(path).name == FOLDER_WEIGHTS
            notes = weights_file.check_beside(config, beside) if beside is not None and of_folder else ()
            found = weights_file.build(tensors, config)
            return {**found, "notes": (*found["notes"], *notes), "kind": recognise.SAFETENSORS}
        return {**_bare(tensors), "kind": recognise.SAFETENSORS}
    document = recognise.survey(data)
    code, words = recognise.identify(document)
    if code in recognise.FOREIGN:
        raise PickleError(f"this is {words}, which is not supported: {recognise.FOREIGN[code][1]}; {REMEDY}")
    if code in (recognise.LEGACY_TF, recognise.ROSINALITY, recognise.STATE_DICT, "torch"):
        for trouble in (*document.refusals[:1], *filter(None, [document.damage])):
            raise PickleError(trouble)
        if code == "torch":
            raise PickleError(f"a file of torch.save without StyleGAN2 networks in it; {REMEDY}")
        return {**(legacy_tf.parse if code == recognise.LEGACY_TF else _bare)(document.root), "kind": code}
    return {**network_pickle.parse(data), "kind": recognise.SNAPSHOT}


def _bare(root: dict) -> dict[str, Any]:
    """Networks from state dicts, whichever names they use."""
    found = recognise.state_dicts(root)
    families = {key: recognise.family(state) for key, state in found.items()}
    for code in families.values():
        if code in recognise.FOREIGN:
            words, reason = recognise.FOREIGN[code]
            raise PickleError(f"this is {words}, which is not supported: {reason}; {REMEDY}")
    if recognise.ROSINALITY in families.values():
        return rosinality.parse(root)
    if recognise.STATE_DICT not in families.values():
        raise PickleError(f"its tensors are not those of StyleGAN2 networks; {REMEDY}")
    return state_dict.parse(found)


def _network_file(found: dict[str, Any], *, path: str, sha256: str) -> NetworkFile:
    return NetworkFile(
        G=found.get("G"),
        D=found.get("D"),
        G_ema=found["G_ema"],
        augment_pipe=found.get("augment_pipe"),
        training_set_kwargs=found.get("training_set_kwargs"),
        path=path,
        sha256=sha256,
        kind=found["kind"],
        notes=tuple(dict.fromkeys(found.get("notes", ()))),
        config=found.get("config"),
    )
