"""File systems of other kinds, each in a file that is mounted.

Mounting asks for root, a loop device, and a kernel and tools that know the file system; where one
of these is not there, the test says so and is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


def run(*command: str | Path) -> None:
    """Run a command; skip the test if it cannot be run, or fails."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} failed here: {done.stderr.strip().splitlines()[:1]}")


@contextmanager
def mounted(make: Sequence[str], folder: Path, size: int) -> Iterator[Path]:
    """Make a file system of a size in bytes in a file of a folder; give where it is mounted."""
    image, place = folder / "image", folder / "mounted"
    with image.open("wb") as file:
        file.truncate(size)
    place.mkdir()
    run(*make, image)
    run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
