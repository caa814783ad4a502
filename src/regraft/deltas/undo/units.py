"""What an undo keeps of a matrix, unit by unit: the kernels' streams with their bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.deltas.kernels import inverse, prediction, streams
from regraft.deltas.kernels import merge as kernels
from regraft.deltas.kernels.bf16_fast_path import (
    is_usual,
    merge_usual,
    merging_scratch,
    restore_usual,
    scratch,
)
from regraft.deltas.kernels.streams import PLAIN
from regraft.deltas.kernels.weights import Bytes, Floats, Sums, Weights
from regraft.deltas.matrix_units import Offsets, Units

Lengths = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class TileRows:
    """A run of a tile's rows with the deltas that fall on all of it, in the form the kernels take.

    Attributes:
        source, merged: the weights and the merged values; one is computed from the other.
        rows: how many rows.
        width: columns of the tile.
        first_row, first_column: the place in the segment that the factors cover.
        left, right, right_ld, table, scales: the packed deltas.
        factors: DoRA's factors of all deltas.
        unit_row: rows between the first row of the tile's first unit and the run.
        zeros: whether the weights are values of codes; see
            :func:`regraft.deltas.kernels.bf16_fast_path.merge_usual`.
        norms: whether the norms of weights and deltas are wanted, where leaving them out is faster.
    """

    source: Weights
    merged: Weights
    rows: int
    width: int
    first_row: int
    first_column: int
    left: Floats
    right: Floats
    right_ld: int
    table: npt.NDArray[np.int64]
    scales: Floats
    factors: Floats
    unit_row: int
    zeros: bool = False
    norms: bool = True


@dataclass(frozen=True)
class TileCorrection:
    """What was kept of some consecutive units.

    Attributes:
        payload: the units' streams, one after the other.
        lengths: bytes of each one's bits, or PLAIN.
        counts: exceptions of each.
    """

    payload: Bytes
    lengths: Lengths
    counts: Counts


class Encoder:
    """Collects what has to be kept of one tile; made once per thread for its memory."""

    def __init__(self) -> None:
        self._stream: Bytes = np.empty(0, np.uint8)
        self._out: Bytes = np.empty(0, np.uint8)

    def begin(self, units: Units, first: int, last: int, item: int) -> None:
        """Begin a tile of units ``first`` to ``last`` whose weights take ``item`` bytes each."""
        self.units, self._item = units, item
        starts = units.starts(first, last) * item
        self._bytes = np.diff(starts)
        room = int(starts[-1] - starts[0])
        if self._stream.size < room:
            self._stream = np.empty(room, np.uint8)
            self._out = np.empty(room, np.uint8)
        state = np.zeros((last - first, streams.STATE), np.int64)
        state[:, streams.AT] = state[:, streams.NEXT] = starts[:-1] - starts[0]
        state[:, streams.TAIL] = state[:, streams.END] = starts[1:] - starts[0]
        self.state = state

    @property
    def arguments(self) -> tuple[Any, ...]:
        """State and stream, as the kernels take them."""
        return self.state.ravel(), self._stream

    def keep_plain(self, row: int, first_row: int) -> None:
        """Keep the units of a row as they are; ``first_row`` is that of the tile's first unit."""
        unit = (row - first_row) // self.units.rows * self.units.parts
        self.state[unit : unit + self.units.parts, streams.TAIL] = -1

    def finish(self, weights: Bytes) -> TileCorrection:
        """Return what was kept of the tile, whose weights' bytes are given."""
        lengths = np.empty(len(self.state), np.uint32)
        counts = np.empty(len(self.state), np.uint16)
        done = streams.gather(
            *self.arguments, self._bytes, weights, self._item, self._out, lengths, counts
        )
        return TileCorrection(self._out[:done].copy(), lengths, counts)


_NO_STATE: npt.NDArray[np.int64] = np.empty(0, np.int64)
_NO_STREAM: Bytes = np.empty(0, np.uint8)


def merge(run: TileRows, sums: Sums, keeping: Encoder | None) -> None:
    """Merge a run of rows; with an encoder, keep what is needed to take it back.

    Args:
        run: ``merged`` is written.
        sums: as in :func:`regraft.deltas.kernels.merge.merge_rows`; added to.
        keeping: begun for the tile that the run belongs to.
    """
    streams_of = (_NO_STATE, _NO_STREAM, 0, 1, 1)
    if keeping is not None:
        units = keeping.units
        streams_of = (*keeping.arguments, run.unit_row, units.rows, units.parts)
    if is_usual(run.source.kind, run.merged.kind, run.table):
        flags = (run.zeros, run.norms)
        merge_usual(*_usual_arguments(run), sums, *streams_of, *flags, *merging_scratch())
    else:
        room = prediction.merging_scratch(len(run.table))
        kernels.merge_rows(*_arguments(run), sums, run.norms, *streams_of, *room)


def sizes_of(units: Units, lengths: Lengths, counts: Counts, item: int) -> Offsets:
    """Return the bytes that each unit's stream takes, for all units of a matrix."""
    return _sizes(np.diff(units.starts(0, units.count)) * item, lengths, counts, item)


def are_possible(units: Units, sizes: Offsets, item: int) -> bool:
    """Whether no unit's stream takes more bytes than the unit does as plain weights."""
    return bool(np.all(sizes <= np.diff(units.starts(0, units.count)) * item))


def _sizes(plain: Offsets, lengths: Lengths, counts: Counts, item: int) -> Offsets:
    """Return the bytes of streams, given those that the units take as plain weights."""
    coded = lengths.astype(np.int64) + counts.astype(np.int64) * (item + 2)
    return np.where(lengths == PLAIN, plain, coded)


class Decoder:
    """Restores the weights of a tile from what was kept of them."""

    def __init__(
        self, units: Units, first: int, last: int, kept: TileCorrection, item: int
    ) -> None:
        self._units, self._kept = units, kept
        self._starts = units.starts(first, last) * item
        self._plain = kept.lengths == PLAIN
        bits = np.where(self._plain, 0, kept.lengths).astype(np.int64)
        sizes = _sizes(np.diff(self._starts), kept.lengths, kept.counts, item)
        ends = np.cumsum(sizes)
        begins = ends - sizes
        self._begins = begins
        state = np.zeros((last - first, streams.STATE), np.int64)
        state[:, streams.AT] = begins
        state[:, streams.TAIL] = state[:, streams.NEXT] = begins + bits
        state[:, streams.END] = np.where(self._plain, begins, ends)
        self.state = state

    def restore(self, run: TileRows) -> None:
        """Restore a run of rows."""
        streams_of = (self.state.ravel(), self._kept.payload, run.unit_row)
        cut = (self._units.rows, self._units.parts)
        if is_usual(run.source.kind, run.merged.kind, run.table):
            restore_usual(*_usual_arguments(run), *streams_of, *cut, run.zeros, *scratch())
        else:
            room = prediction.scratch(len(run.table))
            inverse.restore_rows(*_arguments(run), *streams_of, *cut, *room)

    def finish(self, weights: Bytes) -> bool:
        """Put plain units in their places; return whether the streams were what was expected."""
        at = self._starts - self._starts[0]
        for unit in np.flatnonzero(self._plain):
            begin, length = int(self._begins[unit]), int(at[unit + 1] - at[unit])
            weights[at[unit] : at[unit + 1]] = self._kept.payload[begin : begin + length]
        coded = self.state[~self._plain]
        used_up = coded[:, streams.AT] == coded[:, streams.TAIL]
        return bool(np.all(used_up & (coded[:, streams.NEXT] == coded[:, streams.END])))


def _arguments(run: TileRows) -> tuple[Any, ...]:
    return (
        *run.source.arguments, *run.merged.arguments, run.rows, run.width, run.left, run.right,
        run.right_ld, run.first_row, run.first_column, run.table, run.scales, run.factors,
    )  # fmt: skip


def _usual_arguments(run: TileRows) -> tuple[Any, ...]:
    return (
        run.source.x16, run.merged.x16, run.rows, run.width, run.left, run.right, run.right_ld,
        run.first_row, run.first_column, int(run.table[0, kernels.RANK]), run.scales[0],
    )  # fmt: skip
