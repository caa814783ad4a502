"""Threads that work on the tiles of many parameters at once, so that small ones need not wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from regraft.deltas.units import Encoder
from regraft.deltas.weights import Bytes

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

    The calling thread only waits, so that Ctrl-C never falls into the middle of a piece.

    Args:
        pieces: what is to be done; one is taken when a thread is free.
        threads: how many.
        to_the_end: do not stop for Ctrl-C; it is raised when all is done.

    Raises:
        BaseException: the first error of any thread, after all threads have ended.
    """
    work = _Work(iter(pieces))
    interrupted: KeyboardInterrupt | None = None
    while not work.stopped.is_set():
        interrupted = _wait_for(work, threads, to_the_end=to_the_end) or interrupted
    if work.errors:
        raise work.errors[0]
    if interrupted is not None:
        raise interrupted


class _Work:
    """Pieces that several threads share."""

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self._pieces, self._lock = pieces, threading.Lock()
        self.stopped = threading.Event()
        self.errors: list[BaseException] = []

    def do(self) -> None:
        """Do pieces until there are none, or one fails."""
        room = Room()
        try:
            while (piece := self._next()) is not None:
                piece(room)
        except BaseException as error:
            self.errors.append(error)
        self.stopped.set()

    def _next(self) -> Piece | None:
        with self._lock:
            return None if self.stopped.is_set() else next(self._pieces, None)


def _wait_for(work: _Work, threads: int, *, to_the_end: bool) -> KeyboardInterrupt | None:
    """Run threads until all have ended, however often Ctrl-C is pressed; return one that was."""
    interrupted: KeyboardInterrupt | None = None
    pool = ThreadPoolExecutor(threads, thread_name_prefix="regraft")
    try:
        for _ in range(threads):
            pool.submit(work.do)
    except KeyboardInterrupt as interrupt:
        interrupted = interrupt
    except RuntimeError:  # the system grants no more threads
        work.do()
    while True:
        if interrupted is not None and not to_the_end:
            work.stopped.set()
        try:
            pool.shutdown()
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
        else:
            return interrupted
