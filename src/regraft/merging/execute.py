"""Executing a plan: threads take tiles in file order until none are left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from regraft.formats.reading import FilePool
from regraft.formats.safetensors import build_header
from regraft.merging.events import Progress, ProgressEvent
from regraft.merging.factors import FactorStore
from regraft.merging.plan import OutputShard, Plan, Step
from regraft.merging.receipt import TensorRecord
from regraft.merging.run import Buffers, StepRun
from regraft.merging.tiles import Tile, tiles_of
from regraft.merging.writer import OutputFile

FACTOR_CACHE = 32 * 2**20
"""Bytes of decoded adapter tensors kept for the next step that asks for them."""


@dataclass(frozen=True)
class Outcome:
    """What an execution leaves: the records in file order, and what was read of the adapters."""

    records: tuple[TensorRecord, ...]
    adapter_digests: dict[tuple[Path, str], str]


class _Gate:
    """Lets steps in as long as their factors fit; one alone always may."""

    def __init__(self, room: int) -> None:
        self._room, self._taken, self._inside = room, 0, 0
        self._changed = threading.Condition()
        self._open = False

    def enter(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._open or not self._inside or self._taken + size <= self._room
            )
            self._taken, self._inside = self._taken + size, self._inside + 1

    def leave(self, size: int) -> None:
        with self._changed:
            self._taken, self._inside = self._taken - size, self._inside - 1
            self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()


class _Queue:
    """Hands out tiles, shard by shard and tensor by tensor, and notices when a step is done."""

    def __init__(
        self, plan: Plan, folder: Path, files: FilePool, progress: Progress | None
    ) -> None:
        self._plan, self._folder, self._files = plan, folder, files
        self._store = FactorStore(files, FACTOR_CACHE)
        room = max([step.factor_bytes for step in plan.steps] + [2 * FACTOR_CACHE])
        self._gate = _Gate(room)
        self._lock = threading.Lock()
        self._tiles = self._walk()
        self._left: dict[int, int] = {}
        self._open_steps: dict[str, int] = {}
        self._done, self._progress = 0, progress
        self.records: dict[str, TensorRecord] = {}
        self.outputs: dict[str, OutputFile] = {}
        self._active: dict[int, StepRun] = {}
        self._stopped = False

    @property
    def digests(self) -> dict[tuple[Path, str], str]:
        return self._store.digests

    def _walk(self) -> Iterator[tuple[StepRun, Tile, str]]:
        for shard in self._plan.shards:
            output = self._create(shard)
            offset = output.data_start
            for step in shard.steps:
                yield from self._step_tiles(step, shard, output, offset)
                offset += step.nbytes

    def _create(self, shard: OutputShard) -> OutputFile:
        header = build_header(
            [(step.name, step.dtype, step.shape) for step in shard.steps], {"format": "pt"}
        )
        output = OutputFile(self._folder / shard.name, header, shard.nbytes)
        self.outputs[shard.name] = output
        self._open_steps[shard.name] = len(shard.steps)
        return output

    def _step_tiles(
        self, step: Step, shard: OutputShard, output: OutputFile, offset: int
    ) -> Iterator[tuple[StepRun, Tile, str]]:
        tile_bytes = self._plan.tile_bytes
        run = StepRun(step, output, offset, self._files, self._store, tile_bytes)
        tiles = list(tiles_of(step, tile_bytes))
        self._left[id(run)] = len(tiles)
        self._active[id(run)] = run
        for tile in tiles:
            yield run, tile, shard.name

    def next(self) -> tuple[StepRun, Tile, str] | None:
        """Return the next tile, or None when there is none or the work was stopped."""
        with self._lock:
            if self._stopped:
                return None
            item = next(self._tiles, None)
        if item is not None and item[1].number == 0:
            self._gate.enter(item[0].step.factor_bytes)
        return item

    def finish(self, run: StepRun, tile: Tile, shard: str) -> None:
        """Account for a tile; with the last one of a step, keep its record."""
        with self._lock:
            self._left[id(run)] -= 1
            last = self._left[id(run)] == 0
            self._done += tile.write
            if self._progress is not None:
                name = run.step.name if last else ""
                self._progress(ProgressEvent("merge", self._done, self._plan.nbytes, name))
        if last:
            self.records[run.step.name] = run.finish(shard)
            self._gate.leave(run.step.factor_bytes)
            self._close_step(run, shard)

    def _close_step(self, run: StepRun, shard: str) -> None:
        with self._lock:
            self._left.pop(id(run))
            self._active.pop(id(run))
            self._open_steps[shard] -= 1
            complete = self._open_steps[shard] == 0
        if complete:
            self.outputs.pop(shard).close(sync=True)

    def stop(self) -> None:
        """Hand out nothing more and wake everyone who waits."""
        with self._lock:
            self._stopped = True
            active = list(self._active.values())
        self._gate.open()
        for run in active:
            run.fail()

    def close(self) -> None:
        """Close whatever a failure left open."""
        for output in self.outputs.values():
            output.close(sync=False)
        self.outputs.clear()


def execute(plan: Plan, folder: Path, progress: Progress | None) -> Outcome:
    """Write a plan's weight files into ``folder`` and flush them to the disk.

    Raises:
        RegraftError: the first error of any thread; the files are then incomplete.
    """
    with FilePool() as files:
        queue = _Queue(plan, folder, files, progress)
        try:
            _run_threads(queue, plan)
            for shard in plan.shards:  # shards without tensors
                if shard.name in queue.outputs:
                    queue.outputs.pop(shard.name).close(sync=True)
        finally:
            queue.close()
    return Outcome(tuple(queue.records[step.name] for step in plan.steps), queue.digests)


def _run_threads(queue: _Queue, plan: Plan) -> None:
    buffer_bytes = _buffer_bytes(plan)

    def work() -> None:
        buffers = Buffers(buffer_bytes)
        while (item := queue.next()) is not None:
            run, tile, shard = item
            try:
                run.work(tile, buffers)
                if not run.failed:
                    queue.finish(run, tile, shard)
            except BaseException:
                queue.stop()
                raise

    with ThreadPoolExecutor(plan.threads, thread_name_prefix="regraft") as pool:
        futures: list[Future[None]] = []
        try:
            for _ in range(plan.threads):
                futures.append(pool.submit(work))  # one by one: an interrupt may fall between
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C
            queue.stop()
            raise
    for future in futures:
        future.result()


def _buffer_bytes(plan: Plan) -> int:
    """Return the largest tile: usually the tile size, more where a row may not be split."""
    widest = max(
        (step.matrix[1] * step.source.itemsize for step in plan.steps if step.segments), default=0
    )
    whole_rows = max(
        (tile.read for step in plan.steps if step.segments and widest > plan.tile_bytes
         for tile in tiles_of(step, plan.tile_bytes)), default=0,
    )  # fmt: skip
    return max(plan.tile_bytes, whole_rows)
