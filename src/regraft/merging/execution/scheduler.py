"""Executing a plan: its tensors are written, and kept for an undo, in file order.

:mod:`regraft.merging.execution.executor` hands out tiles and keeps to memory. Here is what a job
is, :class:`_StepJob` or :class:`_CorrectionJob`, and the log that puts in order what they leave.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from regraft.errors import RegraftError
from regraft.formats.files.known_digests import KnownDigests
from regraft.formats.files.reading import FilePool
from regraft.merging.compute.context import (
    FACTOR_CACHE,
    PlanContext,
    factor_room,
    largest_tile,
    seen_through,
)
from regraft.merging.compute.factors import FactorStore
from regraft.merging.compute.tile_work import TileMemory
from regraft.merging.execution.commit_log import Closing, Ledger
from regraft.merging.execution.executor import Run, execute_runs
from regraft.merging.execution.jobs import Done, jobs_of
from regraft.merging.execution.outcome import Outcome, check_read, is_stored, outcome_of
from regraft.merging.execution.outputs import Outputs
from regraft.merging.execution.step_run import Other, StepRun
from regraft.merging.files.direct_io import Origin, OutputFile
from regraft.merging.files.staging import Workplace
from regraft.merging.inputs.source import FileSource, Source
from regraft.merging.planning.plan import Plan, Step
from regraft.merging.planning.targets import Target, alike_ranges
from regraft.merging.planning.tiles import Tile, whole_tile
from regraft.merging.undo.corrections import Correction, CorrectionRun, correction_tiles
from regraft.merging.undo.patch import PatchWriter
from regraft.progress import Progress, ProgressMeter
from regraft.tensors import TensorSpec

OpenSource = Callable[[FilePool, FactorStore], Source]
"""Gives what the base is read from, for the time of an execution."""


@dataclass(frozen=True)
class Reuse:
    """What need not be done again; it changes no byte of an output.

    Attributes:
        share: whether tensors that are only copied may share blocks of the disk with their origin.
        known: digests of tensors that were read before.
    """

    share: bool = False
    known: KnownDigests = field(default_factory=lambda: KnownDigests(None))


@dataclass(frozen=True)
class Task:
    """What is to be executed.

    Attributes:
        plan: tile size and threads.
        targets: the files to be made.
        keeps: the base's tensors to be kept by their difference.
        open_source: gives what the base is read from; its files, by default.
        stage: what progress calls it.
        reuse: what need not be done again.
    """

    plan: Plan
    targets: Sequence[Target]
    keeps: Sequence[Correction] = ()
    open_source: OpenSource | None = None
    stage: str = "merge"
    reuse: Reuse = field(default_factory=Reuse)


class _Shared:
    """What the jobs of one execution share: inputs, files, the journal, and what is done."""

    def __init__(
        self, task: Task, place: Workplace, patch: PatchWriter | None, files: FilePool,
        done: Sequence[Done], progress: Progress | None,
    ) -> None:  # fmt: skip
        self.task, self.files, self.keeping = task, files, patch is not None
        self.jobs = jobs_of(task.targets, task.keeps)
        plain, self.store = FileSource(files), FactorStore(files, FACTOR_CACHE)
        opener, there = task.open_source, task.plan.trained_on
        self.stored: Source = opener(files, self.store) if opener else plain
        self.context = PlanContext(task.plan, files, self.store, self.stored)
        self.trained_on = there and seen_through(there.quantization, plain)
        shared = self._shared_parts if task.reuse.share else None
        self.outputs = Outputs(place.out, task.targets, shared)
        self.log = Ledger(len(done), place, patch, self.outputs.flush)
        self.done: dict[str, Done] = {}
        self._first = len(done)
        total = sum(step.nbytes for target in task.targets for step in target.steps)
        self.told = ProgressMeter(progress, task.stage, total, self._take_over(done))

    def _take_over(self, done: Sequence[Done]) -> int:
        """Count what an earlier try has done; return the bytes it has written."""
        written = 0
        for each, job in zip(done, self.jobs, strict=False):
            self.done[each.name] = each
            if job.step is not None and job.target is not None:
                self.context.finish(job.step)
                self.outputs.skip(job.target)
                written += job.step.nbytes
        return written

    def _shared_parts(self, target: Target) -> Iterator[tuple[int, int, Origin]]:
        """Yield what of a file may share blocks of the disk with files that have the same bytes."""
        for alike in alike_ranges(target, self._origin_of):
            yield alike.offset, alike.nbytes, self.files.place(alike.first, 0)

    def _origin_of(self, step: Step) -> TensorSpec | None:
        return self.context.source_of(step).origin(step.source)

    def known_of(self, step: Step) -> str | None:
        """Return the digest of the stored bytes of a step's source, if they were read before."""
        if not is_stored(step):
            return None
        source = self.context.source_of(step) if step.coded is None else self.stored
        spec = source.origin(step.stored)
        return self.task.reuse.known.of(spec) if spec is not None else None

    def runs(self) -> Iterator[_JobRun]:
        """Yield what is left to be done, each job begun when it is asked for."""
        for number in range(self._first, len(self.jobs)):
            keep = self.jobs[number].keep
            yield _StepJob(self, number) if keep is None else _CorrectionJob(self, number, keep)

    def digests_of(self, step: Step) -> tuple[tuple[str, str, str], ...]:
        """Return file, name and digest of the adapters' tensors that a step took."""
        found = self.store.digests
        keys = [key for key in step.adapter_tensors if key in found]
        return tuple((str(path), name, found[path, name]) for path, name in keys)

    def stop(self) -> None:
        """Wake all who wait for the journal, or for the scales of a weight."""
        self.log.stop()
        self.context.fail()


class _JobRun(Run[Tile, TileMemory]):
    """A job while it is executed: what it leaves goes into the log, in the order of the jobs."""

    def __init__(
        self, shared: _Shared, number: int, run: StepRun | CorrectionRun, tiles: Iterable[Tile]
    ) -> None:
        self._shared, self._number, self._job = shared, number, shared.jobs[number]
        self._doing, self._tiles = run, list(tiles)

    @property
    def tiles(self) -> Sequence[Tile]:
        """Its tiles."""
        return self._tiles

    @property
    def cost(self) -> int:
        """Memory that its factors take."""
        return self._doing.cost

    def size(self, tile: Tile) -> int:
        """What a tile reads, and what it writes."""
        return tile.read + tile.write

    def work(self, tile: Tile, memory: TileMemory) -> None:
        """Do a tile, and leave what is kept of it in the log."""
        payload = self._doing.work(tile, memory)
        self._shared.log.deposit(self._number, tile.number, payload)

    def account(self, tile: Tile, *, last: bool) -> None:
        """Tell how far the execution has come."""
        self._shared.told.add(tile.write, self._job.name.partition(" ")[2] if last else "")

    def fail(self) -> None:
        """Wake whoever waits for a tile that will never come."""
        self._doing.fail()

    def _close(self, done: Done, sections: Sequence[tuple[str, bytes]]) -> None:
        """Leave the job's end in the log."""
        self._shared.done[done.name] = done  # one thread's, and a name of its own: no lock
        entry = done.to_json()
        self._shared.log.close_job(self._number, Closing(len(self._tiles), entry, sections))


class _StepJob(_JobRun):
    """Writes a tensor."""

    def __init__(self, shared: _Shared, number: int) -> None:
        job = shared.jobs[number]
        if job.step is None or job.target is None:
            raise ValueError("a job writes a tensor or keeps one")
        self._step, self._target, context = job.step, job.target, shared.context
        source = context.source_of(job.step)
        work = context.work_of(job.step, keeps=shared.keeping and job.step.is_invertible)
        file, known = shared.outputs.open(job.target), shared.known_of(job.step)
        self._run = StepRun(work, file, job.offset, source, known, _other(shared, job.step))
        super().__init__(shared, number, self._run, self._cut(file, job.offset, known, context))

    def _cut(
        self, file: OutputFile, offset: int, known: str | None, context: PlanContext
    ) -> Iterable[Tile]:
        """Return the step's tiles; one, where no more than that is left to be done."""
        if known is not None and self._step.is_copy:
            parts = file.unshared(offset, self._step.nbytes)
            if sum(last - first for first, last in parts) <= context.tile_bytes:
                return [whole_tile(self._step)]
        return context.tiles_of(self._step)

    def finish(self) -> None:
        """Leave the tensor's record, let go of its memory, and close its file after the last."""
        record = self._run.finish(self._target.name)
        adapter = self._shared.digests_of(self._step)
        done = Done(self._job.name, record.blake3, record, adapter, ())
        self._close(done, self._run.sections())
        self._run.release()
        self._shared.context.finish(self._step)
        self._shared.outputs.finish(self._target)


def _other(shared: _Shared, step: Step) -> Other | None:
    """Return the tensor of the base that adapters were trained on, if they are compared."""
    there = shared.task.plan.trained_on
    spec = there.spec(step) if there is not None else None
    return (spec, shared.trained_on) if spec is not None and shared.trained_on else None


class _CorrectionJob(_JobRun):
    """Keeps a tensor of the base for an undo."""

    def __init__(self, shared: _Shared, number: int, keep: Correction) -> None:
        self._run = CorrectionRun(keep, shared.stored, shared.files, compress=shared.keeping)
        tiles = correction_tiles(keep, shared.task.plan.tile_bytes)
        super().__init__(shared, number, self._run, tiles)

    def finish(self) -> None:
        """Leave the tensor's digest."""
        digest, sections = self._run.finish()
        self._close(Done(self._job.name, digest, None, (), ()), sections)


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
    with FilePool() as files:
        shared = _Shared(task, place, patch, files, done, progress)
        try:
            shared.outputs.make_finished()
            least = largest_tile(task.plan)
            execute_runs(
                shared.runs(), task.plan.threads, room=factor_room(task.plan),
                memory=lambda: TileMemory(least), stop=shared.stop,
            )  # fmt: skip
        except BaseException:
            _note_quietly(shared.log)
            raise
        finally:
            shared.outputs.close()
        shared.log.note()
        outcome = outcome_of(shared.jobs, shared.done)
        check_read(outcome, task.plan.steps, shared.context.source.expected, place.folder)
        return outcome


def _note_quietly(log: Ledger) -> None:
    """Note what is done although something failed; if that fails too, less is kept."""
    with contextlib.suppress(RegraftError, OSError):
        log.note()
