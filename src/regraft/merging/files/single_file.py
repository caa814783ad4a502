"""An output that is one file, and what is known of it in a folder beside.

Of ``OUT.gguf`` the receipt lies in ``OUT.gguf.regraft``. Both are built in the work folder. That
folder is put in place first and the file last, by one rename: a file that is there is whole, and
has its receipt. A folder without its file is what a kill between the two has left; the same
command takes its place.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from regraft.errors import OutputExistsError, UsageError
from regraft.formats.layout import is_gguf, record_of
from regraft.formats.problems import quoted
from regraft.system.locks import remove_all
from regraft.system.renaming import exchange_at_once
from regraft.system.syncing import sync_folder, sync_place

RECORD = "regraft"
"""Name, in the folder that is built, of what comes to lie beside the file."""

_KNOWN = frozenset(("receipt.json",))


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
    """Flush what was built, and put it in place: the receipt first, the file last.

    Raises:
        OSError: the system refused. The file is then as it was, and so is the receipt where that
            can be said.
    """
    built, record = folder / RECORD, record_of(out)
    sync_folder(built)
    sync_folder(folder)
    swapped = os.path.lexists(record)
    if swapped:
        if not exchange_at_once(built, record):
            remove_all(record)
            built.rename(record)
            swapped = False
    else:
        built.rename(record)
    try:
        (folder / out.name).replace(out)
    except OSError:
        with contextlib.suppress(OSError):
            exchange_at_once(built, record) if swapped else record.rename(built)
        raise
    sync_place(out.parent)
