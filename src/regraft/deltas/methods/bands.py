"""Deltas a band of rows at a time, and which of their elements are the k-th smallest.

All of it is float32 arithmetic in a given order: the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regraft.deltas.kernels.delta import delta_rows
from regraft.deltas.kernels.inner import BLOCK, ROWS
from regraft.deltas.rounding import Floats

BAND_BYTES = 2**21
"""Bytes of a band of one delta."""

_LOW_BITS = 16


@dataclass(frozen=True)
class DenseDelta:
    """A delta whose rows are formed when they are asked for: ``scale * b @ a``.

    Attributes:
        b: float32, (out, r), contiguous.
        a: float32, (r, in), contiguous.
        scale: the adapter's own, rounded to float32 once.
    """

    b: Floats
    a: Floats
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]

    def rows(self, first: int, end: int) -> Floats:
        """Return some rows, float32 (end - first, in)."""
        columns = self.a.shape[1]
        made = np.empty((end - first, columns), np.float32)
        scratch = np.empty(ROWS * BLOCK, np.float32)
        delta_rows(
            self.b.ravel(), self.a.ravel(), np.float32(self.scale), first, end - first, columns,
            self.a.shape[0], scratch, made.ravel(),
        )  # fmt: skip
        return made


def bands_of(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the first row of each band and the row after its last."""
    each = max(1, BAND_BYTES // max(1, 4 * shape[1]))
    for first in range(0, shape[0], each):
        yield first, min(first + each, shape[0])


def order_statistics(
    parts: Callable[[], Iterable[Floats]], places: Sequence[int]
) -> tuple[np.float32, ...]:
    """Return the magnitudes at given places of the ascending order of all, exactly.

    Two passes: the upper halves of the elements' bits are counted, which says in which bin a place
    lies, and then the lower halves of those in that bin. Bits of magnitudes ascend as they do.

    Args:
        parts: gives all elements, in parts of any size; called twice.
        places: from 0.
    """
    counts = np.zeros(1 << 15, np.int64)
    for part in parts():
        counts += np.bincount((_bits(part) >> _LOW_BITS).ravel(), minlength=counts.size)
    ends = np.cumsum(counts)
    bins = [int(np.searchsorted(ends, place, side="right")) for place in places]
    inside = {b: np.zeros(1 << _LOW_BITS, np.int64) for b in bins}
    for part in parts():
        bits = _bits(part).ravel()
        upper = bits >> _LOW_BITS
        for b, low in inside.items():
            here = bits[upper == b] & np.uint32((1 << _LOW_BITS) - 1)
            low += np.bincount(here, minlength=low.size)
    return tuple(
        _value(b, inside[b], place - int(ends[b] - counts[b]))
        for b, place in zip(bins, places, strict=True)
    )


def _bits(part: Floats) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(part).view(np.uint32) & np.uint32(0x7FFFFFFF)


def _value(upper: int, counts: npt.NDArray[np.int64], place: int) -> np.float32:
    lower = int(np.searchsorted(np.cumsum(counts), place, side="right"))
    return np.float32(np.array([(upper << _LOW_BITS) | lower], np.uint32).view(np.float32)[0])


def draws(
    key: int, first: int, shape: tuple[int, int], steps: tuple[int, int] | None = None
) -> Floats:
    """Return a float32 in [0, 1) for each element of a band: 24 bits of SplitMix64 at its number.

    SplitMix64 (Steele, Lea and Flood 2014), as stochastic rounding uses it: an element's bits do
    not depend on which others were drawn.

    Args:
        key: tells one delta's random bits from another's.
        first: the number of the first element.
        shape: of the band.
        steps: what a row and a column add to the number; by default they are numbered row by row.
    """
    of_row, of_column = steps or (shape[1], 1)
    rows, columns = (np.arange(n, dtype=np.uint64) for n in shape)
    at = rows[:, None] * np.uint64(of_row) + columns * np.uint64(of_column) + np.uint64(first + 1)
    with np.errstate(over="ignore"):
        z = np.uint64(key) + at * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
