"""Executing jobs that are cut into tiles, by several threads. What the jobs are is not known here.

Threads take tiles in one order: those of the first job, then those of the second, and so on. So at
most one job is being handed out, and those before it are done or nearly so. A job's memory is taken
before its first tile and given back after its end. When anything fails, all that wait are woken.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from regraft.concurrency import MemoryGate, for_each

Tile = TypeVar("Tile")
Memory = TypeVar("Memory")


class Run(ABC, Generic[Tile, Memory]):
    """A job while it is executed."""

    @property
    @abstractmethod
    def tiles(self) -> Sequence[Tile]:
        """Its parts in the order in which they are handed out, one or more."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """Bytes of memory that it takes from its first tile to its end."""

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
    for_each(execution.parts(runs), execution.work, threads, memory=memory, stop=execution.stop)


class _Execution(Generic[Tile, Memory]):
    """Which jobs are under way, and how many of their tiles are left to be done."""

    def __init__(self, room: int, stop: Callable[[], None]) -> None:
        self._gate, self._stop = MemoryGate(room), stop
        self._left: dict[Run[Tile, Memory], int] = {}
        self._lock = threading.Lock()  # over ``_left``, and every ``account``; never while waiting

    def parts(
        self, runs: Iterable[Run[Tile, Memory]]
    ) -> Iterator[tuple[Run[Tile, Memory], Tile, bool]]:
        """Yield jobs with their tiles, and whether a tile is a job's first."""
        for run in runs:
            tiles = run.tiles
            with self._lock:  # before any of its tiles is out, so that ``stop`` knows of it
                self._left[run] = len(tiles)
            for number, tile in enumerate(tiles):
                yield run, tile, number == 0

    def work(self, part: tuple[Run[Tile, Memory], Tile, bool], memory: Memory) -> None:
        """Do a tile; with the last one, end its job."""
        run, tile, first = part
        if first:
            # The jobs inside were begun before, and need nothing of this one to end: their tiles
            # are all handed out. So the wait ends.
            self._gate.enter(run.cost)
        run.work(tile, memory)
        with self._lock:
            self._left[run] -= 1
            last = not self._left[run]
            run.account(tile, last=last)
        if last:
            run.finish()
            with self._lock:
                del self._left[run]
            self._gate.leave(run.cost)

    def stop(self) -> None:
        """Wake all who wait."""
        self._gate.fail()
        self._stop()
        with self._lock:
            open_runs = list(self._left)
        for run in open_runs:
            run.fail()
