"""Reading bytes of tensors: one file descriptor per file, positioned reads, no seeking."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from blake3 import blake3

from regraft.errors import AccessError, FormatError, InputError
from regraft.formats.files.watching import Watch, current
from regraft.formats.problems import quoted
from regraft.system.opening import open_if_regular
from regraft.system.positioned import read_into, read_piece
from regraft.tensors import TensorSpec

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_ACCESS_HINTS = {
    errno.EACCES: "Check the permissions of the file and of the folders above it",
    errno.EPERM: "Check the permissions of the file and of the folders above it",
    errno.EIO: "The disk could not deliver it; check the system's log and the disk",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Close other programs, or raise the system's limit of open files",
}


def access_error(path: Path, error: OSError) -> AccessError:
    """Return the typed error for what the system said when ``path`` was opened or read."""
    return AccessError(
        "the system refused to read it",
        where=str(path),
        found=error.strerror or str(error),
        hint=_ACCESS_HINTS.get(error.errno or 0, ""),
    )


def expanded(path: str | Path) -> Path:
    """Return a path with ``~`` as the home; ``~name`` of somebody who is not known here stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (Path.expanduser raises)


def is_there(path: str | Path) -> bool:
    """Whether a path exists; not, if it is one that no file can have, as a name that is too long.

    Names come from configs, and so from strangers.
    """
    return os.path.exists(path)  # noqa: PTH110  (Path.exists raises)


@contextmanager
def typed_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into :class:`AccessError` for the path it names, or ``path``."""
    try:
        yield
    except OSError as error:
        raise access_error(Path(error.filename or path), error) from None


def open_regular(path: Path, watch: Watch | None = None) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    A pipe, a device or a folder is refused, and opening a pipe does not wait for a writer. The file
    is noted as one that has to stay as it is: by ``watch``, or by that of the verb that runs here.

    Raises:
        InputError: there is no such file.
        FormatError: it is not a regular file.
        AccessError: the system refused to open it.
    """
    try:
        fd, mode = open_if_regular(path)
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), hint="Check the path") from None
    except OSError as error:
        raise access_error(path, error) from None
    if fd is not None:
        if (noting := watch or current()) is not None:
            noting.note(path, fd)
        return fd
    found = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
    raise FormatError(
        "cannot be read as a file", where=str(path), expected="a regular file", found=found
    )


def read_at(fd: int, path: Path, position: int, length: int) -> bytes:
    """Return ``length`` bytes at ``position``, fewer only at the end of the file.

    Raises:
        AccessError: the system failed to read.
    """
    pieces = []
    try:
        while length > 0 and (piece := read_piece(fd, length, position)):
            pieces.append(piece)
            position += len(piece)
            length -= len(piece)
    except OSError as error:
        raise access_error(path, error) from None
    return b"".join(pieces)


def note_content(path: Path, content: bytes) -> None:
    """Note all bytes of a file that were read, where a verb watches its inputs."""
    if (watch := current()) is not None:
        watch.note_content(path, content)


class FilePool:
    """Open files, each opened once, that any number of threads read from at the same time.

    A context manager; descriptors are closed when it ends, and only then. Files are noted by the
    verb that makes the pool, whatever thread opens them.
    """

    def __init__(self) -> None:
        """Start with no file open."""
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()  # a file is opened once, and none after the pool is closed
        self._closed = False
        self._watch = current()

    def __enter__(self) -> Self:
        """Return the pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every file."""
        self.close()

    def close(self) -> None:
        """Close every file; a later read is a programming error."""
        with self._lock:
            self._closed = True
            fds, self._fds = self._fds, {}
        for fd in fds.values():
            os.close(fd)

    def read_into(self, spec: TensorSpec, offset: int, buffer: WriteableBuffer) -> None:
        """Fill ``buffer`` with the bytes of a tensor that begin ``offset`` bytes into it.

        Args:
            spec: the tensor.
            offset: where to begin, in bytes from the tensor's first byte.
            buffer: any writable C-contiguous buffer; its size in bytes says how much to read.

        Raises:
            FormatError: the file ends before the tensor does.
            InputError: the file has gone.
            AccessError: the system failed to open or read the file.
            ValueError: the range lies outside the tensor, or the pool is closed.
        """
        view = memoryview(buffer)
        if offset < 0 or offset + view.nbytes > spec.nbytes:
            raise ValueError(f"bytes {offset} to {offset + view.nbytes} lie outside {spec}")
        if view.nbytes:
            self._fill(spec, spec.start + offset, view.cast("B"))

    def place(self, spec: TensorSpec, offset: int) -> tuple[int, int]:
        """Return the descriptor of a tensor's file, and where a byte of the tensor lies in it.

        The descriptor is the pool's. Raises as :meth:`read_into` does.
        """
        return self._descriptor(spec.path), spec.start + offset

    def read_bytes(self, spec: TensorSpec) -> bytes:
        """Return all bytes of a tensor; for small ones. Raises as :meth:`read_into` does."""
        content = bytearray(spec.nbytes)
        self.read_into(spec, 0, content)
        return bytes(content)

    def digest(self, spec: TensorSpec, piece: int = 2**20) -> str:
        """Return the blake3 (hex) of a tensor's bytes; ``piece`` of them are in memory at a time.

        Raises as :meth:`read_into` does.
        """
        digest, buffer = blake3(), bytearray(min(piece, spec.nbytes))
        for start in range(0, spec.nbytes, piece):
            part = memoryview(buffer)[: spec.nbytes - start]
            self.read_into(spec, start, part)
            digest.update(part)
        return digest.hexdigest()

    def _fill(self, spec: TensorSpec, position: int, view: memoryview) -> None:
        fd = self._descriptor(spec.path)
        while view:
            try:
                count = read_into(fd, view, position)
            except OSError as error:
                raise access_error(spec.path, error) from None
            if count == 0:
                raise _ended_early(spec, position)
            view = view[count:]
            position += count

    def _descriptor(self, path: Path) -> int:
        fd = self._fds.get(path)
        if fd is not None:
            return fd
        with self._lock:
            if self._closed:
                raise ValueError("this FilePool is closed")
            if path not in self._fds:
                self._fds[path] = open_regular(path, self._watch)
            return self._fds[path]


def _ended_early(spec: TensorSpec, position: int) -> FormatError:
    return FormatError(
        "the file ends inside a tensor",
        where=f"{spec.path}, tensor {quoted(spec.name)}",
        expected=f"bytes up to {spec.start + spec.nbytes}",
        found=f"the end at {position}",
        hint="Did the file change while it was being read? Run again once nothing writes to it",
    )
