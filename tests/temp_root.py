"""A folder for the temporary files of one run of the tests, which no other run looks into.

pytest's own, /tmp/pytest-of-USER, is shared: each run removes what older ones left there, and runs
side by side wait for each other, or for a folder that is being removed, without end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from regraft.system.locks import OpenFolder
from regraft.system.memory import available_memory
from regraft.system.owners import is_own

PREFIX = "regraft-tests-"

_IN_MEMORY = Path("/dev/shm")
_AMPLE = 8 * 2**30


def place_of_files() -> Path:
    """Return where the folders of runs go: into memory where there is ample room, else the disk.

    The programs that tests start flush what they write, and half of the time would be spent on
    that. Tests that are about the disk take :func:`on_disk`. ``TMPDIR`` decides where it is set.
    """
    disk = Path(tempfile.gettempdir())
    if "TMPDIR" in os.environ or not os.access(_IN_MEMORY, os.W_OK):
        return disk
    ample = min(shutil.disk_usage(_IN_MEMORY).free, (available_memory() or 0) // 2) >= _AMPLE
    return _IN_MEMORY if ample else disk


@contextmanager
def on_disk() -> Iterator[Path]:
    """Lend a folder that lies where the system keeps temporary files, for tests of the disk."""
    root = TempRoot(Path(tempfile.gettempdir()))
    try:
        yield root.path
    finally:
        root.remove()


class TempRoot:
    """A folder that is this run's as long as it is locked; the lock ends with the process.

    Attributes:
        path: the folder.
    """

    def __init__(self, parent: Path) -> None:
        """Make it, locked before it has a name that another run might take for a left-over."""
        new = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
        self._folder = _locked(new)
        self.path = new
        with suppress(PermissionError):  # Windows, where a file in it is what is locked
            self.path = new.rename(parent / new.name.removeprefix("."))

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._folder is not None:
            self._folder.close()
            self._folder = None
            shutil.rmtree(self.path, ignore_errors=True)


def remove_left_over(parent: Path) -> list[Path]:
    """Remove the folders of runs that were killed; return them. Others' are left alone."""
    found = []
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if not is_own(path.stat()) or (folder := _locked(path)) is None:
                continue
            folder.remove(as_far_as_can_be=True)
            found.append(path)
    return found


def _locked(folder: Path) -> OpenFolder | None:
    """Return a folder, open and locked; None if another process has its lock."""
    opened = OpenFolder(folder)
    if opened.lock():
        return opened
    opened.close()
    return None
