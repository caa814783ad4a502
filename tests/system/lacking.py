"""Taking away from a process what some systems do not have, before regraft is imported.

:data:`FACILITIES` has a function for each; :func:`take_away` calls those that are named. Nothing
comes back: use a process of its own.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def _without(module: Any, *names: str) -> None:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)


def _fcntl() -> None:
    sys.modules["fcntl"] = None  # type: ignore[assignment]


def _resource() -> None:
    sys.modules["resource"] = None  # type: ignore[assignment]


def _proc() -> None:
    """Let nothing below /proc be opened or found."""

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc"):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
            return real(path, *rest, **more)

        return call

    for module, name in ((os, "open"), (os, "stat"), (os, "lstat"), (io, "open")):
        setattr(module, name, refusing(getattr(module, name)))


def _kernel_renames() -> None:
    """Have a C library without renameat2, as one that stands for the process."""
    real = ctypes.CDLL

    class Old(real):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            if name == "renameat2":
                raise AttributeError(name)
            return super().__getattr__(name)

    ctypes.CDLL = Old  # type: ignore[misc]


def _c_library() -> None:
    """Have no library that stands for the process, as Windows has none."""
    real = ctypes.CDLL

    def load(name: Any, *rest: Any, **more: Any) -> Any:
        if name is None:
            raise TypeError("expected str, bytes or os.PathLike object, not NoneType")
        return real(name, *rest, **more)

    ctypes.CDLL = load  # type: ignore[assignment, misc]


def _links() -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.symlink = os.link = refuse


def _positioned() -> None:
    _without(os, "pread", "preadv", "pwrite", "pwritev")


def _owners() -> None:
    _without(os, "geteuid", "getuid", "getegid", "getgid", "fchmod", "chown", "fchown", "lchown")


def _folders_cannot_be_opened() -> None:
    """Refuse to open folders, as Windows does, and have no flag for it."""
    _without(os, "O_DIRECTORY")
    os.supports_dir_fd.clear()
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    real = os.open

    def opened(path: Any, *rest: Any, **more: Any) -> int:
        if isinstance(path, str | os.PathLike) and Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return real(path, *rest, **more)

    os.open = opened


def _open_files_stay() -> None:
    """Refuse to rename or remove what this process has open, and to rename over what is there.

    So does Windows, where folders with an open file in them are not renamed either.
    """
    names, readlink = os.listdir, os.readlink

    def held(path: Any) -> bool:
        place = os.path.realpath(path)
        for number in names("/proc/self/fd"):
            try:
                target = readlink(f"/proc/self/fd/{number}")
            except OSError:
                continue
            if target == place or target.startswith(f"{place}/"):
                return True
        return False

    def guarded(real: Callable[..., Any], *, over: bool) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if held(path) or (rest and held(rest[0])):
                raise PermissionError(errno.EACCES, "used by another process", os.fspath(path))
            if not over and rest and os.path.lexists(rest[0]):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(rest[0]))
            return real(path, *rest, **more)

        return call

    for name in ("unlink", "remove", "rmdir", "replace"):
        setattr(os, name, guarded(getattr(os, name), over=True))
    os.rename = guarded(os.rename, over=False)
    os.supports_dir_fd.clear()
    shutil._use_fd_functions = False  # type: ignore[attr-defined]


def _case() -> None:
    """Take names that differ in case alone for the same, as macOS and Windows do."""
    listdir = os.listdir

    def there(path: Any) -> Any:
        """Return a path by the names that are there already."""
        if not isinstance(path, str | os.PathLike) or "regraft-case" not in os.fspath(path):
            return path
        whole = os.path.abspath(os.fspath(path))
        at = "/"
        for part in whole.split("/")[1:]:
            if not os.path.isdir.__wrapped__(at):  # type: ignore[attr-defined]
                return path
            known = {name.casefold(): name for name in listdir(at)}
            at = os.path.join(at, known.get(part.casefold(), part))
        return at

    def folding(real: Callable[..., Any], paths: int) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            return real(*map(there, arguments[:paths]), *arguments[paths:], **more)

        call.__wrapped__ = real  # type: ignore[attr-defined]
        return call

    real_stat = os.stat
    isdir = lambda path: _is_dir(real_stat, path)  # noqa: E731
    os.path.isdir.__dict__  # noqa: B018
    wrapped = lambda path: isdir(there(path))  # noqa: E731
    wrapped.__wrapped__ = isdir  # type: ignore[attr-defined]
    os.path.isdir = wrapped
    for name, paths in (("open", 1), ("stat", 1), ("lstat", 1), ("mkdir", 1), ("unlink", 1),
                        ("remove", 1), ("rmdir", 1), ("listdir", 1), ("scandir", 1),
                        ("rename", 2), ("replace", 2), ("chmod", 1)):  # fmt: skip
        setattr(os, name, folding(getattr(os, name), paths))
    io.open = folding(io.open, 1)


def _is_dir(stat: Callable[..., os.stat_result], path: Any) -> bool:
    try:
        return (stat(path).st_mode & 0o170000) == 0o040000
    except OSError:
        return False


def _slow() -> None:
    """Have a file system that is slow and gives and takes little at a time, as one on a network."""

    def late(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            time.sleep(0.0005)
            return real(*arguments, **more)

        return call

    pread, preadv, pwrite, write = os.pread, os.preadv, os.pwrite, os.write
    os.pread = lambda fd, length, at: late(pread)(fd, min(length, 700), at)
    os.preadv = lambda fd, views, at: late(preadv)(fd, [views[0][:700]], at)
    os.pwrite = lambda fd, data, at: late(pwrite)(fd, data[:700], at)
    os.write = lambda fd, data: write(fd, data[:700])
    for name in ("open", "fsync", "rename", "unlink", "mkdir", "stat"):
        setattr(os, name, late(getattr(os, name)))


def _clock() -> None:
    _without(time, "clock_gettime_ns", "clock_gettime")


FACILITIES: dict[str, Callable[[], None]] = {
    "links": _links,
    "fcntl": _fcntl,
    "resource": _resource,
    "clock": _clock,
    "positioned reads and writes": _positioned,
    "direct i/o": lambda: _without(os, "O_DIRECT"),
    "preallocation": lambda: _without(os, "posix_fallocate", "posix_fadvise"),
    "temporary files without names": lambda: _without(os, "O_TMPFILE"),
    "opening without following": lambda: _without(os, "O_NOFOLLOW"),
    "opening without waiting": lambda: _without(os, "O_NONBLOCK"),
    "closing for children": lambda: _without(os, "O_CLOEXEC"),
    "owners and modes": _owners,
    "exchange": _kernel_renames,
    "a c library": _c_library,
    "wait4": lambda: _without(os, "wait4", "waitid"),
    "folders that can be opened": _folders_cannot_be_opened,
    "removal of what is open": _open_files_stay,
    "proc": _proc,
}
"""What can be taken away, in an order in which all of it can be."""

STAND_INS = {"names that differ in case": _case, "a quick disk": _slow}
"""File systems of another kind, each by itself."""


def take_away(names: Iterable[str]) -> None:
    """Take facilities away from this process."""
    for name in names:
        (FACILITIES | STAND_INS)[name]()
