"""A thread's memory for tiles: where it lies, and that it is used again."""

from __future__ import annotations

import pytest

from regraft.merging.compute.tile_work import TileMemory
from regraft.merging.files.direct_io import BLOCK


@pytest.mark.parametrize("offset", [0, 8, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_bytes_lie_in_a_block_of_memory_as_they_will_in_the_file(offset: int) -> None:
    memory = TileMemory()
    for size in (1, 10, BLOCK, 5 * BLOCK + 3):
        taken = memory.take("result", size, offset)
        assert taken.size == size
        assert taken.ctypes.data % BLOCK == offset % BLOCK
        taken[:] = 7


def test_what_has_no_place_in_a_file_begins_with_a_block() -> None:
    """So numbers of every width lie where processors want them."""
    assert TileMemory().take("values", 100).ctypes.data % BLOCK == 0


def test_it_is_used_again_and_grows() -> None:
    memory = TileMemory(least=2**20)
    first = memory.take("source", 100)
    first[:] = 1
    again = memory.take("source", 2**20)
    assert again.ctypes.data == first.ctypes.data
    assert again[:100].all()
    other = memory.take("values", 100)
    assert other.ctypes.data != first.ctypes.data
    large = memory.take("source", 2**22)
    large[:] = 1
    assert large.size == 2**22
