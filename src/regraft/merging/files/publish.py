"""The output folder: built beside its place, flushed, then renamed into it, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from blake3 import blake3

from regraft.errors import DiskSpaceError, OutputExistsError, UsageError
from regraft.formats.files.inside import file_pieces
from regraft.formats.files.reading import expanded
from regraft.formats.files.watching import current
from regraft.formats.layout import DESCRIPTIONS, Looks, looks_like
from regraft.formats.problems import quoted
from regraft.merging.files.direct_io import write_error
from regraft.merging.files.single_file import (
    REPLACED,
    check_file,
    is_lone_file,
    publish_file,
    put_back_file,
)
from regraft.system.names import are_one, same_names, taken_by, trouble_of_name
from regraft.system.opening import open_to_write
from regraft.system.renaming import exchange_at_once, move_to_absent, take_empty
from regraft.system.space import taken
from regraft.system.syncing import sync_file, sync_folder, sync_place

SLACK_BYTES = 64 * 2**20
"""Room asked for beyond the weights: tokenizer, headers, the file system's own needs."""


Kind = Literal["model", "adapter", "gguf", "ollama"]
"""What an output is; all but a GGUF model are folders, and Ollama's holds one."""

_MAY_REPLACE: dict[Kind, tuple[Looks, ...]] = {
    "model": ("merged", "checkpoint", "empty", "tokenizer"),
    "adapter": ("adapter", "mlx-adapter", "empty"),
    "gguf": (),
    "ollama": ("gguf", "empty"),
}
"""What an output may take the place of, by what it is itself."""


def out_path(out: str | Path) -> Path:
    """Return where an output goes; ``~`` is the user's home, and stays where there is no such.

    Raises:
        UsageError: it is a name that no folder can have.
    """
    if "\0" in str(out):
        raise UsageError("the output's name holds a NUL character", where=quoted(str(out)))
    path = Path(os.path.expanduser(out))  # noqa: PTH111  (Path.expanduser raises there)
    for part in path.parts[bool(path.anchor) :]:
        if part != ".." and (trouble := trouble_of_name(part)):
            raise UsageError(f"the output's name {trouble}", where=quoted(str(out)))
    return path


def check_output(
    out: Path, inputs: Sequence[Path], *, overwrite: bool, kind: Kind = "model"
) -> None:
    """Refuse an output folder that would harm something.

    Args:
        out: the folder.
        inputs: what is read.
        overwrite: whether it may replace a folder that holds what it will hold. One that holds
            nothing is filled.
        kind: what it will hold.

    Raises:
        UsageError: it is, holds, or lies in one of the inputs.
        OutputExistsError: it exists and may not be replaced.
    """
    if kind == "gguf":
        check_file(out, inputs, overwrite=overwrite)
        return
    place = out.resolve()
    for path in inputs:
        source = path.resolve()
        if place == source or place in source.parents or source in place.parents:
            raise UsageError(
                "the output would lie in (or over) an input", where=str(out), found=str(path),
                hint="Choose another folder for -o",
            )  # fmt: skip
    if not os.path.lexists(out):
        return
    if _is_below_our_feet(place):
        raise OutputExistsError(
            "the output would take the place of the current folder", where=str(out),
            hint="Give a folder in it, such as -o ./NAME, or run this from another folder",
        )  # fmt: skip
    if _is_empty(out):
        return
    if obstacle := _obstacle(out, kind):
        what, found, hint = obstacle
        if out.is_dir() and not overwrite:
            what = f"the output exists already, and {what}"
        raise OutputExistsError(what, where=str(out), found=found, hint=hint)
    if not overwrite:
        raise OutputExistsError(
            "the output exists already", where=str(out),
            hint="Give another -o, or --overwrite to replace it once the new one is complete",
        )  # fmt: skip


def _obstacle(out: Path, kind: Kind) -> tuple[str, str, str] | None:
    """Return why something may not be replaced at all (what, found, hint); None if it may be."""
    if out.is_symlink():
        return (
            "the output is a link, which is not replaced", f"a link to {out.readlink()}",
            "Give the folder that it leads to, or another -o",
        )  # fmt: skip
    if not out.is_dir():
        return "the output is a file", "a file", "Give a folder as -o, or remove the file yourself"
    if os.path.ismount(out) or out.resolve() == _home():
        found = "a mount point" if os.path.ismount(out) else "the home folder"
        return f"{found} is not replaced", found, "Give a folder in it as -o"
    looks = looks_like(out)
    if looks in _MAY_REPLACE[kind]:
        return None
    held = {"adapter": "an adapter", "ollama": "a GGUF model"}.get(kind, "a model")
    what = f"--overwrite replaces only folders that hold {held}"
    return what, DESCRIPTIONS[looks], "Give another -o, or remove it yourself"


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except (RuntimeError, OSError):  # there is none
        return None


def replaced_inputs(out: Path, *sources: object) -> list[Path]:
    """Return those of a call's inputs that lie at or below ``out``, before any is opened.

    Args:
        out: the output.
        sources: paths, Hub ids, pairs of one and a weight, lists of these, or None.
    """
    found: list[Path] = []
    place = out.resolve()
    for source in sources:
        if isinstance(source, list | tuple):
            found += replaced_inputs(out, *source)
        elif isinstance(source, str | Path):
            path = expanded(source)
            if os.path.lexists(path) and place in (path.resolve(), *path.resolve().parents):
                found.append(path)
    return found


def _is_below_our_feet(place: Path) -> bool:
    """Whether a folder is the current one or above it: whoever is in it would stay in the old."""
    try:
        inside = Path.cwd()
    except FileNotFoundError:  # it was removed
        return False
    return place == inside or place in inside.parents


def _is_empty(out: Path) -> bool:
    return not out.is_symlink() and out.is_dir() and looks_like(out) == "empty"


SUFFIX = ".regraft"


def place_of(out: Path) -> Path:
    """Return the work folder of an output: beside it."""
    place = Path(os.path.normpath(out.absolute()))
    return place.parent / f".{place.name}{SUFFIX}"


def free_bytes(out: Path) -> int:
    """Return the bytes free where ``out`` will be, for this user.

    What an earlier try at ``out`` has taken counts as free: it is gone on with, or removed first.
    """
    return shutil.disk_usage(folder_there(out)).free + _taken(place_of(out))


def folder_there(out: Path) -> Path:
    """Return the folder that ``out`` will be in, or of those above it the first that is there."""
    folder = out.absolute().parent
    while not os.path.exists(folder):  # noqa: PTH110  (False where it may not be looked at)
        folder = folder.parent
    return folder


def _taken(folder: Path) -> int:
    """Return what the files below a folder take on the disk; nothing of what cannot be seen."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += taken((Path(parent) / name).lstat())
    return total


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin what will not fit.

    Raises:
        DiskSpaceError: fewer bytes are free than are needed.
    """
    free = free_bytes(out)
    if free < needed + SLACK_BYTES:
        raise DiskSpaceError(
            "not enough disk space", where=str(out.absolute().parent),
            expected=f"{(needed + SLACK_BYTES) / 1e9:.2f} GB free", found=f"{free / 1e9:.2f} GB",
            hint="Free some space, or put -o on another disk; nothing was written",
        )  # fmt: skip


def publish(folder: Path, out: Path, *, overwrite: bool, kind: Kind = "model") -> None:
    """Flush a folder and put it in place; what it replaces is left in the folder's name.

    Raises:
        OutputExistsError: something came to be at ``out`` meanwhile that may not be replaced.
        OSError: the system refused; ``out`` is as it was, after :func:`put_back`.
    """
    if kind == "gguf":
        check_output(out, [], overwrite=overwrite, kind=kind)
        publish_file(folder, out)
        return
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(directory)
    moved = move_to_absent(folder, out)
    if not moved:
        check_output(out, [], overwrite=overwrite, kind=kind)
        moved = _is_empty(out)
        _take_empty(folder, out) if moved else _exchange(folder, out)
    try:
        sync_place(out.parent)
    except OSError:
        with contextlib.suppress(OSError):
            out.rename(folder) if moved else _exchange(folder, out)
        raise


def put_back(folder: Path, out: Path) -> None:
    """Put back what was being replaced if its successor did not come into place; else remove it."""
    if is_lone_file(folder, out):
        put_back_file(folder, out)
        return
    aside = _aside(folder)
    if not os.path.lexists(aside):
        return
    if os.path.lexists(out):
        shutil.rmtree(aside)
    else:
        aside.rename(out)


def _aside(folder: Path) -> Path:
    """Return where what is replaced lies for a moment, where folders cannot be swapped."""
    return folder.with_name(REPLACED)


def _take_empty(folder: Path, out: Path) -> None:
    """Rename a folder to where an empty one is.

    Raises:
        OutputExistsError: something was put into it meanwhile.
    """
    try:
        take_empty(folder, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise OutputExistsError("the output is no longer empty", where=str(out)) from None


def _exchange(folder: Path, out: Path) -> None:
    """Swap two folders: in one step, where the kernel can."""
    if not exchange_at_once(folder, out):
        out.rename(_aside(folder))
        folder.rename(out)
        _aside(folder).rename(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and flush it to the disk.

    Raises:
        AccessError, DiskSpaceError: the system refused.
    """
    write_pieces(path, [content])


def copy_file(source: Path, path: Path) -> str:
    """Copy a file of an input and flush the copy to the disk; return its blake3 (hex).

    Raises:
        InputError, FormatError, AccessError, DiskSpaceError: the system refused.
    """
    digest = write_pieces(path, file_pieces(source))
    if (watch := current()) is not None:
        watch.note_digest(source, digest)
    return digest


def check_names_apart(folder: Path, names: Iterable[str]) -> None:
    """Refuse names of files that would be one in a folder.

    Raises:
        UsageError: two are, as its file system does not tell upper from lower case.
    """
    for one, other, *_ in same_names(names):
        if are_one(folder, one, other):
            raise _one_file(folder, one, other)


def _one_file(folder: Path, name: str, other: str) -> UsageError:
    """Return the error for two files of an output that would be one on its file system."""
    return UsageError(
        "two files of the output have one name on this file system", where=str(folder),
        expected="names that differ in more than case", found=f"{quoted(name)} and {quoted(other)}",
        hint="Give -o on a file system that tells upper from lower case",
    )  # fmt: skip


def write_pieces(path: Path, pieces: Iterable[bytes]) -> str:
    """Write a file and flush it to the disk; return its blake3 (hex).

    Raises:
        AccessError, DiskSpaceError: the system refused.
    """
    digest = blake3()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (other := taken_by(path)) is not None:
            raise _one_file(path.parent, path.name, other)
        with contextlib.closing(os.fdopen(open_to_write(path, fresh=True), "wb")) as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
            file.flush()
            sync_file(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error
    return digest.hexdigest()
