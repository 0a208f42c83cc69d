"""A lock on a folder: one process at a time. Knows nothing of what the folder holds.

The lock is the kernel's (flock), so it is free as soon as its holder ends, however it ends.
"""

import errno
import os
from pathlib import Path

FALLBACK_NAME = ".lock"


class FolderLock:
    """Exclusive hold on `folder` until `release` or the end of the process.

    The folder itself is locked where the file system can do that, so nothing is left behind; elsewhere (network disks)
    a file `.lock` inside. Systems without flock (Windows) are not locked.

    Raises:
        BlockingIOError: Another process holds it (only with `wait=False`).
        OSError: The folder cannot be opened.
    """

    def __init__(self, folder: str | os.PathLike, *, wait: bool) -> None:
        self._descriptor: int | None = None
        try:
            import fcntl
        except ImportError:
            return
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, how)
            except OSError as err:
                if err.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                    raise
                os.close(descriptor)
                descriptor = os.open(Path(folder) / FALLBACK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
                fcntl.flock(descriptor, how)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others have it; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
