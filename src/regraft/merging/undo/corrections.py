"""Tensors of the base that no arithmetic gives back: the patch holds their difference from a tensor
that an un-merge has at hand.

A replaced tensor is told from what took its place, a converted one from itself converted there and
back, and one that the output does not have from nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from regraft.concurrency import Sequencer
from regraft.deltas.kernels.weights import Bytes, Weights
from regraft.deltas.undo import correction_coding as planes
from regraft.deltas.undo import signs_of_zero
from regraft.deltas.undo.compression import most_compressed
from regraft.formats.files.reading import FilePool
from regraft.merging.compute.block_telling import block_differences, can_tell_blocks, chunk_bytes
from regraft.merging.compute.requantize import ValuesOf, can_be_told, told_codes
from regraft.merging.inputs.dequantize import DequantizingSource
from regraft.merging.inputs.dequantized_view import as_stored
from regraft.merging.inputs.source import Source
from regraft.merging.options import KEEP
from regraft.merging.planning.plan import Plan
from regraft.merging.planning.tiles import Tile
from regraft.merging.undo.manifest import UNDO_FORMAT
from regraft.merging.undo.patch import CHUNKS, PLANES, packed, section
from regraft.quant.weight import Block, QuantizedWeight
from regraft.tensors import DTYPES, TensorSpec

_ZERO_TWICE = frozenset({"mxfp4"})
"""Formats whose signs of zero are kept apart, see :mod:`regraft.deltas.undo.signs_of_zero`: E2M1 in
layout 2. Those of layout 1 have them among the differences."""


@dataclass(frozen=True)
class Correction:
    """A tensor of the base that is kept by its difference.

    Attributes:
        original: the base's tensor.
        adapter: the adapter's tensor that it is told from, if it is that.
        through: the dtype that the output has it in, if it is told from itself converted; of a
            ``coded`` one, if its values are.
        coded: the quantized weight whose codes it holds, as they lie, if they are told from plain
            values.
        blocks: the weight in GGUF whose blocks it holds, if they are told from plain values.
    """

    original: TensorSpec
    adapter: TensorSpec | None = None
    through: str | None = None
    coded: QuantizedWeight | None = None
    blocks: QuantizedWeight | None = None

    @property
    def item(self) -> int:
        """Bytes of an element, as the difference is taken; 1 for dtypes of part of a byte."""
        bits = DTYPES[self.original.dtype].bits
        return bits // 8 if bits % 8 == 0 and self.original.numel else 1

    @property
    def zero_twice(self) -> bool:
        """Whether the codes are of four bits and a sign, so that two of them stand for zero."""
        return self.coded is not None and self.coded.codec.name in _ZERO_TWICE

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the tensor that are kept together."""
        return planes.CHUNK * self.item if self.blocks is None else chunk_bytes(self.blocks)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.original.nbytes // self.chunk_bytes)

    @property
    def most_kept(self) -> int:
        """The most bytes that are kept of a chunk."""
        most = signs_of_zero.most if self.zero_twice else most_compressed
        return most(self.chunk_bytes)


def corrections_of(plan: Plan, layout: int = UNDO_FORMAT) -> list[Correction]:
    """Return the tensors of the base that have to be told from something, in their order.

    Args:
        plan: the merge.
        layout: that of the patch; see :func:`layout_of`.
    """
    steps = {step.name: step for step in plan.steps}
    found = []
    packed = _dequantized(plan, layout)
    for name, original in plan.stored.tensors.items():
        step = steps.get(name)
        if name in packed:
            found.append(packed[name])
        elif step is not None and step.coded is not None and step.is_invertible:
            continue
        elif step is None or step.made is not None or step.coded is not None:
            found.append(Correction(original))
        elif step.source_adapter is not None or step.source.name != name:
            other = step.source if step.source_adapter is not None else None
            found.append(Correction(original, adapter=other))
        elif not step.is_invertible and step.dtype != original.dtype:
            found.append(Correction(original, through=step.dtype))
    return found


def layout_of(keeps: Iterable[Correction]) -> int:
    """Return the lowest layout whose readers know how all of these are told."""
    told = (keep.coded or keep.blocks for keep in keeps)
    return max((_layout_told(weight) for weight in told if weight is not None), default=1)


def _layout_told(weight: QuantizedWeight) -> int:
    """Return the first layout in which the codes of a weight are told from its values."""
    return 1 if weight.codec.is_writable and not weight.codec.stores_transposed else 2


def _dequantized(plan: Plan, layout: int = UNDO_FORMAT) -> dict[str, Correction]:
    """Return the stored tensors that the output has as plain values of a weight or a stack."""
    if plan.quantization is None or plan.options.get("quantize") == KEEP:
        return {}
    steps = {step.name: step for step in plan.steps}
    found = {
        spec.name: Correction(spec)
        for stack in plan.quantization.stacks.values()
        for spec in plan.quantization.stored_of(stack.spec.name)
    }
    for weight in plan.quantization.weights.values():
        found |= {spec.name: Correction(spec) for spec in weight.parts.values()}
        step = steps.get(weight.name)
        if step is not None and step.source.is_virtual and step.made is None:
            same = step.is_invertible or step.dtype in (weight.dtype, "F32")
            keep = _told(weight, None if same else step.dtype)
            if layout_of([keep]) <= layout:
                found[weight.codes.name] = keep
    return found


def _told(weight: QuantizedWeight, through: str | None) -> Correction:
    """Return how the codes of a weight are kept whose values an un-merge has at hand."""
    if can_tell_blocks(weight):
        return Correction(weight.codes, through=through, blocks=weight)
    if can_be_told(weight):
        return Correction(weight.codes, through=through, coded=as_stored(weight))
    return Correction(weight.codes)


def digests_only(plan: Plan) -> list[Correction]:
    """Return the stored tensors that no step of a plan reads as they are, for their digests."""
    return list(_dequantized(plan).values())


def converted(raw: Bytes, dtype: str, to: str) -> Bytes:
    """Return values of one working dtype as another; unchanged bytes if it is the same."""
    if dtype == to:
        return raw
    source = Weights.of_bytes(raw, dtype)
    result = np.empty(raw.size * DTYPES[to].bits // DTYPES[dtype].bits, np.uint8)
    Weights.of_bytes(result, to).take(source, np.zeros(4, np.float64))
    return result


def adapter_prediction(
    keep: Correction, other: TensorSpec, begin: int, size: int, files: FilePool
) -> Bytes:
    """Return what bytes ``begin`` to ``begin + size`` are told from: ``other`` as their dtype.

    Where ``other`` is shorter, zeros.
    """
    bits, other_bits = DTYPES[keep.original.dtype].bits, DTYPES[other.dtype].bits
    first = begin * other_bits // bits
    last = min((begin + size) * other_bits // bits, other.nbytes)
    result = np.zeros(size, np.uint8)
    if last > first:
        raw = np.empty(last - first, np.uint8)
        files.read_into(other, first, raw.data)
        there = converted(raw, other.dtype, keep.original.dtype)
        result[: there.size] = there
    return result


def correction_tiles(keep: Correction, tile_bytes: int) -> Iterator[Tile]:
    """Cut a tensor into tiles of whole chunks."""
    chunk, total = keep.chunk_bytes, keep.original.nbytes
    each = max(tile_bytes // chunk, 1) * chunk
    for number, start in enumerate(range(0, max(total, 1), each)):
        length = min(each, total - start)
        yield Tile(number, "bytes", (0, 0), (0, 0), start, length, 0, 0)


class CorrectionRun:
    """A kept tensor while it is worked on, as ``StepRun`` is for a step."""

    cost = 0

    def __init__(
        self, keep: Correction, source: Source, files: FilePool, *, compress: bool = True
    ) -> None:
        """Take what is kept and what it is read from; not to ``compress`` gives digests alone."""
        self._keep, self._source, self._files = keep, source, files
        self._compress = compress
        self._hash = blake3()
        self._lengths: dict[int, list[int]] = {}
        self._order = Sequencer()

    def work(self, tile: Tile, buffers: object) -> Bytes:
        """Compress one tile's difference; return what is to be kept."""
        del buffers
        keep, chunk = self._keep, self._keep.chunk_bytes
        raw = np.empty(tile.read, np.uint8)
        self._source.read(keep.original, tile.read_at, raw)
        parts = [
            self._compressed(tile.read_at + at, piece)
            for at in range(0, tile.read if self._compress else 0, chunk)
            for piece in (raw[at : at + chunk],)
        ]
        with self._order.turn(tile.number):
            self._hash.update(raw.data)
            self._lengths[tile.number] = [len(part) for part in parts]
        return np.frombuffer(b"".join(parts), np.uint8)

    def _compressed(self, begin: int, piece: Bytes) -> bytes:
        keep = self._keep
        if keep.zero_twice:
            return signs_of_zero.compress(piece, self._prediction(begin, piece))
        if keep.blocks is None:
            return planes.compress(piece, self._prediction(begin, piece), keep.item)
        values = self._values(keep.blocks, keep.through or keep.blocks.dtype)
        return packed(block_differences(keep.blocks, begin, piece, values).tobytes())

    def _prediction(self, begin: int, piece: Bytes) -> Bytes:
        keep = self._keep
        if keep.adapter is not None:
            return adapter_prediction(keep, keep.adapter, begin, piece.size, self._files)
        if keep.coded is not None:
            values = None if keep.through is None else self._values(keep.coded, keep.through)
            return told_codes(keep.coded, begin, piece.size, values, self._source.read)
        if keep.through is not None:
            there = converted(piece, keep.original.dtype, keep.through)
            return converted(there, keep.through, keep.original.dtype)
        return np.zeros(piece.size, np.uint8)

    def _values(self, weight: QuantizedWeight, through: str) -> ValuesOf:
        """Return what gives the values that an undo will have."""
        seen = DequantizingSource({weight.name: weight}, self._source)

        def values(at: Block) -> Bytes:
            there = converted(seen.values(weight, at), weight.dtype, through)
            return converted(there, through, weight.dtype)

        return values

    def fail(self) -> None:
        """Wake whoever waits for a tile that will never come."""
        self._order.fail()

    def finish(self) -> tuple[str, list[tuple[str, bytes]]]:
        """Return the digest of the tensor, and its sections after the chunks themselves."""
        name = self._keep.original.name
        self._source.release(self._keep.original)
        lengths = np.array([n for _, ns in sorted(self._lengths.items()) for n in ns], np.uint32)
        table = packed(lengths.tobytes())
        sections = [(section(name, PLANES), b""), (section(name, CHUNKS), table)]
        return self._hash.hexdigest(), sections
