"""What a fine-tuned model adds to its base, a band of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from regraft.deltas.rounding import Floats, decode
from regraft.extracting.pairing import TensorPair
from regraft.merging.inputs.source import Source
from regraft.tensors import TensorSpec

BAND_BYTES = 2**23
HELD_BYTES = 96 * 2**20
"""A difference up to this size is kept in memory, as float32, from pass to pass; a larger one is
read anew in each."""

_STEPS = {"F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}
"""The distance between numbers of a dtype, relative to the power of two below them."""


@dataclass(frozen=True)
class Sides:
    """What tensors are read from."""

    base: Source
    tuned: Source


class Difference:
    """The difference of one matrix: of a pair, or of one expert of it.

    Attributes:
        shape: (rows, columns), as the weight is stored.
    """

    def __init__(self, pair: TensorPair, number: int, sides: Sides) -> None:
        """Take a pair whose shapes are alike, and the number of the matrix in it."""
        assert pair.base is not None  # only what both models have is subtracted
        self._base, self._tuned, self._sides = pair.base, pair.tuned, sides
        _, *shape = pair.matrices
        self.shape = (shape[0], shape[1])
        self._first = number * shape[0] * shape[1]
        self._held: Floats | None = None

        self._each = max(1, BAND_BYTES // max(1, 4 * self.shape[1]))

    def survey(self) -> tuple[float, float]:
        """Read it once; return its squared norm, and that of what rounding leaves uncertain.

        The fine-tuned values were rounded to their dtype: uniformly within half a step, which has a
        twelfth of the step's square as its mean square (Widrow 1956). Where nothing was changed
        nothing is uncertain.
        """
        total = uncertain = 0.0
        hold = 4 * self.shape[0] * self.shape[1] <= HELD_BYTES
        held = []
        for _, band, steps in self._read():
            total += float(np.sum(np.square(band, dtype=np.float64)))
            uncertain += steps
            if hold:
                held.append(band)
        self._held = np.concatenate(held) if hold and total else None
        return total, uncertain if total else 0.0

    def bands(self) -> Iterator[tuple[int, Floats]]:
        """Yield its rows from the front, float32, with the number of the first of each band."""
        if self._held is not None:
            for first in range(0, self.shape[0], self._each):
                yield first, self._held[first : first + self._each]
        else:
            for first, band, _ in self._read():
                yield first, band

    def release(self) -> None:
        """Let go of what is kept in memory."""
        self._held = None

    def _read(self) -> Iterator[tuple[int, Floats, float]]:
        """Yield each band with the number of its first row, and its uncertain squared norm."""
        rows, columns = self.shape
        for first in range(0, rows, self._each):
            end = min(first + self._each, rows)
            at, count = self._first + first * columns, (end - first) * columns
            tuned = read_values(self._sides.tuned, self._tuned, at, count)
            base = read_values(self._sides.base, self._base, at, count)
            steps = _powers(tuned) * _STEPS[self._tuned.dtype]
            uncertain = float(np.sum(np.square(steps))) / 12
            yield first, (tuned - base).reshape(end - first, columns), uncertain


def _powers(values: Floats) -> np.ndarray:
    """Return the powers of two below the magnitudes of values, in float64."""
    bits = values.view(np.uint32) & np.uint32(0x7F800000)
    return bits.view(np.float32).astype(np.float64)


def read_values(source: Source, spec: TensorSpec, first: int, count: int) -> Floats:
    """Return ``count`` values of a tensor from the ``first`` on, as float32."""
    raw = np.empty(count * spec.itemsize, np.uint8)
    source.read(spec, first * spec.itemsize, raw)
    return decode(raw, spec.dtype)
