"""The inner loop that forms rows of a delta, for methods that look at its elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.deltas.kernels.inner import BLOCK, ONE, ROWS, THREE, TWO, ZERO, product
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import ENTRY


@njit(**ENTRY, _nrt=False)
def delta_rows(
    left: Any, right: Any, scale: Any, first: int, row_count: int, column_count: int, rank_: int,
    acc: Any, out: Any,
) -> None:  # fmt: skip
    """Set ``out`` to ``scale * left @ right`` for some rows, in float32.

    The sum over k is ascending and fused, as in :func:`regraft.deltas.kernels.merge.merge_rows`,
    and is multiplied by the scale afterwards.

    Args:
        left: float32, (rows, rank), flat.
        right: float32, (rank, columns), flat.
        scale: float32.
        first, row_count: which rows.
        acc: float32, ``ROWS * BLOCK`` values of scratch.
        out: float32, (row_count, columns), flat.
    """
    rows, columns, rank = np.uintp(row_count), np.uintp(column_count), np.uintp(rank_)
    block, last = np.uintp(BLOCK), rows - ONE
    for b in range((columns + block - ONE) // block):
        start = b * block
        n = min(block, columns - start)
        for group in range((rows + THREE) // np.uintp(ROWS)):
            i = group * np.uintp(ROWS)
            at = (np.uintp(first) + i) * rank
            l1 = (np.uintp(first) + min(i + ONE, last)) * rank
            l2 = (np.uintp(first) + min(i + TWO, last)) * rank
            l3 = (np.uintp(first) + min(i + THREE, last)) * rank
            product(left, at, l1, l2, l3, right, start, columns, rank, acc, ZERO, n)
            for q in range(min(np.uintp(ROWS), rows - i)):
                to, of = (i + q) * columns + start, q * block
                for j in range(n):
                    out[to + j] = scale * acc[of + j]
