"""Rounding from one dtype to another is the one that numpy and ml_dtypes do, for every value."""

from __future__ import annotations

import numpy as np
import pytest

from deltas.bench import add_one, merge, pair
from deltas.reference import STORED, assert_same_bits, rounded
from merging.toys import draw
from regraft.errors import NumericError
from regraft.tensors import DTYPES

ALL_16_BITS = np.arange(2**16, dtype=np.uint16)
LARGEST = {"F32": (2 - 2.0**-23) * 2.0**127, "BF16": (2 - 2.0**-7) * 2.0**127, "F16": 65504.0}
HALF_A_STEP = {"F32": 2.0**103, "BF16": 2.0**119, "F16": 16.0}  # beyond the largest: a tie


def around(dtype: str) -> np.ndarray:
    """Return the float32 values at which rounding to a 16-bit dtype decides.

    For every value of the dtype: itself, the point halfway to the next one, and the float32
    neighbours of both.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        values = ALL_16_BITS.view(STORED[dtype]).astype(np.float32)
        nearest = values[np.isfinite(values)].astype(np.float64)
        up = np.sort(nearest)
        middle = np.float32((up[1:] + up[:-1]) / 2)
        points = np.concatenate([np.float32(up), middle])
        low = np.nextafter(points, np.float32(-np.inf))
        return np.concatenate([points, low, np.nextafter(points, np.float32(np.inf))])


def held(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the values that stay finite, or were not to begin with, in a dtype."""
    with np.errstate(invalid="ignore"):
        keep = np.isfinite(rounded(values.astype(np.float32), dtype).astype(np.float32))
        return values[keep | ~np.isfinite(values.astype(np.float32))]


def converted(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values as a merge that leaves them alone writes them in another dtype."""
    weights = {"m.weight": draw(2, 2), "other": values}
    adapter = (pair("m", draw(2, 1), draw(1, 2)), {"r": 1, "target_modules": ["m"]})
    return merge(weights, adapter, dtype=DTYPES[dtype].config_name)["other"]


@pytest.mark.parametrize("target", STORED)
@pytest.mark.parametrize("source", ["BF16", "F16"])
def test_every_16_bit_value_is_converted_as_the_libraries_do(source: str, target: str) -> None:
    values = held(ALL_16_BITS.view(STORED[source]), target)
    assert values.size > 3e4
    assert_same_bits(converted(values, target), rounded(values.astype(np.float32), target))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_float32_is_rounded_to_nearest_even(dtype: str) -> None:
    values = held(around(dtype), dtype)
    assert_same_bits(converted(values, dtype), rounded(values, dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_merged_value_is_rounded_the_same_way(dtype: str) -> None:
    values = held(around(dtype), dtype)
    values = values[values != 0]  # a merge adds +0 here, which would change the sign of -0
    assert_same_bits(add_one(values, np.zeros_like(values), DTYPES[dtype].config_name).ravel(),
                     rounded(values, dtype))  # fmt: skip


STEP = {"BF16": 2.0**-7, "F16": 2.0**-10}  # between 1 and the next value


@pytest.mark.parametrize("dtype", STEP)
def test_ties_go_to_the_even_neighbour(dtype: str) -> None:
    step = STEP[dtype]
    one = np.array([1, 1, 1, 1 + step, 1 + step, -1, -1 - step], STORED[dtype])
    deltas = step * np.array([0.5, 0.5 + 2.0**-10, 1.5, 0.5, 0.5 - 2.0**-10, -0.5, -0.5])
    expected = np.array([1, 1 + step, 1 + 2 * step, 1 + 2 * step, 1 + step, -1, -1 - 2 * step])
    found = add_one(one, deltas.astype(np.float32)).ravel()
    assert_same_bits(found, expected.astype(STORED[dtype]))


SMALLEST = {"F32": 2.0**-149, "BF16": 2.0**-133, "F16": 2.0**-24}


@pytest.mark.parametrize("dtype", SMALLEST)
def test_subnormal_numbers_are_added_and_not_flushed(dtype: str) -> None:
    tiny = SMALLEST[dtype]
    weight = np.array([tiny, tiny, 3 * tiny, -tiny, 0], STORED[dtype])
    delta = np.array([tiny, -tiny, tiny, tiny / 2, tiny], np.float32)
    half = 0 if dtype != "F32" else -1  # -tiny + tiny / 2 is a tie; in float32, tiny / 2 is 0
    expected = np.array([2, 0, 4, half, 1]) * tiny
    np.testing.assert_array_equal(add_one(weight, delta).ravel().astype(np.float64), expected)


@pytest.mark.parametrize("dtype", STORED)
def test_what_the_base_held_as_nan_or_infinity_stays(dtype: str) -> None:
    weight = np.array([np.inf, -np.inf, np.nan, -np.nan, 1], STORED[dtype])
    found = add_one(weight, np.ones(5, np.float32)).ravel()
    np.testing.assert_array_equal(found.astype(np.float32), [np.inf, -np.inf, np.nan, np.nan, 2])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_nan_that_lives_in_the_low_bits_stays_one(dtype: str) -> None:
    payloads = [0x7F800001, 0xFF800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF]
    values = np.array(payloads, np.uint32).view(np.float32)
    assert np.isnan(converted(values, dtype).astype(np.float32)).all()
    merged = add_one(values, np.zeros(6, np.float32), DTYPES[dtype].config_name)
    assert np.isnan(merged.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", STORED)
def test_an_overflow_is_an_error_that_names_the_tensor(dtype: str) -> None:
    largest = np.array([LARGEST[dtype]], STORED[dtype])
    too_much = np.float32(HALF_A_STEP[dtype])
    just_not = np.nextafter(too_much, np.float32(0)) if dtype == "F32" else too_much * 0.99
    assert_same_bits(add_one(largest, np.array([just_not], np.float32)).ravel(), largest)
    with pytest.raises(NumericError, match=r"m\.weight.*found 1 of 1") as caught:
        add_one(largest, np.array([too_much]))
    assert caught.value.exit_code == 3
    assert caught.value.problems[0].expected == f"values that {dtype} can hold"


def test_a_conversion_that_overflows_is_an_error_too() -> None:
    with pytest.raises(NumericError, match=r"other.*F16.*found 2 of 4"):
        converted(np.array([1e5, np.inf, -65520, 65519], np.float32), "F16")


def test_integers_pass_through_a_change_of_dtype() -> None:
    ids = np.arange(9, dtype=np.int64)
    assert_same_bits(converted(ids, "F16").view(np.uint32), ids.view(np.uint32))
