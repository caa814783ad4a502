"""The folder a new output is built in: beside its place, locked, kept for another try, renamed.

``.OUT.regraft`` holds the output under ``out``, what a merge of merged weights needs under
``base``, and a journal of the tensors that are done. Whoever works in it holds a lock that the
system lets go of when the process ends, however it ends. A line of the journal is an entry in JSON
behind its digest: what says otherwise was not written, or not wholly.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from regraft.errors import BusyError, EnvironmentShortfall
from regraft.formats.files.text import path_word
from regraft.formats.files.watching import check_unchanged, leave_out, telling_changes
from regraft.merging.files.direct_io import write_error
from regraft.merging.files.ownership import check_own, check_place, is_own_file, make_private
from regraft.merging.files.publish import (
    Kind,
    check_names_apart,
    check_output,
    place_of,
    publish,
    put_back,
)
from regraft.merging.files.single_file import JOURNAL
from regraft.system.locks import OpenFolder, is_lock, remove_all
from regraft.system.opening import open_to_write
from regraft.system.owners import is_own

BUILT, BASE = "out", "base"
KEPT = "the work so far is kept: the same command goes on from there, `regraft clean {}` removes it"

_TRIES = 20
_INTERRUPTIONS = (KeyboardInterrupt, SystemExit, EnvironmentShortfall, OSError, MemoryError)
_DIGEST = 16
_ENCODER = json.JSONEncoder(separators=(",", ":"))
"""Characters of the digest at the front of a journal's line."""


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
    _begun: bool = False
    _published: tuple[int, int] | None = None

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
        if os.path.lexists(self.base):
            remove_all(self.base)
        self.base.mkdir()
        return self.base

    def begin(self, fingerprint: str) -> None:
        """Begin a piece of work, or go on with it: other work that was kept here is removed.

        Args:
            fingerprint: of everything that decides the bytes.
        """
        self._begun = True
        found = self._read_journal(fingerprint)
        if found is None or not self._has_own_output():
            self._clear(keep=(BASE,))
            found = None
        self.entries = found or []
        self.out.mkdir(exist_ok=True)
        self._journal = open_to_write(self.folder / JOURNAL, append=True, mode=0o600)
        if found is None:
            self.note({"fingerprint": fingerprint})
        else:
            self.cut(len(found))  # what follows would be glued to a line that was cut off

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add an entry to the journal.

        It is not flushed to the disk: what it says is held against the files when it is read.
        """
        if self._journal is not None:
            content = _ENCODER.encode(entry).encode()
            line = _digest_of(content) + b" " + content + b"\n"
            while line:
                line = line[os.write(self._journal, line) :]

    def cut(self, count: int) -> None:
        """Forget all entries but the first ``count``."""
        self.entries = self.entries[:count]
        lines = (self.folder / JOURNAL).read_bytes().split(b"\n")[: count + 1]
        if self._journal is not None:
            os.ftruncate(self._journal, sum(len(line) + 1 for line in lines))

    def keep_only(self, names: Collection[str]) -> None:
        """Remove from the output all but own plain files of these names, which are paths below it.

        What is written into is then ours alone, and what is published is what was written.

        Raises:
            UsageError: two of the names would be one file here.
        """
        check_names_apart(self.folder, names)
        for parent, folders, files in os.walk(self.out, topdown=False):
            for path in (Path(parent) / name for name in (*files, *folders)):
                found = path.lstat()
                if stat.S_ISDIR(found.st_mode):
                    with contextlib.suppress(OSError):  # not empty
                        path.rmdir()
                elif path.relative_to(self.out).as_posix() not in names or not is_own_file(found):
                    path.unlink()

    def publish(self, out: Path, *, overwrite: bool, kind: Kind = "model") -> None:
        """Put the output in place.

        Raises:
            OutputExistsError: something came to be there meanwhile that may not be replaced.
            OSError: the system refused.
        """
        self.close()
        self._published = _identity(self.out / out.name if kind == "gguf" else self.out)
        publish(self.out, out, overwrite=overwrite, kind=kind)

    def is_at(self, out: Path) -> bool:
        """Whether the output is in place."""
        with contextlib.suppress(OSError):
            return self._published is not None and self._published == _identity(out)
        return False

    def is_kept_after(self, error: BaseException) -> bool:
        """Whether the work is kept for another try after an error: something is done, of this or,
        where this was not even begun, of other work."""
        return (isinstance(error, _INTERRUPTIONS) or not self._begun) and self._has_progress()

    def _has_progress(self) -> bool:
        with contextlib.suppress(OSError):
            return (self.folder / JOURNAL).read_bytes().count(b"\n") > 1
        return False

    def _read_journal(self, fingerprint: str) -> list[dict[str, Any]] | None:
        """Return the entries of the same work; None if there are none or it was other work."""
        path = self.folder / JOURNAL
        try:
            if not is_own_file(path.lstat()):
                return None
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        whole = [_entry(line) for line in lines[:-1]]  # what was cut off in mid-line is no entry
        if not whole or whole[0] != {"fingerprint": fingerprint}:
            return None
        upto = whole.index(None) if None in whole else len(whole)
        return [entry for entry in whole[1:upto] if entry is not None]

    def _has_own_output(self) -> bool:
        """Whether the output that was begun is a folder of this user's; one to be made is."""
        try:
            found = self.out.lstat()
        except FileNotFoundError:
            return True
        return stat.S_ISDIR(found.st_mode) and is_own(found)

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def _clear(self, keep: tuple[str, ...]) -> None:
        for path in self.folder.iterdir():
            if path.name not in keep and not is_lock(path.name):
                remove_all(path)


def _digest_of(content: bytes) -> bytes:
    return blake3(content).hexdigest(_DIGEST // 2).encode()


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return a line's entry; None if it is not as it was written."""
    digest, _, content = line.partition(b" ")
    if digest != _digest_of(content):
        return None
    value = json.loads(content)
    return value if isinstance(value, dict) else None


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


@contextmanager
def workplace(out: Path, *, overwrite: bool, kind: Kind = "model") -> Iterator[Workplace]:
    """Give a locked work folder beside ``out``; on success its ``out`` becomes ``out``.

    When the machine falls short, or the user interrupts, the work is kept for another try. Folders
    above ``out`` are made too, and removed again when nothing comes of it.

    Raises:
        BusyError: another process works on the same output.
        AccessError: the work folder is another user's, others may write to it, or it is a link.
        OutputExistsError: something came to be at ``out`` meanwhile that may not be replaced.
        ChangedError: inputs were changed meanwhile; nothing is kept of the work.
        AccessError, DiskSpaceError: the system refused.
    """
    folder = place_of(out)
    missing = [p for p in (folder.parent, *folder.parent.parents) if not os.path.lexists(p)]
    try:
        with locked_folder(folder) as locked:
            work, place = Workplace(folder), out.absolute()
            keep = False
            try:
                put_back(work.out, place)
                check_output(out, [], overwrite=overwrite, kind=kind)
                leave_out(folder, place)
                with telling_changes():
                    yield work
                    check_unchanged()
                work.publish(place, overwrite=overwrite, kind=kind)
            except BaseException as error:
                kept = not work.is_at(place) and work.is_kept_after(error)
                keep = not _is_put_back(work, place) or kept
                if keep and isinstance(error, _INTERRUPTIONS):
                    error.add_note(KEPT.format(path_word(str(out))))
                raise
            finally:
                work.close()
                if not keep:
                    locked.remove(as_far_as_can_be=True)
    except OSError as error:
        typed = write_error(Path(error.filename or folder), error)
        for note in getattr(error, "__notes__", ()):
            typed.add_note(note)
        raise typed from error
    finally:
        with contextlib.suppress(OSError):  # not there, or not empty: it holds the output
            for path in missing:
                path.rmdir()


def _is_put_back(work: Workplace, out: Path) -> bool:
    """Put back what was being replaced, if anything was; return whether that went well."""
    try:
        put_back(work.out, out)
    except OSError:
        return False
    return True


@contextmanager
def locked_folder(folder: Path) -> Iterator[OpenFolder]:
    """Make a folder and hold a lock on it; one that is there has to be this user's alone."""
    tries = _TRIES
    while True:
        try:
            made = make_private(folder)
            check_place(folder)
            opened = OpenFolder(folder)
        except (FileExistsError, FileNotFoundError):  # its last owner may just have removed it
            tries -= 1
            if not tries:
                raise
            continue
        with opened:
            if not made:
                check_own(opened)
            if not opened.lock():
                raise BusyError(
                    "another process is writing the same output", where=str(folder),
                    hint="Wait until it is done, or give another -o",
                )  # fmt: skip
            if opened.is_in_place():
                yield opened
                return
