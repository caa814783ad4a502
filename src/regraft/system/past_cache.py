"""Writing past the page cache: what is not read back need not push other things out of memory."""

from __future__ import annotations

import contextlib
import errno
import os
from importlib import import_module
from pathlib import Path

from regraft.system.opening import open_past

REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What a file system says that does not write past the cache."""


def open_past_cache(path: Path) -> int | None:
    """Open a file whose writes go past the cache; None where the system or file system has none.

    Linux's ``O_DIRECT`` takes whole blocks at whole blocks of memory and file alone. Of macOS the
    descriptor is told (``F_NOCACHE``).
    """
    flag = getattr(os, "O_DIRECT", None)
    with contextlib.suppress(OSError):  # the file system has no direct I/O: use the cache
        if flag is not None:
            return open_past(path, flag)
        return _told_to_leave_out_the_cache(path)
    return None


def _told_to_leave_out_the_cache(path: Path) -> int | None:
    with contextlib.suppress(ImportError):
        fcntl = import_module("fcntl")
        if hasattr(fcntl, "F_NOCACHE"):
            fd = open_past(path, 0)
            try:
                fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
            except OSError:
                os.close(fd)
                raise
            return fd
    return None
