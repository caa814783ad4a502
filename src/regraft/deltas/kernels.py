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

from regraft.deltas.intrinsics import bits_of, float_of, float_to_half, fma, half_to_float

F32, BF16, F16 = 0, 1, 2
KINDS = {"F32": F32, "BF16": BF16, "F16": F16}
"""Number of each working dtype, by its safetensors name."""

ROW_FACTOR, COLUMN_FACTOR, ROUND_TO_SOURCE = 1, 2, 4
"""Flags of one delta: a factor per row (DoRA), per column (DoRA, transposed), or a rounding."""

LEFT, RIGHT, RANK, FLAGS, FACTOR = range(5)
"""Columns of the ``table`` that describes packed deltas: offsets, rank, flags, factor offset."""

BLOCK = 512
"""Columns done at a time, so that a block of the right factor stays in the first-level cache."""

ONE, TWO, THREE = np.uintp(1), np.uintp(2), np.uintp(3)

_entry: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
# Helpers are compiled into their callers, so they need no way in from Python and no cache of
# their own: that is a third of the time the first run takes to compile.
_inner: dict[str, Any] = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}

_ANY_ORDER = {"reassoc", "nsz", "contract"}
"""Lets LLVM add the report's sums in any order; no value of the result goes through such an add."""

# Indices below are unsigned (np.uintp): numba then leaves out the check for a negative index, which
# would keep LLVM from vectorizing. Slices would do too, but each costs two atomic reference counts.


@njit(**_inner)
def _decode(x16: Any, x32: Any, kind: int, at: Any, out: Any, n: Any) -> None:
    """Set ``out[:n]`` to ``n`` weights, as float32."""
    if kind == BF16:
        for j in range(n):
            out[j] = float_of(np.uint32(x16[at + j]) << np.uint32(16))
    elif kind == F16:
        for j in range(n):
            out[j] = half_to_float(x16[at + j])
    else:
        for j in range(n):
            out[j] = x32[at + j]


@njit(inline="always")
def _bfloat16_bits(value: Any) -> Any:
    """Round to bfloat16, to nearest even; a NaN keeps its sign and stays a NaN."""
    u = bits_of(value)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (u >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(nan if is_nan else rounded)


@njit(**_inner)
def _encode(values: Any, kind: int, x16: Any, x32: Any, at: Any, n: Any) -> None:
    """Round ``n`` float32 values into a buffer."""
    if kind == BF16:
        for j in range(n):
            x16[at + j] = _bfloat16_bits(values[j])
    elif kind == F16:
        for j in range(n):
            x16[at + j] = float_to_half(values[j])
    else:
        for j in range(n):
            x32[at + j] = values[j]


@njit(**_inner)
def _round_through(values: Any, kind: int, n: Any) -> None:
    """Round float32 values to a dtype and back, in place."""
    if kind == BF16:
        for j in range(n):
            values[j] = float_of(np.uint32(_bfloat16_bits(values[j])) << np.uint32(16))
    elif kind == F16:
        for j in range(n):
            values[j] = half_to_float(float_to_half(values[j]))


@njit(**_inner)
def _product(
    left: Any, at0: Any, at1: Any, right: Any, right_at: Any, ld: Any, rank: Any,
    acc0: Any, acc1: Any, n: Any,
) -> None:  # fmt: skip
    """Set two accumulators to two rows of ``left @ right``, k ascending, fused, float32.

    Four values of k go through one pass over j: each still adds in ascending order, and the
    accumulators are loaded and stored a quarter as often.
    """
    for j in range(n):
        acc0[j] = np.float32(0)
        acc1[j] = np.float32(0)
    fours = rank // np.uintp(4)
    for k4 in range(fours):
        k = np.uintp(4) * k4
        i0, i1 = at0 + k, at1 + k
        a0, a1, a2, a3 = left[i0], left[i0 + ONE], left[i0 + TWO], left[i0 + THREE]
        b0, b1, b2, b3 = left[i1], left[i1 + ONE], left[i1 + TWO], left[i1 + THREE]
        r0 = right_at + k * ld
        r1, r2, r3 = r0 + ld, r0 + TWO * ld, r0 + THREE * ld
        for j in range(n):
            x0, x1, x2, x3 = right[r0 + j], right[r1 + j], right[r2 + j], right[r3 + j]
            acc0[j] = fma(a3, x3, fma(a2, x2, fma(a1, x1, fma(a0, x0, acc0[j]))))
            acc1[j] = fma(b3, x3, fma(b2, x2, fma(b1, x1, fma(b0, x0, acc1[j]))))
    for k in range(fours * np.uintp(4), rank):
        a, b, r = left[at0 + k], left[at1 + k], right_at + k * ld
        for j in range(n):
            acc0[j] = fma(a, right[r + j], acc0[j])
            acc1[j] = fma(b, right[r + j], acc1[j])


@njit(**_inner)
def _apply(
    weights: Any, acc: Any, scale: Any, flags: int, factors: Any, row_at: Any, column_at: Any,
    source_kind: int, n: Any,
) -> None:  # fmt: skip
    """Add one delta to a row of float32 weights, with its factor and rounding, in place."""
    for j in range(n):
        weights[j] = fma(scale, acc[j], weights[j])
    if flags & ROW_FACTOR:
        factor = factors[row_at]
        for j in range(n):
            weights[j] = factor * weights[j]
    if flags & COLUMN_FACTOR:
        for j in range(n):
            weights[j] = factors[column_at + j] * weights[j]
    if flags & ROUND_TO_SOURCE:
        _round_through(weights, source_kind, n)


@njit(fastmath=_ANY_ORDER, **_inner)
def _measure(source: Any, merged: Any, sums: Any, n: Any) -> None:
    """Add ``|source|^2`` and ``|merged - source|^2`` of one block to ``sums[0:2]``.

    These are figures for the report and no part of the result, so LLVM may add in any order; in
    float64 that shows in the last digits alone, which are not reported.
    """
    weight, delta = np.float64(0), np.float64(0)
    for j in range(n):
        w = np.float64(source[j])
        d = np.float64(merged[j] - source[j])
        weight += w * w
        delta += d * d
    sums[0] += weight
    sums[1] += delta


@njit(**_inner)
def _differing16(x: Any, y: Any, at: Any, n: Any) -> int:
    count = np.uint16(0)  # n <= BLOCK; a narrow counter lets LLVM compare 32 values at once
    for j in range(n):
        count = np.uint16(count + np.uint16(x[at + j] != y[at + j]))
    return np.int64(count)


@njit(**_inner)
def _differing32(x: Any, y: Any, at: Any, n: Any) -> int:
    count = np.uint32(0)
    for j in range(n):
        count = np.uint32(count + np.uint32(bits_of(x[at + j]) != bits_of(y[at + j])))
    return np.int64(count)


@njit(**_inner)
def _largest16(x: Any, at: Any, n: Any) -> int:
    largest = np.uint16(0)
    for j in range(n):
        largest = max(largest, np.uint16(x[at + j] & np.uint16(0x7FFF)))
    return np.int64(largest)


@njit(**_inner)
def _largest32(x: Any, at: Any, n: Any) -> int:
    largest = np.uint32(0)
    for j in range(n):
        largest = max(largest, np.uint32(bits_of(x[at + j]) & np.uint32(0x7FFFFFFF)))
    return np.int64(largest)


@njit(**_inner)
def _all_finite(x16: Any, x32: Any, kind: int, at: Any, n: Any) -> Any:
    if kind == BF16:
        return _largest16(x16, at, n) < 0x7F80
    if kind == F16:
        return _largest16(x16, at, n) < 0x7C00
    return _largest32(x32, at, n) < 0x7F800000


@njit(**_inner)
def _newly_infinite(source: Any, result: Any, n: Any) -> int:
    """Count the values that are NaN or infinite in ``result`` and were neither in ``source``."""
    infinity = np.uint32(0x7F800000)
    count = 0
    for j in range(n):
        was = bits_of(source[j]) & infinity
        now = bits_of(result[j]) & infinity
        count += now == infinity and was != infinity
    return count


@njit(**_inner)
def _count(
    x16: Any, x32: Any, kind: int, y16: Any, y32: Any, out_kind: int, at: Any,
    source: Any, scratch: Any, sums: Any, n: Any,
) -> None:  # fmt: skip
    """Add elements changed to ``sums[2]`` and elements that stopped being finite to ``sums[3]``."""
    if kind == out_kind and kind != F32:
        sums[2] += _differing16(x16, y16, at, n)
    elif kind == out_kind:
        sums[2] += _differing32(x32, y32, at, n)
    else:
        _decode(y16, y32, out_kind, at, scratch, n)
        sums[2] += _differing32(source, scratch, np.uintp(0), n)
    if not _all_finite(y16, y32, out_kind, at, n):
        _decode(y16, y32, out_kind, at, scratch, n)
        sums[3] += _newly_infinite(source, scratch, n)


@njit(fastmath=_ANY_ORDER, **_inner)
def _store_bfloat16(source: Any, merged: Any, x16: Any, y16: Any, at: Any, sums: Any, n: Any) -> Any:
    """Do the work of :func:`_store` for the usual case, bfloat16 to bfloat16, in one pass.

    Returns:
        Whether all results are finite.
    """
    weight, delta = np.float64(0), np.float64(0)
    changed, largest = np.uint32(0), np.uint16(0)
    for j in range(n):
        bits = _bfloat16_bits(merged[j])
        y16[at + j] = bits
        changed = np.uint32(changed + np.uint32(bits != x16[at + j]))
        largest = max(largest, np.uint16(bits & np.uint16(0x7FFF)))
        w = np.float64(source[j])
        d = np.float64(merged[j] - source[j])
        weight += w * w
        delta += d * d
    sums[0] += weight
    sums[1] += delta
    sums[2] += np.int64(changed)
    return largest < np.uint16(0x7F80)


@njit(**_inner)
def _store(
    source: Any, merged: Any, x16: Any, x32: Any, kind: int, y16: Any, y32: Any, out_kind: int,
    at: Any, scratch: Any, sums: Any, n: Any,
) -> None:  # fmt: skip
    """Round one row of a block into the output and account for it."""
    if kind == BF16 and out_kind == BF16:
        if not _store_bfloat16(source, merged, x16, y16, at, sums, n):
            _decode(y16, y32, out_kind, at, scratch, n)
            sums[3] += _newly_infinite(source, scratch, n)
        return
    _encode(merged, out_kind, y16, y32, at, n)
    _measure(source, merged, sums, n)
    _count(x16, x32, kind, y16, y32, out_kind, at, source, scratch, sums, n)


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
    w0, w1 = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    s0, s1 = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    acc0, acc1 = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    scratch = np.empty(BLOCK, np.float32)
    rows, columns, ld = np.uintp(row_count), np.uintp(column_count), np.uintp(right_ld)
    row0, column0, block = np.uintp(first_row), np.uintp(first_column), np.uintp(BLOCK)
    for b in range((columns + block - ONE) // block):
        start = b * block
        n = min(block, columns - start)
        for pair in range((rows + ONE) // TWO):
            i = pair * TWO
            i1 = min(i + ONE, rows - ONE)  # an odd last row is computed twice, stored once
            at0, at1 = i * columns + start, i1 * columns + start
            for q in range(2):
                _decode(x16, x32, kind, at0 if q == 0 else at1, s0 if q == 0 else s1, n)
            for j in range(n):
                w0[j] = s0[j]
                w1[j] = s1[j]
            for d in range(table.shape[0]):
                rank, flags = np.uintp(table[d, RANK]), table[d, FLAGS]
                l0 = np.uintp(table[d, LEFT]) + (row0 + i) * rank
                l1 = np.uintp(table[d, LEFT]) + (row0 + i1) * rank
                r_at = np.uintp(table[d, RIGHT]) + column0 + start
                _product(left, l0, l1, right, r_at, ld, rank, acc0, acc1, n)
                f_at = np.uintp(table[d, FACTOR])
                f_row, f_column = f_at + row0, f_at + column0 + start
                for q in range(2):
                    w, acc = (w0, acc0) if q == 0 else (w1, acc1)
                    row = f_row + (i if q == 0 else i1)
                    _apply(w, acc, scales[d], flags, factors, row, f_column, kind, n)
            for q in range(1 if i1 == i else 2):
                w, s, at = (w0, s0, at0) if q == 0 else (w1, s1, at1)
                _store(s, w, x16, x32, kind, y16, y32, out_kind, at, scratch, sums, n)


@njit(**_inner)
def _add_squares(values: Any, out: Any, at: Any, by_column: bool, n: Any) -> None:
    if by_column:
        for j in range(n):
            out[at + j] += np.float64(values[j]) * np.float64(values[j])
    else:
        total = out[at]
        for j in range(n):
            total += np.float64(values[j]) * np.float64(values[j])
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
    w0, w1 = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    acc0, acc1 = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    rows, columns, rank = np.uintp(row_count), np.uintp(column_count), np.uintp(rank_)
    left_at = np.uintp(left_offset) + np.uintp(first_row) * rank
    block = np.uintp(BLOCK)
    for b in range((columns + block - ONE) // block):
        start = b * block
        n = min(block, columns - start)
        for pair in range((rows + ONE) // TWO):
            i = pair * TWO
            i1 = min(i + ONE, rows - ONE)
            _decode(x16, x32, kind, i * columns + start, w0, n)
            _decode(x16, x32, kind, i1 * columns + start, w1, n)
            l0, l1 = left_at + i * rank, left_at + i1 * rank
            r_at = np.uintp(right_offset) + start
            _product(left, l0, l1, right, r_at, columns, rank, acc0, acc1, n)
            for j in range(n):
                w0[j] = fma(scale, acc0[j], w0[j])
                w1[j] = fma(scale, acc1[j], w1[j])
            _add_squares(w0, out, start if by_column else i, by_column, n)
            if i1 != i:
                _add_squares(w1, out, start if by_column else i1, by_column, n)


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
        _decode(x16, x32, kind, start, values, n)
        _encode(values, out_kind, y16, y32, start, n)
        _count(x16, x32, kind, y16, y32, out_kind, start, values, scratch, sums, n)
