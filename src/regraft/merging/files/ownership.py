"""Work folders lie at places that others can foresee: one that others made is not trusted."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from regraft.errors import AccessError
from regraft.system import owners
from regraft.system.locks import OpenFolder
from regraft.system.opening import is_link


def make_private(folder: Path) -> bool:
    """Make a folder that only this user can look into; return False where there is something.

    Folders above it are made as usual.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        owners.make_folder(folder)
    except FileExistsError:
        return False
    return True


ANOTHER_OUT = "give another -o"
"""How to work at another place."""


def check_own(folder: OpenFolder, elsewhere: str = ANOTHER_OUT) -> None:
    """Refuse an open work folder that others own or may write to; close ours to other users.

    Whoever runs this, root too, takes only what is its own.

    Args:
        folder: the folder.
        elsewhere: how to work at another place.

    Raises:
        AccessError: what lies in it may be somebody else's.
    """
    found = folder.found()
    if not owners.is_own(found):
        raise AccessError(
            "the work folder belongs to another user", where=str(folder.path),
            expected=f"one of user {owners.user()}", found=f"one of user {found.st_uid}",
            hint=f"Have its owner remove it, or {elsewhere}; nothing was read of it",
        )  # fmt: skip
    if owners.is_shared(found):
        raise AccessError(
            "other users may write to the work folder", where=str(folder.path),
            expected="one that only its owner may write to",
            found=stat.filemode(found.st_mode),
            hint=f"Remove it, as `regraft clean` does, or {elsewhere}; nothing was read of it",
        )  # fmt: skip
    if owners.is_open_to_others(found):
        with contextlib.suppress(OSError):
            folder.set_mode(owners.mode_for_us(found))


def check_place(folder: Path, elsewhere: str = ANOTHER_OUT) -> None:
    """Refuse a link, or anything else that is no folder, where a work folder is to be.

    Raises:
        AccessError: there is such a thing.
    """
    if is_link(folder) or (os.path.lexists(folder) and not folder.is_dir()):
        raise AccessError(
            "the place of the work folder is taken", where=str(folder), expected="nothing",
            found="a link" if is_link(folder) else "a file",
            hint=f"Remove it, or {elsewhere}",
        )  # fmt: skip


def is_own_file(found: os.stat_result) -> bool:
    """Whether something is a regular file of this user's, which has no other name."""
    return stat.S_ISREG(found.st_mode) and owners.is_own(found) and found.st_nlink == 1
