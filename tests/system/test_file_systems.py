"""The whole life of a model on other file systems, each in a file that is mounted.

Mounting asks for root, a loop device, and a kernel and tools that know the file system; where one
of these is not there, the test says so and is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from system.test_lacking import Lives, lives, usual

__all__ = ["lives", "usual"]

SIZE = 256 * 2**20
MAKE = {
    "FAT": ["mkfs.vfat"],
    "ext4 that folds case": ["mkfs.ext4", "-q", "-O", "casefold"],
}
"""FAT has no links, owners, modes or holes, dates by two seconds, and folds case."""


def run(*command: str | Path) -> None:
    """Run a command; skip the test if it cannot be run, or fails."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} failed here: {done.stderr.strip().splitlines()[:1]}")


@pytest.fixture(params=MAKE)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder of another file system."""
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(SIZE)
    mounted.mkdir()
    run(*MAKE[request.param], image)
    run("mount", "-o", "loop", image, mounted)
    try:
        folder = mounted / "folder"
        folder.mkdir()
        if "folds" in request.param:
            run("chattr", "+F", folder)
        (folder / "probe").touch()
        assert (folder / "PROBE").exists()
        (folder / "probe").unlink()
        yield folder / "place"
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_every_verb_gives_the_same_bytes_on(place: Path, request: pytest.FixtureRequest) -> None:
    lives: Lives = request.getfixturevalue("lives")  # which takes a while, and is asked for last
    assert lives(place, []) == request.getfixturevalue("usual")
