"""Measurements of the disk: what a merge writes where blocks are shared, and how fast a disk is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.merge.measure import copy_command
from benchmarks.shared.models import (
    Model,
    make_model,
    merge_command,
    once,
    regraft,
    remove,
    warm_cache,
)
from benchmarks.shared.process import Sample, measured
from benchmarks.shared.xfs import free_bytes, xfs

RAW_WRITE = Path(__file__).resolve().parents[1] / "shared" / "raw_write.py"
DISK_BYTES = 20 * 10**9
"""What the file system takes itself to have; the file grows with what is written."""

OLD_ENOUGH = 62
"""Seconds after which digests of a file that others have written are kept."""


@dataclass(frozen=True)
class Raw:
    """Merges and raw writes of as many bytes, taken in turns."""

    writes: list[Sample]
    merges: list[Sample]


def measure_raw(model: Model, work: Path, count: int) -> Raw:
    """Measure merges, and writes of as many bytes straight to the disk; the order alternates."""
    out, found = work / "out", Raw([], [])
    write = [sys.executable, str(RAW_WRITE), str(work / "raw"), str(model.nbytes)]
    jobs = [(write, found.writes), (merge_command(model, out), found.merges)]
    for number in range(count):
        for command, samples in jobs if number % 2 == 0 else reversed(jobs):
            samples.append(once(command, model, out))
            (work / "raw").unlink(missing_ok=True)
            os.sync()
    return found


@dataclass
class Shared:
    """Work on a file system that shares blocks, in turns with copies that share none.

    Attributes:
        copies: ``cp -r --reflink=never`` and a sync.
        samples: the work by its name, round by round.
        disk: the bytes of the disk that each round of it took.
        changed: bytes of the tensors that the adapter changes.
        nbytes: bytes of the base.
    """

    copies: list[Sample] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    disk: dict[str, list[int]] = field(default_factory=dict)
    changed: int = 0
    nbytes: int = 0


def measure_shared(work: Path, count: int, shape: Sequence[str] = ()) -> Shared:
    """Measure an adapter on q and v (r=8) on an XFS: merge, un-merge and swap.

    Raises:
        NoXfsError: no such file system can be made here.
    """
    with xfs(work, DISK_BYTES) as place:
        targets = ("--rank", "8", "--targets", "q_proj", "v_proj")
        model = make_model(place / "qv", *shape, *targets)
        laid = time.monotonic()
        found = Shared(changed=_changed(model, place), nbytes=model.nbytes)
        _rounds(found, model, place, count, {"REGRAFT_CACHE": ""}, "")
        env = {"REGRAFT_CACHE": str(place / "cache")}
        time.sleep(max(0.0, laid + OLD_ENOUGH - time.monotonic()))
        measured(regraft("digest", model.base), env)
        _rounds(found, model, place, count, env, ", digests known", "--digest-cache")
        return found


def _changed(model: Model, place: Path) -> int:
    """Return the bytes of the tensors that the adapter changes, by the plan of a merge."""
    command = [*merge_command(model, place / "out"), "--dry-run", "--json"]
    plan = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return sum(step["bytes"] for step in plan["steps"] if step["action"] == "merge")


def _rounds(
    found: Shared, model: Model, place: Path, count: int, env: dict[str, str], name: str,
    *options: str,
) -> None:  # fmt: skip
    """Measure rounds of a copy, a merge, and what takes the merge back and over."""
    merged, out = place / "merged", place / "out"
    more = (*options, "--reflink", "always")
    copy = [word.replace("cp -r", "cp -r --reflink=never") for word in copy_command(model, out)]
    half = f"{model.adapter}=0.5"
    for _ in range(count):
        found.copies.append(once(copy, model, out, env))
        for verb, command, there in (
            ("merge", [*merge_command(model, merged), *more], merged),
            ("un-merge", regraft("unmerge", merged, "-o", out, *more), out),
            ("swap", regraft("swap", merged, half, "-o", out, *more), out),
        ):
            remove(there)
            warm_cache(model if verb == "merge" else Model(merged))
            before = free_bytes(place)
            sample = measured(command, env)
            found.samples.setdefault(verb + name, []).append(sample)
            found.disk.setdefault(verb + name, []).append(before - free_bytes(place))
        shutil.rmtree(out)
        remove(merged)
