"""The usual case, which has loops of its own: bfloat16 weights that get one plain delta.

They give the bits that :mod:`regraft.deltas.kernels.merge` and
:mod:`regraft.deltas.kernels.streams` give, but for what is kept for an undo, which is told in
integers here. A bfloat16 is its significand, of 8 bits, times the spacing of its exponent; a
prediction, as float32, has 16 bits more. Where a merged value's exponent is ``width`` above that of
its prediction, it stands for 2 ** width neighbours.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from regraft.deltas.kernels.inner import (
    BLOCK,
    FLAGS,
    ONE,
    RANK,
    ROWS,
    THREE,
    TWO,
    ZERO,
    product,
)
from regraft.deltas.kernels.streams import (
    PLAIN_WIDTH,
    power,
    put_exceptions,
    read,
    select,
    unit_of,
    write,
)
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import BF16, ENTRY, INNER, bfloat16_bits, rounded_bits
from regraft.numerics.intrinsics import add_square, bits_of, float_of, fma, shift_left


def is_usual(kind: int, out_kind: int, table: Any) -> bool:
    """Whether this is the usual case: two dtypes, and a table of packed deltas."""
    usual = kind == out_kind == BF16 and len(table) == 1
    return usual and int(table[0, FLAGS]) == 0 and int(table[0, RANK]) > 0


_own = threading.local()


def merging_scratch() -> tuple[Any, ...]:
    """Return the calling thread's scratch arrays, which :func:`merge_usual` takes last."""
    if not hasattr(_own, "merging"):
        acc, _, _, need, need64, index, no32 = scratch()
        _own.merging = (
            acc, need, need64, index, no32,
            np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32),
            np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.int32),
        )  # fmt: skip
    arrays: tuple[Any, ...] = _own.merging
    return arrays


def scratch() -> tuple[Any, ...]:
    """Return the calling thread's scratch arrays, which :func:`restore_usual` takes last."""
    if not hasattr(_own, "arrays"):
        need = np.empty(ROWS * BLOCK, np.uint8)
        _own.arrays = (
            np.empty(ROWS * BLOCK, np.float32), np.empty(BLOCK, np.uint64),
            np.empty(BLOCK, np.int64), need, need.view(np.uint64), np.empty(BLOCK, np.uintp),
            np.empty(0, np.float32),
        )  # fmt: skip
    arrays: tuple[Any, ...] = _own.arrays
    return arrays


@njit(**INNER)
def _finish(acc: Any, of: Any, scale: Any, x16: Any, y16: Any, at: Any, sums: Any, n: Any) -> None:
    """Add one plain delta to a row of a block of bfloat16, store it, and count what changed.

    It gives the bits that :func:`regraft.deltas.kernels.merge.merge_rows` gives. Nearly every row
    is done by the first loop, which takes every sum for a finite number; its largest one tells.
    """
    changed, largest = np.uint16(0), np.uint32(0)
    for j in range(n):
        was = x16[at + j]
        merged = bits_of(fma(scale, acc[of + j], float_of(np.uint32(was) << np.uint32(16))))
        now = np.uint16(rounded_bits(merged))
        y16[at + j] = now
        changed = np.uint16(changed + np.uint16(was != now))  # a row has no more than BLOCK
        largest = max(largest, np.uint32(merged & np.uint32(0x7FFFFFFF)))
    if largest < np.uint32(0x7F7F8000):  # from there on numbers are rounded to infinity
        sums[2] += np.int64(changed)
    else:
        _finish_odd(acc, of, scale, x16, y16, at, sums, n)


@njit(**INNER)
def _finish_odd(
    acc: Any, of: Any, scale: Any, x16: Any, y16: Any, at: Any, sums: Any, n: Any
) -> None:
    """Do what :func:`_finish` does for a row with sums that are no finite numbers."""
    infinity = np.uint16(0x7F80)
    for j in range(n):
        was = x16[at + j]
        now = bfloat16_bits(fma(scale, acc[of + j], float_of(np.uint32(was) << np.uint32(16))))
        y16[at + j] = now
        sums[2] += np.int64(was != now)
        finite = (was & infinity) != infinity
        sums[3] += np.int64(finite & ((now & infinity) == infinity))


@njit(**INNER)
def _add_norms(acc: Any, of: Any, scale: Any, x16: Any, at: Any, sums: Any, n: Any) -> None:
    """Add the norms of a row and its delta: a loop of its own, as float64 halves how many fit."""
    weight, delta = np.float64(0), np.float64(0)
    for j in range(n):
        source = float_of(np.uint32(x16[at + j]) << np.uint32(16))
        weight = add_square(weight, np.float64(source))
        delta = add_square(delta, np.float64(fma(scale, acc[of + j], source) - source))
    sums[0] += weight
    sums[1] += delta


@njit(inline="always")
def _is_coarser(predicted: Any, merged: Any) -> Any:
    """Whether a merged bfloat16 is coarser than its predicted weight, both as float32 bits.

    Where its exponent is not above the prediction's there is one candidate: it, rounded.
    """
    exponent = np.uint32(0x7F800000)
    return np.uint32(predicted & exponent) < np.uint32(merged & exponent)


@njit(inline="always")
def _exponent_field(bits: Any) -> Any:
    """Return the exponent of a float32 given by its bits; 1 for subnormal ones, as their scale."""
    return max(np.int32((bits >> np.uint32(23)) & np.uint32(0xFF)), np.int32(1))


@njit(inline="always")
def _is_far_coarser(predicted: Any, merged: Any) -> Any:
    """Whether a merged bfloat16 says nothing of a weight that is no zero: it is all delta."""
    return np.int32(_exponent_field(merged) - _exponent_field(predicted)) > np.int32(7)


@njit(inline="always")
def _lowest(predicted: Any, width: Any) -> Any:
    """Return the lowest of 2 ** width candidates, in units of the prediction's spacing."""
    normal = (predicted & np.uint32(0x7F800000)) != np.uint32(0)
    hidden = np.int32(0x800000) if normal else np.int32(0)
    mantissa = np.int32(np.int32(predicted & np.uint32(0x7FFFFF)) | hidden)
    down = np.int32(-np.int32(mantissa >> np.int32(16)))
    up = np.int32(np.int32(mantissa + np.int32(65535)) >> np.int32(16))
    above = down if predicted >= np.uint32(0x80000000) else up
    half = np.int32(shift_left(np.int32(1), min(np.int32(width), np.int32(8))) >> np.int32(1))
    return np.int32(above - half)


@njit(**INNER)
def _list(
    acc: Any, of: Any, x16: Any, y16: Any, at: Any, index: Any, found: Any, accs: Any,
    weights: Any, merged: Any,
) -> None:  # fmt: skip
    """Put what is known of the listed weights of a row one after the other."""
    for i in range(found):
        j = index[i]
        accs[i] = acc[of + j]
        weights[i] = np.uint32(x16[at + j])
        merged[i] = np.uint32(y16[at + j]) << np.uint32(16)


@njit(**INNER)
def _number(
    accs: Any, scale: Any, weights: Any, merged: Any, found: Any, number: Any, width: Any,
    zeros: bool,
) -> None:  # fmt: skip
    """Set the number of each listed weight, and the bits that it takes.

    A negative width w stands for an exception after ``-1 - w`` bits. No branches, and every step in
    32 bits: so many weights are done at a time.
    """
    none, one = np.int32(0), np.int32(1)
    for i in range(found):
        weight, there = weights[i], merged[i]
        predicted = bits_of(fma(-scale, accs[i], float_of(there)))
        exponent = _exponent_field(predicted)
        bits = np.int32(_exponent_field(there) - exponent)
        far = bits > np.int32(7)
        some = min(max(bits, none), np.int32(8))
        field = np.int32((weight >> np.uint32(7)) & np.uint32(0xFF))
        shift = np.int32(max(field, one) - exponent)
        hidden = np.int32(0x80) if field != none else none
        significand = np.int32(np.int32(weight & np.uint32(0x7F)) | hidden)
        scaled = shift_left(significand, min(max(shift, none), np.int32(16)))
        signed = np.int32(-scaled) if weight >= np.uint32(0x8000) else scaled
        which = np.int32(signed - _lowest(predicted, some))
        # Finer weights than the prediction's spacing are not numbered, but for zero.
        is_zero = weight == np.uint32(0)
        coarse = (field >= exponent) | (shift == none) | is_zero
        inside = (which >= none) & (which < shift_left(one, some))
        fits = inside & coarse & (weight != np.uint32(0x8000))
        itself = one if is_zero else np.int32(weight << np.uint32(1))
        itself_in = one if is_zero else np.int32(17)
        numbered = _is_coarser(predicted, there) & ((not zeros) | (not far))
        value = itself if far else (which if fits else none)
        in_bits = itself_in if far else (bits if fits else np.int32(-one - bits))
        number[i] = np.uint32(value if numbered else none)
        width[i] = in_bits if numbered else np.int32(-1)


@njit(**INNER)
def _width(
    acc: Any, of: Any, scale: Any, y16: Any, start: Any, index: Any, found: Any, width: Any
) -> None:
    for i in range(found):
        merged = np.uint32(y16[start + index[i]]) << np.uint32(16)
        predicted = bits_of(fma(-scale, acc[of + index[i]], float_of(merged)))
        bits = np.int64(_exponent_field(merged) - _exponent_field(predicted))
        width[i] = PLAIN_WIDTH if bits > 7 else bits


@njit(**INNER)
def _set(
    acc: Any, of: Any, scale: Any, x16: Any, y16: Any, start: Any, index: Any, found: Any,
    number: Any, width: Any,
) -> None:  # fmt: skip
    for i in range(found):
        j = index[i]
        if width[i] == PLAIN_WIDTH:
            x16[start + j] = np.uint16(number[i])
        else:
            merged = np.uint32(y16[start + j]) << np.uint32(16)
            predicted = bits_of(fma(-scale, acc[of + j], float_of(merged)))
            which = _lowest(predicted, width[i]) + np.int32(number[i])
            step = power(np.int64(_exponent_field(predicted)) - 134)
            x16[start + j] = np.uint16(bits_of(np.float32(which * step)) >> np.uint32(16))


@njit(**INNER)
def _mark(
    acc: Any, of: Any, scale: Any, x16: Any, y16: Any, at: Any, need: Any, n: Any, zeros: bool
) -> None:
    """Mark the weights of a row of which anything has to be kept: one pass without a branch."""
    if zeros:
        for j in range(n):
            merged = np.uint32(y16[at + j]) << np.uint32(16)
            predicted = bits_of(fma(-scale, acc[of + j], float_of(merged)))
            wide = _is_far_coarser(predicted, merged)
            expected = np.uint32(0) if wide else rounded_bits(predicted)
            coarser = np.uint8(_is_coarser(predicted, merged)) & np.uint8(not wide)
            need[of + j] = np.uint8(expected != np.uint32(x16[at + j])) | coarser
        return
    for j in range(n):
        merged = np.uint32(y16[at + j]) << np.uint32(16)
        predicted = bits_of(fma(-scale, acc[of + j], float_of(merged)))
        other = rounded_bits(predicted) != np.uint32(x16[at + j])
        need[of + j] = np.uint8(other) | np.uint8(_is_coarser(predicted, merged))


@njit(**INNER)
def _keep_row(
    acc: Any, of: Any, scale: Any, x16: Any, x32: Any, y16: Any, at: Any, state: Any, stream: Any,
    unit: Any, place: Any, need: Any, need64: Any, index: Any, n: Any, zeros: bool, accs: Any,
    weights: Any, merged: Any, number: Any, width: Any,
) -> None:  # fmt: skip
    """Keep what is needed of a row of bfloat16 weights that got one plain delta."""
    found = select(need, need64, of, index, n)
    if found:
        _list(acc, of, x16, y16, at, index, found, accs, weights, merged)
        _number(accs, scale, weights, merged, found, number, width, zeros)
        write(number, width, index, found, x16, x32, BF16, at, state, unit, stream, place)


@njit(**INNER)
def _expect(
    acc: Any, of: Any, scale: Any, x16: Any, y16: Any, at: Any, need: Any, n: Any, zeros: bool
) -> None:
    """Set a row's weights to what is expected, and mark those of which more was kept."""
    if zeros:
        for j in range(n):
            merged = np.uint32(y16[at + j]) << np.uint32(16)
            predicted = bits_of(fma(-scale, acc[of + j], float_of(merged)))
            wide = _is_far_coarser(predicted, merged)
            x16[at + j] = np.uint16(np.uint32(0) if wide else rounded_bits(predicted))
            need[of + j] = np.uint8(_is_coarser(predicted, merged)) & np.uint8(not wide)
        return
    for j in range(n):
        merged = np.uint32(y16[at + j]) << np.uint32(16)
        predicted = bits_of(fma(-scale, acc[of + j], float_of(merged)))
        x16[at + j] = np.uint16(rounded_bits(predicted))
        need[of + j] = np.uint8(_is_coarser(predicted, merged))


@njit(**INNER)
def _restore_row(
    acc: Any, of: Any, scale: Any, x16: Any, y16: Any, at: Any, state: Any, stream: Any, unit: Any,
    number: Any, width: Any, need: Any, need64: Any, index: Any, n: Any,
) -> None:  # fmt: skip
    """Restore the weights of a row of which :func:`_keep_row` kept what is needed."""
    found = select(need, need64, of, index, n)
    if found:
        _width(acc, of, scale, y16, at, index, found, width)
        read(number, width, found, 16, state, unit, stream)
        _set(acc, of, scale, x16, y16, at, index, found, number, width)


# -- a tile ----------------------------------------------------------------------------------------


@njit(**ENTRY, _nrt=False)
def merge_usual(
    x16: Any, y16: Any, row_count: int, column_count: int, left: Any, right: Any, right_ld: int,
    first_row: int, first_column: int, rank_: int, scale: Any, sums: Any, state: Any, stream: Any,
    unit_row: int, rows_per_unit: int, units_per_row: int, zeros: bool, norms: bool,
    acc: Any, need: Any, need64: Any, index: Any, no32: Any, accs: Any, weights: Any, merged: Any,
    numbers: Any, widths: Any,
) -> None:  # fmt: skip
    """Write ``round(W + delta)`` for a tile; keep what an undo needs, if there is a state for it.

    Args:
        x16, y16: the tile's weights, and where the result goes.
        row_count, ..., first_column: as in :func:`regraft.deltas.kernels.merge.merge_rows`.
        rank_, scale: the delta's.
        sums: as in :func:`regraft.deltas.kernels.merge.merge_rows`; added to.
        state, stream, ..., units_per_row: as in
            :func:`regraft.deltas.kernels.inverse.invert_rows`; an empty state
            where nothing is to be kept.
        zeros: whether a weight of which the merged value says nothing is expected to be zero, as
            among values of codes very many are, rather than kept as a plain weight.
        norms: whether the norms among the sums are wanted.
    """
    keeping = state.shape[0] > 0
    rows, columns = np.uintp(row_count), np.uintp(column_count)
    ld, rank = np.uintp(right_ld), np.uintp(rank_)
    row0, column0, block = np.uintp(first_row), np.uintp(first_column), np.uintp(BLOCK)
    last = rows - ONE
    for b in range((columns + block - ONE) // block):
        start = b * block
        n = min(block, columns - start)
        for group in range((rows + THREE) // np.uintp(ROWS)):
            i = group * np.uintp(ROWS)
            # Past the last row its factors serve again; what they give is not stored.
            l0, l1 = (row0 + i) * rank, (row0 + min(i + ONE, last)) * rank
            l2, l3 = (row0 + min(i + TWO, last)) * rank, (row0 + min(i + THREE, last)) * rank
            product(left, l0, l1, l2, l3, right, column0 + start, ld, rank, acc, ZERO, n)
            for q in range(min(np.uintp(ROWS), rows - i)):
                at, of = (i + q) * columns + start, q * block
                _finish(acc, of, scale, x16, y16, at, sums, n)
                if norms:
                    _add_norms(acc, of, scale, x16, at, sums, n)
                if keeping:
                    _mark(acc, of, scale, x16, y16, at, need, n, zeros)
            # By now the marks have left the processor's store buffer, and are read at once.
            for q in range(min(np.uintp(ROWS), rows - i) if keeping else ZERO):
                at, of = (i + q) * columns + start, q * block
                unit, place = unit_of(unit_row, i + q, start, columns, rows_per_unit, units_per_row)
                _keep_row(
                    acc, of, scale, x16, no32, y16, at, state, stream, unit, place, need, need64,
                    index, n, zeros, accs, weights, merged, numbers, widths,
                )  # fmt: skip


@njit(**ENTRY, _nrt=False)
def restore_usual(
    x16: Any, y16: Any, row_count: int, column_count: int, left: Any, right: Any, right_ld: int,
    first_row: int, first_column: int, rank_: int, scale: Any, state: Any, stream: Any,
    unit_row: int, rows_per_unit: int, units_per_row: int, zeros: bool,
    acc: Any, number: Any, width: Any, need: Any, need64: Any, index: Any, no32: Any,
) -> None:  # fmt: skip
    """Restore a tile's weights from its merged values ``y16``; else as :func:`merge_usual`."""
    rows, columns = np.uintp(row_count), np.uintp(column_count)
    ld, rank = np.uintp(right_ld), np.uintp(rank_)
    row0, column0, block = np.uintp(first_row), np.uintp(first_column), np.uintp(BLOCK)
    last = rows - ONE
    for b in range((columns + block - ONE) // block):
        start = b * block
        n = min(block, columns - start)
        for group in range((rows + THREE) // np.uintp(ROWS)):
            i = group * np.uintp(ROWS)
            # Past the last row its factors serve again; what they give is not stored.
            l0, l1 = (row0 + i) * rank, (row0 + min(i + ONE, last)) * rank
            l2, l3 = (row0 + min(i + TWO, last)) * rank, (row0 + min(i + THREE, last)) * rank
            product(left, l0, l1, l2, l3, right, column0 + start, ld, rank, acc, ZERO, n)
            for q in range(min(np.uintp(ROWS), rows - i)):
                at, of = (i + q) * columns + start, q * block
                _expect(acc, of, scale, x16, y16, at, need, n, zeros)
            for q in range(min(np.uintp(ROWS), rows - i)):
                at, of = (i + q) * columns + start, q * block
                unit, place = unit_of(unit_row, i + q, start, columns, rows_per_unit, units_per_row)
                _restore_row(
                    acc, of, scale, x16, y16, at, state, stream, unit, number, width, need, need64,
                    index, n,
                )  # fmt: skip
                put_exceptions(state, unit, stream, place, x16, no32, BF16, at, n)
