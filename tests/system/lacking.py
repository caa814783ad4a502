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
import struct
import sys
import tempfile
import time
import types
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
        ours = sys._getframe(1).f_globals["__name__"].startswith("regraft.")
        if name is None and ours:  # others ask for the system's name first
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
    names, readlink, isfile = os.listdir, os.readlink, os.path.isfile

    def held(path: Any) -> bool:
        place = os.path.realpath(path)
        if "lock.owner" in place:  # filelock has another way to take it over on Windows
            return False
        for number in names("/proc/self/fd"):
            try:
                target = readlink(f"/proc/self/fd/{number}")
            except OSError:
                continue
            if isfile(target) and (target == place or target.startswith(f"{place}/")):
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
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # the other is removed while it is open
    os.supports_dir_fd.clear()
    shutil._use_fd_functions = False  # type: ignore[attr-defined]


def _case() -> None:
    """Take names that differ in case alone for the same, as macOS and Windows do."""
    listdir, stat = os.listdir, os.stat

    def there(path: Any) -> Any:
        """Return a path by the names that are there already."""
        if not isinstance(path, str | os.PathLike) or FOLDED not in os.fspath(path):
            return path
        at = "/"
        for part in Path(path).absolute().parts[1:]:
            try:
                known = {name.casefold(): name for name in listdir(at)} if stat(at) else {}
            except OSError:
                known = {}
            at = f"{at.rstrip('/')}/{known.get(part.casefold(), part)}"
        return at

    def folding(real: Callable[..., Any], paths: int) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            return real(*map(there, arguments[:paths]), *arguments[paths:], **more)

        return call

    for name in ("open", "stat", "lstat", "mkdir", "unlink", "remove", "rmdir", "listdir",
                 "scandir", "chmod"):  # fmt: skip
        setattr(os, name, folding(getattr(os, name), 1))
    os.rename, os.replace = folding(os.rename, 2), folding(os.replace, 2)
    io.open = folding(io.open, 1)


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


def _temporary_files() -> None:
    _without(os, "O_TMPFILE")
    tempfile._O_TMPFILE_WORKS = False  # type: ignore[attr-defined]


def _clock() -> None:
    _without(time, "clock_gettime_ns", "clock_gettime")


FOLDED = "folded-names"
"""A part of the paths below which names that differ in case are the same."""


def _macos() -> None:
    """Have macOS's calls in place of Linux's, made of Linux's."""
    import fcntl

    for name in ("direct i/o", "preallocation", "proc", "clock"):
        FACILITIES[name]()
    real, library, fsync = fcntl.fcntl, ctypes.CDLL, os.fsync
    renameat2 = library(None, use_errno=True).renameat2
    called = CALLED

    def control(fd: int, command: int, argument: Any = 0) -> Any:
        if command not in (42, 48, 51):
            return real(fd, command, argument)
        called.add({42: "F_PREALLOCATE", 48: "F_NOCACHE", 51: "F_FULLFSYNC"}[command])
        if command == 42:
            flags, at, offset, length, _ = struct.unpack("=IiqqQ", argument)
            assert (flags, at, offset) == (4, 3, 0)
            assert length > 0
        return fsync(fd) if command == 51 else 0

    class Library(library):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            if name == "renameat2":
                raise AttributeError(name)
            return self._renamed if name == "renamex_np" else super().__getattr__(name)

        @staticmethod
        def _renamed(source: bytes, target: bytes, flags: int) -> int:
            called.add("renamex_np")
            return int(renameat2(-100, source, -100, target, {4: 1, 2: 2}[flags]))

    fcntl.fcntl, ctypes.CDLL = control, Library  # type: ignore[assignment, misc]
    fcntl.F_NOCACHE, fcntl.F_FULLFSYNC = 48, 51  # type: ignore[attr-defined]


CALLED: set[str] = set()
"""Which of macOS's calls were made."""


def _windows() -> None:
    """Lack what Windows lacks, and have its locks, made of Linux's."""
    import subprocess  # noqa: F401  (which goes by msvcrt, too)

    import filelock  # noqa: F401  (which locks with flock)

    for name in FACILITIES:
        FACILITIES[name]()
    sys.modules["msvcrt"] = types.ModuleType("msvcrt")


FACILITIES: dict[str, Callable[[], None]] = {
    "links": _links,
    "fcntl": _fcntl,
    "resource": _resource,
    "clock": _clock,
    "positioned reads and writes": _positioned,
    "direct i/o": lambda: _without(os, "O_DIRECT"),
    "preallocation": lambda: _without(os, "posix_fallocate", "posix_fadvise"),
    "temporary files without names": _temporary_files,
    "opening without following": lambda: _without(os, "O_NOFOLLOW"),
    "opening without waiting": lambda: _without(os, "O_NONBLOCK"),
    "closing for children": lambda: _without(os, "O_CLOEXEC"),
    "owners and modes": _owners,
    "exchange": _kernel_renames,
    "a c library": _c_library,
    "affinity": lambda: _without(os, "sched_getaffinity"),
    "wait4": lambda: _without(os, "wait4", "waitid"),
    "folders that can be opened": _folders_cannot_be_opened,
    "removal of what is open": _open_files_stay,
    "proc": _proc,
}
"""What can be taken away, in an order in which all of it can be."""

STAND_INS: dict[str, Callable[[], None]] = {
    "names that differ in case": _case, "a quick disk": _slow, "all but macOS has": _macos,
    "all but Windows has": _windows,
}  # fmt: skip
"""File systems and systems of another kind, each by itself."""


def take_away(names: Iterable[str]) -> None:
    """Take facilities away from this process."""
    for name in names:
        (FACILITIES | STAND_INS)[name]()
