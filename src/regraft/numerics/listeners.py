"""Who wants to know that kernels are being compiled, which takes seconds and happens once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CompilerSettingsError(RuntimeError):
    """Variables of the environment keep numba from compiling; the message names them."""


_listeners: list[Callable[[], None]] = []


@contextmanager
def while_compiling(listener: Callable[[], None]) -> Iterator[None]:
    """Have a function called before each kernel that is compiled, by whatever thread does so."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell_compiling() -> None:
    """Call whoever listens."""
    for listener in list(_listeners):
        listener()
