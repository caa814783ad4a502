"""Tests of how files are written run on the disk, where files are really written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from temp_root import on_disk


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a folder on the disk."""
    with on_disk() as folder:
        yield folder
