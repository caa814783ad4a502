"""Threads that take items until none are left, and a gate for memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

from regraft.progress import Progress, ProgressEvent

Item = TypeVar("Item")


class Told:
    """Tells how far reading has come, one call at a time.

    Args:
        progress: whom to tell, or None.
        total: bytes in all.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done, self._lock = 0, threading.Lock()

    def add(self, nbytes: int, tensor: str = "") -> None:
        """Account for bytes, and for the tensor that they finish."""
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(ProgressEvent("verify", self._done, self._total, tensor))


class Gate:
    """Lets work in as long as the memory it needs fits; one alone always may.

    Args:
        room: bytes for all that is inside.
    """

    def __init__(self, room: int) -> None:
        self._room, self._taken, self._inside = room, 0, 0
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Wait until ``size`` bytes fit, and hold them for the block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._inside or self._taken + size <= self._room)
            self._taken, self._inside = self._taken + size, self._inside + 1
        try:
            yield
        finally:
            with self._changed:
                self._taken, self._inside = self._taken - size, self._inside - 1
                self._changed.notify_all()


def for_each(items: Iterable[Item], work: Callable[[Item], None], threads: int) -> None:
    """Do ``work`` on every item, in threads that take them in order, in the caller's context.

    Raises:
        Exception: the first that ``work`` raised; what is underway is finished, and no more begun.
    """
    left, lock, stopped = iter(items), threading.Lock(), threading.Event()

    def take() -> Iterator[Item]:
        while not stopped.is_set():
            with lock:
                try:
                    item = next(left)
                except StopIteration:
                    return
            yield item

    def run() -> None:
        try:
            for item in take():
                work(item)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(threads, thread_name_prefix="regraft") as pool:
        futures: list[Future[None]] = []
        try:
            for _ in range(threads):  # one by one: an interrupt may fall between
                futures.append(pool.submit(copy_context().run, run))
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C
            stopped.set()
            raise
    for future in futures:
        future.result()
