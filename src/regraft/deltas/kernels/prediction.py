"""What a merged value and its deltas tell of the weight, for a row of a block at a time.

What counts is told in float64: a *prediction* of each weight and a *radius* that it may be wrong
by (docs/arithmetic.md). Nearly always a single number of the weight's dtype lies within the radius,
and float32 is enough to see which. So :func:`_foresight` does that for all of a row, many at a
time, and marks the few weights it is not sure of; :func:`predict` does these in float64.

To be sure, float32 needs a bound of its error. With M the merged value, a weight's prediction is

    p = I * M - D,          I = 1 / (DoRA's factors),  D = the deltas over the factors after them

Let S be the sum of the sizes of D's parts, w the number of the weight's dtype nearest to p, t the
computed p - w, and e = 2^-24, within which float32 rounds. Beside roundings of a share of t itself,
t is wrong by at most e * S a rounding of D; none if there is one delta and no factor: then M - w is
exact (Sterbenz 1974), and the delta is taken off it by one fused operation.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from regraft.deltas.kernels.inner import (
    BLOCK,
    COLUMN_FACTOR,
    FACTOR,
    FLAGS,
    ROUND_TO_SOURCE,
    ROW_FACTOR,
    ROWS,
)
from regraft.deltas.kernels.streams import half_spacing
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import BF16, F16, F32, INNER, rounded_bits
from regraft.numerics.intrinsics import bits_of, float_of, float_to_half, fma, half_to_float

PRECISION = 2.0**-24
"""Of float32: an operation's result is within this share of the exact one."""

_MOST = 40
"""Deltas up to which the bounds below hold."""

_own = threading.local()


def merging_scratch(deltas: int) -> tuple[Any, ...]:
    """Return the calling thread's scratch arrays, which merge_rows takes last.

    They are the weights of ``ROWS`` rows of a block, and sums of a row before they are rounded; the
    others are those of :func:`scratch`.
    """
    if not hasattr(_own, "merging"):
        _own.merging = (np.empty(ROWS * BLOCK, np.float32), np.empty(BLOCK, np.float32))
    return (*_own.merging, *scratch(deltas))


def scratch(deltas: int) -> tuple[Any, ...]:
    """Return the calling thread's scratch arrays, which restore_rows takes last.

    For ``ROWS`` rows of a block: the products of each delta, the merged values as they are stored,
    and marks, seen in two ways. For a row: deltas together, the sum of their sizes, and the inverse
    of their factors in two parts. For listed weights of a row: predictions, radii, numbers, widths
    and places.
    """
    rows = ROWS * BLOCK
    if not hasattr(_own, "arrays") or _own.arrays[0].size < deltas * rows:
        need = np.empty(rows, np.uint8)
        _own.arrays = (
            np.empty(max(deltas, 1) * rows, np.float32), np.empty(rows, np.float32), need,
            need.view(np.uint64), *(np.empty(BLOCK, np.float32) for _ in range(4)),
            np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64),
            np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.int64), np.empty(BLOCK, np.uintp),
        )  # fmt: skip
    arrays: tuple[Any, ...] = _own.arrays
    return arrays


# -- in float32, all of a row ----------------------------------------------------------------------


@njit(inline="always")
def _power_below(value: Any, floor: Any, down: Any) -> Any:
    """Return the power of two in a float32, ``down`` (a difference of bits) further down.

    Where there is no such float32 the result is negative, or no number.

    Args:
        floor: bits of the least power that counts, where numbers become subnormal.
    """
    field = max(np.uint32(bits_of(value) & np.uint32(0x7F800000)), floor)
    return float_of(np.uint32(field - down))


@njit(inline="always")
def _is_sure(
    t: Any, value: Any, merged: Any, spread: Any, times: Any, down: Any, bounds: Any
) -> Any:
    """Whether a single candidate lies within the radius: the number that is ``t`` away.

    Args:
        value: the prediction, as float32.
        spread: the sum of the sizes of all deltas.
        times: what the merged value was multiplied by.
        down: gives the spacing of the weight's dtype, by :func:`_power_below`.
        bounds: as :func:`_bounds` returns them.
    """
    slack, share, limit, out_floor, out_down = bounds
    size = abs(value)
    # A little less than the prediction: its spacing is no more than that of the exact one.
    unit = _power_below(np.float32(size * np.float32(1 - 2.0**-18)), np.uint32(0), down)
    radius = fma(share, size, np.float32(_power_below(merged, out_floor, out_down) * abs(times)))
    # The next candidates are more than a radius away if this one is near enough.
    reach = fma(np.float32(-(2.0**-18)), radius, min(radius, np.float32(unit - radius)))
    near = abs(t) <= fma(-slack, spread, reach)
    return near & (spread <= np.float32(limit * size))


@njit(inline="always")
def _to_bfloat16(value: Any) -> Any:
    raw = np.uint16(rounded_bits(bits_of(value)))
    return raw, float_of(np.uint32(np.uint32(raw) << np.uint32(16)))


@njit(inline="always")
def _to_float16(value: Any) -> Any:
    raw = float_to_half(value)
    return raw, half_to_float(raw)


@njit(inline="always")
def _to_float32(value: Any) -> Any:
    return bits_of(value), value


@njit(inline="always")
def _as_it_is(value: Any) -> Any:
    return value


_DTYPES = {
    BF16: (7, _to_bfloat16, _as_it_is, _as_it_is),
    F16: (10, _to_float16, _as_it_is, _as_it_is),
    F32: (23, _to_float32, bits_of, float_of),
}
"""By the number of a dtype: bits of its mantissa; what rounds a float32 to it, and returns bits and
value; the bits of a stored weight, and back."""


@njit(**INNER)
def _fill(inverse: Any, high: Any, low: Any, n: Any) -> None:
    for j in range(n):
        high[j] = np.float32(inverse)
        low[j] = np.float32(inverse - np.float64(np.float32(inverse)))


@njit(**INNER)
def _begin_part(acc: Any, at: Any, scale: Any, whole: Any, spread: Any, n: Any) -> None:
    for j in range(n):
        part = np.float32(scale * acc[at + j])
        whole[j] = part
        spread[j] = abs(part)


@njit(**INNER)
def _add_part(acc: Any, at: Any, scale: Any, whole: Any, spread: Any, n: Any) -> None:
    """Add a delta, and its size. A function of its own, or LLVM makes no vector code of it."""
    for j in range(n):
        part = np.float32(scale * acc[at + j])
        whole[j] = np.float32(whole[j] + part)
        spread[j] = np.float32(spread[j] + abs(part))


@njit(**INNER)
def _times_columns(
    factors: Any, at: Any, whole: Any, spread: Any, high: Any, low: Any, n: Any
) -> None:
    """Divide what was put together by the factors of the columns."""
    for j in range(n):
        exact = 1.0 / np.float64(factors[at + j])
        both = exact * (np.float64(high[j]) + np.float64(low[j]))
        moderate = (abs(both) > 2.0**-20) & (abs(both) < 2.0**20)
        times = np.float32(both if moderate else np.nan)  # of which nothing is sure
        high[j] = times
        low[j] = np.float32(both - np.float64(times))
        whole[j] = np.float32(whole[j] * np.float32(exact))
        spread[j] = np.float32(spread[j] * abs(np.float32(exact)))


@njit(**INNER)
def _join(
    accs: Any, of: Any, table: Any, scales: Any, factors: Any, row: Any, column: Any,
    inverse: Any, whole: Any, spread: Any, high: Any, low: Any, first: Any, n: Any,
) -> None:  # fmt: skip
    """Put the deltas of a row together, and the factors of its columns, the last one first."""
    alone = table.shape[0] == 1 and table[0, FLAGS] == COLUMN_FACTOR
    deltas, times, begun = np.int64(table.shape[0]), inverse, False
    if deltas == 0:
        _fill(0.0, whole, spread, n)
    for e in range(deltas):
        d = deltas - 1 - e
        f_at = np.uintp(table[d, FACTOR])
        if table[d, FLAGS] & ROW_FACTOR:
            times *= np.float64(factors[f_at + row])
        if table[d, FLAGS] & COLUMN_FACTOR and (first or not alone):
            if not begun:
                _fill(inverse, high, low, n)
                begun = True
            _times_columns(factors, f_at + column, whole, spread, high, low, n)
        # What the factors before it divide the delta by, of which ``times`` has those of rows.
        scale = np.float32(times * np.float64(scales[d]))
        at = np.uintp(d) * np.uintp(ROWS * BLOCK) + of
        if e == 0:
            _begin_part(accs, at, scale, whole, spread, n)
        else:
            _add_part(accs, at, scale, whole, spread, n)


@njit(inline="always")
def _bounds(table: Any, kind: Any, out_kind: Any, flags: Any, wider: Any) -> Any:
    """Return what the loops of :func:`_marking` have to know of the deltas and dtypes.

    Returns:
        How far wrong ``t`` and the radius may be, as a share of the deltas' sizes; what is added to
        the radius, as a share of the prediction; the deltas' sizes over the prediction, up to which
        all this holds; the least power of two and the difference that give half the spacing of the
        merged value's dtype, by :func:`_power_below`.
    """
    deltas, fine = np.int64(table.shape[0]), kind == F32 or out_kind == F32
    roundings = 4 * deltas + 12
    if deltas == 1 and not flags & COLUMN_FACTOR:
        roundings = 0 if fine and not flags else 4 + wider
    limit = 0.4375 if fine else 16.0 / (deltas + 2)
    digits = 24 if out_kind == F32 else (11 if out_kind == F16 else 8)
    return (
        np.float32(roundings * PRECISION), np.float32(wider * PRECISION), np.float32(limit),
        np.uint32((113 if out_kind == F16 else 0) << 23), np.uint32(digits << 23),
    )  # fmt: skip


def _marking(kind: int, keeping: bool) -> Any:
    """Return what does the work of :func:`_foresight` for one dtype of weights."""
    digits, rounding, bits, stored_as = _DTYPES[kind]
    down = np.uint32(digits << 23)

    @njit(inline="always")
    def settled(sure: Any, raw: Any, x: Any, place: Any) -> Any:
        if keeping:
            return sure & (raw == bits(x[place]))
        x[place] = stored_as(raw)
        return sure

    @njit(**INNER)
    def one(
        stored: Any, of: Any, acc: Any, scale: Any, high: Any, low: Any, x: Any, at: Any,
        need: Any, bounds: Any, n: Any,
    ) -> None:  # fmt: skip
        """With one delta, and one factor for the row or none."""
        for j in range(n):
            merged = stored[of + j]
            part = np.float32(scale * acc[of + j])
            value = fma(high, merged, -part)
            raw, expected = rounding(value)
            t = fma(-scale, acc[of + j], fma(low, merged, fma(high, merged, -expected)))
            sure = _is_sure(t, value, merged, abs(part), high, down, bounds)
            need[of + j] = np.uint8(not settled(sure, raw, x, at + j))

    @njit(**INNER)
    def many(
        stored: Any, of: Any, whole: Any, spread: Any, high: Any, low: Any, x: Any, at: Any,
        need: Any, bounds: Any, n: Any,
    ) -> None:  # fmt: skip
        """Given the deltas together, and one factor for the row or none."""
        for j in range(n):
            merged = stored[of + j]
            value = fma(high, merged, -whole[j])
            raw, expected = rounding(value)
            t = np.float32(fma(low, merged, fma(high, merged, -expected)) - whole[j])
            sure = _is_sure(t, value, merged, spread[j], high, down, bounds)
            need[of + j] = np.uint8(not settled(sure, raw, x, at + j))

    @njit(**INNER)
    def columns(
        stored: Any, of: Any, whole: Any, spread: Any, high: Any, low: Any, x: Any, at: Any,
        need: Any, bounds: Any, n: Any,
    ) -> None:  # fmt: skip
        """Given the deltas together, and a factor for each column."""
        for j in range(n):
            merged, times = stored[of + j], high[j]
            value = fma(times, merged, -whole[j])
            raw, expected = rounding(value)
            t = np.float32(fma(low[j], merged, fma(times, merged, -expected)) - whole[j])
            sure = _is_sure(t, value, merged, spread[j], times, down, bounds)
            need[of + j] = np.uint8(not settled(sure, raw, x, at + j))

    @njit(**INNER)
    def mark(
        stored: Any, of: Any, accs: Any, table: Any, scales: Any, factors: Any, row: Any,
        column: Any, flags: Any, inverse: Any, x: Any, at: Any, need: Any, whole: Any,
        spread: Any, high: Any, low: Any, first: Any, bounds: Any, n: Any,
    ) -> None:  # fmt: skip
        times = np.float32(inverse)
        rest = np.float32(inverse - np.float64(times))
        if table.shape[0] == 1 and not flags & COLUMN_FACTOR:
            one(stored, of, accs, scales[0], times, rest, x, at, need, bounds, n)
            return
        _join(
            accs, of, table, scales, factors, row, column, inverse, whole, spread, high, low,
            first, n,
        )  # fmt: skip
        if flags & COLUMN_FACTOR:
            columns(stored, of, whole, spread, high, low, x, at, need, bounds, n)
        else:
            many(stored, of, whole, spread, times, rest, x, at, need, bounds, n)

    return mark


def _foresight(keeping: bool) -> Any:
    """Return what looks at all weights of a row, to keep what is needed or to restore them."""
    mark_bf16, mark_f16, mark_f32 = (_marking(kind, keeping) for kind in (BF16, F16, F32))

    @njit(**INNER)
    def foresee(
        stored: Any, of: Any, accs: Any, table: Any, scales: Any, factors: Any, row: Any,
        column: Any, kind: int, out_kind: int, x16: Any, x32: Any, at: Any, need: Any, whole: Any,
        spread: Any, high: Any, low: Any, first: Any, n: Any,
    ) -> None:  # fmt: skip
        """Mark the weights of a row that need a closer look.

        What is not marked has a single candidate, and that is what is expected. Weights are
        compared with it, and marked if they differ, or they are set to it.

        Args:
            stored: the merged values as float32, at ``of``.
            accs: the products of each delta, likewise, ``ROWS`` rows of a block after the other.
            table, scales, factors: as in :func:`regraft.deltas.kernels.merge.merge_rows`.
            row, column: the row's and the block's place in the segment.
            kind, out_kind: the dtypes of weights and merged values.
            x16, x32: the weights, at ``at``.
            need: set at ``of``.
            whole, ..., low: scratch, left alone until the next row.
            first: whether it is the first row of some of the same columns.
        """
        inverse, wider, flags = 1.0, np.int64(0), np.int64(0)
        for d in range(table.shape[0]):
            flags |= table[d, FLAGS]
            wider += np.int64(table[d, FLAGS] != 0 or d < table.shape[0] - 1)
            if table[d, FLAGS] & ROW_FACTOR:
                inverse *= 1.0 / np.float64(factors[np.uintp(table[d, FACTOR]) + row])
        moderate = abs(inverse) > 2.0**-20 and abs(inverse) < 2.0**20
        if flags & ROUND_TO_SOURCE or table.shape[0] > _MOST or not moderate:
            for j in range(n):
                need[of + j] = 1
            return
        bounds = _bounds(table, kind, out_kind, flags, wider)
        if kind == BF16:
            mark_bf16(
                stored, of, accs, table, scales, factors, row, column, flags, inverse, x16, at,
                need, whole, spread, high, low, first, bounds, n,
            )  # fmt: skip
        elif kind == F16:
            mark_f16(
                stored, of, accs, table, scales, factors, row, column, flags, inverse, x16, at,
                need, whole, spread, high, low, first, bounds, n,
            )  # fmt: skip
        else:
            mark_f32(
                stored, of, accs, table, scales, factors, row, column, flags, inverse, x32, at,
                need, whole, spread, high, low, first, bounds, n,
            )  # fmt: skip

    return foresee


foresee_to_keep, foresee_to_restore = _foresight(keeping=True), _foresight(keeping=False)
mark_bf16_to_keep = _marking(BF16, keeping=True)
"""One of those that :func:`_foresight` is made of, to be looked at alone."""


# -- in float64, what is listed --------------------------------------------------------------------


@njit(**INNER)
def _undo_delta(
    prediction: Any, radius: Any, acc: Any, of: Any, scale: Any, flags: int, factors: Any,
    row_at: Any, column_at: Any, source_kind: int, index: Any, found: Any, last: bool,
) -> None:  # fmt: skip
    """Take one delta off the predictions, in place, and widen what they may be wrong by.

    Args:
        last: whether the merge added it last, so that its rounding is in ``radius`` already.
    """
    if flags & ROUND_TO_SOURCE:
        for i in range(found):
            radius[i] += half_spacing(prediction[i], source_kind)
    if flags & ROW_FACTOR:
        inverse = 1.0 / np.float64(factors[row_at])
        for i in range(found):
            prediction[i] *= inverse
            radius[i] *= abs(inverse)
    if flags & COLUMN_FACTOR:
        for i in range(found):
            inverse = 1.0 / np.float64(factors[column_at + index[i]])
            prediction[i] *= inverse
            radius[i] *= abs(inverse)
    if flags or not last:
        for i in range(found):
            radius[i] += abs(prediction[i]) * PRECISION
    for i in range(found):
        prediction[i] -= np.float64(scale) * np.float64(acc[of + index[i]])


@njit(**INNER)
def predict(
    stored: Any, of: Any, accs: Any, table: Any, scales: Any, factors: Any, row: Any, column: Any,
    kind: int, out_kind: int, index: Any, found: Any, prediction: Any, radius: Any,
) -> None:  # fmt: skip
    """Set predictions and radii of the listed weights of a row; else as :func:`_foresight`."""
    for i in range(found):
        prediction[i] = np.float64(stored[of + index[i]])
        radius[i] = half_spacing(prediction[i], out_kind)
    deltas = np.int64(table.shape[0])
    for e in range(deltas):
        d = deltas - 1 - e
        f_at = np.uintp(table[d, FACTOR])
        _undo_delta(
            prediction, radius, accs, np.uintp(d) * np.uintp(ROWS * BLOCK) + of, scales[d],
            table[d, FLAGS], factors, f_at + row, f_at + column, kind, index, found, e == 0,
        )  # fmt: skip
