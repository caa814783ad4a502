"""Measure a command's time and peak memory: ``python -m regraft.demo.steps.measure REPORT CMD...``.

It is a process of its own, and a small one, for a reason: the system starts a child's peak memory
at what its parent held, so a process with a model loaded cannot measure a child that has none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from regraft.system.memory import wait_and_measure


def measure(command: list[str], report: Path) -> int:
    """Run ``command``, write seconds and peak memory (bytes) to ``report``, return its exit code.

    A command that a signal ended counts as exit code 128 plus the signal, as in a shell.
    """
    start = time.perf_counter()
    child = subprocess.Popen(command)
    code, peak = wait_and_measure(child)
    figures = {"seconds": time.perf_counter() - start, "peak_memory": peak}
    report.write_text(json.dumps(figures), encoding="utf-8")
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(measure(sys.argv[2:], Path(sys.argv[1])))
