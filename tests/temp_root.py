"""A folder for the temporary files of one run of the tests, which no other run looks into.

pytest's own, /tmp/pytest-of-USER, is shared: each run removes what older ones left there, and runs
side by side wait for each other, or for a folder that is being removed, without end.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "regraft-tests-"


class TempRoot:
    """A folder that is this run's as long as it is locked; the lock ends with the process.

    Attributes:
        path: the folder.
    """

    def __init__(self, parent: Path) -> None:
        """Make it, locked before it has a name that another run might take for a left-over."""
        new = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
        self._fd = _locked(new)
        self.path = new.rename(parent / new.name.removeprefix("."))

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def remove_left_over(parent: Path) -> list[Path]:
    """Remove the folders of runs that were killed; return them. Others' are left alone."""
    found = []
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if path.stat().st_uid != os.getuid() or (fd := _locked(path)) is None:
                continue
            shutil.rmtree(path, ignore_errors=True)
            os.close(fd)
            found.append(path)
    return found


def _locked(folder: Path) -> int | None:
    """Return a descriptor of a folder that holds its lock; None if another process does."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd
