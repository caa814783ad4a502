"""Inputs have to stay as they are while they are read: what each file was when it was first opened.

A verb runs under :func:`watched`. Whatever opens a file of an input notes it, in any thread that
shares the verb's :class:`Watch`, and before something is published or said each file is looked at
again. Files are told by device, inode, size and the times of their last changes; those that are
read twice as a whole, by their bytes too.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from regraft.errors import (
    AccessError,
    ChangedError,
    InputError,
    OutputExistsError,
    Problem,
    RegraftError,
)
from regraft.formats.problems import capped
from regraft.system.times import changed_ns, has_inodes, now_of_files, step_of_files

AGAIN = "Run it again when nothing writes to the file"

_SECOND = 10**9
_COARSE_STEP = 2 * _SECOND
"""The longest step in which a file system dates changes: FAT's."""

_TRIES = 8


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another one, and from itself once it is changed; times in ns."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """Return the stamp of what the system says of a file."""
        return cls(
            found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, changed_ns(found)
        )  # fmt: skip

    def is_like(self, other: Stamp) -> bool:
        """Whether this is the same file, unchanged, as far as its file system can tell."""
        if self == other:
            return True
        return replace(self, inode=other.inode) == other and not has_inodes(self.device)

    def is_of_same_content(self, other: Stamp) -> bool:
        """Whether nothing seems to be written since; modes and links of the file may differ."""
        return replace(self, changed=0) == replace(other, changed=0)


class Watch:
    """The files that were read, as they were; safe to use from several threads."""

    def __init__(self) -> None:
        """Begin with no file."""
        self._seen: dict[Path, Stamp] = {}
        self._digests: dict[Path, str] = {}
        self._problems: dict[Path, Problem] = {}
        self._own: list[Path] = []
        self._lock = threading.Lock()  # a file's first stamp is the one that counts

    def leave_out(self, folder: Path) -> None:
        """Note no file below a folder: whoever watches writes to it."""
        own = folder.absolute()
        with self._lock:
            self._own.append(own)
            for path in [path for path in self._seen if own in path.parents]:
                del self._seen[path]
                self._problems.pop(path, None)

    def note(self, path: Path, fd: int) -> None:
        """Note a file that was opened, before anything of it is read."""
        path = path.absolute()
        if any(folder in path.parents for folder in self._own):
            return
        stamp = _settled(fd)
        with self._lock:
            first = self._seen.setdefault(path, stamp)
            if not first.is_like(stamp):
                self._problems.setdefault(path, _changed(path, first, stamp))

    def note_content(self, path: Path, content: bytes) -> None:
        """Note all bytes of a file that was noted: read again, they have to be the same."""
        self.note_digest(path, blake3(content).hexdigest())

    def note_digest(self, path: Path, digest: str) -> None:
        """Note the blake3 (hex) of all bytes of a file that was noted."""
        path = path.absolute()
        with self._lock:
            if path in self._seen and self._digests.setdefault(path, digest) != digest:
                self._problems.setdefault(path, _other_bytes(path))

    def first(self, path: Path) -> Stamp | None:
        """Return what a file was when it was opened first; None if it was not."""
        return self._seen.get(path.absolute())

    def problems(self) -> list[Problem]:
        """Return what is no longer as it was."""
        found = dict(self._problems)
        for path, first in self._seen.items():
            try:
                now = Stamp.of(path.stat())
            except OSError as error:
                found.setdefault(path, _gone(path, error))
            else:
                if not first.is_like(now):
                    found.setdefault(path, _changed(path, first, now))
        return [found[path] for path in sorted(found)]

    def check(self) -> None:
        """Refuse inputs that have been changed.

        Raises:
            ChangedError: files are no longer what they were when they were opened; lists them.
        """
        if problems := self.problems():
            raise ChangedError(capped(problems, Path(problems[0].where)))


_current: ContextVar[Watch | None] = ContextVar("regraft_watch", default=None)


def current() -> Watch | None:
    """Return the watch of the verb that runs here, if it has one."""
    return _current.get()


@contextmanager
def watched(*, to_the_end: bool = False) -> Iterator[Watch]:
    """Watch the inputs of a verb; a decorator too.

    Args:
        to_the_end: check them when the verb is done. Verbs that publish something have them checked
            just before that.

    Raises:
        ChangedError: inputs were changed, and that is, or may be, why the verb failed.
    """
    watch = Watch()
    token = _current.set(watch)
    try:
        with telling_changes():
            yield watch
            if to_the_end:
                watch.check()
    finally:
        _current.reset(token)


@contextmanager
def telling_changes() -> Iterator[None]:
    """Say of an error that inputs were changed, where they were: what was read of them misleads.

    Raises:
        ChangedError: they were.
    """
    try:
        yield
    except Exception as error:
        watch = current()
        if watch is not None and _may_mislead(error):
            try:
                watch.check()
            except ChangedError as changed:
                raise changed from error
        raise


def leave_out(*folders: Path) -> None:
    """Watch no file below folders that the verb writes to."""
    if (watch := current()) is not None:
        for folder in folders:
            watch.leave_out(folder)


def check_unchanged() -> None:
    """Refuse inputs that have been changed since they were opened.

    Raises:
        ChangedError: some have been; lists them.
    """
    if (watch := current()) is not None:
        watch.check()


def first_seen(path: Path) -> Stamp:
    """Return what a file was when the verb opened it, else what it is now.

    Raises:
        OSError: the system refused to say.
    """
    watch = current()
    return (watch and watch.first(path)) or Stamp.of(path.stat())


def settled_stamp(path: Path) -> Stamp:
    """Return what a file was when the verb opened it, else what it is now; see :func:`_settled`.

    Raises:
        OSError: the system refused to say.
    """
    watch = current()
    if watch is not None and (first := watch.first(path)) is not None:
        return first
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        return _settled(fd)
    finally:
        os.close(fd)


def _may_mislead(error: Exception) -> bool:
    if isinstance(error, ChangedError | OutputExistsError):
        return False
    return isinstance(error, InputError | AccessError) or not isinstance(
        error, RegraftError | OSError | MemoryError
    )


def _settled(fd: int) -> Stamp:
    """Return the stamp of an open file that any later change will change.

    Changes within one step of the clock have one date. So where the last one is of a step that has
    not passed, this waits for the next: some milliseconds.
    """
    stamp = Stamp.of(os.fstat(fd))
    for _ in range(_TRIES):
        age = now_of_files() - stamp.changed
        in_seconds = not stamp.changed % _SECOND and not stamp.modified % _SECOND
        if age > 0 and not (in_seconds and age < _COARSE_STEP):
            break
        time.sleep(0.25 if in_seconds else step_of_files())
        stamp = Stamp.of(os.fstat(fd))
    return stamp


def _changed(path: Path, first: Stamp, now: Stamp) -> Problem:
    return Problem(
        "the file was changed while it was being read", str(path), _shown(first), _shown(now), AGAIN
    )


def _other_bytes(path: Path) -> Problem:
    return Problem(
        "the file was changed while it was being read", str(path), "the bytes that were read first",
        "others", AGAIN,
    )  # fmt: skip


def _gone(path: Path, error: OSError) -> Problem:
    return Problem(
        "the file was removed while it was being read", str(path), found=error.strerror or "",
        hint=AGAIN,
    )  # fmt: skip


def _shown(stamp: Stamp) -> str:
    """Return what a person can compare: size, inode and the later of the times."""
    seconds, rest = divmod(max(stamp.modified, stamp.changed), _SECOND)
    there = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    return f"{stamp.size} bytes, inode {stamp.inode}, of {there}.{rest // 10**6:03d}"
