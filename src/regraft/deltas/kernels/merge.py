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
    copy_row,
    product,
)
from regraft.deltas.kernels.prediction import foresee_to_keep, predict
from regraft.deltas.kernels.streams import keep_listed, select, unit_of
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
def _count(source: Any, at: Any, stored: Any, of: Any, sums: Any, n: Any) -> None:
    """Count what changed in a row of a block, and what is no longer finite.

    Args:
        source: float32 before, at ``at``.
        stored: what was stored, as float32, at ``of``.
    """
    infinity = np.uint32(0x7F800000)
    changed, largest = np.uint32(0), np.uint32(0)
    for j in range(n):
        was, now = bits_of(source[at + j]), bits_of(stored[of + j])
        changed = np.uint32(changed + np.uint32(was != now))
        largest = max(largest, np.uint32(now & np.uint32(0x7FFFFFFF)))
    sums[2] += np.int64(changed)
    if largest >= infinity:
        for j in range(n):
            was, now = bits_of(source[at + j]), bits_of(stored[of + j])
            sums[3] += np.int64(((was & infinity) != infinity) & ((now & infinity) == infinity))


@njit(**INNER)
def _add_norms(source: Any, at: Any, merged: Any, of: Any, sums: Any, n: Any) -> None:
    """Add |W|^2 and |delta|^2 of a row of a block, before the rounding."""
    weight, delta = np.float64(0), np.float64(0)
    for j in range(n):
        w, m = source[at + j], merged[of + j]
        weight = add_square(weight, np.float64(w))
        delta = add_square(delta, np.float64(np.float32(m - w)))
    sums[0] += weight
    sums[1] += delta


@njit(**INNER)
def _add_deltas(
    source: Any, of: Any, accs: Any, table: Any, scales: Any, factors: Any, row: Any, column: Any,
    kind: int, merged: Any, n: Any,
) -> None:  # fmt: skip
    """Set ``merged`` to a row of a block with all its deltas, in float32."""
    if table.shape[0] == 0:
        for j in range(n):
            merged[j] = source[of + j]
    for d in range(table.shape[0]):
        at, f_at = np.uintp(d) * np.uintp(ROWS * BLOCK) + of, np.uintp(table[d, FACTOR])
        apply(
            source, of, accs, at, scales[d], table[d, FLAGS], factors, f_at + row, f_at + column,
            kind, merged, d > 0, n,
        )  # fmt: skip


@njit(**INNER)
def products(
    left: Any, right: Any, ld: Any, row: Any, rows: Any, column: Any, table: Any, accs: Any,
    n: Any,
) -> None:  # fmt: skip
    """Set the products of each delta for four rows of a block.

    A delta of rank 0 is dense: its own rows stand where a right factor would.

    Args:
        row, column: the first one's place in the segment.
        rows: how many rows are left. Past the last one its factors serve again; what they give is
            not stored.
    """
    last = min(np.uintp(ROWS), rows) - ONE
    for d in range(table.shape[0]):
        rank = np.uintp(table[d, RANK])
        l0 = np.uintp(table[d, LEFT]) + row * rank
        l1, l2 = l0 + min(ONE, last) * rank, l0 + min(TWO, last) * rank
        l3, r_at = l0 + last * rank, np.uintp(table[d, RIGHT]) + column
        to = np.uintp(d) * np.uintp(ROWS * BLOCK)
        if rank == ZERO:
            for q in range(np.uintp(ROWS)):
                at = r_at + (row + min(q, last)) * ld
                copy_row(right, at, accs, to + q * np.uintp(BLOCK), n)
        else:
            product(left, l0, l1, l2, l3, right, r_at, ld, rank, accs, to, n)


@njit(**ENTRY, _nrt=False)
def merge_rows(
    x16: Any, x32: Any, kind: int, y16: Any, y32: Any, out_kind: int, row_count: int,
    column_count: int, left: Any, right: Any, right_ld: int, first_row: int, first_column: int,
    table: Any, scales: Any, factors: Any, sums: Any, norms: bool, state: Any, stream: Any,
    unit_row: int, rows_per_unit: int, units_per_row: int, source: Any, merged: Any, accs: Any,
    stored: Any, need: Any, need64: Any, whole: Any, spread: Any, high: Any,
    low: Any, prediction: Any, radius: Any, number: Any, width: Any, index: Any,
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
        norms: whether the norms among the sums are wanted.
        state, stream: of the tile's units, where an undo is kept; see
            :mod:`regraft.deltas.kernels.streams`. An empty state where it is not.
        unit_row: rows between the first row of the tile's first unit and this first row.
        rows_per_unit, units_per_row: one of the two is 1.
        source, ..., index: as :func:`regraft.deltas.kernels.prediction.merging_scratch` returns.
    """
    keeping = state.shape[0] > 0
    rows, columns, ld = np.uintp(row_count), np.uintp(column_count), np.uintp(right_ld)
    row0, column0, block = np.uintp(first_row), np.uintp(first_column), np.uintp(BLOCK)
    for b in range((columns + block - ONE) // block):
        start = b * block
        n, column = min(block, columns - start), column0 + start
        for group in range((rows + THREE) // np.uintp(ROWS)):
            i = group * np.uintp(ROWS)
            here = min(np.uintp(ROWS), rows - i)
            products(left, right, ld, row0 + i, rows - i, column, table, accs, n)
            for q in range(here):
                at, of, row = (i + q) * columns + start, q * block, row0 + i + q
                decode(x16, x32, kind, at, source, of, n)
                _add_deltas(source, of, accs, table, scales, factors, row, column, kind, merged, n)
                encode(merged, ZERO, out_kind, y16, y32, at, n)
                decode(y16, y32, out_kind, at, stored, of, n)
                _count(source, of, stored, of, sums, n)
                if norms:
                    _add_norms(source, of, merged, ZERO, sums, n)
                if keeping:
                    foresee_to_keep(
                        stored, of, accs, table, scales, factors, row, column, kind, out_kind,
                        x16, x32, at, need, whole, spread, high, low, q == 0, n,
                    )  # fmt: skip
            # By now the marks have left the processor's store buffer, and are read at once.
            for q in range(here if keeping else ZERO):
                at, of, row = (i + q) * columns + start, q * block, row0 + i + q
                found = select(need, need64, of, index, n)
                if found:
                    predict(
                        stored, of, accs, table, scales, factors, row, column, kind, out_kind,
                        index, found, prediction, radius,
                    )  # fmt: skip
                    unit, place = unit_of(
                        unit_row, i + q, start, columns, rows_per_unit, units_per_row
                    )
                    keep_listed(
                        prediction, radius, x16, x32, kind, at, state, stream, unit, place,
                        whole, number, width, index, found,
                    )  # fmt: skip


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
            product(left, l0, l1, l2, l3, right, r_at, columns, rank, acc, ZERO, n)
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
        _count(values, ZERO, scratch, ZERO, sums, n)
        _add_norms(values, ZERO, values, ZERO, sums, n)
