"""Reading and writing at a place of a file, from many threads at once.

Where the system has no such calls (Windows), the descriptor's own position is moved. Whoever moves
the position of a descriptor holds the lock of its number until it has read or written.
"""

from __future__ import annotations

import os
import threading

_LOCKS = tuple(threading.Lock() for _ in range(64))
"""Descriptors share them by their number; two that share one wait for each other, and no more."""


def read_into(fd: int, view: memoryview, position: int) -> int:
    """Read bytes of a file into memory; return how many, 0 at the end of the file.

    Raises:
        OSError: the system failed to read.
    """
    if hasattr(os, "preadv"):
        count: int = os.preadv(fd, [view], position)
        return count
    piece = read_piece(fd, view.nbytes, position)
    view[: len(piece)] = piece
    return len(piece)


def read_piece(fd: int, length: int, position: int) -> bytes:
    """Return up to ``length`` bytes of a file, none only at its end.

    Raises:
        OSError: the system failed to read.
    """
    if hasattr(os, "pread"):
        piece: bytes = os.pread(fd, length, position)
        return piece
    with _LOCKS[fd % len(_LOCKS)]:
        os.lseek(fd, position, os.SEEK_SET)
        return os.read(fd, length)


def write_all(fd: int, data: memoryview, position: int) -> None:
    """Write all bytes at a place of a file.

    Raises:
        OSError: the system refused.
    """
    while data:
        done = _write(fd, data, position)
        data, position = data[done:], position + done


def _write(fd: int, data: memoryview, position: int) -> int:
    if hasattr(os, "pwrite"):
        count: int = os.pwrite(fd, data, position)
        return count
    with _LOCKS[fd % len(_LOCKS)]:
        os.lseek(fd, position, os.SEEK_SET)
        return os.write(fd, data)
