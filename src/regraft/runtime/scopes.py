"""Which selection of adapters answers: by thread or task first, then the handle's own.

Scopes live in a context variable, so each thread and each asyncio task has its own. Two places
cannot ask it:

- torch.compile does not trace context variables, but it does guard on attributes of a
  ``threading.local``. The scopes are mirrored there. Tasks of one thread share it, so where tasks
  have been seen :func:`refresh_mirror` is called before each forward pass.
- The backward pass runs parts of the forward pass again under gradient checkpointing, maybe in
  another thread and after the scope has ended. Which scopes a forward pass had is noted with its
  outputs (:func:`remember_for_backward`) and found again by the number of the backward pass; where
  that goes through several forward passes, by the number that autograd gave to the operation.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch

Scopes = Mapping[int, Any]
"""Selections by the key of their handle; None stands for no adapter."""

_NONE: Scopes = MappingProxyType({})
_scopes: ContextVar[Scopes] = ContextVar("regraft_scopes", default=_NONE)
_mirror = threading.local()
_of_backward: dict[int, dict[int, Scopes]] = {}
"""By backward pass, then by the number of the last operation of each forward pass."""

_MOST = 256
"""So many backward passes are remembered: those that fail do not say that they have ended."""

UNSET = object()
"""What :func:`find` returns where no scope says anything."""


def find(key: int) -> Any:
    """Return the selection that the scopes here have for a handle, or :data:`UNSET`."""
    if torch.compiler.is_compiling():
        scopes = getattr(_mirror, "scopes", None)
        return UNSET if scopes is None else scopes.get(key, UNSET)
    return current().get(key, UNSET)


def current() -> Scopes:
    """Return the scopes of this thread or task; in a backward pass those of its forward pass."""
    if _of_backward:
        found = _of_backward.get(torch._C._current_graph_task_id())
        if found is not None:
            return _of_operation(found, torch._C._current_autograd_node())
    return _scopes.get()


def _of_operation(passes: Mapping[int, Scopes], operation: Any) -> Scopes:
    """Return the scopes of the forward pass that an operation is from.

    Autograd numbers operations as they are recorded, so it is the first pass that ends after it.
    """
    number = operation._sequence_nr() if operation is not None else 0
    return passes[min((last for last in passes if last >= number), default=max(passes))]


@contextmanager
def scope(key: int, selection: Any) -> Iterator[None]:
    """Let a selection answer for a handle, in this thread or task, until the block ends."""
    inner = {**_scopes.get(), key: selection}
    token = _scopes.set(inner)
    before = getattr(_mirror, "scopes", None)
    _mirror.scopes = inner
    try:
        yield
    finally:
        _mirror.scopes = before
        _scopes.reset(token)


def in_task() -> bool:
    """Whether this is inside an asyncio task."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no loop is running
        return False


@torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
def refresh_mirror() -> None:
    """Let compiled code see the scopes of the task that runs now."""
    _mirror.scopes = _scopes.get() or None


def remember_for_backward(outputs: Iterable[torch.Tensor], scopes: Scopes) -> None:
    """Let whatever the backward pass from these outputs runs again see these scopes."""

    last = [output.grad_fn for output in outputs if output.grad_fn is not None]
    number = max((operation._sequence_nr() for operation in last), default=0)

    def begin(_gradients: Any) -> None:
        task = torch._C._current_graph_task_id()
        if task not in _of_backward:
            _of_backward[task] = {}
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: _of_backward.pop(task, None))
            while len(_of_backward) > _MOST:
                _of_backward.pop(next(iter(_of_backward)), None)
        _of_backward[task][number] = scopes

    for operation in last:
        operation.register_prehook(begin)
