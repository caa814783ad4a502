"""Writing weight files: in any order, past the page cache where the system allows it.

A merge writes each byte once and does not read it back, so the page cache would only cost memory
bandwidth. Whole disk blocks go out by direct I/O. The edges of a piece, which share a block with
its neighbours, are gathered in memory and go through the cache many at a time, because every
cached write makes the kernel stop direct writes to the same file for a moment. Where direct I/O is
refused (tmpfs, some network file systems) everything goes through the cache.

Bytes that lie in another file as they are need not be written where the file system lets two files
share blocks: whole blocks are then shared, and only what lies before and after them is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

from regraft.errors import AccessError, DiskSpaceError, RegraftError
from regraft.system.opening import open_to_write
from regraft.system.past_cache import REFUSED, open_past_cache
from regraft.system.positioned import write_all
from regraft.system.sharing import WIDEST, block_of, share_blocks
from regraft.system.space import files_left, give_size
from regraft.system.syncing import sync_file

BLOCK = 4096
"""Alignment of direct I/O: offset in the file, address in memory and length."""

EDGES_HELD = 512
"""Edges gathered before they are written."""

Origin = tuple[int, int]
"""Where bytes lie as they are: the descriptor of a file, and the place in it."""


def write_error(path: Path, error: OSError) -> RegraftError:
    """Return the typed error for a failed write."""
    if error.errno == errno.ENOSPC and files_left(path) == 0:
        return DiskSpaceError(
            "the file system takes no more files: its inodes are used up", where=str(path),
            hint="Remove some files and run the same command again; the inputs are untouched",
        )  # fmt: skip
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(
            "the disk is full", where=str(path), found=error.strerror or "",
            hint="Free some space and run the same command again; the inputs are untouched",
        )  # fmt: skip
    if error.errno == errno.ENAMETOOLONG:
        return AccessError(
            "a name is too long for the file system", where=str(path),
            found=f"{len(os.fsencode(path.name))} bytes", hint="Give a shorter -o",
        )  # fmt: skip
    return AccessError(
        "cannot write", where=str(path), found=error.strerror or str(error),
        hint="Check permissions and the disk; the inputs are untouched",
    )  # fmt: skip


def sync_or_empty(fd: int) -> None:
    """Flush a file to the disk; empty it if that fails.

    What the disk did not take may still be read from the cache, once, and be taken for whole.
    """
    try:
        sync_file(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
        raise


def whole_blocks(offset: int, nbytes: int, block: int = BLOCK) -> tuple[int, int]:
    """Return where the first whole block of a range of a file begins, and the last one ends; the
    beginning of the range, twice, where it has none."""
    first, last = -(-offset // block) * block, (offset + nbytes) // block * block
    return (first, last) if first < last else (offset, offset)


def _last(part: tuple[int, int]) -> int:
    return part[1]


class OutputFile:
    """A weight file being made: what is no tensor first, tensors in any order, then ``close``."""

    def __init__(
        self, path: Path, size: int, pieces: Iterable[tuple[int, bytes]], *, share: bool = False
    ) -> None:
        """Make a file, or go on with one of an earlier try.

        Args:
            path: the file.
            size: its full size in bytes.
            pieces: what it holds besides tensors: offset and bytes.
            share: whether blocks of other files may become blocks of this one; room is then not
                set aside, as most of it may not be needed.

        Raises:
            DiskSpaceError, AccessError: the system refused.
        """
        self.path = path
        self._opened: list[int] = []
        self._edges: list[tuple[int, bytes]] = []
        self._shared: list[tuple[int, int]] = []  # in file order
        # ``_lock`` guards the edges. ``_ending`` guards the descriptors: nothing is written to one
        # that was closed, as its number may be another file's by then.
        self._lock, self._ending = threading.Lock(), threading.Lock()
        try:
            self._fd = open_to_write(path)
            self._opened.append(self._fd)
            give_size(self._fd, size, reserve=not share)
            block = block_of(self._fd) if share else 0
            self._block = block if block <= WIDEST else 0
            self._direct = open_past_cache(path)
            if self._direct is not None:
                self._opened.append(self._direct)
            for offset, content in pieces:
                write_all(self._fd, memoryview(content), offset)
        except OSError as error:
            self._close_all()
            raise write_error(path, error) from error

    def _close_all(self) -> None:
        while self._opened:
            os.close(self._opened.pop())

    def share(self, offset: int, size: int, origin: Origin) -> None:
        """Have whole blocks of another file be blocks of this one, where the system can.

        Nothing may have been written there, or it is written again. One thread may ask, before
        others write.

        Args:
            offset: where in this file bytes begin that the other has, too.
            size: how many.
            origin: where they lie in the other file.

        Raises:
            DiskSpaceError, AccessError: the system refused.
        """
        block, (fd, position) = self._block, origin
        if not block or (position - offset) % block:
            return
        first, last = whole_blocks(offset, size, block)
        if first == last:
            return
        try:
            done = share_blocks(fd, position + first - offset, self._fd, first, last - first)
        except OSError as error:
            raise write_error(self.path, error) from error
        if done:
            self._shared.append((first, last))
        else:
            self._block = 0

    def unshared(self, offset: int, size: int) -> list[tuple[int, int]]:
        """Return the parts of a range of the file that have to be written: what is not shared.

        Returns:
            First and last of their bytes, half open, counted from ``offset``.
        """
        parts, at, end = [], offset, offset + size
        for first, last in self._shared[bisect_right(self._shared, at, key=_last) :]:
            if first >= end:
                break
            parts.append((at - offset, first - offset))
            at = min(last, end)
        return [part for part in [*parts, (at - offset, size)] if part[0] < part[1]]

    def write(self, offset: int, data: memoryview, address: int) -> None:
        """Write ``data``, which lies at ``address`` in memory, at a byte offset of the file.

        Raises:
            DiskSpaceError, AccessError: the system refused.
        """
        try:
            if self._direct is None or (address - offset) % BLOCK:
                write_all(self._fd, data, offset)
            else:
                self._write_blocks(offset, data)
        except OSError as error:
            raise write_error(self.path, error) from error

    def _write_blocks(self, offset: int, data: memoryview) -> None:
        head = min(-offset % BLOCK, len(data))
        body = (len(data) - head) // BLOCK * BLOCK
        self._write_direct(data[head : head + body], offset + head)
        edges = [(offset, bytes(data[:head]))]
        edges.append((offset + head + body, bytes(data[head + body :])))
        with self._lock:
            self._edges += [edge for edge in edges if edge[1]]
            ready = self._take_edges() if len(self._edges) >= EDGES_HELD else []
        self._write_edges(ready)

    def _take_edges(self) -> list[tuple[int, bytes]]:
        edges, self._edges = sorted(self._edges), []
        return edges

    def _write_edges(self, edges: list[tuple[int, bytes]]) -> None:
        """Write edges in file order, neighbours in one go."""
        at, run = 0, bytearray()
        for offset, data in edges:
            if run and offset != at + len(run):
                write_all(self._fd, memoryview(bytes(run)), at)
                run = bytearray()
            at = at if run else offset
            run += data
        write_all(self._fd, memoryview(bytes(run)), at)

    def _write_direct(self, data: memoryview, offset: int) -> None:
        direct = self._direct
        try:
            if direct is not None:
                write_all(direct, data, offset)
                return
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            self._direct = None  # other threads may still be using it: closed with the file
        write_all(self._fd, data, offset)

    def flush(self) -> None:
        """Hand what is still gathered to the system; after ``close`` nothing is."""
        with self._ending:
            if self._opened:
                self._flush()

    def _flush(self) -> None:
        try:
            with self._lock:
                edges = self._take_edges()
            self._write_edges(edges)
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self, *, sync: bool) -> None:
        """Flush to the disk (with ``sync``) and close."""
        with self._ending:
            try:
                if sync:
                    self._flush()
                    sync_or_empty(self._fd)
            except OSError as error:
                raise write_error(self.path, error) from error
            finally:
                self._close_all()
