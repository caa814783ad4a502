"""Which models have adapters attached."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from regraft.runtime.handle import Adapters

_HANDLES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Adapters]] = weakref.WeakKeyDictionary()
"""The handle of each model that has one.

A handle holds its model, so nothing here holds the handle: the hooks on the model do, and all of
them go together.
"""


class Handle:
    """Marks the class of what :func:`regraft.attach` returns, for modules below that class."""


def attached_to(model: Any) -> Adapters | None:
    """Return the handle of a model, without its wrappers; None if it has none."""
    found = _HANDLES.get(model)
    return found() if found is not None else None


def all_attached() -> Iterator[Adapters]:
    """Yield every handle that is still in use."""
    yield from [handle for held in list(_HANDLES.values()) if (handle := held()) is not None]


def remember(model: nn.Module, handle: Adapters) -> None:
    """Note the handle of a model."""
    _HANDLES[model] = weakref.ref(handle)


def forget(model: nn.Module) -> None:
    """Note that a model has no handle."""
    _HANDLES.pop(model, None)
