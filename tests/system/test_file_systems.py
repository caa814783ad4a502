"""The whole life of a model on other file systems, each in a file that is mounted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mounting import mounted, run
from system.test_lacking import Lives, lives, usual

__all__ = ["lives", "usual"]

SIZE = 256 * 2**20
MAKE = {
    "FAT": ["mkfs.vfat"],
    "ext4 that folds case": ["mkfs.ext4", "-q", "-O", "casefold"],
}
"""FAT has no links, owners, modes or holes, dates by two seconds, and folds case."""


@pytest.fixture(params=MAKE)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder of another file system."""
    with mounted(MAKE[request.param], tmp_path, SIZE) as there:
        folder = there / "folder"
        folder.mkdir()
        if "folds" in request.param:
            run("chattr", "+F", folder)
        (folder / "probe").touch()
        assert (folder / "PROBE").exists()
        (folder / "probe").unlink()
        yield folder / "place"


def test_every_verb_gives_the_same_bytes_on(place: Path, request: pytest.FixtureRequest) -> None:
    lives: Lives = request.getfixturevalue("lives")  # which takes a while, and is asked for last
    assert lives(place, []) == request.getfixturevalue("usual")
