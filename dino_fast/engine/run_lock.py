"""The lock of a run directory: one process writes to it at a time.

It is an flock on a file in the directory, so the kernel releases it when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path

from dino_fast.errors import UserError

LOCK = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[int] = set()  # file descriptors


class RunLock:
    """Holds the lock of a run directory from its making until `release`.

    Raises UserError naming host and process where another run holds it, and OSError where the file cannot be made.
    Where the file system has no locks, a warning says so and nothing is held.
    """

    def __init__(self, folder: Path) -> None:
        self._file: int | None = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(self._file)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._file, 1000, 0).decode(errors="replace").strip()
            self.release()
            if error.errno in _UNSUPPORTED:
                warnings.warn(
                    f"the file system of {folder} has no locks ({error.strerror}): start no second run there",
                    stacklevel=2,
                )
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(
                f"another process is writing to the run in {folder}: {holder or 'which one is not known'}. Wait until "
                "it has ended, or stop it, then use --resume; or give another --out"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Lets go of the lock. The file stays: removing it could remove another process's lock."""
        if self._file is not None and self._file in _held:
            _held.discard(self._file)
            os.close(self._file)
        self._file = None

    def __del__(self) -> None:
        self.release()


def _close_in_child() -> None:
    """A forked worker that outlives a killed run must not hold its lock."""
    for file in list(_held):
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
