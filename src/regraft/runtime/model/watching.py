"""Where the modules are that adapters touch; whether they are still there, is looked at cheaply.

Hooks are on modules, and libraries replace modules: ``dequantize()`` of transformers, torch.ao,
whoever assigns one. An adapter would then be lost without a word. So it is noted which child each
module has on the way to what the adapters touch, and looked at before each forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from regraft.errors import MismatchError
from regraft.runtime.model.wrappers import plain_paths

_Link = tuple[Mapping[str, Any], str, nn.Module]
"""The children of a module, a name among them, and the child."""


class Watch:
    """Where the modules are that adapters touch, and whether they still are there."""

    def __init__(self, model: nn.Module | None = None, touched: Collection[str] = ()) -> None:
        """Note where modules are.

        Args:
            model: the whole model.
            touched: their paths, without the segments of wrappers.
        """
        self.model: Callable[[], nn.Module | None] = (
            _no_model if model is None else weakref.ref(model)
        )
        links: dict[tuple[int, str], _Link] = {}
        paths = list(plain_paths(model)) if model is not None else []
        found = {path: module for _, path, module in paths}
        wanted = {id(found[path]) for path in touched if path in found}
        for raw, _, module in paths:
            if raw and id(module) in wanted and model is not None:
                links.update(_links(model, raw))
        self._links = list(links.values())

    def holds(self) -> bool:
        """Whether every parent has the child that it had."""
        for children, name, module in self._links:  # noqa: SIM110 - half the time of all()
            if children.get(name) is not module:
                return False
        return True


def _no_model() -> None:
    return None


def _links(model: nn.Module, path: str) -> Iterator[tuple[tuple[int, str], _Link]]:
    """Yield each step of the way from a model to a module of it."""
    parent: Any = model
    for name in path.split("."):
        children = parent._modules
        parent = children[name]
        yield (id(children), name), (children, name, parent)


def lost_in_copy(paths: list[str]) -> MismatchError:
    """Return the error of a copy of the model in which adapters would not be heard."""
    shown = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
    return MismatchError(
        "in this copy of a model with adapters, modules that they are for were replaced",
        where=shown, expected="the modules that were copied", found="others",
        hint="Replace modules in the model itself, which adapters follow; or call for_trainer() "
        "again, or detach(), copy, and attach to the copy",
    )  # fmt: skip
