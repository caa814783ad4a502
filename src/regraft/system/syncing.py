"""Flushing to the disk: files, and the entries of folders."""

from __future__ import annotations

import contextlib
import errno
import os
from importlib import import_module
from pathlib import Path

from regraft.system.opening import open_folder, open_past

_NOT_HERE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY)


def sync_file(fd: int) -> None:
    """Flush an open file to the disk; on macOS to its platter, which its ``fsync`` does not.

    Raises:
        OSError: the disk did not take it.
    """
    with contextlib.suppress(ImportError):
        fcntl = import_module("fcntl")
        if hasattr(fcntl, "F_FULLFSYNC"):
            try:
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            except OSError as error:  # a file system on a network, say
                if error.errno not in _NOT_HERE:
                    raise
            else:
                return
    os.fsync(fd)


def sync_path(path: Path) -> None:
    """Flush a file of this user's, which somebody else has written and closed.

    Raises:
        OSError: it cannot be opened, or the disk did not take it.
    """
    fd = open_past(path, 0)  # to write: Windows flushes no other
    try:
        sync_file(fd)
    finally:
        os.close(fd)


def sync_place(path: Path) -> None:
    """Flush the entries of the folder that an output was put into, where links lead to as well.

    One in which files may be made but that may not be read is flushed with all else there is.

    Raises:
        OSError: the system refused.
    """
    try:
        sync_folder(path.resolve())
    except PermissionError:
        if not hasattr(os, "sync"):
            raise
        os.sync()


def sync_folder(path: Path) -> None:
    """Flush a folder's entries; where folders cannot be opened (Windows) nothing can be done.

    Raises:
        OSError: the system refused.
    """
    fd = open_folder(path)
    if fd is None:
        return
    try:
        sync_file(fd)
    finally:
        os.close(fd)
