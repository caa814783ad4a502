"""Runs of a tile's rows, each with the deltas that fall on all of it, as the kernels take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from regraft.deltas.kernels.weights import Floats, Weights
from regraft.deltas.undo.units import TileRows
from regraft.merging.compute.factors import Packed
from regraft.merging.planning.plan import Segment
from regraft.merging.planning.tiles import Tile


def covered(
    segments: Sequence[Segment], first: int, last: int
) -> Iterator[tuple[Segment, int, int]]:
    """Yield rows ``first`` to ``last`` piece by piece; what no segment covers has no deltas."""
    done = first
    for segment in segments:
        low, high = max(segment.rows[0], first), min(segment.rows[1], last)
        if low >= high:
            continue
        if done < low:
            yield Segment((done, low), ()), done, low
        yield segment, low, high
        done = high
    if done < last:
        yield Segment((done, last), ()), done, last


_NONE: Floats = np.empty(0, np.float32)


def run_of(
    segment: Segment, low: int, tile: Tile, source: Weights, merged: Weights, packed: Packed,
    factors: Floats = _NONE, *, zeros: bool = False, norms: bool = True,
) -> TileRows:  # fmt: skip
    """Return the rows from ``low`` of a tile that lie in a segment, as the kernels take them."""
    width = tile.columns[1] - tile.columns[0]
    rows = (source.x16.size or source.x32.size) // width
    row, column = low - segment.rows[0] - packed.begin[0], tile.columns[0] - packed.begin[1]
    return TileRows(
        source, merged, rows, width, row, column, packed.left,
        packed.right, packed.right_ld, packed.table, packed.scales, factors, low - tile.rows[0],
        zeros, norms,
    )  # fmt: skip
