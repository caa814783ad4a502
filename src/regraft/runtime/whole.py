"""Steps that Ctrl-C does not cut in two.

What a signal's handler raises, Python raises in the main thread, between any two of its
instructions. So what has to be done as a whole is done in another thread, while the main thread
waits. If something is raised there meanwhile, the step is asked to stop: it takes back what it did,
or goes on to its end. Only then is it raised.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Generic, TypeVar, cast

import torch

T = TypeVar("T")

_PATIENCE = 0.1
"""Seconds after which a waiting thread looks up: not every interrupt wakes it."""


class Stopped(BaseException):
    """A step was asked to stop, and has taken back what it did; never seen outside of a step."""


_asked: ContextVar[threading.Event | None] = ContextVar("regraft_asked_to_stop", default=None)


def asked_to_stop() -> Callable[[], bool]:
    """Return what tells any thread whether the step that runs here is asked to stop."""
    event = _asked.get()
    return _never if event is None else event.is_set


def _never() -> bool:
    return False


def whole(work: Callable[[], T]) -> T:
    """Call a function that no signal handler interrupts, and return its result.

    In a thread that is not the main one it is simply done: signals are not heard there.

    Raises:
        BaseException: what ``work`` raises; or, once the step is over, what was raised meanwhile in
            the main thread. It is then either done, or was never begun, or took itself back.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    step = _Step(work)
    try:
        try:
            _thread.start_new_thread(step.run, ())
        except RuntimeError:  # the system grants no more threads
            if step.claim.acquire(blocking=False):
                return work()
        step.wait()
    except BaseException as interrupt:
        if not step.claim.acquire(blocking=False):  # it has begun
            step.ask_and_wait()
            _chain(interrupt, step.error)
        raise
    if step.error is not None:
        try:
            raise step.error
        finally:
            step.error = None  # no cycle: the error's traceback knows this call
    return cast(T, step.result)


def _chain(interrupt: BaseException, error: BaseException | None) -> None:
    """Let an interrupt tell what went wrong in the step that it fell into."""
    if error is not None and not isinstance(error, Stopped) and error is not interrupt:
        interrupt.__context__ = error


class _Step(Generic[T]):
    """Something that another thread does, at most once.

    Attributes:
        claim: whoever takes it decides: the thread begins, or never will.
        is_over: whether it is.
        result, error: what came of it.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._context, self._modes = copy_context(), _modes()
        self._stop = threading.Event()
        # Held until the step is over; ``is_over`` is set before it is let go, so that whoever sees
        # it free, or true, sees ``result`` and ``error`` too.
        self._over = _thread.allocate_lock()
        self._over.acquire()
        # Taken once, never given back: either the thread has it and does the step, or the caller
        # has it and the step is never done.
        self.claim = _thread.allocate_lock()
        self.is_over = False
        self.result: T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do it."""
        if not self.claim.acquire(blocking=False):
            return
        try:
            self.result = self._context.run(self._do)
        except BaseException as error:
            self.error = error
        finally:
            self.is_over = True
            self._over.release()

    def _do(self) -> T:
        _asked.set(self._stop)
        with ExitStack() as stack:
            for mode in self._modes:
                stack.enter_context(mode())
            return self._work()

    def wait(self) -> None:
        """Wait until it is over."""
        while not self.is_over and not self._over.acquire(timeout=_PATIENCE):
            pass

    def ask_and_wait(self) -> None:
        """Ask the step to stop, and wait until it is over, through any number of interrupts."""
        try:
            self._stop.set()
            self.wait()
        except BaseException:
            self.ask_and_wait()


def _modes() -> list[Callable[[], AbstractContextManager[object]]]:
    """Return how torch computes in this thread, for another one to compute likewise."""
    modes: list[Callable[[], AbstractContextManager[object]]] = [
        partial(torch.set_grad_enabled, torch.is_grad_enabled())
    ]
    if torch.is_inference_mode_enabled():
        modes.append(torch.inference_mode)
    if torch.cuda.is_initialized():
        modes.append(partial(torch.cuda.stream, torch.cuda.current_stream()))
    return modes


class Turns:
    """Runs whole steps on one object one after the other, from any threads."""

    def __init__(self) -> None:
        # Held for a whole step; a step may contain others.
        self._lock = threading.RLock()

    def whole(self, work: Callable[[], T]) -> T:
        """Do something as :func:`whole` does, once no other step is under way.

        Raises:
            BaseException: as :func:`whole`.
        """
        return whole(partial(self._in_turn, work))

    def _in_turn(self, work: Callable[[], T]) -> T:
        asked = asked_to_stop()
        while not self._lock.acquire(timeout=_PATIENCE):
            if asked():
                raise Stopped
        try:
            return work()
        finally:
            self._lock.release()
