"""Parts of a matrix that are computed whole, by all threads that wait for them, and kept in memory.

For what is asked for in another order than it can be computed in. How much is kept is bounded.
"""

from __future__ import annotations

import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np

from regraft.numerics.arrays import Bytes

Strip = TypeVar("Strip")
Part = TypeVar("Part", bound="Band[Any]")


class Band(ABC, Generic[Strip]):
    """A part of a matrix, computed strip by strip by all threads that wait for it.

    Attributes:
        nbytes: the memory that it takes.
        users: how many threads hold it; :class:`Bands` counts them.
    """

    def __init__(self, strips: Iterator[Strip], nbytes: int) -> None:
        """Take what it is computed by, and the memory that it takes."""
        self.nbytes, self.users = nbytes, 0
        self._strips = strips
        self._left = 0
        self._error: BaseException | None = None
        # A strip is handed out and counted in ``_left`` in one step. So when none is left to hand
        # out and ``_left`` is 0, the band is complete.
        self._changed = threading.Condition()

    @abstractmethod
    def compute(self, strip: Strip) -> None:
        """Compute a strip; several threads compute different ones at the same time."""

    def fill(self) -> None:
        """Compute what nobody else does, and wait for the rest.

        Raises:
            RegraftError: something could not be read.
        """
        while (strip := self._next()) is not None:
            error: BaseException | None = None
            try:
                self.compute(strip)
            except BaseException as raised:
                error = raised
            self._note(error)
        with self._changed:
            self._changed.wait_for(lambda: not self._left or self._error is not None)
            if self._error is not None:
                raise self._error

    def _next(self) -> Strip | None:
        with self._changed:
            strip = None if self._error is not None else next(self._strips, None)
            self._left += strip is not None
            return strip

    def _note(self, error: BaseException | None) -> None:
        with self._changed:
            self._left -= 1
            self._error = self._error or error
            self._changed.notify_all()


class Bands(Generic[Part]):
    """The bands that are at hand, within a room; one that is in use stays."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._held: dict[tuple[str, Hashable], Part] = {}
        # The bands held never take more than the room; one with users is not let go of. Whoever
        # waits has no band, so those who have one always go on.
        self._changed = threading.Condition()

    @contextmanager
    def holding(
        self, name: str, number: Hashable, size: int, make: Callable[[], Part]
    ) -> Iterator[Part]:
        """Give a band to be filled and used; wait for room where all others are in use.

        Args:
            name: of the tensor that it is a part of.
            number: tells it from the tensor's other bands.
            size: the memory that it takes.
            make: makes it, if it is not at hand.
        """
        held = self._take((name, number), size, make)
        try:
            yield held
        finally:
            with self._changed:
                held.users -= 1
                self._changed.notify_all()

    def _take(self, key: tuple[str, Hashable], size: int, make: Callable[[], Part]) -> Part:
        with self._changed:
            self._changed.wait_for(lambda: key in self._held or self._made_room(size))
            held = self._held.pop(key, None)
            if held is None:
                held = make()
            self._held[key] = held  # behind those that were used before
            held.users += 1
            return held

    def _made_room(self, size: int) -> bool:
        """Let go of bands, the one first that was used least recently; whether there is room."""
        for key in [key for key, band in self._held.items() if not band.users]:
            if self._free >= size:
                break
            del self._held[key]
        return self._free >= size

    @property
    def _free(self) -> int:
        return self._room - sum(band.nbytes for band in self._held.values())

    def release(self, name: str) -> None:
        """Let go of the bands of a tensor."""
        with self._changed:
            for key in [k for k, band in self._held.items() if k[0] == name and not band.users]:
                del self._held[key]
            self._changed.notify_all()


def mapped(size: int) -> Bytes:
    """Return memory that goes back to the system with the array: malloc would hold on to it."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size)
