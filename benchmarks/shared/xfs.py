"""A file system that shares blocks (reflinks): XFS in a file with holes, on a loop device.

Making one asks for root, a loop device and xfsprogs. What is in the way is said, not worked around.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOOLS = ("mkfs.xfs", "losetup", "mount", "umount")


class NoXfsError(RuntimeError):
    """There is no XFS to be had here; the message says why."""


@contextmanager
def xfs(folder: Path, size: int) -> Iterator[Path]:
    """Make an XFS in a file of a folder; give the folder that it is mounted at.

    Args:
        folder: where the file goes; it grows with what is written, up to ``size`` bytes.
        size: bytes that the file system takes itself to have.

    Raises:
        NoXfsError: something that this takes is not there.
    """
    image, place = folder / "xfs.image", folder / "xfs"
    _check_tools()
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    place.mkdir(exist_ok=True)
    try:
        _run("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
        with _loop_device(image) as device:
            _run("mount", "-o", "discard", device, str(place))
            try:
                yield place
            finally:
                os.sync()
                subprocess.run(["umount", str(place)], check=True)
    finally:
        image.unlink(missing_ok=True)
        place.rmdir()


@contextmanager
def _loop_device(image: Path) -> Iterator[str]:
    """Give a loop device of a file, which is read and written past the page cache."""
    device = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def _check_tools() -> None:
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        raise NoXfsError(f"there is no {lacking[0]} here (xfsprogs, util-linux)")
    if os.geteuid():
        raise NoXfsError("mounting asks for root")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoXfsError(f"{command[0]}: {done.stderr.strip() or 'failed'}")
    return done.stdout.strip()


def free_bytes(place: Path) -> int:
    """Return the bytes that are free, once the file system has let go of what was removed."""
    found = _free_now(place)
    while True:
        time.sleep(0.5)
        again = _free_now(place)
        if again == found:
            return found
        found = again


def _free_now(place: Path) -> int:
    """Return the bytes that are free on a file system, once all that was written is on its disk."""
    fd = os.open(place, os.O_RDONLY)
    try:
        os.sync()
        found = os.fstatvfs(fd)
    finally:
        os.close(fd)
    return found.f_bfree * found.f_frsize
