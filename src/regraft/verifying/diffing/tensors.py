"""Comparing tensors: threads take tiles of pairs until none are left.

A tile is a piece of a tensor, read from both sides. Most comparisons end with the bytes: only
tiles that differ are measured. The norm of X is wanted over the whole of a tensor that changed, so
tiles that were equal before the first difference came up are read once more, from X alone.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regraft.concurrency import for_each
from regraft.formats.files.reading import FilePool
from regraft.progress import Progress, ProgressMeter
from regraft.tensors import DTYPES, WORKING_DTYPES, TensorSpec
from regraft.verifying.diffing.report import TensorChange, finite

if TYPE_CHECKING:
    from regraft.deltas.kernels.distance import Distance
    from regraft.deltas.kernels.weights import Bytes

TILE_BYTES = 2**20
"""Bytes of a tile on its larger side; a thread holds two tiles, and scratch of their size."""

_BY_VALUE = (*WORKING_DTYPES, "F64")  # as in deltas.distance, which is imported at need alone
_WHOLE_BYTES = 64  # so many elements of any dtype end with a byte, and with a 64-bit word


def changed_tensors(
    pairs: Sequence[tuple[TensorSpec, TensorSpec]], threads: int, progress: Progress | None
) -> tuple[TensorChange, ...]:
    """Return what differs of the pairs, in their order."""
    with FilePool() as files:
        queue = _TileQueue(pairs, files, progress)
        for_each(queue.walk(), queue.work, threads, memory=_Buffers)
    changes = (queue.changes.get(x.name) for x, _ in pairs)
    return tuple(change for change in changes if change is not None)


def _alike(x: TensorSpec, y: TensorSpec) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape


def _comparable(x: TensorSpec, y: TensorSpec) -> bool:
    """Whether there is an element of Y for each of X that means the same kind of thing."""
    return _alike(x, y) or (x.shape == y.shape and _by_value(x) and _by_value(y))


def _by_value(spec: TensorSpec) -> bool:
    return spec.dtype in _BY_VALUE


class _Buffers:
    """One thread's memory: a tile of each side."""

    def __init__(self) -> None:
        self.x: Bytes = np.frombuffer(mmap.mmap(-1, TILE_BYTES), np.uint8)
        self.y: Bytes = np.frombuffer(mmap.mmap(-1, TILE_BYTES), np.uint8)


class _Comparison:
    """A tensor of both sides; its tiles may be done by several threads at the same time."""

    def __init__(self, x: TensorSpec, y: TensorSpec, files: FilePool) -> None:
        self.x, self.y, self._files = x, y, files
        bits = max(DTYPES[x.dtype].bits, DTYPES[y.dtype].bits)
        self._step = TILE_BYTES * 8 // bits // _WHOLE_BYTES * _WHOLE_BYTES
        self._left = math.ceil(x.numel / self._step)
        self._equal: list[int] = []
        self._distance: Distance | None = None
        self._lock = threading.Lock()  # whoever counts ``_left`` down to 0 did the last tile

    def tiles(self) -> Iterable[int]:
        """Return the first element of each tile."""
        return range(0, self.x.numel, self._step)

    def work(self, first: int, buffers: _Buffers) -> tuple[int, bool]:
        """Compare one tile; return the bytes read, and whether it was the last one to be done.

        Raises:
            RegraftError: something could not be read.
        """
        x = self._read(self.x, first, buffers.x)
        y = self._read(self.y, first, buffers.y)
        if self.x.dtype == self.y.dtype and _same_bytes(x, y):
            self._note_equal(first, x)
        else:
            self._measure(x, y, self.y.dtype)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._catch_up(buffers)
        return x.size + y.size, last

    def _read(self, spec: TensorSpec, first: int, room: Bytes) -> Bytes:
        bits = DTYPES[spec.dtype].bits
        at = first * bits // 8
        raw = room[: min(self._step * bits // 8, spec.nbytes - at)]
        self._files.read_into(spec, at, raw.data)
        return raw

    def _note_equal(self, first: int, x: Bytes) -> None:
        """Account for a tile without a difference: its norm is needed if another tile has one."""
        if not _by_value(self.x):
            return
        with self._lock:
            early = self._distance is None
            if early:
                self._equal.append(first)
        if not early:
            self._measure(x, x, self.x.dtype)

    def _measure(self, x: Bytes, y: Bytes, y_dtype: str) -> None:
        from regraft.deltas.kernels.distance import distance  # compiled; equal models do without

        found = distance(x, self.x.dtype, y, y_dtype)
        with self._lock:
            if self._distance is not None:
                found.add(self._distance)
            self._distance = found

    def _catch_up(self, buffers: _Buffers) -> None:
        """Add the norms of the tiles that were equal while no difference was known."""
        if self._distance is not None:
            for first in self._equal:
                x = self._read(self.x, first, buffers.x)
                self._measure(x, x, self.x.dtype)

    def outcome(self) -> TensorChange | None:
        """Return what differs once all tiles are done; None if nothing does."""
        if self._distance is None:
            return _change(self.x, self.y) if not _alike(self.x, self.y) else None
        return _change(self.x, self.y, self._distance)


def _change(x: TensorSpec, y: TensorSpec, far: Distance | None = None) -> TensorChange:
    """Return how X and Y differ; without a distance, no element of theirs was compared."""
    forms = (x.dtype, y.dtype), (x.shape, y.shape)
    if far is None:
        return TensorChange(x.name, *forms, changed=0 if _comparable(x, y) else None)
    if not _by_value(x):
        return TensorChange(x.name, *forms, changed=far.changed)
    return TensorChange(
        x.name,
        *forms,
        changed=far.changed,
        not_finite=far.not_finite,
        weight_norm=_norm(far.weight),
        delta_norm=_norm(far.delta),
        largest=finite(far.largest),
        ulps=far.ulps if x.dtype == y.dtype and x.dtype in WORKING_DTYPES else None,
    )


def _same_bytes(x: Bytes, y: Bytes) -> bool:
    whole = x.size // 8 * 8
    words = x[:whole].view(np.uint64), y[:whole].view(np.uint64)
    return np.array_equal(*words) and np.array_equal(x[whole:], y[whole:])


def _norm(squares: float) -> float | None:
    """Return a norm to nine digits, as more would depend on which thread was faster.

    None where a float64 cannot hold the sum, which takes float64 tensors of enormous values.
    """
    return float(f"{math.sqrt(squares):.9g}") if math.isfinite(squares) else None


class _TileQueue:
    """Hands out tiles, tensor by tensor; keeps what differs and tells how far the work has come."""

    def __init__(
        self,
        pairs: Sequence[tuple[TensorSpec, TensorSpec]],
        files: FilePool,
        progress: Progress | None,
    ) -> None:
        self._pairs, self._files = pairs, files
        self._places = {path: os.path.realpath(path) for p in pairs for path in _paths(*p)}
        total = sum(x.nbytes + y.nbytes for x, y in pairs if self._has_to_be_read(x, y))
        self._told = ProgressMeter(progress, "compare", total)
        self.changes: dict[str, TensorChange] = {}

    def walk(self) -> Iterator[tuple[_Comparison, int]]:
        """Yield the tiles to be compared, tensor by tensor."""
        for x, y in self._pairs:
            if self._has_to_be_read(x, y):
                comparison = _Comparison(x, y, self._files)
                for first in comparison.tiles():
                    yield comparison, first
            elif not _alike(x, y):
                self.changes[x.name] = _change(x, y)

    def _has_to_be_read(self, x: TensorSpec, y: TensorSpec) -> bool:
        """Whether headers leave the outcome open, and the two are not one place of one file.

        They are that in the Hub's cache, where revisions share the files that did not change.
        """
        one_place = x.start == y.start and self._places[x.path] == self._places[y.path]
        return _comparable(x, y) and x.numel > 0 and not (one_place and _alike(x, y))

    def work(self, tile: tuple[_Comparison, int], buffers: _Buffers) -> None:
        """Compare a tile; with the last one of a tensor, keep what differs."""
        comparison, first = tile
        nbytes, last = comparison.work(first, buffers)
        name = comparison.x.name if last else ""
        change = comparison.outcome() if last else None
        if change is not None:
            self.changes[name] = change  # one thread's, and a name of its own: no lock
        self._told.add(nbytes, name)


def _paths(x: TensorSpec, y: TensorSpec) -> set[Path]:
    return {x.path, y.path}
