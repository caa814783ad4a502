"""Putting what threads finish back in order: into the undo patch, and into the journal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from regraft.merging.files.staging import Workplace
from regraft.merging.undo.patch import PatchWriter, Written
from regraft.numerics.arrays import Bytes

WAITING_BYTES = 16 * 2**20
"""What may wait for its turn in memory."""

SECONDS_BETWEEN_NOTES = 0.5
"""A note makes the kernel write what is gathered, so not every tensor gets one of its own."""


@dataclass(frozen=True)
class Closing:
    """The end of a job.

    Attributes:
        tiles: how many tiles it had.
        entry: what the journal says of it.
        sections: names and contents of its sections; the first one is what its tiles gave.
    """

    tiles: int
    entry: Mapping[str, Any]
    sections: Sequence[tuple[str, bytes]]


class Ledger:
    """Takes what tiles and jobs leave, in any order, and writes it in theirs."""

    def __init__(
        self, first: int, place: Workplace, patch: PatchWriter | None, flush: Callable[[], None]
    ) -> None:
        """Begin with job number ``first``; ``flush`` hands all outputs to the system."""
        self._place, self._patch, self._flush = place, patch, flush
        self._job, self._tile = first, 0
        self._payloads: dict[tuple[int, int], Bytes] = {}
        self._closings: dict[int, Closing] = {}
        self._waiting = 0
        self._changed = threading.Condition()  # over everything here, and all writes to the patch
        self._stopped = False
        self._notes: list[dict[str, Any]] = []
        self._noted = time.monotonic()

    def deposit(self, job: int, tile: int, payload: Bytes) -> None:
        """Leave what a tile gave; wait while too much is waiting already."""
        if self._patch is None:
            return
        with self._changed:
            # What waits is written in the order of jobs and tiles. Whoever brings the next tile
            # never waits, and tiles are handed out in that order, so it comes: the wait ends.
            self._changed.wait_for(
                lambda: (
                    self._stopped
                    or (job, tile) == (self._job, self._tile)
                    or self._waiting + payload.size <= WAITING_BYTES
                )
            )
            self._payloads[job, tile] = payload
            self._waiting += payload.size
            self._drain()

    def close_job(self, job: int, closing: Closing) -> None:
        """Leave the end of a job."""
        with self._changed:
            self._closings[job] = closing
            self._drain()

    def _drain(self) -> None:
        while not self._stopped:
            payload = self._payloads.pop((self._job, self._tile), None)
            closing = self._closings.get(self._job)
            if payload is not None and self._patch is not None:
                self._patch.append(payload)
                self._waiting -= payload.size
                self._tile += 1
            elif closing is not None and (self._patch is None or self._tile == closing.tiles):
                self._end(closing)
                del self._closings[self._job]
                self._job, self._tile = self._job + 1, 0
            else:
                break
        self._changed.notify_all()

    def _end(self, closing: Closing) -> None:
        written: list[Written] = []
        for name, content in closing.sections:
            if self._patch is not None:
                self._patch.append(content)
                section = self._patch.end(name)
                written += [section] if section else []
        sections = [list(asdict(each).values()) for each in written]
        self._notes.append({**closing.entry, "sections": sections})
        if time.monotonic() - self._noted > SECONDS_BETWEEN_NOTES:
            self.note()

    def note(self) -> None:
        """Write what is done into the journal, once the files hold it."""
        with self._changed:
            if not self._notes:
                return
            self._flush()
            if self._patch is not None:
                self._patch.flush()
            for entry in self._notes:
                self._place.note(entry)
            self._notes.clear()
            self._noted = time.monotonic()

    def stop(self) -> None:
        """Take nothing more and wake everyone who waits."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
