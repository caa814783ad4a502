"""Renaming folders: where nothing is, where an empty one is, and two in exchange."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

ONLY_IF_ABSENT, EXCHANGE = "only if absent", "exchange"

UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""What :func:`kernel_rename` returns where the kernel or the file system has no such call."""

_AT_CWD = -100
_FLAGS = {
    "renameat2": {ONLY_IF_ABSENT: 1, EXCHANGE: 2},
    "renamex_np": {ONLY_IF_ABSENT: 4, EXCHANGE: 2},
}
"""Linux's RENAME_NOREPLACE and RENAME_EXCHANGE, macOS's RENAME_EXCL and RENAME_SWAP."""


def kernel_rename(source: Path, target: Path, how: str) -> int:
    """Rename in one step as ``how`` says; return 0 or an error's number.

    It is ``ENOSYS`` where the kernel has no such call.
    """
    libc = _libc()
    if hasattr(libc, "renameat2"):
        flag = _FLAGS["renameat2"][how]
        code = libc.renameat2(_AT_CWD, bytes(source), _AT_CWD, bytes(target), flag)
    elif hasattr(libc, "renamex_np"):
        code = libc.renamex_np(bytes(source), bytes(target), _FLAGS["renamex_np"][how])
    else:
        return errno.ENOSYS
    return 0 if code == 0 else ctypes.get_errno()


def can_exchange() -> bool:
    """Whether the system can swap two folders in one step; its file systems may still refuse."""
    libc = _libc()
    return any(hasattr(libc, name) for name in _FLAGS)


def _libc() -> Any:
    """Return the C library; None where there is none that stands for the process (Windows)."""
    try:
        return ctypes.CDLL(None, use_errno=True)
    except TypeError:
        return None


def move_to_absent(folder: Path, target: Path) -> bool:
    """Rename a folder to where nothing is; return False, with nothing done, if something is.

    Where the kernel cannot tell, a look goes before. What comes there in between is still not
    replaced: a folder is renamed over an empty one at most.

    Raises:
        OSError: the system refused.
    """
    failure = kernel_rename(folder, target, ONLY_IF_ABSENT)
    if failure in UNSUPPORTED and not os.path.lexists(target):
        folder.rename(target)
        return True
    if failure not in (0, errno.EEXIST, *UNSUPPORTED):
        raise OSError(failure, os.strerror(failure), str(target))
    return failure == 0


def take_empty(folder: Path, target: Path) -> None:
    """Rename a folder to where an empty one is.

    Raises:
        OSError: something was put into it meanwhile (``ENOTEMPTY`` or ``EEXIST``), or the system
            refused; the empty one is there.
    """
    try:
        folder.rename(target)
        return
    except FileExistsError:  # Windows renames over nothing, not even an empty folder
        target.rmdir()
    try:
        folder.rename(target)
    except OSError:
        target.mkdir()
        raise


def exchange_at_once(folder: Path, target: Path) -> bool:
    """Swap two folders in one step; return False, with nothing done, where that cannot be.

    Raises:
        OSError: the system refused.
    """
    failure = kernel_rename(folder, target, EXCHANGE)
    if failure and failure not in UNSUPPORTED:
        raise OSError(failure, os.strerror(failure), str(target))
    return not failure
