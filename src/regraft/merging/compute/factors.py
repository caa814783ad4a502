"""Adapter tensors in memory: read once, checked, cached, and packed for the kernels."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from regraft.deltas.kernels import merge as kernels
from regraft.deltas.kernels.weights import Floats, Weights
from regraft.deltas.views import Delta, View
from regraft.errors import AdapterError, ChangedError
from regraft.formats.files.reading import FilePool
from regraft.formats.files.watching import AGAIN
from regraft.merging.compute.combined import CombinedSegments, Limits
from regraft.merging.planning.plan import Segment
from regraft.tensors import TensorSpec

Key = tuple[Path, str]


class FactorSource(Protocol):
    """Gives the tensors of the adapters of a merge; safe to use from several threads."""

    def matrix(self, view: View, adapter: int) -> Floats:
        """Return a view's matrix, contiguous; ``adapter`` is the number of the one it is of."""


class FactorStore:
    """Tensors of the adapters as float32, kept while they are likely to be asked for again."""

    def __init__(self, files: FilePool, limit: int) -> None:
        self._files = files
        self._limit = limit
        self._kept: OrderedDict[Key, Floats] = OrderedDict()
        self._held = 0
        # Held while a tensor is read: it is read once, and room is made before it is.
        self._lock = threading.Lock()
        self.digests: dict[Key, str] = {}

    def matrix(self, view: View, adapter: int) -> Floats:
        """Return a view's matrix, contiguous; the view's file says which adapter's it is.

        Raises:
            AdapterError: the tensor holds NaN or infinity.
        """
        del adapter
        if view.spec is None:
            return np.ones(view.result, np.float32)
        whole = self._tensor(view.spec).reshape(view.shape)
        index = tuple(slice(*s) if isinstance(s, tuple) else _all(s) for s in view.select)
        part = whole[index].reshape(view.matrix)
        return np.ascontiguousarray(part.T if view.transpose else part)

    def _tensor(self, spec: TensorSpec) -> Floats:
        key = (spec.path, spec.name)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            self._make_room(4 * spec.numel)
            values = self._read(spec, key)
            self._kept[key] = values
            self._held += values.nbytes
            return values

    def _make_room(self, size: int) -> None:
        """Let go of the tensors that were not asked for the longest, before another is read."""
        while self._kept and self._held + size > self._limit:
            self._held -= self._kept.popitem(last=False)[1].nbytes

    def _read(self, spec: TensorSpec, key: Key) -> Floats:
        raw = np.empty(spec.nbytes, np.uint8)
        self._files.read_into(spec, 0, raw.data)
        digest = blake3(raw.data).hexdigest()
        if self.digests.setdefault(key, digest) != digest:
            raise read_differently(*key)
        values = Weights.of_bytes(raw, spec.dtype).floats()
        check_values(spec, values)
        return values


def read_differently(path: Path, name: str) -> ChangedError:
    """Return the error for an adapter's tensor that was another one when it was read again."""
    return ChangedError(
        "the file was changed while it was being read", where=f"{path}: {name}",
        expected="the bytes that were read first", found="others", hint=AGAIN,
    )  # fmt: skip


def check_values(spec: TensorSpec, values: Floats) -> None:
    """Refuse NaN and infinity in an adapter's tensor, or a part of one.

    Raises:
        AdapterError: there are some.
    """
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        raise not_finite(spec, bad)


def not_finite(spec: TensorSpec, bad: int) -> AdapterError:
    """Return the error for an adapter's tensor of which ``bad`` values are NaN or infinite."""
    return AdapterError(
        "the adapter holds NaN or infinity",
        where=f"{spec.path}: {spec.name}",
        expected="finite numbers",
        found=f"{bad} of {spec.numel} values are not",
        hint="Its training diverged; use an earlier checkpoint",
    )


def _all(select: int | None) -> int | slice:
    return slice(None) if select is None else select


@dataclass(frozen=True)
class Pair:
    """A delta's factors in memory: left (rows, r), right (r, columns)."""

    left: Floats
    right: Floats


@dataclass(frozen=True)
class Packed:
    """The deltas of a segment in the form :func:`regraft.deltas.kernels.merge.merge_rows` takes.

    Attributes:
        left: left factors one after the other.
        right: right factors likewise.
        right_ld: columns of a right factor.
        table: one line per delta: offsets, rank, flags.
        scales: one per delta.
        begin: the row and the column of the segment that they begin with.
    """

    left: Floats
    right: Floats
    right_ld: int
    table: npt.NDArray[np.int64]
    scales: Floats
    begin: tuple[int, int] = (0, 0)


class SegmentFactors:
    """The packed deltas of a step's segments: made once for all threads, the last one kept."""

    def __init__(
        self, store: FactorSource, residuals: Mapping[int, Pair], limits: Limits | None = None
    ) -> None:
        """Take what was found of the step's deltas.

        Args:
            store: the adapters' tensors.
            residuals: factors of residuals, by the ``id`` of their delta.
            limits: of methods on elements, likewise; added to.
        """
        self._store, self._residuals = store, residuals
        self._lock = threading.Lock()  # held while deltas are packed: once for all threads
        self._kept: tuple[Segment, Packed] | None = None
        self._combined = CombinedSegments(store.matrix, {} if limits is None else limits)

    def of(self, segment: Segment, rows: tuple[int, int], columns: tuple[int, int]) -> Packed:
        """Return a segment's deltas, packed; of a method on elements what it makes of them there.

        Args:
            segment: the segment.
            rows: a range of its rows, counted as the weight's.
            columns: a range of columns.
        """
        if segment.method is not None:
            return _dense(segment, self._combined.rows(segment, rows, columns), rows, columns)
        with self._lock:
            if self._kept is None or self._kept[0] is not segment:
                self._kept = None  # let go of the last segment's before making the next
                pairs = [self._pair(delta, segment) for delta in segment.deltas]
                self._kept = (segment, pack(segment, pairs))
            return self._kept[1]

    def _pair(self, delta: Delta, segment: Segment) -> Pair:
        pair = self._residuals.get(id(delta)) or factors_of(delta, self._store)
        low, high = segment.rows[0] - delta.rows[0], segment.rows[1] - delta.rows[0]
        return Pair(np.ascontiguousarray(pair.left[low:high]), pair.right)


def factors_of(delta: Delta, store: FactorSource) -> Pair:
    """Return the factors that an adapter holds for a delta."""
    if delta.left is None or delta.right is None:
        raise ValueError(f"a {delta.feature} residual has no stored factors")
    return Pair(store.matrix(delta.left, delta.adapter), store.matrix(delta.right, delta.adapter))


def pack(segment: Segment, pairs: Sequence[Pair]) -> Packed:
    """Lay a segment's factors out one after the other.

    Args:
        segment: the rows and their deltas.
        pairs: the factors of each delta, cut to the segment's rows.
    """
    table = np.zeros((len(pairs), 5), np.int64)
    left_at = right_at = factor_at = 0
    for line, delta, pair in zip(table, segment.deltas, pairs, strict=True):
        line[:] = (left_at, right_at, pair.right.shape[0], _flags(delta), factor_at)
        left_at += pair.left.size
        right_at += pair.right.size
        factor_at += factor_count(delta, segment, pair.right.shape[1])
    return Packed(
        joined([pair.left for pair in pairs]),
        joined([pair.right for pair in pairs]),
        pairs[0].right.shape[1] if pairs else 0,
        table,
        np.array([delta.scale for delta in segment.deltas], np.float32),
    )


def _dense(
    segment: Segment, values: Floats, rows: tuple[int, int], columns: tuple[int, int]
) -> Packed:
    """Return a delta that is given by its elements: one of rank 0 and scale 1, for the kernels."""
    table = np.zeros((1, 5), np.int64)
    begin = (rows[0] - segment.rows[0], columns[0])
    ones = np.ones(1, np.float32)
    return Packed(np.empty(0, np.float32), values.ravel(), values.shape[1], table, ones, begin)


def factor_count(delta: Delta, segment: Segment, columns: int) -> int:
    """Return how many DoRA factors a delta has in a segment: one per row, or per column."""
    if delta.magnitude is None:
        return 0
    return columns if delta.by_column else segment.rows[1] - segment.rows[0]


def _flags(delta: Delta) -> int:
    if delta.is_residual:
        return kernels.ROUND_TO_SOURCE
    if delta.magnitude is None:
        return 0
    return kernels.COLUMN_FACTOR if delta.by_column else kernels.ROW_FACTOR


def joined(arrays: Sequence[Floats]) -> Floats:
    """Return arrays one after the other, flat; a single one is not copied."""
    if not arrays:
        return np.empty(0, np.float32)
    return arrays[0].ravel() if len(arrays) == 1 else np.concatenate([a.ravel() for a in arrays])
