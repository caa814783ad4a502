"""One step at work: its tiles, done by several threads, hashed in order, written anywhere."""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from regraft.concurrency import Sequencer
from regraft.deltas.undo.exceptions import keep_exceptions
from regraft.deltas.undo.units import Counts, Encoder, Lengths
from regraft.deltas.weights import Bytes, Sums, Weights
from regraft.errors import NumericError
from regraft.merging.compute.factors import FactorStore, check_values
from regraft.merging.compute.requantize import Coder, block_of, noise_key, read_packed
from regraft.merging.compute.step_math import StepMath
from regraft.merging.files.direct_io import BLOCK, OutputFile
from regraft.merging.files.receipt import TensorRecord
from regraft.merging.inputs.dequantize import DequantizingSource
from regraft.merging.inputs.source import Source
from regraft.merging.planning.base_drift import gap_square
from regraft.merging.planning.plan import Step, kept_name
from regraft.merging.planning.tiles import Tile
from regraft.merging.undo.patch import FACTORS, STREAMS, UNITS, packed, section
from regraft.quant.grid import Codes
from regraft.quant.rounding import NOISE, SURVIVED
from regraft.tensors import TensorSpec

if TYPE_CHECKING:
    from regraft.merging.compute.two_pass_quantize import Gathering

Other = tuple[TensorSpec, Source]
"""A tensor of another base, and what it is read from."""


class Buffers:
    """One thread's memory for tiles: what is read, and what is written."""

    def __init__(self, tile_bytes: int) -> None:
        self.source: Bytes = np.frombuffer(mmap.mmap(-1, tile_bytes + BLOCK), np.uint8)
        self._result: Bytes = np.frombuffer(mmap.mmap(-1, 2 * tile_bytes + 2 * BLOCK), np.uint8)
        self._codes: Bytes = np.empty(0, np.uint8)
        self.encoder = Encoder()

    def result(self, length: int, offset: int) -> tuple[Bytes, int]:
        """Return room for ``length`` bytes bound for ``offset`` of a file, and its address.

        It lies in its memory page as the bytes will lie in their disk block, as direct I/O wants
        it, unless that would misalign its elements.
        """
        return _room(self._result, length, offset, 4)

    def codes(self, packed: Bytes, offset: int) -> tuple[Bytes, int]:
        """Return codes as direct I/O wants them at ``offset`` of a file, and their address."""
        if self._codes.size < packed.size + 2 * BLOCK:
            self._codes = np.frombuffer(mmap.mmap(-1, packed.size + 2 * BLOCK), np.uint8)
        room, address = _room(self._codes, packed.size, offset, 1)
        room[:] = packed
        return room, address


def _room(memory: Bytes, length: int, offset: int, align: int) -> tuple[Bytes, int]:
    start = offset % BLOCK
    start -= start % align
    return memory[start : start + length], memory.ctypes.data + start


class StepRun:
    """A step while it is executed.

    Tiles may be processed at the same time; their bytes are hashed, and their sums added, in the
    order of their numbers, so that the outcome does not depend on which thread was faster.
    """

    def __init__(
        self,
        step: Step,
        file: OutputFile,
        offset: int,
        source: Source,
        store: FactorStore,
        tile_bytes: int,
        keeping: bool,
        coder: Coder | None = None,
        other: Other | None = None,
        gathering: Gathering | None = None,
        choice: tuple[str, int] = ("nearest", 0),
    ) -> None:
        """Take a step and where its result goes.

        Args:
            step: the step.
            file, offset: where the result begins.
            source: what its source is read from.
            store: the adapters' tensors.
            tile_bytes: the size that its tiles were cut by.
            keeping: whether what an undo needs is kept.
            coder: makes the codes of a result that stays quantized.
            other: the tensor that its source is compared with, and what that is read from.
            gathering: the weight that its result is a part of, if it is put into a format.
            choice: rounding and seed of such a weight's codes.
        """
        self.step, self._file, self._offset, self._source = step, file, offset, source
        self._math = StepMath(step, store, self._read, tile_bytes)
        self._source_hash, self._result_hash = blake3(), blake3()
        self._sums: Sums = np.zeros(4, np.float64)
        self._order = Sequencer()
        self._units = step.units if keeping and step.is_invertible else None
        self._kept: dict[int, tuple[Lengths, Counts]] = {}
        self._coder, self._coded_sums = coder, np.zeros(2, np.float64)
        self._other, self._gap = other, 0.0
        self._gathering, self._choice = gathering, choice

    @property
    def cost(self) -> int:
        """Memory that its factors take."""
        return self.step.factor_bytes + self._source.cost(self.step.source)

    def _read(self, offset: int, buffer: Bytes) -> None:
        self._source.read(self.step.source, offset, buffer)

    def work(self, tile: Tile, buffers: Buffers) -> Bytes:
        """Read, compute, hash and write one tile; return what is to be kept of it.

        Raises:
            RegraftError: something could not be read or written, or a factor holds NaN.
        """
        if self._coder is not None:
            return self._work_codes(tile, buffers, self._coder)
        if self._gathering is not None:
            return self._work_made(tile, buffers, self._gathering)
        sums: Sums = np.zeros(4, np.float64)
        at = self._offset + tile.write_at
        result, address = buffers.result(tile.write, at)
        payload = _NOTHING
        if tile.kind == "bytes":
            self._read(tile.read_at, result)
            check_finite(self.step, result)
            self._take_turn(tile, result, None, sums)
        else:
            source = buffers.source[: tile.read]
            self._read(tile.read_at, source)
            check_finite(self.step, source)
            weights = Weights.of_bytes(source, self.step.source.dtype)
            merged = Weights.of_bytes(result, self.step.dtype)
            keeping = self._begin_keeping(tile, buffers)
            gap = self._gap_of(tile, weights)
            self._math.run(tile, weights, merged, sums, keeping)
            if keeping is not None:
                kept = keeping.finish(source)
                self._kept[tile.number] = (kept.lengths, kept.counts)
                payload = kept.payload
            self._take_turn(tile, source, result, sums, gap=gap)
        self._file.write(at, result.data, address)
        return payload

    def _work_codes(self, tile: Tile, buffers: Buffers, coder: Coder) -> Bytes:
        """As :meth:`work`, for a result that stays quantized."""
        if not isinstance(self._source, DequantizingSource):
            raise TypeError("codes come from a quantized base")
        weight, at = coder.weight, block_of(tile)
        raw = buffers.source[: tile.read]
        block = self._source.decode(weight, at, raw)
        stored = read_packed(self._source, coder, at, block.codes)
        weights = Weights.of_bytes(raw, weight.dtype)
        room, _ = buffers.result(4 * block.codes.size, 0)
        values = room.view(np.float32)
        sums: Sums = np.zeros(4, np.float64)
        self._math.run(tile, weights, Weights.of_floats(values), sums)
        rounded: Sums = np.zeros(2, np.float64)
        codes = coder.codes(block, at, values, rounded)
        sums[2] = np.count_nonzero(codes != block.codes)
        payload = self._keep_codes(tile, coder, replace(block, codes=codes), block.codes)
        offset = self._offset + tile.write_at
        packed, address = buffers.codes(weight.grid.pack(weight, at, codes), offset)
        gap = self._gap_of(tile, weights)
        self._take_turn(tile, stored, packed, sums, rounded, gap)
        self._file.write(offset, packed.data, address)
        return payload

    def _work_made(self, tile: Tile, buffers: Buffers, gathering: Gathering) -> Bytes:
        """As :meth:`work`, for a part of a weight that is put into a format."""
        made = self.step.made
        room, _ = buffers.result(2 * buffers.source.size - 2 * BLOCK, 0)
        small = gathering.gathered(buffers.source, room)
        assert made is not None  # it is gathered for
        offset = self._offset + tile.write_at
        sums: Sums = np.zeros(4, np.float64)
        if made.role != "codes":
            result, address = buffers.codes(
                small[made.role][tile.read_at : tile.read_at + tile.read], offset
            )
            self._take_turn(tile, result, None, sums)
            self._file.write(offset, result.data, address)
            return _NOTHING
        raw, coded = buffers.source[: tile.read], np.zeros(2, np.float64)
        weights, values = gathering.values(tile, raw, room, sums)
        check_finite(self.step, raw)
        rounding, seed = self._choice
        key = noise_key(seed, made.name)
        packed, address = buffers.codes(
            gathering.encode(tile, weights, values, rounding, key, coded), offset
        )
        gap = self._gap_of(tile, weights)
        self._take_turn(tile, raw, packed, sums, coded, gap)
        self._file.write(offset, packed.data, address)
        return _NOTHING

    def _keep_codes(self, tile: Tile, coder: Coder, after: Codes, before: Bytes) -> Bytes:
        if self._units is None:
            return _NOTHING
        predicted = coder.before(after, block_of(tile), tile, self._math.again)
        first, last = self._units.of_tile(tile.rows, tile.columns)
        kept = keep_exceptions(self._units, first, last, predicted, before)
        self._kept[tile.number] = (kept.lengths, kept.counts)
        return kept.payload

    def _gap_of(self, tile: Tile, weights: Weights) -> float:
        """Return the square of what lies between a tile's weights and those of the other base."""
        if self._other is None:
            return 0.0
        spec, source = self._other
        first = tile.rows[0] * self.step.matrix[1] + tile.columns[0]
        floats = weights.floats()
        raw = np.empty(floats.size * spec.itemsize, np.uint8)
        source.read(spec, first * spec.itemsize, raw)
        return gap_square(floats, Weights.of_bytes(raw, spec.dtype).floats())

    def _begin_keeping(self, tile: Tile, buffers: Buffers) -> Encoder | None:
        if self._units is None or tile.kind != "rows":
            return None
        first, last = self._units.of_tile(tile.rows, tile.columns)
        buffers.encoder.begin(self._units, first, last, self.step.source.itemsize)
        return buffers.encoder

    def _take_turn(
        self, tile: Tile, source: Bytes, result: Bytes | None, sums: Sums,
        coded: Sums | None = None, gap: float = 0.0,
    ) -> None:  # fmt: skip
        """Wait for this tile's turn at the digests and sums; without ``result`` both are one."""
        with self._order.turn(tile.number):
            self._source_hash.update(source.data)
            if result is not None:
                self._result_hash.update(result.data)
            self._sums += sums
            if coded is not None:
                self._coded_sums += coded
            self._gap += gap

    def fail(self) -> None:
        """Wake whoever waits for a tile that will never come."""
        self._order.fail()
        if self._gathering is not None:
            self._gathering.fail()

    def sections(self) -> list[tuple[str, bytes]]:
        """Return the sections of the patch that follow from all tiles; first that of the tiles."""
        if self._units is None:
            return []
        tables = [self._kept[number] for number in sorted(self._kept)]
        lengths = np.concatenate([lengths for lengths, _ in tables])
        counts = np.concatenate([counts for _, counts in tables])
        name = kept_name(self.step)
        factors = self._math.undo_factors()
        return [
            (section(name, STREAMS), b""),
            (section(name, UNITS), packed(lengths.tobytes() + counts.tobytes())),
            *((section(name, f"{FACTORS}.{i}"), f.tobytes()) for i, f in enumerate(factors)),
        ]

    def release(self) -> None:
        """Let go of everything that the step's tiles needed."""
        self._math.release()
        self._source.release(self.step.source)

    def finish(self, file_name: str) -> TensorRecord:
        """Return the step's record, once all its tiles are done.

        Raises:
            NumericError: the merge made NaN or infinity out of numbers.
        """
        if self._sums[3]:
            raise overflow(self.step, int(self._sums[3]), f"{file_name}: {self.step.name}")
        step, sums = self.step, self._sums
        plain = not (step.segments or step.patches) and step.codes_of is None
        same_bytes = plain and (step.source.dtype == step.dtype or step.made is not None)
        source = self._source_hash.hexdigest()
        return TensorRecord(
            name=step.name,
            file=file_name,
            action=step.action,
            dtype=step.dtype,
            shape=step.shape,
            source=kept_name(step),
            source_dtype=step.source.dtype if step.coded is None else step.coded.codes.dtype,
            source_blake3=source,
            blake3=source if same_bytes else self._result_hash.hexdigest(),
            features=step.features,
            scales=step.scales,
            adapters=step.adapters,
            weight_norm=_norm(sums[0]) if step.segments else None,
            delta_norm=_norm(sums[1]) if step.segments or step.patches else None,
            changed=_changed(step, int(sums[2])),
            survived=self._survived,
            codes=step.source.numel if step.codes_of is not None else 0,
            noise=self._noise,
            base_gap=_norm(self._gap) if self._other is not None else None,
        )

    @property
    def _survived(self) -> float | None:
        """The share of the delta that is in the codes: <Q - W, delta> / <delta, delta>."""
        if self.step.codes_of is None or not (self.step.segments and self._sums[1] > 0):
            return None
        return float(f"{self._coded_sums[SURVIVED] / self._sums[1]:.9g}")

    @property
    def _noise(self) -> float | None:
        """What rounding to codes added: |Q - W - delta| / |W|."""
        if self.step.codes_of is None or not (self.step.segments and self._sums[0] > 0):
            return None
        return float(f"{np.sqrt(self._coded_sums[NOISE] / self._sums[0]):.9g}")


def check_finite(step: Step, raw: Bytes) -> None:
    """Refuse NaN and infinity in an adapter's whole tensor; what a base holds is its own.

    Raises:
        AdapterError: a step's source is an adapter's tensor, and ``raw``, a part of it, holds them.
    """
    if step.source_adapter is None:
        return
    check_values(step.source, Weights.of_bytes(raw, step.source.dtype).floats())


WRITE_WIDER = "Write a wider dtype (--dtype bfloat16 or float32), or lower the weight"


def overflow(step: Step, bad: int, where: str, hint: str = WRITE_WIDER) -> NumericError:
    """Return the error for a step that made ``bad`` numbers of the base NaN or infinite."""
    return NumericError(
        "the merge would hold NaN or infinity where the base held a number",
        where=where,
        expected=f"values that {step.dtype} can hold",
        found=f"{bad} of {step.source.numel} that it cannot",
        hint=hint,
    )


_NOTHING: Bytes = np.empty(0, np.uint8)


def _norm(squares: float) -> float | None:
    """Return a norm to nine digits, as more would depend on how the tensor was cut; None of NaN."""
    return float(f"{np.sqrt(squares):.9g}") if np.isfinite(squares) else None


def _changed(step: Step, counted: int) -> int:
    """A tensor that an adapter brings along counts as changed throughout."""
    if step.source_adapter is not None and not step.segments:
        return step.source.numel
    return counted if step.segments or step.patches else 0
