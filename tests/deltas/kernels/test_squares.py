"""The norms that DoRA divides by: sums of squares in float64, in ascending order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from merging.toys import BF16, draw
from regraft.deltas.kernels import merge as kernels
from regraft.deltas.kernels.weights import Weights


@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("shape", [(4001, 3), (3, 4001), (129, 130)])
def test_squares_are_added_in_float64_one_after_the_other(
    shape: tuple[int, int], dtype: Any, by_column: bool
) -> None:
    weight = (1 + draw(*shape) / 100).astype(dtype)  # near each other, so that every digit counts
    left, right = np.zeros(shape[0], np.float32), np.zeros(shape[1], np.float32)
    raw = weight.reshape(-1).view(np.uint8)
    name = {2: "BF16" if dtype is BF16 else "F16", 4: "F32"}[weight.itemsize]
    found = np.zeros(shape[1] if by_column else shape[0], np.float64)
    kernels.square_sums(
        *Weights.of_bytes(raw, name).arguments, *shape, left, 0, right, 0, 1, np.float32(1), 0,
        by_column, found,
    )  # fmt: skip
    squares = weight.astype(np.float64) ** 2
    sums = np.cumsum(squares, axis=0 if by_column else 1)
    assert np.array_equal(found, sums[-1] if by_column else sums[:, -1])
