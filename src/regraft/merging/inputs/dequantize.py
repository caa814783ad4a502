"""Reading a quantized base as plain weights: decoded block by block, when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from regraft.deltas.kernels.weights import Bytes, Weights
from regraft.merging.inputs.source import Source
from regraft.quant.grid import Codes, values_of
from regraft.quant.weight import Block, Decoder, QuantizedWeight
from regraft.tensors import TensorSpec, nbytes_of


def blocks_of(weight: QuantizedWeight, first: int, count: int) -> Iterator[Block]:
    """Yield the blocks of a flat range of a weight: a part of a row, whole rows, a part of one."""
    width = weight.matrix[1]
    last = first + count
    while first < last:
        row, column = divmod(first, width)
        if column or last - first < width:
            end = min(width, column + last - first)
            yield Block((row, row + 1), (column, end))
            first += end - column
        else:
            end = last // width
            yield Block((row, end), (0, width))
            first = end * width


class DequantizingSource:
    """Gives quantized weights as plain ones; a :class:`regraft.merging.inputs.source.Source`."""

    def __init__(self, weights: Mapping[str, QuantizedWeight], packed: Source) -> None:
        """Take the weights by their logical name, and what their stored tensors are read from.

        Weights are given the way that they are seen: as in the model, or as their codes lie.
        """
        self._weights, self._packed = weights, packed

    def read(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Fill a buffer with a range of a tensor's bytes; of a virtual one, whole elements."""
        if not spec.is_virtual:
            self._packed.read(spec, offset, buffer)
            return
        weight, item, done = self._weights[spec.name], spec.itemsize, 0
        for block in blocks_of(weight, offset // item, buffer.size // item):
            size = block.height * block.width * item
            self._fill(weight, block, buffer[done : done + size])
            done += size

    def _fill(self, weight: QuantizedWeight, at: Block, raw: Bytes) -> None:
        if not isinstance(weight.codec, Decoder):
            self.decode(weight, at, raw)
            return
        values = weight.codec.values(weight, at, self._packed.read).ravel()
        Weights.of_bytes(raw, weight.dtype).take(Weights.of_floats(values), np.zeros(4, np.float64))

    def decode(self, weight: QuantizedWeight, at: Block, raw: Bytes) -> Codes:
        """Fill a buffer with a block's values, which lie on a grid; return its codes."""
        codes = self.codes(weight, at)
        values_of(codes, *Weights.of_bytes(raw, weight.dtype).arguments)
        return codes

    def weight(self, name: str) -> QuantizedWeight:
        """Return a weight by its logical name."""
        return self._weights[name]

    def codes(self, weight: QuantizedWeight, at: Block) -> Codes:
        """Return a block's codes."""
        return weight.grid.block(weight, at, self._packed.read)

    def values(self, weight: QuantizedWeight, at: Block) -> Bytes:
        """Return a block's values as the bytes of the weight's dtype."""
        raw = np.empty(nbytes_of(weight.dtype, (at.height, at.width)), np.uint8)
        self._fill(weight, at, raw)
        return raw

    def read_stored(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Fill a buffer with bytes of a stored tensor."""
        self._packed.read(spec, offset, buffer)

    def cost(self, spec: TensorSpec) -> int:
        """Return what reading takes besides the buffer."""
        return 0 if spec.is_virtual else self._packed.cost(spec)

    def grain(self, spec: TensorSpec) -> int:
        """Return the bytes of a row of a virtual tensor."""
        if not spec.is_virtual:
            return self._packed.grain(spec)
        return max(spec.shape[-1] if spec.shape else 1, 1) * spec.itemsize

    def release(self, spec: TensorSpec) -> None:
        """Let go of what was kept for a tensor, and for the stored tensors it is made of."""
        if not spec.is_virtual:
            self._packed.release(spec)
            return
        for part in self._weights[spec.name].parts.values():
            self._packed.release(part)

    def origin(self, spec: TensorSpec) -> TensorSpec | None:
        """Return the tensor of a file that has a stored tensor's bytes, if there is one."""
        return None if spec.is_virtual else self._packed.origin(spec)

    def expected(self, name: str) -> str | None:
        """Return the blake3 (hex) a stored tensor has to have, if that is known."""
        return self._packed.expected(name)
