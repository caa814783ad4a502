"""The inner loops of a merge, compiled by numba (cached on disk after the first run).

Nothing here allocates more than a few kilobytes, and everything runs without the interpreter's
lock. :mod:`regraft.deltas.kernels.inner` says how weights and factors are laid out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.deltas.kernels.inner import (
    BLOCK,
    COLUMN_FACTOR,
    FACTOR,
    FLAGS,
    LEFT,
    ONE,
    RANK,
    RIGHT,
    ROUND_TO_SOURCE,
    ROW_FACTOR,
    ROWS,
    THREE,
    TWO,
    ZERO,
    apply,
    product,
)
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import (
    BF16,
    ENTRY,
    F16,
    F32,
    INNER,
    KINDS,
    decode,
    encode,
)
from regraft.numerics.intrinsics import add_square, bits_of, fma

__all__ = [
    "BF16",
    "COLUMN_FACTOR",
    "F16",
    "F32",
    "FACTOR",
    "FLAGS",
    "KINDS",
    "LEFT",
    "RANK",
    "RIGHT",
    "ROUND_TO_SOURCE",
    "ROW_FACTOR",
    "convert",
    "merge_rows",
    "square_sums",
    "widen",
]


@njit(**INNER)
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


@njit(**INNER)
def _store(
    source: Any, merged: Any, of: Any, y16: Any, y32: Any, out_kind: int, at: Any, scratch: Any,
    sums: Any, n: Any,
) -> None:  # fmt: skip
    """Round one row of a block into the output and account for it."""
    encode(merged, of, out_kind, y16, y32, at, n)
    decode(y16, y32, out_kind, at, scratch, ZERO, n)
    _account(source, merged, of, scratch, sums, n)


@njit(**ENTRY)
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
    for b in range((columns + block - ONE) // block):
        start = b * block
        n = min(block, columns - start)
        for group in range((rows + THREE) // np.uintp(ROWS)):
            i = group * np.uintp(ROWS)
            here = min(np.uintp(ROWS), rows - i)
            for q in range(here):
                decode(x16, x32, kind, (i + q) * columns + start, source, q * block, n)
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
                product(left, l0, l1, l2, l3, right, r_at, ld, rank, acc, n)
                f_at = np.uintp(table[d, FACTOR])
                f_row, f_column = f_at + row0 + i, f_at + column0 + start
                for q in range(here):
                    of = q * block
                    apply(merged, of, acc, scales[d], flags, factors, f_row + q, f_column, kind, n)
            for q in range(here):
                at, of = (i + q) * columns + start, q * block
                _store(source, merged, of, y16, y32, out_kind, at, scratch, sums, n)


@njit(**INNER)
def _add_squares(values: Any, of: Any, out: Any, at: Any, by_column: bool, n: Any) -> None:
    if by_column:
        for j in range(n):
            out[at + j] += np.float64(values[of + j]) * np.float64(values[of + j])
    else:
        total = out[at]
        for j in range(n):
            total += np.float64(values[of + j]) * np.float64(values[of + j])
        out[at] = total


@njit(**ENTRY)
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
            product(left, l0, l1, l2, l3, right, r_at, columns, rank, acc, n)
            for q in range(min(np.uintp(ROWS), rows - i)):
                of = q * block
                decode(x16, x32, kind, (i + q) * columns + start, merged, of, n)
                for j in range(n):
                    merged[of + j] = fma(scale, acc[of + j], merged[of + j])
                _add_squares(merged, of, out, start if by_column else i + q, by_column, n)


@njit(**ENTRY)
def widen(x16: Any, x32: Any, kind: int, out: Any) -> None:
    """Set ``out``, float32, to weights as they are."""
    decode(x16, x32, kind, ZERO, out, ZERO, np.uintp(out.shape[0]))


@njit(**ENTRY)
def convert(
    x16: Any, x32: Any, kind: int, y16: Any, y32: Any, out_kind: int, total: int, sums: Any
) -> None:
    """Round ``total`` values from one dtype to another; ``sums`` as in :func:`merge_rows`."""
    values, scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    block, count = np.uintp(BLOCK), np.uintp(total)
    for b in range((count + block - ONE) // block):
        start = b * block
        n = min(block, count - start)
        decode(x16, x32, kind, start, values, ZERO, n)
        encode(values, ZERO, out_kind, y16, y32, start, n)
        decode(y16, y32, out_kind, start, scratch, ZERO, n)
        _account(values, values, ZERO, scratch, sums, n)
