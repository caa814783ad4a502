"""Blocks of the disk that two files share until one of them is written to (reflinks).

XFS and btrfs have them, and some network file systems. Linux alone shares a part of a file
(``FICLONERANGE``); elsewhere, and on other file systems, bytes are written as usual.
"""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from importlib import import_module
from pathlib import Path

_CLONE_RANGE = 0x4020940D
"""``FICLONERANGE`` of linux/fs.h, as most processors number it; others say that there is none."""

_REFUSED = (
    errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP,
    errno.ENOTSUP, errno.EPERM, errno.ETXTBSY, errno.EXDEV,
)  # fmt: skip
"""What a system says that does not share these blocks."""

WIDEST = 2**16
"""Bytes of a block; file systems whose blocks are larger have next to nothing to share here."""


def share_blocks(source: int, at: int, fd: int, position: int, length: int) -> bool:
    """Have a range of one file be a range of another, without a copy; return whether that is so.

    Args:
        source: descriptor of the file that has the bytes.
        at: where they begin in it, a multiple of a block, as are ``position`` and ``length``.
        fd: descriptor of the file that gets them, open to write.
        position: where they go.
        length: how many bytes.

    Raises:
        OSError: the system shares blocks here, and failed.
    """
    try:
        ioctl = import_module("fcntl").ioctl
    except ImportError:
        return False
    try:
        ioctl(fd, _CLONE_RANGE, struct.pack("=qQQQ", source, at, length, position))
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return True


def block_of(fd: int) -> int:
    """Return the bytes of a block of a file system, by an open file of it; 0 if none is told."""
    if not hasattr(os, "fstatvfs"):
        return 0
    found = os.fstatvfs(fd)
    return int(max(found.f_bsize, found.f_frsize))


def shares_with(path: Path, folder: Path) -> bool:
    """Whether a file in a folder may share blocks with a file; tried with one that has no name.

    Raises:
        OSError: the file cannot be read, or the folder not written to.
    """
    source = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            block, size = block_of(file.fileno()), os.fstat(source).st_size
            if not 0 < block <= WIDEST:
                return False
            return not size or share_blocks(source, 0, file.fileno(), 0, min(block, size))
    finally:
        os.close(source)
