"""What a method on elements makes of the deltas of one matrix, a band of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from regraft.deltas.methods.bands import DenseDelta, bands_of, draws, order_statistics
from regraft.deltas.methods.form import AT_ONCE, MethodOptions
from regraft.deltas.methods.on_elements import Band
from regraft.deltas.methods.registry import Method
from regraft.deltas.rounding import Floats

Range = tuple[np.float32, np.float32]
"""The least and the greatest magnitude that stays."""


@dataclass(frozen=True)
class Member:
    """One of the deltas that become one.

    Attributes:
        delta: with its adapter's own scale.
        weight: the user's factor, rounded to float32 once.
        key: of its random bits.
        limits: which of its elements stay, where the method has limits.
    """

    delta: DenseDelta
    weight: np.float32
    key: int
    limits: Range


def limits_of(delta: DenseDelta, method: Method, options: MethodOptions) -> Range:
    """Return which elements of a delta stay by their magnitudes, exactly; all where none need go.

    It takes two passes over the delta.
    """
    if method.limits is None or options.density >= 1:
        return np.float32(0), np.float32(np.inf)
    rows, columns = delta.shape
    places = method.limits(rows * columns, options)
    low, high = order_statistics(
        lambda: (delta.rows(*band) for band in bands_of(delta.shape)), places
    )
    return low, high


class Elements:
    """The outcome of a method on elements; safe to use from several threads.

    An element's random bits are those of its number in the module's (out, in), row by row, however
    the matrix lies: so they do not depend on how a base is stored.
    """

    def __init__(
        self, members: Sequence[Member], method: Method, options: MethodOptions, *,
        transposed: bool = False,
    ) -> None:  # fmt: skip
        """Take the deltas; ``transposed`` is whether their rows are the module's input features."""
        self._members, self._method, self._options = members, method, options
        rows, columns = self.shape
        self._steps = (1, rows) if transposed else (columns, 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._members[0].delta.shape

    def rows(self, first: int, end: int, columns: tuple[int, int] | None = None) -> Floats:
        """Return some rows of the outcome, or a range of their columns; float32, contiguous."""
        left, right = columns or (0, self.shape[1])
        made = np.empty((end - first, right - left), np.float32)
        each = max(1, AT_ONCE // max(1, self.shape[1]))
        for low in range(first, end, each):
            high = min(low + each, end)
            made[low - first : high - first] = self._combined(low, high)[:, left:right]
        return made

    def _combined(self, first: int, end: int) -> Floats:
        assert self._method.on_elements is not None  # the caller chose such a method
        shape, members = (end - first, self.shape[1]), self._members

        def draw(number: int) -> Floats:
            return draws(members[number].key, first * self._steps[0], shape, self._steps)

        band = Band(
            tuple(member.delta.rows(first, end) for member in members),
            tuple(member.weight for member in members),
            tuple(member.limits for member in members),
            draw,
        )
        return self._method.on_elements(band, self._options)

    def bands(self) -> Iterator[tuple[int, Floats]]:
        """Yield all rows from the front, with the number of the first of each band."""
        for first, end in bands_of(self.shape):
            yield first, self.rows(first, end)
