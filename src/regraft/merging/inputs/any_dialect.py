"""Adapters of every dialect, opened as PEFT's files.

What another program wrote in its own layout is written down once more in PEFT's, in a folder of
this process, and opened there. All that follows, from a check to an undo, knows one format, and a
merge of such an adapter is a merge of what ``regraft convert --to peft`` makes of it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adapters.dialects.registry import DIALECTS, Dialect, dialect_of
from regraft.errors import UsageError
from regraft.formats import adapter_files
from regraft.formats.adapter_files import AdapterFiles, adapter_folder, layout_of
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.foreign import Layout, of_tensors
from regraft.formats.hub import Located
from regraft.formats.layout import ADAPTER_CONFIG, ADAPTER_SAFE
from regraft.formats.safetensors import read_header
from regraft.merging.files.publish import copy_file, write_pieces
from regraft.merging.files.side_files import adapter_side_files
from regraft.tensors import VIRTUAL, TensorSpec

if TYPE_CHECKING:  # to look at an adapter in PEFT's format takes no arrays
    from regraft.adapters.dialects.form import NewFile, PlainAdapter


def open_adapter(
    located: Located,
    base: Checkpoint | None = None,
    dialect: str | None = None,
    *,
    described: bool = False,
) -> AdapterFiles:
    """Open an adapter in any dialect that is read.

    Args:
        located: where it is.
        base: the model it is for; some dialects cannot be read without.
        dialect: what it is written in; None for what its files show.
        described: it is looked at and not used: no tensor has a place to be read from, and the base
            is not missed.

    Raises:
        UnsupportedError: a layout that is not read; says how to come to one that is.
        UsageError: it takes the base to read it, or there is no such dialect.
        RegraftError: it cannot be opened, or contradicts itself.
    """
    found, notes = adapter_folder(located)
    if dialect is None and layout_of(found) is None:
        opened = adapter_files.open_adapter(located)
        layout = of_tensors({name: spec.shape for name, spec in opened.tensors.items()})
        shown = None if layout is None else dialect_of(layout[0])
        if shown is None:
            return opened
    elif (shown := dialect_at(found, dialect)) is None:
        return adapter_files.open_adapter(located)
    from regraft.merging.inputs.base import see

    seen = None if base is None else see(base, None)[0]
    plain = shown.reader(found.path, seen)
    if described:
        return _described(found, shown, plain, notes)
    if plain.needs_base:
        raise UsageError(
            f"{shown.shown} cannot be read without the model that it is for: {plain.needs_base}",
            where=found.source, expected="the base", found="none",
            hint="Name the base, where the command takes one; else write the adapter in PEFT's "
            "format first: regraft convert ADAPTER -o OUT --base BASE",
        )  # fmt: skip
    return _opened_as_peft(found, shown, plain, seen, (*notes, *plain.notes))


def _described(
    located: Located, dialect: Dialect, plain: PlainAdapter, notes: tuple[str, ...]
) -> AdapterFiles:
    """Return an adapter's config and tensors in PEFT's names and shapes, with nothing written."""
    from regraft.adapters.dialects.as_peft import config_of, tensors_of

    path = located.path
    root = path if path.is_dir() else path.parent
    moved = tensors_of(plain)
    tensors = {
        name: TensorSpec(name, each.dtype, each.shape, path, VIRTUAL, each.nbytes)
        for name, each in moved.items()
    }
    files = sorted({spec.path.name for each in moved.values() for spec in each.sources})
    return AdapterFiles(
        root, located.source, located.revision, config_of(plain), tensors, ", ".join(files),
        dict(plain.metadata), (*notes, *plain.notes), dialect=dialect.name, origin=path,
    )  # fmt: skip


def dialect_at(located: Located, asked: str | None = None) -> Dialect | None:
    """Return the dialect that an adapter is in; None for PEFT's, and for what nobody reads.

    Args:
        located: where it is.
        asked: its name, where that was said.

    Raises:
        UsageError: there is no such dialect.
        AccessError: the system refused to look.
    """
    if asked is not None:
        if asked == "peft":
            return None
        if asked not in DIALECTS or not DIALECTS[asked].reads:
            known = ["peft", *(name for name, each in DIALECTS.items() if each.reads)]
            raise UsageError("there is no such dialect of adapters to read", where="from",
                             expected=", ".join(known), found=asked)  # fmt: skip
        return DIALECTS[asked]
    layout = layout_of(located) or _by_tensors(located)
    return None if layout is None else dialect_of(layout[0])


def _by_tensors(located: Located) -> tuple[Layout, str] | None:
    """Return what the tensors show where the files have PEFT's names."""
    path = located.path / ADAPTER_SAFE if located.path.is_dir() else located.path
    if path.name != ADAPTER_SAFE or not path.is_file():
        return None
    tensors = read_header(path).tensors
    return of_tensors({name: spec.shape for name, spec in tensors.items()})


def _opened_as_peft(
    located: Located,
    dialect: Dialect,
    plain: PlainAdapter,
    base: Checkpoint | None,
    notes: tuple[str, ...],
) -> AdapterFiles:
    from regraft.adapters.dialects.as_peft import write

    folder = Path(tempfile.mkdtemp(dir=_scratch()))
    with FilePool() as files:
        write_files(folder, write(plain, base), files)
    for name, path in _side_files(located.path).items():
        copy_file(path, folder / name)
    opened = adapter_files.open_adapter(replace(located, path=folder))
    note = f"{located.source} is {dialect.shown}: it is read as one in PEFT's format"
    return replace(
        opened, dialect=dialect.name, origin=located.path, notes=(note, *notes, *opened.notes)
    )


def _side_files(path: Path) -> dict[str, Path]:
    """Return the files that go along with an adapter; what lies beside a lone file need not be its.

    A config of adapters beside it shows the folder to be that of one.
    """
    if path.is_dir():
        return dict(adapter_side_files(path).files)
    own = (path.parent / ADAPTER_CONFIG).is_file()
    return dict(adapter_side_files(path.parent).files) if own else {}


def write_files(folder: Path, new: tuple[NewFile, ...], files: FilePool) -> None:
    """Write an adapter's files into a folder.

    Raises:
        RegraftError: a tensor cannot be read, or a file not be written.
    """
    for file in new:
        write_pieces(folder / file.name, file.pieces(files))


# -- the folder of this process --------------------------------------------------------------------

_lock = threading.Lock()
_folders: dict[int, str] = {}
"""The folder of each process: one that was forked has its parent's in here, which is not its own
to remove."""


def _scratch() -> str:
    with _lock:
        if (own := _folders.get(os.getpid())) is None:
            own = _folders[os.getpid()] = tempfile.mkdtemp(prefix="regraft-adapters-")
            atexit.register(_remove, os.getpid())
        return own


def _remove(pid: int) -> None:
    if pid == os.getpid():
        shutil.rmtree(_folders[pid], ignore_errors=True)
