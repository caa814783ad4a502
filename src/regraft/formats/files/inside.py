"""Which files of a folder may go along into an output: regular ones that lie in it.

A folder may come from a stranger, and an output may be published. A link to a file elsewhere would
carry that file along, be it a key of whoever opens the folder. So links are followed only inside
the folder, and from a snapshot in the Hub's cache to the blobs of the same repository.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import InputError
from regraft.formats.files.reading import (
    access_error,
    note_content,
    open_regular,
    read_at,
    typed_os_errors,
)

LARGEST = 256 * 2**20
"""The largest file that goes along, in bytes: a tokenizer takes some tens of MB."""

_PIECE = 2**20


@dataclass(frozen=True)
class Contents:
    """The files of a folder.

    Attributes:
        files: those that may go along: name to path.
        others: why each of the others may not; folders are neither.
    """

    files: Mapping[str, Path]
    others: Mapping[str, str]


def contents_of(folder: Path, below: str = "") -> Contents:
    """Look through a folder, or through one in it.

    Args:
        folder: inside which links are followed.
        below: the name of a folder in it, which then stands before each name.

    Raises:
        AccessError: the system refused to look into it.
    """
    place, prefix = folder / below, f"{below}/" if below else ""
    try:
        paths = sorted(place.iterdir())
        looks = _looked_at(paths, place, folder)
    except OSError as error:
        raise access_error(place, error) from error
    return Contents(
        {f"{prefix}{p.name}": p for p, why in looks.items() if not why},
        {f"{prefix}{p.name}": why for p, why in looks.items() if why},
    )


def _looked_at(paths: Sequence[Path], place: Path, folder: Path) -> dict[Path, str]:
    """Return why each of the paths in a place that is no folder may not go along; "" if it may."""
    roots, here = _roots(folder), Path(os.path.realpath(place))
    looks = {}
    for path in paths:
        is_link = path.is_symlink()
        if is_link or not path.is_dir():
            target = Path(os.path.realpath(path)) if is_link else here / path.name
            looks[path] = _why_not(path, target, roots)
    return looks


def why_not(path: Path, folder: Path) -> str:
    """Return why a file does not go along with a folder; "" if it may.

    Raises:
        OSError: the system refused to look at it.
    """
    return _why_not(path, Path(os.path.realpath(path)), _roots(folder))


def _why_not(path: Path, target: Path, roots: Sequence[Path]) -> str:
    """As :func:`why_not`, of a path that leads to a target, and where targets may lie."""
    if not any(target.is_relative_to(root) for root in roots):
        return "a link to outside of its folder"
    try:
        found = target.stat()
    except FileNotFoundError:
        return "a link that leads nowhere"
    except OSError:
        if path.is_symlink():
            return "a link that leads nowhere"
        raise
    if stat.S_ISDIR(found.st_mode):
        return "a link to a folder"
    if not stat.S_ISREG(found.st_mode):
        return "a pipe, socket or device"
    return f"larger than {LARGEST // 2**20} MiB" if found.st_size > LARGEST else ""


def leads_outside(path: Path, folder: Path) -> bool:
    """Whether a path below a folder leads to a place outside of it, by links."""
    target = Path(os.path.realpath(path))
    return not any(target.is_relative_to(root) for root in _roots(folder))


def refuse_outside(folder: Path, *names: str) -> None:
    """Refuse a folder some of whose files are links to outside, where they would be published.

    Raises:
        InputError: one is.
    """
    for name in names:
        path = folder / name
        if path.is_symlink() and "outside" in why_not(path, folder):
            raise InputError(
                "is a link to outside of its folder", where=str(path),
                expected="a file in the folder, as its content would be published",
                found=f"a link to {path.readlink()}",
                hint="Put a copy of the file in its place (cp -L), if it belongs there",
            )  # fmt: skip


def file_pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a regular file, of as many bytes as it has when it is opened.

    Raises:
        FormatError: it is not a regular file.
        InputError, AccessError: it cannot be read.
    """
    fd = open_regular(path)
    try:
        with typed_os_errors(path):
            size = os.fstat(fd).st_size
        for at in range(0, size, _PIECE):
            yield read_at(fd, path, at, min(_PIECE, size - at))
    finally:
        os.close(fd)


def read_whole(path: Path) -> bytes:
    """Return the content of a regular file; raises as :func:`file_pieces` does.

    Where a verb watches its inputs, it has to be the same whenever it is read.
    """
    content = b"".join(file_pieces(path))
    note_content(path, content)
    return content


def head_of(path: Path, length: int) -> bytes:
    """Return the first bytes of a regular file; raises as :func:`file_pieces` does."""
    fd = open_regular(path)
    try:
        return read_at(fd, path, 0, length)
    finally:
        os.close(fd)


def _roots(folder: Path) -> list[Path]:
    """Return where files of a folder may lie: in it, or in the blobs of its repository's cache."""
    root = Path(os.path.realpath(folder))
    caches = [
        parent.parent / "blobs"
        for parent in root.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
    return [root, *caches]
