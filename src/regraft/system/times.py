"""How the system dates and numbers files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

_LINUX_COARSE = 5  # CLOCK_REALTIME_COARSE: what changes of files are dated by; elsewhere another
_NEAR = 10**9
_STEP = 20 * 10**6
"""The longest step in which systems date changes whose clock cannot be asked: Windows' 15.6 ms."""

_WITHOUT_INODES = ("fuse", "vfat", "msdos", "exfat")
"""How the kinds of file systems begin that number their files as they come."""


def now_of_files() -> int:
    """Return the time, in ns, that a change of a file would have now, or up to a step earlier."""
    coarse = _coarse()
    return time.time_ns() - _STEP if coarse is None else coarse


def step_of_files() -> float:
    """Return how long to wait for that clock to go on, in seconds; some waits may be needed."""
    return 0.001 if _coarse() is not None else 0.005


def _coarse() -> int | None:
    """Return the clock of Linux that dates files; None where its number is another clock's."""
    if not hasattr(time, "clock_gettime_ns"):
        return None
    try:
        coarse: int = time.clock_gettime_ns(_LINUX_COARSE)
    except OSError:
        return None
    return coarse if abs(coarse - time.time_ns()) < _NEAR else None


def changed_ns(found: os.stat_result) -> int:
    """Return when content or attributes of a file were changed last, in ns.

    Where files have Windows' attributes, ``st_ctime`` is when they were made.
    """
    if hasattr(found, "st_file_attributes"):
        return max(found.st_ctime_ns, found.st_mtime_ns)
    return found.st_ctime_ns


_DATED = ("ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs")
"""File systems that date a change whoever makes it and however: through a mapping, too. Those in
memory do not, and images that are made to be alike have the same dates."""


def dates_changes(device: int) -> bool:
    """Whether a file of a device that has the number, size and times it had is what it was; not,
    where the system does not say what the device is."""
    kinds = kinds_of(device, _mounts() or "")
    return bool(kinds) and kinds <= {*_DATED}


def boot() -> str:
    """Return what tells this start of the system from others; "" where nothing does.

    After a power cut a file may have new bytes and old times.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _mounts() -> str | None:
    """Return what is mounted here; None where the system does not say."""
    try:
        return Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return None


def has_inodes(device: int, mounts: str | None = None) -> bool:
    """Whether files of a device keep their inode's number for as long as nobody replaces them.

    Those of FUSE (rclone, gcsfuse, sshfs) and FAT can get another one once the kernel forgets them.

    Args:
        device: ``st_dev`` of a file.
        mounts: what ``/proc/self/mountinfo`` says, by default now; without it they are taken to.
    """
    mounts = _mounts() if mounts is None else mounts
    if mounts is None:
        return True
    return not any(kind.startswith(_WITHOUT_INODES) for kind in kinds_of(device, mounts))


def kinds_of(device: int, mounts: str) -> set[str]:
    """Return the kinds of file system that a device is, by ``/proc/self/mountinfo``."""
    system: Any = os  # which has these wherever there is such a file
    number = f"{system.major(device)}:{system.minor(device)}"
    lines = (line.partition(" - ") for line in mounts.splitlines())
    return {rest.split()[0] for mount, _, rest in lines if mount.split()[2:3] == [number] and rest}
