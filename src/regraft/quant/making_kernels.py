"""The compiled loops that make codes of plain weights: magnitudes, codes, and scales of scales.

Each gives the bytes of the library whose format it is; see :mod:`regraft.quant.making`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.numerics.compiling import njit
from regraft.numerics.conversions import ENTRY, INNER
from regraft.numerics.intrinsics import (
    bits_of,
    float_of,
    float_to_half,
    fma,
    half_to_float,
)

LUT_SIZE = 65536
"""Entries of the table by which bitsandbytes' C library looks up 8-bit codes."""

_LANES, _ROWS, _SUMS = 8, 4, 4

_PIECE = 2048
"""Elements that are scaled and then counted: they stay in the first cache."""


@njit(**INNER)
def _largest(values: Any, at: Any, n: Any) -> Any:
    """Return the bits of the largest magnitude of ``n`` values; NaN is above all."""
    largest = np.uint32(0)
    for j in range(n):
        bits = bits_of(values[at + j]) & np.uint32(0x7FFFFFFF)
        largest = bits if bits > largest else largest
    return largest


@njit(**ENTRY, _nrt=False)
def magnitudes(
    values: Any, row_count: int, column_count: int, scale_width: int, run_: int, row_run: int,
    first_: int, first_row: int, out: Any,
) -> None:  # fmt: skip
    """Raise ``out``, the bits of largest magnitudes, to those of a block's values.

    Args:
        values: float32 ``(rows * columns,)``.
        scale_width, ..., first_row: as in :class:`regraft.quant.grid.Codes`.
        out: uint32 ``(ceil rows / row_run, scale_width)``, flat.
    """
    columns, run, first = np.uintp(column_count), np.uintp(run_), np.uintp(first_)
    one = np.uintp(1)
    for i in range(np.uintp(row_count)):
        line = np.uintp((np.int64(i) + first_row) // row_run) * np.uintp(scale_width)
        for t in range((first + columns + run - one) // run):
            low = max(t * run, first) - first
            high = min((t + one) * run - first, columns)
            largest = _largest(values, i * columns + low, high - low)
            out[line + t] = max(out[line + t], largest)


# -- 4 bits ----------------------------------------------------------------------------------------


@njit(**INNER)
def _scaled(values: Any, at: Any, n: Any, by: Any, divide: Any, out: Any, to: Any) -> None:
    """Set ``out`` to values in units of their scale."""
    if divide:
        for j in range(n):
            out[to + j] = np.float32(values[at + j] / by)
    else:
        for j in range(n):
            out[to + j] = np.float32(values[at + j] * by)


@njit(**INNER)
def _count_bounds(s: Any, n: Any, b: Any, counts: Any) -> None:
    """Set how many bounds each of ``n`` values is above.

    All are looked at, and none is a branch: two instructions for each, for a vector of values.
    Counts are as wide as values are. LLVM would make bytes of each comparison, not of their sum.
    """
    b0, b1, b2, b3, b4, b5, b6, b7 = b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]
    b8, b9, b10, b11, b12, b13, b14 = b[8], b[9], b[10], b[11], b[12], b[13], b[14]
    for j in range(n):
        x = s[j]
        k = np.uint32(b0 < x) + np.uint32(b1 < x) + np.uint32(b2 < x) + np.uint32(b3 < x)
        k += np.uint32(b4 < x) + np.uint32(b5 < x) + np.uint32(b6 < x) + np.uint32(b7 < x)
        k += np.uint32(b8 < x) + np.uint32(b9 < x) + np.uint32(b10 < x) + np.uint32(b11 < x)
        counts[j] = k + np.uint32(b12 < x) + np.uint32(b13 < x) + np.uint32(b14 < x)


@njit(**ENTRY)
def four_bit_codes(
    values: Any, scales: Any, run_: int, first_: int, ragged: int, bounds: Any, order: Any, out: Any
) -> None:
    """Set the codes of a flat range of a weight, as bitsandbytes' ``quantize_4bit`` has them.

    A value is multiplied by the reciprocal of its block's scale, not below 1e-38; in a last block
    that is not full it is divided by the scale.

    Args:
        values: float32 ``(n,)``, no NaN.
        scales: float32, of the blocks that the range reaches into.
        run_, first_: elements of a block, and how many of the first one lie before the range.
        ragged: element of the range at which a last block that is not full begins; ``n`` for none.
        bounds: float32 ``(15,)``, halfway between levels, ascending.
        order: uint8 ``(16,)``, codes in the order of their levels; empty where that is 0 to 15.
        out: uint8 ``(n,)``.
    """
    n, run, first, one = np.uintp(values.shape[0]), np.uintp(run_), np.uintp(first_), np.uintp(1)
    piece = np.uintp(_PIECE)
    scaled, counts = np.empty(_PIECE, np.float32), np.empty(_PIECE, np.uint32)
    for begin in range(np.uintp(0), n, piece):
        end = min(begin + piece, n)
        for t in range((first + begin) // run, (first + end + run - one) // run):
            low = max(t * run, first + begin) - first
            high = min((t + one) * run - first, end)
            scale = max(scales[t], np.float32(1e-38))
            last = low >= np.uintp(ragged)
            by = scale if last else np.float32(np.float32(1) / scale)
            _scaled(values, low, high - low, by, last, scaled, low - begin)
        _count_bounds(scaled, end - begin, bounds, counts)
        if order.shape[0]:
            for j in range(end - begin):
                out[begin + j] = order[np.uintp(counts[j])]
        else:
            for j in range(end - begin):
                out[begin + j] = np.uint8(counts[j])


# -- 8 bits ----------------------------------------------------------------------------------------


@njit(**INNER)
def _int8_run(values: Any, at: Any, n: Any, by: Any, out: Any) -> None:
    """Adding 1.5 * 2^23 rounds to an integer, to even, and leaves it in the low bits."""
    for j in range(n):
        half = half_to_float(float_to_half(values[at + j]))
        moved = np.float32(np.float32(half * by) + np.float32(12582912))
        out[at + j] = np.uint8(bits_of(moved) & np.uint32(0xFF))


@njit(**ENTRY, _nrt=False)
def int8_codes(values: Any, row_count: int, column_count: int, scales: Any, out: Any) -> None:
    """Set ``round(float16(value) * ((1 / scale) * 127))``, a scale for each row; 0 for 0 / 0."""
    columns = np.uintp(column_count)
    for i in range(np.uintp(row_count)):
        by = np.float32(np.float32(np.float32(1) / scales[i]) * np.float32(127))
        _int8_run(values, i * columns, columns, by, out)


@njit(**INNER)
def _e4m3_run(values: Any, at: Any, n: Any, by: Any, out: Any) -> None:
    """Set ``n`` codes of E4M3, to nearest even; what is beyond 448 becomes 448.

    From 2^-6 on the lower 20 bits are rounded away and the exponent is moved; below, adding 2^14
    rounds to a multiple of 2^-9 and leaves it in the low bits.
    """
    for j in range(n):
        bits = bits_of(np.float32(values[at + j] * by))
        size = bits & np.uint32(0x7FFFFFFF)
        nan = size > np.uint32(0x7F800000)
        size = np.uint32(0x43E00000) if size > np.uint32(0x43E00000) else size
        odd = (size >> np.uint32(20)) & np.uint32(1)
        usual = np.uint32(size - np.uint32(0x3C000000) + np.uint32(0x7FFFF) + odd) >> np.uint32(20)
        small = bits_of(np.float32(float_of(size) + np.float32(16384))) & np.uint32(0xFF)
        code = small if size < np.uint32(0x3C800000) else usual
        code = np.uint32(0x7F) if nan else code
        out[at + j] = np.uint8(code | ((bits >> np.uint32(24)) & np.uint32(0x80)))


@njit(**ENTRY, _nrt=False)
def e4m3_codes(
    values: Any, row_count: int, column_count: int, factors: Any, scale_width: int, run_: int,
    row_run: int, first_: int, first_row: int, out: Any,
) -> None:  # fmt: skip
    """Set ``E4M3(value * factor)``; ``factors`` reach as scales do in a block of codes."""
    columns, run, first = np.uintp(column_count), np.uintp(run_), np.uintp(first_)
    one = np.uintp(1)
    for i in range(np.uintp(row_count)):
        line = np.uintp((np.int64(i) + first_row) // row_run) * np.uintp(scale_width)
        for t in range((first + columns + run - one) // run):
            low = max(t * run, first) - first
            high = min((t + one) * run - first, columns)
            _e4m3_run(values, i * columns + low, high - low, factors[line + t], out)


# -- scales of scales ------------------------------------------------------------------------------


@njit(**INNER)
def _cascade(x: Any, lanes: Any, size: Any, sums: Any) -> None:
    """Add up the four interleaved rows of ``size`` vectors each: see :func:`torch_sum`."""
    power, width = np.int64(0), _ROWS * lanes
    while (np.int64(1) << power) < size:
        power += 1
    power = max(np.int64(4), power // _SUMS)
    step, i = np.int64(1) << power, np.int64(0)
    sums[:] = np.float32(0)
    while i < size:
        full = i + step <= size
        for _ in range(step if full else size - i):
            for k in range(width):
                sums[k] += x[i * width + k]
            i += 1
        level = 1
        while full and level < _SUMS:
            for k in range(width):
                sums[level * width + k] += sums[(level - 1) * width + k]
                sums[(level - 1) * width + k] = np.float32(0)
            full = i & ((step - 1) << (level * power)) == 0
            level += 1
    for level in range(1, _SUMS):
        for k in range(width):
            sums[k] += sums[level * width + k]


@njit(**ENTRY)
def torch_sum(x: Any) -> Any:
    """Return the float32 sum of ``x`` in the order in which torch adds on one thread of a CPU.

    ``cascade_sum`` of ATen's SumKernel.cpp, AVX2's vectors of 8: four rows of vectors side by side,
    each added up in groups of 16 or more, groups of groups, and so on four levels up.
    """
    n = np.int64(x.shape[0])
    lanes = np.int64(_LANES if n >= _LANES else 1)
    vectors = n // lanes
    sums = np.empty(_SUMS * _ROWS * lanes, np.float32)
    _cascade(x, lanes, vectors // _ROWS, sums)
    for i in range(vectors // _ROWS * _ROWS, vectors):
        for k in range(lanes):
            sums[k] += x[i * lanes + k]
    for row in range(1, _ROWS):
        for k in range(lanes):
            sums[k] += sums[row * lanes + k]
    total = np.float32(0)
    for j in range(vectors * lanes, n):
        total += x[j]
    for k in range(lanes):
        total += sums[k]
    return total


@njit(**ENTRY, _nrt=False)
def eight_bit_codes(values: Any, blocksize: int, lut: Any, codes: Any, scales: Any) -> None:
    """Quantize in blocks by a map, as the C library of bitsandbytes' ``quantize_blockwise`` does.

    A value times the reciprocal of its block's scale is rounded to one of 65536 even steps from -1
    to 1, and a table says which code that is. In a block of zeros it is code 0.

    Args:
        values: float32 ``(n,)``.
        blocksize: values that share a scale.
        lut: uint8 ``(65536,)``.
        codes, scales: uint8 ``(n,)`` and float32 ``(ceil n / blocksize,)``, set.
    """
    n, size = np.int64(values.shape[0]), np.int64(blocksize)
    for t in range(scales.shape[0]):
        low, high = t * size, min((t + 1) * size, n)
        scale = float_of(_largest(values, np.uintp(low), np.uintp(high - low)))
        scales[t] = scale
        by = np.float32(np.float32(1) / scale)
        for j in range(low, high):
            codes[j] = _code_by(lut, np.float32(values[j] * by)) if scale != 0 else np.uint8(0)


@njit(inline="always")
def _code_by(lut: Any, value: Any) -> Any:
    """Return a code from the table; what is not a number has the first one."""
    if value != value:
        return lut[0]
    near = min(max(value, np.float32(-1)), np.float32(1))
    half = np.float32(np.float32(1 + near) * np.float32(0.5))
    return lut[np.int64(fma(half, np.float32(65535), np.float32(0.5)))]
