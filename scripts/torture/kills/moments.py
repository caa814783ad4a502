"""Signals at random moments."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from torture.kills.cases import Bench, Tally, conclude
from torture.kills.running import Setting, run, start, wait_for

SIGNALS = {"SIGINT": 1, "SIGTERM": 1, "SIGKILL": 3}
"""What is sent, and how many times, each time to the command run again."""


def signals(bench: Bench, share: int, shares: int, commands: Sequence[str], count: int,
            ) -> dict[str, Tally]:  # fmt: skip
    """Interrupt at random moments: by Ctrl-C, by SIGTERM, and several times in a row by SIGKILL."""
    tallies: dict[str, Tally] = {}
    draw = random.Random(share)
    for command in commands:
        setting = Setting(command, inline=False)
        seconds = min(timed(bench, setting, f"timed-{share}") for _ in range(3))
        for name, times in SIGNALS.items():
            tally = tallies.setdefault(f"{command}, {name} {times}x", Tally())
            for number in range(share, count, shares):
                case = bench.fresh(f"{command}-{name}-{number}", command)
                code = send(bench, setting, case, signal.Signals[name], seconds, draw)
                for _ in range(times - 1):
                    moment = draw.uniform(0, seconds)
                    code = run_and_send(setting, case, signal.Signals[name], moment)
                tally.add(conclude(bench, setting, case, code, f"{command} {name} {number}"))
    return tallies


def send(bench: Bench, setting: Setting, case: Path, sent: signal.Signals, seconds: float,
         draw: random.Random) -> int:  # fmt: skip
    """Run a command and send it a signal, over again if it was done before that came."""
    while not (code := run_and_send(setting, case, sent, draw.uniform(0, seconds))):
        shutil.rmtree(case)
        bench.fresh(case.name, setting.command)
    return code


def timed(bench: Bench, setting: Setting, name: str) -> float:
    """Return how long a run takes."""
    case = bench.fresh(name, setting.command)
    began = time.perf_counter()
    run(setting, case)
    seconds = time.perf_counter() - began
    shutil.rmtree(case)
    return seconds


def run_and_send(setting: Setting, case: Path, sent: signal.Signals, after: float) -> int:
    """Run a command and send it a signal after some seconds; return its exit code."""
    pid = start(setting, case)
    os.kill(pid, signal.SIGUSR1)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sent)
    return wait_for(pid)
