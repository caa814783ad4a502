"""Tensors of adapters are kept in memory up to a limit, those asked for last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from regraft.deltas.views import matrix_view
from regraft.merging.compute.factors import FactorStore
from regraft.tensors import TensorSpec

COLUMNS = 16


class Files:
    """Files of which each tensor holds its own number; says what was read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def read_into(self, spec: TensorSpec, offset: int, buffer: Any) -> None:
        """Read a tensor."""
        assert offset == 0
        self.read.append(spec.name)
        buffer[:] = np.full(COLUMNS, float(spec.name), np.float32).tobytes()


def asked(order: str, limit: int) -> str:
    """Ask for tensors in an order; return the names of those that were read for it."""
    files: Any = Files()
    store = FactorStore(files, limit)
    for name in order:
        spec = TensorSpec(name, "F32", (1, COLUMNS), Path("a"), 0, 4 * COLUMNS)
        matrix = store.matrix(matrix_view(spec, 1, COLUMNS), 0)
        assert np.array_equal(matrix, np.full((1, COLUMNS), float(name), np.float32))
    return "".join(files.read)


def test_what_there_is_room_for_is_read_once() -> None:
    assert asked("121212", 2 * 4 * COLUMNS) == "12"


def test_of_what_there_is_no_room_for_the_oldest_is_let_go_before_the_next_is_read() -> None:
    assert asked("1213132", 2 * 4 * COLUMNS) == "1232"
    assert asked("1212", 2 * 4 * COLUMNS - 1) == "1212"


def test_a_tensor_larger_than_the_limit_is_read_all_the_same() -> None:
    assert asked("11", 1) == "1"
