"""The memory a process has used, as the system counts it."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Return the largest resident memory this process has had, in bytes.

    On Linux from ``VmHWM``: ``getrusage`` there begins a child's count at its parent's size.
    """
    with contextlib.suppress(OSError):  # no such file, or it cannot be read
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
