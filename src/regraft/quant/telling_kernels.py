"""The compiled loops that tell scales and codes of blocks from the values that they stand for.

What they give is a guess, which whoever keeps blocks holds against the truth: they have to give the
same on every machine, and it is good if they are right. So all is float32, one rounding each, and
what is no number has a place of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.numerics.compiling import njit
from regraft.numerics.conversions import ENTRY, INNER
from regraft.quant.grid import stored


@njit(inline="always")
def _whole(x: Any, low: Any, high: Any) -> Any:
    """Return the integer nearest to ``x`` within bounds, as float32; the lower one of NaN."""
    return min(max(np.rint(x), low), high) if x == x else low


@njit(inline="always")
def _inverse(scale: Any) -> Any:
    return np.float32(0) if scale == 0 else np.float32(np.float32(1) / scale)


@njit(**ENTRY, _nrt=False)
def tell_codes(
    values: Any, scales: Any, lows: Any, size: int, low: Any, high: Any, out: Any
) -> None:  # fmt: skip
    """Set the codes of values ``scale * (code + low) - lows``, from 0 on.

    Args:
        values: float32, part by part.
        scales, lows: float32 for each part.
        size: values in a part.
        low, high: the lowest and highest code, float32.
        out: uint8, as many as values.
    """
    n = np.uintp(size)
    for p in range(np.uintp(scales.shape[0])):
        inverse, offset, at = _inverse(scales[p]), lows[p], p * n
        for j in range(n):
            x = np.float32(np.float32(values[at + j] + offset) * inverse)
            out[at + j] = np.uint8(np.int32(_whole(x, low, high) - low))


@njit(**ENTRY, _nrt=False)
def ends(values: Any, size: int, lows: Any, highs: Any, farthest: Any) -> None:
    """Set the lowest and the highest value of each part, and the one furthest from zero.

    Of two as far the higher one is taken; NaN is passed over.
    """
    n = np.uintp(size)
    for p in range(np.uintp(lows.shape[0])):
        low, high, at = np.float32(np.inf), np.float32(-np.inf), p * n
        for j in range(n):
            w = values[at + j]
            low = w if w < low else low
            high = w if w > high else high
        lows[p], highs[p] = low, high
        farthest[p] = high if high >= -low else low


@njit(**INNER)
def _explains(
    values: Any, at: Any, n: Any, scale: Any, offset: Any, low: Any, high: Any, kind: Any
) -> Any:
    """Whether all values of a part are those of codes under a scale and an offset."""
    inverse, wrong = _inverse(scale), np.uint32(0)
    for j in range(n):
        w = values[at + j]
        q = _whole(np.float32(np.float32(w + offset) * inverse), low, high)
        back = stored(np.float32(np.float32(scale * q) - offset), kind)
        wrong += np.uint32(back != w)
    return wrong == np.uint32(0)


@njit(**ENTRY, _nrt=False)
def tell_scales(
    values: Any, farthest: Any, size: int, units: Any, each: int, codes: Any, low: Any, high: Any,
    least: Any, most: Any, kind: int, out: Any,
) -> None:  # fmt: skip
    """Set the whole numbers of units that the scale of each part is, where zero is a code.

    The value that is furthest from zero has one of some codes, which are tried one after the other.
    If none explains all values of the part, the first one is taken.

    Args:
        values: float32, part by part.
        farthest: as :func:`ends` gives them.
        size: values in a part.
        units: float32, the unit of each block.
        each: parts in a block.
        codes: float32, what to try.
        low, high: the lowest and the highest code, float32.
        least, most: bounds of the numbers, float32.
        kind: the dtype that values were rounded to.
        out: int32, for each part.
    """
    n = np.uintp(size)
    for p in range(np.uintp(farthest.shape[0])):
        unit, first = units[p // np.uintp(each)], np.float32(0)
        for t in range(np.uintp(codes.shape[0])):
            number = _whole(np.float32(farthest[p] * _inverse(np.float32(unit * codes[t]))), least,
                            most)  # fmt: skip
            first = number if t == 0 else first
            scale = np.float32(unit * number)
            if _explains(values, p * n, n, scale, np.float32(0), low, high, kind):
                first = number
                break
        out[p] = np.int32(first)


@njit(**ENTRY, _nrt=False)
def tell_pairs(
    values: Any, lows: Any, highs: Any, size: int, units: Any, low_units: Any, each: int,
    pairs: Any, top: Any, most: Any, kind: int, out: Any, out_low: Any,
) -> None:  # fmt: skip
    """Set the numbers of units of scale and offset of each part: ``scale * code - offset``.

    Lowest and highest value have one of some pairs of codes, tried as in :func:`tell_scales`.

    Args:
        values, lows, highs, size, each, kind: as there.
        units, low_units: float32, the units of each block.
        pairs: float32 ``(2 * tried,)``, lowest and highest code.
        top: the highest code, float32; the lowest is 0.
        most: the highest number of units, float32; the lowest is 0.
        out, out_low: int32, for each part.
    """
    n, zero = np.uintp(size), np.float32(0)
    for p in range(np.uintp(lows.shape[0])):
        block = p // np.uintp(each)
        unit, low_unit = units[block], low_units[block]
        low_inverse, first, first_low = _inverse(low_unit), zero, zero
        for t in range(np.uintp(pairs.shape[0] // 2)):
            a, b = pairs[np.uintp(2) * t], pairs[np.uintp(2) * t + np.uintp(1)]
            spread = np.float32(highs[p] - lows[p])
            step = _inverse(np.float32(unit * np.float32(b - a)))
            number = _whole(np.float32(spread * step), zero, most)
            scale = np.float32(unit * number)
            under = np.float32(np.float32(scale * a) - lows[p])
            number_low = _whole(np.float32(under * low_inverse), zero, most)
            if t == 0:
                first, first_low = number, number_low
            offset = np.float32(low_unit * number_low)
            if _explains(values, p * n, n, scale, offset, zero, top, kind):
                first, first_low = number, number_low
                break
        out[p], out_low[p] = np.int32(first), np.int32(first_low)
