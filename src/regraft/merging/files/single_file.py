"""An output that is one file, and what is known of it in a folder beside.

Of ``OUT.gguf`` receipt and undo lie in ``OUT.gguf.regraft``. Both are built in the work folder.
That folder is put in place first and the file last, by one rename: a file that is there is whole,
and has its receipt. Where a file is replaced, the old folder is set aside first and the new one put
in place last, so that neither file ever lies beside the other's. What a kill between two renames
has left is put in order by whoever works on the same output next, or cleans up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import OutputExistsError, UsageError
from regraft.formats.layout import is_gguf, record_of
from regraft.formats.problems import quoted
from regraft.system.locks import remove_all
from regraft.system.syncing import sync_folder, sync_place

SUFFIX = ".gguf"
"""What the name of an output ends in that is one file."""

RECORD = "regraft"
"""Name, in the folder that is built, of what comes to lie beside the file."""

REPLACED = "replaced"
"""What lies beside an output that takes another one's place, until it has."""

JOURNAL = "journal"
"""Name of the journal in a work folder."""

_RECEIPT = "receipt.json"
_KNOWN = frozenset((_RECEIPT, "undo"))


def check_file(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output file that would harm something.

    Args:
        out: the file.
        inputs: what is read.
        overwrite: whether it may replace a file of its kind.

    Raises:
        UsageError: it is one of the inputs, or lies in one.
        OutputExistsError: it exists and may not be replaced, or something else lies in its place.
    """
    for path in inputs:
        if _harms(out.resolve(), path.resolve()):
            raise UsageError(
                "the output would lie in (or over) an input", where=str(out), found=str(path),
                hint="Choose another name for -o",
            )  # fmt: skip
    _check_record(record_of(out))
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_file() or not is_gguf(out):
        found = "a link" if out.is_symlink() else "a folder" if out.is_dir() else "another file"
        raise OutputExistsError(
            "something else is in the output's place", where=str(out), expected="nothing, or GGUF",
            found=found, hint="Give another -o, or remove it yourself",
        )  # fmt: skip
    if not overwrite:
        raise OutputExistsError(
            "the output exists already", where=str(out),
            hint="Give another -o, or --overwrite to replace it once the new one is complete",
        )  # fmt: skip


def _harms(place: Path, source: Path) -> bool:
    """Whether a file would take an input's place, or its folder of records would."""
    record = record_of(place)
    return source in (place, record) or record in source.parents or place in source.parents


def _check_record(record: Path) -> None:
    """Refuse to replace a folder that holds anything but what regraft writes there."""
    if not os.path.lexists(record):
        return
    strange = [] if record.is_dir() and not record.is_symlink() else ["no folder"]
    strange = strange or [path.name for path in record.iterdir() if path.name not in _KNOWN]
    if strange:
        raise OutputExistsError(
            "the folder for the receipt holds something else", where=str(record),
            expected=", ".join(sorted(_KNOWN)), found=", ".join(map(quoted, sorted(strange)[:3])),
            hint="Give another -o, or remove it yourself",
        )  # fmt: skip


def publish_file(folder: Path, out: Path) -> None:
    """Flush what was built, and put it in place: the file, and its folder of records if it has one.

    Raises:
        OSError: the system refused. File and records are then as they were, where that can be said.
    """
    parts = _Parts.of(folder, out)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)
    if os.path.lexists(parts.record):
        parts.record.rename(parts.aside)
    elif not os.path.lexists(out) and os.path.lexists(parts.built):
        parts.built.rename(parts.record)
    try:
        parts.file.replace(out)
    except OSError:
        with contextlib.suppress(OSError):
            put_back_file(folder, out)
        raise
    put_back_file(folder, out)
    sync_place(out.parent)


def put_back_file(folder: Path, out: Path) -> None:
    """Put file and records in order, whichever of the renames was the last.

    Raises:
        OSError: the system refused.
    """
    parts = _Parts.of(folder, out)
    if os.path.lexists(parts.file):  # it did not come into place
        if not os.path.lexists(out) and parts.is_own_record:
            parts.record.rename(parts.built)
        if os.path.lexists(parts.aside) and not os.path.lexists(parts.record):
            parts.aside.rename(parts.record)
    elif (parts.built / _RECEIPT).is_file() and not os.path.lexists(parts.record):
        parts.built.rename(parts.record)
    if os.path.lexists(parts.aside):
        remove_all(parts.aside)


def is_lone_file(folder: Path, out: Path) -> bool:
    """Whether what is built in a folder is one file, for ``out``, and not a folder of this name."""
    if out.suffix != SUFFIX or out.is_dir() or not folder.is_dir():
        return False
    return {path.name for path in folder.iterdir()} <= {out.name, RECORD}


@dataclass(frozen=True)
class _Parts:
    """Where file and records lie, before and after they are put in place.

    Attributes:
        file, built: both as they were built.
        record: where the records go.
        aside: the records that are replaced.
        journal: of the work.
    """

    file: Path
    built: Path
    record: Path
    aside: Path
    journal: Path

    @classmethod
    def of(cls, folder: Path, out: Path) -> _Parts:
        aside, journal = folder.with_name(REPLACED), folder.with_name(JOURNAL)
        return cls(folder / out.name, folder / RECORD, record_of(out), aside, journal)

    @property
    def is_own_record(self) -> bool:
        """Whether the records in place were put there by this work, which wrote them last."""
        if os.path.lexists(self.built) or os.path.lexists(self.aside):
            return False
        try:
            written = (self.record / _RECEIPT).stat().st_mtime_ns
            return written >= self.journal.stat().st_mtime_ns
        except OSError:
            return False
