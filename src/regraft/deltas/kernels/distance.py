"""How far stored values lie from others of the same shape: what ``diff`` says of a tensor.

Floats are compared by value, everything else by bytes. An element takes part in the norms, the
largest difference and the distance in ulps only where both values are finite numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.deltas.kernels.inner import BLOCK, ZERO
from regraft.deltas.kernels.weights import Bytes, Weights
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import ENTRY, F32, INNER, decode
from regraft.numerics.intrinsics import add_square, bits_of
from regraft.tensors import DTYPES, WORKING_DTYPES

VALUE_DTYPES = (*WORKING_DTYPES, "F64")
"""Dtypes that are compared by value, each with each."""

_SLICE = 96 * 2**10
"""Bytes whose bits are spread out at a time; whole elements of every dtype below a byte."""


@dataclass
class Distance:
    """How far Y is from X; that of two pieces adds up to that of both.

    Attributes:
        changed: elements that differ: in their bits, or in value where the dtypes differ.
        not_finite: of these, the ones where X or Y is NaN or infinite.
        weight: sum of the squares of X.
        delta: sum of the squares of Y - X.
        largest: largest \\|Y - X\\|.
        ulps: largest distance in units in the last place; 0 unless both have one working dtype.
    """

    changed: int = 0
    not_finite: int = 0
    weight: float = 0.0
    delta: float = 0.0
    largest: float = 0.0
    ulps: int = 0

    def add(self, other: Distance) -> None:
        """Take another piece of the same tensor in."""
        self.changed += other.changed
        self.not_finite += other.not_finite
        self.weight += other.weight
        self.delta += other.delta
        self.largest = max(self.largest, other.largest)
        self.ulps = max(self.ulps, other.ulps)


def distance(x: Bytes, x_dtype: str, y: Bytes, y_dtype: str) -> Distance:
    """Return how far the elements of Y are from those of X.

    Args:
        x: the bytes of some elements, at an address that suits their dtype.
        x_dtype: their dtype.
        y: the bytes of as many elements.
        y_dtype: the same dtype, or another one if both are in :data:`VALUE_DTYPES`.
    """
    if x_dtype in WORKING_DTYPES and y_dtype in WORKING_DTYPES:
        return _of_weights(Weights.of_bytes(x, x_dtype), Weights.of_bytes(y, y_dtype))
    if x_dtype in VALUE_DTYPES and y_dtype in VALUE_DTYPES:
        return _of_doubles(_doubles(x, x_dtype), _doubles(y, y_dtype))
    return Distance(changed=_differing(x, y, DTYPES[x_dtype].bits))


# ---- float32, bfloat16, float16


def _of_weights(x: Weights, y: Weights) -> Distance:
    sums, counts = np.zeros(3, np.float64), np.zeros(3, np.int64)
    measure(*x.arguments, *y.arguments, max(x.x16.size, x.x32.size), sums, counts)
    changed, not_finite, ulps = map(int, counts)
    weight, delta, largest = map(float, sums)
    return Distance(changed, not_finite, weight, delta, largest, ulps)


@njit(**INNER)
def _patterns(x16: Any, at: Any, values: Any, raw: bool, out: Any, n: Any) -> None:
    """Set ``out`` to the bits of ``n`` elements, those of 16 bits in the upper half."""
    if raw:
        for j in range(n):
            out[j] = np.uint32(x16[at + j]) << np.uint32(16)
    else:
        for j in range(n):
            out[j] = bits_of(values[j])


@njit(**INNER)
def _account(
    xs: Any, ys: Any, x_bits: Any, y_bits: Any, far: Any, far_bits: Any, sums: Any, counts: Any,
    n: Any,
) -> Any:  # fmt: skip
    """Add a block to the sums and counts; return its largest distance between patterns.

    Args:
        xs, ys: the values.
        x_bits, y_bits: their patterns; ulps are counted between these.
        far, far_bits: room for the differences, and the same memory as int64.
    """
    infinity, magnitude = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)
    weight, delta = np.float64(0), np.float64(0)
    changed, odd, ulps = np.uint32(0), np.uint32(0), np.uint32(0)
    for j in range(n):
        p, q = x_bits[j], y_bits[j]
        finite = ((bits_of(xs[j]) & infinity) != infinity) & (
            (bits_of(ys[j]) & infinity) != infinity
        )
        x = np.float64(xs[j]) if finite else np.float64(0)
        d = np.float64(ys[j]) - np.float64(xs[j]) if finite else np.float64(0)
        weight = add_square(weight, x)
        delta = add_square(delta, d)
        far[j] = abs(d)
        changed = np.uint32(changed + np.uint32(p != q))
        odd = np.uint32(odd + np.uint32((p != q) & (not finite)))
        # In the order of the numbers: both zeros are 0, and neighbours are one apart.
        a = np.int64(p & magnitude) * (np.int64(1) - np.int64(2) * np.int64(p >> np.uint32(31)))
        b = np.int64(q & magnitude) * (np.int64(1) - np.int64(2) * np.int64(q >> np.uint32(31)))
        apart = np.uint32(abs(a - b)) if finite else np.uint32(0)
        ulps = max(ulps, apart)
    largest = np.int64(0)
    for j in range(n):  # numbers that are not negative have the order of their bits
        largest = max(largest, far_bits[j])
    far_bits[0] = largest
    sums[0] += weight
    sums[1] += delta
    sums[2] = max(sums[2], far[0])
    counts[0] += np.int64(changed)
    counts[1] += np.int64(odd)
    return ulps


@njit(**ENTRY)
def measure(
    x16: Any, x32: Any, kind: int, y16: Any, y32: Any, y_kind: int, total: int, sums: Any,
    counts: Any,
) -> None:  # fmt: skip
    """Measure ``total`` weights against as many others.

    Args:
        x16, x32, kind: X, as :mod:`regraft.deltas.kernels.inner` lays weights out.
        y16, y32, y_kind: Y, likewise.
        sums: float64 ``(3,)``: |X|^2 and |Y-X|^2, added to, and the largest |Y-X|.
        counts: int64 ``(3,)``: changed and not finite, added to, and the largest ulps.
    """
    xs, ys = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    x_bits, y_bits = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    far = np.empty(BLOCK, np.float64)
    far_bits = far.view(np.int64)
    block, count = np.uintp(BLOCK), np.uintp(total)
    raw = kind == y_kind and kind != F32
    ulps = np.uint32(0)
    for b in range((count + block - np.uintp(1)) // block):
        start = b * block
        n = min(block, count - start)
        decode(x16, x32, kind, start, xs, ZERO, n)
        decode(y16, y32, y_kind, start, ys, ZERO, n)
        _patterns(x16, start, xs, raw, x_bits, n)
        _patterns(y16, start, ys, raw, y_bits, n)
        found = _account(xs, ys, x_bits, y_bits, far, far_bits, sums, counts, n)
        ulps = max(ulps, found)
    if raw:
        ulps = ulps >> np.uint32(16)
    if kind == y_kind:
        counts[2] = max(counts[2], np.int64(ulps))


# ---- float64, and everything else


def _doubles(raw: Bytes, dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "F64":
        return raw.view(np.float64)
    return Weights.of_bytes(raw, dtype).floats().astype(np.float64)


def _of_doubles(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Distance:
    differs = x.view(np.uint64) != y.view(np.uint64)
    finite = np.isfinite(x) & np.isfinite(y)
    with np.errstate(over="ignore", invalid="ignore"):
        apart = np.where(finite, np.abs(y - x), 0.0)
        known = np.where(finite, x, 0.0)
        return Distance(
            changed=int(np.count_nonzero(differs)),
            not_finite=int(np.count_nonzero(differs & ~finite)),
            weight=float(np.sum(known * known)),
            delta=float(np.sum(apart * apart)),
            largest=float(apart.max(initial=0.0)),
        )


def _differing(x: Bytes, y: Bytes, bits: int) -> int:
    """Return how many elements of ``bits`` bits differ."""
    if bits >= 8:
        unsigned = np.dtype(f"u{bits // 8}")
        return int(np.count_nonzero(x.view(unsigned) != y.view(unsigned)))
    return sum(
        _differing_below_a_byte(x[at : at + _SLICE] ^ y[at : at + _SLICE], bits)
        for at in range(0, x.size, _SLICE)
    )


def _differing_below_a_byte(apart: Bytes, bits: int) -> int:
    spread = np.unpackbits(apart, bitorder="little")
    whole = spread[: spread.size // bits * bits].reshape(-1, bits)
    return int(np.count_nonzero(whole.any(axis=1)))
