"""Executing a plan: threads take tiles in file order until none are left."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from regraft.concurrency import MemoryGate, for_each
from regraft.deltas.weights import Bytes
from regraft.errors import MismatchError, Problem, RegraftError
from regraft.formats.files.reading import FilePool
from regraft.formats.problems import capped, quoted
from regraft.merging.compute.context import (
    FACTOR_CACHE,
    PlanContext,
    factor_room,
    seen_through,
)
from regraft.merging.compute.factors import FactorStore, read_differently
from regraft.merging.compute.tile_work import TileMemory
from regraft.merging.execution.commit_log import Closing, Ledger
from regraft.merging.execution.jobs import Done, Job, jobs_of
from regraft.merging.execution.step_run import Other, StepRun
from regraft.merging.files.direct_io import OutputFile
from regraft.merging.files.receipt import TensorRecord
from regraft.merging.files.staging import Workplace
from regraft.merging.inputs.source import FileSource, Source
from regraft.merging.planning.plan import Plan, Step
from regraft.merging.planning.targets import Target
from regraft.merging.planning.tiles import Tile, tiles_of
from regraft.merging.undo.patch import PatchWriter
from regraft.merging.undo.residuals import Keep, KeepRun, keep_tiles
from regraft.progress import Progress, ProgressMeter

OpenSource = Callable[[FilePool, FactorStore], Source]
"""Gives what the base is read from, for the time of an execution."""


@dataclass(frozen=True)
class Task:
    """What is to be executed.

    Attributes:
        plan: tile size and threads.
        targets: the files to be made.
        keeps: the base's tensors to be kept by their difference.
        open_source: gives what the base is read from; its files, by default.
        stage: what progress calls it.
    """

    plan: Plan
    targets: Sequence[Target]
    keeps: Sequence[Keep] = ()
    open_source: OpenSource | None = None
    stage: str = "merge"


@dataclass(frozen=True)
class Outcome:
    """What an execution leaves.

    Attributes:
        records: of the tensors written, in file order.
        adapter_digests: of what was read of the adapters, by file and name.
        kept_digests: of the base's tensors that were kept by their difference, by name.
    """

    records: tuple[TensorRecord, ...]
    adapter_digests: dict[tuple[Path, str], str]
    kept_digests: dict[str, str]


class _Active:
    """A job while it is worked on."""

    def __init__(self, number: int, job: Job, run: StepRun | KeepRun, tiles: list[Tile]) -> None:
        self.number, self.job, self.run, self.tiles = number, job, run, tiles
        self.left = len(tiles)

    def finish(self) -> tuple[TensorRecord | None, str, list[tuple[str, bytes]]]:
        """Return the receipt's record, the digest of the tensor, and sections of the patch."""
        if isinstance(self.run, KeepRun):
            return None, *self.run.finish()
        target = self.job.target
        record = self.run.finish(target.name if target is not None else "")
        return record, record.blake3, self.run.sections()


class _Queue:
    """Hands out tiles, job by job, and notices when a job is done."""

    def __init__(
        self, task: Task, place: Workplace, patch: PatchWriter | None, files: FilePool,
        jobs: Sequence[Job], done: Sequence[Done], progress: Progress | None,
    ) -> None:  # fmt: skip
        self._task, self._place, self._files, self._jobs = task, place, files, jobs
        self._keeping = patch is not None
        self._store = FactorStore(files, FACTOR_CACHE)
        opener = task.open_source
        self._plain = FileSource(files)
        self._stored = opener(files, self._store) if opener else self._plain
        self._context = PlanContext(task.plan, files, self._store, self._stored)
        there = task.plan.trained_on
        self._trained_on = there and seen_through(there.quantization, self._plain)
        self._ledger = Ledger(len(done), place, patch, self._flush)
        self._gate = MemoryGate(factor_room(task.plan))
        self._lock = threading.Lock()
        self._outputs: dict[str, OutputFile] = {}
        self._unfinished = {target.name: len(target.steps) for target in task.targets}
        self._active: dict[int, _Active] = {}
        self._taken_over = 0
        self.finished: dict[str, Done] = {}
        for each, job in zip(done, jobs, strict=False):
            self._take_over(each, job)
        self._first = len(done)
        total = sum(step.nbytes for target in task.targets for step in target.steps)
        self._told = ProgressMeter(progress, task.stage, total, self._taken_over)

    def _take_over(self, done: Done, job: Job) -> None:
        """Count a job that an earlier try has done."""
        self.finished[done.name] = done
        if job.step is not None and job.target is not None:
            self._context.finish(job.step)
            self._taken_over += job.step.nbytes
            self._unfinished[job.target.name] -= 1

    def open_finished(self) -> None:
        """Make the files that need no job, or none any more, and flush them to the disk."""
        for target in self._task.targets:
            if not self._unfinished[target.name]:
                self._create(target).close(sync=True)

    def _create(self, target: Target) -> OutputFile:
        return OutputFile(self._place.out / target.name, target.size, target.pieces)

    def tiles(self) -> Iterator[tuple[_Active, Tile]]:
        """Yield the tiles that are left, job by job."""
        for number in range(self._first, len(self._jobs)):
            active = self._start(number, self._jobs[number])
            with self._lock:
                self._active[number] = active
            for tile in active.tiles:
                yield active, tile

    def _start(self, number: int, job: Job) -> _Active:
        tile_bytes = self._task.plan.tile_bytes
        if job.keep is not None:
            run = KeepRun(job.keep, self._stored, self._files, compress=self._keeping)
            return _Active(number, job, run, list(keep_tiles(job.keep, tile_bytes)))
        step, target = job.step, job.target
        if step is None or target is None:
            raise ValueError("a job writes a tensor or keeps one")
        output = self._outputs.get(target.name)
        if output is None:
            output = self._create(target)
            with self._lock:
                self._outputs[target.name] = output
        work = self._context.work_of(step, keeps=self._keeping and step.is_invertible)
        source = self._context.source_of(step)
        written = StepRun(work, output, job.offset, source, self._other(step))
        return _Active(number, job, written, list(self._context.tiles_of(step)))

    def _other(self, step: Step) -> Other | None:
        there = self._task.plan.trained_on
        spec = there.spec(step) if there is not None else None
        return (spec, self._trained_on) if spec is not None and self._trained_on else None

    def work(self, item: tuple[_Active, Tile], memory: TileMemory) -> None:
        """Do a tile, once the factors of its job fit into memory."""
        active, tile = item
        if tile.number == 0:
            self._gate.enter(active.run.cost)
        self._finish(active, tile, active.run.work(tile, memory))

    def _finish(self, active: _Active, tile: Tile, payload: Bytes) -> None:
        """Account for a tile; with the last one of a job, keep what is known of it."""
        self._ledger.deposit(active.number, tile.number, payload)
        with self._lock:
            active.left -= 1
            last = active.left == 0
            self._told.add(tile.write, active.job.name.partition(" ")[2] if last else "")
        if last:
            self._end(active)
            self._gate.leave(active.run.cost)

    def _end(self, active: _Active) -> None:
        record, digest, sections = active.finish()
        job = active.job
        adapter = tuple(
            (str(path), name, self._store.digests[path, name])
            for path, name in (job.step.adapter_tensors if job.step is not None else ())
            if (path, name) in self._store.digests
        )
        done = Done(job.name, digest, record, adapter, ())
        with self._lock:
            self.finished[job.name] = done
        entry = {k: v for k, v in asdict(done).items() if k != "sections"}
        self._ledger.close_job(active.number, Closing(len(active.tiles), entry, sections))
        if isinstance(active.run, StepRun):
            active.run.release()
            self._context.finish(active.run.step)
        self._close_output(active)

    def _close_output(self, active: _Active) -> None:
        with self._lock:
            self._active.pop(active.number)
            target, output = active.job.target, None
            if target is not None:
                self._unfinished[target.name] -= 1
                if not self._unfinished[target.name]:
                    output = self._outputs.pop(target.name)
        if output is not None:
            output.close(sync=True)

    def _flush(self) -> None:
        """Hand all that is gathered for open files to the system."""
        with self._lock:
            outputs = list(self._outputs.values())
        for output in outputs:
            output.flush()

    def stop(self) -> None:
        """Hand out nothing more and wake everyone who waits."""
        with self._lock:
            active = list(self._active.values())
        self._gate.fail()
        self._ledger.stop()
        self._context.fail()
        for each in active:
            each.run.fail()

    def close(self) -> None:
        """Note what is done, and close whatever a failure left open."""
        for output in self._outputs.values():
            output.close(sync=False)
        self._outputs.clear()

    def note(self) -> None:
        """Write all that is done into the journal."""
        self._ledger.note()

    def outcome(self) -> Outcome:
        """Return what was done, by this try and by earlier ones.

        Raises:
            MismatchError: a tensor was not what it should have been.
        """
        digests = dict[tuple[Path, str], str]()
        for done in self.finished.values():
            for path, name, digest in done.adapter:
                key = (Path(path), name)
                if digests.setdefault(key, digest) != digest:
                    raise read_differently(*key)
        records = [done.record for done in self.finished.values() if done.record is not None]
        of_name = {record.name: record for record in records}
        kept = {
            job.keep.original.name: self.finished[job.name].digest
            for job in self._jobs
            if job.keep is not None
        }
        self._check(records, kept)
        ordered = [of_name[s.name] for target in self._task.targets for s in target.steps]
        return Outcome(tuple(ordered), digests, kept)

    def _check(self, records: Sequence[TensorRecord], kept: dict[str, str]) -> None:
        theirs = {s.name for s in self._task.plan.steps if not is_stored(s)}
        read = {r.source: r.source_blake3 for r in records if r.name not in theirs} | kept
        problems: list[Problem] = []
        for name, digest in read.items():
            expected = self._context.source.expected(name)
            if expected is not None and expected != digest:
                problems.append(_edited(name, first=not problems))
        if problems:
            raise MismatchError(capped(problems, self._place.folder))


def is_stored(step: Step) -> bool:
    """Whether the digest of what a step reads is that of one of the base's stored tensors."""
    if step.source_adapter is not None or (step.made is not None and step.codes_of is None):
        return False
    return step.coded is not None or not step.source.is_virtual


def _edited(name: str, *, first: bool) -> Problem:
    """Return the problem of a tensor that was not given back; what to do is said once."""
    hint = "These weights have been changed since the merge, or the undo patch has: take the model "
    hint += "from where it was unchanged; `regraft verify` says more"
    what = "the undo patch does not fit the weights"
    return Problem(what, f"tensor {quoted(name)}", hint=hint if first else "")


def execute(
    task: Task, place: Workplace, patch: PatchWriter | None, done: Sequence[Done],
    progress: Progress | None,
) -> Outcome:  # fmt: skip
    """Write a task's weight files and flush them to the disk.

    Args:
        task: what is to be done.
        place: where; it has been begun.
        patch: takes what an undo needs; None for none.
        done: the jobs that an earlier try has done, from the first one on.
        progress: called as work proceeds.

    Raises:
        RegraftError: the first error of any thread; the files are then incomplete.
    """
    jobs = jobs_of(task.targets, task.keeps)
    with FilePool() as files:
        queue = _Queue(task, place, patch, files, jobs, done, progress)
        try:
            queue.open_finished()
            buffer_bytes = largest_tile(task.plan)
            for_each(
                queue.tiles(), queue.work, task.plan.threads,
                memory=lambda: TileMemory(buffer_bytes), stop=queue.stop,
            )  # fmt: skip
        except BaseException:
            _note_quietly(queue)
            raise
        finally:
            queue.close()
        queue.note()
        return queue.outcome()


def _note_quietly(queue: _Queue) -> None:
    """Note what is done although something failed; if that fails too, less is kept."""
    with contextlib.suppress(RegraftError, OSError):
        queue.note()


def _has_rows(step: Step) -> bool:
    return bool(step.segments) or step.codes_of is not None


def largest_tile(plan: Plan) -> int:
    """Return the largest tile's bytes: the tile size, or more where a row may not be split."""
    widest = max(
        (step.matrix[1] * step.source.itemsize for step in plan.steps if _has_rows(step)), default=0
    )
    whole_rows = max(
        (tile.read for step in plan.steps if _has_rows(step) and widest > plan.tile_bytes
         for tile in tiles_of(step, plan.tile_bytes)), default=0,
    )  # fmt: skip
    return max(plan.tile_bytes, whole_rows)
