"""Adapters whose names lie one prefix away from the base's: text models and those that see, too.

The language model of ``Gemma3ForConditionalGeneration`` is ``model.language_model``, and that of
``Gemma3ForCausalLM``, which is the same model without its eyes, is ``model``. An adapter trained on
either fits the other once this prefix is changed in all of its names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from regraft.adapters.model import Adapter
from regraft.adapters.settings import LoraSettings
from regraft.errors import Problem
from regraft.merging.inputs.base_index import BaseIndex


@dataclass(frozen=True)
class PrefixChange:
    """A prefix of the adapter's names, and what stands for it in the base; ``""`` is none.

    One of the two is the other with more segments in it.
    """

    before: str
    after: str

    def in_base(self, name: str) -> str:
        """Return what the base calls a module or parameter of the adapter."""
        rest = _below(name, self.before)
        return name if rest is None else _join(self.after, rest)

    def in_adapter(self, name: str) -> str | None:
        """Return what the adapter calls a module or parameter of the base; None: it has none."""
        rest = _below(name, self.after)
        if rest is not None:
            return _join(self.before, rest)
        return name if _below(name, self.before) is None else None

    def note(self, label: str) -> str:
        """Return the sentence that says so."""
        shown = [f"{prefix}.*" if prefix else "*" for prefix in (self.before, self.after)]
        return (
            f"{label}: its names begin otherwise than the base's: {shown[0]} is taken for "
            f"{shown[1]}, under which all of them are found"
        )


def _below(name: str, prefix: str) -> str | None:
    """Return what follows a prefix of segments in a name; None where it does not begin so."""
    if not prefix or name == prefix:
        return name if not prefix else ""
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else None


def _join(prefix: str, rest: str) -> str:
    return f"{prefix}.{rest}" if prefix and rest else prefix or rest


@dataclass(frozen=True)
class MovedSettings(LoraSettings):
    """Settings that are asked by the base's names, and heed the adapter's own."""

    change: PrefixChange = PrefixChange("", "")

    def rank_of(self, key: str) -> int:
        """Return r for a name of the base."""
        return super().rank_of(self._own(key))

    def alpha_of(self, key: str) -> float:
        """Return alpha for a name of the base."""
        return super().alpha_of(self._own(key))

    def b_layout_of(self, key: str) -> str:
        """Return how B of the stack of experts is packed."""
        return super().b_layout_of(self._own(key))

    def targets(self, module: str) -> bool:
        """Whether a module of the base is one that ``target_modules`` selects."""
        own = self.change.in_adapter(module)
        return own is not None and super().targets(own)

    def saves(self, parameter: str) -> bool:
        """Whether a parameter of the base lies in a module that ``modules_to_save`` copies."""
        return super().saves(self._own(parameter))

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """Return the names of the parameters that ``target_parameters`` selects."""
        return super().parameters_of(self._own(module))

    def _own(self, name: str) -> str:
        own = self.change.in_adapter(name)
        return name if own is None else own


def moved(adapter: Adapter, change: PrefixChange) -> Adapter:
    """Return an adapter under the base's names."""
    values = {f.name: getattr(adapter.settings, f.name) for f in fields(LoraSettings)}
    return replace(
        adapter,
        settings=MovedSettings(**values, change=change),
        targets=tuple(replace(t, module=change.in_base(t.module)) for t in adapter.targets),
        whole=tuple(replace(w, parameter=change.in_base(w.parameter)) for w in adapter.whole),
        token_rows=tuple(replace(r, module=change.in_base(r.module)) for r in adapter.token_rows),
    )


def changes_for(
    index: BaseIndex, adapter: Adapter, fits: Callable[[Adapter], bool]
) -> list[PrefixChange]:
    """Return the changes of one prefix under which a base has all of an adapter's names.

    None is returned where its names are found as they are. Of several changes, those count under
    which sizes fit too, and of these the one that leads to the model's input embedding.

    Args:
        index: the base.
        adapter: the adapter.
        fits: whether an adapter under other names can be matched.
    """
    strange = [name for name in _modules(adapter) if not _is_found(index, adapter, name)]
    if not strange or index.wrapped is not None:  # no prefix: what training left in the base
        return []
    changes = [c for c in _candidates(index, strange) if _finds_all(index, moved(adapter, c))]
    if len(changes) > 1:
        changes = [c for c in changes if fits(moved(adapter, c))] or changes
    if len(changes) > 1:
        body = (index.names.input_embedding or "").rpartition(".")[0]
        changes = [c for c in changes if body and c.after == body] or changes
    return changes


def several(adapter: Adapter, changes: list[PrefixChange]) -> Problem:
    """Return the problem of names that fit the base in several places."""
    return Problem(
        "the adapter's names fit this base in several places, each under another prefix",
        adapter.label, "one place", ", ".join(f"{c.after or '(none)'}.*" for c in changes[:6]),
        "Rename the keys of the adapter's file to the base's names for the part it was trained on",
    )  # fmt: skip


def _modules(adapter: Adapter) -> Iterator[str]:
    """Yield the modules that a base has to have for an adapter to fit it."""
    yield from (target.module for target in adapter.targets)
    yield from (rows.module for rows in adapter.token_rows)
    for whole in adapter.whole:
        if whole.origin == "embedding":
            yield whole.parameter.rpartition(".")[0]


def _finds_all(index: BaseIndex, adapter: Adapter) -> bool:
    return all(_is_found(index, adapter, module) for module in _modules(adapter))


def _is_found(index: BaseIndex, adapter: Adapter, module: str) -> bool:
    leaves = ("weight", *adapter.settings.parameters_of(module))
    if f"{module}.in_proj_weight" in index.base.tensors:
        return True
    return any(index.find(f"{module}.{leaf}") for leaf in leaves)


def _candidates(index: BaseIndex, strange: list[str]) -> list[PrefixChange]:
    """Return the changes by which the place of a strange name becomes one that the base has."""
    places = dict.fromkeys(
        _place(p.rpartition(".")[0]) for p in (*index.by_parameter, *index.aliases)
    )
    wanted = dict.fromkeys(_place(name) for name in strange)
    pairs = (_parted(mine, theirs) for mine in wanted for theirs in places)
    return list(dict.fromkeys(change for change in pairs if change is not None))


def _place(module: str) -> tuple[str, ...]:
    """Return the segments of a name up to its first number: the list of layers it lies in."""
    segments = module.split(".")
    numbers = (i for i, segment in enumerate(segments) if segment.isdecimal())
    return tuple(segments[: next(numbers, len(segments))])


def _parted(mine: tuple[str, ...], theirs: tuple[str, ...]) -> PrefixChange | None:
    """Return the prefixes of two names that end alike, if one name is the other with a longer
    prefix.
    """
    same = 0
    while same < min(len(mine), len(theirs)) and mine[-1 - same] == theirs[-1 - same]:
        same += 1
    before, after = mine[: len(mine) - same], theirs[: len(theirs) - same]
    if not same or before == after or not (_within(before, after) or _within(after, before)):
        return None
    return PrefixChange(".".join(before), ".".join(after))


def _within(few: tuple[str, ...], many: tuple[str, ...]) -> bool:
    """Whether the segments of one prefix are among another's, in their order."""
    rest = iter(many)
    return all(segment in rest for segment in few)
