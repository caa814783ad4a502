"""Threads that share one piece of work, and what they wait for meanwhile.

:func:`for_each` is the only place that starts such threads. What they wait for is memory
(:class:`MemoryGate`) and each other's order (:class:`Sequencer`). When one of them fails, nobody
may wait for ever: whoever waits raises :class:`Abandoned`, and the first error is what the caller
sees.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from threading import Thread
from typing import Generic, TypeVar

Item = TypeVar("Item")
Memory = TypeVar("Memory")

WAITING_FOR_DISK = 3
"""Threads that wait for the disk while one for each core computes."""


_PATIENCE = 0.1
"""Seconds after which the waiting caller looks up: not on every system does Ctrl-C wake it."""


class Abandoned(BaseException):
    """What a thread waited for will not come, since another one failed.

    It ends the thread, and is never seen outside of :func:`for_each`.
    """


# -- how many --------------------------------------------------------------------------------------


def available_cores() -> int:
    """Return the number of cores that this process may use, as far as the system says; at least 1.

    Python 3.13 knows it everywhere. Before, Linux says which cores a process is bound to, and other
    systems say how many there are.
    """
    if hasattr(os, "process_cpu_count"):
        return int(os.process_cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Return how many threads do work that reads or writes files: some wait for the disk."""
    return available_cores() + WAITING_FOR_DISK


# -- what threads wait for -------------------------------------------------------------------------


class MemoryGate:
    """Lets work in as long as the memory it needs fits; one alone always may.

    Args:
        room: bytes for all that is inside.
    """

    def __init__(self, room: int) -> None:
        self._room, self._taken, self._inside = room, 0, 0
        self._changed = threading.Condition()
        self._failed = False

    def enter(self, size: int) -> None:
        """Wait until ``size`` bytes fit, and take them.

        Raises:
            Abandoned: somebody failed.
        """
        with self._changed:
            # What is inside takes ``_taken`` bytes: the room at most, unless one is alone. A wait
            # ends: whoever is inside leaves without waiting at this gate again.
            self._changed.wait_for(lambda: self._failed or self._fits(size))
            if self._failed:
                raise Abandoned
            self._taken, self._inside = self._taken + size, self._inside + 1

    def _fits(self, size: int) -> bool:
        return not self._inside or self._taken + size <= self._room

    def leave(self, size: int) -> None:
        """Give ``size`` bytes back."""
        with self._changed:
            self._taken, self._inside = self._taken - size, self._inside - 1
            self._changed.notify_all()

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Wait until ``size`` bytes fit, and hold them for the block."""
        self.enter(size)
        try:
            yield
        finally:
            self.leave(size)

    def fail(self) -> None:
        """Wake whoever waits: those inside may never leave."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


class Sequencer:
    """Gives numbered work its turn in the order of the numbers 0, 1, 2 and so on."""

    def __init__(self) -> None:
        self._next = 0
        self._changed = threading.Condition()
        self._failed = False

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Wait until all lower numbers have had their turn, and have it for the block.

        Nobody else has a turn meanwhile, so the block needs no lock. If it fails, no turn follows.

        Raises:
            Abandoned: a lower number will never have its turn.
        """
        with self._changed:
            # Numbers are handed out in order, so those below ``number`` are done or being done by
            # threads that do not wait for this one: the wait ends, or one of them fails.
            self._changed.wait_for(lambda: self._next == number or self._failed)
            if self._failed:
                raise Abandoned
        yield
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def fail(self) -> None:
        """Wake whoever waits for a turn that may never come."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


# -- the threads -----------------------------------------------------------------------------------


def _nothing() -> None:
    """Do nothing."""


def for_each(
    items: Iterable[Item], work: Callable[[Item, Memory], None], threads: int, *,
    memory: Callable[[], Memory], stop: Callable[[], None] = _nothing,
) -> None:  # fmt: skip
    """Do ``work`` on every item, in threads that take them in order, in the caller's context.

    However often Ctrl-C is pressed, all threads have ended when this returns or raises. Where the
    system grants fewer threads, those that there are do the work, and the caller helps.

    Args:
        items: taken one at a time, each when a thread is free; no two threads are inside the
            iterator at the same time.
        work: takes an item, and its thread's memory.
        threads: how many.
        memory: makes one thread's memory, in that thread.
        stop: called when a thread fails or Ctrl-C is pressed, from any thread and perhaps more than
            once: wakes all that wait for something that will not come.

    Raises:
        BaseException: the first that was raised in any thread. What was underway then is finished
            or abandoned, and no more is begun.
    """
    crew = _Crew(iter(items), work, memory, stop)
    try:
        crew.run_threads(threads)
    except BaseException:  # Ctrl-C
        try:
            crew.stop_and_wait()
        except BaseException:  # Ctrl-C again, at once: before the handler in there was in place
            crew.stop_and_wait()
        raise
    try:
        crew.raise_first()
    finally:
        del crew  # no cycle: an error's traceback knows this call


class _Crew(Generic[Item, Memory]):
    """What the threads of one :func:`for_each` share."""

    def __init__(
        self, items: Iterator[Item], work: Callable[[Item, Memory], None],
        memory: Callable[[], Memory], stop: Callable[[], None],
    ) -> None:  # fmt: skip
        self._items, self._work, self._memory, self._stop = items, work, memory, stop
        self._taking = threading.Lock()
        self._stopped = False
        self._errors: list[BaseException] = []
        self._threads: list[Thread] = []
        self._begun, self._over = 0, 0
        self._changed = threading.Condition()

    def run_threads(self, count: int) -> None:
        """Run threads to their end, and help them if there are fewer than ``count``."""
        try:
            for number in range(count):
                run = partial(copy_context().run, self._run)
                self._threads.append(Thread(target=run, name=f"regraft-{number}"))
                self._threads[-1].start()
        except RuntimeError:  # the system grants no more threads
            self._run()
        self._join()

    def _join(self) -> None:
        for thread in self._threads:
            while thread.is_alive():  # which one that was never started is not
                thread.join(_PATIENCE)

    def stop_and_wait(self) -> None:
        """Stop, and wait for all threads, whatever else is raised here meanwhile.

        Whether a thread was started is not known where an interrupt fell into its start.
        """
        try:
            self.stop()
            with self._changed:
                # A thread that begins now finds that it was stopped, and touches nothing. One that
                # has begun is woken by ``stop`` or waits for nobody, so it comes to its end.
                self._changed.wait_for(lambda: self._begun == self._over)
            self._join()
        except BaseException:
            self.stop_and_wait()

    def _run(self) -> None:
        """Work until no item is left or somebody failed; never raises."""
        with self._changed:
            self._begun += 1
        try:
            if not self._stopped:
                self._work_through()
        except Abandoned:
            self.stop()
        except BaseException as error:
            self._errors.append(error)  # before others are woken: theirs come later
            self.stop()
        finally:
            with self._changed:
                self._over += 1
                self._changed.notify_all()

    def _work_through(self) -> None:
        memory = self._memory()
        for item in self._take():
            self._work(item, memory)

    def _take(self) -> Iterator[Item]:
        while True:
            # One thread at a time: items begin in their order, and an iterator has no lock. Whoever
            # holds it waits for nobody but the iterator.
            with self._taking:
                if self._stopped:
                    return
                try:
                    item = next(self._items)
                except StopIteration:
                    return
            yield item

    def stop(self) -> None:
        """Begin nothing more, and wake all who wait."""
        self._stopped = True
        self._stop()

    def raise_first(self) -> None:
        """Raise the first error, if there was one."""
        if self._errors:
            try:
                raise self._errors[0]
            finally:
                self._errors.clear()
