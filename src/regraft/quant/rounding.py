"""From values back to codes: to one of the two neighbours on a grid, or to the nearest of all."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from regraft.numerics.arrays import Bytes, Floats, Sums
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import ENTRY, INNER
from regraft.numerics.intrinsics import add_product, add_square
from regraft.quant.grid import Codes, stored, value_of
from regraft.quant.weight import ROUNDINGS

NEAREST, STOCHASTIC = range(2)
"""Numbers of roundings: their places in :data:`regraft.quant.weight.ROUNDINGS`."""

SURVIVED, NOISE = 0, 1
"""Places of the sums that :func:`requantize` adds to."""

_BLOCK = 4096
"""Elements whose scales are looked up together: their codes and values stay in the first cache."""


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
    return stored(value_of(levels[order[np.uintp(place)]], zero, scale, post), kind)


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


@njit(**INNER, forceinline=True)
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
    end = top if step > 0 else np.int64(0)
    last = _level(end, order, levels, zero, scale, post, kind)
    if (last <= w) if step > 0 else (last >= w):  # beyond the grid: it need not be walked
        return code if last == was else order[np.uintp(top - end if scale < 0 else end)]
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
        table[k + np.uintp(1)] = stored(value_of(levels[order[k]], zero, scale, post), kind)
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
        was = stored(value_of(levels[code], zero, scale, post), kind)
        up = np.uintp(w > was)
        other = padded[np.uintp(rank[code]) + up + up]
        there = stored(value_of(levels[other], zero, scale, post), kind)
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
        was = stored(value_of(levels[code], zero, scale, post), kind)
        up = np.uintp(w > was)
        other = padded[np.uintp(rank[code]) + up + up]
        there = stored(value_of(levels[other], zero, scale, post), kind)
        part = np.float32(np.float32(w - was) / np.float32(there - was))
        turned, stays = scale < np.float32(0), scale == np.float32(0)
        moves = (drawn[j] < part) & (not turned) & (not stays)
        mask = np.uint8(-np.int8(moves))
        out[at + j] = (code & ~mask) | (other & mask)
        before[j] = was
        after[j] = there if moves else was
        far[j] = np.uint8(((not (part <= np.float32(1))) & (not stays)) | turned)


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
                if scale <= 0:  # where it is 0 every code stays
                    for j in range(n):
                        out[at + j], far[of + j] = codes[at + j], np.uint8(scale < 0)
                        before[of + j] = stored(
                            value_of(levels[codes[at + j]], zero, scale, post), kind
                        )
                        after[of + j] = before[of + j]
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
            after[j] = stored(value_of(levels[new], zero, scales[place], post), kind)


@njit(**INNER)
def _scaled(values: Any, at: Any, n: Any, inverse: Any, zero: Any, x: Any) -> None:
    """Set ``x`` to values in units of a scale that all of them share."""
    for j in range(n):
        x[j] = values[at + j] * inverse + zero


@njit(**INNER)
def _scaled_each(
    values: Any, at: Any, n: Any, scales: Any, zeros: Any, line: Any, post: Any, x: Any
) -> None:
    """Set ``x`` to values in units of scales of their own."""
    some = zeros.shape[0] > 0
    for j in range(n):
        scale = np.float32(scales[line + j] * post)
        inverse = np.float32(0) if scale == 0 else np.float32(np.float32(1) / scale)
        x[j] = values[at + j] * inverse + (zeros[line + j] if some else np.float32(0))


@njit(**INNER)
def _count_below(x: Any, n: Any, m: Any, counts: Any) -> None:
    """Set how many of 15 middles each value is above: all are looked at, and none is a branch.

    Counts are as wide as values are. LLVM would make bytes of each comparison, not of their sum.
    """
    m0, m1, m2, m3, m4, m5, m6, m7 = m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]
    m8, m9, m10, m11, m12, m13, m14 = m[8], m[9], m[10], m[11], m[12], m[13], m[14]
    for j in range(n):
        y = x[j]
        k = np.uint32(m0 < y) + np.uint32(m1 < y) + np.uint32(m2 < y) + np.uint32(m3 < y)
        k += np.uint32(m4 < y) + np.uint32(m5 < y) + np.uint32(m6 < y) + np.uint32(m7 < y)
        k += np.uint32(m8 < y) + np.uint32(m9 < y) + np.uint32(m10 < y) + np.uint32(m11 < y)
        counts[j] = k + np.uint32(m12 < y) + np.uint32(m13 < y) + np.uint32(m14 < y)


@njit(**INNER)
def _halve(x: Any, n: Any, middles: Any, half: Any, counts: Any) -> None:
    """Set how many middles each value is above by halving where it may lie, all at a time."""
    for j in range(n):
        counts[j] = np.uint32(0)
    step = np.uint32(half)
    while step > 0:
        for j in range(n):
            below = middles[np.uintp(counts[j] + step - np.uint32(1))] < x[j]
            counts[j] = np.uint32(counts[j] + step * np.uint32(below))
        step = np.uint32(step >> np.uint32(1))


@njit(**INNER)
def _codes_of(
    x: Any, n: Any, middles: Any, half: Any, order: Any, counts: Any, out: Any, at: Any
) -> None:
    """Set the codes of scaled values; ``order`` is empty where codes ascend with their levels."""
    if middles.shape[0] == 15:
        _count_below(x, n, middles, counts)
    else:
        _halve(x, n, middles, half, counts)
    if order.shape[0]:
        for j in range(n):
            out[at + j] = order[np.uintp(counts[j])]
    else:
        for j in range(n):
            out[at + j] = np.uint8(counts[j])


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
        order: as in :class:`Levels`, or empty where it is 0, 1, 2 and so on.
        middles: as there.
        values: float32.
        out: uint8, the codes.
    """
    columns, run, first = np.uintp(column_count), np.uintp(run_), np.uintp(first_)
    has_zeros, half = zeros.shape[0] > 0, np.uintp((middles.shape[0] + 1) // 2)
    block, one = np.uintp(_BLOCK), np.uintp(1)
    counts, x = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.float32)
    for i in range(np.uintp(row_count)):
        line = np.uintp((np.int64(i) + first_row) // row_run) * np.uintp(scale_width)
        if run == one:
            for low in range(np.uintp(0), columns, block):
                n = min(block, columns - low)
                _scaled_each(values, i * columns + low, n, scales, zeros, line + low, post, x)
                _codes_of(x, n, middles, half, order, counts, out, i * columns + low)
            continue
        for t in range((first + columns + run - one) // run):
            low = max(t * run, first) - first
            high = min((t + one) * run - first, columns)
            zero = zeros[line + t] if has_zeros else np.float32(0)
            scale = np.float32(scales[line + t] * post)
            inverse = np.float32(0) if scale == 0 else np.float32(np.float32(1) / scale)
            for begin in range(low, high, block):
                n, at = min(block, high - begin), i * columns + begin
                _scaled(values, at, n, inverse, zero, x)
                _codes_of(x, n, middles, half, order, counts, out, at)


@njit(**ENTRY)
def nearest_of_levels(
    codes: Any, row_count: int, column_count: int, levels: Any, post: Any, scales: Any, zeros: Any,
    scale_width: int, run_: int, row_run: int, first_: int, first_row: int, order: Any,
    middles: Any, kind: int, out: Any,
) -> None:  # fmt: skip
    """Set the codes that :func:`nearest` gives of what codes stand for, for tables of 16.

    What becomes of a code is looked up once for a scale, and not for each element.

    Args:
        codes, ..., first_row: as :attr:`Codes.arguments`.
        order, middles: as in :class:`Levels`; 15 middles.
        kind: the dtype of the weights.
        out: uint8, the codes.
    """
    columns, run, first = np.uintp(column_count), np.uintp(run_), np.uintp(first_)
    has_zeros, near = zeros.shape[0] > 0, np.empty(16, np.uint8)
    values, counts, one = np.empty(16, np.float32), np.empty(16, np.uint32), np.uintp(1)
    for i in range(np.uintp(row_count)):
        line = np.uintp((np.int64(i) + first_row) // row_run) * np.uintp(scale_width)
        for t in range((first + columns + run - one) // run):
            low = max(t * run, first) - first
            high = min((t + one) * run - first, columns)
            zero = zeros[line + t] if has_zeros else np.float32(0)
            full = np.float32(scales[line + t] * post)
            inverse = np.float32(0) if full == 0 else np.float32(np.float32(1) / full)
            for c in range(np.uintp(16)):
                values[c] = stored(value_of(levels[c], zero, scales[line + t], post), kind)
            _scaled(values, np.uintp(0), np.uintp(16), inverse, zero, values)
            _count_below(values, np.uintp(16), middles, counts)
            others = np.uint32(0)
            for c in range(np.uintp(16)):
                near[c] = order[np.uintp(counts[c])]
                others += np.uint32(near[c] != c)
            at = i * columns + low
            if others:
                for j in range(high - low):
                    out[at + j] = near[codes[at + j] & np.uint8(15)]
            else:
                for j in range(high - low):
                    out[at + j] = codes[at + j]


def looks_up(block: Codes) -> bool:
    """Whether :func:`nearest_of_levels` can be used, and is worth it."""
    levels = block.levels
    return levels.values.size == 16 and levels.middles.size == 15 and block.run >= 16


def codes_of_levels(block: Codes, kind: int) -> Bytes:
    """Return what :func:`nearest_codes` gives of a block's own values, for tables of 16."""
    out = np.empty(block.codes.size, np.uint8)
    levels = block.levels
    nearest_of_levels(*block.arguments, levels.order, levels.middles, kind, out)
    return out


def nearest_codes(block: Codes, values: Floats) -> Bytes:
    """Return codes near values on a block's grid, whatever its own codes; see :func:`nearest`."""
    out = np.empty(values.size, np.uint8)
    levels = block.levels
    nearest(
        block.rows, block.columns, np.float32(levels.post), block.scales, block.zeros,
        block.scale_width, block.run, block.row_run, block.first, block.first_row,
        levels.order[:0] if levels.ascend else levels.order, levels.middles, values, out,
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
