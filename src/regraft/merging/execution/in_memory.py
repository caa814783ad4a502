"""Merging into memory: the steps of a merge into files, with the caller's room for a result.

Nothing is hashed, nothing is kept for an undo, and no file is written. The bytes are those of the
merge into files, since the arithmetic is the same:
:class:`regraft.merging.compute.step_math.StepMath`.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Self

import numpy as np

from regraft.deltas.weights import Bytes, Sums, Weights
from regraft.formats.files.reading import FilePool
from regraft.merging.compute.factors import FactorStore
from regraft.merging.compute.step_math import StepMath
from regraft.merging.execution.scheduler import FACTOR_CACHE, largest_tile, plain_source
from regraft.merging.execution.step_run import check_finite, overflow
from regraft.merging.inputs.source import FileSource, Source
from regraft.merging.planning.plan import Plan, Step
from regraft.merging.planning.tiles import Tile, tiles_of


class MemoryMerge:
    """Carries out the steps of a plan one by one, in any order, each into memory that is given.

    A context manager: the files of base and adapters are open, and threads at hand, until it ends.
    Safe to use from several threads; all of them share the plan's worker threads.
    """

    def __init__(self, plan: Plan) -> None:
        """Take a plan whose results are plain values."""
        self._plan = plan
        self._files = FilePool()
        self._store = FactorStore(self._files, FACTOR_CACHE)
        self._stored = FileSource(self._files)
        self._plain = plain_source(plan, self._stored)
        self._pool = ThreadPoolExecutor(plan.threads, thread_name_prefix="regraft")
        self._own, self._ended = threading.local(), False
        self._buffer_bytes = largest_tile(plan)

    def __enter__(self) -> Self:
        """Return the merge itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the threads end, then close the files; whoever still asks for a tensor gets none."""
        self._ended = True
        self._pool.shutdown()
        self._files.close()

    def fill(self, step: Step, result: Bytes) -> None:
        """Compute a step's tensor into ``result``, which has its size in bytes.

        Raises:
            RegraftError: something could not be read, a factor holds NaN, or the merge made NaN or
                infinity out of numbers.
        """
        source = self._plain if step.source_adapter is None else self._stored
        run = _Run(step, source, self._store, self._plan.tile_bytes, result)
        tiles = list(tiles_of(step, self._plan.tile_bytes, source.grain(step.source)))
        futures = [self._pool.submit(self._work, run, tile) for tile in tiles]
        wait(futures)  # all of them, also after an error: they write into ``result``
        if run.error is not None:
            raise run.error
        sums = sum((future.result() for future in futures), np.zeros(4))
        source.release(step.source)
        if sums[3]:
            raise overflow(step, int(sums[3]), f"{self._plan.base.source}: {step.name}")

    def _work(self, run: _Run, tile: Tile) -> Sums:
        if self._ended:
            run.error = run.error or RuntimeError("a merge that has ended cannot go on")
        if run.error is not None:
            return np.zeros(4)
        try:
            return run.work(tile, self._buffer())
        except BaseException as error:
            run.error = run.error or error
            raise

    def _buffer(self) -> Bytes:
        """Return the calling thread's memory for what it reads."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = np.empty(self._buffer_bytes, np.uint8)
        buffer: Bytes = self._own.buffer
        return buffer


class _Run:
    """A step while its tiles are computed, by any number of threads."""

    def __init__(
        self, step: Step, source: Source, store: FactorStore, tile_bytes: int, result: Bytes
    ) -> None:
        self._step, self._source, self._result = step, source, result
        self._math = StepMath(step, store, self._read, tile_bytes, norms=False)
        self.error: BaseException | None = None

    def _read(self, offset: int, buffer: Bytes) -> None:
        self._source.read(self._step.source, offset, buffer)

    def work(self, tile: Tile, buffer: Bytes) -> Sums:
        """Compute a tile; return its sums: :func:`regraft.deltas.kernels.merge.merge_rows`."""
        sums: Sums = np.zeros(4, np.float64)
        result = self._result[tile.write_at : tile.write_at + tile.write]
        if tile.kind == "bytes":
            self._read(tile.read_at, result)
            check_finite(self._step, result)
            return sums
        source = buffer[: tile.read]
        self._read(tile.read_at, source)
        check_finite(self._step, source)
        weights = Weights.of_bytes(source, self._step.source.dtype)
        self._math.run(tile, weights, Weights.of_bytes(result, self._step.dtype), sums)
        return sums
