"""Reading parameters that are put together from single experts, which may lie the other way round.

A tile of a stack (experts, in, out) takes a column from each row of experts that are (out, in). So
an expert is decoded whole (or a band of its columns, where it is large), turned, and kept until the
next ones are asked for. All threads that wait for it decode it together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from regraft.merging.inputs.bands import Band, Bands, mapped
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
        self._bands = Bands[_Band](room_of(stacks.values()))

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
            _Band(stack, number, 0, values.reshape(rows, width), self._plain).fill()
        else:
            each, done = stack.band_rows * width, 0
            while done < values.size:
                band, begin = divmod(first + done, each)
                done += self._copy(stack, number, band, begin, values[done:])

    def _copy(self, stack: Stack, number: int, band: int, begin: int, values: Words) -> int:
        """Take values from a band, as many as it has; return how many these are."""
        size, name = stack.band_bytes, stack.spec.name

        def make() -> _Band:
            first, item = band * stack.band_rows, stack.spec.itemsize
            shape = (min(stack.band_rows, stack.spec.shape[1] - first), stack.spec.shape[2])
            values: Words = mapped(math.prod(shape) * item).view(f"u{item}").reshape(shape)
            return _Band(stack, number, first, values, self._plain)

        with self._bands.holding(name, (number, band), size, make) as held:
            held.fill()
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


class _Band(Band[tuple[int, int]]):
    """Rows of one expert of a stack, decoded by all threads that wait for them."""

    def __init__(self, stack: Stack, number: int, first: int, values: Words, plain: Source) -> None:
        """Take the rows' place in the expert, where their values go, (rows, width), and a source
        that they are read from."""
        self.values, self._plain = values, plain
        self._member = stack.members[number]
        self._columns = (first, first + values.shape[0])
        super().__init__(self._cut(), values.nbytes)

    def _cut(self) -> Iterator[tuple[int, int]]:
        """Yield the rows of the member, some at a time."""
        height, width = self._member.shape
        each = max(_STRIP // width, 1)
        for row in range(0, height, each):
            yield row, min(row + each, height)

    def compute(self, strip: tuple[int, int]) -> None:
        """Decode rows of the member, and turn them."""
        low, high = strip
        item, width = self._member.itemsize, self._member.shape[1]
        raw = np.empty((high - low) * width * item, np.uint8)
        self._plain.read(self._member, low * width * item, raw)
        rows: Words = raw.view(self.values.dtype).reshape(high - low, width)
        self.values[:, low:high] = rows[:, slice(*self._columns)].T
