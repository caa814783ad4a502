"""The inner loops of an undo: a merge run backwards, over one tile.

:mod:`regraft.deltas.kernels.streams` says what is kept of a weight,
:mod:`regraft.deltas.kernels.merge` how tiles and factors are laid out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.deltas.kernels.inner import BLOCK, ONE, ROWS, THREE
from regraft.deltas.kernels.merge import products
from regraft.deltas.kernels.prediction import foresee_to_restore, predict
from regraft.deltas.kernels.streams import put_exceptions, restore_listed, select, unit_of
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import ENTRY, decode


@njit(**ENTRY, _nrt=False)
def restore_rows(
    x16: Any, x32: Any, kind: int, y16: Any, y32: Any, out_kind: int, row_count: int,
    column_count: int, left: Any, right: Any, right_ld: int, first_row: int, first_column: int,
    table: Any, scales: Any, factors: Any, state: Any, stream: Any, unit_row: int,
    rows_per_unit: int, units_per_row: int, accs: Any, stored: Any, need: Any, need64: Any,
    whole: Any, spread: Any, high: Any, low: Any,
    prediction: Any, radius: Any, number: Any, width: Any, index: Any,
) -> None:  # fmt: skip
    """Undo a merged tile with what was kept of it.

    Args:
        x16, x32, kind: where the base's weights go.
        y16, y32, out_kind: the merged values.
        row_count, ..., units_per_row: as in :func:`regraft.deltas.kernels.merge.merge_rows`.
        accs, ..., index: as :func:`regraft.deltas.kernels.prediction.scratch` returns them.
    """
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
                decode(y16, y32, out_kind, at, stored, of, n)
                foresee_to_restore(
                    stored, of, accs, table, scales, factors, row, column, kind, out_kind, x16,
                    x32, at, need, whole, spread, high, low, q == 0, n,
                )  # fmt: skip
            for q in range(here):
                at, of, row = (i + q) * columns + start, q * block, row0 + i + q
                unit, place = unit_of(unit_row, i + q, start, columns, rows_per_unit, units_per_row)
                found = select(need, need64, of, index, n)
                if found:
                    predict(
                        stored, of, accs, table, scales, factors, row, column, kind, out_kind,
                        index, found, prediction, radius,
                    )  # fmt: skip
                    restore_listed(
                        prediction, radius, x16, x32, kind, at, state, stream, unit, number,
                        width, index, found,
                    )  # fmt: skip
                put_exceptions(state, unit, stream, place, x16, x32, kind, at, n)
