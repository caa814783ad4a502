"""What an undo keeps of codes: where they are not what was predicted, unit by unit.

A unit's exceptions are kept in the order of their places: two bytes for the place in the unit,
little end first, and one for the code. A unit of which that would be more bytes than it has codes
is kept as its codes, a byte each (a *plain* unit).
"""

from __future__ import annotations

import numpy as np

from regraft.deltas.kernels.streams import PLAIN
from regraft.deltas.matrix_units import Offsets, Units
from regraft.deltas.undo.units import Counts, Lengths, TileCorrection
from regraft.numerics.arrays import Bytes

ITEM = 1
"""Bytes of a code, as the table of units counts them."""


def keep_exceptions(
    units: Units, first: int, last: int, predicted: Bytes, codes: Bytes
) -> TileCorrection:
    """Return what tells codes from predicted ones.

    Args:
        units: how the matrix is cut.
        first, last: the units that the codes are of.
        predicted, codes: uint8, a code for each element of these units, in their order.
    """
    starts = _starts(units, first, last)
    at = np.flatnonzero(predicted != codes)
    unit = np.searchsorted(starts, at, "right") - 1
    counts = np.bincount(unit, minlength=last - first)
    plain = 3 * counts > np.diff(starts)
    records = np.empty((at.size, 3), np.uint8)
    records[:, :2] = (at - starts[unit]).astype("<u2").view(np.uint8).reshape(-1, 2)
    records[:, 2] = codes[at]
    lengths = np.where(plain, PLAIN, 0).astype(np.uint32)
    payload = records.ravel()
    if plain.any():
        ends = np.cumsum(counts)
        pieces = [
            codes[starts[u] : starts[u + 1]] if plain[u] else records[ends[u] - n : ends[u]].ravel()
            for u, n in enumerate(counts)
        ]
        payload = np.concatenate(pieces)
    return TileCorrection(payload, lengths, np.where(plain, 0, counts).astype(np.uint16))


def put_back(units: Units, first: int, last: int, kept: TileCorrection, codes: Bytes) -> None:
    """Turn predicted codes into those that :func:`keep_exceptions` was given, in place."""
    starts = _starts(units, first, last)
    at = 0
    for unit in np.flatnonzero((kept.counts > 0) | (kept.lengths == PLAIN)):
        begin, end = int(starts[unit]), int(starts[unit + 1])
        if kept.lengths[unit] == PLAIN:
            codes[begin:end] = kept.payload[at : at + end - begin]
            at += end - begin
            continue
        count = int(kept.counts[unit])
        records = kept.payload[at : at + 3 * count].reshape(-1, 3)
        places = np.ascontiguousarray(records[:, :2]).view("<u2").ravel().astype(np.int64)
        inside = places < end - begin
        codes[begin + places[inside]] = records[inside, 2]
        at += 3 * count


def _starts(units: Units, first: int, last: int) -> Offsets:
    starts = units.starts(first, last)
    return np.asarray(starts - starts[0], np.int64)


__all__ = ["ITEM", "Counts", "Lengths", "keep_exceptions", "put_back"]
