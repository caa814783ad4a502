"""A folder that one process at a time works in, by a lock that ends with the process.

Where folders can be opened and have locks (Linux, macOS), ``flock`` is taken on the folder itself.
Elsewhere a file in it is locked, by the library ``filelock``: on Windows with the system's lock,
where there is none with a mark that names the process, and counts for nothing once it has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from regraft.system.opening import is_link, open_folder, open_to_write

_LOCK = "lock"
_MARK = "lock.owner"

_NO_LOCKS = (
    *(errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF),
)


def is_lock(name: str) -> bool:
    """Whether a file in a work folder is its lock, and no part of the work."""
    return name == _LOCK or name.startswith(f"{_LOCK}.")


class OpenFolder:
    """A folder that is there, told from another one that takes its place later.

    Attributes:
        path: where it was opened.
    """

    def __init__(self, path: Path) -> None:
        """Open a folder, not what a link in its place leads to.

        Raises:
            FileNotFoundError: there is nothing.
            OSError: there is no folder, or the system refused.
        """
        self.path = path
        self._fd = open_folder(path)
        self._file: int | None = None
        self._mark: Any = None

    def found(self) -> os.stat_result:
        """Return what the system says of the folder."""
        return self.path.lstat() if self._fd is None else os.fstat(self._fd)

    def set_mode(self, mode: int) -> None:
        """Give the folder a mode."""
        if self._fd is not None and hasattr(os, "fchmod"):
            os.fchmod(self._fd, mode)
        else:
            self.path.chmod(mode)

    def lock(self) -> bool:
        """Take the folder's lock; return False if another process holds it.

        On a file system without locks it is taken always: two at a time are then not noticed.

        Raises:
            FileNotFoundError: its last owner has just removed it.
            OSError: the system refused.
        """
        take = _native_lock()
        if take is None:
            return self._lock_by_mark()
        held = self._file if self._fd is None else self._fd
        if held is None:
            held = self._file = open_to_write(self.path / _LOCK, mode=0o600)
        try:
            return take(held)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def _lock_by_mark(self) -> bool:
        filelock = _filelock()
        mark = filelock.SoftFileLock(self.path / _MARK)
        try:
            mark.acquire(blocking=False)
        except filelock.Timeout:
            return False
        self._mark = mark
        return True

    def is_in_place(self) -> bool:
        """Whether the folder is the one at its path; its last owner may just have removed it."""
        held, path = (
            (self._fd, self.path) if self._file is None else (self._file, self.path / _LOCK)
        )
        try:
            return held is None or os.path.samestat(os.fstat(held), path.stat())
        except FileNotFoundError:
            return False

    def remove(self, *, as_far_as_can_be: bool = False) -> None:
        """Remove the folder, which is locked, with all it holds, and let go of the lock.

        The lock goes last, so nobody comes in before all else is gone. A lock file that is open is
        removed first if the system lets it; else whoever takes it meanwhile keeps it from removal.

        Args:
            as_far_as_can_be: whether what cannot be removed stays, and nothing is raised.

        Raises:
            OSError: the system refused.
        """
        try:
            if self._file is None and self._mark is None:
                shutil.rmtree(self.path, ignore_errors=as_far_as_can_be)
                return
            for path in self.path.iterdir():
                if not is_lock(path.name):
                    with contextlib.suppress(*[OSError] * as_far_as_can_be):
                        remove_all(path)
            self._remove_lock()
        finally:
            self.close()
        self._remove_lock()

    def _remove_lock(self) -> None:
        """Remove the lock's file and then the folder, unless somebody else has them now."""
        with contextlib.suppress(OSError):
            (self.path / _LOCK).unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def close(self) -> None:
        """Let go of the lock, and of the folder."""
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.release()
        for fd in (self._file, self._fd):
            if fd is not None:
                os.close(fd)
        self._file = self._fd = None

    def __enter__(self) -> OpenFolder:
        """Return the folder."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def remove_all(path: Path) -> None:
    """Remove a file, a link, or a folder with all it holds."""
    if path.is_dir() and not is_link(path):
        shutil.rmtree(path)
    else:
        path.unlink()


def _native_lock() -> Callable[[int], bool] | None:
    """Return what locks an open file or folder, as far as the system has such a thing."""
    try:
        fcntl = import_module("fcntl")
    except ImportError:
        return _windows_lock()

    def flock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    return flock


def _windows_lock() -> Callable[[int], bool] | None:
    try:
        import_module("msvcrt")
    except ImportError:
        return None
    lock_descriptor = _filelock().lock_descriptor
    return lambda fd: bool(lock_descriptor(fd, blocking=False))


def _filelock() -> Any:
    """Import the library, which takes a while, and warns where the system has no locks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("filelock")
