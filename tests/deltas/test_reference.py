"""The reference that the other tests measure by is right itself: it agrees with exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltas import reference

float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest_float32(value: Fraction) -> np.float32:
    """Return the float32 nearest to a fraction, ties to even, found by comparing neighbours."""
    with np.errstate(over="ignore"):
        guess = np.float32(float(value)) if abs(value) < 2**1000 else np.float32(math.inf)
        below, above = (np.nextafter(guess, np.float32(end)) for end in (-math.inf, math.inf))
    candidates = [guess, below, above]
    finite = [c for c in candidates if np.isfinite(c)]
    if abs(value) >= Fraction(2) ** 128 - Fraction(2) ** 103:  # halfway to what would be next
        return np.float32(math.copysign(math.inf, value))
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.uint32)) & 1))


@given(float32, float32, float32)
def test_the_fused_operation_rounds_the_exact_value_once(a: float, b: float, c: float) -> None:
    found = reference.fma(np.float32(a), np.float32(b), np.float32(c))[()]
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        assert found == 0
    else:
        assert found == nearest_float32(exact)


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        # a product whose float32 neighbour and the sum's differ by the second rounding
        (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60, 1 + 2.0**-11 + 2.0**-23),
        (1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-60), 1 + 2.0**-11),
        (2.0**-100, 2.0**-49, 0.0, 2.0**-149),
        (2.0**-100, 2.0**-50, 0.0, 0.0),
        (2.0**-100, 2.0**-50, 2.0**-149, 2.0**-148),
        (-0.0, 1.0, -0.0, -0.0),
    ],
)
def test_the_fused_operation_at_its_edges(a: float, b: float, c: float, expected: float) -> None:
    found = reference.fma(np.float32(a), np.float32(b), np.float32(c))[()]
    assert (found, math.copysign(1, found)) == (expected, math.copysign(1, expected))


def test_the_product_is_not_what_separate_roundings_give() -> None:
    draw = np.random.default_rng(0)
    left, right = (draw.normal(size=s).astype(np.float32) for s in ((8, 9), (9, 64)))
    separate = np.zeros((8, 64), np.float32)
    for k in range(9):
        separate += left[:, k, None] * right[None, k]
    fused = reference.product(left, right)
    assert np.count_nonzero(fused != separate) > 100
    np.testing.assert_allclose(fused, left.astype(np.float64) @ right, rtol=1e-4, atol=1e-5)


def test_squares_are_added_from_left_to_right() -> None:
    values = np.array([[1e8, 1.0, 1.0], [1.0, 1.0, 1e8]], np.float32)
    assert list(reference.ascending_squares(values)) == [1e16, 1e16 + 2]
