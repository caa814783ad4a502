"""The compiled loops that round values to codes of GGUF's blocks, under the scales that are there.

A code ``c`` of a part of a block stands for ``scale * level(c) - offset``, in float32, one rounding
per operation. Scales may be negative. A value is rounded from the value that its old code stands
for: the number of levels in between is ``t = (w - was) / scale``, so that a small delta keeps all
its digits. Of the two levels around ``t`` the farther one is taken if ``drawn`` is less than the
share of the way, and else the nearer one; see :func:`regraft.quant.rounding.requantize`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.numerics.compiling import njit
from regraft.numerics.conversions import ENTRY
from regraft.quant.rounding import STOCHASTIC, noise_bits

_FARTHEST = 1024.0
"""More levels than any type has: how far a value may lie from its old code."""


@njit(inline="always")
def _drawn(rounding: Any, key: Any, index: Any) -> Any:
    """Return a float32 in [0, 1): the upper 24 bits of an element's noise, or one half."""
    if rounding == STOCHASTIC:
        return np.float32(np.int32(noise_bits(key, index) >> np.uint64(40))) * np.float32(2.0**-24)
    return np.float32(0.5)


@njit(inline="always")
def _way(value: Any, was: Any, scale: Any) -> Any:
    """Return how many levels of an even grid a value lies from another; 0 where nothing tells."""
    limit = np.float32(_FARTHEST)
    t = np.float32(np.float32(value - was) / scale)
    t = min(max(t, -limit), limit)
    return t if (t == t) & (scale != np.float32(0)) else np.float32(0)


@njit(**ENTRY, _nrt=False)
def round_evenly(
    codes: Any, scales: Any, offsets: Any, size: int, low: Any, least: int, most: int, was: Any,
    values: Any, rounding: int, key: Any, index: Any, out: Any, after: Any,
) -> None:  # fmt: skip
    """Round values to codes whose levels are whole numbers.

    Args:
        codes: uint8, part by part; the codes are where it starts from.
        scales, offsets: float32 for each part.
        size: codes in a part.
        low: level of code 0, float32.
        least, most: bounds of the codes that are written; an old one beyond them may stay.
        was: float32, what the old codes stand for.
        values: float32, what is to be rounded.
        rounding: the number of one.
        key, index: uint64; which random bits are used, and the number of the first element.
        out: uint8, the codes.
        after: float32, what they stand for.
    """
    n = np.uintp(size)
    for p in range(np.uintp(scales.shape[0])):
        scale, offset, at = scales[p], offsets[p], p * n
        for j in range(n):
            t = _way(values[at + j], was[at + j], scale)
            whole = np.trunc(t)
            moves = _drawn(rounding, np.uint64(key), np.uint64(index) + np.uint64(at + j)) < abs(
                t - whole
            )
            step = np.int32(moves) * (np.int32(1) if t > 0 else np.int32(-1))
            code = np.int32(codes[at + j])
            new = code + np.int32(whole) + step
            new = min(max(new, min(np.int32(least), code)), max(np.int32(most), code))
            out[at + j] = np.uint8(new)
            level = np.float32(np.float32(new) + low)
            after[at + j] = np.float32(np.float32(scale * level) - offset)


@njit(**ENTRY, _nrt=False)
def round_to_levels(
    codes: Any, scales: Any, size: int, levels: Any, was: Any, values: Any, rounding: int,
    key: Any, index: Any, out: Any, after: Any,
) -> None:  # fmt: skip
    """Round values to codes whose levels are a table in ascending order; see `round_evenly`."""
    n, top = np.uintp(size), np.int32(levels.shape[0] - 1)
    for p in range(np.uintp(scales.shape[0])):
        scale, at = scales[p], p * n
        for j in range(n):
            left = _way(values[at + j], was[at + j], scale)
            step = np.int32(1) if left > 0 else np.int32(-1)
            left, new = abs(left), np.int32(codes[at + j])
            drawn = _drawn(rounding, np.uint64(key), np.uint64(index) + np.uint64(at + j))
            going = left > 0
            while going and 0 <= new + step <= top:
                gap = abs(np.float32(levels[new + step] - levels[new]))
                going = left >= gap
                if going or drawn < np.float32(left / gap):
                    new += step
                left = np.float32(left - gap)
            out[at + j] = np.uint8(new)
            after[at + j] = np.float32(scale * levels[new])
