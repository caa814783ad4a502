"""What a benchmark ran on: processor, memory, disk, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def describe(work: Path) -> dict[str, str]:
    """Return what a reader has to know to judge the figures; ``work`` is where the files lay."""
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores at hand",
        "instruction set": instruction_set(),
        "memory": f"{_field('/proc/meminfo', 'MemTotal', 1024) / 2**30:.0f} GiB",
        "disk": f"{_filesystem(work)} on {_disk_model(work)}",
        "system": f"Linux {_kernel()}, Python {platform.python_version()}",
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


SETS = (
    ("avx512", ("avx512f",)), ("avx2", ("avx2",)), ("avx", ("avx",)),
    ("sse4", ("sse4.2", "sse4_2")), ("neon", ("asimd", "neon")),
)  # fmt: skip
"""The widest instructions first, and what LLVM or the kernel calls them."""


def instruction_set() -> str:
    """Return the widest vector instructions that compiled loops may use, and what narrows them.

    ``NUMBA_CPU_NAME`` is the processor that numba compiles for, ``NUMBA_CPU_FEATURES`` what it has
    (``+avx2,+fma``); without them it is this machine's.
    """
    name, said = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if name is None and said is None:
        return _widest(_flags())
    features = {word[1:] for word in (said or "").split(",") if word.startswith("+")}
    found = _widest(features) if said is not None else "what that has"
    return f"{found} (narrowed: NUMBA_CPU_NAME={name or ''}, NUMBA_CPU_FEATURES={said or ''})"


def _widest(features: set[str]) -> str:
    return next((name for name, told in SETS if features & {*told}), "the oldest of its kind")


def _flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def commit() -> str:
    """Return the short commit, and whether the sources differ from it."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}, with changes on top" if changed else name


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _field(path: str, name: str, unit: int) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * unit
    return 0


def _filesystem(path: Path) -> str:
    """Return the type of the file system a path lies in: the mount point with the longest name."""
    place = path.resolve()
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind = line.split()[:3]
        if place.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def _disk_model(path: Path) -> str:
    """Return what the kernel knows of the disk behind a path."""
    number = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    for folder in (block, block.parent):
        if (folder / "queue").is_dir():
            spins = (folder / "queue/rotational").read_text().strip() == "1"
            kind = "a virtual disk" if folder.name.startswith("vd") else f"disk {folder.name}"
            return f"{kind}, {'rotating' if spins else 'not rotating'}"
    return "an unknown disk"


def _kernel() -> str:
    """Return the kernel's version without what a distributor adds to it."""
    return platform.release().partition("-")[0]
