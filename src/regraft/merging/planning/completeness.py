"""Does the class that the config names find all its tensors in the output, and only these?

transformers makes what a checkpoint lacks anew, at random, and leaves out what a class does not
have. It says so in a log that few read, and the model answers: differently after each load. What a
class has is data, taken from a default configuration, and settings can add to it or take from it.
So only those differences are reported that no setting makes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from regraft.errors import MismatchError
from regraft.merging.inputs.base_index import BaseIndex
from regraft.merging.inputs.single_experts import WAY_OUT
from regraft.merging.planning.match import Work
from regraft.names import NameMap
from regraft.names.architecture import template

_LISTED = 6
_EXPERTS = ".experts."


def notes_of_class(
    index: BaseIndex,
    works: Mapping[str, Work],
    left_out: Iterable[str] = (),
    *,
    merged_out: bool = False,
) -> list[str]:
    """Return what to say of tensors that the output's class lacks in it, or does not know.

    Args:
        index: the base, with the output's class.
        works: what the output has otherwise than the base.
        left_out: names of the base that the output does not have.
        merged_out: whether the base is quantized and the output is not: nobody who could load the
            one needs to be able to load the other.

    Raises:
        MismatchError: the base keeps experts apart in names that the class does not know.
    """
    names = index.names
    if names.tensors is None:
        return []
    added = [name for name, work in works.items() if name not in index.base.tensors]
    stored = _stored(index, frozenset(left_out))
    contents = _Contents(names, [*stored, *added])
    before = NameMap.for_config(index.base.config).tensors
    notes = []
    if made := contents.made_by_class(before):
        notes.append(_anew(names, made))
    if misnamed := contents.misnamed():
        if merged_out and any(_EXPERTS in f".{name}." for name in misnamed[0]):
            raise _experts_apart(index, *misnamed)
        notes.append(_misnamed(names, *misnamed))
    if unread := [name for name in added if not contents.knows(name)]:
        notes.append(
            f"{names.architecture} has no {_list(unread)}: transformers leaves out what the class "
            "does not have, and with it what was trained there"
        )
    return notes


def _stored(index: BaseIndex, left_out: frozenset[str]) -> Iterator[str]:
    """Yield the parameters that transformers makes of the base's tensors.

    The index knows experts by more names than transformers reads; these keep the base's name.
    """
    read: dict[str, bool] = {}
    for parameter, held in index.by_parameter.items():
        for one in held:
            if one.spec.name in left_out:
                continue
            if one.piece.expert is None:
                yield parameter
                continue
            kind = template(one.spec.name)
            if kind not in read:
                read[kind] = any(p.expert is not None for p in index.names.pieces(one.spec.name))
            yield parameter if read[kind] else one.spec.name


class _Contents:
    """The parameters that an output holds, against those of its class; as templates."""

    def __init__(self, names: NameMap, parameters: Iterable[str]) -> None:
        self._names = names
        self._needed = names.tensors or frozenset()
        self._held = frozenset(template(parameter) for parameter in parameters)
        self._tied = _sides(names.tied_now)
        self._missing = {name for name in self._needed if not self._finds(name)}

    def _finds(self, name: str) -> bool:
        sides = (name, *self._tied.get(name, ()))
        return any(self._names.has(side, self._held) for side in sides)

    def knows(self, parameter: str) -> bool:
        """Whether the class has a parameter."""
        return self._names.has(parameter, self._needed)

    def made_by_class(self, before: frozenset[str] | None) -> list[str]:
        """Return what is missing because the class is not the base's, and a head left out."""
        head = f"{self._names.output_embedding}.weight"
        new = self._missing - before if before is not None else set()
        return sorted(new | (self._missing & {head}))

    def misnamed(self) -> tuple[list[str], list[str]] | None:
        """Return what is missing beside names in the same module that the class does not know."""
        strange = [name for name in self._held if not self.knows(name)]
        missing, instead = set(), set()
        for name in self._missing:
            inside = f"{name.rpartition('.')[0]}."
            if found := [other for other in strange if other.startswith(inside)]:
                missing.add(name)
                instead.update(found)
        return (sorted(missing), sorted(instead)) if missing else None


def _experts_apart(index: BaseIndex, missing: list[str], instead: list[str]) -> MismatchError:
    return MismatchError(
        f"the base keeps its experts in a layout that {index.names.architecture} does not read: "
        "merged, they would be made anew at each load",
        where=index.base.source, expected=_list(missing), found=_list(instead),
        hint=WAY_OUT,
    )  # fmt: skip


def _sides(ties: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the parameters that each tied one shares its tensor with."""
    sides: dict[str, set[str]] = defaultdict(set)
    for target, source in ties.items():
        sides[template(target)].add(template(source))
        sides[template(source)].add(template(target))
    return sides


def _anew(names: NameMap, made: list[str]) -> str:
    return (
        f"{names.architecture} needs tensors that neither the base nor an adapter holds: "
        f"{_list(made)}. Each load makes them anew, at random, and the model answers differently "
        "each time; save the adapter with these modules in modules_to_save"
    )


def _misnamed(names: NameMap, missing: list[str], instead: list[str]) -> str:
    return (
        f"{names.architecture} looks for {_list(missing)} and finds {_list(instead)}, which it "
        "does not know: each load makes the first anew, at random, and leaves the others out"
    )


def _list(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
