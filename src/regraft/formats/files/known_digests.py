"""Digests of tensors that were read before: a file that is as it was need not be hashed again.

They are kept in a folder of the user's, one file for each weights file, which is told by device,
inode, size and the times of its last changes (:class:`regraft.formats.files.watching.Stamp`). A
stamp is taken before anything of the file is read, and so late that any change since would have
another date. So a list whose stamp is the file's is of the bytes that are in it, as far as the file
system tells.

Times are not believed everywhere: not on file systems in memory, in images and on networks
(:func:`regraft.system.times.dates_changes`), not after the system was started again, as a power cut
may leave new bytes with old times, and not of a file that was changed a moment ago, as a long write
is dated by its beginning. And the lists are used only where they are asked for.

What cannot be read, or was not written by this user, counts as not there, and so does a list of a
file in the Hub's cache that the Hub gave another digest than then.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from blake3 import blake3

from regraft.formats.files.watching import Stamp, first_seen, settled_stamp
from regraft.system.opening import open_if_regular
from regraft.system.owners import is_own, is_shared, make_folder
from regraft.system.times import boot, dates_changes
from regraft.tensors import TensorSpec

_SECOND = 10**9


def _is_dated(stamp: Stamp) -> bool:
    """Whether a file that has this stamp again is what it was.

    Times in whole seconds are those of a file system that keeps no others, or of an image that was
    made in one go: two such images may have the same.
    """
    return bool(stamp.changed % _SECOND) and dates_changes(stamp.device)


PLACE = "REGRAFT_CACHE"
"""The variable of the environment that names the folder for what is kept between runs; empty for
none."""

LAYOUT = 1
"""Version of a list's layout; lists of another one are made anew."""

MOST_LISTS = 4096
"""Lists that are kept; of more, those that were written first are removed."""

YOUNG = 60 * 10**9
"""A file that others changed so many ns ago, or less, may be being written to."""

_MOST_BYTES = 2**28
_DIGEST = re.compile(r"[0-9a-f]{64}")

Range = tuple[int, int]
"""Where a tensor begins in its file, and its bytes."""


def cache_folder() -> Path | None:
    """Return the folder for what is kept between runs; None if none is wanted."""
    named = os.environ.get(PLACE)
    above = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        if named is not None:
            return Path(named).expanduser() if named else None
        return Path(above).expanduser() / "regraft"
    except RuntimeError:  # there is no such home
        return None


class KnownDigests:
    """Digests of tensors in files; safe to use from several threads."""

    def __init__(self, folder: Path | None) -> None:
        """Take the folder of the lists; None for no lists."""
        self._folder = folder
        self._lists: dict[Path, dict[Range, str]] = {}
        self._lock = threading.Lock()  # a list is read once

    @classmethod
    def of_user(cls, *, wanted: bool = True) -> KnownDigests:
        """Return those of the user, or none."""
        folder = cache_folder() if wanted else None
        return cls(folder / "digests" if folder is not None else None)

    @property
    def are_wanted(self) -> bool:
        """Whether there is a folder to keep them in."""
        return self._folder is not None

    def of(self, spec: TensorSpec) -> str | None:
        """Return the blake3 (hex) of a stored tensor's bytes; None if it is not known."""
        if self._folder is None or spec.is_virtual:
            return None
        with self._lock:
            if spec.path not in self._lists:
                self._lists[spec.path] = self._read(spec.path, self._folder)
            return self._lists[spec.path].get((spec.start, spec.nbytes))

    def _read(self, path: Path, folder: Path) -> dict[Range, str]:
        try:
            stamp = first_seen(path)
            content = _own_content(_list_of(folder, stamp)) if _is_dated(stamp) else b""
        except OSError:
            return {}
        return _parsed(content, stamp, path)

    def remember(self, path: Path, digests: Mapping[Range, str], *, own: bool = False) -> bool:
        """Keep digests of a file's tensors, beside those that are known of it.

        Args:
            path: the file; it was opened before it was read, or is closed since it was written.
            digests: blake3 (hex) by place.
            own: whether it was written by this work, and by nobody else.

        Returns:
            Whether they are known from now on: not, if there is no folder or it cannot be written
            to, if times are not believed on the file's file system, and if it is too young.
        """
        if self._folder is None:
            return False
        with contextlib.suppress(OSError):
            stamp = settled_stamp(path)
            old = own or max(stamp.modified, stamp.changed) + YOUNG <= time.time_ns()
            if old and _is_dated(stamp):
                known = self._read(path, self._folder)
                if digests.items() - known.items():
                    both = {**known, **digests}
                    _write(_list_of(self._folder, stamp), _content(path, stamp, both))
                return True
        return False


def _list_of(folder: Path, stamp: Stamp) -> Path:
    return folder / f"{stamp.device:x}-{stamp.inode:x}.json"


def _content(path: Path, stamp: Stamp, digests: Mapping[Range, str]) -> bytes:
    ranges = [[*place, digest] for place, digest in sorted(digests.items())]
    told = {
        "layout": LAYOUT, "boot": boot(), "stamp": astuple(stamp), "hub": _hub_digest(path),
        "ranges": ranges,
    }  # fmt: skip
    text = json.dumps(told, separators=(",", ":")).encode()
    return blake3(text).hexdigest().encode() + b"\n" + text


def _parsed(content: bytes, stamp: Stamp, path: Path) -> dict[Range, str]:
    """Return the digests of a list; none if it is not whole, or of a file that was another."""
    digest, _, text = content.partition(b"\n")
    if not text or digest != blake3(text).hexdigest().encode():
        return {}
    told: dict[str, Any] = json.loads(text)
    due = {
        "layout": LAYOUT, "boot": boot(), "stamp": list(astuple(stamp)), "hub": _hub_digest(path),
    }  # fmt: skip
    if any(told.get(key) != value for key, value in due.items()):
        return {}
    return {(start, size): digest for start, size, digest in told["ranges"]}


def _hub_digest(path: Path) -> str | None:
    """Return what the Hub says is the sha256 of a file in its cache, where blobs are named so."""
    name = path.resolve().name
    return name if _DIGEST.fullmatch(name) else None


def _own_content(path: Path) -> bytes:
    """Return what a file holds that is this user's and no others may write to; else nothing."""
    fd, _ = open_if_regular(path)
    if fd is None:
        return b""
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        own = is_own(found) and not is_shared(found) and found.st_size <= _MOST_BYTES
        return file.read() if own else b""


def _write(path: Path, content: bytes) -> None:
    """Put a list in its place in one step."""
    folder = path.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        make_folder(folder)
    fd, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    _remove_oldest(folder)


def _remove_oldest(folder: Path) -> None:
    lists = list(folder.glob("*.json"))
    if len(lists) > MOST_LISTS:
        lists.sort(key=lambda path: path.stat().st_mtime)
        for path in lists[: len(lists) - MOST_LISTS]:
            path.unlink(missing_ok=True)
