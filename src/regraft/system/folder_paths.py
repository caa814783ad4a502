"""Paths of folders for libraries that take no name but of UTF-8."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regraft.system.opening import open_folder


@contextmanager
def path_of_utf8(folder: Path) -> Iterator[str]:
    """Give a path to a folder, or to one whose files are moved to it at the end.

    Linux's names may be any bytes; its ``/proc`` has another path to each open folder.

    Raises:
        OSError: the system refused.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        pass
    else:
        yield str(folder)
        return
    fd = open_folder(folder)
    known = Path(f"/proc/self/fd/{fd}")
    try:
        if fd is not None and known.is_dir():
            yield str(known)
            return
        with tempfile.TemporaryDirectory() as place:
            yield place
            for path in Path(place).iterdir():
                shutil.move(path, folder / path.name)
    finally:
        if fd is not None:
            os.close(fd)
