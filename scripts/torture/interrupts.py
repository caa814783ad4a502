"""Interrupt what a live model's handle does at every step, and see what is left of it.

    python -m torture.interrupts [--every N] [--signals N] [--seed N] [--json]

``KeyboardInterrupt`` is raised at the first, second, third ... step at which the interpreter would
hear a signal, of merging, un-merging, loading, choosing, deleting, detaching and so on, with and
without a cache. Then real signals come at random moments, one at a time. After each of them: what
the handle says is in the weights is in them bit for bit, the model answers as it has to, no lock is
held, no scope is open, no adapter is leased by nobody, and every call works.

It ends with 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2] / "tests"


def main() -> int:
    """Interrupt everything, and print what came of it."""
    options = _options()
    sys.path.insert(0, str(TESTS))
    started = time.perf_counter()
    rows = [row for cached in (False, True) for row in run(options, cached)]
    result = {
        "points": sum(row["points"] for row in rows),
        "signals": sum(row["signals"] for row in rows),
        "wrong": [each for row in rows for each in row["wrong"]],
        "operations": rows,
        "seconds": round(time.perf_counter() - started),
    }
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 1 if result["wrong"] else 0


def run(options: argparse.Namespace, cached: bool) -> list[dict[str, Any]]:
    """Interrupt each operation; return for each what was done and what was wrong."""
    import torch

    torch.set_num_threads(1)
    tests, chance = import_module("runtime.interrupts"), random.Random(options.seed)
    rows = []
    for operation in tests.OPERATIONS:
        with tempfile.TemporaryDirectory(prefix="regraft-interrupts-") as folder:
            world = tests.World(Path(folder), cached=cached)
            points, wrong = tests.at_every_point(world, operation, options.every)
            signals = 0
            if not wrong:
                signals, wrong = tests.at_random(world, operation, options.signals, chance)
        name = f"{operation.name}, {'with' if cached else 'without'} a cache"
        rows.append({"operation": name, "points": points, "signals": signals, "wrong": wrong})
    return rows


def _table(result: dict[str, Any]) -> str:
    rows = result["operations"]
    lines = [f"{r['operation']}: {r['points']} points, {r['signals']} signals" for r in rows]
    lines += [f"wrong: {each}" for each in result["wrong"]]
    total = f"{result['points']:,} points, {result['signals']:,} signals"
    return "\n".join([*lines, f"{total}, {len(result['wrong'])} wrong, {result['seconds']} s"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Interrupt a live model's handle at every step.")
    parser.add_argument("--every", type=int, default=1, help="take only every N-th step")
    parser.add_argument("--signals", type=int, default=200, help="real signals for each operation")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of signals")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
