"""What an execution leaves, and whether what it read was what it should have been."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import MismatchError, Problem
from regraft.formats.problems import capped, quoted
from regraft.merging.compute.factors import read_differently
from regraft.merging.execution.jobs import Done, Job
from regraft.merging.files.receipt import TensorRecord
from regraft.merging.planning.plan import Step


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


def outcome_of(jobs: Sequence[Job], done: Mapping[str, Done]) -> Outcome:
    """Return what was done, by this try and by earlier ones.

    Args:
        jobs: all jobs, in order.
        done: what came of them, by their name.

    Raises:
        MismatchError: an adapter's tensor was not the same whenever it was read.
    """
    digests = dict[tuple[Path, str], str]()
    for each in done.values():
        for path, name, digest in each.adapter:
            key = (Path(path), name)
            if digests.setdefault(key, digest) != digest:
                raise read_differently(*key)
    records = [record for job in jobs if (record := done[job.name].record) is not None]
    kept = {job.keep.original.name: done[job.name].digest for job in jobs if job.keep is not None}
    return Outcome(tuple(records), digests, kept)


def check_read(
    outcome: Outcome, steps: Sequence[Step], expected: Callable[[str], str | None], folder: Path
) -> None:
    """Hold the digests of the base's stored tensors against those they have to have.

    Args:
        outcome: has the digests.
        steps: the plan's.
        expected: gives the digest that a tensor has to have, if that is known.
        folder: what messages name.

    Raises:
        MismatchError: a tensor is another one; lists all of them.
    """
    theirs = {step.name for step in steps if not is_stored(step)}
    read = {r.source: r.source_blake3 for r in outcome.records if r.name not in theirs}
    problems: list[Problem] = []
    for name, digest in (read | outcome.kept_digests).items():
        due = expected(name)
        if due is not None and due != digest:
            problems.append(_edited(name, first=not problems))
    if problems:
        raise MismatchError(capped(problems, folder))


def is_stored(step: Step) -> bool:
    """Whether the digest of what a step reads is that of one of the base's stored tensors."""
    if step.source_adapter is not None or step.only_scales:
        return False
    return step.coded is not None or not step.source.is_virtual


def _edited(name: str, *, first: bool) -> Problem:
    """Return the problem of a tensor that was not given back; what to do is said once."""
    hint = "These weights have been changed since the merge, or the undo patch has: take the model "
    hint += "from where it was unchanged; `regraft verify` says more"
    what = "the undo patch does not fit the weights"
    return Problem(what, f"tensor {quoted(name)}", hint=hint if first else "")
