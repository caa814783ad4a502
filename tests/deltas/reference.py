"""The arithmetic contract, version 1, written out plainly: slow, and with no tricks.

A fused multiply-add is emulated exactly: the product of two float32 is exact in float64, and the
sum with a third number is rounded to odd in float64 before it is rounded to float32, so that it is
rounded once in effect (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

Floats = np.ndarray

STORED = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
"""The numpy dtype of each dtype that weights are stored in."""


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """Return a * b + c with one rounding, elementwise, for float32 arguments."""
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.float64(a) * np.float64(b)
        return rounded_sum(product, np.float64(c))


def rounded_sum(x: Floats, y: Floats) -> Floats:
    """Return x + y, two float64 arrays, rounded to float32 once."""
    total = x + y
    back = total - x
    lost = (x - (total - back)) + (y - back)  # Knuth: total + lost is x + y exactly
    even = total.view(np.int64) & 1 == 0
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    inexact = np.isfinite(total) & (lost != 0)
    return np.where(inexact & even, odd, total).astype(np.float32)


def product(left: Floats, right: Floats) -> Floats:
    """Return left @ right for (rows, r) and (r, columns): k ascending, fused, float32."""
    acc = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for k in range(left.shape[1]):
        acc = fma(left[:, k, None], right[None, k, :], acc)
    return acc


def scale_of(alpha: float, rank: int, weight: float = 1.0) -> np.float32:
    """Return weight * alpha / r, computed in float64 and rounded to float32 once."""
    return np.float32(weight * (alpha / rank))


def add(weight: Floats, scale: np.float32, left: Floats, right: Floats) -> Floats:
    """Return W + scale * left @ right in float32, W of any stored dtype."""
    return fma(scale, product(left, right), weight.astype(np.float32))


def merged(
    weight: Floats, deltas: Sequence[tuple[np.float32, Floats, Floats]], dtype: str
) -> Floats:
    """Return a weight with its deltas added in order and rounded once to a stored dtype."""
    total = weight.astype(np.float32)
    for scale, left, right in deltas:
        total = add(total, scale, left, right)
    return rounded(total, dtype)


def rounded(values: Floats, dtype: str) -> Floats:
    """Return float32 values rounded to a stored dtype, to nearest even, by its own library."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(STORED[dtype])


def ascending_squares(values: Floats) -> Floats:
    """Return the sum of squares of each row in float64, added from left to right."""
    return np.cumsum(np.square(values.astype(np.float64)), axis=1)[:, -1]


def bits(values: Floats) -> Floats:
    """Return the bit patterns of an array."""
    return values.view(np.uint32 if values.dtype.itemsize == 4 else np.uint16)


def assert_same_bits(found: Floats, expected: Floats) -> None:
    """Fail unless both arrays have one dtype, shape and bits; a NaN may be any NaN."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    np.testing.assert_array_equal(bits(found)[~nan], bits(expected)[~nan])
