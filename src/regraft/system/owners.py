"""Who owns a file, and who else may write to it; where files have no owners, all are one's own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_NOT_US = stat.S_IRWXG | stat.S_IRWXO


def has_owners() -> bool:
    """Whether the system's files have owners and modes; Windows' have lists of access instead."""
    return hasattr(os, "geteuid")


def user() -> int:
    """Return the number of the user that this process acts as; 0 where users have none."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def is_own(found: os.stat_result) -> bool:
    """Whether something is this user's."""
    return not has_owners() or found.st_uid == user()


def is_shared(found: os.stat_result) -> bool:
    """Whether users besides the owner may write to something."""
    return has_owners() and bool(found.st_mode & _BY_OTHERS)


def is_open_to_others(found: os.stat_result) -> bool:
    """Whether users besides the owner may do anything with something."""
    return has_owners() and bool(found.st_mode & _NOT_US)


def mode_for_us(found: os.stat_result) -> int:
    """Return the mode of something, less all that users besides the owner may do."""
    return stat.S_IMODE(found.st_mode) & ~_NOT_US


def make_folder(folder: Path) -> None:
    """Make a folder for this user alone, where modes can say so.

    Raises:
        OSError: something is there, or the system refused.
    """
    if has_owners():
        folder.mkdir(mode=stat.S_IRWXU)
    else:
        folder.mkdir()  # what becomes the output has the folder's access, which is its place's
