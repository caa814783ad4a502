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
import weakref
from collections.abc import Iterable, Mapping
from contextvars import ContextVar, Token
from types import MappingProxyType
from typing import Any

import torch

from regraft.errors import UsageError
from regraft.runtime.forward.answer import Answer

Scopes = Mapping[int, Any]
"""Selections by the key of their handle; None stands for no adapter.

Under the key ``_LINK`` there is the innermost scope, with the scopes that it was opened in.
"""

_LINK = 0

_NONE: Scopes = MappingProxyType({})
_scopes: ContextVar[Scopes] = ContextVar("regraft_scopes", default=_NONE)
_mirror = threading.local()
_of_backward: dict[int, dict[int, Scopes]] = {}
"""By backward pass, then by the number of the last operation of each forward pass."""

_MOST = 256
"""So many backward passes are remembered: those that fail do not say that they have ended."""

_closed_elsewhere: dict[int, None] = {}
"""Scopes by their ids that ended in another thread or task than they began in."""

UNSET = object()
"""What :func:`find` returns where no scope says anything."""


def find(key: int) -> Any:
    """Return the selection that the scopes here have for a handle, or :data:`UNSET`."""
    if torch.compiler.is_compiling():
        scopes = getattr(_mirror, "scopes", None)
        return UNSET if scopes is None else scopes.get(key, UNSET)
    seldom = _of_backward or _closed_elsewhere
    return (current() if seldom else _scopes.get()).get(key, UNSET)


def current() -> Scopes:
    """Return the scopes of this thread or task; in a backward pass those of its forward pass."""
    if _of_backward:
        found = _of_backward.get(torch._C._current_graph_task_id())
        if found is not None:
            return _of_operation(found, torch._C._current_autograd_node())
    if _closed_elsewhere:
        return _open_only(_scopes.get())
    return _scopes.get()


def _of_operation(passes: Mapping[int, Scopes], operation: Any) -> Scopes:
    """Return the scopes of the forward pass that an operation is from.

    Autograd numbers operations as they are recorded, so it is the first pass that ends after it.
    """
    number = operation._sequence_nr() if operation is not None else 0
    return passes[min((last for last in passes if last >= number), default=max(passes))]


class _Mark:
    """A scope, as the context variable has it.

    Attributes:
        key, selection: what answers for which handle.
    """

    __slots__ = ("__weakref__", "key", "selection")

    def __init__(self, key: int, selection: Answer | None) -> None:
        self.key, self.selection = key, selection


class scope:  # noqa: N801 - it is used as a function
    """Lets a selection answer for a handle, in this thread or task, until the block ends.

    Blocks may end in another order than they began, where generators take turns in one thread:
    each then takes away its own selection and no other one. One that ends while a later one is
    open on the same handle says so, because it has not answered since.
    """

    __slots__ = ("_mark", "_opened", "_rest", "_token")

    def __init__(self, key: int, selection: Answer | None, opened: set[Any] | None = None) -> None:
        """Make a scope that is not open yet.

        Args:
            key: the handle's number.
            selection: what is to answer.
            opened: where it is noted that a scope is open.
        """
        self._mark, self._opened = _Mark(key, selection), opened
        self._token: Token[Scopes] | None = None
        self._rest: Scopes | None = None

    def __enter__(self) -> None:
        mark, outer = self._mark, _scopes.get()
        inner = {**outer, mark.key: mark.selection, _LINK: (mark, outer)}
        try:
            if self._opened is not None:
                self._opened.add(mark)
            self._token = _scopes.set(inner)
            _mirror.scopes = inner
        except BaseException:
            self._close()
            raise

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        now = _scopes.get()
        try:
            self._close()
        except BaseException:  # an interrupt: what is closed already stays so
            self._close()
            raise
        if now.get(_LINK, (None,))[0] is not self._mark:
            _check_order(now, self._mark, error)

    def __del__(self) -> None:
        """Close what an interrupt has left open, at the moment in which its block was left."""
        if getattr(self, "_token", None) is not None:  # it may not even have been made
            self._close()

    def _close(self) -> None:
        """Let go of the selection; a second time does nothing."""
        mark, token = self._mark, self._token
        if self._rest is None:
            self._rest = _without(_scopes.get(), mark)
        try:
            if token is not None:
                _scopes.reset(token)
        except ValueError:  # it was opened in another thread or task
            _close_elsewhere(mark)
        except RuntimeError:  # this was interrupted before
            pass
        _scopes.set(self._rest)
        _mirror.scopes = self._rest or None
        self._token = None
        if self._opened is not None:
            self._opened.discard(mark)


def _without(scopes: Scopes, mark: _Mark) -> Scopes:
    """Return the scopes without one of them; scopes that were opened inside it stay."""
    above = []
    while (link := scopes.get(_LINK)) is not None and link[0] is not mark:
        above.append(link[0])
        scopes = link[1]
    found = scopes if link is None else link[1]
    for each in reversed(above):
        found = {**found, each.key: each.selection, _LINK: (each, found)}
    return found


def _close_elsewhere(mark: _Mark) -> None:
    """Let a scope be over in the thread or task in which it was opened, too."""
    _closed_elsewhere[id(mark)] = None
    weakref.finalize(mark, _closed_elsewhere.pop, id(mark), None)


def _open_only(scopes: Scopes) -> Scopes:
    """Return scopes without those that were closed in other threads or tasks."""
    above, link = [], scopes.get(_LINK)
    while link is not None:
        if id(link[0]) not in _closed_elsewhere:
            above.append(link[0])
        link = link[1].get(_LINK)
    return {mark.key: mark.selection for mark in reversed(above)}


def _check_order(scopes: Scopes, mark: _Mark, error: BaseException | None) -> None:
    """Refuse to close a scope while another, opened inside it on the same handle, is open.

    Raises:
        UsageError: it does. If an error ends the scope, it gets a note instead.
    """
    above, link = [], scopes.get(_LINK)
    while link is not None and link[0] is not mark:
        above += [link[0]] if link[0].key == mark.key else []
        link = link[1].get(_LINK)
    if link is None or not above:
        return
    problem = UsageError(
        "a scope ended while another one was open that began after it, in the same thread",
        where=_shown(mark), expected="the inner one ends first",
        found=f"{_shown(above[0])} is open, and has answered for both",
        hint="Generators that take turns share the scopes of their thread: run each in a thread or "
        "asyncio task of its own, or open a scope around each step instead of around a yield",
    )  # fmt: skip
    if error is None:
        raise problem
    error.add_note(str(problem))


def _shown(mark: _Mark) -> str:
    """Return what a scope answers with, as messages name it."""
    if mark.selection is None:
        return "the scope of no adapter"
    return mark.selection.scope_name()


def in_task() -> bool:
    """Whether this is inside an asyncio task."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no loop is running
        return False


@torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
def refresh_mirror() -> None:
    """Let compiled code see the scopes of the task that runs now."""
    _mirror.scopes = current() or None


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
