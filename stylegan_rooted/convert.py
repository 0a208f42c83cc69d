"""Any network file that opens here, in another format. Knows formats and options; the writers know their own.

Documented in docs/formats.md.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stylegan_rooted import destination, finetune, model_folder, onnx_file, origin, portable
from stylegan_rooted.convert_options import GRAPHS, SUFFIXES, ConvertOptions, choose_format
from torch_utils import misc
from training import network_file, network_pickle, rosinality, run_dir, weights_file
from training.network_pickle import NetworkFile

Say = Callable[[str], None]


def convert(
    source: "str | os.PathLike",
    dest: "str | os.PathLike",
    to: "str | None" = None,
    options: "ConvertOptions | None" = None,
    *,
    say: Say,
) -> list[Path]:
    """Write the networks of one file in another format.

    Args:
        source: path, URL or folder; any format of docs/formats.md.
        dest: file or folder to write.
        to: one of `FORMATS`; None reads it off the name.
        options: how.
        say: Receives what is lost, assumed or was checked.

    Returns:
        The files written.

    Raises:
        ValueError, OSError: Something the user can mend; nothing has been written then.
    """
    options = options or ConvertOptions()
    to = choose_format(dest, to)
    options.check(to)
    path = check_dest(source, dest, to, options.overwrite)
    if to == "onnx":
        onnx_file.require()
    opened = network_file.load(source)
    for note in opened.notes:
        say(f"Source: {note}")
    about = origin.describe(opened, options.licences)
    path.parent.mkdir(parents=True, exist_ok=True)
    if to in GRAPHS:
        return [_write_graph(opened, path, to, options, about, say)]
    return _WRITERS[to](opened, path, options, about, say)


def check_dest(source: "str | os.PathLike", dest: "str | os.PathLike", to: str, overwrite: bool) -> Path:
    """DEST as a path that may be written.

    Raises:
        ValueError, OSError: a file that would be written is read, or may not be replaced; see `destination`.
    """
    path = Path(dest)
    files = [path]
    if to == "folder":
        finetune.check_outdir(str(path), option="DEST: folder")
        if path.is_dir() and any(path.iterdir()) and not os.path.lexists(path / network_file.FOLDER_WEIGHTS):
            raise FileExistsError(f"DEST {path} is a folder with other things in it; name a new one")
        files = [path / name for name in model_folder.FILES]
    elif to == "safetensors":
        files.append(_config_beside(path))
    for file in files:
        destination.check_file(file, name="DEST", sources=[source], overwrite=overwrite)
    return path


def _config_beside(path: Path) -> Path:
    """NAME.config.json for NAME.safetensors."""
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.config.json")


def _networks(opened: NetworkFile, options: ConvertOptions) -> dict[str, Any]:
    nets = {"G_ema": opened.G_ema, "G": opened.G, "D": opened.D, "augment_pipe": opened.augment_pipe}
    return {**dict.fromkeys(nets), "G_ema": opened.G_ema} if options.only_ema else nets


def _write_pickle(opened: NetworkFile, path: Path, options: ConvertOptions, about: dict, say: Say) -> list[Path]:
    complete = finetune.complete(replace(opened, notes=()), options.seed)
    for note in complete.notes:
        say(f"Dest: {note}, because that family's loaders want one")
    if opened.G is None:
        say("Dest: G is a copy of G_ema")
    assert complete.G is not None and complete.D is not None
    network_pickle.save(
        path,
        G=complete.G,
        D=complete.D,
        G_ema=complete.G_ema,
        augment_pipe=complete.augment_pipe,
        training_set_kwargs=complete.training_set_kwargs,
    )
    return [path]


def _write_safetensors(opened: NetworkFile, path: Path, options: ConvertOptions, about: dict, say: Say) -> list[Path]:
    config = weights_file.save(path, **_networks(opened, options), about=about, dtype=options.dtype)
    run_dir.write_json(_config_beside(path), config)
    return [path, _config_beside(path)]


def _write_folder(opened: NetworkFile, path: Path, options: ConvertOptions, about: dict, say: Say) -> list[Path]:
    existed = path.exists()
    try:
        return model_folder.save(path, _networks(opened, options), about, options.dtype)
    except BaseException:
        if not existed:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _write_rosinality(opened: NetworkFile, path: Path, options: ConvertOptions, about: dict, say: Say) -> list[Path]:
    nets = _networks(opened, options)
    given = {key: nets[key] for key in ("G_ema", "G", "D")}
    for note in rosinality.save(path, **given, any_channels=options.any_channels):
        say(f"Dest: {note}")
    return [path]


def _write_graph(opened: NetworkFile, path: Path, to: str, options: ConvertOptions, about: dict, say: Say) -> Path:
    """Write, read again in the other program, compare; a file that differs does not stay."""
    name = misc.first_nonfinite(opened.G_ema)  # the comparison would not see those of some classes
    if name is not None:
        raise ValueError(f"{opened.path}: G_ema.{name} holds numbers that are not finite; nothing was written")
    exported = portable.export(opened.G_ema, options.part)
    partial = path.with_name(f".{path.name}.{os.getpid()}.unchecked{SUFFIXES[to]}")  # torch looks at the ending
    try:
        if to == "onnx":
            onnx_file.save(exported, partial, about)
            function = onnx_file.load(partial) if onnx_file.can_run() else None
        else:
            portable.save(exported, partial)
            function = portable.load(partial)
        if function is None:
            say("Not checked: onnxruntime is not installed")
        else:
            try:
                difference = portable.check(exported, function)
            except ValueError as error:
                raise ValueError(f"{opened.path}: {error}") from None
            say(f"Checked: the file's numbers differ from the network's by at most {difference:.1g} of the largest")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    say(f"Inputs: {', '.join(exported.inputs)}; output: {exported.output}; any batch size")
    return path


_WRITERS: dict[str, Callable[[NetworkFile, Path, ConvertOptions, dict, Say], list[Path]]] = {
    "pickle": _write_pickle,
    "safetensors": _write_safetensors,
    "folder": _write_folder,
    "rosinality": _write_rosinality,
}
