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
        "memory": f"{_field('/proc/meminfo', 'MemTotal', 1024) / 2**30:.0f} GiB",
        "disk": f"{_filesystem(work)} on {_disk_model(work)}",
        "system": f"Linux {_kernel()}, Python {platform.python_version()}",
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


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
