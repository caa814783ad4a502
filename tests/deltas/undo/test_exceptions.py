"""What an undo keeps of codes: the places where they are not what was predicted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.deltas.matrix_units import Units
from regraft.deltas.undo.exceptions import ITEM, keep_exceptions, put_back
from regraft.deltas.undo.units import sizes_of

SHAPES = [(1, 1), (7, 5), (40, 4096), (3, 40_000), (300, 64), (2, 16_384)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32), st.sampled_from([0.0, 1e-4, 0.01, 0.5, 1]))
def test_codes_come_back(shape: tuple[int, int], seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    units = Units.of(*shape, [])
    predicted = rng.integers(0, 256, shape[0] * shape[1]).astype(np.uint8)
    codes = predicted.copy()
    codes[rng.random(codes.size) < share] ^= 3
    kept = keep_exceptions(units, 0, units.count, predicted, codes)
    found = predicted.copy()
    put_back(units, 0, units.count, kept, found)
    assert np.array_equal(found, codes)
    assert kept.payload.size == sizes_of(units, kept.lengths, kept.counts, ITEM).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_code_alone_comes_back(shape: tuple[int, int]) -> None:
    units = Units.of(*shape, [])
    predicted = np.zeros(shape[0] * shape[1], np.uint8)
    codes = predicted.copy()
    codes[-1] = 9
    kept = keep_exceptions(units, 0, units.count, predicted, codes)
    put_back(units, 0, units.count, kept, predicted)
    assert np.array_equal(predicted, codes)
    assert kept.payload.size <= 3


def test_a_unit_is_no_larger_than_its_codes() -> None:
    units = Units.of(64, 4096, [])
    codes = np.random.default_rng(0).integers(0, 16, 64 * 4096).astype(np.uint8)
    kept = keep_exceptions(units, 0, units.count, codes ^ 1, codes)
    assert kept.payload.size == codes.size
