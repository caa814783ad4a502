"""The signs of zero of codes of four bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from zstandard import frame_content_size

from regraft.deltas.undo import signs_of_zero
from regraft.deltas.undo.compression import compress
from regraft.numerics.arrays import Bytes

SIZES = st.shared(st.integers(1, 40), key="size")


def packed(elements: st.SearchStrategy[int]) -> st.SearchStrategy[Bytes]:
    return SIZES.flatmap(lambda size: arrays(np.uint8, size, elements=elements))


@given(stored=packed(st.integers(0, 255)), told=packed(st.integers(0, 255)))
def test_any_codes_come_back_from_any(stored: Bytes, told: Bytes) -> None:
    kept = signs_of_zero.compress(stored, told)
    assert np.array_equal(signs_of_zero.restore(kept, told), stored)
    assert bool(kept) == bool(np.any(stored != told))


@given(stored=packed(st.sampled_from([0x00, 0x08, 0x80, 0x88, 0x18, 0x81, 0x37])))
def test_signs_alone_take_a_bit_for_each_zero(stored: Bytes) -> None:
    lower, upper = stored & 15, stored & 0xF0
    told = np.where(lower == 8, 0, lower) | np.where(upper == 0x80, 0, upper)
    kept = signs_of_zero.compress(stored, told.astype(np.uint8))
    zeros = int(np.sum(told & 15 == 0) + np.sum(told & 0xF0 == 0))
    assert not kept or frame_content_size(kept) == -(-zeros // 8) + stored.size
    assert len(kept) <= signs_of_zero.most(stored.size)


@pytest.mark.parametrize("kept", [b"\0\0", compress(bytes(12)), compress(bytes(14))])
def test_what_is_not_as_long_as_it_should_be_is_refused(kept: bytes) -> None:
    with pytest.raises(ValueError, match=r"13|content size"):
        signs_of_zero.restore(kept, np.zeros(10, np.uint8))
