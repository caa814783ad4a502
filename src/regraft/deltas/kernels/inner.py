"""What the kernels are made of: conversions, products, one delta. Compiled into their callers.

Arrays are 1-D and contiguous on purpose: with 2-D arrays LLVM has to assume that they overlap and
stops vectorizing. Weights travel as raw bits in two views of one buffer, ``x16`` (uint16) and
``x32`` (float32); a *kind* says which one is meant, so that one compiled function serves every
pair of dtypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.numerics.compiling import njit
from regraft.numerics.conversions import (
    BF16,
    F16,
    INNER,
    bfloat16_bits,
)
from regraft.numerics.intrinsics import float_of, float_to_half, fma, half_to_float

ROW_FACTOR, COLUMN_FACTOR, ROUND_TO_SOURCE = 1, 2, 4
"""Flags of one delta: a factor per row (DoRA), per column (DoRA, transposed), or a rounding."""

LEFT, RIGHT, RANK, FLAGS, FACTOR = range(5)
"""Columns of the ``table`` that describes packed deltas: offsets, rank, flags, factor offset."""

BLOCK = 512
"""Columns done at a time, so that a block of the right factor stays in the first-level cache."""

ROWS = 4
"""Rows done at a time, so that what is loaded of the right factor serves four of them."""

ZERO, ONE, TWO, THREE = np.uintp(0), np.uintp(1), np.uintp(2), np.uintp(3)

# Indices below are unsigned (np.uintp): numba then leaves out the check for a negative index, which
# would keep LLVM from vectorizing. Slices would do too, but each costs two atomic reference counts.


@njit(**INNER)
def round_through(values: Any, of: Any, kind: int, n: Any) -> None:
    """Round float32 values to a dtype and back, in place."""
    if kind == BF16:
        for j in range(n):
            values[of + j] = float_of(np.uint32(bfloat16_bits(values[of + j])) << np.uint32(16))
    elif kind == F16:
        for j in range(n):
            values[of + j] = half_to_float(float_to_half(values[of + j]))


@njit(**INNER)
def product(
    left: Any, at0: Any, at1: Any, at2: Any, at3: Any, right: Any, right_at: Any, ld: Any,
    rank: Any, acc: Any, b0: Any, n: Any,
) -> None:  # fmt: skip
    """Set four rows of ``acc`` to four rows of ``left @ right``: k ascending, fused, float32.

    Four values of k go through one pass over j: each still adds in ascending order, and the
    accumulators are loaded and stored a quarter as often.

    Args:
        at0, at1, at2, at3: where the four rows of ``left`` begin.
        acc, b0: ``ROWS`` rows of ``BLOCK`` values, and where the first one begins.
    """
    b1, b2, b3 = b0 + np.uintp(BLOCK), b0 + np.uintp(2 * BLOCK), b0 + np.uintp(3 * BLOCK)
    for j in range(np.uintp(ROWS * BLOCK)):
        acc[b0 + j] = np.float32(0)
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
            acc[b0 + j] = fma(p3, x3, fma(p2, x2, fma(p1, x1, fma(p0, x0, acc[b0 + j]))))
            acc[b1 + j] = fma(q3, x3, fma(q2, x2, fma(q1, x1, fma(q0, x0, acc[b1 + j]))))
            acc[b2 + j] = fma(u3, x3, fma(u2, x2, fma(u1, x1, fma(u0, x0, acc[b2 + j]))))
            acc[b3 + j] = fma(v3, x3, fma(v2, x2, fma(v1, x1, fma(v0, x0, acc[b3 + j]))))
    for k in range(fours * np.uintp(4), rank):
        r = right_at + k * ld
        p, q, u, v = left[at0 + k], left[at1 + k], left[at2 + k], left[at3 + k]
        for j in range(n):
            acc[b0 + j] = fma(p, right[r + j], acc[b0 + j])
            acc[b1 + j] = fma(q, right[r + j], acc[b1 + j])
            acc[b2 + j] = fma(u, right[r + j], acc[b2 + j])
            acc[b3 + j] = fma(v, right[r + j], acc[b3 + j])


@njit(**INNER)
def copy_row(values: Any, at: Any, out: Any, to: Any, n: Any) -> None:
    """Set ``n`` values of ``out`` to others."""
    for j in range(n):
        out[to + j] = values[at + j]


@njit(**INNER)
def apply(
    weights: Any, at: Any, acc: Any, of: Any, scale: Any, flags: int, factors: Any, row_at: Any,
    column_at: Any, source_kind: int, out: Any, in_place: bool, n: Any,
) -> None:  # fmt: skip
    """Set ``out`` to a row of float32 weights with one delta, with its factor and rounding.

    Args:
        weights, at: the weights.
        acc, of: the products.
        in_place: whether the weights are in ``out``. LLVM has to know: a loop that finds out is no
            vector code there.
    """
    factor = factors[row_at] if flags & ROW_FACTOR else np.float32(1)  # times 1 changes nothing
    if in_place:
        for j in range(n):
            out[j] = np.float32(factor * fma(scale, acc[of + j], out[j]))
    else:
        for j in range(n):
            out[j] = np.float32(factor * fma(scale, acc[of + j], weights[at + j]))
    if flags & COLUMN_FACTOR:
        for j in range(n):
            out[j] = factors[column_at + j] * out[j]
    if flags & ROUND_TO_SOURCE:
        round_through(out, ZERO, source_kind, n)
