"""One tile of a weight that goes into blocks of GGUF: to codes under their scales, or made anew."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from regraft.deltas.kernels.weights import Bytes, Floats, Weights
from regraft.deltas.undo.exceptions import keep_exceptions
from regraft.deltas.undo.units import TileCorrection
from regraft.merging.compute.block_inverse import (
    codes_before,
    decoder_of,
    first_number,
    in_stored_order,
    strips,
)
from regraft.merging.compute.factors import FactorSource
from regraft.merging.compute.requantize import block_of, noise_key
from regraft.merging.compute.step_math import StepMath
from regraft.merging.compute.tile_work import Computed, TileMemory, TileWork
from regraft.merging.inputs.dequantize import DequantizingSource
from regraft.merging.planning.plan import Step
from regraft.merging.planning.tiles import Tile
from regraft.quant.formats.gguf import GRIDDED, UNQUANTIZED, GgufDecoder, made_blocks
from regraft.quant.rounding import account
from regraft.quant.weight import Block, QuantizedWeight


class BlockWork(TileWork):
    """Values to blocks of GGUF, in the order in which llama.cpp stores rows.

    A type that stays and has codes gets others under the scales that are there; plain numbers are
    rounded once; blocks of another type are made by the ``gguf`` package.
    """

    def __init__(
        self, step: Step, store: FactorSource, source: DequantizingSource, rounding: str, seed: int,
        tile_bytes: int, *, keeps: bool = False,
    ) -> None:  # fmt: skip
        """Take a step.

        Args:
            step: the step; its ``coded`` says how the result is stored.
            store: the adapters' tensors.
            source: gives the weight's values and stored bytes.
            rounding: of :data:`regraft.quant.weight.ROUNDINGS`.
            seed: says, with the weight's name, which random bits are taken.
            tile_bytes: the size that its tiles were cut by.
            keeps: whether what takes tiles back is wanted; the type has to be the base's.
        """
        super().__init__(step, StepMath(step, store, self._read, tile_bytes), keeps=keeps)
        if step.coded is None:
            raise TypeError("blocks are of a weight that is kept")
        self._source, self._rounding, self._seed = source, rounding, seed
        self._into, self._stored = step.coded, source.weight(step.source.name)

    def _read(self, offset: int, buffer: Bytes) -> None:
        self._source.read(self.step.source, offset, buffer)

    def run(self, tile: Tile, memory: TileMemory, into: Bytes) -> Computed:
        """Read and compute a tile."""
        at = block_of(tile)
        raw = memory.take("source", tile.read)
        self._read(tile.read_at, raw)
        stored = self._stored_bytes(at)
        weights = Weights.of_bytes(raw, self._stored.dtype)
        done = Computed(raw, stored, weights)
        values = memory.take("values", 4 * at.height * at.width).view(np.float32)
        if self.step.segments:
            self.math.run(tile, weights, Weights.of_floats(values), done.sums)
        else:
            values[:] = weights.floats()
        self._write(_Rows(self._into, at, weights.floats(), values), stored, done, into)
        return replace(done, kept=self._keep(tile, memory, done, into))

    def _stored_bytes(self, at: Block) -> Bytes:
        offset, length = decoder_of(self._stored).place(self._stored, at)
        stored = np.empty(length, np.uint8)
        self._source.read_stored(self._stored.codes, offset, stored)
        return stored

    def _write(self, rows: _Rows, stored: Bytes, done: Computed, into: Bytes) -> None:
        """Fill the result, and add what became of values to the sums."""
        decoder, was, values = rows.decoder, rows.stored(rows.was), rows.stored(rows.values)
        if decoder == decoder_of(self._stored) and decoder.type in GRIDDED:
            from regraft.quant.formats.gguf_rounding import rounded  # compiled; only here

            key = noise_key(self._seed, self._into.name)
            into[:], changed = rounded(
                decoder.type, stored, was, values, self._rounding, key, rows.first, done.coded
            )
            done.sums[2] = changed
            return
        _make(decoder, values, done, into)
        after = decoder.decoded(into)
        if decoder.type not in UNQUANTIZED:  # a scale beyond float16 spoils its whole block
            lost = np.isfinite(values) & ~np.isfinite(after)
            done.sums[3] += np.count_nonzero(lost)
        done.sums[2] = np.count_nonzero(after != was)
        account(was, values, after, done.coded)

    def _keep(
        self, tile: Tile, memory: TileMemory, done: Computed, into: Bytes
    ) -> TileCorrection | None:
        """Return what takes a tile back; None where that is not wanted."""
        if self._units is None:
            return None
        if decoder_of(self._into).type in UNQUANTIZED:
            return self._keep_numbers(tile, memory, done)
        from regraft.quant.formats.gguf_rounding import codes_in  # compiled; only here

        decoder, at, told = decoder_of(self._into), block_of(tile), list[Bytes]()
        begin = decoder.place(self._into, at)[0]
        for strip in strips(self.step, at):
            first, size = decoder.place(self._into, strip)
            blocks = into[first - begin : first - begin + size]
            told.append(
                codes_before(
                    self.step, strip, blocks, self._rounding, self._seed, self.math.again
                )
            )  # fmt: skip
        units = self._units.of_tile(tile.rows, tile.columns)
        before = codes_in(decoder.type, done.stored)
        return keep_exceptions(self._units, *units, np.concatenate(told), before)

    def _keep_numbers(
        self, tile: Tile, memory: TileMemory, done: Computed
    ) -> TileCorrection | None:
        """Return the same of plain numbers: they are merged once more, into their own type."""
        keeping = self._begin_keeping(tile, memory)
        assert done.weights is not None
        merged = Weights.of_bytes(memory.take("again", tile.read), decoder_of(self._into).type)
        self.math.run(tile, done.weights, merged, np.zeros(4, np.float64), keeping)
        return keeping.finish(done.raw) if keeping is not None else None


def _make(decoder: GgufDecoder, values: Floats, done: Computed, into: Bytes) -> None:
    """Fill the result with blocks of values; what no longer is a number is counted."""
    shifted = values + np.float32(decoder.added) if decoder.added else values
    if decoder.type in UNQUANTIZED:
        whole = np.zeros(4, np.float64)
        into_weights = Weights.of_bytes(into, decoder.type)
        into_weights.take(Weights.of_floats(shifted), whole)
        done.sums[3] += whole[3]
        return
    into[:] = made_blocks(shifted, decoder.type)


@dataclass(frozen=True)
class _Rows:
    """Values of a block, as the model has its rows: flat float32."""

    weight: QuantizedWeight
    at: Block
    was: Floats
    values: Floats

    @property
    def decoder(self) -> GgufDecoder:
        """How they are to be stored."""
        return decoder_of(self.weight)

    @property
    def first(self) -> int:
        """Number of the first element as stored."""
        return first_number(self.weight, self.at)

    def stored(self, values: Floats) -> Floats:
        """Return values in the order in which rows are stored, flat."""
        return in_stored_order(self.weight, self.at, values.view(np.uint8)).view(np.float32)
