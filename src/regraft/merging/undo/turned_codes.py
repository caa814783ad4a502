"""Codes that lie transposed, told from the values of the model's own matrix on the way back.

A row of the stored codes takes a value from each row of the model's matrix, whose rows are restored
whole. So a band of stored rows is told at once, as much of a weight as there is memory for, and
kept for those who read it next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from regraft.merging.compute.requantize import ValuesOf, codes_near, rows_holding
from regraft.merging.inputs.bands import Band, Bands, mapped
from regraft.merging.undo.corrections import Correction
from regraft.numerics.arrays import Bytes
from regraft.quant.weight import Block, QuantizedWeight, Read

_STRIP = 2**17
"""Values that a thread restores at a time."""

_GRAIN = 32
"""Rows of the model's matrix whose codes are whole bytes of the stored rows, in any format."""

_SHARE = 8
"""The part of the memory cap that a band may take."""

Strip = tuple[int, int, int]


def room_for(keeps: Iterable[Correction], max_memory: int) -> int:
    """Return the memory that codes take on the way back: two bands, where the work passes on."""
    turned = [keep.original.nbytes for keep in keeps if is_turned(keep)]
    return 2 * min(max(turned, default=0), max_memory // _SHARE)


def is_turned(keep: Correction) -> bool:
    """Whether a tensor holds codes that lie transposed and are told from values."""
    return keep.coded is not None and keep.coded.as_stored


class TurnedCodes:
    """The codes that values speak for, within a room; safe to use from several threads."""

    def __init__(
        self, room: int, values: Callable[[QuantizedWeight], ValuesOf], read: Read
    ) -> None:
        """Take the room, what gives the values of a weight as the model has it, and what reads the
        stored tensors besides codes."""
        self._most, self._values, self._read = max(room // 2, 1), values, read
        self._bands = Bands[_Band](room)

    def read(self, weight: QuantizedWeight, begin: int, buffer: Bytes) -> None:
        """Fill a buffer with a range of a weight's stored codes, as its values speak for them."""
        each, done = self._band_bytes(weight), 0
        while done < buffer.size:
            number, skip = divmod(begin + done, each)
            first = number * each
            size = min(each, weight.codes.nbytes - first)

            def make(first: int = first, size: int = size) -> _Band:
                at = rows_holding(weight, first, size)
                return _Band(weight, at, self._values(model_weight(weight)), self._read)

            with self._bands.holding(
                weight.codes.name, number, min(size, self._most), make
            ) as band:
                band.fill()
                at = begin + done - band.begin
                there = band.codes[at : at + min(size - skip, buffer.size - done)]
                buffer[done : done + there.size] = there
            done += there.size

    def _band_bytes(self, weight: QuantizedWeight) -> int:
        """Return the bytes of a band: of all codes, or of as many rows as there is room for."""
        rows, columns = weight.matrix
        grain = min(weight.grid.row_grain(weight), rows)
        each = weight.grid.place(weight, Block((0, grain), (0, columns)))[1]
        whole = weight.codes.nbytes
        return whole if whole <= self._most else max(self._most // each * each, each)

    def release(self, name: str) -> None:
        """Let go of the codes of a stored tensor."""
        self._bands.release(name)


def model_weight(weight: QuantizedWeight) -> QuantizedWeight:
    """Return a weight that is seen as its codes lie as the model has it."""
    if not weight.as_stored:
        return weight
    turned = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
    return replace(weight, shape=turned, as_stored=False)


class _Band(Band[Strip]):
    """Some stored rows of a weight's codes.

    A weight is one matrix or a stack of them; its codes are each of these transposed.
    """

    def __init__(self, weight: QuantizedWeight, at: Block, values: ValuesOf, read: Read) -> None:
        """Take a weight as its codes lie, rows of it, its values as the model has them, and what
        reads its other stored tensors."""
        self._weight, self._at, self._values, self._read = weight, at, values, read
        self.begin, size = weight.grid.place(weight, at)
        self.codes = mapped(size)
        lines = math.prod(weight.codes.shape[: len(weight.shape) - 1])
        self._lines = self.codes.reshape(-1, weight.codes.nbytes // lines)
        super().__init__(self._cut(), size)

    def _cut(self) -> Iterator[Strip]:
        """Yield the matrices that the band reaches into, and their rows, some at a time."""
        height, width = self._weight.shape[-1], self._weight.shape[-2]
        each = max(_STRIP // width // _GRAIN * _GRAIN, _GRAIN)
        for number in range(self._at.rows[0] // width, -(-self._at.rows[1] // width)):
            for row in range(0, height, each):
                yield number, row, min(row + each, height)

    def compute(self, strip: Strip) -> None:
        """Restore rows of the model's matrix, and tell the codes of the columns that are here."""
        (number, row, end), weight = strip, self._weight
        height, width = weight.shape[-1], weight.shape[-2]
        low = max(self._at.rows[0] - number * width, 0)
        high = min(self._at.rows[1] - number * width, width)
        rows, count = (number * height + row, number * height + end), end - row
        raw = self._values(Block(rows, (0, width))).reshape(count, -1)
        item = raw.shape[1] // width
        cut = np.ascontiguousarray(raw[:, low * item : high * item]).reshape(-1)
        codes = codes_near(model_weight(weight), Block(rows, (low, high)), cut, self._read)
        turned = np.ascontiguousarray(codes.reshape(count, high - low).T).reshape(-1)
        narrow = replace(weight, shape=(high - low, count))
        packed = weight.grid.pack(narrow, Block((0, high - low), (0, count)), turned)
        there = Block((number * width + low, number * width + high), (0, height))
        line = self._lines.shape[1]
        first = (weight.grid.place(weight, there)[0] - self.begin) // line
        begin, stop = row * line // height, end * line // height
        part = packed.view(np.uint8).reshape(-1, stop - begin)
        self._lines[first : first + part.shape[0], begin:stop] = part
