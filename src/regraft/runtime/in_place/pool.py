"""Threads that work on the tiles of many parameters at once, so that small ones need not wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from regraft.concurrency import for_each
from regraft.merging.compute.tile_work import TileMemory
from regraft.runtime.whole import Stopped, asked_to_stop, whole

TILE_BYTES = 2**20
"""Weights that are worked on at a time: with their result they stay in a processor's own cache."""


Piece = Callable[[TileMemory], None]
"""Something that a thread does."""


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
    left = pieces if to_the_end else _until_asked(pieces, asked_to_stop())
    for_each(left, lambda piece, memory: piece(memory), threads, memory=TileMemory)


def _until_asked(pieces: Iterable[Piece], asked: Callable[[], bool]) -> Iterator[Piece]:
    for piece in pieces:
        if asked():
            raise Stopped
        yield piece
