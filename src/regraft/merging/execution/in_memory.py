"""Merging into memory: the steps of a merge into files, with the caller's room for a result.

Nothing is hashed, nothing is kept for an undo, and no file is written. The bytes are those of the
merge into files, since the arithmetic is the same:
:class:`regraft.merging.compute.tile_work.TileWork`.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Self

import numpy as np

from regraft.formats.files.reading import FilePool
from regraft.merging.compute.context import FACTOR_CACHE, PlanContext, largest_tile
from regraft.merging.compute.factors import FactorStore
from regraft.merging.compute.tile_work import TileMemory, TileWork, overflow
from regraft.merging.inputs.source import FileSource
from regraft.merging.planning.plan import Plan, Step
from regraft.merging.planning.tiles import Tile
from regraft.numerics.arrays import Bytes, Sums


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
        stored = FileSource(self._files)
        self._context = PlanContext(plan, self._files, self._store, stored, norms=False)
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
        run = _MemoryRun(self._context.work_of(step), result)
        tiles = list(self._context.tiles_of(step))
        futures = [self._pool.submit(self._work, run, tile) for tile in tiles]
        wait(futures)  # all of them, also after an error: they write into ``result``
        if run.error is not None:
            raise run.error
        sums = sum((future.result() for future in futures), np.zeros(4))
        self._context.source_of(step).release(step.source)
        if sums[3]:
            raise overflow(step, int(sums[3]), f"{self._plan.base.source}: {step.name}")

    def _work(self, run: _MemoryRun, tile: Tile) -> Sums:
        if self._ended:
            run.error = run.error or RuntimeError("a merge that has ended cannot go on")
        if run.error is not None:
            return np.zeros(4)
        try:
            return run.work(tile, self._memory)
        except BaseException as error:
            run.error = run.error or error
            raise

    @property
    def _memory(self) -> TileMemory:
        """The calling thread's memory for what it reads."""
        if not hasattr(self._own, "memory"):
            self._own.memory = TileMemory(self._buffer_bytes)
        memory: TileMemory = self._own.memory
        return memory


class _MemoryRun:
    """A step while its tiles are computed, by any number of threads."""

    def __init__(self, work: TileWork, result: Bytes) -> None:
        self._work, self._result = work, result
        self.error: BaseException | None = None

    def work(self, tile: Tile, memory: TileMemory) -> Sums:
        """Compute a tile; return its sums: :func:`regraft.deltas.kernels.merge.merge_rows`."""
        into = self._result[tile.write_at : tile.write_at + tile.write]
        return self._work.run(tile, memory, into).sums
