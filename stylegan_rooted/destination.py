"""What a command may write over: nothing unless told to, never what it reads, never what is not a regular file."""

import os
from collections.abc import Sequence
from pathlib import Path

from stylegan_rooted import finetune
from training import network_file

Given = Sequence["str | os.PathLike"]


def check_file(path: "str | os.PathLike", *, name: str, sources: Given, overwrite: bool) -> Path:
    """Refuse a file that may not be written, before any work.

    Args:
        path: file that is to be written.
        name: what the command line calls it, e.g. DEST or --grid.
        sources: what the command reads: paths, URLs, folders with networks.
        overwrite: whether an existing file may be replaced.

    Raises:
        ValueError: it is one of the sources.
        OSError: it exists and may not be replaced, or its folder cannot be written.
    """
    path = Path(path)
    finetune.check_outdir(str(path.parent), option=f"{name}: folder")
    for source in sources:
        if any(path.exists() and os.path.samefile(file, path) for file in _files_of(source)):
            raise ValueError(f"{name} {path} is read as well (as {source}); name another {name}")
    if path.is_dir():
        raise IsADirectoryError(f"{name} {path} is a folder; name a file")
    if os.path.lexists(path) and not path.is_file():
        raise OSError(f"{name} {path} is no regular file but a device, pipe or broken link; name another {name}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{name} {path} exists; --overwrite replaces it")
    return path


def _files_of(source: "str | os.PathLike") -> list[str]:
    """The existing files that opening a network reads; none of a URL."""
    path = os.fspath(source)
    inside = (network_file.FOLDER_WEIGHTS, network_file.FOLDER_CONFIG)
    files = [os.path.join(path, name) for name in inside] if os.path.isdir(path) else [path]
    return [file for file in files if os.path.exists(file)]
