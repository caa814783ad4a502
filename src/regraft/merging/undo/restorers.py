"""Tensors of a base on their way back out of merged ones: plain values, codes, blocks of GGUF."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import numpy as np

from regraft.deltas.kernels.weights import Bytes, Floats, Weights
from regraft.deltas.matrix_units import UNIT_COLUMNS, Units
from regraft.deltas.undo.exceptions import ITEM, put_back
from regraft.deltas.undo.units import Counts, Lengths, TileCorrection, are_possible, sizes_of
from regraft.formats.files.reading import FilePool
from regraft.merging.compute.block_inverse import (
    codes_before,
    decoder_of,
    in_model_order,
    in_stored_order,
    whole_rows,
)
from regraft.merging.compute.factors import FactorStore, Pair
from regraft.merging.compute.requantize import Coder
from regraft.merging.compute.step_inverse import Backwards
from regraft.merging.planning.plan import Step
from regraft.merging.planning.tiles import Tile, row_grain
from regraft.merging.undo.patch import FACTORS, STREAMS, UNITS, PatchReader, section
from regraft.quant.formats.gguf import UNQUANTIZED
from regraft.quant.weight import Block, Read
from regraft.tensors import TensorSpec


class Restorer:
    """One merged tensor on its way back."""

    def __init__(
        self, step: Step, original: TensorSpec, merged: TensorSpec, patch: PatchReader,
        files: FilePool, store: FactorStore,
    ) -> None:  # fmt: skip
        self._step, self._original, self._merged = step, original, merged
        self._patch, self._files = patch, files
        self._units: Units = step.units
        self._name = original.name
        raw = patch.table(section(self._name, UNITS), 6 * self._units.count)
        self._lengths: Lengths = np.frombuffer(raw, np.uint32, self._units.count)
        self._counts: Counts = np.frombuffer(raw, np.uint16, offset=4 * self._units.count)
        item = self._item
        sizes = sizes_of(self._units, self._lengths, self._counts, item)
        if not are_possible(self._units, sizes, item):
            expected = "no unit longer than its weights"
            raise patch.damaged(section(self._name, UNITS), expected, "longer ones")
        self._ends = np.cumsum(sizes)
        self._backwards = Backwards(step, store, *self._factors())

    @property
    def _item(self) -> int:
        """Bytes of an element, as the table of units counts them."""
        return self._original.itemsize

    def _factors(self) -> tuple[dict[int, Pair], dict[int, Floats]]:
        """Return factors of residuals and of DoRA, by the ``id`` of their delta."""
        height, width = self._step.matrix
        residuals: dict[int, Pair] = {}
        dora: dict[int, Floats] = {}
        number = 0

        def following(count: int) -> Floats:
            nonlocal number
            number += 1
            return self._patch.floats(section(self._name, f"{FACTORS}.{number - 1}"), count)

        for delta in self._step.deltas:
            if delta.is_residual:
                left = following(height * delta.rank).reshape(height, delta.rank)
                residuals[id(delta)] = Pair(left, following(delta.rank * width).reshape(-1, width))
            elif delta.magnitude is not None:
                rows = delta.rows[1] - delta.rows[0]
                dora[id(delta)] = following(width if delta.by_column else rows)
        return residuals, dora

    def read(self, offset: int, buffer: Bytes, scratch: threading.local) -> None:
        """Restore a range of bytes."""
        item, done = self._original.itemsize, 0
        for tile in self._covering(offset // item, buffer.size // item):
            begin = tile.rows[0] * self._units.width + tile.columns[0]
            skip = max(offset // item - begin, 0) * item
            take = min(tile.read - skip, buffer.size - done)
            if not skip and take == tile.read:
                self._restore(tile, buffer[done : done + take], scratch)
            else:
                whole = np.empty(tile.read, np.uint8)
                self._restore(tile, whole, scratch)
                buffer[done : done + take] = whole[skip : skip + take]
            done += take

    def _covering(self, first: int, count: int) -> Iterator[Tile]:
        """Yield tiles of whole units that cover elements ``first`` to ``first + count``."""
        units, width = self._units, self._units.width
        last = first + count
        while first < last:
            row, column = divmod(first, width)
            if units.parts > 1:
                ends = width if last >= (row + 1) * width else last - row * width
                low = column // UNIT_COLUMNS * UNIT_COLUMNS
                high = min(-(-ends // UNIT_COLUMNS) * UNIT_COLUMNS, width)
                whole_rows = column == 0 and ends == width  # as many as there are
                rows = (row, last // width if whole_rows else row + 1)
            else:
                low, high = 0, width
                begin = row - row % units.rows
                end = -(-last // width)
                rows = (begin, min(-(-end // units.rows) * units.rows, units.height))
            item = self._original.itemsize
            size = (rows[1] - rows[0]) * (high - low) * item
            yield Tile(0, "rows", rows, (low, high), 0, size, 0, 0)
            first = rows[1] * width if high == width else row * width + high

    def _restore(self, tile: Tile, raw: Bytes, scratch: threading.local) -> None:
        kept = self._kept_of(tile)[2]
        weights = Weights.of_bytes(raw, self._original.dtype)
        self._backwards.restore(tile, self._read_merged(tile, scratch), weights, raw, kept)

    def _kept_of(self, tile: Tile) -> tuple[int, int, TileCorrection]:
        """Return the units of a tile and what was kept of them."""
        first, last = self._units.of_tile(tile.rows, tile.columns)
        begin = int(self._ends[first - 1]) if first else 0
        payload = self._patch.part(section(self._name, STREAMS), begin, int(self._ends[last - 1]))
        return (
            first,
            last,
            TileCorrection(payload, self._lengths[first:last], self._counts[first:last]),
        )

    def _read_merged(self, tile: Tile, scratch: threading.local) -> Weights:
        """Read the merged values of a tile into the thread's own memory."""
        there, width = self._merged, self._units.width
        size = (tile.rows[1] - tile.rows[0]) * (tile.columns[1] - tile.columns[0]) * there.itemsize
        room: Bytes | None = getattr(scratch, "room", None)
        if room is None or room.size < size:
            room = scratch.room = np.empty(size, np.uint8)
        raw = room[:size]
        begin = (tile.rows[0] * width + tile.columns[0]) * there.itemsize
        self._files.read_into(there, begin, raw.data)
        return Weights.of_bytes(raw, there.dtype)


class CodedRestorer(Restorer):
    """One weight that stayed quantized, on its way back: codes from codes."""

    def __init__(
        self, step: Step, original: TensorSpec, merged: TensorSpec, patch: PatchReader,
        files: FilePool, store: FactorStore, coder: Coder, read: Read,
    ) -> None:  # fmt: skip
        super().__init__(step, original, merged, patch, files, store)
        self._coder, self._base = coder, read

    @property
    def _item(self) -> int:
        return ITEM

    @staticmethod
    def rows(step: Step) -> int:
        """Return the rows that have to be restored together."""
        return math.lcm(step.units.rows, row_grain(step))

    @staticmethod
    def grain(step: Step) -> int:
        """Return the bytes of the codes of these rows."""
        weight = step.coded
        assert weight is not None
        rows = min(CodedRestorer.rows(step), weight.matrix[0])
        return weight.grid.place(weight, Block((0, rows), (0, weight.matrix[1])))[1]

    def read(self, offset: int, buffer: Bytes, scratch: threading.local) -> None:
        """Restore a range of the stored bytes, whole rows at a time, few of them.

        What a code takes on its way is many times its own size.
        """
        del scratch
        weight, each, size = self._coder.weight, self.rows(self._step), self.grain(self._step)
        height, width = weight.matrix
        low, high = offset // size * each, -(-(offset + buffer.size) // size) * each
        some = max(buffer.size // 4 // width // each * each, each)
        for first in range(low, min(high, height), some):
            at = Block((first, min(first + some, high, height)), (0, width))
            packed = weight.grid.pack(weight, at, self._codes(at))
            begin = weight.grid.place(weight, at)[0] - offset
            start, stop = max(begin, 0), min(begin + packed.size, buffer.size)
            buffer[start:stop] = packed[start - begin : stop - begin]

    def _codes(self, at: Block) -> Bytes:
        tile = Tile(0, "rows", at.rows, at.columns, 0, 0, 0, 0)
        weight = self._coder.weight
        block = weight.grid.block(weight, at, self._read_part)
        codes = np.array(self._coder.before(block, at, tile, self._backwards.again), np.uint8)
        put_back(self._units, *self._kept_of(tile), codes)
        return codes

    def _read_part(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Read the codes as they were merged, and the scales."""
        if spec.name == self._original.name:
            self._files.read_into(self._merged, offset, buffer.data)
        else:
            self._base(spec, offset, buffer)


class BlocksRestorer(Restorer):
    """One weight that stayed in its type of GGUF, on its way back."""

    def __init__(
        self, step: Step, original: TensorSpec, merged: TensorSpec, patch: PatchReader,
        files: FilePool, store: FactorStore, rounding: str, seed: int,
    ) -> None:  # fmt: skip
        """Take a step, both tensors, what was kept, and how values became codes."""
        assert step.coded is not None
        self._weight, self._rounding, self._seed = step.coded, rounding, seed
        self._type = decoder_of(step.coded).type
        super().__init__(step, original, merged, patch, files, store)

    @property
    def _item(self) -> int:
        return self._step.source.itemsize if self._type in UNQUANTIZED else ITEM

    @staticmethod
    def grain(step: Step) -> int:
        """Return the bytes of the blocks that come back together."""
        assert step.coded is not None
        height, width = step.matrix
        rows = min(whole_rows(step), height)
        return decoder_of(step.coded).place(step.coded, Block((0, rows), (0, width)))[1]

    def read(self, offset: int, buffer: Bytes, scratch: threading.local) -> None:
        """Restore a range of the stored bytes, whole rows at a time, few of them."""
        del scratch
        height, width = self._step.matrix
        each, size = min(whole_rows(self._step), height), self.grain(self._step)
        low, high = offset // size * each, -(-(offset + buffer.size) // size) * each
        some = max(buffer.size // 4 // max(width, 1) // each * each, each)
        for first in range(low, min(high, height), some):
            at = Block((first, min(first + some, high, height)), (0, width))
            place, length = decoder_of(self._weight).place(self._weight, at)
            merged = np.empty(length, np.uint8)
            self._files.read_into(self._merged, place, merged.data)
            restore = self._numbers if self._type in UNQUANTIZED else self._blocks
            blocks = restore(at, merged)
            begin = place - offset
            start, stop = max(begin, 0), min(begin + length, buffer.size)
            buffer[start:stop] = blocks[start - begin : stop - begin]

    def _numbers(self, at: Block, merged: Bytes) -> Bytes:
        """Restore blocks of plain numbers."""
        raw, tile = np.empty_like(merged), Tile(0, "rows", at.rows, at.columns, 0, 0, 0, 0)
        there = in_model_order(self._weight, at, merged)
        dtype, kept = self._step.source.dtype, self._kept_of(tile)[2]
        weights = Weights.of_bytes(raw, dtype)
        self._backwards.restore(tile, Weights.of_bytes(there, dtype), weights, raw, kept)
        return in_stored_order(self._weight, at, raw)

    def _blocks(self, at: Block, merged: Bytes) -> Bytes:
        """Restore blocks of codes."""
        from regraft.quant.formats.gguf_rounding import with_codes  # compiled; only here

        codes = codes_before(
            self._step, at, merged, self._rounding, self._seed, self._backwards.again
        )  # fmt: skip
        tile = Tile(0, "rows", at.rows, at.columns, 0, 0, 0, 0)
        put_back(self._units, *self._kept_of(tile), codes)
        return with_codes(self._type, merged, codes)
