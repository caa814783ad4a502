"""Carrying a plan out in a work folder: a merge, a swap, or an un-merge."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from regraft.adapters.model import Adapter
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.known_digests import KnownDigests, Range
from regraft.merging.execution.jobs import Done, count_done, fingerprint, jobs_of
from regraft.merging.execution.outcome import Outcome, is_stored
from regraft.merging.execution.scheduler import OpenSource, Reuse, Task, execute
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.files.receipt import Receipt
from regraft.merging.files.staging import Workplace
from regraft.merging.finalize import write_rest
from regraft.merging.options import MergeOptions
from regraft.merging.planning.plan import Plan
from regraft.merging.planning.sides import sides_of
from regraft.merging.planning.targets import Target, merge_targets, shared_bytes
from regraft.merging.undo.corrections import corrections_of, digests_only
from regraft.merging.undo.keeping import UndoSettings, section_names
from regraft.merging.undo.manifest import PATCH, UNDO
from regraft.merging.undo.patch import PatchWriter
from regraft.progress import Progress, tell
from regraft.system.memory import peak_memory


def build(
    plan: Plan, place: Workplace, inputs: Iterable[Path], command: str, started: float, *,
    keeping: UndoSettings | None, open_source: OpenSource | None = None, reuse: Reuse | None = None,
    progress: Progress | None = None,
) -> Receipt:  # fmt: skip
    """Write a merged model into a work folder, going on from an earlier try if there was one.

    Args:
        plan: the merge.
        place: the work folder.
        inputs: every file that decides the bytes; a change to one starts afresh.
        command: how it was called, for the receipt.
        started: when the call began, of ``time.perf_counter``.
        keeping: what to keep for an undo; None for no undo.
        open_source: gives what the base is read from, if not its files.
        reuse: what need not be done again; None for nothing.
        progress: called as work proceeds.

    Raises:
        RegraftError: something cannot be read, computed or written.
    """
    sides = sides_of(plan)
    plan = replace(plan, warnings=tuple(dict.fromkeys((*plan.warnings, *sides.warnings))))
    kept = corrections_of(plan) if keeping is not None else digests_only(plan)
    task = Task(plan, merge_targets(plan), kept, open_source, reuse=reuse or Reuse())
    place.begin(fingerprint(plan, inputs, keeping=keeping and asdict(keeping)))
    path = place.out / UNDO / PATCH if keeping is not None else None
    done = resume(place, task, path, progress)
    patch = None
    if path is not None:
        sections = [section for each in done for section in each.sections]
        patch = PatchWriter(path, section_names(plan, kept), sections)
    try:
        outcome = execute(task, place, patch, done, progress)
        _remember(task, outcome, place.out)
        tell(progress, "finish", plan.nbytes)
        return write_rest(
            task, outcome, place.out, command,
            lambda: (time.perf_counter() - started, peak_memory(), plan.threads),
            sides, patch, keeping,
        )  # fmt: skip
    except BaseException:
        if patch is not None:
            patch.abandon()
        raise


def make_room(plan: Plan, folder: OutputFolder, options: MergeOptions) -> Reuse:
    """Refuse to begin what will not fit; return what need not be done again.

    Raises:
        DiskSpaceError: fewer bytes are free than are needed.
        EnvironmentShortfall: blocks cannot be shared, and the options ask for it.
    """
    reuse = reuse_of(plan.stored, folder, options)
    folder.check_space(plan.disk_bytes - (shared_bytes(merge_targets(plan)) if reuse.share else 0))
    return reuse


def reuse_of(read: Checkpoint, folder: OutputFolder, options: MergeOptions) -> Reuse:
    """Return what need not be done again of a model whose files are read.

    Raises:
        EnvironmentShortfall: blocks cannot be shared, and the options ask for it.
    """
    share = folder.shares([shard.path for shard in read.shards], options.reflink)
    return Reuse(share, KnownDigests.of_user(wanted=options.digest_cache))


def _remember(task: Task, outcome: Outcome, out: Path) -> None:
    """Keep the digests of the base's files, where these were read, and of those that were made."""
    if not task.reuse.known.are_wanted:
        return
    found = defaultdict[Path, dict[Range, str]](dict)
    records = iter(outcome.records)
    for target in task.targets:
        for step, offset in zip(target.steps, target.offsets, strict=True):
            record = next(records)
            found[out / target.name][offset, step.nbytes] = record.blake3
            if task.open_source is None and is_stored(step) and not record.known:
                spec = step.stored
                found[spec.path][spec.start, spec.nbytes] = record.source_blake3
    for keep in task.keeps if task.open_source is None else ():
        spec = keep.original
        found[spec.path][spec.start, spec.nbytes] = outcome.kept_digests[spec.name]
    made = {out / target.name for target in task.targets}
    for path, digests in found.items():
        task.reuse.known.remember(path, digests, own=path in made)


def deciding_files(plan: Plan) -> list[Path]:
    """Return the files that decide what a merge writes: one list, for whoever starts one.

    They are those of the base and of the base that adapters were trained on, as they are on disk
    (a file may hold nothing but scales), the base's side files, and the adapters'. A change to
    any of them between two tries starts afresh.
    """
    stored = [plan.stored, *([plan.trained_on.stored] if plan.trained_on is not None else [])]
    weights = [shard.path for checkpoint in stored for shard in checkpoint.shards]
    sides = [] if plan.stored.single_file else _files_in(plan.stored.root)
    return [*weights, *sides, *adapter_files(plan.adapters)]


def adapter_files(adapters: Sequence[Adapter]) -> list[Path]:
    """Return every file beside adapters' weights, and these, as the user gave them."""
    return [path for adapter in adapters for path in _files_in(adapter.inputs)]


def _files_in(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_file()] if place.is_dir() else [place]


def rebuild(
    plan: Plan, targets: list[Target], place: Workplace, inputs: Iterable[Path],
    open_source: OpenSource, progress: Progress | None, *, reuse: Reuse,
) -> None:  # fmt: skip
    """Write the weight files of a base into a work folder; arguments are those of :func:`build`."""
    task = Task(plan, targets, open_source=open_source, stage="unmerge", reuse=reuse)
    place.begin(fingerprint(plan, inputs, unmerge=True))
    outcome = execute(task, place, None, resume(place, task, None, progress), progress)
    _remember(task, outcome, place.out)
    tell(progress, "finish", plan.nbytes)


def resume(
    place: Workplace, task: Task, patch: Path | None, progress: Progress | None
) -> list[Done]:
    """Return what an earlier try has done, and forget of it what is no longer there."""
    names = {target.name for target in task.targets}
    place.keep_only(names | ({f"{UNDO}/{PATCH}"} if patch is not None else set()))
    if not place.entries:
        return []
    tell(progress, "resume", 0)
    jobs = jobs_of(task.targets, task.keeps)
    done = count_done(jobs, place.entries, place.out, patch)
    place.cut(len(done))
    return done
