"""The inner loops of a merge, compiled by numba (cached on disk after the first run).

Arrays are 1-D and contiguous on purpose: with 2-D arrays LLVM has to assume that they overlap and
stops vectorizing. Weights travel as raw bits in two views of one buffer, ``x16`` (uint16) and
``x32`` (float32); a *kind* says which one is meant, so that one compiled function serves every
pair of dtypes. Nothing here allocates more than a few kilobytes, and everything runs without the
interpreter's lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from regraft.deltas.intrinsics import (
    add_square,
    bits_of,
    float_of,
    float_to_half,
    fma,
    half_to_float,
)

F32, BF16, F16 = 0, 1, 2
KINDS = {"F32": F32, "BF16": BF16, "F16": F16}
"""Number of each working dtype, by its safetensors name."""

ROW_FACTOR, COLUMN_FACTOR, ROUND_TO_SOURCE = 1, 2, 4
"""Flags of one delta: a factor per row (DoRA), per column (DoRA, transposed), or a rounding."""

LEFT, RIGHT, RANK, FLAGS, FACTOR = range(5)
"""Columns of the ``table`` that describes packed deltas: offsets, rank, flags, factor offset."""

BLOCK = 512
"""Columns done at a time, so that a block of the right factor stays in the first-level cache."""

ROWS = 4
"""Rows done at a time, so that what is loaded of the right factor serves four of them."""

ZERO, ONE, TWO, THREE = np.uintp(0), np.uintp(1), np.uintp(2), np.uintp(3)

_entry: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
# Helpers are compiled into their callers, so they need no way in from Python and no cache of
# their own: that is a third of the time the first run takes to compile.
_inner: dict[str, Any] = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}

# Indices below are unsigned (np.uintp): numba then leaves out the check for a negative index, which
# would keep LLVM from vectorizing. Slices would do too, but each costs two atomic reference counts.


@njit(**_inner)
def _decode(x16: Any, x32: Any, kind: int, at: Any, out: Any, to: Any, n: Any) -> None:
    """Set ``out[to:to + n]`` to ``n`` weights, as float32."""
    if kind == BF16:
        for j in range(n):
            out[to + j] = float_of(np.uint32(x16[at + j]) << np.uint32(16))
    elif kind == F16:
        for j in range(n):
            out[to + j] = half_to_float(x16[at + j])
    else:
        for j in range(n):
            out[to + j] = x32[at + j]


@njit(inline="always")
def _bfloat16_bits(value: Any) -> Any:
    """Round to bfloat16, to nearest even; a NaN keeps its sign and stays a NaN."""
    u = bits_of(value)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (u >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(nan if is_nan else rounded)


@njit(**_inner)
def _encode(values: Any, of: Any, kind: int, x16: Any, x32: Any, at: Any, n: Any) -> None:
    """Round ``n`` float32 values into a buffer."""
    if kind == BF16:
        for j in range(n):
            x16[at + j] = _bfloat16_bits(values[of + j])
    elif kind == F16:
        for j in range(n):
            x16[at + j] = float_to_half(values[of + j])
    else:
        for j in range(n):
            x32[at + j] = values[of + j]


@njit(**_inner)
def _round_through(values: Any, of: Any, kind: int, n: Any) -> None:
    """Round float32 values to a dtype and back, in place."""
    if kind == BF16:
        for j in range(n):
            values[of + j] = float_of(np.uint32(_bfloat16_bits(values[of + j])) << np.uint32(16))
    elif kind == F16:
        for j in range(n):
            values[of + j] = half_to_float(float_to_half(values[of + j]))


@njit(**_inner)
def _product(
    left: Any, at0: Any, at1: Any, at2: Any, at3: Any, right: Any, right_at: Any, ld: Any,
    rank: Any, acc: Any, n: Any,
) -> None:  # fmt: skip
    """Set the four rows of ``acc`` to four rows of ``left @ right``: k ascending, fused, float32.

    Four values of k go through one pass over j: each still adds in ascending order, and the
    accumulators are loaded and stored a quarter as often.

    Args:
        at0, at1, at2, at3: where the four rows of ``left`` begin.
        acc: ``ROWS`` rows of ``BLOCK`` values.
    """
    b1, b2, b3 = np.uintp(BLOCK), np.uintp(2 * BLOCK), np.uintp(3 * BLOCK)
    for j in range(np.uintp(ROWS * BLOCK)):
        acc[j] = np.float32(0)
    fours = rank // np.uintp(4)
    for k4 in range(fours):
        k = np.uintp(4) * k4
        i0, i1, i2, i3 = at0 + k, at1 + k, at2 + k, at3 + k
        p0, p1, p2, p3 = left[i0], left[i0 + ONE], left[i0 + TWO], left[i0 + THREE]
        q0, q1, q2, q3 = left[i1], left[i1 + ONE], left[i1 + TWO], left[i1 + THREE]
        u0, u1, u2, u3 = left[i2], left[i2 + ONE], left[i2 + TWO], left[i2 + THREE]
        v0, v1, v2, v3 = left[i3], left[i3 + ONE], left[i3 + TWO], left[i3 + THREE]
        r0 = right_at + k * ld
        r1, r2, r3 = r0 + ld, r0 + TWO * ld, r0 + THREE * ld
        for j in range(n):
            x0, x1, x2, x3 = right[r0 + j], right[r1 + j], right[r2 + j], right[r3 + j]
            acc[j] = fma(p3, x3, fma(p2, x2, fma(p1, x1, fma(p0, x0, acc[j]))))
            acc[b1 + j] = fma(q3, x3, fma(q2, x2, fma(q1, x1, fma(q0, x0, acc[b1 + j]))))
            acc[b2 + j] = fma(u3, x3, fma(u2, x2, fma(u1, x1, fma(u0, x0, acc[b2 + j]))))
            acc[b3 + j] = fma(v3, x3, fma(v2, x2, fma(v1, x1, fma(v0, x0, acc[b3 + j]))))
    for k in range(fours * np.uintp(4), rank):
        r = right_at + k * ld
        p, q, u, v = left[at0 + k], left[at1 + k], left[at2 + k], left[at3 + k]
        for j in range(n):
            acc[j] = fma(p, right[r + j], acc[j])
            acc[b1 + j] = fma(q, right[r + j], acc[b1 + j])
            acc[b2 + j] = fma(u, right[r + j], acc[b2 + j])
            acc[b3 + j] = fma(v, right[r + j], acc[b3 + j])


@njit(**_inner)
def _apply(
    weights: Any, of: Any, acc: Any, scale: Any, flags: int, factors: Any, row_at: Any,
    column_at: Any, source_kind: int, n: Any,
) -> None:  # fmt: skip
    """Add one delta to a row of float32 weights, with its factor and rounding, in place."""
    for j in range(n):
        weights[of + j] = fma(scale, acc[of + j], weights[of + j])
    if flags & ROW_FACTOR:
        factor = factors[row_at]
        for j in range(n):
            weights[of + j] = factor * weights[of + j]
    if flags & COLUMN_FACTOR:
        for j in range(n):
            weights[of + j] = factors[column_at + j] * weights[of + j]
    if flags & ROUND_TO_SOURCE:
        _round_through(weights, of, source_kind, n)


@njit(**_inner)
def _account(source: Any, merged: Any, of: Any, stored: Any, sums: Any, n: Any) -> None:
    """Add a row of a block to the sums: |W|^2, |delta|^2, changed, no longer finite.

    Args:
        source, merged: float32 before and after, before the rounding; at offset ``of``.
        stored: what was stored, as float32.
    """
    infinity = np.uint32(0x7F800000)
    weight, delta = np.float64(0), np.float64(0)
    changed, broken = np.uint32(0), np.uint32(0)
    for j in range(n):
        was, now = bits_of(source[of + j]), bits_of(stored[j])
        changed = np.uint32(changed + np.uint32(was != now))
        finite = (was & infinity) != infinity
        broken = np.uint32(broken + np.uint32(finite & ((now & infinity) == infinity)))
        w, d = np.float64(source[of + j]), np.float64(merged[of + j] - source[of + j])
        weight = add_square(weight, w)
        delta = add_square(delta, d)
    sums[0] += weight
    sums[1] += delta
    sums[2] += np.int64(changed)
    sums[3] += np.int64(broken)


@njit(**_inner)
def _finish_bfloat16(
    acc: Any, of: Any, scale: Any, x16: Any, y16: Any, at: Any, sums: Any, n: Any
) -> None:
    """Add one plain delta to a row of bfloat16, store it and account for it, all in one pass.

    The usual case. It gives the bits that :func:`_apply` and :func:`_store` give.
    """
    infinity = np.uint16(0x7F80)
    weight, delta = np.float64(0), np.float64(0)
    changed, broken = np.uint32(0), np.uint32(0)
    for j in range(n):
        was = x16[at + j]
        source = float_of(np.uint32(was) << np.uint32(16))
        merged = fma(scale, acc[of + j], source)
        now = _bfloat16_bits(merged)
        y16[at + j] = now
        changed = np.uint32(changed + np.uint32(was != now))
        finite = (was & infinity) != infinity
        broken = np.uint32(broken + np.uint32(finite & ((now & infinity) == infinity)))
        w, d = np.float64(source), np.float64(merged - source)
        weight = add_square(weight, w)
        delta = add_square(delta, d)
    sums[0] += weight
    sums[1] += delta
    sums[2] += np.int64(changed)
    sums[3] += np.int64(broken)


@njit(**_inner)
def _store(
    source: Any, merged: Any, of: Any, y16: Any, y32: Any, out_kind: int, at: Any, scratch: Any,
    sums: Any, n: Any,
) -> None:  # fmt: skip
    """Round one row of a block into the output and account for it."""
    _encode(merged, of, out_kind, y16, y32, at, n)
    _decode(y16, y32, out_kind, at, scratch, ZERO, n)
    _account(source, merged, of, scratch, sums, n)


@njit(**_entry)
def merge_rows(
    x16: Any, x32: Any, kind: int, y16: Any, y32: Any, out_kind: int, row_count: int,
    column_count: int, left: Any, right: Any, right_ld: int, first_row: int, first_column: int,
    table: Any, scales: Any, factors: Any, sums: Any,
) -> None:  # fmt: skip
    """Write ``round(W + deltas)`` for a tile of ``row_count x column_count``.

    Args:
        x16, x32: the tile's weights as uint16 and as float32; ``kind`` says which one holds.
        y16, y32: where the result goes, likewise, with ``out_kind``.
        left: float32, left factors of every delta one after the other, each ``(segment rows, r)``.
        right: float32, right factors, each ``(r, right_ld)``.
        first_row, first_column: the tile's place in the segment the factors cover.
        table: int64 ``(deltas, 5)``, one line per delta in the order they are added.
        scales: float32 ``(deltas,)``.
        factors: float32, DoRA factors, per row or per column of the segment.
        sums: float64 ``(4,)``: |W|^2, |delta|^2, changed, no longer finite; added to.
    """
    merged = np.empty(ROWS * BLOCK, np.float32)
    source = np.empty(ROWS * BLOCK, np.float32)
    acc = np.empty(ROWS * BLOCK, np.float32)
    scratch = np.empty(BLOCK, np.float32)
    rows, columns, ld = np.uintp(row_count), np.uintp(column_count), np.uintp(right_ld)
    row0, column0, block = np.uintp(first_row), np.uintp(first_column), np.uintp(BLOCK)
    last = rows - ONE
    usual = kind == BF16 and out_kind == BF16 and table.shape[0] == 1 and table[0, FLAGS] == 0
    for b in range((columns + block - ONE) // block):
        start = b * block
        n = min(block, columns - start)
        for group in range((rows + THREE) // np.uintp(ROWS)):
            i = group * np.uintp(ROWS)
            here = min(np.uintp(ROWS), rows - i)
            if not usual:
                for q in range(here):
                    _decode(x16, x32, kind, (i + q) * columns + start, source, q * block, n)
                for j in range(np.uintp(ROWS * BLOCK)):
                    merged[j] = source[j]
            for d in range(table.shape[0]):
                rank, flags = np.uintp(table[d, RANK]), table[d, FLAGS]
                # Past the last row its factors serve again; what they give is not stored.
                l0 = np.uintp(table[d, LEFT]) + (row0 + i) * rank
                l1 = l0 + (min(i + ONE, last) - i) * rank
                l2 = l0 + (min(i + TWO, last) - i) * rank
                l3 = l0 + (min(i + THREE, last) - i) * rank
                r_at = np.uintp(table[d, RIGHT]) + column0 + start
                _product(left, l0, l1, l2, l3, right, r_at, ld, rank, acc, n)
                f_at = np.uintp(table[d, FACTOR])
                f_row, f_column = f_at + row0 + i, f_at + column0 + start
                for q in range(here):
                    at, of = (i + q) * columns + start, q * block
                    if usual:
                        _finish_bfloat16(acc, of, scales[d], x16, y16, at, sums, n)
                    else:
                        _apply(
                            merged, of, acc, scales[d], flags, factors, f_row + q, f_column, kind, n
                        )
            if not usual:
                for q in range(here):
                    at, of = (i + q) * columns + start, q * block
                    _store(source, merged, of, y16, y32, out_kind, at, scratch, sums, n)


@njit(**_inner)
def _add_squares(values: Any, of: Any, out: Any, at: Any, by_column: bool, n: Any) -> None:
    if by_column:
        for j in range(n):
            out[at + j] += np.float64(values[of + j]) * np.float64(values[of + j])
    else:
        total = out[at]
        for j in range(n):
            total += np.float64(values[of + j]) * np.float64(values[of + j])
        out[at] = total


@njit(**_entry)
def square_sums(
    x16: Any, x32: Any, kind: int, row_count: int, column_count: int, left: Any, left_offset: int,
    right: Any, right_offset: int, rank_: int, scale: Any, first_row: int, by_column: bool,
    out: Any,
) -> None:  # fmt: skip
    """Add ``(W + scale * left @ right)^2`` to ``out``, per row or per column, in float64.

    ``W + scale * delta`` is one fused float32 operation, as in :func:`merge_rows`; its square is
    exact in float64, and squares are added in ascending order of the index summed over.

    Args:
        x16, x32: whole rows of weights, ``(row_count, column_count)``, as in :func:`merge_rows`.
        out: float64 ``(row_count,)``, or ``(column_count,)`` with ``by_column``; added to.
    """
    merged, acc = np.empty(ROWS * BLOCK, np.float32), np.empty(ROWS * BLOCK, np.float32)
    rows, columns, rank = np.uintp(row_count), np.uintp(column_count), np.uintp(rank_)
    left_at = np.uintp(left_offset) + np.uintp(first_row) * rank
    block, last = np.uintp(BLOCK), rows - ONE
    for b in range((columns + block - ONE) // block):
        start = b * block
        n = min(block, columns - start)
        r_at = np.uintp(right_offset) + start
        for group in range((rows + THREE) // np.uintp(ROWS)):
            i = group * np.uintp(ROWS)
            l0, l1 = left_at + i * rank, left_at + min(i + ONE, last) * rank
            l2, l3 = left_at + min(i + TWO, last) * rank, left_at + min(i + THREE, last) * rank
            _product(left, l0, l1, l2, l3, right, r_at, columns, rank, acc, n)
            for q in range(min(np.uintp(ROWS), rows - i)):
                of = q * block
                _decode(x16, x32, kind, (i + q) * columns + start, merged, of, n)
                for j in range(n):
                    merged[of + j] = fma(scale, acc[of + j], merged[of + j])
                _add_squares(merged, of, out, start if by_column else i + q, by_column, n)


@njit(**_entry)
def convert(
    x16: Any, x32: Any, kind: int, y16: Any, y32: Any, out_kind: int, total: int, sums: Any
) -> None:
    """Round ``total`` values from one dtype to another; ``sums`` as in :func:`merge_rows`."""
    values, scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    block, count = np.uintp(BLOCK), np.uintp(total)
    for b in range((count + block - ONE) // block):
        start = b * block
        n = min(block, count - start)
        _decode(x16, x32, kind, start, values, ZERO, n)
        _encode(values, ZERO, out_kind, y16, y32, start, n)
        _decode(y16, y32, out_kind, start, scratch, ZERO, n)
        _account(values, values, ZERO, scratch, sums, n)
