"""Opening files: with the flags that the system has, and by a look beforehand where it has none."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def _flag(name: str) -> int:
    value: int = getattr(os, name, 0)
    return value


_ALWAYS = _flag("O_CLOEXEC") | _flag("O_BINARY")
"""Not passed on to child processes; and no byte is translated, as Windows would."""

_NO_LINK, _NO_WAIT, FOLDER = _flag("O_NOFOLLOW"), _flag("O_NONBLOCK"), _flag("O_DIRECTORY")


def open_if_regular(path: Path) -> tuple[int | None, int]:
    """Open a regular file for reading; opening a pipe does not wait for a writer.

    Returns:
        Its descriptor, None if it is no regular file, and its mode.

    Raises:
        OSError: there is no such file, or the system refused.
    """
    if not (_NO_WAIT and FOLDER):  # opening a pipe would wait, or folders cannot be opened
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return None, mode
    fd = os.open(path, os.O_RDONLY | _ALWAYS | _NO_WAIT)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd, mode
    os.close(fd)
    return None, mode


def open_to_write(
    path: Path, *, fresh: bool = False, append: bool = False, mode: int = 0o666
) -> int:
    """Open a file to read and write, made if need be; a link in its place is refused.

    Args:
        path: the file.
        fresh: whether it is emptied.
        append: whether writes go to its end.
        mode: what it gets, less the umask, where files have modes.

    Raises:
        OSError: the system refused; ``ELOOP`` of a link.
    """
    if not _NO_LINK and is_link(path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    how = os.O_TRUNC * fresh | os.O_APPEND * append
    return os.open(path, os.O_RDWR | os.O_CREAT | _ALWAYS | _NO_LINK | how, mode)


def open_past(path: Path, flag: int) -> int:
    """Open a file that is there to read and write, with one more flag."""
    return os.open(path, os.O_RDWR | _ALWAYS | flag)


def open_folder(path: Path) -> int | None:
    """Open a folder, not what a link in its place leads to; None where folders cannot be opened.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: there is no folder, or the system refused; ``ENOTDIR`` of a file or a link.
    """
    if FOLDER and _NO_LINK:
        return os.open(path, os.O_RDONLY | _ALWAYS | _NO_LINK | FOLDER)
    if not stat.S_ISDIR(path.lstat().st_mode) or is_link(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return None


def is_link(path: Path) -> bool:
    """Whether a path is a link, or one of Windows' junctions; False if nothing is there."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISLNK(found.st_mode) or getattr(found, "st_reparse_tag", 0) in _JUNCTIONS


_JUNCTIONS = tuple(filter(None, [getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", 0)]))
