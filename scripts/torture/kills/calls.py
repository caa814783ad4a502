"""Faults at every call of the system, and power that is lost after one."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from torture.kills.cases import READS, WRITES, Bench, Tally, conclude
from torture.kills.running import Setting, run

FAULTS = {"kill": "signal=KILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}
"""What strace does at a call."""


def every_call(bench: Bench, share: int, shares: int, commands: Sequence[str]) -> dict[str, Tally]:
    """Have every call fail, in every way; one of several shares of all cases."""
    tallies: dict[str, Tally] = {}
    number = 0
    for setting in (Setting(c, inline) for inline in (True, False) for c in commands):
        counts = bench.counts(setting)
        for fault, kind in FAULTS.items():
            calls = WRITES if fault != "EIO" else WRITES + READS
            tally = tallies.setdefault(f"{setting.name}, {fault}", Tally())
            for name in calls:
                for k in range(1, counts.get(name, 0) + 1):
                    number += 1
                    if number % shares == share:
                        tally.add(one_call(bench, setting, f"{name}:{kind}:when={k}", number))
    return tallies


def one_call(bench: Bench, setting: Setting, fault: str, number: int) -> Tally:
    """Run one case; one whose call never came does not count."""
    case = bench.fresh(f"{number}", setting.command)
    log = case.with_suffix(".trace")
    name = fault.partition(":")[0]
    code = run(setting, case, "-e", f"trace={name}", "-e", f"inject={fault}", "-o", str(log))
    happened = code == -signal.SIGKILL or "(INJECTED)" in log.read_text()
    log.unlink()
    if not happened:
        shutil.rmtree(case)
        return Tally()
    return conclude(bench, setting, case, code, f"{setting.name} {fault}")


def power_loss(bench: Bench, share: int, shares: int, commands: Sequence[str], count: int,
               ) -> dict[str, Tally]:  # fmt: skip
    """Kill at random calls, then lose blocks of what was written but not flushed."""
    tallies: dict[str, Tally] = {}
    draw = random.Random(1000 + share)
    number = 0
    for command in commands:
        setting = Setting(command, inline=True)
        counts = bench.counts(setting)
        tally = tallies.setdefault(command, Tally())
        for _ in range(count):
            number += 1
            if number % shares != share:
                continue
            case = bench.fresh(f"p{number}", command)
            name = draw.choice([name for name in ("pwrite64", "write", "fsync") if name in counts])
            fault = f"{name}:signal=KILL:when={draw.randint(1, counts[name])}"
            code = run(setting, case, "-e", f"trace={name}", "-e", f"inject={fault}", "-o",
                       "/dev/null")  # fmt: skip
            lose(case / ".out.regraft", draw)
            tally.add(conclude(bench, setting, case, code, f"power loss {command} {fault}"))
    return tallies


def lose(folder: Path, draw: random.Random) -> None:
    """Zero, cut off or garble files below a folder, as a disk may that lost power."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        what = draw.choice(["nothing", "nothing", "zeros", "cut", "garbage", "gone"])
        block = draw.randrange(size // 512 + 1) * 512
        with path.open("r+b") as file:
            if what == "cut":
                file.truncate(block)
            elif what in ("zeros", "garbage") and block < size:
                file.seek(block)
                length = min(512 * draw.randint(1, 16), size - block)
                file.write(bytes(length) if what == "zeros" else draw.randbytes(length))
        if what == "gone":
            path.unlink()
