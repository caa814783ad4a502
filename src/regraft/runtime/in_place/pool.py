"""Threads that work on the tiles of many parameters at once, so that small ones need not wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from regraft.deltas.undo.units import Encoder
from regraft.deltas.weights import Bytes
from regraft.runtime.whole import Stopped, asked_to_stop, whole

TILE_BYTES = 2**20
"""Weights that are worked on at a time: with their result they stay in a processor's own cache."""


class Room:
    """One thread's memory for tiles."""

    def __init__(self) -> None:
        self._parts: dict[str, Bytes] = {}
        self.encoder = Encoder()

    def take(self, purpose: str, size: int) -> Bytes:
        """Return memory that the thread keeps for a purpose; what is in it is anything."""
        found = self._parts.get(purpose)
        if found is None or found.size < size:
            found = self._parts[purpose] = np.empty(size, np.uint8)
        return found[:size]


Piece = Callable[[Room], None]
"""Something that a thread does."""


def default_threads() -> int:
    """Return the number of cores at hand."""
    return len(os.sched_getaffinity(0))


def run_all(pieces: Iterable[Piece], threads: int, *, to_the_end: bool = False) -> None:
    """Do all pieces on some threads; the first error stops them.

    Ctrl-C never falls into the middle of a piece.

    Args:
        pieces: what is to be done; one is taken when a thread is free.
        threads: how many.
        to_the_end: do not stop for Ctrl-C; it is raised when all is done.

    Raises:
        BaseException: the first error of any thread, after all threads have ended.
    """
    whole(partial(_run_all, pieces, threads, to_the_end=to_the_end))


def _run_all(pieces: Iterable[Piece], threads: int, *, to_the_end: bool) -> None:
    """Do all pieces; a step that is asked to stop leaves out the rest of them."""
    work = _Work(iter(pieces), _to_the_end if to_the_end else asked_to_stop())
    with ThreadPoolExecutor(threads, thread_name_prefix="regraft") as pool:
        try:
            for _ in range(threads):
                pool.submit(work.do)
        except RuntimeError:  # the system grants no more threads
            work.do()
    if work.errors:
        raise work.errors[0]


def _to_the_end() -> bool:
    return False


class _Work:
    """Pieces that several threads share."""

    def __init__(self, pieces: Iterator[Piece], asked: Callable[[], bool]) -> None:
        self._pieces, self._lock, self._asked = pieces, threading.Lock(), asked
        self._stopped = False
        self.errors: list[BaseException] = []

    def do(self) -> None:
        """Do pieces until there are none, or one fails."""
        try:
            room = Room()
            while (piece := self._next()) is not None:
                piece(room)
        except BaseException as error:
            self._stopped = True
            self.errors.append(error)

    def _next(self) -> Piece | None:
        with self._lock:
            if self._stopped:
                return None
            piece = next(self._pieces, None)
            if piece is not None and self._asked():
                raise Stopped
            return piece
