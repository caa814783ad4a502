"""Executing jobs that are cut into tiles, by several threads. What the jobs are is not known here.

Threads take tiles in one order: those of the first job, then those of the second, and so on. So at
most one job is being handed out, and those before it are done or nearly so. A job's memory is taken
before its first tile and given back after its end. When anything fails, all that wait are woken.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeAlias, TypeVar

from regraft.concurrency import Abandoned, MemoryGate, for_each

Tile = TypeVar("Tile")
Memory = TypeVar("Memory")

BATCH_BYTES = 256 * 2**10
"""A thread takes tiles until they are of so many bytes: one that is large, or many small ones."""


class Run(ABC, Generic[Tile, Memory]):
    """A job while it is executed."""

    @property
    @abstractmethod
    def tiles(self) -> Sequence[Tile]:
        """Its parts in the order in which they are handed out, one or more."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """Bytes of memory that it takes from its first tile to its end; 0 waits for nobody."""

    @abstractmethod
    def size(self, tile: Tile) -> int:
        """Bytes of a tile: small ones are handed out several at a time."""

    @abstractmethod
    def work(self, tile: Tile, memory: Memory) -> None:
        """Do a tile with a thread's memory; several threads may do tiles at the same time.

        It may wait for tiles that were handed out before this one, of this job or others, and for
        nothing else; it ends with :class:`regraft.concurrency.Abandoned` after :meth:`fail`.
        """

    @abstractmethod
    def account(self, tile: Tile, *, last: bool) -> None:
        """Account for a tile that is done, and say whether it was the last one to be done.

        Calls come one at a time, for all jobs.
        """

    @abstractmethod
    def finish(self) -> None:
        """End the job, once all its tiles are accounted for; other jobs may go on meanwhile."""

    @abstractmethod
    def fail(self) -> None:
        """Wake whoever waits in :meth:`work`: somebody failed. May be called more than once."""


Part: TypeAlias = tuple[Run[Tile, Memory], Tile]
"""A job, and a tile of it."""


def execute_runs(
    runs: Iterable[Run[Tile, Memory]], threads: int, *, room: int, memory: Callable[[], Memory],
    stop: Callable[[], None],
) -> None:  # fmt: skip
    """Do all tiles of all jobs.

    Args:
        runs: the jobs; each is taken when its first tile is handed out.
        threads: how many.
        room: bytes that the costs of jobs under way may add up to; one job alone may cost more.
        memory: makes one thread's memory.
        stop: wakes all that wait for what jobs share; called when a thread fails or Ctrl-C is
            pressed, perhaps more than once.

    Raises:
        BaseException: the first error of any thread, once all threads have ended.
    """
    execution = _Execution[Tile, Memory](room, stop)
    for_each(execution.batches(runs), execution.work, threads, memory=memory, stop=execution.stop)


class _Execution(Generic[Tile, Memory]):
    """Which jobs are under way, and how many of their tiles are left to be done."""

    def __init__(self, room: int, stop: Callable[[], None]) -> None:
        self._gate, self._stop = MemoryGate(room), stop
        self._left: dict[Run[Tile, Memory], int] = {}
        self._stopped = False
        self._lock = threading.Lock()  # over ``_left``, and every ``account``; never while waiting

    def batches(self, runs: Iterable[Run[Tile, Memory]]) -> Iterator[list[Part[Tile, Memory]]]:
        """Yield jobs' tiles, as many at a time as make :data:`BATCH_BYTES`.

        Threads that each do one small tile after the other spend their time on handing over.
        """
        batch, size = list[Part[Tile, Memory]](), 0
        for run in runs:
            if cost := run.cost:
                if batch:  # what is inside may be in it
                    yield batch
                    batch, size = [], 0
                # Jobs enter in their order. Those inside were all handed out, and need nothing of
                # this one, nor of any later one, to end: so the wait ends.
                self._gate.enter(cost)
            tiles = run.tiles
            with self._lock:  # before any of its tiles is out, so that ``stop`` knows of it
                self._left[run] = len(tiles)
            for tile in tiles:
                batch.append((run, tile))
                size += run.size(tile)
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def work(self, batch: list[Part[Tile, Memory]], memory: Memory) -> None:
        """Do tiles one after the other, so that none waits for a later one of its batch."""
        for run, tile in batch:
            if self._stopped:
                raise Abandoned
            self._work(run, tile, memory)

    def _work(self, run: Run[Tile, Memory], tile: Tile, memory: Memory) -> None:
        """Do a tile; with the last one, end its job."""
        run.work(tile, memory)
        with self._lock:
            self._left[run] -= 1
            last = not self._left[run]
            run.account(tile, last=last)
        if last:
            run.finish()
            with self._lock:
                del self._left[run]
            if cost := run.cost:
                self._gate.leave(cost)

    def stop(self) -> None:
        """Begin nothing more, and wake all who wait."""
        self._stopped = True
        self._gate.fail()
        self._stop()
        with self._lock:
            open_runs = list(self._left)
        for run in open_runs:
            run.fail()
