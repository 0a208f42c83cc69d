"""Attribute dictionary, readable durations, and opening of files by path or URL. Standard library only."""

import contextlib
import errno
import hashlib
import io
import os
import re
import stat
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TIMEOUT_SEC = 60.0
CHUNK_BYTES = 1 << 20


class EasyDict(dict):
    """A dict whose items can also be read, set and deleted as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """An OSError inside that names no file, as that of a full disk, names `path`."""
    try:
        yield
    except OSError as err:
        if err.filename is None:
            err.filename = os.fspath(path)
        raise


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading bytes, if it is one: pipes, devices, sockets and folders are refused unopened.

    A pipe would be waited for, a device need not end. Links are followed. Pipes that this process was started with
    (`/dev/stdin`, `<(command)` of a shell) have a writer and are read.

    Raises:
        OSError: It is something else, or cannot be opened; the error names it.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, wanted a file", os.fspath(path))
    inherited = re.fullmatch(r"/dev/stdin|(/dev|/proc/self)/fd/\d+", os.fspath(path))
    if not stat.S_ISREG(mode) and not (inherited and stat.S_ISFIFO(mode)):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise OSError(errno.EINVAL, f"is {kind}, wanted a regular file; copy its content into one", os.fspath(path))
    return open(path, "rb")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` when the block ends well: readers see the old or the new one.

    File and folder are flushed to the disk, so that it holds after a power cut, too. When the block fails nothing is
    left; a process killed inside leaves `.NAME.PID.tmp`.

    Raises:
        OSError: It could not be written; the error names `path`.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(folder)
    except OSError as err:
        if err.filename in (None, temporary):
            err.filename = path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _sync_folder(folder: str) -> None:
    """Make a rename last; a system that can't do this (Windows, some network disks) is left to itself."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def format_time(seconds: float) -> str:
    """Write a duration as `9s`, `2m 43s`, `1h 01m 32s` or `1d 02h 03m`.

    Args:
        seconds: The duration; rounded to whole seconds.
    """
    total = int(round(float(seconds)))
    if total < 0:
        return "-" + format_time(-total)
    minutes, sec = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h {minutes:02d}m"
    if hours:
        return f"{hours}h {minutes:02d}m {sec:02d}s"
    if minutes:
        return f"{minutes}m {sec:02d}s"
    return f"{sec}s"


def is_url(obj: Any, allow_file_urls: bool = False) -> bool:
    """Tell whether `obj` is an http(s) URL, or a file URL where those are allowed."""
    if not isinstance(obj, str):
        return False
    parts = urllib.parse.urlsplit(obj) if "://" in obj else None
    if parts is None:
        return False
    if parts.scheme == "file":
        return bool(allow_file_urls and parts.path)
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def make_cache_dir_path(*paths: str) -> str:
    """Path below the user's cache folder; nothing is created.

    The root is `$STYLEGAN_ROOTED_CACHE`, else `$DNNLIB_CACHE_DIR`, else `$XDG_CACHE_HOME/stylegan-rooted`,
    else `~/.cache/stylegan-rooted`.
    """
    for variable in ("STYLEGAN_ROOTED_CACHE", "DNNLIB_CACHE_DIR"):
        if os.environ.get(variable):
            return os.path.join(os.environ[variable], *paths)
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "stylegan-rooted", *paths)


def open_url(
    url: str | os.PathLike,
    cache_dir: str | os.PathLike | None = None,
    num_attempts: int = 3,
    verbose: bool = True,
    return_filename: bool = False,
    cache: bool = True,
    *,
    sha256: str | None = None,
) -> Any:
    """Open a local file, a file URL or an http(s) URL for reading bytes.

    A download is kept in the cache under a name made of the URL's SHA-256; it is renamed to that when complete.

    Args:
        url: A path or a URL.
        cache_dir: Where downloads are kept; None = `make_cache_dir_path("downloads")`.
        num_attempts: How often a download is tried, at least 1.
        verbose: Say on stderr what is being downloaded.
        return_filename: Return the local path (str) instead of an open file. Needs `cache` for URLs.
        cache: Keep downloads, and reuse those kept.
        sha256: Expected digest of the content (64 hexadecimal digits); None = not checked.

    Returns:
        A binary file object at position 0, or the path.

    Raises:
        ValueError: The digest differs, or the arguments don't fit together.
        OSError: The file cannot be read or the download failed.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 is {sha256!r}, wanted 64 hexadecimal digits")
    if num_attempts < 1:
        raise ValueError(f"num_attempts is {num_attempts}, wanted at least 1")
    text = os.fspath(url)
    if is_url(text, allow_file_urls=True) and not is_url(text):
        text = urllib.request.url2pathname(urllib.parse.urlsplit(text).path)
    if not is_url(text):
        path = Path(text)
        if sha256 is not None:
            _check_digest(path, sha256, source=text)
        if return_filename:
            return str(path)
        return open_regular(path)

    if not cache:
        if return_filename:
            raise ValueError("return_filename needs cache=True for a URL, because a file that is not kept has no name")
        buffer = io.BytesIO()
        _download(text, buffer, num_attempts=num_attempts, verbose=verbose)
        if sha256 is not None and hashlib.sha256(buffer.getvalue()).hexdigest() != sha256.lower():
            raise ValueError(f"content of {text} does not have the expected SHA-256 {sha256}")
        buffer.seek(0)
        return buffer

    folder = Path(cache_dir) if cache_dir is not None else Path(make_cache_dir_path("downloads"))
    path = folder / _cache_name(text)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=folder)
        try:
            with os.fdopen(handle, "w+b") as file:
                _download(text, file, num_attempts=num_attempts, verbose=verbose)
            if sha256 is not None:
                _check_digest(Path(temporary), sha256, source=text)
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    elif sha256 is not None:
        _check_digest(path, sha256, source=f"{path} (cached copy of {text}; delete it to download again)")
    return str(path) if return_filename else path.open("rb")


def _cache_name(url: str) -> str:
    """SHA-256 of the URL, then the harmless part of its file name."""
    tail = re.sub(r"[^A-Za-z0-9._-]", "_", urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1])[-80:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:32]}_{tail or 'file'}"


def _check_digest(path: Path, expected: str, *, source: str) -> None:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected.lower():
        raise ValueError(f"SHA-256 of {source} is {digest.hexdigest()}, expected {expected.lower()}")


def _download(url: str, file: BinaryIO, *, num_attempts: int, verbose: bool) -> None:
    """Copy the content of a URL into `file`, starting over after a failure that may pass."""
    for attempt in range(1, num_attempts + 1):
        if verbose:
            sys.stderr.write(f"Downloading {url}{'' if attempt == 1 else f' (attempt {attempt})'}\n")
        file.seek(0)
        file.truncate()
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SEC) as response:
                announced = response.headers.get("Content-Length")
                received = 0
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    received += len(chunk)
            if announced is not None and received != int(announced):
                raise OSError(f"download of {url} ended after {received} of {announced} bytes")
            return
        except OSError as error:  # urllib's errors are OSErrors
            final = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code != 429
            if final or attempt == num_attempts:
                raise OSError(f"cannot download {url}: {error}") from error
            time.sleep(min(2.0 ** (attempt - 1), 10.0))
