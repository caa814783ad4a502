"""Stored bytes and numbers, by numpy, held against ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from regraft.deltas.rounding import decode, encode

KINDS: dict[str, Any] = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def samples() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return finite float32 of every size, ties and subnormal numbers among them."""
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, np.uint32)
    ties = np.arange(0x3F7F0000, 0x3F820000, 0x2000, np.uint32)
    values = np.concatenate([bits, ties, ties + 1, ties - 1]).view(np.float32)
    edges = np.array([0.0, -0.0, 65504, 65519, 65520, 1e-45, 6e-8, 3e-8, 3.39e38], np.float32)
    return np.concatenate([values[np.isfinite(values)], edges])


@pytest.mark.parametrize("dtype", KINDS)
def test_rounding_is_to_the_nearest_and_ties_go_to_even(dtype: str) -> None:
    values = samples()
    with np.errstate(over="ignore"):
        expected = values.astype(KINDS[dtype])
    assert encode(values, dtype).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_stored_value_is_read_as_it_is_and_written_as_it_was(dtype: str) -> None:
    raw = np.arange(2**16, dtype=np.uint16)
    values = decode(raw.view(np.uint8), dtype)
    assert np.array_equal(values, raw.view(KINDS[dtype]).astype(np.float32), equal_nan=True)
    numbers = raw[np.isfinite(values)]
    assert np.array_equal(encode(values[np.isfinite(values)], dtype).view(np.uint16), numbers)


def test_matrices_are_taken_row_by_row() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(decode(encode(values.T, "BF16"), "BF16"), [0, 3, 1, 4, 2, 5])
