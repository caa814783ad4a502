"""The maths of one step run backwards: weights from merged values, with what was kept of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from regraft.deltas.kernels.weights import Bytes, Floats, Weights
from regraft.deltas.undo.units import Decoder, TileCorrection, merge
from regraft.deltas.views import Delta
from regraft.merging.compute.factors import (
    FactorSource,
    Pair,
    SegmentFactors,
    factor_count,
    joined,
    pack,
)
from regraft.merging.compute.runs import covered, run_of
from regraft.merging.planning.plan import Segment, Step
from regraft.merging.planning.tiles import Tile


class Backwards:
    """Takes tiles of a step back; safe to use from several threads."""

    def __init__(
        self,
        step: Step,
        store: FactorSource,
        residuals: Mapping[int, Pair],
        dora: Mapping[int, Floats],
    ) -> None:
        """Take a step and what cannot be computed from its result.

        Args:
            step: the step.
            store: the adapters' tensors.
            residuals: factors of residuals, by the ``id`` of their delta.
            dora: DoRA's factors of rows or columns, likewise.
        """
        self._step, self._dora = step, dora
        self._units = step.units
        self._segments = SegmentFactors(store, residuals)

    def restore(
        self, tile: Tile, merged: Weights, weights: Weights, raw: Bytes, kept: TileCorrection
    ) -> bool:
        """Restore the weights of a tile of whole units.

        Args:
            tile: of kind ``rows``.
            merged: its merged values.
            weights, raw: where the weights go, seen both ways.
            kept: what was kept of its units.

        Returns:
            Whether what was kept was what the merged values ask for.
        """
        first, last = self._units.of_tile(tile.rows, tile.columns)
        decoder = Decoder(self._units, first, last, kept, self._step.source.itemsize)
        width = tile.columns[1] - tile.columns[0]
        for segment, low, high in covered(self._step.segments, *tile.rows):
            start, count = (low - tile.rows[0]) * width, (high - low) * width
            source, result = weights.cut(start, count), merged.cut(start, count)
            if not segment.deltas and source.kind == result.kind:
                source.take(result, np.zeros(4, np.float64))
                continue
            if segment.deltas:
                packed = self._segments.of(segment, (low, high), tile.columns)
                factors = self._dora_factors(segment)
            else:
                packed, factors = pack(segment, []), joined([])
            zeros = self._step.source.is_virtual
            run = run_of(segment, low, tile, source, result, packed, factors, zeros=zeros)
            decoder.restore(run)
        return decoder.finish(raw)

    def again(self, tile: Tile, source: Weights, result: Weights) -> None:
        """Do the merge of a tile; a :data:`regraft.merging.compute.requantize.Again`."""
        width = tile.columns[1] - tile.columns[0]
        sums = np.zeros(4, np.float64)
        for segment, low, high in covered(self._step.segments, *tile.rows):
            start, count = (low - tile.rows[0]) * width, (high - low) * width
            weights, merged = source.cut(start, count), result.cut(start, count)
            if not segment.deltas:
                merged.take(weights, sums)
                continue
            packed = self._segments.of(segment, (low, high), tile.columns)
            factors = self._dora_factors(segment)
            merge(run_of(segment, low, tile, weights, merged, packed, factors), sums, None)

    def _dora_factors(self, segment: Segment) -> Floats:
        return joined([self._factor(delta, segment) for delta in segment.deltas if delta.magnitude])

    def _factor(self, delta: Delta, segment: Segment) -> Floats:
        own = self._dora[id(delta)]
        if delta.by_column:
            return own
        first = segment.rows[0] - delta.rows[0]
        return own[first : first + factor_count(delta, segment, 0)]
