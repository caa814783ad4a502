"""The output folder: built beside its place, flushed, then renamed into it, whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from regraft.errors import DiskSpaceError, OutputExistsError, UsageError
from regraft.formats.layout import looks_like
from regraft.merging.writer import write_error

SLACK_BYTES = 64 * 2**20
"""Room asked for beyond the weights: tokenizer, headers, the file system's own needs."""


def check_output(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output folder that would harm something.

    Raises:
        UsageError: it is, holds, or lies in one of the inputs.
        OutputExistsError: it exists and may not be replaced.
    """
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
    if not overwrite:
        raise OutputExistsError(
            "the output exists already", where=str(out),
            hint="Give another -o, or --overwrite to replace it once the new one is complete",
        )  # fmt: skip
    kind = looks_like(out) if out.is_dir() else "unknown"
    if out.is_symlink() or kind not in ("merged", "checkpoint", "empty", "tokenizer"):
        raise OutputExistsError(
            "--overwrite replaces only folders that hold a model", where=str(out),
            expected="a model folder, or an empty one", found=f"{kind}",
            hint="Give another -o, or remove it yourself",
        )  # fmt: skip


def free_bytes(out: Path) -> int:
    """Return the bytes free where ``out`` will be, for this user."""
    folder = out.absolute().parent
    while not os.path.exists(folder):  # noqa: PTH110  (False where it may not be looked at)
        folder = folder.parent
    return shutil.disk_usage(folder).free


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


def publish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Flush a folder and put it in place; what it replaces is left in the folder's name.

    Raises:
        OutputExistsError: something came to be at ``out`` meanwhile that may not be replaced.
        OSError: the system refused.
    """
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_directory(directory)
    if not _move(folder, out):
        check_output(out, [], overwrite=overwrite)
        _exchange(folder, out)
    sync_directory(out.parent)


_ONLY_IF_ABSENT, _BOTH_WAYS = 1, 2  # renameat2's RENAME_NOREPLACE and RENAME_EXCHANGE
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL)


def _move(folder: Path, out: Path) -> bool:
    """Rename a folder to where nothing is; return False, with nothing done, if something is."""
    failure = _renameat2(folder, out, _ONLY_IF_ABSENT)
    if failure in _UNSUPPORTED and not os.path.lexists(out):
        folder.rename(out)
        return True
    if failure not in (0, errno.EEXIST, *_UNSUPPORTED):
        raise OSError(failure, os.strerror(failure), str(out))
    return failure == 0


def _exchange(folder: Path, out: Path) -> None:
    """Swap two folders: in one step, where the kernel can."""
    failure = _renameat2(folder, out, _BOTH_WAYS)
    if failure in _UNSUPPORTED:
        aside = out.with_name(f"{folder.name}.old")
        out.rename(aside)
        folder.rename(out)
        shutil.rmtree(aside, ignore_errors=True)
    elif failure:
        raise OSError(failure, os.strerror(failure), str(out))


def _renameat2(source: Path, target: Path, flags: int) -> int:
    """Call Linux's renameat2; return 0 or an error's number, ENOSYS where there is no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "renameat2", None)
    if call is None:
        return errno.ENOSYS
    at_cwd = -100
    return (
        0 if call(at_cwd, bytes(source), at_cwd, bytes(target), flags) == 0 else ctypes.get_errno()
    )


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and flush it to the disk.

    Raises:
        AccessError, DiskSpaceError: the system refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        with contextlib.closing(os.fdopen(fd, "wb")) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error
