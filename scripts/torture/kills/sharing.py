"""Cases in several processes, and what came of them in words."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture.kills.cases import Bench, Tally
from torture.kills.inputs import write_json
from torture.kills.running import wait_for


def say(line: str) -> None:
    """Tell how far it has come."""
    print(line, file=sys.stderr, flush=True)


Share = Callable[[Bench, int, int], dict[str, Tally]]


def in_shares(folder: Path, work: Share, jobs: int) -> dict[str, Tally]:
    """Do cases in several processes that each have inputs of their own; return all tallies."""
    pids, totals = [], dict[str, Tally]()
    for share in range(jobs):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                place = folder / f"share-{share}"
                place.mkdir(parents=True)
                found = {k: vars(t) for k, t in work(Bench(place), share, jobs).items()}
                write_json(folder / f"share-{share}.json", found)
                status = 0
            finally:
                traceback.print_exc() if status else None
                os._exit(status)
        pids.append(pid)
    codes = [wait_for(pid) for pid in pids]
    if any(codes):
        sys.exit("a share of the cases could not be done")
    for share in range(jobs):
        for name, numbers in json.loads((folder / f"share-{share}.json").read_text()).items():
            totals.setdefault(name, Tally()).add(Tally(**numbers))
    return totals


def report(title: str, tallies: dict[str, Tally]) -> dict[str, Any]:
    """Print tallies and return them as JSON."""
    say(f"\n{title}")
    for name, tally in tallies.items():
        wrong = tally.wrong or []
        say(
            f"  {name:38} {tally.points:5} points, {len(wrong)} wrong; whole already {tally.whole},"
            f" tensors kept {tally.kept}"
        )
        for line in wrong[:20]:
            say(f"    {line}")
    total = sum(tally.points for tally in tallies.values())
    failed = sum(len(tally.wrong or []) for tally in tallies.values())
    say(f"  in all {total} points, {failed} wrong")
    return {"points": total, "wrong": failed, "cases": {n: vars(t) for n, t in tallies.items()}}
