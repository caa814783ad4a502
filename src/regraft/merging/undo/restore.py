"""Reading a base out of a merged model: the merge run backwards, with what was kept for it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from regraft.deltas.kernels.weights import Bytes
from regraft.deltas.matrix_units import Offsets
from regraft.deltas.undo import correction_coding as planes
from regraft.deltas.undo import signs_of_zero
from regraft.deltas.undo.compression import decompress
from regraft.formats.files.reading import FilePool
from regraft.merging.compute.block_telling import told_blocks
from regraft.merging.compute.factors import FactorStore
from regraft.merging.compute.requantize import Coder, ValuesOf, told_codes
from regraft.merging.inputs.dequantized_view import virtual
from regraft.merging.planning.plan import Step
from regraft.merging.undo.corrections import Correction, adapter_prediction, converted
from regraft.merging.undo.patch import CHUNKS, PLANES, PatchReader, section
from regraft.merging.undo.restorers import BlocksRestorer, CodedRestorer, Restorer
from regraft.merging.undo.turned_codes import TurnedCodes, is_turned
from regraft.quant.weight import Block, Decoder, QuantizedWeight
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
        self._open: dict[tuple[str, bool], Restorer] = {}
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
            of_blocks = isinstance(step.coded.codec, Decoder)
            return (BlocksRestorer if of_blocks else CodedRestorer).grain(step)
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

    def _restorer(self, spec: TensorSpec) -> Restorer:
        with self._lock:
            key = _key(spec)
            if key not in self._open:
                self._open[key] = self._made(spec)
            return self._open[key]

    def _made(self, spec: TensorSpec) -> Restorer:
        recipe, step = self._recipe, self._recipe.steps[spec.name]
        merged = recipe.merged[step.name]
        opened = (step, spec, merged, self._patch, self._files, self._store)
        if step.coded is None:
            return Restorer(*opened)
        if isinstance(step.coded.codec, Decoder):
            return BlocksRestorer(*opened, recipe.rounding, recipe.seed)
        return CodedRestorer(*opened, Coder(step.coded, recipe.rounding, recipe.seed), self.read)

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
