"""Reading a base out of a merged model: the merge run backwards, with what was kept for it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from regraft.deltas.kernels.weights import Bytes, Floats, Weights
from regraft.deltas.matrix_units import UNIT_COLUMNS, Offsets, Units
from regraft.deltas.undo import correction_coding as planes
from regraft.deltas.undo import signs_of_zero
from regraft.deltas.undo.compression import decompress
from regraft.deltas.undo.exceptions import ITEM, put_back
from regraft.deltas.undo.units import Counts, Lengths, TileCorrection, are_possible, sizes_of
from regraft.formats.files.reading import FilePool
from regraft.merging.compute.block_telling import told_blocks
from regraft.merging.compute.factors import FactorStore, Pair
from regraft.merging.compute.requantize import Coder, ValuesOf, told_codes
from regraft.merging.compute.step_inverse import Backwards
from regraft.merging.inputs.dequantized_view import virtual
from regraft.merging.planning.plan import Step
from regraft.merging.planning.tiles import Tile, row_grain
from regraft.merging.undo.corrections import Correction, adapter_prediction, converted
from regraft.merging.undo.patch import CHUNKS, FACTORS, PLANES, STREAMS, UNITS, PatchReader, section
from regraft.merging.undo.turned_codes import TurnedCodes, is_turned
from regraft.quant.weight import Block, QuantizedWeight, Read
from regraft.tensors import DTYPES, TensorSpec, nbytes_of

_RECENT = 16
"""Chunks of kept tensors that stay at hand: of scales, 2 to 4 MiB."""


@dataclass(frozen=True)
class Restoration:
    """How the tensors of a base follow from a merged model.

    Attributes:
        steps: those of the merge, by the name of the base's tensor, that can be run backwards; of
            codes, by that of the tensor that stores them.
        keeps: the tensors that are told from others, by name.
        merged: the merged model's tensors.
        digests: blake3 (hex) of the base's tensors, as the receipt has them.
        rounding, seed: how values became codes, where they did.
        room: memory for codes that lie transposed; see :mod:`regraft.merging.undo.turned_codes`.
    """

    steps: Mapping[str, Step]
    keeps: Mapping[str, Correction]
    merged: Mapping[str, TensorSpec]
    digests: Mapping[str, str]
    rounding: str = "stochastic"
    seed: int = 0
    room: int = 0

    def step(self, spec: TensorSpec) -> Step | None:
        """Return the step that restores a tensor; one name can mean plain values and codes."""
        step = self.steps.get(spec.name)
        if step is None or (step.source.is_virtual and step.coded is None) != spec.is_virtual:
            return None
        return step

    def origin(self, spec: TensorSpec) -> TensorSpec | None:
        """Return the merged model's tensor, if that has the bytes as they are."""
        if spec.is_virtual or self.step(spec) is not None or spec.name in self.keeps:
            return None
        return self.merged[spec.name]


class RestoringSource:
    """Gives the bytes of a base that is not there; a ``Source`` of ``merging.inputs``."""

    def __init__(
        self, recipe: Restoration, patch: PatchReader, files: FilePool, store: FactorStore
    ) -> None:
        self._recipe, self._patch, self._files, self._store = recipe, patch, files, store
        self._open: dict[tuple[str, bool], _Restorer] = {}
        self._chunks: dict[str, Offsets] = {}
        self._recent: dict[tuple[str, int], Bytes] = {}
        self._lock = threading.Lock()  # a tensor has one restorer, made by the first who asks
        self._scratch = threading.local()
        self._turned = TurnedCodes(recipe.room, self._values, self.read)

    def read(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Restore a range of a tensor's bytes."""
        if self._recipe.step(spec) is not None:
            self._restorer(spec).read(offset, buffer, self._scratch)
        elif spec.is_virtual:
            self._read_plain(spec, offset, buffer)
        elif spec.name in self._recipe.keeps:
            self._read_kept(self._recipe.keeps[spec.name], offset, buffer)
        else:
            self._files.read_into(self._recipe.merged[spec.name], offset, buffer.data)

    def origin(self, spec: TensorSpec) -> TensorSpec | None:
        """Return the merged model's tensor, if that has the bytes as they are."""
        return self._recipe.origin(spec)

    def _read_plain(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Read values of a quantized weight that no adapter changed from the merged model."""
        there = self._recipe.merged[spec.name]
        width, own = DTYPES[there.dtype].bits, DTYPES[spec.dtype].bits
        raw = np.empty(buffer.size * width // own, np.uint8)
        self._files.read_into(there, offset * width // own, raw.data)
        buffer[:] = converted(raw, there.dtype, spec.dtype)

    def cost(self, spec: TensorSpec) -> int:
        """Return the bytes of the old merge's factors, and of the table of units."""
        step = self._recipe.step(spec)
        return step.factor_bytes + 32 * step.units.count if step is not None else 0

    def grain(self, spec: TensorSpec) -> int:
        """Return the bytes of a unit of a merged tensor, of a chunk of one that is kept."""
        step = self._recipe.step(spec)
        if step is not None and step.coded is not None:
            return _Coded.grain(step)
        if step is not None:
            return step.units.rows * step.units.width * spec.itemsize
        keep = self._recipe.keeps.get(spec.name)
        return keep.chunk_bytes if keep is not None else 1

    def release(self, spec: TensorSpec) -> None:
        """Let go of a tensor's factors and tables."""
        with self._lock:
            self._open.pop(_key(spec), None)
            self._chunks.pop(spec.name, None)
        if not spec.is_virtual:
            self._turned.release(spec.name)

    def expected(self, name: str) -> str | None:
        """Return the digest that the receipt has."""
        return self._recipe.digests.get(name)

    def _restorer(self, spec: TensorSpec) -> _Restorer:
        with self._lock:
            key = _key(spec)
            if key not in self._open:
                step = self._recipe.steps[spec.name]
                opened = (step, spec, self._recipe.merged[step.name], self._patch, self._files)
                if step.coded is None:
                    self._open[key] = _Restorer(*opened, self._store)
                else:
                    coder = Coder(step.coded, self._recipe.rounding, self._recipe.seed)
                    self._open[key] = _Coded(*opened, self._store, coder, self.read)
            return self._open[key]

    def _read_kept(self, keep: Correction, offset: int, buffer: Bytes) -> None:
        """Restore a range of a kept tensor: whole chunks, where something was kept of them."""
        chunk, end = keep.chunk_bytes, offset + buffer.size
        ends = self._chunk_ends(keep)
        for number in range(offset // chunk, -(-end // chunk)):
            begin = number * chunk
            low, high = max(begin, offset), min(begin + chunk, keep.original.nbytes, end)
            first, last = int(ends[number - 1]) if number else 0, int(ends[number])
            if first == last and keep.coded is not None:
                buffer[low - offset : high - offset] = self._prediction(keep, low, high - low)
            else:
                values = self._restored(keep, begin, (first, last))
                buffer[low - offset : high - offset] = values[low - begin : high - begin]

    def _restored(self, keep: Correction, begin: int, kept: tuple[int, int]) -> Bytes:
        """Return a chunk, given the bytes of the section that were kept of it.

        Small tensors such as scales are asked for again and again by those who tell codes, a few
        values at a time: the last chunks stay at hand.
        """
        key = (keep.original.name, begin)
        with self._lock:
            values = self._recent.pop(key, None)
        if values is None:
            values = self._restore_chunk(keep, begin, kept)
        with self._lock:
            self._recent[key] = values
            while len(self._recent) > _RECENT:
                self._recent.pop(next(iter(self._recent)))
        return values

    def _restore_chunk(self, keep: Correction, begin: int, kept: tuple[int, int]) -> Bytes:
        size = min(keep.chunk_bytes, keep.original.nbytes - begin)
        name = section(keep.original.name, PLANES)
        content = self._patch.part(name, *kept).tobytes()
        try:
            if keep.blocks is not None:
                raw = decompress(content, size) if content else bytes(size)
                differences = np.frombuffer(raw, np.uint8)
                return told_blocks(keep.blocks, begin, differences, self._values(keep.blocks))
            told = self._prediction(keep, begin, size)
            if keep.zero_twice:
                return signs_of_zero.restore(content, told)
            return planes.restore(content, told, keep.item)
        except ValueError as error:
            raise self._patch.damaged(name, "chunks", str(error)) from None

    def _chunk_ends(self, keep: Correction) -> Offsets:
        """Return where each chunk of a kept tensor ends; read once for all of its tiles."""
        name = keep.original.name
        with self._lock:
            if name not in self._chunks:
                raw = self._patch.table(section(name, CHUNKS), 4 * keep.chunks)
                lengths = np.frombuffer(raw, np.uint32).astype(np.int64)
                most = keep.most_kept
                if lengths.max(initial=0) > most:
                    expected, found = f"chunks of at most {most} bytes", f"one of {lengths.max()}"
                    raise self._patch.damaged(section(name, CHUNKS), expected, found)
                self._chunks[name] = np.cumsum(lengths)
            return self._chunks[name]

    def _prediction(self, keep: Correction, begin: int, size: int) -> Bytes:
        if keep.adapter is not None:
            return adapter_prediction(keep, keep.adapter, begin, size, self._files)
        if keep.coded is not None and is_turned(keep):
            told = np.empty(size, np.uint8)
            self._turned.read(keep.coded, begin, told)
            return told
        if keep.coded is not None:
            return told_codes(keep.coded, begin, size, self._values(keep.coded), self.read)
        if keep.through is not None:
            there = self._recipe.merged[keep.original.name]
            width, own = DTYPES[keep.through].bits, DTYPES[keep.original.dtype].bits
            raw = np.empty(size * width // own, np.uint8)
            self._files.read_into(there, begin * width // own, raw.data)
            return converted(raw, keep.through, keep.original.dtype)
        return np.zeros(size, np.uint8)

    def _values(self, weight: QuantizedWeight) -> ValuesOf:
        """Return what gives the values that a weight had before it was merged into."""
        spec = virtual(weight)

        def values(at: Block) -> Bytes:
            raw = np.empty(nbytes_of(weight.dtype, (at.height, at.width)), np.uint8)
            begin = at.rows[0] * weight.matrix[1] + at.columns[0]
            self.read(spec, begin * spec.itemsize, raw)
            return raw

        return values


def _key(spec: TensorSpec) -> tuple[str, bool]:
    return spec.name, spec.is_virtual


class _Restorer:
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
        item = original.itemsize if step.coded is None else ITEM
        sizes = sizes_of(self._units, self._lengths, self._counts, item)
        if not are_possible(self._units, sizes, item):
            expected = "no unit longer than its weights"
            raise patch.damaged(section(self._name, UNITS), expected, "longer ones")
        self._ends = np.cumsum(sizes)
        self._backwards = Backwards(step, store, *self._factors())

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


class _Coded(_Restorer):
    """One weight that stayed quantized, on its way back: codes from codes."""

    def __init__(
        self, step: Step, original: TensorSpec, merged: TensorSpec, patch: PatchReader,
        files: FilePool, store: FactorStore, coder: Coder, read: Read,
    ) -> None:  # fmt: skip
        super().__init__(step, original, merged, patch, files, store)
        self._coder, self._base = coder, read

    @staticmethod
    def rows(step: Step) -> int:
        """Return the rows that have to be restored together."""
        return math.lcm(step.units.rows, row_grain(step))

    @staticmethod
    def grain(step: Step) -> int:
        """Return the bytes of the codes of these rows."""
        weight = step.coded
        assert weight is not None
        rows = min(_Coded.rows(step), weight.matrix[0])
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
