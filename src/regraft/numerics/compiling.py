"""numba's ``njit`` with a cache that may be damaged, and then is made anew.

numba keeps what it compiled in files, which it unpickles and runs as they are: one that was cut
short ends every run, and one with a wrong bit runs wrong code. Here each has a digest at its end.
A file without the right one is not read; the function is compiled, and the file written again.
Where no folder can be written, functions are compiled in each process.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.numerics.listeners import CompilerSettingsError, tell_compiling

try:
    import numba
    from numba.core.caching import FunctionCache, IndexDataCacheFile
    from numba.core.runtime.nrt import rtsys
except ValueError as refused:  # what a variable of the environment says
    raise CompilerSettingsError(f"numba refuses its settings (NUMBA_...): {refused}") from refused
if numba.config.DISABLE_JIT:
    raise CompilerSettingsError("NUMBA_DISABLE_JIT is set, and nothing can be compiled: unset it")

_MARK = b"regraft2"
_DIGEST_BYTES = 16
_AGAIN = "What numba compiled earlier is compiled again"
_NOT_KEPT = "What numba compiles cannot be kept, so each run compiles anew"
_said: set[str] = set()


class CompileCacheWarning(UserWarning):
    """What was compiled cannot be kept, or was damaged and is compiled again."""


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return numba's decorator; with ``cache=True``, with the cache that is described above."""
    cached = options.pop("cache", False)
    compiled = numba.njit(**options)

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = compiled(function)
        if cached:
            _give_cache(dispatcher)
        return dispatcher

    return decorate


def _give_cache(dispatcher: Any) -> None:
    try:
        dispatcher._cache = _Cache(dispatcher.py_func)
    except (RuntimeError, OSError) as error:  # numba finds no folder that can be written
        _say(f"{_NOT_KEPT}: {error}")


def _say(what: str) -> None:
    """Warn, once in a process: there are dozens of functions."""
    if not _said:
        _said.add(what)
        warnings.warn(what, CompileCacheWarning, stacklevel=2)


class _Cache(FunctionCache):  # type: ignore[misc]
    """A cache of one function, which no file of it can make fail."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _Files(
            cache_path=self._cache_path, filename_base=self._impl.filename_base,
            source_stamp=locator.get_source_stamp(),
        )  # fmt: skip

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = self._load(sig, target_context)
        except Exception as error:  # whatever numba's parts raise of what they find
            _say(f"{_AGAIN}: {type(error).__name__}: {error}")
            found = None
        if found is None:
            tell_compiling()
        return found

    def _load(self, sig: Any, target_context: Any) -> Any:
        """Load as numba does, but without all that only compiling needs, which takes longest.

        numba imports and registers what it knows about every type before it loads a function, and
        again before it compiles one. Machine code is linked with numba's runtime and with C's
        functions only; the latter are known since the context was made.
        """
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _say(f"{_NOT_KEPT}: {error}")


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """The index and data files, each with a digest at its end, which numba passes over."""

    def _load_index(self) -> dict[Any, str]:
        return dict(super()._load_index()) if _is_whole(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        return super()._load_data(name) if _is_whole(self._data_path(name)) else None

    @contextmanager
    def _open_for_write(self, path: str) -> Iterator[Any]:
        with super()._open_for_write(path) as file:
            yield file
            file.flush()
            file.write(_MARK + _digest(path, Path(file.name).read_bytes()))


def _is_whole(path: str) -> bool:
    """Whether a file is there, and as it was written under this name."""
    try:
        raw = _read(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        _say(f"{_AGAIN}: {error}")
        return False
    size = len(_MARK) + _DIGEST_BYTES
    whole = raw[-size:] == _MARK + _digest(path, raw[:-size])
    if not whole:
        _say(f"{_AGAIN}: {path} is damaged, or of an older version")
    return whole


def _read(path: str) -> bytes:
    """Return what a regular file holds, and nothing of another: a pipe is not waited for."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return b""
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _digest(path: str, content: bytes) -> bytes:
    """Return a digest of a file's content and name: each holds the code of one function."""
    named = Path(path).name.encode() + b"\0" + content
    return hashlib.blake2b(named, digest_size=_DIGEST_BYTES).digest()
