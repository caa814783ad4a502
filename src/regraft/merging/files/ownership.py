"""Work folders lie at places that others can foresee: one that others made is not trusted."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from regraft.errors import AccessError

_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_NOT_US = stat.S_IRWXG | stat.S_IRWXO


def make_private(folder: Path) -> bool:
    """Make a folder that only this user can look into; return False where there is something.

    Folders above it are made as usual.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=stat.S_IRWXU)
    except FileExistsError:
        return False
    return True


def open_folder(folder: Path) -> int:
    """Open a folder, not what a link in its place leads to."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


ANOTHER_OUT = "give another -o"
"""How to work at another place."""


def check_own(fd: int, folder: Path, elsewhere: str = ANOTHER_OUT) -> None:
    """Refuse an open work folder that others own or may write to; close ours to other users.

    Whoever runs this, root too, takes only what is its own.

    Args:
        fd: the folder.
        folder: its path.
        elsewhere: how to work at another place.

    Raises:
        AccessError: what lies in it may be somebody else's.
    """
    found = os.fstat(fd)
    if not is_own(found):
        raise AccessError(
            "the work folder belongs to another user", where=str(folder),
            expected=f"one of user {os.geteuid()}", found=f"one of user {found.st_uid}",
            hint=f"Have its owner remove it, or {elsewhere}; nothing was read of it",
        )  # fmt: skip
    if is_shared(found):
        raise AccessError(
            "other users may write to the work folder", where=str(folder),
            expected="one that only its owner may write to",
            found=stat.filemode(found.st_mode),
            hint=f"Remove it, as `regraft clean` does, or {elsewhere}; nothing was read of it",
        )  # fmt: skip
    if found.st_mode & _NOT_US:
        with contextlib.suppress(OSError):
            os.fchmod(fd, stat.S_IMODE(found.st_mode) & ~_NOT_US)


def check_place(folder: Path, elsewhere: str = ANOTHER_OUT) -> None:
    """Refuse a link, or anything else that is no folder, where a work folder is to be.

    Raises:
        AccessError: there is such a thing.
    """
    if folder.is_symlink() or (os.path.lexists(folder) and not folder.is_dir()):
        raise AccessError(
            "the place of the work folder is taken", where=str(folder), expected="nothing",
            found="a link" if folder.is_symlink() else "a file",
            hint=f"Remove it, or {elsewhere}",
        )  # fmt: skip


def is_own(found: os.stat_result) -> bool:
    """Whether something is this user's."""
    return found.st_uid == os.geteuid()


def is_shared(found: os.stat_result) -> bool:
    """Whether users besides the owner may write to something."""
    return bool(found.st_mode & _BY_OTHERS)


def is_own_file(found: os.stat_result) -> bool:
    """Whether something is a regular file of this user's, which has no other name."""
    return stat.S_ISREG(found.st_mode) and is_own(found) and found.st_nlink == 1
