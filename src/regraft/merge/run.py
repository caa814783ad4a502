"""One step at work: its tiles, done by several threads, hashed in order, written anywhere."""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from regraft.deltas import kernels
from regraft.deltas.residual import FACTORIZATIONS
from regraft.deltas.views import Delta
from regraft.errors import NumericError
from regraft.formats.reading import FilePool
from regraft.merge.factors import FactorStore, Floats, Packed, Pair, pack
from regraft.merge.plan import Segment, Step
from regraft.merge.receipt import TensorRecord
from regraft.merge.tiles import Tile
from regraft.merge.writer import BLOCK, OutputFile

Bytes = npt.NDArray[np.uint8]


class Buffers:
    """One thread's memory for tiles: what is read, and what is written."""

    def __init__(self, tile_bytes: int) -> None:
        self.source: Bytes = np.frombuffer(mmap.mmap(-1, tile_bytes + BLOCK), np.uint8)
        self._result: Bytes = np.frombuffer(mmap.mmap(-1, 2 * tile_bytes + 2 * BLOCK), np.uint8)

    def result(self, length: int, offset: int) -> tuple[Bytes, int]:
        """Return room for ``length`` bytes bound for ``offset`` of a file, and its address.

        It lies in its memory page as the bytes will lie in their disk block, as direct I/O wants
        it; unless that would misalign its elements.
        """
        start = offset % BLOCK
        start -= start % 4
        view = self._result[start : start + length]
        return view, self._result.ctypes.data + start


_NO16: npt.NDArray[np.uint16] = np.empty(0, np.uint16)
_NO32: Floats = np.empty(0, np.float32)


def typed(raw: Bytes, dtype: str) -> tuple[npt.NDArray[np.uint16], Floats]:
    """Return a buffer as (uint16, float32) views, the one its dtype does not use being empty."""
    if kernels.KINDS[dtype] == kernels.F32:
        return _NO16, raw.view(np.float32)
    return raw.view(np.uint16), _NO32


@dataclass
class Prepared:
    """What has to be known of a whole tensor before its first tile is merged."""

    residuals: dict[int, Pair] = field(default_factory=dict)
    column_factors: dict[int, Floats] = field(default_factory=dict)
    patches: dict[int, tuple[int, Floats]] = field(default_factory=dict)


class StepRun:
    """A step while it is executed.

    Tiles may be processed at the same time; their bytes are hashed, and their sums added, in the
    order of their numbers, so that the outcome does not depend on which thread was faster.
    """

    def __init__(
        self, step: Step, file: OutputFile, offset: int, files: FilePool, store: FactorStore
    ) -> None:
        self.step, self._file, self._offset = step, file, offset
        self._files, self._store = files, store
        self._source_hash, self._result_hash = blake3(), blake3()
        self._sums = np.zeros(4, np.float64)
        self._turn, self._next = threading.Condition(), 0
        self._lock, self._prepared = threading.Lock(), None
        self._packed: tuple[int, Packed] | None = None
        self.failed = False

    # -- one tile --------------------------------------------------------------------------------

    def work(self, tile: Tile, buffers: Buffers, scratch_bytes: int) -> None:
        """Read, compute, hash and write one tile."""
        sums = np.zeros(4, np.float64)
        at = self._offset + tile.write_at
        result, address = buffers.result(tile.write, at)
        if tile.kind == "bytes":
            self._files.read_into(self.step.source, tile.read_at, result)
            self._hash(tile, result, None, sums)
        else:
            source = buffers.source[: tile.read]
            self._files.read_into(self.step.source, tile.read_at, source)
            self._compute(tile, source, result, sums, scratch_bytes)
            self._hash(tile, source, result, sums)
        self._file.write(at, memoryview(result), address)

    def _compute(
        self, tile: Tile, source: Bytes, result: Bytes, sums: npt.NDArray[np.float64], scratch: int
    ) -> None:
        x16, x32 = typed(source, self.step.source.dtype)
        y16, y32 = typed(result, self.step.dtype)
        kind, out_kind = kernels.KINDS[self.step.source.dtype], kernels.KINDS[self.step.dtype]
        if tile.kind == "values":
            count = tile.rows[1] - tile.rows[0]
            kernels.convert(x16, x32, kind, y16, y32, out_kind, count, sums)
            return
        prepared = self._prepare(scratch)
        if tile.kind == "rows":
            self._merge_rows(tile, (x16, x32, kind), (y16, y32, out_kind), prepared, sums)
        self._patch(tile, (x16, x32, kind), (y16, y32, out_kind), prepared, sums)

    def _merge_rows(self, tile, source, result, prepared, sums) -> None:  # type: ignore[no-untyped-def]
        width = tile.columns[1] - tile.columns[0]
        row = tile.rows[0]
        for segment in self.step.segments:
            low, high = max(segment.rows[0], tile.rows[0]), min(segment.rows[1], tile.rows[1])
            if low >= high:
                continue
            self._plain(row, low, tile, source, result, sums)
            packed = self._pack(segment, (low, high), tile, source, prepared)
            x16, x32, kind = _cut(source, (low - tile.rows[0]) * width, (high - low) * width)
            y16, y32, out_kind = _cut(result, (low - tile.rows[0]) * width, (high - low) * width)
            kernels.merge_rows(
                x16, x32, kind, y16, y32, out_kind, high - low, width,
                packed.left, packed.right, packed.right_ld, low - segment.rows[0], tile.columns[0],
                packed.table, packed.scales, packed.factors, sums,
            )  # fmt: skip
            row = high
        self._plain(row, tile.rows[1], tile, source, result, sums)

    def _plain(self, low: int, high: int, tile: Tile, source, result, sums) -> None:  # type: ignore[no-untyped-def]
        """Copy (or convert) rows that no delta falls on."""
        width = tile.columns[1] - tile.columns[0]
        if low >= high:
            return
        x16, x32, kind = _cut(source, (low - tile.rows[0]) * width, (high - low) * width)
        y16, y32, out_kind = _cut(result, (low - tile.rows[0]) * width, (high - low) * width)
        if kind == out_kind:
            y16[:], y32[:] = x16, x32
        else:
            kernels.convert(x16, x32, kind, y16, y32, out_kind, (high - low) * width, sums)

    def _patch(self, tile: Tile, source, result, prepared: Prepared, sums) -> None:  # type: ignore[no-untyped-def]
        """Put the replaced rows in; what a delta did to them before does not count."""
        if not self.step.patches:
            return
        left, right = tile.columns
        width = right - left
        for row, (_, values) in prepared.patches.items():
            if not tile.rows[0] <= row < tile.rows[1]:
                continue
            y16, y32, out_kind = _cut(result, (row - tile.rows[0]) * width, width)
            new = np.ascontiguousarray(values[left:right])
            scratch = np.zeros(4, np.float64)
            kernels.convert(_NO16, new, kernels.F32, y16, y32, out_kind, width, scratch)
            if tile.kind == "append":
                sums[2] += width
            else:
                self._recount(row - tile.rows[0], width, source, result, sums)

    def _recount(self, row: int, width: int, source, result, sums) -> None:  # type: ignore[no-untyped-def]
        old, new = _as_float(_cut(source, row * width, width)), _as_float(
            _cut(result, row * width, width)
        )
        sums[1] += float(np.sum(np.square(new.astype(np.float64) - old.astype(np.float64))))
        sums[2] += int(np.count_nonzero(old.view(np.uint32) != new.view(np.uint32)))

    # -- factors ---------------------------------------------------------------------------------

    def _pack(self, segment: Segment, rows: tuple[int, int], tile: Tile, source, prepared) -> Packed:  # type: ignore[no-untyped-def]
        by_row = any(d.magnitude is not None and not d.by_column for d in segment.deltas)
        with self._lock:
            if not by_row and self._packed is not None and self._packed[0] == id(segment):
                return self._packed[1]
            pairs = [self._pair(delta, segment, prepared) for delta in segment.deltas]
            dora = [
                self._dora(delta, pair, segment, rows, tile, source, prepared)
                for delta, pair in zip(segment.deltas, pairs, strict=True)
            ]
            packed = pack(segment, pairs, dora)
            self._packed = (id(segment), packed)
            return packed

    def _pair(self, delta: Delta, segment: Segment, prepared: Prepared) -> Pair:
        if delta.left is None or delta.right is None:
            pair = prepared.residuals[id(delta)]
        else:
            pair = Pair(self._store.matrix(delta.left), self._store.matrix(delta.right))
        low, high = segment.rows[0] - delta.rows[0], segment.rows[1] - delta.rows[0]
        return Pair(np.ascontiguousarray(pair.left[low:high]), pair.right)

    def _dora(self, delta, pair, segment, rows, tile, source, prepared) -> Floats | None:  # type: ignore[no-untyped-def]
        """Return DoRA's factors m / |W + s B A|, per column, or per row of the segment."""
        if delta.magnitude is None:
            return None
        if delta.by_column:
            return prepared.column_factors[id(delta)]
        height, width = segment.rows[1] - segment.rows[0], tile.columns[1] - tile.columns[0]
        low, high = rows
        squares = np.zeros(high - low, np.float64)
        x16, x32, kind = _cut(source, (low - tile.rows[0]) * width, (high - low) * width)
        kernels.square_sums(
            x16, x32, kind, high - low, width, pair.left.ravel(), 0, pair.right.ravel(), 0,
            delta.rank, np.float32(delta.scale), low - segment.rows[0], False, squares,
        )  # fmt: skip
        factors = np.zeros(height, np.float32)
        magnitude = self._store.matrix(delta.magnitude).ravel()
        start = low - delta.rows[0]
        factors[low - segment.rows[0] : high - segment.rows[0]] = _ratio(
            magnitude[start : start + high - low], squares
        )
        return factors

    def _prepare(self, scratch_bytes: int) -> Prepared:
        """Do once what needs the whole tensor: factorizations, column norms, rows to replace."""
        with self._lock:
            if self._prepared is None:
                prepared = Prepared()
                for delta in self.step.deltas:
                    if delta.is_residual:
                        prepared.residuals[id(delta)] = self._factorize(delta)
                    elif delta.magnitude is not None and delta.by_column:
                        prepared.column_factors[id(delta)] = self._column_factors(
                            delta, scratch_bytes
                        )
                for patch in self.step.patches:
                    values = self._store.matrix(patch.values)
                    for row, value in zip(patch.indices, values, strict=True):
                        prepared.patches[row] = (patch.adapter, value)
                self._prepared = prepared
            return self._prepared

    def _factorize(self, delta: Delta) -> Pair:
        """Recompute a residual's factors from the weight, oriented as it is stored."""
        raw = np.frombuffer(self._files.read_bytes(self.step.source), np.uint8)
        x16, x32 = typed(raw, self.step.source.dtype)
        kind = kernels.KINDS[self.step.source.dtype]
        stored = _as_float((x16, x32, kind)).reshape(self.step.matrix)
        weight = stored.T if delta.by_column else stored
        b, a = FACTORIZATIONS[delta.feature](weight, delta.rank, -delta.scale)
        if delta.by_column:
            return Pair(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))
        return Pair(b, a)

    def _column_factors(self, delta: Delta, scratch_bytes: int) -> Floats:
        assert delta.left is not None and delta.right is not None  # noqa: S101
        assert delta.magnitude is not None  # noqa: S101
        left, right = self._store.matrix(delta.left), self._store.matrix(delta.right)
        height, width = self.step.matrix
        size = self.step.source.itemsize
        each = max(1, scratch_bytes // (width * size))
        buffer = np.empty(min(each, height) * width * size, np.uint8)
        squares = np.zeros(width, np.float64)
        for first in range(0, height, each):
            rows = min(each, height - first)
            part = buffer[: rows * width * size]
            self._files.read_into(self.step.source, first * width * size, part)
            x16, x32 = typed(part, self.step.source.dtype)
            kernels.square_sums(
                x16, x32, kernels.KINDS[self.step.source.dtype], rows, width, left.ravel(), 0,
                right.ravel(), 0, delta.rank, np.float32(delta.scale), first, True, squares,
            )  # fmt: skip
        return _ratio(self._store.matrix(delta.magnitude).ravel(), squares)

    # -- order -----------------------------------------------------------------------------------

    def _hash(
        self, tile: Tile, source: Bytes, result: Bytes | None, sums: npt.NDArray[np.float64]
    ) -> None:
        """Take this tile's turn at the digests and sums; without ``result`` both are the same."""
        with self._turn:
            self._turn.wait_for(lambda: self._next == tile.number or self.failed)
        if self.failed:
            return
        self._source_hash.update(source)
        if result is not None:
            self._result_hash.update(result)
        self._sums += sums
        with self._turn:
            self._next += 1
            self._turn.notify_all()

    def fail(self) -> None:
        """Wake whoever waits for a tile that will never come."""
        with self._turn:
            self.failed = True
            self._turn.notify_all()

    def finish(self, file_name: str) -> TensorRecord:
        """Return the step's record.

        Raises:
            NumericError: the merge made NaN or infinity out of numbers.
        """
        self._packed = None
        self._prepared = None
        step, sums = self.step, self._sums
        if sums[3]:
            raise NumericError(
                "the merge would hold NaN or infinity where the base held a number",
                where=f"{file_name}: {step.name}",
                expected=f"values that {step.dtype} can hold",
                found=f"{int(sums[3])} of {step.source.numel} that it cannot",
                hint="Write a wider dtype (--dtype bfloat16 or float32), or lower the weight",
            )
        source, same = self._source_hash.hexdigest(), step.action == "copy"
        copied = not (step.segments or step.patches) and step.source.dtype == step.dtype
        moved = step.action == "merge"
        return TensorRecord(
            name=step.name, file=file_name, action=step.action, dtype=step.dtype, shape=step.shape,
            source=step.source.name, source_dtype=step.source.dtype, source_blake3=source,
            blake3=source if same or copied else self._result_hash.hexdigest(),
            features=step.features, scales=step.scales, adapters=step.adapters,
            weight_norm=_norm(sums[0]) if moved and step.segments else None,
            delta_norm=_norm(sums[1]) if moved else None,
            changed=_changed(step, int(sums[2])),
        )  # fmt: skip


def _norm(squares: float) -> float:
    """Nine digits: more would depend on how the tensor was cut into tiles."""
    return float(f"{np.sqrt(squares):.9g}")


def _changed(step: Step, counted: int) -> int:
    """A tensor that an adapter brings along counts as changed throughout."""
    brought = step.source_adapter is not None and not step.segments
    return step.source.numel if brought else counted


def _cut(view, start: int, count: int):  # type: ignore[no-untyped-def]
    x16, x32, kind = view
    if kind == kernels.F32:
        return x16, x32[start : start + count], kind
    return x16[start : start + count], x32, kind


def _as_float(view) -> Floats:  # type: ignore[no-untyped-def]
    x16, x32, kind = view
    if kind == kernels.F32:
        return np.asarray(x32, np.float32)
    if kind == kernels.BF16:
        return (x16.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x16.view(np.float16).astype(np.float32)


def _ratio(magnitude: Floats, squares: npt.NDArray[np.float64]) -> Floats:
    """Return m / sqrt(sum), in float64, rounded to float32 once."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (magnitude.astype(np.float64) / np.sqrt(squares)).astype(np.float32)
