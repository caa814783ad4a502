"""What a compressed section says of its size is looked at before there is room for it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import zstandard

from regraft.deltas.undo import correction_coding as planes
from regraft.deltas.undo.compression import compress, decompress, most_compressed

HUGE = 2**34
"""What a frame may claim that nobody has room for."""


def claiming(size: int) -> bytes:
    """Return a frame of three zeros that says it holds ``size`` bytes."""
    descriptor, window = 0b11000000, b"\x00"  # eight bytes of content size; a window of 1 KiB
    last_run = (3 << 3 | 1 << 1 | 1).to_bytes(3, "little")
    stated = size.to_bytes(8, "little")
    return b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + window + stated + last_run + b"\x00"


def without_a_size(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(content)


@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
def test_what_was_compressed_comes_back(size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    packed = compress(content)
    assert len(packed) <= most_compressed(size)
    assert decompress(packed, size) == content


BAD = {
    "a size of 17179869184 bytes": claiming(HUGE),
    "a size of 9 bytes": compress(b"123456789"),
    "no size": without_a_size(b"12345678"),
    "decompression error": compress(b"12345678")[:-3],
    "content size": b"not a frame at all",
}


@pytest.mark.parametrize("said", BAD)
def test_another_size_or_none_is_refused_before_there_is_room_for_it(said: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=said):
            decompress(BAD[said], 8)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_bytes_after_a_frame_are_refused() -> None:
    with pytest.raises(ValueError, match="unused"):
        decompress(compress(bytes(8)) + b"more", 8)


def test_a_frame_that_holds_less_than_it_says_is_refused() -> None:
    with pytest.raises(ValueError):
        decompress(claiming(8), 8)


def test_a_difference_of_another_size_is_refused() -> None:
    prediction = np.zeros(8, np.uint8)
    with pytest.raises(ValueError, match="where there should be 8"):
        planes.restore(claiming(HUGE), prediction, 2)
