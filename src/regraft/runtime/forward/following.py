"""Modules that take the place of others while adapters are attached: the adapters go along.

Where the new module is the same layer (same path, same kind, same shapes), hooks move to it, and
what was computed from the old one is computed again. Anything else is refused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from regraft.errors import MismatchError, Problem
from regraft.runtime.forward.hooks import Hooks
from regraft.runtime.forward.layers.kinds import kind_of
from regraft.runtime.forward.layers.operations import Operations, Part, operations_of
from regraft.runtime.forward.layers.plain import plain_weight
from regraft.runtime.forward.selection import Named, RowSelection, Selection
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.quantized_parameters import plain_form

_AGAIN = "Put the module back, or detach() and attach the adapters to the model as it is now"
_STEP = 2.0**-7
"""Two steps of bfloat16: what libraries differ by when they take a weight out of its codes."""


class Following:
    """What was made for the modules of a model, and is made again for those in their place."""

    def __init__(self, base: LiveBase, hooks: Hooks) -> None:
        self._base, self._hooks = base, hooks
        self._parts: weakref.WeakKeyDictionary[Selection, list[Part]] = weakref.WeakKeyDictionary()
        self._rows: weakref.WeakSet[RowSelection] = weakref.WeakSet()
        self.lock = threading.RLock()

    def selection(self, parts: Sequence[Part]) -> Selection:
        """Find out what adapters do together, and see to the modules that this needs."""
        operations = operations_of(self._base, parts)
        self._hooks.cover(operations.steps, operations.replacements)
        names: Named = tuple((adapter.name, weight) for adapter, weight in parts)
        made = Selection(names, operations)
        with self.lock:
            self._parts[made] = list(parts)
        return made

    def rows(self, rows: RowSelection) -> RowSelection:
        """Note what answers for rows."""
        with self.lock:
            self._rows.add(rows)
        return rows

    def follow(self, merged: Sequence[str]) -> list[nn.Module]:
        """Go along with the modules that were replaced; the caller has the lock.

        Args:
            merged: the parameters that adapters are merged into now.

        Returns:
            The modules that are new.

        Raises:
            MismatchError: a module is gone or another one's place is taken by one that adapters do
                not fit; nothing has changed then.
        """
        base, before = self._base, dict(vars(self._base))
        modules, shapes = base.modules, shapes_of(base)
        try:
            base.look()
            made = self._again(modules, shapes, merged)
        except BaseException:
            vars(base).update(before)
            raise
        for selection, operations in made:
            selection.operations = operations
            self._hooks.cover(operations.steps, operations.replacements)
        for rows in list(self._rows):
            rows.forget()
        self._hooks.follow()
        known = {id(module) for module in modules.values()}
        return [module for module in base.modules.values() if id(module) not in known]

    def _again(
        self, modules: Mapping[str, nn.Module], shapes: Mapping[str, Any], merged: Sequence[str]
    ) -> list[tuple[Selection, Operations]]:
        touched = self._hooks.paths
        problems = unlike(modules, shapes, self._base, touched)
        problems += not_merged(modules, self._base, merged) if not problems else []
        if problems:
            raise MismatchError(problems)
        return [(made, operations_of(self._base, parts)) for made, parts in self._parts.items()]


def unlike(
    before: Mapping[str, nn.Module],
    shapes: Mapping[str, Any],
    now: LiveBase,
    touched: Iterable[str],
) -> list[Problem]:
    """Return the problems of modules in whose place there is none, or one of another kind.

    Args:
        before: the modules by path, as the adapters know them.
        shapes: the parameters' descriptions by name, of the same time.
        now: the model as it is.
        touched: paths of modules that adapters touch.
    """
    problems, found = [], shapes_of(now)
    for path in touched:
        old, new = before[path], now.modules.get(path)
        if new is old:
            continue
        was, is_now = _sizes(shapes, path, old), _sizes(found, path, old)
        if new is None or not _is_alike(old, new) or was != is_now:
            name = "no module" if new is None else f"{type(new).__name__} {_listed(is_now)}"
            problems.append(
                Problem("a module that an adapter is for was replaced", path or "the model",
                        f"{type(old).__name__} {_listed(was)}", name, _AGAIN)
            )  # fmt: skip
    return problems


def _is_alike(old: nn.Module, new: nn.Module) -> bool:
    """Whether two modules are layers of one kind; of kinds that are not known, of one class."""
    kinds = kind_of(old), kind_of(new)
    if kinds == (None, None):
        return type(old).__name__ == type(new).__name__
    return kinds[0] is kinds[1]


def _sizes(shapes: Mapping[str, Any], path: str, module: nn.Module) -> dict[str, Any]:
    """Return the shapes of a module's weight, or of all its parameters if its kind is unknown."""
    leaves = ("weight",) if kind_of(module) is not None else tuple(module._parameters)
    names = {leaf: f"{path}.{leaf}".removeprefix(".") for leaf in leaves}
    return {leaf: shapes[name] for leaf, name in names.items() if name in shapes}


def _listed(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{leaf} {list(shape)}" for leaf, shape in sizes.items()) or "without weight"


def shapes_of(base: LiveBase) -> dict[str, tuple[int, ...]]:
    """Return the plain shape of each parameter by every name that it has."""
    shapes = {name: spec.shape for name, spec in base.checkpoint.tensors.items()}
    return shapes | {name: shapes[owner] for name, owner in base.tied.items()}


def not_merged(
    before: Mapping[str, nn.Module], now: LiveBase, parameters: Iterable[str]
) -> list[Problem]:
    """Return the problems of merged parameters that have other values since they were replaced.

    Args:
        before: the modules by path, as they were merged.
        now: the model as it is.
        parameters: names of the merged parameters.
    """
    problems = []
    for name in parameters:
        path, _, leaf = name.rpartition(".")
        old, new = before[path], now.modules.get(path)
        if new is not old and (new is None or not _has_values(old, new, leaf, name)):
            problems.append(
                Problem("a module that adapters are merged into was replaced by one with other "
                        "values", path, "the merged values", type(new).__name__,
                        "Replace modules before merge_adapter() or after merge_and_unload(); put "
                        "this one back, or load the model again")
            )  # fmt: skip
    return problems


def _has_values(old: nn.Module, new: nn.Module, leaf: str, name: str) -> bool:
    """Whether a module has the values of another one, rounded to its own dtype."""
    if not isinstance(getattr(new, leaf, None), torch.Tensor):
        return False
    expected, found = plain_weight(old, leaf, name), plain_weight(new, leaf, name)
    if expected.shape != found.shape:
        return False
    expected = expected.to(device=found.device, dtype=found.dtype)
    if plain_form(getattr(old, leaf)) is None:
        return bool(torch.equal(expected, found))
    return bool(torch.allclose(expected.float(), found.float(), rtol=_STEP, atol=0.0))
