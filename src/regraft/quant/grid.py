"""From codes to values and back: one compiled loop for every format whose values lie on a grid.

A code ``c`` stands for ``((levels[c] - zero) * scale) * post``, in float32, one rounding per
operation, and rounded once more to the dtype of the weights. Formats differ in their levels (a
table of 16 or 256), in how far a scale and a zero reach, and in how codes are packed, which is not
known here. How far a scale reaches is said by *runs*: it serves ``row_run`` rows by ``run``
columns.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from regraft.numerics.arrays import Bytes, Floats, Sums
from regraft.numerics.conversions import BF16, ENTRY, F16, F32, INNER, bfloat16_bits
from regraft.numerics.intrinsics import (
    add_product,
    add_square,
    float_of,
    float_to_half,
    half_to_float,
)
from regraft.quant.weight import ROUNDINGS

NEAREST, STOCHASTIC = range(2)
"""Numbers of roundings: their places in :data:`regraft.quant.weight.ROUNDINGS`."""

SURVIVED, NOISE = 0, 1
"""Places of the sums that :func:`requantize` adds to."""

_BLOCK = 4096
"""Elements whose scales are looked up together: their codes and values stay in the first cache."""


@dataclass(frozen=True)
class Levels:
    """What the codes of a format stand for, before zero and scale.

    Attributes:
        values: float32, by code.
        order: codes of finite levels in ascending order, each level once.
        rank: place in ``order``, by code; of a level that is there twice, that of its equal.
        padded: ``order`` with its first and last code once more.
        middles: float32, half way between neighbours; then infinity, up to one less than a power
            of two.
        post: a second factor after the scale; 1 for none.
    """

    values: Floats
    order: Bytes
    rank: npt.NDArray[np.int32]
    padded: Bytes
    middles: Floats
    post: float = 1.0

    @property
    def zero(self) -> np.uint8:
        """The code that stands for zero."""
        return np.uint8(np.flatnonzero(self.values == 0)[0])

    @classmethod
    def of(cls, values: npt.ArrayLike, post: float = 1.0) -> Levels:
        """Sort a table of values; NaN and infinity are levels that nothing is rounded to."""
        table = np.asarray(values, np.float32)
        finite = np.flatnonzero(np.isfinite(table))
        _, first = np.unique(table[finite], return_index=True)
        order = finite[first]
        rank = np.zeros(len(table), np.int32)
        rank[finite] = np.searchsorted(table[order], table[finite]).astype(np.int32)
        codes = order.astype(np.uint8)
        levels = table[order].astype(np.float64)
        middles = np.full(2 ** int(len(order) - 1).bit_length() - 1, np.inf, np.float32)
        middles[: len(order) - 1] = (levels[:-1] + levels[1:]) / 2
        padded = np.concatenate([codes[:1], codes, codes[-1:]])
        return cls(table, codes, rank, padded, middles, post)


@dataclass(frozen=True)
class Codes:
    """A block of a quantized weight: its codes, and the scales that reach into it.

    Attributes:
        codes: uint8 ``(rows * columns,)``, row by row.
        rows, columns: of the block. A flat range of a weight is a block of one row.
        levels: what codes stand for.
        scales: float32, ``(ceil rows / row_run, scale_width)``, flat.
        zeros: float32 likewise; empty for none.
        scale_width: scales in a row of scales.
        run, row_run: columns and rows that share a scale.
        first, first_row: columns and rows of the first run that lie before the block.
    """

    codes: Bytes
    rows: int
    columns: int
    levels: Levels
    scales: Floats
    zeros: Floats
    scale_width: int
    run: int
    row_run: int = 1
    first: int = 0
    first_row: int = 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the kernels take, in their order."""
        levels = self.levels
        return (
            self.codes, self.rows, self.columns, levels.values, np.float32(levels.post),
            self.scales, self.zeros, self.scale_width, self.run, self.row_run, self.first,
            self.first_row,
        )  # fmt: skip


NO_ZEROS: Floats = np.empty(0, np.float32)


@njit(inline="always")
def _stored(value: Any, kind: Any) -> Any:
    """Return a float32 rounded to a dtype."""
    if kind == BF16:
        return float_of(np.uint32(bfloat16_bits(value)) << np.uint32(16))
    if kind == F16:
        return half_to_float(float_to_half(value))
    return value


@njit(inline="always")
def _value(level: Any, zero: Any, scale: Any, post: Any) -> Any:
    return np.float32(np.float32(np.float32(level - zero) * scale) * post)


@njit(**INNER)
def _dequantize_run(
    codes: Any, at: Any, n: Any, levels: Any, zero: Any, scale: Any, post: Any, out16: Any,
    out32: Any, kind: int, table16: Any, table32: Any,
) -> None:  # fmt: skip
    """Set ``n`` values that share a scale: what codes stand for is computed once, if they are few.

    A table of 16 that was rounded already gives a value by one load.
    """
    small = levels.shape[0] == 16 and n >= 16
    if small:
        for c in range(np.uintp(16)):
            value = _value(levels[c], zero, scale, post)
            if kind == BF16:
                table16[c] = bfloat16_bits(value)
            elif kind == F16:
                table16[c] = float_to_half(value)
            else:
                table32[c] = value
        if kind != F32:
            for j in range(n):
                out16[at + j] = table16[codes[at + j] & np.uint8(15)]
        else:
            for j in range(n):
                out32[at + j] = table32[codes[at + j] & np.uint8(15)]
    elif kind == BF16:
        for j in range(n):
            out16[at + j] = bfloat16_bits(_value(levels[codes[at + j]], zero, scale, post))
    elif kind == F16:
        for j in range(n):
            out16[at + j] = float_to_half(_value(levels[codes[at + j]], zero, scale, post))
    else:
        for j in range(n):
            out32[at + j] = _value(levels[codes[at + j]], zero, scale, post)


@njit(**INNER)
def _dequantize_each(
    codes: Any, at: Any, n: Any, levels: Any, zeros: Any, scales: Any, line: Any, post: Any,
    out16: Any, out32: Any, kind: int,
) -> None:  # fmt: skip
    """Set ``n`` values of a row whose columns have scales of their own."""
    some = zeros.shape[0] > 0
    if kind == BF16:
        for j in range(n):
            zero = zeros[line + j] if some else np.float32(0)
            value = _value(levels[codes[at + j]], zero, scales[line + j], post)
            out16[at + j] = bfloat16_bits(value)
    elif kind == F16:
        for j in range(n):
            zero = zeros[line + j] if some else np.float32(0)
            value = _value(levels[codes[at + j]], zero, scales[line + j], post)
            out16[at + j] = float_to_half(value)
    else:
        for j in range(n):
            zero = zeros[line + j] if some else np.float32(0)
            out32[at + j] = _value(levels[codes[at + j]], zero, scales[line + j], post)


@njit(**ENTRY)
def dequantize(
    codes: Any, row_count: int, column_count: int, levels: Any, post: Any, scales: Any, zeros: Any,
    scale_width: int, run_: int, row_run: int, first_: int, first_row: int, out16: Any, out32: Any,
    kind: int,
) -> None:  # fmt: skip
    """Set the values of a block.

    Args:
        codes, ..., first_row: as :attr:`Codes.arguments`.
        out16, out32, kind: where the values go; see :mod:`regraft.numerics.conversions`.
    """
    table16, table32 = np.empty(16, np.uint16), np.empty(16, np.float32)
    columns, run, first = np.uintp(column_count), np.uintp(run_), np.uintp(first_)
    has_zeros = zeros.shape[0] > 0
    for i in range(np.uintp(row_count)):
        line = np.uintp((np.int64(i) + first_row) // row_run) * np.uintp(scale_width)
        if run_ == 1:
            _dequantize_each(
                codes, i * columns, columns, levels, zeros, scales, line, post, out16, out32, kind
            )
            continue
        for t in range((first + columns + run - np.uintp(1)) // run):
            low = max(t * run, first) - first
            high = min((t + np.uintp(1)) * run - first, columns)
            zero = zeros[line + t] if has_zeros else np.float32(0)
            _dequantize_run(
                codes, i * columns + low, high - low, levels, zero, scales[line + t], post, out16,
                out32, kind, table16, table32,
            )  # fmt: skip


# -- back to codes ---------------------------------------------------------------------------------


@njit(inline="always")
def noise_bits(key: Any, index: Any) -> Any:
    """Return 64 bits for an element: SplitMix64 (Steele, Lea and Flood 2014) at place ``index``.

    A counter, not a sequence: an element's bits do not depend on which others were drawn.
    """
    z = key + (np.uint64(index) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(inline="always")
def _level(k: Any, order: Any, levels: Any, zero: Any, scale: Any, post: Any, kind: Any) -> Any:
    """Return the value of the ``k``-th level; with a negative scale the last level is lowest."""
    place = np.int64(order.shape[0]) - 1 - k if scale < 0 else k
    return _stored(_value(levels[order[np.uintp(place)]], zero, scale, post), kind)


@njit(inline="always")
def _draw(key: Any, index: Any) -> Any:
    """Return a float32 in [0, 1): the upper 24 bits of an element's noise."""
    return np.float32(np.int32(noise_bits(key, index) >> np.uint64(40))) * np.float32(2.0**-24)


@njit(**INNER)
def _draws(rounding: int, key: Any, index: Any, drawn: Any, n: Any) -> None:
    if rounding == STOCHASTIC:
        for j in range(n):
            drawn[j] = _draw(key, index + j)
    else:
        for j in range(n):
            drawn[j] = np.float32(0.5)


@njit(**INNER)
def _search(
    w: Any, code: Any, was: Any, order: Any, rank: Any, levels: Any, zero: Any, scale: Any,
    post: Any, kind: int, drawn: Any,
) -> Any:  # fmt: skip
    """Return the code for a value that is further away than the level beside its old one."""
    if scale == 0 or w != w or was != was:
        return code
    top = np.int64(order.shape[0]) - 1
    k = np.int64(rank[code])
    k = top - k if scale < 0 else k
    step = np.int64(1) if w > was else np.int64(-1)
    near, going = was, True
    while going and 0 <= k + step <= top:
        away = _level(k + step, order, levels, zero, scale, post, kind)
        going = (away <= w) if step > 0 else (away >= w)
        if going or drawn < np.float32(np.float32(w - near) / np.float32(away - near)):
            k, near = k + step, away
    return code if near == was else order[np.uintp(top - k if scale < 0 else k)]


@njit(**INNER)
def _fill_table(
    table: Any, order: Any, levels: Any, zero: Any, scale: Any, post: Any, kind: int
) -> None:
    """Set a table of sorted levels, with one more at each end that nothing reaches."""
    count = np.uintp(order.shape[0])
    table[0] = np.float32(-np.inf)
    for k in range(count):
        table[k + np.uintp(1)] = _stored(_value(levels[order[k]], zero, scale, post), kind)
    table[count + np.uintp(1)] = np.float32(np.inf)


@njit(**INNER)
def _by_table(
    codes: Any, at: Any, n: Any, padded: Any, rank: Any, table: Any, values: Any, drawn: Any,
    out: Any, before: Any, after: Any, far: Any, of: Any,
) -> None:  # fmt: skip
    """Round ``n`` values that share a table of sorted levels; mark those that go further.

    Most values lie between the level of their old code and one beside it: no search, and no branch
    either, as it would be a guess.
    """
    one = np.uintp(1)
    for j in range(n):
        code, w = codes[at + j], values[at + j]
        k = np.uintp(rank[code])
        was = table[k + one]
        beside = k + np.uintp(w > was) + np.uintp(w > was)
        there = table[beside]
        part = np.float32(np.float32(w - was) / np.float32(there - was))
        moves = drawn[of + j] < part
        mask = np.uint8(-np.int8(moves))
        out[at + j] = (code & ~mask) | (padded[beside] & mask)
        before[of + j] = was
        after[of + j] = table[k + one + np.uintp(moves) * (beside - k - one)]
        far[of + j] = np.uint8(not (part <= np.float32(1)))


@njit(**INNER)
def _one_by_one(
    codes: Any, at: Any, n: Any, padded: Any, rank: Any, levels: Any, zero: Any, scale: Any,
    post: Any, kind: int, values: Any, drawn: Any, out: Any, before: Any, after: Any, far: Any,
    of: Any,
) -> None:  # fmt: skip
    """As :func:`_by_table`, for a positive scale; levels are computed for each value.

    At the ends of the grid the code beside is a value's own, and its part not a number.
    """
    for j in range(n):
        code, w = codes[at + j], values[at + j]
        was = _stored(_value(levels[code], zero, scale, post), kind)
        up = np.uintp(w > was)
        other = padded[np.uintp(rank[code]) + up + up]
        there = _stored(_value(levels[other], zero, scale, post), kind)
        part = np.float32(np.float32(w - was) / np.float32(there - was))
        moves = drawn[of + j] < part
        mask = np.uint8(-np.int8(moves))
        out[at + j] = (code & ~mask) | (other & mask)
        before[of + j] = was
        after[of + j] = there if moves else was
        far[of + j] = np.uint8(not (part <= np.float32(1)))


@njit(**INNER)
def _each_by_its_own(
    codes: Any, at: Any, n: Any, padded: Any, rank: Any, levels: Any, zeros: Any, scales: Any,
    line: Any, post: Any, kind: int, values: Any, drawn: Any, out: Any, before: Any, after: Any,
    far: Any,
) -> None:  # fmt: skip
    """As :func:`_one_by_one`, for values with a scale each; those of a negative one are far."""
    has_zeros = zeros.shape[0] > 0
    for j in range(n):
        code, w, scale = codes[at + j], values[at + j], scales[line + j]
        zero = zeros[line + j] if has_zeros else np.float32(0)
        was = _stored(_value(levels[code], zero, scale, post), kind)
        up = np.uintp(w > was)
        other = padded[np.uintp(rank[code]) + up + up]
        there = _stored(_value(levels[other], zero, scale, post), kind)
        part = np.float32(np.float32(w - was) / np.float32(there - was))
        turned = scale < np.float32(0)
        moves = (drawn[j] < part) & (not turned)
        mask = np.uint8(-np.int8(moves))
        out[at + j] = (code & ~mask) | (other & mask)
        before[j] = was
        after[j] = there if moves else was
        far[j] = np.uint8((not (part <= np.float32(1))) | turned)


@njit(**INNER)
def _account(before: Any, after: Any, values: Any, at: Any, n: Any, sums: Any) -> None:
    survived, noise = np.float64(0), np.float64(0)
    for j in range(n):
        added = np.float64(values[at + j]) - np.float64(before[j])
        moved = np.float64(after[j]) - np.float64(before[j])
        survived = add_product(survived, moved, added)
        noise = add_square(noise, moved - added)
    sums[SURVIVED] += survived
    sums[NOISE] += noise


@njit(**ENTRY, _nrt=False)
def requantize(
    codes: Any, row_count: int, column_count: int, levels: Any, post: Any, scales: Any, zeros: Any,
    scale_width: int, run_: int, row_run: int, first_: int, first_row: int, order: Any, rank: Any,
    padded: Any, kind: int, values: Any, rounding: int, key: Any, index0: int, index_ld: int,
    out: Any, sums: Any, drawn: Any, before: Any, after: Any, far: Any, table: Any,
) -> None:  # fmt: skip
    """Round values to codes on the grid that a block has already.

    Between the level of its old code and a value ``w`` lie none or some levels; ``near`` is the
    last of them (the old level itself, if there is none), ``away`` the next one. The value goes to
    ``away`` if ``drawn < (w - near) / (away - near)``, in float32, and else to ``near``. To round
    to nearest, ``drawn`` is one half; else it is the upper 24 bits of :func:`noise_bits` over 2^24,
    so that on average nothing is lost. What lies beyond the ends of the grid goes to its end.

    Args:
        codes, ..., first_row: as :attr:`Codes.arguments`; the codes are where it starts from.
        order, rank, padded: as in :class:`Levels`.
        kind: the dtype of the weights.
        values: float32, what is to be rounded.
        rounding: the number of one.
        key: uint64, says which random bits are used.
        index0, index_ld: an element's number in its tensor is ``index0 + row * index_ld + column``.
        out: uint8, the codes.
        sums: float64 ``(2,)``, added to: the inner product of what was added to the value of the
            old code and what was to be added, and the square of their difference.
        drawn, before, after, far, table: scratch.
    """
    columns, run, first = np.uintp(column_count), np.uintp(run_), np.uintp(first_)
    has_zeros, block, one = zeros.shape[0] > 0, np.uintp(_BLOCK), np.uintp(1)
    small = order.shape[0] <= 16 and run_ >= 16
    for i in range(np.uintp(row_count)):
        line = np.uintp((np.int64(i) + first_row) // row_run) * np.uintp(scale_width)
        for b in range((columns + block - one) // block):
            begin = b * block
            end = min(begin + block, columns)
            index = np.uint64(index0) + np.uint64(i) * np.uint64(index_ld) + np.uint64(begin)
            _draws(rounding, np.uint64(key), index, drawn, end - begin)
            last = (first + end + run - one) // run
            if run == one:
                _each_by_its_own(
                    codes, i * columns + begin, end - begin, padded, rank, levels, zeros, scales,
                    line + begin, post, kind, values, drawn, out, before, after, far,
                )  # fmt: skip
                last = np.uintp(0)
            for t in range((first + begin) // run, last):
                low = max(t * run, first + begin) - first
                n = min((t + one) * run - first, end) - low
                at, of = i * columns + low, low - begin
                zero = zeros[line + t] if has_zeros else np.float32(0)
                scale = scales[line + t]
                if scale < 0:
                    for j in range(n):
                        out[at + j], far[of + j] = codes[at + j], np.uint8(1)
                        before[of + j] = _stored(
                            _value(levels[codes[at + j]], zero, scale, post), kind
                        )
                elif small:
                    _fill_table(table, order, levels, zero, scale, post, kind)
                    _by_table(
                        codes, at, n, padded, rank, table, values, drawn, out, before, after, far,
                        of,
                    )  # fmt: skip
                else:
                    _one_by_one(
                        codes, at, n, padded, rank, levels, zero, scale, post, kind, values, drawn,
                        out, before, after, far, of,
                    )  # fmt: skip
            _go_further(
                codes, i * columns, begin, end - begin, order, rank, levels, zeros, scales, line,
                run, first, post, kind, values, drawn, out, before, after, far,
            )  # fmt: skip
            _account(before, after, values, i * columns + begin, end - begin, sums)


@njit(**INNER)
def _go_further(
    codes: Any, row_at: Any, begin: Any, n: Any, order: Any, rank: Any, levels: Any, zeros: Any,
    scales: Any, line: Any, run: Any, first: Any, post: Any, kind: int, values: Any, drawn: Any,
    out: Any, before: Any, after: Any, far: Any,
) -> None:  # fmt: skip
    """Round the values of a block that were marked."""
    marked = np.uint32(0)
    for j in range(n):
        marked = np.uint32(marked + np.uint32(far[j]))
    if not marked:
        return
    for j in range(n):
        if far[j]:
            at = row_at + begin + j
            place = line + (first + begin + j) // run
            zero = zeros[place] if zeros.shape[0] > 0 else np.float32(0)
            code = codes[at]
            new = _search(
                values[at], code, before[j], order, rank, levels, zero, scales[place], post, kind,
                drawn[j],
            )  # fmt: skip
            out[at] = new
            after[j] = _stored(_value(levels[new], zero, scales[place], post), kind)


@njit(**INNER)
def _count_below(values: Any, at: Any, n: Any, inverse: Any, zero: Any, m: Any, out: Any) -> None:
    """Set how many of 15 middles each value is above: all are looked at, and none is a branch."""
    m0, m1, m2, m3, m4, m5, m6, m7 = m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]
    m8, m9, m10, m11, m12, m13, m14 = m[8], m[9], m[10], m[11], m[12], m[13], m[14]
    for j in range(n):
        x = values[at + j] * inverse + zero
        k = np.uint32(m0 < x) + np.uint32(m1 < x) + np.uint32(m2 < x) + np.uint32(m3 < x)
        k += np.uint32(m4 < x) + np.uint32(m5 < x) + np.uint32(m6 < x) + np.uint32(m7 < x)
        k += np.uint32(m8 < x) + np.uint32(m9 < x) + np.uint32(m10 < x) + np.uint32(m11 < x)
        k += np.uint32(m12 < x) + np.uint32(m13 < x) + np.uint32(m14 < x)
        out[at + j] = np.uint8(k)


@njit(**INNER)
def _halve(
    values: Any, at: Any, n: Any, inverse: Any, zero: Any, middles: Any, half: Any, order: Any,
    out: Any, places: Any,
) -> None:  # fmt: skip
    """Set the codes of values by halving where they may lie, all of a block at a time."""
    for begin in range(np.uintp(0), n, np.uintp(_BLOCK)):
        count = min(np.uintp(_BLOCK), n - begin)
        for j in range(count):
            places[j] = np.uint32(0)
        step = np.uint32(half)
        while step > 0:
            for j in range(count):
                x = values[at + begin + j] * inverse + zero
                below = middles[np.uintp(places[j] + step - np.uint32(1))] < x
                places[j] = np.uint32(places[j] + step * np.uint32(below))
            step = np.uint32(step >> np.uint32(1))
        for j in range(count):
            out[at + begin + j] = order[np.uintp(places[j])]


@njit(**ENTRY)
def nearest(
    row_count: int, column_count: int, post: Any, scales: Any, zeros: Any, scale_width: int,
    run_: int, row_run: int, first_: int, first_row: int, order: Any, middles: Any, values: Any,
    out: Any,
) -> None:  # fmt: skip
    """Set the codes of levels about as near as any to values, on the grid that a block has.

    It multiplies by the reciprocal of the scale, so of two levels that are all but as near it may
    take either one. A scale of zero gives the code of zero.

    Args:
        row_count, ..., first_row: as :attr:`Codes.arguments`, without codes and levels.
        order, middles: as in :class:`Levels`.
        values: float32.
        out: uint8, the codes.
    """
    columns, run, first = np.uintp(column_count), np.uintp(run_), np.uintp(first_)
    has_zeros, half = zeros.shape[0] > 0, np.uintp((middles.shape[0] + 1) // 2)
    places = np.empty(_BLOCK, np.uint32)
    for i in range(np.uintp(row_count)):
        line = np.uintp((np.int64(i) + first_row) // row_run) * np.uintp(scale_width)
        for t in range((first + columns + run - np.uintp(1)) // run):
            low = max(t * run, first) - first
            high = min((t + np.uintp(1)) * run - first, columns)
            zero = zeros[line + t] if has_zeros else np.float32(0)
            scale = np.float32(scales[line + t] * post)
            inverse = np.float32(0) if scale == 0 else np.float32(np.float32(1) / scale)
            at, n = i * columns + low, high - low
            if middles.shape[0] == 15:
                _count_below(values, at, n, inverse, zero, middles, out)
                for j in range(n):
                    out[at + j] = order[out[at + j]]
            else:
                _halve(values, at, n, inverse, zero, middles, half, order, out, places)


def nearest_codes(block: Codes, values: Floats) -> Bytes:
    """Return codes near values on a block's grid, whatever its own codes; see :func:`nearest`."""
    out = np.empty(values.size, np.uint8)
    levels = block.levels
    nearest(
        block.rows, block.columns, np.float32(levels.post), block.scales, block.zeros,
        block.scale_width, block.run, block.row_run, block.first, block.first_row, levels.order,
        levels.middles, values, out,
    )  # fmt: skip
    return out


_own = threading.local()


def _scratch() -> tuple[Any, ...]:
    """Return the calling thread's scratch arrays, which :func:`requantize` takes last."""
    if not hasattr(_own, "arrays"):
        floats = [np.empty(_BLOCK, np.float32) for _ in range(3)]
        _own.arrays = (*floats, np.empty(_BLOCK, np.uint8), np.empty(18, np.float32))
    arrays: tuple[Any, ...] = _own.arrays
    return arrays


@njit(**ENTRY)
def account(before: Any, values: Any, after: Any, sums: Any) -> None:
    """Add to sums what :func:`requantize` adds, for float32 weights, values and what they became.

    Args:
        before: the weights.
        values: what they were to become.
        after: what the codes stand for.
        sums: float64 ``(2,)``.
    """
    _account(before, after, values, np.uintp(0), np.uintp(before.shape[0]), sums)


def values_of(block: Codes, x16: Any, x32: Any, kind: int) -> None:
    """Set a block's values in a buffer, seen as the kernels take weights."""
    dequantize(*block.arguments, x16, x32, kind)


def codes_for(
    block: Codes, kind: int, values: Floats, rounding: str, key: int, index: tuple[int, int],
    sums: Sums,
) -> Bytes:  # fmt: skip
    """Return the codes that values are rounded to on a block's grid; see :func:`requantize`."""
    out = np.empty(block.codes.size, np.uint8)
    levels = block.levels
    requantize(
        *block.arguments, levels.order, levels.rank, levels.padded, kind, values,
        ROUNDINGS.index(rounding), np.uint64(key), *index, out, sums, *_scratch(),
    )  # fmt: skip
    return out
