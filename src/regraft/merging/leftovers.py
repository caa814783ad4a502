"""Work folders that no process works in any more."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import InputError
from regraft.formats.reading import typed_os_errors
from regraft.merging.workplace import BASE, BUILT, JOURNAL, SUFFIX, lock, place_of

_NAME = re.compile(rf"\..+{re.escape(SUFFIX)}")


@dataclass(frozen=True)
class Leftover:
    """A work folder.

    Attributes:
        path: the folder.
        output: the output that was being made.
        bytes: what it takes on the disk.
        modified: when work was last done in it, in seconds since 1970.
        busy: whether a process works in it.
    """

    path: str
    output: str
    bytes: int
    modified: float
    busy: bool


def find_leftovers(places: Iterable[Path]) -> list[Leftover]:
    """Return the work folders in folders, or beside outputs.

    Raises:
        InputError: there is neither such a folder nor work on such an output.
        AccessError: one cannot be looked into.
    """
    found: dict[Path, Leftover] = {}
    for place in places:
        beside = place_of(place)
        if not place.is_dir() and not beside.is_dir():
            raise InputError("there is no such folder", where=str(place))
        with typed_os_errors(place):
            inside = sorted(place.iterdir()) if place.is_dir() else []
        for path in [*inside, beside]:
            if _is_work(path):
                found[path.absolute()] = _look(path)
    return list(found.values())


def _is_work(path: Path) -> bool:
    """Whether this is a work folder: by its name, and by there being nothing else in it."""
    if not _NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    with typed_os_errors(path):
        return {p.name for p in path.iterdir()} <= {BASE, BUILT, JOURNAL}


def _look(path: Path) -> Leftover:
    with typed_os_errors(path):
        inside = [p.lstat() for p in path.rglob("*")]
        modified = max([path.lstat().st_mtime, *(stat.st_mtime for stat in inside)])
        name = path.name.removeprefix(".").removesuffix(SUFFIX)
        taken = sum(stat.st_blocks for stat in inside) * 512
        return Leftover(str(path), str(path.parent / name), taken, modified, _is_busy(path))


def _is_busy(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return not lock(fd)
    finally:
        os.close(fd)


def remove_leftover(leftover: Leftover) -> None:
    """Remove a work folder.

    Raises:
        AccessError: the system refused.
    """
    with typed_os_errors(Path(leftover.path)):
        shutil.rmtree(leftover.path)
