"""The inner loops of an undo: a merge run backwards, over one tile.

:mod:`regraft.deltas.kernels.streams` says what is kept of a weight,
:mod:`regraft.deltas.kernels.merge` how tiles and factors are laid out.
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
    product,
)
from regraft.deltas.kernels.streams import (
    half_spacing,
    keep_row,
    put_exceptions,
    restore_row,
    unit_of,
)
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import ENTRY, INNER, decode

_PRECISION = 2.0**-24
"""Of float32: an operation's result is within this share of the exact one."""


@njit(**INNER)
def _undo_delta(
    prediction: Any, radius: Any, acc: Any, of: Any, scale: Any, flags: int, factors: Any,
    row_at: Any, column_at: Any, source_kind: int, n: Any, last: bool,
) -> None:  # fmt: skip
    """Take one delta off float64 predictions, in place, and widen what they may be wrong by.

    Args:
        last: whether the merge added it last, so that its rounding is in ``radius`` already.
    """
    if flags & ROUND_TO_SOURCE:
        for j in range(n):
            radius[j] += half_spacing(prediction[j], source_kind)
    if flags & ROW_FACTOR:
        inverse = 1.0 / np.float64(factors[row_at])
        for j in range(n):
            prediction[j] *= inverse
            radius[j] *= abs(inverse)
    if flags & COLUMN_FACTOR:
        for j in range(n):
            inverse = 1.0 / np.float64(factors[column_at + j])
            prediction[j] *= inverse
            radius[j] *= abs(inverse)
    if flags or not last:
        for j in range(n):
            radius[j] += abs(prediction[j]) * _PRECISION
    for j in range(n):
        prediction[j] -= np.float64(scale) * np.float64(acc[of + j])


@njit(**ENTRY)
def invert_rows(
    x16: Any, x32: Any, kind: int, y16: Any, y32: Any, out_kind: int, row_count: int,
    column_count: int, left: Any, right: Any, right_ld: int, first_row: int, first_column: int,
    table: Any, scales: Any, factors: Any, state: Any, stream: Any, unit_row: int,
    rows_per_unit: int, units_per_row: int, encoding: bool,
) -> None:  # fmt: skip
    """Keep what an undo of a merged tile needs, or undo it with what was kept.

    Args:
        x16, x32, kind: the base's weights, read when ``encoding`` and written otherwise.
        y16, y32, out_kind: the merged values.
        row_count, ..., factors: as in :func:`regraft.deltas.kernels.merge.merge_rows`.
        state, stream: of the tile's units; see :mod:`regraft.deltas.kernels.streams`.
        unit_row: rows between the first row of the tile's first unit and this first row.
        rows_per_unit, units_per_row: one of the two is 1.
        encoding: which of the two is wanted.
    """
    acc = np.empty(ROWS * BLOCK, np.float32)
    accs = np.empty(ROWS * BLOCK * max(table.shape[0], 1), np.float32)
    values, index = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uintp)
    prediction, radius = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    scratch16, scratch32 = np.empty(BLOCK, np.uint16), np.empty(BLOCK, np.float32)
    need, number = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.uint64)
    width = np.empty(BLOCK, np.int64)
    need64 = need.view(np.uint64)
    rows, columns, ld = np.uintp(row_count), np.uintp(column_count), np.uintp(right_ld)
    row0, column0, block = np.uintp(first_row), np.uintp(first_column), np.uintp(BLOCK)
    deltas, last = table.shape[0], rows - ONE
    for b in range((columns + block - ONE) // block):
        start = b * block
        n = min(block, columns - start)
        for group in range((rows + THREE) // np.uintp(ROWS)):
            i = group * np.uintp(ROWS)
            here = min(np.uintp(ROWS), rows - i)
            for d in range(deltas):
                rank = np.uintp(table[d, RANK])
                l0 = np.uintp(table[d, LEFT]) + (row0 + i) * rank
                l1 = l0 + (min(i + ONE, last) - i) * rank
                l2 = l0 + (min(i + TWO, last) - i) * rank
                l3 = l0 + (min(i + THREE, last) - i) * rank
                r_at = np.uintp(table[d, RIGHT]) + column0 + start
                product(left, l0, l1, l2, l3, right, r_at, ld, rank, acc, n)
                for j in range(np.uintp(ROWS * BLOCK)):
                    accs[np.uintp(d) * np.uintp(ROWS * BLOCK) + j] = acc[j]
            for q in range(here):
                at, of = (i + q) * columns + start, q * block
                unit, place = unit_of(unit_row, i + q, start, columns, rows_per_unit, units_per_row)
                decode(y16, y32, out_kind, at, values, ZERO, n)
                for j in range(n):
                    prediction[j] = np.float64(values[j])
                    radius[j] = half_spacing(prediction[j], out_kind)
                for e in range(deltas):
                    d = deltas - 1 - e
                    f_at = np.uintp(table[d, FACTOR])
                    _undo_delta(
                        prediction, radius, accs, np.uintp(d) * np.uintp(ROWS * BLOCK) + of,
                        scales[d], table[d, FLAGS], factors, f_at + row0 + i + q,
                        f_at + column0 + start, kind, n, e == 0,
                    )  # fmt: skip
                if encoding:
                    keep_row(
                        prediction, radius, x16, x32, kind, at, state, stream, unit, place,
                        values, scratch16, scratch32, number, width, need, need64, index, n,
                    )  # fmt: skip
                else:
                    restore_row(
                        prediction, radius, x16, x32, kind, at, state, stream, unit, values,
                        number, width, need, need64, index, n,
                    )  # fmt: skip
                if not encoding:
                    put_exceptions(state, unit, stream, place, x16, x32, kind, at, n)
