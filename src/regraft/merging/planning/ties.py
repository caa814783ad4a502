"""Tied weights: kept as one tensor where the adapters allow that, else written as two.

A tied parameter is in the file once. An adapter on one side of a tie gives the two sides different
weights, so a faithful merge writes both and says ``tie_word_embeddings: false``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import Problem
from regraft.merging.inputs.base_index import BaseIndex
from regraft.merging.planning.match import Matching, Work, vocabulary_side
from regraft.tensors import TensorSpec

READS_THE_TIE = frozenset(
    [
        "t5",
        "mt5",
        "umt5",
        "longt5",
        "switch_transformers",
        "udop",
        "t5gemma",
        "pix2struct",
        "pop2piano",
    ]
)
"""Model types whose forward pass scales its output by whether the weights are tied: saying that
they are not would change the function."""


@dataclass
class TieOutcome:
    """What became of the ties.

    Attributes:
        parted: works on tied parameters that are now tensors of their own.
        untied: whether the config has to say so.
    """

    parted: list[Work] = field(default_factory=list)
    untied: bool = False


def settle_ties(index: BaseIndex, matching: Matching, config: dict[str, Any] | None) -> TieOutcome:
    """Decide every tie; problems are added to ``matching``."""
    outcome = TieOutcome()
    for source in dict.fromkeys(index.aliases.values()):
        _settle(index, matching, source, outcome, config or {})
    outcome.untied |= _differs_though_both_stored(index, matching)
    return outcome


def _settle(
    index: BaseIndex, matching: Matching, source: str, outcome: TieOutcome, config: dict[str, Any]
) -> None:
    aliases = [target for target, owner in index.aliases.items() if owner == source]
    stored = index.holding(source)[0].spec
    for alias in aliases:
        _share(matching, alias, stored.name)
    own = matching.works.get(stored.name)
    if not any(alias in matching.tied for alias in aliases) and not (own and _is_private(own)):
        return
    names = [a for a in aliases if a in matching.tied] or [own.name if own else aliases[0]]
    if problem := cannot_part(index, aliases, names, config):
        matching.problems.append(problem)
        return
    for alias in aliases:
        outcome.parted.append(_part(matching.tied.get(alias), own, alias, stored))
    outcome.untied = True


def _share(matching: Matching, alias: str, stored: str) -> None:
    """Take what an adapter with ``ensure_weight_tying`` says of one side for both."""
    work = matching.tied.get(alias)
    if work is None:
        return
    common = matching.works.setdefault(stored, Work(stored, work.base))
    known = {delta.adapter for delta in common.deltas}
    for delta in list(work.deltas):
        if delta.adapter not in work.shared or delta.magnitude is not None:
            continue
        work.deltas.remove(delta)
        common.shared.add(delta.adapter)
        if delta.adapter not in known:
            common.deltas.append(delta)
    if work.replaced is not None and work.replaced[0] in work.shared:
        common.replaced = common.replaced or work.replaced
        common.shared.add(work.replaced[0])
        work.replaced = None
    if not (work.deltas or work.replaced or work.patches):
        del matching.tied[alias]


def _is_private(work: Work) -> bool:
    """Whether the stored side was changed in a way that the tied side was not."""
    changed = _lora_adapters(work)
    if work.replaced is not None:
        changed.add(work.replaced[0])
    return bool(changed - work.shared)


def _lora_adapters(work: Work) -> set[int]:
    return {delta.adapter for delta in work.deltas}


def _part(tied: Work | None, own: Work | None, alias: str, stored: TensorSpec) -> Work:
    """Return the work that writes a tied parameter as a tensor of its own."""
    work = tied or Work(alias, stored)
    if own is None:
        return work
    work.carried = work.carried or own.carried
    if work.replaced is None and own.replaced is not None and own.replaced[0] in own.shared:
        work.replaced = own.replaced
    mine = _lora_adapters(work)
    common = [d for d in own.deltas if d.adapter in own.shared - mine and d.magnitude is None]
    work.deltas = sorted([*common, *work.deltas], key=lambda delta: delta.adapter)
    patched = {patch.adapter for patch in work.patches}
    work.patches = [*(p for p in own.patches if p.adapter not in patched), *work.patches]
    return work


def cannot_part(
    index: BaseIndex, aliases: Iterable[str], names: Iterable[str], config: Mapping[str, Any]
) -> Problem | None:
    """Return what stands against parting the sides of a tie; None for nothing.

    Args:
        index: the base.
        aliases: every parameter that is tied to the same one.
        names: the sides that are changed, for the message.
        config: the base's.
    """
    output = f"{index.names.output_embedding or 'lm_head'}.weight"
    where = ", ".join(names)
    hint = "Train it with ensure_weight_tying=True, or leave the tied embeddings out"
    if any(alias != output for alias in aliases):
        return Problem(
            "the adapter changes one side of a tie that no config can undo", where,
            found="tied to " + ", ".join(aliases), hint=hint,
        )  # fmt: skip
    if config.get("model_type") in READS_THE_TIE:
        return Problem(
            "the adapter changes one side of a tie, and untied this model computes something else",
            where, found=f"model_type {config.get('model_type')}", hint=hint,
        )  # fmt: skip
    return None


def _differs_though_both_stored(index: BaseIndex, matching: Matching) -> bool:
    """Whether a tie that the file stores twice now holds two different weights."""
    for target, source in index.names.tied_now.items():
        if target in index.aliases or target not in index.by_parameter:
            continue
        sides = [index.holding(name) for name in (target, source)]
        works = [matching.works.get(held[0].spec.name) for held in sides if held]
        if any(work is not None for work in works):
            return True
    return False


def vocabulary_changed(index: BaseIndex, works: Iterable[Work]) -> bool:
    """Whether a side of the vocabulary changes its size, or comes to be stored."""
    return any(
        work.base is None or output_rows(work) != work.base.shape[0]
        for work in works
        if vocabulary_side(index, work.name) is not None
    )


def output_rows(work: Work) -> int:
    """Return the rows a work's tensor has in the output, appended token rows included."""
    height = work.source.shape[0] if work.source.shape else 1
    beyond = {i for patch in work.patches for i in patch.indices if i >= height}
    return height + len(beyond)


def on_both_sides(index: BaseIndex, matching: Matching) -> dict[str, Work]:
    """Return the works of a matching in which both sides of each tie have a work of their own.

    This is for a model in memory, where the sides of a tie can differ without anything being
    written.
    """
    works = dict(matching.works)
    for source in dict.fromkeys(index.aliases.values()):
        aliases = [target for target, owner in index.aliases.items() if owner == source]
        stored = index.holding(source)[0].spec
        for alias in aliases:
            _share(matching, alias, stored.name)
        own = matching.works.get(stored.name)
        if own is not None:
            works[stored.name] = own
        for alias in aliases:
            works[alias] = _part(matching.tied.get(alias), own, alias, stored)
    return works
