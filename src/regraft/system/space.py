"""Room on the disk: asked for before it is needed, and counted."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from importlib import import_module
from pathlib import Path

_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)

_PREALLOCATE, _ALL, _FROM_END = 42, 4, 3
"""macOS's F_PREALLOCATE, F_ALLOCATEALL and F_PEOFPOSMODE, which Python does not name."""


def give_size(fd: int, size: int, *, reserve: bool = True) -> None:
    """Give an open file its full size.

    Args:
        fd: the file.
        size: its size in bytes.
        reserve: whether to ask the system to set room for all of it aside.

    Raises:
        OSError: there is no room, or the system refused.
    """
    if reserve:
        _reserve(fd, size)
    os.ftruncate(fd, size)


def _reserve(fd: int, size: int) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, max(size, 1))
        else:
            _preallocate(fd, size)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def _preallocate(fd: int, size: int) -> None:
    """Set room aside as macOS does; elsewhere nothing is done."""
    with contextlib.suppress(ImportError):
        fcntl = import_module("fcntl")
        missing = size - os.fstat(fd).st_size
        if hasattr(fcntl, "F_FULLFSYNC") and missing > 0:
            fcntl.fcntl(fd, _PREALLOCATE, struct.pack("=IiqqQ", _ALL, _FROM_END, 0, missing, 0))


def taken(found: os.stat_result) -> int:
    """Return what a file takes on the disk, in bytes; its size where the system does not say."""
    blocks: int | None = getattr(found, "st_blocks", None)
    return found.st_size if blocks is None else blocks * 512


def files_left(path: Path) -> int | None:
    """Return how many more files the file system takes that a path lies in, or would lie in.

    None where the system does not say, or the file system has no limit.
    """
    if not hasattr(os, "statvfs"):
        return None
    there = (each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    try:
        found = os.statvfs(next(there, path))
    except OSError:
        return None
    return found.f_favail if found.f_files else None
