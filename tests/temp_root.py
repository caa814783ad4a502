"""A folder for the temporary files of one run of the tests, which no other run looks into.

pytest's own, /tmp/pytest-of-USER, is shared: each run removes what older ones left there, and runs
side by side wait for each other, or for a folder that is being removed, without end.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from regraft.system.locks import OpenFolder
from regraft.system.owners import is_own

PREFIX = "regraft-tests-"


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
