"""numba's ``njit`` with a cache that may be damaged, and then is made anew.

numba keeps what it compiled in files, which it unpickles and runs as they are: one that was cut
short ends every run, and one with a wrong bit runs wrong code. Here each has a digest in front. A
file without the right one is not read; the function is compiled, and the file written again. Where
no folder can be written, functions are compiled in each process.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

_MARK = b"regraft1"
_DIGEST_BYTES = 16
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
        _say(f"What numba compiles cannot be kept, so each run compiles anew: {error}")


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
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever numba's parts raise of what they find
            _say(f"What numba compiled earlier is compiled again: {_told(error)}")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except (OSError, pickle.PickleError) as error:
            _say(f"What numba compiles cannot be kept, so each run compiles anew: {_told(error)}")


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """The index and data files, each behind a digest of itself."""

    def _load_index(self) -> dict[Any, str]:
        try:
            found = self._load(self._index_path)
        except (OSError, ValueError) as error:
            _say(f"What numba compiled earlier is compiled again: {_told(error)}")
            return {}
        if found is None or found[0] != (self._version, self._source_stamp):
            return {}
        names: dict[Any, str] = found[1]
        return names

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._save(self._index_path, ((self._version, self._source_stamp), overloads))

    def _load_data(self, name: str) -> Any:
        try:
            return self._load(self._data_path(name))
        except ValueError as error:
            _say(f"What numba compiled earlier is compiled again: {_told(error)}")
            return None

    def _save_data(self, name: str, data: Any) -> None:
        self._save(self._data_path(name), data)

    def _save(self, path: str, value: Any) -> None:
        content = self._dump(value)
        with self._open_for_write(path) as file:
            file.write(_MARK + _digest(content) + content)

    def _load(self, path: str) -> Any:
        """Return what a file holds; None where there is none, or one of numba's own.

        Raises:
            ValueError: it is damaged.
            OSError: it cannot be read.
        """
        try:
            raw = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        if raw.startswith(b"\x80"):  # as numba writes it: a pickle
            return None
        start = len(_MARK) + _DIGEST_BYTES
        if raw[:start] != _MARK + _digest(raw[start:]):
            raise ValueError(f"{path} is damaged")
        return pickle.loads(raw[start:])


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _told(error: BaseException) -> str:
    return f"{error}" if isinstance(error, (ValueError, OSError)) else type(error).__name__
