"""The maths of one step: what its tiles need to know of the whole, and what is done to a tile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from regraft.deltas import kernels
from regraft.deltas.residual import FACTORIZATIONS
from regraft.deltas.views import Delta, View
from regraft.deltas.weights import Bytes, Floats, Sums, Weights
from regraft.merging.factors import FactorStore, Packed, Pair, joined, pack
from regraft.merging.plan import Segment, Step
from regraft.merging.tiles import Tile

ReadSource = Callable[[int, Bytes], None]
"""Fills a buffer from a byte offset of the step's source."""


@dataclass
class Prepared:
    """What needs the whole tensor: factorizations, column factors, rows to replace."""

    residuals: dict[int, Pair] = field(default_factory=dict)
    column_factors: dict[int, Floats] = field(default_factory=dict)
    patches: dict[int, Floats] = field(default_factory=dict)


class StepMath:
    """The arithmetic of one step; safe to use from several threads."""

    def __init__(
        self, step: Step, store: FactorStore, read: ReadSource, scratch_bytes: int
    ) -> None:
        self._step, self._store, self._read = step, store, read
        self._scratch_bytes = scratch_bytes
        self._lock = threading.Lock()
        self._prepared: Prepared | None = None
        self._packed: tuple[Segment, Packed] | None = None

    def run(self, tile: Tile, source: Weights, result: Weights, sums: Sums) -> None:
        """Fill a tile's result.

        Args:
            tile: of kind ``values``, ``rows`` or ``append``.
            source: its weights.
            result: where the result goes.
            sums: as in :func:`regraft.deltas.kernels.merge_rows`; added to.
        """
        if tile.kind == "values":
            result.take(source, sums)
            return
        prepared = self._prepare()
        if tile.kind == "rows":
            self._merge(tile, source, result, prepared, sums)
        self._replace_rows(tile, source, result, prepared, sums)

    def release(self) -> None:
        """Let go of everything kept for the step's tiles."""
        self._prepared, self._packed = None, None

    # -- a tile ----------------------------------------------------------------------------------

    def _merge(
        self, tile: Tile, source: Weights, result: Weights, prepared: Prepared, sums: Sums
    ) -> None:
        first, last = tile.rows
        width = tile.columns[1] - tile.columns[0]

        def cut(weights: Weights, low: int, high: int) -> Weights:
            return weights.cut((low - first) * width, (high - low) * width)

        done = first
        for segment in self._step.segments:
            low, high = max(segment.rows[0], first), min(segment.rows[1], last)
            if low >= high:
                continue
            if done < low:
                cut(result, done, low).take(cut(source, done, low), sums)
            weights = cut(source, low, high)
            packed = self._pack(segment, prepared)
            factors = self._dora_factors(segment, packed, (low, high), weights, prepared)
            kernels.merge_rows(
                *weights.arguments, *cut(result, low, high).arguments, high - low, width,
                packed.left, packed.right, packed.right_ld, low - segment.rows[0], tile.columns[0],
                packed.table, packed.scales, factors, sums,
            )  # fmt: skip
            done = high
        if done < last:
            cut(result, done, last).take(cut(source, done, last), sums)

    def _replace_rows(
        self, tile: Tile, source: Weights, result: Weights, prepared: Prepared, sums: Sums
    ) -> None:
        """Put replaced rows in; the change is counted against the base's row."""
        left, right = tile.columns
        width = right - left
        for row, values in prepared.patches.items():
            if not tile.rows[0] <= row < tile.rows[1]:
                continue
            at = (row - tile.rows[0]) * width
            new = result.cut(at, width)
            rounded = Weights.of_floats(np.ascontiguousarray(values[left:right]))
            new.take(rounded, np.zeros(4, np.float64))
            if tile.kind == "append":
                sums[2] += width
                continue
            was, now = source.cut(at, width).floats(), new.floats()
            sums[1] += float(np.sum(np.square(now.astype(np.float64) - was.astype(np.float64))))
            sums[2] += int(np.count_nonzero(now.view(np.uint32) != was.view(np.uint32)))

    # -- factors ---------------------------------------------------------------------------------

    def _pack(self, segment: Segment, prepared: Prepared) -> Packed:
        """Return a segment's deltas, packed once for all threads and kept for the next tile."""
        with self._lock:
            if self._packed is None or self._packed[0] is not segment:
                self._packed = None  # let go of the last segment's before making the next
                pairs = [self._pair(delta, segment, prepared) for delta in segment.deltas]
                self._packed = (segment, pack(segment, pairs))
            return self._packed[1]

    def _pair(self, delta: Delta, segment: Segment, prepared: Prepared) -> Pair:
        if delta.left is None or delta.right is None:
            pair = prepared.residuals[id(delta)]
        else:
            pair = Pair(*self._factors_of(delta))
        low, high = segment.rows[0] - delta.rows[0], segment.rows[1] - delta.rows[0]
        return Pair(np.ascontiguousarray(pair.left[low:high]), pair.right)

    def _dora_factors(
        self, segment: Segment, packed: Packed, rows: tuple[int, int], weights: Weights,
        prepared: Prepared,
    ) -> Floats:  # fmt: skip
        """Return DoRA's factors m / |W + s B A| of all deltas, in the order of the table.

        DoRA (Liu et al. 2024, arXiv:2402.09353), equation 5. Norms along rows are those of the
        tile's rows; the others are left zero.
        """
        factors = []
        for line, delta in zip(packed.table, segment.deltas, strict=True):
            if delta.magnitude is None:
                continue
            if delta.by_column:
                factors.append(prepared.column_factors[id(delta)])
                continue
            low, high = rows
            squares = np.zeros(high - low, np.float64)
            kernels.square_sums(
                *weights.arguments, high - low, packed.right_ld, packed.left, line[kernels.LEFT],
                packed.right, line[kernels.RIGHT], delta.rank, np.float32(delta.scale),
                low - segment.rows[0], False, squares,
            )  # fmt: skip
            magnitude = self._store.matrix(delta.magnitude).ravel()
            own = np.zeros(segment.rows[1] - segment.rows[0], np.float32)
            own[low - segment.rows[0] : high - segment.rows[0]] = _ratio(
                magnitude[low - delta.rows[0] : high - delta.rows[0]], squares
            )
            factors.append(own)
        return joined(factors)

    # -- the whole tensor ------------------------------------------------------------------------

    def _prepare(self) -> Prepared:
        with self._lock:
            if self._prepared is None:
                self._prepared = self._look_at_the_whole()
            return self._prepared

    def _look_at_the_whole(self) -> Prepared:
        prepared = Prepared()
        for delta in self._step.deltas:
            if delta.is_residual:
                prepared.residuals[id(delta)] = self._factorize(delta)
            elif delta.magnitude is not None and delta.by_column:
                prepared.column_factors[id(delta)] = self._column_factors(delta, delta.magnitude)
        for patch in self._step.patches:
            values = self._store.matrix(patch.values)
            prepared.patches.update(zip(patch.indices, values, strict=True))
        return prepared

    def _factorize(self, delta: Delta) -> Pair:
        """Recompute a residual's factors from the weight, laid out as the weight is stored."""
        raw = np.empty(self._step.source.nbytes, np.uint8)
        self._read(0, raw)
        stored = Weights.of_bytes(raw, self._step.source.dtype).floats().reshape(self._step.matrix)
        weight = stored.T if delta.by_column else stored
        b, a = FACTORIZATIONS[delta.feature](weight, delta.rank, -delta.scale)
        if delta.by_column:
            return Pair(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))
        return Pair(b, a)

    def _column_factors(self, delta: Delta, magnitude: View) -> Floats:
        """Return DoRA's factors where norms run over all rows: one pass over the weight."""
        left, right = self._factors_of(delta)
        height, width = self._step.matrix
        row_bytes = width * self._step.source.itemsize
        each = max(1, self._scratch_bytes // row_bytes)
        buffer = np.empty(min(each, height) * row_bytes, np.uint8)
        squares = np.zeros(width, np.float64)
        for first in range(0, height, each):
            rows = min(each, height - first)
            part = buffer[: rows * row_bytes]
            self._read(first * row_bytes, part)
            weights = Weights.of_bytes(part, self._step.source.dtype)
            kernels.square_sums(
                *weights.arguments, rows, width, left.ravel(), 0, right.ravel(), 0, delta.rank,
                np.float32(delta.scale), first, True, squares,
            )  # fmt: skip
        return _ratio(self._store.matrix(magnitude).ravel(), squares)

    def _factors_of(self, delta: Delta) -> tuple[Floats, Floats]:
        if delta.left is None or delta.right is None:
            raise ValueError(f"a {delta.feature} residual has no stored factors")
        return self._store.matrix(delta.left), self._store.matrix(delta.right)


def _ratio(magnitude: Floats, squares: Sums) -> Floats:
    """Return m / sqrt(sum), in float64, rounded to float32 once."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (magnitude.astype(np.float64) / np.sqrt(squares)).astype(np.float32)
