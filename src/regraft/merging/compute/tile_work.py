"""One tile of a step: what is read, computed and turned into bytes.

A merge into files, one into memory, one of a live model, and the check of a merge all do this work
alike. They differ in where a result goes and in what else is done with it. What comes out of a step
decides how a tile is done:

- plain values, or bytes that are copied: :class:`PlainWork`;
- codes of a weight that stays quantized: :class:`CodedWork`;
- the stored tensors of a weight that is put into a format: :class:`MadeWork`.

A new kind of output is one more class here, and a line in
:meth:`regraft.merging.compute.context.PlanContext.work_of`.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from regraft.deltas.kernels.weights import Bytes, Sums, Weights
from regraft.deltas.undo.exceptions import keep_exceptions
from regraft.deltas.undo.units import Encoder, TileCorrection
from regraft.errors import NumericError
from regraft.merging.compute.factors import FactorSource, check_values
from regraft.merging.compute.requantize import Coder, block_of, noise_key, read_packed
from regraft.merging.compute.step_math import ReadSource, StepMath
from regraft.merging.files.direct_io import BLOCK
from regraft.merging.inputs.dequantize import DequantizingSource
from regraft.merging.planning.plan import Step
from regraft.merging.planning.tiles import Tile
from regraft.quant.grid import Codes
from regraft.quant.weight import Decoder

if TYPE_CHECKING:
    from regraft.merging.compute.two_pass_quantize import Gathering


class TileMemory:
    """One thread's memory for tiles, by what it is for; it grows and is used again.

    Attributes:
        encoder: collects what an undo keeps of a tile.
    """

    def __init__(self, least: int = 0) -> None:
        """Begin with none; each piece that is mapped has ``least`` bytes or more."""
        self._pieces: dict[str, Bytes] = {}
        self._least = least
        self.encoder = Encoder()

    def take(self, purpose: str, size: int, offset: int = 0) -> Bytes:
        """Return ``size`` bytes that are kept for a purpose; what is in them is anything.

        Their address is ``offset`` modulo the size of a disk block, as direct I/O wants it of bytes
        that are bound for that offset of a file.
        """
        start = offset % BLOCK
        if (held := self._pieces.get(purpose)) is None or held.size < start + size:
            self._pieces.pop(purpose, None)
            del held  # unmapped before another piece is mapped
            held = np.frombuffer(mmap.mmap(-1, max(size, self._least) + BLOCK), np.uint8)
            self._pieces[purpose] = held
        return held[start : start + size]


def _four() -> Sums:
    return np.zeros(4, np.float64)


def _two() -> Sums:
    return np.zeros(2, np.float64)


@dataclass(frozen=True)
class Computed:
    """What came of a tile, besides its result. Arrays are the thread's, and hold until its next.

    Attributes:
        raw: bytes of the values that it was made from; the result itself where it is a copy.
        stored: the bytes of the stored tensor behind these, for its digest; likewise.
        weights: ``raw`` as values; None where bytes were copied.
        sums: as in :func:`regraft.deltas.kernels.merge.merge_rows`.
        coded: what survived of the delta in codes, and the noise, as in
            :func:`regraft.quant.rounding.requantize`.
        kept: what takes the tile back; None where that is not wanted.
    """

    raw: Bytes
    stored: Bytes
    weights: Weights | None = None
    sums: Sums = field(default_factory=_four)
    coded: Sums = field(default_factory=_two)
    kept: TileCorrection | None = None


class TileWork(ABC):
    """Does the tiles of one step; safe to use from several threads, each with its own memory.

    Attributes:
        step: the step.
        math: its arithmetic.
        alignment: what the address of a result has to be a multiple of.
    """

    alignment = 1

    def __init__(self, step: Step, math: StepMath, *, keeps: bool) -> None:
        """Take a step; ``keeps`` is whether what takes its tiles back is wanted."""
        self.step, self.math = step, math
        self._units = step.units if keeps else None

    @abstractmethod
    def run(self, tile: Tile, memory: TileMemory, into: Bytes) -> Computed:
        """Read and compute a tile.

        Args:
            tile: the tile.
            memory: the thread's.
            into: takes the result's bytes, ``tile.write`` of them.

        Raises:
            RegraftError: something could not be read, or a factor holds NaN.
            Abandoned: another thread failed that this one waited for.
        """

    def _begin_keeping(self, tile: Tile, memory: TileMemory) -> Encoder | None:
        """Begin to collect what takes back a tile of plain values; None where it is not wanted."""
        if self._units is None or tile.kind != "rows":
            return None
        first, last = self._units.of_tile(tile.rows, tile.columns)
        memory.encoder.begin(self._units, first, last, self.step.source.itemsize)
        return memory.encoder


class PlainWork(TileWork):
    """A result of plain values, or a copy."""

    alignment = 4  # of float32, the widest

    def __init__(
        self, step: Step, store: FactorSource, read: ReadSource, tile_bytes: int, *,
        keeps: bool = False, checks: bool = True, norms: bool = True, zero_signs: bool = True,
    ) -> None:  # fmt: skip
        """Take a step.

        Args:
            step: the step.
            store: the adapters' tensors.
            read: reads its source.
            tile_bytes: the size that its tiles were cut by.
            keeps: whether what takes tiles back is wanted.
            checks: whether an adapter's whole tensor is refused if it holds NaN or infinity.
            norms: whether the sums have those of weights and deltas.
            zero_signs: whether what takes tiles back has to tell -0 from +0.
        """
        super().__init__(step, StepMath(step, store, read, tile_bytes, norms=norms), keeps=keeps)
        self._read, self._checks, self._zero_signs = read, checks, zero_signs

    def run(self, tile: Tile, memory: TileMemory, into: Bytes) -> Computed:
        """Read and compute a tile."""
        return self.compute(tile, self.read(tile, memory, into), memory, into)

    def read(self, tile: Tile, memory: TileMemory, into: Bytes) -> Bytes:
        """Return what a tile is made from; what is only copied is read to where it goes."""
        raw = into if tile.kind == "bytes" else memory.take("source", tile.read)
        self._read(tile.read_at, raw)
        if self._checks:
            check_finite(self.step, raw)
        return raw

    def compute(self, tile: Tile, raw: Bytes, memory: TileMemory, into: Bytes) -> Computed:
        """Compute a tile from what was read for it."""
        if tile.kind == "bytes":
            return Computed(raw, raw)
        weights = Weights.of_bytes(raw, self.step.source.dtype)
        merged = Weights.of_bytes(into, self.step.dtype)
        keeping = self._begin_keeping(tile, memory)
        if keeping is not None and not self._zero_signs:
            done = self._without_signs(tile, raw, merged, keeping)
            if done is not None:
                return done
            keeping = self._begin_keeping(tile, memory)
        done = Computed(raw, raw, weights)
        self.math.run(tile, weights, merged, done.sums, keeping)
        return done if keeping is None else replace(done, kept=keeping.finish(raw))

    def _without_signs(
        self, tile: Tile, raw: Bytes, merged: Weights, keeping: Encoder
    ) -> Computed | None:
        """Compute a tile whose undo may give +0 for -0; None if it has to be computed with signs.

        Each -0 would be an exception. As +0 it is merged to the same, but where the result is zero
        as well: there signs count.
        """
        weights = Weights.of_bytes(raw, self.step.source.dtype)
        negative = np.flatnonzero(weights.bits == weights.sign_bit)
        if not negative.size:
            return None
        done = Computed(raw, raw, weights)
        weights.bits[negative] = 0
        self.math.run(tile, weights, merged, done.sums, keeping)
        done = replace(done, kept=keeping.finish(raw))
        weights.bits[negative] = weights.sign_bit
        return done if np.all(merged.bits[negative] & ~merged.sign_bit) else None


class CodedWork(TileWork):
    """Codes to codes: a weight that stays quantized, under the scales it has."""

    def __init__(
        self, step: Step, store: FactorSource, source: DequantizingSource, coder: Coder,
        tile_bytes: int, *, keeps: bool = False, checks: bool = True,
    ) -> None:  # fmt: skip
        """Take a step.

        Args:
            step: the step.
            store: the adapters' tensors.
            source: gives the weight's codes and values.
            coder: makes the codes.
            tile_bytes: the size that its tiles were cut by.
            keeps: whether what takes tiles back is wanted.
            checks: whether the stored codes are read, and refused if packing would not give them
                again; else ``stored`` are those of the result.
        """
        math = StepMath(step, store, self._read, tile_bytes)
        super().__init__(step, math, keeps=keeps)
        self._source, self.coder, self._checks = source, coder, checks

    def _read(self, offset: int, buffer: Bytes) -> None:
        self._source.read(self.step.source, offset, buffer)

    def run(self, tile: Tile, memory: TileMemory, into: Bytes) -> Computed:
        """Read and compute a tile.

        A square weight does not show by its shape which way it lies, so it is the coder's.
        """
        weight, at = self.coder.weight, block_of(tile)
        raw = memory.take("source", tile.read)
        block = self._source.decode(weight, at, raw)
        stored = read_packed(self._source, self.coder, at, block.codes) if self._checks else into
        values = memory.take("values", 4 * block.codes.size).view(np.float32)
        weights = Weights.of_bytes(raw, weight.dtype)
        done = Computed(raw, stored, weights)
        self.math.run(tile, weights, Weights.of_floats(values), done.sums)
        codes = self.coder.codes(block, at, values, done.coded)
        done.sums[2] = np.count_nonzero(codes != block.codes)
        kept = self._keep(tile, replace(block, codes=codes), block.codes)
        into[:] = weight.grid.pack(weight, at, codes)
        return replace(done, kept=kept)

    def _keep(self, tile: Tile, after: Codes, before: Bytes) -> TileCorrection | None:
        if self._units is None:
            return None
        predicted = self.coder.before(after, block_of(tile), tile, self.math.again)
        first, last = self._units.of_tile(tile.rows, tile.columns)
        return keep_exceptions(self._units, first, last, predicted, before)


class MadeWork(TileWork):
    """One stored tensor of a weight that is put into a format: its codes, or one of its scales."""

    def __init__(self, step: Step, gathering: Gathering, rounding: str, seed: int) -> None:
        """Take a step, the weight that its result is a part of, and how values become codes."""
        super().__init__(step, gathering.math, keeps=False)
        self._gathering, self._rounding, self._seed = gathering, rounding, seed

    def run(self, tile: Tile, memory: TileMemory, into: Bytes) -> Computed:
        """Help with the scales until they are known, then read and compute a tile."""
        made, gathering, widest = self.step.made, self._gathering, self._gathering.widest
        assert made is not None  # it is gathered for
        raw = memory.take("source", widest)
        room = memory.take("values", 4 * (widest // gathering.step.source.itemsize))
        small = gathering.gathered(raw, room)
        if made.role != "codes":
            into[:] = small[made.role][tile.read_at : tile.read_at + tile.read]
            return Computed(into, into)
        raw, sums, coded = raw[: tile.read], _four(), _two()
        weights, values = gathering.values(tile, raw, room, sums)
        check_finite(self.step, raw)
        key = noise_key(self._seed, made.name)
        into[:] = gathering.encode(tile, weights, values, self._rounding, key, coded)
        return Computed(raw, raw, weights, sums, coded)


# -- numbers that are none -------------------------------------------------------------------------


def check_finite(step: Step, raw: Bytes) -> None:
    """Refuse NaN and infinity in an adapter's whole tensor; what a base holds is its own.

    Raises:
        AdapterError: a step's source is an adapter's tensor, and ``raw``, a part of it, holds them.
    """
    if step.source_adapter is None:
        return
    check_values(step.source, Weights.of_bytes(raw, step.source.dtype).floats())


WRITE_WIDER = "Write a wider dtype (--dtype bfloat16 or float32), or lower the weight"


WIDER_BLOCKS = "Write a wider type (--dtype bf16 or f32), or lower the weight"


def overflow(step: Step, bad: int, where: str, hint: str = WRITE_WIDER) -> NumericError:
    """Return the error for a step that made ``bad`` numbers of the base NaN or infinite."""
    in_gguf = step.coded is not None and isinstance(step.coded.codec, Decoder)
    return NumericError(
        "the merge would hold NaN or infinity where the base held a number",
        where=where,
        expected=f"values that {_type_name(step)} can hold",
        found=f"{bad} of {step.source.numel} that it cannot",
        hint=WIDER_BLOCKS if in_gguf else hint,
    )


def _type_name(step: Step) -> str:
    """Return what a result is stored as: its dtype, or the format of its codes."""
    return step.dtype if step.coded is None else step.coded.codec.name
