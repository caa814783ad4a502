"""Running a whole process and measuring it from outside: wall time, CPU time, peak memory.

The kernel counts the memory of the process that starts a child towards the child's peak, so
whoever measures with this must stay small: no numpy, no model, nothing large, ever.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

_UNIT = 512
"""Bytes that the kernel counts as a block of ``ru_inblock`` and ``ru_oublock``."""


@dataclass(frozen=True)
class Sample:
    """One process, from start to end.

    Attributes:
        seconds: wall time.
        cpu_seconds: user and system time of all its threads.
        peak_bytes: largest resident memory, mapped files included.
        read_bytes, written_bytes: what went from and to the disk. What was in memory does not
            count, nor what is flushed by others.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int = 0
    written_bytes: int = 0


class ProcessFailedError(RuntimeError):
    """A measured process ended with an error: its figures would mean nothing."""


def measured(command: Sequence[str], env: Mapping[str, str] | None = None) -> Sample:
    """Run a command to its end and return what it took.

    Raises:
        ProcessFailedError: its exit code is not 0.
    """
    # No run knows what an earlier one has hashed, unless it is asked to.
    environment = {"REGRAFT_CACHE": "", **os.environ, **(env or {})}
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)  # it is gone: nothing left to reap
        if child.returncode:
            raise ProcessFailedError(_failure(command, child.returncode, log))
    return Sample(
        seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024,
        usage.ru_inblock * _UNIT, usage.ru_oublock * _UNIT,
    )  # fmt: skip


def _failure(command: Sequence[str], code: int, log: IO[bytes]) -> str:
    log.seek(0)
    tail = log.read().decode(errors="replace")[-2000:]
    return f"{' '.join(command)} ended with {code}:\n{tail}"
