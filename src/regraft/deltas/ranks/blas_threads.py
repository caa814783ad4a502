"""One thread for numpy's library of linear algebra, where many small matrices are factored.

With several it waits for all of them at every column, which takes longer than the column. On a busy
machine that is twenty times slower, and more.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

_NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads",
          "openblas_{}_num_threads64_", "openblas_{}_num_threads")  # fmt: skip

_lock = threading.Lock()
"""Held while the number of threads and the list of those inside change together."""

_inside: list[int] = []
"""The number of threads there was before each of those who are inside."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let the OpenBLAS of numpy's wheels use one thread; to other libraries nothing is done.

    It holds for the whole process, until the last one that is inside leaves.
    """
    calls = _calls()
    if calls is None:
        yield
        return
    get, put = calls
    with _lock:
        _inside.append(get())
        put(1)
    try:
        yield
    finally:
        with _lock:
            before = _inside.pop()  # the first to come in noted what there was
            put(before if not _inside else 1)


@cache
def _calls() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer] | None:
    """Return OpenBLAS's functions that tell and set its number of threads, if it is there."""
    for path in sorted((Path(np.__file__).parents[1] / "numpy.libs").glob("*openblas*")):
        library = ctypes.CDLL(str(path))
        for name in _NAMES:
            if hasattr(library, name.format("set")) and hasattr(library, name.format("get")):
                return library[name.format("get")], library[name.format("set")]
    return None
