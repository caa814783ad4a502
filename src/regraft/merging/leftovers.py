"""Work folders that no process works in any more."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import InputError
from regraft.formats.reading import access_error, typed_os_errors
from regraft.merging.output import REPLACED, SUFFIX, place_of, put_back
from regraft.merging.workplace import BASE, BUILT, JOURNAL, is_still, lock, open_folder

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
            with contextlib.suppress(FileNotFoundError):  # its work has just been done
                if _is_work(path):
                    found[path.absolute()] = _look(path)
    return list(found.values())


def _is_work(path: Path) -> bool:
    """Whether this is a work folder: by its name, and by there being nothing else in it."""
    if not _NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    with _typed_unless_gone(path):
        return {p.name for p in path.iterdir()} <= {BASE, BUILT, JOURNAL, REPLACED}


@contextmanager
def _typed_unless_gone(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into AccessError, except that there is no such file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise access_error(Path(error.filename or path), error) from None


def _look(path: Path) -> Leftover:
    with _typed_unless_gone(path):
        inside = list(_stats(path))
        modified = max([path.lstat().st_mtime, *(stat.st_mtime for stat in inside)])
        name = path.name.removeprefix(".").removesuffix(SUFFIX)
        taken = sum(stat.st_blocks for stat in inside) * 512
        return Leftover(str(path), str(path.parent / name), taken, modified, _is_busy(path))


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Yield what is known of everything below a folder, where others may just remove things."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            yield path.lstat()


def _is_busy(path: Path) -> bool:
    fd = open_folder(path)
    try:
        return not lock(fd)
    finally:
        os.close(fd)


def remove_leftover(leftover: Leftover) -> None:
    """Remove a work folder, unless work was begun in it just now.

    Raises:
        AccessError: the system refused.
    """
    path = Path(leftover.path)
    with contextlib.suppress(FileNotFoundError), _typed_unless_gone(path):
        fd = open_folder(path)
        try:
            if lock(fd) and is_still(path, fd):
                put_back(path / BUILT, Path(leftover.output))
                shutil.rmtree(path)
        finally:
            os.close(fd)
