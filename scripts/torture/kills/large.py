"""Kills at random moments of a large merge."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import regraft
from torture.kills.cases import kept_tensors
from torture.kills.digests import state, tree
from torture.kills.inputs import write_adapter, write_base
from torture.kills.sharing import say

LARGE = [sys.executable, "-m", "regraft", "merge", "base", "adapter", "-o", "out", "-q"]


def large(work: Path, size: int, count: int) -> dict[str, Any]:
    """Kill the command line at random moments of a large merge, each time from the start.

    Of every five kills one is followed by a second, before the merge is let finish.
    """
    write_large_inputs(work, size)
    inputs = state(work)
    seconds = min(timed_large(work) for _ in range(2))
    reference = tree(work / "out")
    shutil.rmtree(work / "out")
    draw, found, again = random.Random(5), Counter[str](), list[float]()
    while found["kills"] < count:
        if not kill_large(work, draw.uniform(0.4, seconds)):
            seconds *= 0.95  # it was done already: that is no kill
            found["too late"] += 1
            shutil.rmtree(work / "out")
            continue
        found["kills"] += 1
        found["torn"] += (work / "out").exists() and tree(work / "out") != reference
        found["tensors kept"] += kept_tensors(work)
        if found["kills"] % 5 == 0 and kill_large(work, draw.uniform(0.4, seconds)):
            found["killed twice"] += 1
        if not (work / "out").exists():
            again.append(timed_large(work))
        found["identical"] += tree(work / "out") == reference
        shutil.rmtree(work / "out")
        regraft.clean(work)
        found["left over"] += len(list(work.glob(".*")))
        say(f"{found['kills']} of {count} kills at random moments")
    found["inputs changed"] += state(work) != inputs
    found["bytes"] = sum(path.stat().st_size for path in (work / "base").iterdir())
    names = ("torn", "left over", "inputs changed", "too late", "killed twice")
    found.update(dict.fromkeys(names, 0))
    return {**found, "seconds_undisturbed": seconds, "seconds_to_go_on": again}


def write_large_inputs(work: Path, size: int) -> None:
    """Write a base of a size and an adapter for it."""
    rows, columns = 2048, 4096
    block = np.random.default_rng(3).normal(size=(rows, columns)).astype(ml_dtypes.bfloat16)
    tensors = max(size // block.nbytes, 4)
    weights = {f"layers.{n}.weight": np.roll(block, n, axis=1) for n in range(tensors)}
    write_base(work / "base", weights, 4)
    write_adapter(work / "adapter", weights, "layers.3.weight", 1, rank=16)


def timed_large(work: Path) -> float:
    """Run the large merge to its end, from the start if it was at its end; return the seconds."""
    if (work / "out").exists():
        shutil.rmtree(work / "out")
    began = time.perf_counter()
    subprocess.run(LARGE, check=True, cwd=work)
    return round(time.perf_counter() - began, 2)


def kill_large(work: Path, after: float) -> bool:
    """Start the large merge and kill it after some seconds; return False if it was done by then."""
    process = subprocess.Popen(LARGE, cwd=work)
    time.sleep(after)
    process.kill()
    return process.wait() == -signal.SIGKILL
