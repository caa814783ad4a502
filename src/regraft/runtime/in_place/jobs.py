"""What a merge does to a live parameter, tile by tile in its own memory, and what takes it back."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch

from regraft.deltas.kernels.weights import Bytes, Sums, Weights
from regraft.deltas.undo.exceptions import put_back
from regraft.deltas.undo.units import TileCorrection
from regraft.errors import MismatchError
from regraft.merging.compute.factors import FactorSource
from regraft.merging.compute.requantize import Coder, block_of
from regraft.merging.compute.step_inverse import Backwards
from regraft.merging.compute.step_math import ReadSource, StepMath
from regraft.merging.compute.tile_work import (
    CodedWork,
    Computed,
    PlainWork,
    TileMemory,
    overflow,
)
from regraft.merging.inputs.dequantize import DequantizingSource
from regraft.merging.planning.plan import Step
from regraft.merging.planning.tiles import Tile, tiles_of
from regraft.runtime.in_place.pool import TILE_BYTES
from regraft.runtime.in_place.quantized import LiveQuantized
from regraft.runtime.in_place.weights import TensorMemory

Current = Callable[[], torch.Tensor]
"""Gives a parameter as it is now: models are moved to other devices, and parameters replaced."""


class ParameterJob(ABC):
    """One parameter on its way to the merged one, or back.

    Attributes:
        step: what is done to it.
        tiles: its pieces.
        done: numbers of the tiles that are merged now.
        keeps: whether it can go back; else the parameter is one that the merge has made itself.
    """

    def __init__(self, step: Step, current: Current, *, keeps: bool) -> None:
        self.step, self.keeps = step, keeps
        self.tiles = list(tiles_of(step, TILE_BYTES))
        self.done: set[int] = set()
        self._current = current
        self._kept: dict[int, TileCorrection | Bytes] = {}
        self._sums: dict[int, Sums] = {}
        self._lock = threading.Lock()  # over what tiles leave; their memory does not overlap
        self._memory: TensorMemory | None = None
        self._backwards: Backwards | None = None

    # -- the memory ------------------------------------------------------------------------------

    @property
    def memory(self) -> TensorMemory:
        """The parameter's memory, while the job is open."""
        if self._memory is None:
            raise ValueError(f"{self.step.name} is not open")
        return self._memory

    def open(self) -> None:
        """Look at the parameter as it is now.

        Raises:
            UnsupportedError: it is offloaded.
            MismatchError: it is not the one that was merged.
        """
        memory = TensorMemory(self._prepared(self._current()), self.step.name)
        if memory.nbytes != self._nbytes:
            raise MismatchError(
                "the weight has another size than the merge knows it by", where=self.step.name,
                expected=f"{self._nbytes} bytes", found=f"{memory.nbytes} bytes",
                hint="Un-merge before the model is converted to another dtype or resized",
            )  # fmt: skip
        self._memory = memory

    def close(self) -> None:
        """Let go of the memory, and of what can be computed again."""
        self._memory = self._backwards = None
        self._math.release_factors()

    @property
    def _nbytes(self) -> int:
        return self.step.nbytes

    def _prepared(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    # -- there and back --------------------------------------------------------------------------

    @property
    @abstractmethod
    def _math(self) -> StepMath:
        """The arithmetic."""

    def forward(self, tile: Tile, memory: TileMemory) -> None:
        """Merge a tile. If anything fails, the tile is as it was.

        Raises:
            NumericError: with its last tile: the weight would hold NaN or infinity.
            RegraftError: something could not be read.
        """
        kept, sums = self._merge(tile, memory)
        with self._lock:
            self._kept[tile.number] = kept
            self._sums[tile.number] = sums
            self.done.add(tile.number)
            last = len(self.done) == len(self.tiles)
        if last:
            self._math.release_factors()
            self._check()

    def backward(self, tile: Tile, memory: TileMemory) -> None:
        """Take a tile back. If anything fails, it is as it was.

        Raises:
            MismatchError: the weight has been changed since it was merged.
        """
        self._restore(tile, memory, self._kept[tile.number])
        with self._lock:
            self.done.remove(tile.number)

    def forget(self) -> None:
        """Let go of all that the way back needs."""
        self._kept.clear()

    def _check(self) -> None:
        broken = int(self.sums[3])
        if broken:
            raise overflow(
                self.step, broken, self.step.name,
                "Lower the weight, or load the model in a wider dtype",
            )  # fmt: skip

    @abstractmethod
    def _merge(self, tile: Tile, memory: TileMemory) -> tuple[TileCorrection | Bytes, Sums]:
        """Merge a tile; return what is to be kept of it, and its six sums."""

    @abstractmethod
    def _restore(self, tile: Tile, memory: TileMemory, kept: TileCorrection | Bytes) -> None:
        """Take a tile back with what was kept of it."""

    def _back(self) -> Backwards:
        with self._lock:
            if self._backwards is None:
                self._backwards = self._math.backwards()
            return self._backwards

    # -- figures ---------------------------------------------------------------------------------

    @property
    def sums(self) -> Sums:
        """The sums of all tiles: four as kernels give them, then two as rounding to codes does."""
        total: Sums = np.sum([self._sums[n] for n in sorted(self._sums)] or [np.zeros(6)], axis=0)
        return total

    @property
    def nbytes(self) -> int:
        """The bytes that the way back takes."""
        kept = sum(map(_size, self._kept.values()))
        return kept + (sum(f.nbytes for f in self._math.undo_factors()) if kept else 0)


def _size(kept: TileCorrection | Bytes) -> int:
    if isinstance(kept, TileCorrection):
        return kept.payload.nbytes + kept.lengths.nbytes + kept.counts.nbytes
    return kept.nbytes


class PlainJob(ParameterJob):
    """A parameter of plain values.

    What it is made from is itself, or something else: a tensor of an adapter, or codes.
    """

    def __init__(
        self,
        step: Step,
        store: FactorSource,
        current: Current,
        read: ReadSource | None,
        *,
        keeps: bool,
    ) -> None:
        """Take what is done to which parameter.

        Args:
            step: what is done.
            store: the adapters' tensors.
            current: gives the parameter.
            read: reads what it is made from; None for the parameter itself.
            keeps: whether it has to go back.
        """
        super().__init__(step, current, keeps=keeps)
        self._own = read is None
        self._work = PlainWork(
            step, store, read or self._read_own, TILE_BYTES, keeps=self._own and keeps,
            checks=False, norms=False,
        )  # fmt: skip

    @property
    def _math(self) -> StepMath:
        return self._work.math

    def _read_own(self, offset: int, buffer: Bytes) -> None:
        self.memory.read(offset, buffer)

    def _merge(self, tile: Tile, memory: TileMemory) -> tuple[TileCorrection | Bytes, Sums]:
        before = None if self._own else self._before(tile)
        part = self.memory.part(tile.write_at, tile.write)
        result = part if part is not None else memory.take("result", tile.write)
        try:
            raw = self._work.read(tile, memory, result)
            if self._own:
                before = raw  # from here on: nothing was written yet
            done = self._work.compute(tile, raw, memory, result)
            if part is None:
                self.memory.write(tile.write_at, result)
        except BaseException:
            if before is not None:
                self.memory.write(tile.write_at, before)
            raise
        return self._to_keep(done, before), _sums(done)

    def _to_keep(self, done: Computed, before: Bytes | None) -> TileCorrection | Bytes:
        if self._own:
            return _NOT_KEPT if done.kept is None else done.kept
        return _NOTHING if before is None else before

    def _before(self, tile: Tile) -> Bytes | None:
        """Return a copy of what a tile of something else takes the place of, if it is kept."""
        if not self.keeps:
            return None
        before = np.empty(tile.write, np.uint8)
        self.memory.read(tile.write_at, before)
        return before

    def _restore(self, tile: Tile, memory: TileMemory, kept: TileCorrection | Bytes) -> None:
        if not isinstance(kept, TileCorrection):
            self.memory.write(tile.write_at, kept)
            return
        merged = memory.take("source", tile.write)
        self.memory.read(tile.write_at, merged)
        part = self.memory.part(tile.read_at, tile.read)
        raw = part if part is not None else memory.take("result", tile.read)
        weights, dtype = Weights.of_bytes(raw, self.step.source.dtype), self.step.dtype
        try:
            fits = self._back().restore(tile, Weights.of_bytes(merged, dtype), weights, raw, kept)
            if not fits:
                raise _changed(self.step)
            if part is None:
                self.memory.write(tile.read_at, raw)
        except BaseException:
            self.memory.write(tile.write_at, merged)
            raise


class CodedJob(ParameterJob):
    """A parameter that stays quantized: codes to codes, under the scales it has."""

    def __init__(
        self, step: Step, store: FactorSource, quantized: LiveQuantized, coder: Coder
    ) -> None:
        super().__init__(step, lambda: quantized.parameter, keeps=True)
        self._quantized, self._coder = quantized, coder
        self._source = DequantizingSource({coder.weight.name: coder.weight}, quantized)
        self._work = CodedWork(step, store, self._source, coder, TILE_BYTES, keeps=True)

    @property
    def _math(self) -> StepMath:
        return self._work.math

    @property
    def _nbytes(self) -> int:
        return self._coder.weight.codes.nbytes

    def _prepared(self, tensor: torch.Tensor) -> torch.Tensor:
        del tensor
        return self._quantized.open()

    def close(self) -> None:
        """Let go of the memory."""
        super().close()
        self._quantized.close()

    def _merge(self, tile: Tile, memory: TileMemory) -> tuple[TileCorrection, Sums]:
        codes = memory.take("result", tile.write)
        done = self._work.run(tile, memory, codes)
        assert done.kept is not None  # it was asked for
        self._write(tile, codes, done.stored)
        return done.kept, _sums(done)

    def _restore(self, tile: Tile, memory: TileMemory, kept: TileCorrection | Bytes) -> None:
        del memory
        assert isinstance(kept, TileCorrection)
        weight, at, units = self._coder.weight, block_of(tile), self.step.units
        block = self._source.codes(weight, at)
        codes = np.array(self._coder.before(block, at, tile, self._back().again), np.uint8)
        put_back(units, *units.of_tile(tile.rows, tile.columns), kept, codes)
        self._write(
            tile, weight.grid.pack(weight, at, codes), weight.grid.pack(weight, at, block.codes)
        )

    def _write(self, tile: Tile, codes: Bytes, before: Bytes) -> None:
        try:
            self.memory.write(tile.write_at, codes)
        except BaseException:
            self.memory.write(tile.write_at, before)
            raise


def _sums(done: Computed) -> Sums:
    total: Sums = np.concatenate([done.sums, done.coded])
    return total


def _changed(step: Step) -> MismatchError:
    return MismatchError(
        "the weight has been changed since it was merged", where=step.name,
        hint="Un-merge before the base is trained or loaded anew; now only loading it again helps",
    )  # fmt: skip


_NOTHING: Bytes = np.empty(0, np.uint8)
_NOT_KEPT = TileCorrection(_NOTHING, np.empty(0, np.uint32), np.empty(0, np.uint16))
