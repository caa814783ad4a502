"""From codes to values and back: one compiled loop for every format whose values lie on a grid.

A code ``c`` stands for ``((levels[c] - zero) * scale) * post``, in float32, one rounding per
operation, and rounded once more to the dtype of the weights. Formats differ in their levels (a
table of 16 or 256), in how far a scale and a zero reach, and in how codes are packed, which is not
known here. How far a scale reaches is said by *runs*: it serves ``row_run`` rows by ``run``
columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.numerics.arrays import Bytes, Floats
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import BF16, ENTRY, F16, F32, INNER, bfloat16_bits
from regraft.numerics.intrinsics import (
    float_of,
    float_to_half,
    half_to_float,
)


@dataclass(frozen=True)
class Levels:
    """What the codes of a format stand for, before zero and scale.

    Attributes:
        values: float32, by code.
        order: codes of finite levels in ascending order, each level once.
        rank: place in ``order``, by code; of a level that is there twice, that of its equal.
        padded: ``order`` with its first and last code once more.
        middles: float32, half way between neighbours; then infinity, up to one less than a power
            of two.
        post: a second factor after the scale; 1 for none.
    """

    values: Floats
    order: Bytes
    rank: npt.NDArray[np.int32]
    padded: Bytes
    middles: Floats
    post: float = 1.0

    @property
    def zero(self) -> np.uint8:
        """The code that stands for zero."""
        return np.uint8(np.flatnonzero(self.values == 0)[0])

    @property
    def ascend(self) -> bool:
        """Whether the codes of the levels in ascending order are 0, 1, 2 and so on."""
        return bool(np.array_equal(self.order, np.arange(self.order.size)))

    @classmethod
    def of(cls, values: npt.ArrayLike, post: float = 1.0) -> Levels:
        """Sort a table of values; NaN and infinity are levels that nothing is rounded to."""
        table = np.asarray(values, np.float32)
        finite = np.flatnonzero(np.isfinite(table))
        _, first = np.unique(table[finite], return_index=True)
        order = finite[first]
        rank = np.zeros(len(table), np.int32)
        rank[finite] = np.searchsorted(table[order], table[finite]).astype(np.int32)
        codes = order.astype(np.uint8)
        levels = table[order].astype(np.float64)
        middles = np.full(2 ** int(len(order) - 1).bit_length() - 1, np.inf, np.float32)
        middles[: len(order) - 1] = (levels[:-1] + levels[1:]) / 2
        padded = np.concatenate([codes[:1], codes, codes[-1:]])
        return cls(table, codes, rank, padded, middles, post)


@dataclass(frozen=True)
class Codes:
    """A block of a quantized weight: its codes, and the scales that reach into it.

    Attributes:
        codes: uint8 ``(rows * columns,)``, row by row.
        rows, columns: of the block. A flat range of a weight is a block of one row.
        levels: what codes stand for.
        scales: float32, ``(ceil rows / row_run, scale_width)``, flat.
        zeros: float32 likewise; empty for none.
        scale_width: scales in a row of scales.
        run, row_run: columns and rows that share a scale.
        first, first_row: columns and rows of the first run that lie before the block.
    """

    codes: Bytes
    rows: int
    columns: int
    levels: Levels
    scales: Floats
    zeros: Floats
    scale_width: int
    run: int
    row_run: int = 1
    first: int = 0
    first_row: int = 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the kernels take, in their order."""
        levels = self.levels
        return (
            self.codes, self.rows, self.columns, levels.values, np.float32(levels.post),
            self.scales, self.zeros, self.scale_width, self.run, self.row_run, self.first,
            self.first_row,
        )  # fmt: skip


NO_ZEROS: Floats = np.empty(0, np.float32)


@njit(inline="always")
def stored(value: Any, kind: Any) -> Any:
    """Return a float32 rounded to a dtype."""
    if kind == BF16:
        return float_of(np.uint32(bfloat16_bits(value)) << np.uint32(16))
    if kind == F16:
        return half_to_float(float_to_half(value))
    return value


@njit(inline="always")
def value_of(level: Any, zero: Any, scale: Any, post: Any) -> Any:
    """Return what a level stands for, in float32."""
    return np.float32(np.float32(np.float32(level - zero) * scale) * post)


@njit(**INNER)
def _dequantize_run(
    codes: Any, at: Any, n: Any, levels: Any, zero: Any, scale: Any, post: Any, out16: Any,
    out32: Any, kind: int, table16: Any, table32: Any,
) -> None:  # fmt: skip
    """Set ``n`` values that share a scale: what codes stand for is computed once, if they are few.

    A table of 16 that was rounded already gives a value by one load.
    """
    small = levels.shape[0] == 16 and n >= 16
    if small:
        for c in range(np.uintp(16)):
            value = value_of(levels[c], zero, scale, post)
            if kind == BF16:
                table16[c] = bfloat16_bits(value)
            elif kind == F16:
                table16[c] = float_to_half(value)
            else:
                table32[c] = value
        if kind != F32:
            for j in range(n):
                out16[at + j] = table16[codes[at + j] & np.uint8(15)]
        else:
            for j in range(n):
                out32[at + j] = table32[codes[at + j] & np.uint8(15)]
    elif kind == BF16:
        for j in range(n):
            out16[at + j] = bfloat16_bits(value_of(levels[codes[at + j]], zero, scale, post))
    elif kind == F16:
        for j in range(n):
            out16[at + j] = float_to_half(value_of(levels[codes[at + j]], zero, scale, post))
    else:
        for j in range(n):
            out32[at + j] = value_of(levels[codes[at + j]], zero, scale, post)


@njit(**INNER)
def _dequantize_each(
    codes: Any, at: Any, n: Any, levels: Any, zeros: Any, scales: Any, line: Any, post: Any,
    out16: Any, out32: Any, kind: int,
) -> None:  # fmt: skip
    """Set ``n`` values of a row whose columns have scales of their own."""
    some = zeros.shape[0] > 0
    if kind == BF16:
        for j in range(n):
            zero = zeros[line + j] if some else np.float32(0)
            value = value_of(levels[codes[at + j]], zero, scales[line + j], post)
            out16[at + j] = bfloat16_bits(value)
    elif kind == F16:
        for j in range(n):
            zero = zeros[line + j] if some else np.float32(0)
            value = value_of(levels[codes[at + j]], zero, scales[line + j], post)
            out16[at + j] = float_to_half(value)
    else:
        for j in range(n):
            zero = zeros[line + j] if some else np.float32(0)
            out32[at + j] = value_of(levels[codes[at + j]], zero, scales[line + j], post)


@njit(**ENTRY)
def dequantize(
    codes: Any, row_count: int, column_count: int, levels: Any, post: Any, scales: Any, zeros: Any,
    scale_width: int, run_: int, row_run: int, first_: int, first_row: int, out16: Any, out32: Any,
    kind: int,
) -> None:  # fmt: skip
    """Set the values of a block.

    Args:
        codes, ..., first_row: as :attr:`Codes.arguments`.
        out16, out32, kind: where the values go; see :mod:`regraft.numerics.conversions`.
    """
    table16, table32 = np.empty(16, np.uint16), np.empty(16, np.float32)
    columns, run, first = np.uintp(column_count), np.uintp(run_), np.uintp(first_)
    has_zeros = zeros.shape[0] > 0
    for i in range(np.uintp(row_count)):
        line = np.uintp((np.int64(i) + first_row) // row_run) * np.uintp(scale_width)
        if run_ == 1:
            _dequantize_each(
                codes, i * columns, columns, levels, zeros, scales, line, post, out16, out32, kind
            )
            continue
        for t in range((first + columns + run - np.uintp(1)) // run):
            low = max(t * run, first) - first
            high = min((t + np.uintp(1)) * run - first, columns)
            zero = zeros[line + t] if has_zeros else np.float32(0)
            _dequantize_run(
                codes, i * columns + low, high - low, levels, zero, scales[line + t], post, out16,
                out32, kind, table16, table32,
            )  # fmt: skip


def values_of(block: Codes, x16: Any, x32: Any, kind: int) -> None:
    """Set a block's values in a buffer, seen as the kernels take weights."""
    dequantize(*block.arguments, x16, x32, kind)
