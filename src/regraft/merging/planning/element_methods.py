"""Methods on the elements of deltas: what they cannot be done to, and what they take in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from regraft.adapters.model import Adapter
from regraft.deltas.methods.form import AT_ONCE
from regraft.deltas.views import Delta
from regraft.deltas.whole import whole_of
from regraft.errors import Problem
from regraft.merging.options import ElementMethod
from regraft.merging.planning.match import Work
from regraft.merging.planning.plan import Step

ARRAYS_OF_ONE, ARRAYS = 6, 12
"""Arrays of float32 of the elements combined at a time: of each delta, and in all."""

_SUM = "Leave --method out: a merge adds such deltas up"

_ODD = {
    "dora": "DoRA's delta is told from the base, and not from elements of its own",
    "pissa": "PiSSA took its start out of the base, which is no delta of a module",
    "olora": "OLoRA took its start out of the base, which is no delta of a module",
    "lora-bias": "a bias of B (lora_bias) is no part of a module's matrix",
}


def unfit_for_method(
    works: Iterable[Work], adapters: Sequence[Adapter], method: ElementMethod
) -> list[Problem]:
    """Return what a method on elements cannot be done to."""
    return [problem for work in works for problem in _unfit(work, adapters, method)]


def _unfit(work: Work, adapters: Sequence[Adapter], method: ElementMethod) -> Iterator[Problem]:
    """Yield what of a stored tensor stands in the way, each once."""
    odd = {(each.adapter, each.feature): each for each in work.deltas if each.feature != "lora"}
    for delta in odd.values():
        yield Problem(
            f"{_ODD[delta.feature]}: the method {method.name} has no meaning for it",
            f"{adapters[delta.adapter].label}: {work.name}", "plain factors A and B",
            delta.feature, _SUM,
        )  # fmt: skip
    if odd:
        return
    if method.name == "della" and any(whole_of(delta).transposed for delta in work.deltas):
        yield Problem(
            "della ranks the elements of a module's rows, which this base stores as columns",
            work.name, "weights stored as (out, in)", "transposed ones",
            "Choose --method dare_ties, or regraft combine --method della",
        )  # fmt: skip
    if other := _of_another_module(work.deltas):
        one, two = other
        yield Problem(
            "deltas of modules that are cut in other ways meet in one stored tensor: the method "
            f"{method.name} cannot tell which elements belong together", work.name,
            _named(one, adapters), _named(two, adapters), _SUM,
        )  # fmt: skip


def _named(delta: Delta, adapters: Sequence[Adapter]) -> str:
    module = delta.origin.module if delta.origin is not None else delta.feature
    return f"{module} in {adapters[delta.adapter].label}"


def _of_another_module(deltas: Sequence[Delta]) -> tuple[Delta, Delta] | None:
    """Return two deltas that share rows of a stored tensor and are not of the same elements.

    An adapter that has two modules on the same rows, as of tied weights, has another one too.
    """
    of_rows: dict[tuple[int, int], Delta] = {}
    seen: dict[tuple[tuple[int, int], int], Delta] = {}
    for delta in sorted(deltas, key=lambda each: each.rows):
        first = of_rows.setdefault(delta.rows, delta)
        if whole_of(first).place != whole_of(delta).place:
            return first, delta
        if (own := seen.setdefault((delta.rows, delta.adapter), delta)) is not delta:
            return own, delta
    ranges = sorted(of_rows)
    for one, other in pairwise(ranges):
        if other[0] < one[1]:
            return of_rows[one], of_rows[other]
    return None


def combining_bytes(step: Step) -> int:
    """Return what combining a step's deltas takes in a thread, whatever the size of its tiles."""
    counts = [len(segment.deltas) for segment in step.segments if segment.method is not None]
    if not counts:
        return 0
    elements = max(AT_ONCE, step.matrix[1])
    return 4 * elements * (ARRAYS_OF_ONE * max(counts) + ARRAYS)
