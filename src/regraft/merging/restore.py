"""Reading a base out of a merged model: the merge run backwards, with what was kept for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from regraft.deltas import planes
from regraft.deltas.cutting import UNIT_COLUMNS, Offsets, Units
from regraft.deltas.units import Counts, Decoder, Kept, Lengths, sizes_of
from regraft.deltas.views import Delta
from regraft.deltas.weights import Bytes, Floats, Weights
from regraft.formats.reading import FilePool
from regraft.merging.compute import covered, run_of
from regraft.merging.factors import (
    FactorStore,
    Pair,
    SegmentFactors,
    factor_count,
    joined,
    pack,
)
from regraft.merging.keep import Keep, adapter_prediction, converted
from regraft.merging.patch import CHUNKS, FACTORS, PLANES, STREAMS, UNITS, PatchReader, section
from regraft.merging.plan import Segment, Step
from regraft.merging.tiles import Tile
from regraft.tensors import DTYPES, TensorSpec


@dataclass(frozen=True)
class Recipe:
    """How the tensors of a base follow from a merged model.

    Attributes:
        steps: those of the merge, by the name of the base's tensor, that can be run backwards.
        keeps: the tensors that are told from others, by name.
        merged: the merged model's tensors.
        digests: blake3 (hex) of the base's tensors, as the receipt has them.
    """

    steps: Mapping[str, Step]
    keeps: Mapping[str, Keep]
    merged: Mapping[str, TensorSpec]
    digests: Mapping[str, str]


class RestoringSource:
    """Gives the bytes of a base that is not there; a :class:`regraft.merging.source.Source`."""

    def __init__(
        self, recipe: Recipe, patch: PatchReader, files: FilePool, store: FactorStore
    ) -> None:
        self._recipe, self._patch, self._files, self._store = recipe, patch, files, store
        self._open: dict[str, _Restorer] = {}
        self._chunks: dict[str, Offsets] = {}
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def read(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Restore a range of a tensor's bytes."""
        name = spec.name
        if name in self._recipe.steps:
            self._restorer(name, spec).read(offset, buffer, self._scratch)
        elif name in self._recipe.keeps:
            self._read_kept(self._recipe.keeps[name], offset, buffer)
        else:
            self._files.read_into(self._recipe.merged[name], offset, buffer.data)

    def cost(self, spec: TensorSpec) -> int:
        """Return the bytes of the old merge's factors, and of the table of units."""
        step = self._recipe.steps.get(spec.name)
        return step.factor_bytes + 32 * step.units.count if step is not None else 0

    def grain(self, spec: TensorSpec) -> int:
        """Return the bytes of a unit of a merged tensor, of a chunk of one that is kept."""
        if spec.name in self._recipe.steps:
            units = self._recipe.steps[spec.name].units
            return units.rows * units.width * spec.itemsize
        keep = self._recipe.keeps.get(spec.name)
        return planes.CHUNK * keep.item if keep is not None else 1

    def release(self, spec: TensorSpec) -> None:
        """Let go of a tensor's factors and tables."""
        with self._lock:
            self._open.pop(spec.name, None)
            self._chunks.pop(spec.name, None)

    def expected(self, name: str) -> str | None:
        """Return the digest that the receipt has."""
        return self._recipe.digests.get(name)

    def _restorer(self, name: str, spec: TensorSpec) -> _Restorer:
        with self._lock:
            if name not in self._open:
                step, merged = self._recipe.steps[name], self._recipe.merged[name]
                self._open[name] = _Restorer(
                    step, spec, merged, self._patch, self._files, self._store
                )
            return self._open[name]

    def _read_kept(self, keep: Keep, offset: int, buffer: Bytes) -> None:
        """Restore a range of a kept tensor, whole chunks at a time."""
        name, chunk = keep.original.name, planes.CHUNK * keep.item
        ends = self._chunk_ends(keep)
        for number in range(offset // chunk, -(-(offset + buffer.size) // chunk)):
            begin = number * chunk
            size = min(chunk, keep.original.nbytes - begin)
            first = int(ends[number - 1]) if number else 0
            kept = self._patch.part(section(name, PLANES), first, int(ends[number]))
            prediction = self._prediction(keep, begin, size)
            try:
                values = planes.restore(kept.tobytes(), prediction, keep.item)
            except ValueError as error:
                raise self._patch.damaged(section(name, PLANES), "chunks", str(error)) from None
            low, high = max(begin, offset), min(begin + size, offset + buffer.size)
            buffer[low - offset : high - offset] = values[low - begin : high - begin]

    def _chunk_ends(self, keep: Keep) -> Offsets:
        """Return where each chunk of a kept tensor ends; read once for all of its tiles."""
        name = keep.original.name
        with self._lock:
            if name not in self._chunks:
                raw = self._patch.table(section(name, CHUNKS), 4 * keep.chunks)
                self._chunks[name] = np.cumsum(np.frombuffer(raw, np.uint32).astype(np.int64))
            return self._chunks[name]

    def _prediction(self, keep: Keep, begin: int, size: int) -> Bytes:
        if keep.adapter is not None:
            return adapter_prediction(keep, keep.adapter, begin, size, self._files)
        if keep.through is not None:
            there = self._recipe.merged[keep.original.name]
            width, own = DTYPES[keep.through].bits, DTYPES[keep.original.dtype].bits
            raw = np.empty(size * width // own, np.uint8)
            self._files.read_into(there, begin * width // own, raw.data)
            return converted(raw, keep.through, keep.original.dtype)
        return np.zeros(size, np.uint8)


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
        item = original.itemsize
        self._ends = np.cumsum(sizes_of(self._units, self._lengths, self._counts, item))
        residuals, self._dora = self._factors()
        self._segments = SegmentFactors(store, residuals)

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
        units, item = self._units, self._original.itemsize
        merged = self._read_merged(tile, scratch)
        first, last = units.of_tile(tile.rows, tile.columns)
        begin = int(self._ends[first - 1]) if first else 0
        payload = self._patch.part(section(self._name, STREAMS), begin, int(self._ends[last - 1]))
        kept = Kept(payload, self._lengths[first:last], self._counts[first:last])
        decoder = Decoder(units, first, last, kept, item)
        weights = Weights.of_bytes(raw, self._original.dtype)
        width = tile.columns[1] - tile.columns[0]
        for segment, low, high in covered(self._step.segments, *tile.rows):
            start, count = (low - tile.rows[0]) * width, (high - low) * width
            source, result = weights.cut(start, count), merged.cut(start, count)
            if not segment.deltas and source.kind == result.kind:
                source.take(result, np.zeros(4, np.float64))
                continue
            if segment.deltas:
                packed, factors = self._segments.of(segment), self._dora_factors(segment)
            else:
                packed, factors = pack(segment, []), joined([])
            decoder.restore(run_of(segment, low, tile, source, result, packed, factors))
        decoder.finish(raw)

    def _dora_factors(self, segment: Segment) -> Floats:
        return joined([self._factor(delta, segment) for delta in segment.deltas if delta.magnitude])

    def _factor(self, delta: Delta, segment: Segment) -> Floats:
        own = self._dora[id(delta)]
        if delta.by_column:
            return own
        first = segment.rows[0] - delta.rows[0]
        return own[first : first + factor_count(delta, segment, 0)]

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
