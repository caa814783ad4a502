"""How a matrix is cut into units: the pieces of which an undo keeps something, each by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNIT_COLUMNS = 16384
"""Longest unit, in elements; a power of two and a multiple of the kernels' block."""

UNIT_ELEMENTS = 4096
"""Rows are joined to units of up to so many elements."""

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """How a matrix is cut into units: some rows each, or, where rows are long, a part of one.

    Attributes:
        height, width: of the matrix.
        rows: rows of a unit.
        parts: units of a row.
    """

    height: int
    width: int
    rows: int
    parts: int

    @classmethod
    def of(cls, height: int, width: int, edges: Iterable[int]) -> Units:
        """Cut a matrix; rows are joined only so far as ``edges``, row numbers, stay edges."""
        if width > UNIT_COLUMNS:
            return cls(height, width, 1, -(-width // UNIT_COLUMNS))
        rows, divisor = 1, math.gcd(*edges)
        while 2 * rows * width <= UNIT_ELEMENTS and divisor % (2 * rows) == 0:
            rows *= 2
        return cls(height, width, rows, 1)

    @property
    def count(self) -> int:
        """Number of units."""
        return -(-self.height // self.rows) * self.parts

    def at(self, row: int, column: int) -> int:
        """Return the unit that an element lies in."""
        return row // self.rows * self.parts + column // UNIT_COLUMNS

    def of_tile(self, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[int, int]:
        """Return the units of a tile, as a half-open range; it has to begin and end with one."""
        return self.at(rows[0], columns[0]), self.at(rows[1] - 1, columns[1] - 1) + 1

    def starts(self, first: int, last: int) -> Offsets:
        """Return where units ``first`` to ``last`` begin, in elements, and where the last ends."""
        numbers = np.arange(first, last + 1, dtype=np.int64)
        row, part = numbers // self.parts * self.rows, numbers % self.parts
        begins: Offsets = row * self.width + part * UNIT_COLUMNS
        return np.minimum(begins, self.height * self.width).astype(np.int64)
