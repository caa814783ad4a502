"""The folder a new output is built in: beside its place, locked, kept for another try, renamed.

``.OUT.regraft`` holds the output under ``out``, what a merge of merged weights needs under
``base``, and a journal of the tensors that are done. Whoever works in it holds a lock that the
system lets go of when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.errors import BusyError, EnvironmentShortfall
from regraft.merging.output import publish
from regraft.merging.writer import write_error

SUFFIX = ".regraft"
JOURNAL, BUILT, BASE = "journal", "out", "base"
KEPT = "the work so far is kept: the same command goes on from there, `regraft clean` removes it"


@dataclass
class Workplace:
    """A folder to build an output in.

    Attributes:
        folder: the work folder.
        entries: the journal's entries of an earlier try at the same work.
    """

    folder: Path
    entries: list[dict[str, Any]] = field(default_factory=list)
    _journal: int | None = None

    @property
    def out(self) -> Path:
        """The folder that becomes the output."""
        return self.folder / BUILT

    @property
    def base(self) -> Path:
        """A folder for what stands for the base while merged weights are worked on."""
        return self.folder / BASE

    def fresh_base(self) -> Path:
        """Return :attr:`base`, made anew."""
        if self.base.exists():
            shutil.rmtree(self.base)
        self.base.mkdir()
        return self.base

    def begin(self, fingerprint: str) -> None:
        """Begin a piece of work, or go on with it: other work that was kept here is removed.

        Args:
            fingerprint: of everything that decides the bytes.
        """
        found = self._read_journal(fingerprint)
        if found is None:
            self._clear(keep=(BASE,))
        self.entries = found or []
        self.out.mkdir(exist_ok=True)
        mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._journal = os.open(self.folder / JOURNAL, mode, 0o666)
        if found is None:
            self.note({"fingerprint": fingerprint})

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add an entry to the journal.

        It is not flushed to the disk: what it says is held against the files when it is read.
        """
        if self._journal is not None:
            line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
            while line:
                line = line[os.write(self._journal, line) :]

    def cut(self, count: int) -> None:
        """Forget all entries but the first ``count``."""
        self.entries = self.entries[:count]
        lines = (self.folder / JOURNAL).read_bytes().split(b"\n")[: count + 1]
        with (self.folder / JOURNAL).open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines))

    def _read_journal(self, fingerprint: str) -> list[dict[str, Any]] | None:
        """Return the entries of the same work; None if there are none or it was other work."""
        try:
            lines = (self.folder / JOURNAL).read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        whole = [_entry(line) for line in lines[:-1]]  # what was cut off in mid-line is no entry
        if not whole or whole[0] != {"fingerprint": fingerprint}:
            return None
        upto = whole.index(None) if None in whole else len(whole)
        return [entry for entry in whole[1:upto] if entry is not None]

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def _clear(self, keep: tuple[str, ...]) -> None:
        for path in self.folder.iterdir():
            if path.name not in keep:
                remove(path)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def place_of(out: Path) -> Path:
    """Return the work folder of an output."""
    return out.absolute().parent / f".{out.name}{SUFFIX}"


@contextmanager
def workplace(out: Path, *, overwrite: bool) -> Iterator[Workplace]:
    """Give a locked work folder beside ``out``; on success its ``out`` becomes ``out``.

    When the machine falls short, or the user interrupts, the work is kept for another try. Folders
    above ``out`` are made too, and removed again when nothing comes of it.

    Raises:
        BusyError: another process works on the same output.
        OutputExistsError: something came to be at ``out`` meanwhile that may not be replaced.
        AccessError, DiskSpaceError: the system refused.
    """
    folder = place_of(out)
    missing = [p for p in (folder.parent, *folder.parent.parents) if not os.path.lexists(p)]
    try:
        with _locked(folder) as locked:
            work = Workplace(locked)
            keep = False
            try:
                yield work
                work.close()
                publish(work.out, out.absolute(), overwrite=overwrite)
            except (KeyboardInterrupt, EnvironmentShortfall, OSError, MemoryError) as error:
                keep = _has_progress(work)
                if keep:
                    error.add_note(KEPT)
                raise
            finally:
                work.close()
                if not keep:
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        typed = write_error(Path(error.filename or folder), error)
        for note in getattr(error, "__notes__", ()):
            typed.add_note(note)
        raise typed from error
    finally:
        with contextlib.suppress(OSError):  # not there, or not empty: it holds the output
            for path in missing:
                path.rmdir()


def _has_progress(work: Workplace) -> bool:
    """Whether a tensor is done, so that the work is worth keeping."""
    with contextlib.suppress(OSError):
        return (work.folder / JOURNAL).read_bytes().count(b"\n") > 1
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Make a folder and hold a lock on it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not lock(fd):
                raise BusyError(
                    "another process is writing the same output", where=str(folder),
                    hint="Wait until it is done, or give another -o",
                )  # fmt: skip
            if _is_still(folder, fd):
                yield folder
                return
        finally:
            os.close(fd)


def lock(fd: int) -> bool:
    """Take the lock on an open folder; return False if another process holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks: two at a time are then not noticed
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def _is_still(folder: Path, fd: int) -> bool:
    """Whether an open folder is the one at its path; its last owner may just have removed it."""
    try:
        there, ours = folder.stat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
