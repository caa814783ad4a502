"""Work folders that no process works in any more."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import AccessError, InputError
from regraft.formats.files.reading import access_error, typed_os_errors
from regraft.merging.files.publish import SUFFIX, place_of, put_back
from regraft.merging.files.single_file import JOURNAL, REPLACED
from regraft.merging.files.staging import BASE, BUILT
from regraft.system.locks import OpenFolder, is_lock
from regraft.system.opening import is_link
from regraft.system.owners import is_own, is_shared
from regraft.system.space import taken

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
        own: whether it is this user's; another one's is not looked into, and left alone.
    """

    path: str
    output: str
    bytes: int
    modified: float
    busy: bool
    own: bool = True


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
    """Whether this is a work folder: by its name, and by there being nothing else in it.

    Of another user's, the name decides.
    """
    if not _NAME.fullmatch(path.name) or is_link(path) or not path.is_dir():
        return False
    if not is_own(path.lstat()):
        return True
    with _typed_unless_gone(path):
        names = {p.name for p in path.iterdir() if not is_lock(p.name)}
        return names <= {BASE, BUILT, JOURNAL, REPLACED}


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
        own = is_own(path.lstat())
        inside = list(_stats(path)) if own else []
        modified = max([path.lstat().st_mtime, *(stat.st_mtime for stat in inside)])
        name = path.name.removeprefix(".").removesuffix(SUFFIX)
        total = sum(map(taken, inside))
        busy = own and _is_busy(path)
        return Leftover(str(path), str(path.parent / name), total, modified, busy, own)


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Yield what is known of everything below a folder, where others may just remove things."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            yield path.lstat()


def _is_busy(path: Path) -> bool:
    with OpenFolder(path) as folder:
        return not folder.lock()


def remove_leftover(leftover: Leftover) -> None:
    """Remove a work folder of this user's, unless work was begun in it just now.

    Raises:
        AccessError: the system refused, or it holds a model that was being replaced, and others may
            have put that there.
    """
    path = Path(leftover.path)
    gone = contextlib.suppress(FileNotFoundError)
    with gone, _typed_unless_gone(path), OpenFolder(path) as folder:
        if is_own(folder.found()) and folder.lock() and folder.is_in_place():
            _check_replaced(path, folder)
            put_back(path / BUILT, Path(leftover.output))
            folder.remove()


def _check_replaced(path: Path, folder: OpenFolder) -> None:
    """Refuse to put back what lies in a folder that others may write to."""
    aside = path / REPLACED
    if is_shared(folder.found()) and os.path.lexists(aside):
        raise AccessError(
            "holds what was being replaced, and other users may write to it", where=str(path),
            hint=f"Look at {aside}: move it to where it belongs, or remove it, and clean again",
        )  # fmt: skip
