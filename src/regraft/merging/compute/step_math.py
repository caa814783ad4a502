"""The maths of one step: what its tiles need to know of the whole, and what is done to a tile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from regraft.deltas.kernels import merge as kernels
from regraft.deltas.kernels.weights import Bytes, Floats, Sums, Weights
from regraft.deltas.ranks.initial_factors import FACTORIZATIONS
from regraft.deltas.undo.units import Encoder, merge
from regraft.deltas.views import Delta, View
from regraft.merging.compute.combined import Limits
from regraft.merging.compute.factors import (
    FactorSource,
    Packed,
    Pair,
    SegmentFactors,
    factors_of,
    joined,
    pack,
)
from regraft.merging.compute.runs import covered, run_of
from regraft.merging.compute.step_inverse import Backwards
from regraft.merging.planning.plan import Segment, Step
from regraft.merging.planning.tiles import Tile

ReadSource = Callable[[int, Bytes], None]
"""Fills a buffer from a byte offset of the step's source."""


@dataclass
class PreparedStep:
    """What needs the whole tensor: factorizations, DoRA's factors, rows to replace.

    By the ``id`` of the delta; rows by their number. Factors of rows are filled in tile by tile,
    limits of methods on elements segment by segment.
    """

    residuals: dict[int, Pair] = field(default_factory=dict)
    row_factors: dict[int, Floats] = field(default_factory=dict)
    column_factors: dict[int, Floats] = field(default_factory=dict)
    patches: dict[int, Floats] = field(default_factory=dict)
    limits: Limits = field(default_factory=dict)


class StepMath:
    """The arithmetic of one step; safe to use from several threads."""

    def __init__(
        self, step: Step, store: FactorSource, read: ReadSource, scratch_bytes: int, *,
        norms: bool = True,
    ) -> None:  # fmt: skip
        """Take a step; without ``norms`` the sums may lack those of weights and deltas."""
        self._step, self._store, self._read, self._norms = step, store, read, norms
        self._scratch_bytes = scratch_bytes
        self._lock = threading.Lock()  # held while a step is prepared: once for all threads
        self._prepared: PreparedStep | None = None
        self._segments: SegmentFactors | None = None

    def run(
        self,
        tile: Tile,
        source: Weights,
        result: Weights,
        sums: Sums,
        keeping: Encoder | None = None,
    ) -> None:
        """Fill a tile's result.

        Args:
            tile: of kind ``values``, ``rows`` or ``append``.
            source: its weights.
            result: where the result goes.
            sums: as in :func:`regraft.deltas.kernels.merge.merge_rows`; added to.
            keeping: begun for the tile (of kind ``rows``), where an undo is wanted.
        """
        if tile.kind == "values":
            result.take(source, sums)
            return
        prepared = self._prepare()
        if tile.kind == "rows":
            self._merge(tile, source, result, prepared, sums, keeping)
        self._replace_rows(tile, source, result, prepared, sums)
        if tile.kind == "rows" and keeping is not None:
            for row in prepared.patches:
                if tile.rows[0] <= row < tile.rows[1]:
                    keeping.keep_plain(row, tile.rows[0])

    def again(self, tile: Tile, source: Weights, result: Weights) -> None:
        """Fill the result of a tile of rows that was run already, from other weights.

        DoRA's factors stay those of the first time.
        """
        sums: Sums = np.zeros(4, np.float64)
        self._merge(tile, source, result, self._prepare(), sums, None, known=True)

    def undo_factors(self) -> list[Floats]:
        """Return what an undo cannot recompute, once all tiles are done: flat, in order of deltas.

        Of a residual both factors, of DoRA the factors of rows or columns.
        """
        prepared, kept = self._prepare(), []
        for delta in self._step.deltas:
            if delta.is_residual:
                pair = prepared.residuals[id(delta)]
                kept += [pair.left.ravel(), pair.right.ravel()]
            elif delta.magnitude is not None:
                found = prepared.column_factors if delta.by_column else prepared.row_factors
                kept.append(found[id(delta)])
        return kept

    def backwards(self) -> Backwards:
        """Return what takes the step back, once all its tiles are done."""
        prepared = self._prepare()
        dora = prepared.row_factors | prepared.column_factors
        return Backwards(self._step, self._store, prepared.residuals, dora)

    def release_factors(self) -> None:
        """Let go of the packed factors, which can be made again."""
        with self._lock:
            self._segments = None

    def release(self) -> None:
        """Let go of everything kept for the step's tiles."""
        self._prepared, self._segments = None, None

    # -- a tile ----------------------------------------------------------------------------------

    def _merge(
        self, tile: Tile, source: Weights, result: Weights, prepared: PreparedStep, sums: Sums,
        keeping: Encoder | None, *, known: bool = False,
    ) -> None:  # fmt: skip
        first, last = tile.rows
        width = tile.columns[1] - tile.columns[0]
        keep_gaps = keeping if source.kind != result.kind else None

        def cut(weights: Weights, low: int, high: int) -> Weights:
            return weights.cut((low - first) * width, (high - low) * width)

        for segment, low, high in covered(self._step.segments, first, last):
            weights, merged = cut(source, low, high), cut(result, low, high)
            if not segment.deltas:
                if keep_gaps is None:
                    merged.take(weights, sums)
                else:
                    gap = run_of(segment, low, tile, weights, merged, pack(segment, []))
                    merge(gap, sums, keep_gaps)
                continue
            packed = self._factors(prepared).of(segment, (low, high), tile.columns)
            rows = None if known else (low, high)
            factors = self._dora_factors(segment, packed, rows, weights, prepared)
            zeros = self._step.source.is_virtual
            run = run_of(
                segment, low, tile, weights, merged, packed, factors, zeros=zeros,
                norms=self._norms,
            )  # fmt: skip
            merge(run, sums, keeping)

    def _replace_rows(
        self, tile: Tile, source: Weights, result: Weights, prepared: PreparedStep, sums: Sums
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

    def _factors(self, prepared: PreparedStep) -> SegmentFactors:
        with self._lock:
            if self._segments is None:
                self._segments = SegmentFactors(self._store, prepared.residuals, prepared.limits)
            return self._segments

    def _dora_factors(
        self, segment: Segment, packed: Packed, rows: tuple[int, int] | None, weights: Weights,
        prepared: PreparedStep,
    ) -> Floats:  # fmt: skip
        """Return DoRA's factors m / |W + s B A| of all deltas, in the order of the table.

        DoRA (Liu et al. 2024, arXiv:2402.09353), equation 5. Norms along rows are those of the
        tile's ``rows``; without rows they are known already.
        """
        factors = list[Floats]()
        if segment.method is not None:
            return joined(factors)
        for line, delta in zip(packed.table, segment.deltas, strict=True):
            if delta.magnitude is None:
                continue
            if delta.by_column:
                factors.append(prepared.column_factors[id(delta)])
                continue
            own = prepared.row_factors[id(delta)]
            if rows is not None:
                low, high = rows
                squares = np.zeros(high - low, np.float64)
                kernels.square_sums(
                    *weights.arguments, high - low, packed.right_ld, packed.left,
                    line[kernels.LEFT], packed.right, line[kernels.RIGHT], delta.rank,
                    np.float32(delta.scale), low - segment.rows[0], False, squares,
                )  # fmt: skip
                magnitude = self._store.matrix(delta.magnitude, delta.adapter).ravel()
                here = slice(low - delta.rows[0], high - delta.rows[0])
                own[here] = _ratio(magnitude[here], squares)
            factors.append(own[segment.rows[0] - delta.rows[0] : segment.rows[1] - delta.rows[0]])
        return joined(factors)

    # -- the whole tensor ------------------------------------------------------------------------

    def _prepare(self) -> PreparedStep:
        with self._lock:
            if self._prepared is None:
                self._prepared = self._look_at_the_whole()
            return self._prepared

    def _look_at_the_whole(self) -> PreparedStep:
        prepared = PreparedStep()
        for delta in self._step.deltas:
            if delta.is_residual:
                prepared.residuals[id(delta)] = self._factorize(delta)
            elif delta.magnitude is not None and delta.by_column:
                prepared.column_factors[id(delta)] = self._column_factors(delta, delta.magnitude)
            elif delta.magnitude is not None:
                height = delta.rows[1] - delta.rows[0]
                prepared.row_factors[id(delta)] = np.zeros(height, np.float32)
        for patch in self._step.patches:
            values = self._store.matrix(patch.values, patch.adapter)
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
        """Return DoRA's factors where norms run over rows: one pass over those of the delta."""
        pair = factors_of(delta, self._store)
        left, right = pair.left.ravel(), pair.right.ravel()
        width = self._step.matrix[1]
        height = delta.rows[1] - delta.rows[0]
        row_bytes = width * self._step.source.itemsize
        each = max(1, self._scratch_bytes // row_bytes)
        buffer = np.empty(min(each, height) * row_bytes, np.uint8)
        squares = np.zeros(width, np.float64)
        for first in range(0, height, each):
            rows = min(each, height - first)
            part = buffer[: rows * row_bytes]
            self._read((delta.rows[0] + first) * row_bytes, part)
            weights = Weights.of_bytes(part, self._step.source.dtype)
            kernels.square_sums(
                *weights.arguments, rows, width, left, 0, right, 0, delta.rank,
                np.float32(delta.scale), first, True, squares,
            )  # fmt: skip
        return _ratio(self._store.matrix(magnitude, delta.adapter).ravel(), squares)


def _ratio(magnitude: Floats, squares: Sums) -> Floats:
    """Return m / sqrt(sum), in float64, rounded to float32 once."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (magnitude.astype(np.float64) / np.sqrt(squares)).astype(np.float32)
