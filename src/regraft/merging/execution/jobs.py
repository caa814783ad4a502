"""The work of an execution as a list: one job per tensor written, then one per tensor kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft._version import __version__
from regraft.errors import RegraftError
from regraft.formats.files.reading import FilePool
from regraft.formats.files.watching import first_seen
from regraft.merging.files.receipt import TensorRecord
from regraft.merging.planning.plan import Plan, Step
from regraft.merging.planning.targets import Target, plan_digest
from regraft.merging.undo.corrections import Correction
from regraft.merging.undo.patch import PatchWriter, Written, digest_of
from regraft.tensors import TensorSpec


@dataclass(frozen=True)
class Job:
    """A tensor to be written, or to be kept for an undo.

    Attributes:
        step, target, offset: what is written, and where.
        keep: what is kept.
    """

    step: Step | None = None
    target: Target | None = None
    offset: int = 0
    keep: Correction | None = None

    @property
    def name(self) -> str:
        """A name of its own."""
        if self.step is not None:
            return f"write {self.step.name}"
        return f"keep {self.keep.original.name}" if self.keep is not None else ""


def jobs_of(targets: Sequence[Target], keeps: Iterable[Correction]) -> list[Job]:
    """Return all jobs, in the order in which they are handed out."""
    written = [
        Job(step, target, offset)
        for target in targets
        for step, offset in zip(target.steps, target.offsets, strict=True)
    ]
    return written + [Job(keep=keep) for keep in keeps]


# -- what an earlier try has done ------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """A job that is done.

    Attributes:
        name: the job's.
        digest: blake3 (hex) of the tensor that was kept, or written.
        record: what the receipt says of a tensor that was written.
        adapter: file, name and blake3 (hex) of the adapters' tensors that it took.
        sections: what it left in the patch.
    """

    name: str
    digest: str
    record: TensorRecord | None
    adapter: tuple[tuple[str, str, str], ...]
    sections: tuple[Written, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what the journal says of it; its sections are told by whoever wrote them."""
        record = None if self.record is None else vars(self.record)
        return {**vars(self), "record": record, "sections": []}

    @classmethod
    def read(cls, entry: dict[str, Any]) -> Done | None:
        """Return a journal's entry; None if it is none."""
        try:
            record = entry["record"]
            if record is not None:
                lists = ("shape", "features", "scales", "adapters")
                record = TensorRecord(**{**record, **{n: tuple(record[n]) for n in lists}})
            adapter = tuple((str(p), str(n), str(d)) for p, n, d in entry["adapter"])
            sections = tuple(Written(*section) for section in entry["sections"])
            return cls(str(entry["name"]), str(entry["digest"]), record, adapter, sections)
        except (KeyError, TypeError, ValueError):
            return None


def count_done(
    jobs: Sequence[Job], entries: Sequence[dict[str, Any]], folder: Path, patch: Path | None
) -> list[Done]:
    """Return the jobs that an earlier try has done and whose results are still there.

    Every byte is read and held against its digest: neither the journal nor the disk is trusted.

    Args:
        jobs: all jobs.
        entries: the journal's entries.
        folder: the output as far as it is.
        patch: the undo patch as far as it is, if there is to be one.
    """
    found = []
    for job, entry in zip(jobs, entries, strict=False):
        done = Done.read(entry)
        if done is None or done.name != job.name:
            break
        found.append(done)
    with FilePool() as files, ThreadPoolExecutor(4) as pool:

        def holds(pair: tuple[Job, Done]) -> bool:
            try:
                return _holds(files, *pair, folder, patch)
            except (RegraftError, OSError, ValueError, OverflowError):  # it cannot be read
                return False

        for count, good in enumerate(pool.map(holds, zip(jobs, found, strict=False))):
            if not good:
                return found[:count]
    return found


def _holds(files: FilePool, job: Job, done: Done, folder: Path, patch: Path | None) -> bool:
    if job.step is not None and job.target is not None:
        step, path = job.step, folder / job.target.name
        spec = TensorSpec(step.name, step.dtype, step.shape, path, job.offset, step.nbytes)
        if not path.is_file() or digest_of(files, spec) != done.digest:
            return False
    if done.sections and (patch is None or not patch.is_file()):
        return False
    return patch is None or all(PatchWriter.holds(patch, files, each) for each in done.sections)


def fingerprint(plan: Plan, inputs: Iterable[Path], **choices: Any) -> str:
    """Return a digest of everything that decides the bytes of a piece of work.

    Files are told by size, inode and the times of their last changes, as they were when they were
    opened.
    """
    seen = [_identity(path) for path in sorted(set(inputs))]
    what = [
        __version__, plan_digest(plan), seen, plan.options, dict(plan.config_updates), choices
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _identity(path: Path) -> list[Any]:
    found = first_seen(path)
    return [str(path.resolve()), found.size, found.modified, found.changed, found.inode]
