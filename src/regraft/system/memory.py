"""The memory of a process and of the machine, as the system counts it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes per unit of ``ru_maxrss``, which nothing but the system's name tells."""


def peak_memory() -> int:
    """Return the largest resident memory this process has had, in bytes; 0 if nobody says.

    On Linux from ``VmHWM``: ``getrusage`` there begins a child's count at its parent's size.
    """
    with contextlib.suppress(OSError):  # no such file, or it cannot be read
        if kilobytes := _figure("/proc/self/status", "VmHWM:"):
            return kilobytes * 1024
    with contextlib.suppress(ImportError):
        resource = import_module("resource")
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * _RSS_UNIT
    return _peak_of_handle(-1)


def resident_memory() -> int:
    """Return the resident memory of this process, in bytes; 0 if the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    return 0


def available_memory() -> int | None:
    """Return the memory that programs may still take, in bytes; None if the system does not say."""
    try:
        kilobytes = _figure("/proc/meminfo", "MemAvailable:")
    except OSError:
        return None
    return None if kilobytes is None else kilobytes * 1024


def _figure(path: str, name: str) -> int | None:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return None


def wait_and_measure(child: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for a child; return its exit code, less than 0 of a signal, and its peak memory.

    The memory is the largest that was resident, in bytes; 0 if nobody says.
    """
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        return child.returncode, usage.ru_maxrss * _RSS_UNIT
    code = child.wait()
    return code, _peak_of_handle(int(getattr(child, "_handle", 0)))


def _peak_of_handle(process: int) -> int:
    """Return the largest resident memory of a process of Windows, in bytes; elsewhere 0.

    Args:
        process: its handle; -1 for this one.
    """
    windows = getattr(ctypes, "WinDLL", None)
    if windows is None:
        return 0
    counters = _Counters(cb=ctypes.sizeof(_Counters))
    call = windows("kernel32").K32GetProcessMemoryInfo
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
    done = call(ctypes.c_void_p(process), ctypes.byref(counters), counters.cb)
    return int(counters.peak) if done else 0


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of psapi.h."""

    _fields_ = (
        ("cb", ctypes.c_uint32), ("faults", ctypes.c_uint32), ("peak", ctypes.c_size_t),
        ("now", ctypes.c_size_t), ("pools", ctypes.c_size_t * 6),
    )  # fmt: skip


def large_pages(size: int) -> Any:
    """Return a writable buffer in large pages, of zeros; None where the system has none to ask for.

    Args:
        size: its bytes.
    """
    system: Any = mmap
    if not hasattr(system, "MADV_HUGEPAGE"):
        return None
    memory = system.mmap(-1, size, flags=system.MAP_PRIVATE | system.MAP_ANONYMOUS)
    memory.madvise(system.MADV_HUGEPAGE)
    return memory
