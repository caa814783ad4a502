"""Run the fast tests with a tracer, and say of each room how many of its modules they call.

    PYTHONPATH=scripts python -m tiers [--calls FILE]

Compiled kernels cannot be traced; the functions that call them can. The exit code is 1 if the tests
fail, or if there is a room that they do not call. It takes some three times as long as the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import regraft
from tiers.rooms import files_called, rooms_of, shares, table

ROOT = Path(__file__).resolve().parents[2]
FAST = "not slow and not further"
"""What ``make test-fast`` chooses."""


def traced(calls: Path) -> int:
    """Run the fast tests and have their calls written; return pytest's exit code."""
    paths = [str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {"PYTHONPATH": os.pathsep.join(paths), "MUTANTS_CALLS": str(calls)}
    command = ["-m", "pytest", "-q", "-p", "mutants.tracing", "-m", FAST, "tests"]
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | given).returncode


def main() -> int:
    """Trace the tests, or take what was traced, and print the table."""
    parser = argparse.ArgumentParser(description="Which rooms do the fast tests call?")
    parser.add_argument("--calls", type=Path, help="what an earlier run has traced")
    given: Path | None = parser.parse_args().calls
    with tempfile.TemporaryDirectory() as folder:
        calls = given or Path(folder) / "calls.json"
        code = 0 if given else traced(calls)
        if not calls.exists():
            return code
        called = files_called(json.loads(calls.read_text(encoding="utf-8")))
    found = shares(rooms_of(Path(regraft.__file__).parent), called)
    print(table(found))
    return code or int(any(some == 0 for some, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
