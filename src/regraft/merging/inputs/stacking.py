"""Reading parameters that are put together from single experts, which may lie the other way round.

A tile of a stack (experts, in, out) takes a column from each row of experts that are (out, in). So
an expert is decoded whole (or a band of its columns, where it is large), turned, and kept until the
next ones are asked for. All threads that wait for it decode it together.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from regraft.merging.inputs.dequantize import DequantizingSource
from regraft.merging.inputs.dequantized_view import Quantization, Stack, room_of
from regraft.merging.inputs.source import Source
from regraft.numerics.arrays import Bytes
from regraft.tensors import TensorSpec

Words = npt.NDArray[np.unsignedinteger]

_STRIP = 2**17
"""Values of an expert that a thread decodes at a time."""

_FEW = 16
"""So many values are read one by one: for a fingerprint, no expert is decoded."""


def plain_values(quantization: Quantization, stored: Source) -> Source:
    """Return what gives a quantized base's plain weights, from what gives its stored tensors."""
    plain = DequantizingSource(quantization.weights, stored)
    if not quantization.stacks:
        return plain
    return StackingSource(quantization.stacks, plain)


class StackingSource:
    """Gives stacks of single experts; a :class:`regraft.merging.inputs.source.Source`."""

    def __init__(self, stacks: Mapping[str, Stack], plain: Source) -> None:
        """Take the stacks by name, and what their members are read from, as plain values."""
        self._stacks, self._plain = stacks, plain
        self._bands = _Bands(room_of(stacks.values()))

    def read(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Fill a buffer with a range of a tensor's bytes; of a virtual one, whole elements."""
        stack = self._stack(spec)
        if stack is None:
            self._plain.read(spec, offset, buffer)
            return
        size, done = spec.nbytes // len(stack.members), 0
        while done < buffer.size:
            number, begin = divmod(offset + done, size)
            part = buffer[done : done + size - begin]
            if stack.transposed:
                self._read_turned(stack, number, begin // spec.itemsize, part)
            else:
                self._plain.read(stack.members[number], begin, part)
            done += part.size

    def _stack(self, spec: TensorSpec) -> Stack | None:
        return self._stacks.get(spec.name) if spec.is_virtual else None

    def _read_turned(self, stack: Stack, number: int, first: int, part: Bytes) -> None:
        """Read values of one expert, from the ``first`` on."""
        values: Words = part.view(f"u{stack.spec.itemsize}")
        rows, width = stack.spec.shape[1:]
        if values.size <= _FEW:
            self._read_few(stack, number, first, part)
        elif values.size == rows * width:
            _Band(stack, number, 0, values.reshape(rows, width)).fill(self._plain)
        else:
            each, done = stack.band_rows * width, 0
            while done < values.size:
                band, begin = divmod(first + done, each)
                done += self._copy(stack, number, band, begin, values[done:])

    def _copy(self, stack: Stack, number: int, band: int, begin: int, values: Words) -> int:
        """Take values from a band, as many as it has; return how many these are."""
        with self._bands.holding(stack, number, band) as held:
            held.fill(self._plain)
            there = held.values.reshape(-1)[begin : begin + values.size]
            values[: there.size] = there
            return there.size

    def _read_few(self, stack: Stack, number: int, first: int, part: Bytes) -> None:
        member, item = stack.members[number], stack.spec.itemsize
        for at in range(part.size // item):
            row, column = divmod(first + at, stack.spec.shape[-1])
            place = (column * member.shape[1] + row) * item
            self._plain.read(member, place, part[at * item : (at + 1) * item])

    def cost(self, spec: TensorSpec) -> int:
        """Return what reading takes besides the buffer; of stacks, the plan counts it."""
        return 0 if self._stack(spec) is not None else self._plain.cost(spec)

    def grain(self, spec: TensorSpec) -> int:
        """Return the bytes of a row of a stack."""
        if self._stack(spec) is None:
            return self._plain.grain(spec)
        return max(spec.shape[-1] if spec.shape else 1, 1) * spec.itemsize

    def release(self, spec: TensorSpec) -> None:
        """Let go of the memory of a tensor and of the tensors that it is made of."""
        stack = self._stack(spec)
        if stack is None:
            self._plain.release(spec)
            return
        self._bands.release(spec.name)
        for member in stack.members:
            self._plain.release(member)

    def origin(self, spec: TensorSpec) -> TensorSpec | None:
        """Return the tensor of a file that has a stored tensor's bytes, if there is one."""
        return None if self._stack(spec) is not None else self._plain.origin(spec)

    def expected(self, name: str) -> str | None:
        """Return the blake3 (hex) a stored tensor has to have, if that is known."""
        return self._plain.expected(name)


class _Band:
    """Rows of one expert of a stack, decoded by all threads that wait for them."""

    def __init__(self, stack: Stack, number: int, first: int, values: Words) -> None:
        """Take the rows' place in the expert, and where their values go, (rows, width)."""
        self.values, self.users = values, 0
        self._member, self._dtype = stack.members[number], stack.spec.itemsize
        self._columns = (first, first + values.shape[0])
        self._strips = self._cut()
        self._left = 0
        self._error: BaseException | None = None
        # A strip is handed out and counted in ``_left`` in one step. So when none is left to hand
        # out and ``_left`` is 0, the band is complete.
        self._changed = threading.Condition()

    def _cut(self) -> Iterator[tuple[int, int]]:
        """Yield the rows of the member, some at a time."""
        height, width = self._member.shape
        each = max(_STRIP // width, 1)
        for row in range(0, height, each):
            yield row, min(row + each, height)

    def fill(self, plain: Source) -> None:
        """Decode what nobody else does, and wait for the rest.

        Raises:
            RegraftError: something could not be read.
        """
        while (strip := self._next()) is not None:
            error: BaseException | None = None
            try:
                self._decode(plain, *strip)
            except BaseException as raised:
                error = raised
            self._note(error)
        with self._changed:
            self._changed.wait_for(lambda: not self._left or self._error is not None)
            if self._error is not None:
                raise self._error

    def _next(self) -> tuple[int, int] | None:
        with self._changed:
            strip = None if self._error is not None else next(self._strips, None)
            self._left += strip is not None
            return strip

    def _note(self, error: BaseException | None) -> None:
        with self._changed:
            self._left -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def _decode(self, plain: Source, low: int, high: int) -> None:
        item, width = self._member.itemsize, self._member.shape[1]
        raw = np.empty((high - low) * width * item, np.uint8)
        plain.read(self._member, low * width * item, raw)
        rows: Words = raw.view(self.values.dtype).reshape(high - low, width)
        self.values[:, low:high] = rows[:, slice(*self._columns)].T


_Key = tuple[str, int, int]


class _Bands:
    """The bands that are at hand, within a room; one that is in use stays."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._held: dict[_Key, _Band] = {}
        # The bands held never take more than the room; one with users is not let go of. Whoever
        # waits has no band, so those who have one always go on.
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, stack: Stack, number: int, band: int) -> Iterator[_Band]:
        """Give a band to be filled and used; wait for room where all others are in use."""
        held = self._take(stack, number, band)
        try:
            yield held
        finally:
            with self._changed:
                held.users -= 1
                self._changed.notify_all()

    def _take(self, stack: Stack, number: int, band: int) -> _Band:
        key = (stack.spec.name, number, band)
        first = band * stack.band_rows
        shape = (min(stack.band_rows, stack.spec.shape[1] - first), stack.spec.shape[2])
        with self._changed:
            self._changed.wait_for(lambda: key in self._held or self._made_room(stack.band_bytes))
            held = self._held.pop(key, None)
            if held is None:
                held = _Band(stack, number, first, _mapped(shape, stack.spec.itemsize))
            self._held[key] = held  # behind those that were used before
            held.users += 1
            return held

    def _made_room(self, size: int) -> bool:
        """Let go of bands, the one first that was used least recently; whether there is room."""
        for key in [key for key, band in self._held.items() if not band.users]:
            if self._free >= size:
                break
            del self._held[key]
        return self._free >= size

    @property
    def _free(self) -> int:
        return self._room - sum(band.values.nbytes for band in self._held.values())

    def release(self, name: str) -> None:
        """Let go of the bands of a stack."""
        with self._changed:
            for key in [k for k, band in self._held.items() if k[0] == name and not band.users]:
                del self._held[key]
            self._changed.notify_all()


def _mapped(shape: tuple[int, int], item: int) -> Words:
    """Return memory that goes back to the system with the array: malloc would hold on to it."""
    memory = mmap.mmap(-1, max(math.prod(shape) * item, 1))
    values: Words = np.frombuffer(memory, f"u{item}", math.prod(shape)).reshape(shape)
    return values
