"""Merged values back into the codes of the base's format, and what its undo takes.

A merged value has its own code to start from, and the scales stay. What the base's code was follows
from the merged one and the delta: of the code itself and the one beside it, against the delta's
direction, one gives what is there when the merge is done again. Where that fails, the code is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from blake3 import blake3

from regraft.deltas.kernels.weights import Bytes, Floats, Sums, Weights
from regraft.errors import FormatError
from regraft.merging.inputs.dequantize import DequantizingSource
from regraft.merging.planning.tiles import Tile
from regraft.numerics.conversions import KINDS
from regraft.quant.grid import Codes, values_of
from regraft.quant.rounding import codes_for, codes_of_levels, looks_up, nearest_codes
from regraft.quant.weight import Block, Decoder, QuantizedWeight, Read
from regraft.tensors import DTYPES, TensorSpec, nbytes_of

Again = Callable[[Tile, Weights, Weights], None]
"""Does the merge of a tile: from weights to float32 values, with factors that are known already."""


def noise_key(seed: int, name: str) -> int:
    """Return what tells the random bits of a tensor: 64 bits of blake3 of seed and name."""
    digest = blake3(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def delta_keys(seed: int, module: str, expert: int, count: int) -> list[int]:
    """Return what tells the random bits of a module's deltas, one for each adapter that has it."""
    return [noise_key(seed, f"{module}[{expert}] {number}") for number in range(count)]


@dataclass(frozen=True)
class Coder:
    """Rounds values of one weight to codes.

    Attributes:
        weight: the weight, as its codes lie.
        rounding: of :data:`regraft.quant.weight.ROUNDINGS`.
        seed: says, with the weight's name, which random bits are taken.
    """

    weight: QuantizedWeight
    rounding: str
    seed: int

    @property
    def kind(self) -> int:
        """The number of the weight's dtype."""
        return KINDS[self.weight.dtype]

    def codes(self, block: Codes, at: Block, values: Floats, sums: Sums) -> Bytes:
        """Return the codes of values; ``block`` has those to start from."""
        width = self.weight.matrix[1]
        first = at.rows[0] * width + at.columns[0]
        key = noise_key(self.seed, self.weight.name)
        stride = width if block.rows > 1 else 0
        return codes_for(block, self.kind, values, self.rounding, key, (first, stride), sums)

    def before(self, block: Codes, at: Block, tile: Tile, again: Again) -> Bytes:
        """Return what the codes of a merged block were before, as far as that can be told."""
        first = self._again(block, at, tile, again)
        missed = np.flatnonzero(first.codes != block.codes)
        if not missed.size:
            return block.codes
        levels, there = block.levels, block.codes[missed]
        rose = first.values[missed] > first.weights.floats()[missed]
        codes = block.codes.copy()
        codes[missed] = levels.padded[levels.rank[there] + np.where(rose, 0, 2)]
        other = self._again(replace(block, codes=codes), at, tile, again)
        codes[missed] = np.where(other.codes[missed] == there, codes[missed], there)
        return codes

    def _again(self, block: Codes, at: Block, tile: Tile, again: Again) -> _Trial:
        raw = np.empty(block.codes.size * DTYPES[self.weight.dtype].bits // 8, np.uint8)
        weights = Weights.of_bytes(raw, self.weight.dtype)
        values_of(block, *weights.arguments)
        values = np.empty(block.codes.size, np.float32)
        again(tile, weights, Weights.of_floats(values))
        codes = self.codes(block, at, values, np.zeros(2, np.float64))
        return _Trial(codes, values, weights)


@dataclass(frozen=True)
class _Trial:
    """What a merge makes of some codes: others, by way of values that were weights before."""

    codes: Bytes
    values: Floats
    weights: Weights


def block_of(tile: Tile) -> Block:
    """Return a tile of rows as a block."""
    return Block(tile.rows, tile.columns)


def read_packed(source: DequantizingSource, coder: Coder, at: Block, codes: Bytes) -> Bytes:
    """Return the stored bytes of a block, of which the codes are known.

    Raises:
        FormatError: packing the codes does not give these bytes.
    """
    weight = coder.weight
    offset, length = weight.grid.place(weight, at)
    raw = np.empty(length, np.uint8)
    source.read_stored(weight.codes, offset, raw)
    if not np.array_equal(raw, weight.grid.pack(weight, at, codes)):
        raise FormatError(
            "codes are packed in a way that would not be written again",
            where=f"{weight.codes.path}, tensor {weight.codes.name!r}",
            hint="Quantize the base again, or merge without --quantize",
        )
    return raw


# -- codes told from plain values ------------------------------------------------------------------

ValuesOf = Callable[[Block], Bytes]
"""Gives a block's values as the bytes of the weight's dtype."""


def can_be_told(weight: QuantizedWeight) -> bool:
    """Whether codes can be told from values: they are levels of a grid."""
    return not isinstance(weight.codec, Decoder)


def told_codes(
    weight: QuantizedWeight, begin: int, size: int, values: ValuesOf | None, read: Read
) -> Bytes:
    """Return the stored bytes of a weight that its values speak for.

    Args:
        weight: the weight, as its codes lie.
        begin, size: the range of its stored codes, in bytes.
        values: gives its values, as its codes lie; None for those that its codes stand for.
        read: reads its other stored tensors; its codes are read only where values are not given.
    """

    at = rows_holding(weight, begin, size)
    if values is None:
        return _cut(weight, at, _told_of_itself(weight, at, read), begin, size)
    codes = codes_near(weight, at, values(at), read)
    return _cut(weight, at, codes, begin, size)


def codes_near(weight: QuantizedWeight, at: Block, raw: Bytes, read: Read) -> Bytes:
    """Return the codes of a block, uint8 row by row, that its values speak for.

    Args:
        weight: the weight, seen in either way.
        at: the block.
        raw: its values, as the bytes of the weight's dtype.
        read: reads the other stored tensors; the codes are not read.
    """

    def read_rest(spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        if spec.name == weight.codes.name:
            buffer[:] = 0
        else:
            read(spec, offset, buffer)

    block = weight.grid.block(weight, at, read_rest)
    floats = np.ascontiguousarray(Weights.of_bytes(raw, weight.dtype).floats())
    return nearest_codes(block, floats)


def _told_of_itself(weight: QuantizedWeight, at: Block, read: Read) -> Bytes:
    """Return the codes that are nearest to what a block's codes stand for."""
    block = weight.grid.block(weight, at, read)
    kind = KINDS[weight.dtype]
    if looks_up(block):
        return codes_of_levels(block, kind)
    raw = np.empty(nbytes_of(weight.dtype, (at.height, at.width)), np.uint8)
    values_of(block, *Weights.of_bytes(raw, weight.dtype).arguments)
    floats = np.ascontiguousarray(Weights.of_bytes(raw, weight.dtype).floats())
    return nearest_codes(block, floats)


def _cut(weight: QuantizedWeight, at: Block, codes: Bytes, begin: int, size: int) -> Bytes:
    """Return a range of the stored bytes out of a block's codes."""
    packed = weight.grid.pack(weight, at, codes)
    offset = weight.grid.place(weight, at)[0]
    return packed[begin - offset : begin - offset + size]


def rows_holding(weight: QuantizedWeight, begin: int, size: int) -> Block:
    """Return the rows whose codes hold a range of the stored bytes, as few as can be cut."""
    rows, columns = weight.matrix
    grain = weight.grid.row_grain(weight)
    each = weight.grid.place(weight, Block((0, min(grain, rows)), (0, columns)))[1]
    low, high = begin // each * grain, -(-(begin + size) // each) * grain
    return Block((low, min(high, rows)), (0, columns))
