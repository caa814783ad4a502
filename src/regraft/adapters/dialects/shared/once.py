"""One part of an adapter under two names: refused, with both, since only one of them can count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.errors import AdapterError, Problem, UnsupportedError
from regraft.formats.problems import capped, quoted
from regraft.tensors import TensorSpec

if TYPE_CHECKING:  # to look at an adapter in PEFT's format takes no arrays
    from regraft.adapters.dialects.form import LoraModule, Moved


def twice(first: str, second: str, where: str) -> Problem:
    """Return the problem of two tensors of a file that are one of the adapter."""
    return Problem(
        "two tensors of the file are one of the adapter", where, "one tensor",
        f"{quoted(first)} and {quoted(second)}",
        "They differ in what training put into the names; keep the one that was trained last",
    )  # fmt: skip


def by_own_name(
    tensors: Mapping[str, TensorSpec], own: Callable[[str], str], where: Path
) -> dict[str, TensorSpec]:
    """Return tensors by the names that they have in the adapter.

    Args:
        tensors: by their names in the file.
        own: makes the one of the other.
        where: the file, for messages.

    Raises:
        AdapterError: two have one name then; names both, and all such.
    """
    found: dict[str, tuple[str, TensorSpec]] = {}
    problems = []
    for stored, spec in tensors.items():
        first, _ = found.setdefault(own(stored), (stored, spec))
        if first != stored:
            problems.append(twice(first, stored, str(where)))
    if problems:
        raise AdapterError(capped(problems, where))
    return {name: spec for name, (_, spec) in found.items()}


def modules_twice(modules: Iterable[LoraModule], where: Path) -> list[Problem]:
    """Return the problem of each module that the file has under two names, with its A's in it."""
    first: dict[str, LoraModule] = {}
    problems = []
    for module in modules:
        other = first.setdefault(module.name, module)
        if other is not module:
            stored = " and ".join(quoted(_stored(each)) for each in (other, module))
            problems.append(
                Problem("two modules of the file are one of the model", f"{where}, {module.name}",
                        "one module", stored, "Leave one of the two out of the file")
            )  # fmt: skip
    return problems


def _stored(module: LoraModule) -> str:
    return module.a.sources[0].name if module.a.sources else module.name


class NewTensors(dict[str, "Moved"]):
    """Tensors that are to be written, by name: one that is there already is refused.

    Two modules of an adapter can have one name in another dialect, and one of them would be lost.
    """

    def __setitem__(self, name: str, tensor: Moved) -> None:
        """Add a tensor.

        Raises:
            UnsupportedError: there is one of that name.
        """
        if name in self:
            both = (self[name].sources[:1], tensor.sources[:1])
            raise UnsupportedError(
                "two modules of the adapter have one name in this dialect", where=quoted(name),
                expected="one", found=" and ".join(quoted(s[0].name) for s in both if s),
                hint="Merge it (`regraft merge`), and use the merged model",
            )  # fmt: skip
        super().__setitem__(name, tensor)

    def add(self, tensors: Mapping[str, Moved]) -> None:
        """Add several; raises as above."""
        for name, tensor in tensors.items():
            self[name] = tensor
