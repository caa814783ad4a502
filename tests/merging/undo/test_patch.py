"""An undo patch that the system does not let begin."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import AccessError, DiskSpaceError
from regraft.merging.undo.patch import PatchWriter


def test_a_patch_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=os.strerror(errno.EISDIR)) as caught:
        PatchWriter(tmp_path, ["weight"])
    assert caught.value.problems[0].where == str(tmp_path)


class Full:
    """A file on a disk that is full."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        """Do as the file does, but for what takes room."""
        return getattr(self._file, name)

    def truncate(self, _: int) -> None:
        """Take no room."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_patch_that_there_is_no_room_for_is_refused_and_not_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, opened = tmp_path / "patch", os.fdopen, list[Any]()

    def fdopen(*arguments: Any, **options: Any) -> Full:
        opened.append(real(*arguments, **options))
        return Full(opened[-1])

    monkeypatch.setattr(os, "fdopen", fdopen)
    with pytest.raises(DiskSpaceError) as caught:
        PatchWriter(path, ["weight"])
    assert caught.value.problems[0].where == str(path)
    assert opened[0].closed
