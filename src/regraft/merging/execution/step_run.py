"""One step at work: its tiles, done by several threads, hashed in order, written anywhere."""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from regraft.concurrency import Sequencer
from regraft.deltas.kernels.weights import Bytes, Sums, Weights
from regraft.deltas.undo.units import Counts, Lengths
from regraft.merging.compute.tile_work import Computed, TileMemory, TileWork, overflow
from regraft.merging.files.direct_io import OutputFile
from regraft.merging.files.receipt import TensorRecord
from regraft.merging.inputs.source import Source
from regraft.merging.planning.base_drift import gap_square
from regraft.merging.planning.plan import Step, kept_name
from regraft.merging.planning.tiles import Tile
from regraft.merging.undo.patch import FACTORS, STREAMS, UNITS, packed, section
from regraft.quant.rounding import NOISE, SURVIVED
from regraft.tensors import TensorSpec

Other = tuple[TensorSpec, Source]
"""A tensor of another base, and what it is read from."""


class StepRun:
    """A step while it is executed.

    Tiles may be processed at the same time; their bytes are hashed, and their sums added, in the
    order of their numbers, so that the outcome does not depend on which thread was faster.
    """

    def __init__(
        self, work: TileWork, file: OutputFile, offset: int, source: Source,
        known: str | None = None, other: Other | None = None,
    ) -> None:  # fmt: skip
        """Take what does a step's tiles, and where its result goes.

        Args:
            work: does them.
            file, offset: where the result begins.
            source: what its source is read from.
            known: blake3 (hex) of the stored bytes of its source, if they were read before.
            other: the tensor that its source is compared with, and what that is read from.
        """
        self.step, self._work, self._source = work.step, work, source
        self._file, self._offset, self._known = file, offset, known
        self._source_hash, self._result_hash = blake3(), blake3()
        self._sums: Sums = np.zeros(4, np.float64)
        self._coded: Sums = np.zeros(2, np.float64)
        self._order = Sequencer()
        self._kept: dict[int, tuple[Lengths, Counts]] = {}
        self._other, self._gap = other, 0.0

    @property
    def cost(self) -> int:
        """Memory that its factors take."""
        return self.step.factor_bytes + self._source.cost(self.step.source)

    def work(self, tile: Tile, memory: TileMemory) -> Bytes:
        """Read, compute, hash and write one tile; return what is to be kept of it.

        Raises:
            RegraftError: something could not be read or written, or a factor holds NaN.
            Abandoned: another thread failed.
        """
        at = self._offset + tile.write_at
        if self.step.is_copy and self._known is not None:
            self._move(tile, at, memory)
            return _NOTHING
        result = memory.take("result", tile.write, at - at % self._work.alignment)
        done = self._work.run(tile, memory, result)
        gap = self._gap_of(tile, done.weights)
        payload = _NOTHING
        if done.kept is not None:
            self._kept[tile.number] = (done.kept.lengths, done.kept.counts)
            payload = done.kept.payload
        with self._order.turn(tile.number):
            self._hash(done, result)
            self._gap += gap
        for first, last in self._file.unshared(at, tile.write):
            part = result[first:last]
            self._file.write(at + first, part.data, part.ctypes.data)
        return payload

    def _move(self, tile: Tile, at: int, memory: TileMemory) -> None:
        """Copy a tile whose digest is known: what is shared need not even be read."""
        for first, last in self._file.unshared(at, tile.write):
            begin = at + first
            part = memory.take("result", last - first, begin - begin % self._work.alignment)
            self._source.read(self.step.source, tile.read_at + first, part)
            self._file.write(begin, part.data, part.ctypes.data)

    def _hash(self, done: Computed, result: Bytes) -> None:
        """Add a tile to digests and sums, in its turn."""
        if self._known is None:
            self._source_hash.update(done.stored.data)
        if done.stored is not result:  # else it is a copy, and both digests are one
            self._result_hash.update(result.data)
        self._sums += done.sums
        self._coded += done.coded

    def _gap_of(self, tile: Tile, weights: Weights | None) -> float:
        """Return the square of what lies between a tile's weights and those of the other base."""
        if self._other is None or weights is None:
            return 0.0
        spec, source = self._other
        first = tile.rows[0] * self.step.matrix[1] + tile.columns[0]
        floats = weights.floats()
        raw = np.empty(floats.size * spec.itemsize, np.uint8)
        source.read(spec, first * spec.itemsize, raw)
        return gap_square(floats, Weights.of_bytes(raw, spec.dtype).floats())

    def fail(self) -> None:
        """Wake whoever waits for a tile that will never come."""
        self._order.fail()

    def sections(self) -> list[tuple[str, bytes]]:
        """Return the sections of the patch that follow from all tiles; first that of the tiles."""
        if not self._kept:
            return []
        tables = [self._kept[number] for number in sorted(self._kept)]
        lengths = np.concatenate([lengths for lengths, _ in tables])
        counts = np.concatenate([counts for _, counts in tables])
        name = kept_name(self.step)
        factors = self._work.math.undo_factors()
        return [
            (section(name, STREAMS), b""),
            (section(name, UNITS), packed(lengths.tobytes() + counts.tobytes())),
            *((section(name, f"{FACTORS}.{i}"), f.tobytes()) for i, f in enumerate(factors)),
        ]

    def release(self) -> None:
        """Let go of everything that the step's tiles needed."""
        self._work.math.release()
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
        source = self._known or self._source_hash.hexdigest()
        return TensorRecord(
            name=step.name,
            file=file_name,
            action=step.action,
            dtype=step.dtype,
            shape=step.shape,
            source=kept_name(step),
            source_dtype=step.stored.dtype,
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
            known=self._known is not None,
        )

    @property
    def _survived(self) -> float | None:
        """The share of the delta that is in the codes: <Q - W, delta> / <delta, delta>."""
        if self.step.codes_of is None or not (self.step.segments and self._sums[1] > 0):
            return None
        return float(f"{self._coded[SURVIVED] / self._sums[1]:.9g}")

    @property
    def _noise(self) -> float | None:
        """What rounding to codes added: |Q - W - delta| / |W|."""
        if self.step.codes_of is None or not (self.step.segments and self._sums[0] > 0):
            return None
        return float(f"{np.sqrt(self._coded[NOISE] / self._sums[0]):.9g}")


_NOTHING: Bytes = np.empty(0, np.uint8)


def _norm(squares: float) -> float | None:
    """Return a norm to nine digits, as more would depend on how the tensor was cut; None of NaN."""
    return float(f"{np.sqrt(squares):.9g}") if np.isfinite(squares) else None


def _changed(step: Step, counted: int) -> int:
    """A tensor that an adapter brings along counts as changed throughout."""
    if step.source_adapter is not None and not step.segments:
        return step.source.numel
    return counted if step.segments or step.patches else 0
