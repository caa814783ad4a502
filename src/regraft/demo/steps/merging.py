"""Merge through the public command line, in a process of its own; and copy, to compare with."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft import errors
from regraft.errors import Problem, RegraftError
from regraft.system.syncing import sync_folder, sync_path


@dataclass(frozen=True)
class Measured:
    """What a command answered and took.

    Attributes:
        answer: the JSON object on its stdout.
        seconds: wall time of the process, start-up included.
        peak_memory: its largest resident memory in bytes.
    """

    answer: Mapping[str, Any]
    seconds: float
    peak_memory: int


def run_merge(base: Path, adapter: Path, out: Path, *options: str) -> Measured:
    """Run ``regraft merge`` and measure it.

    Args:
        base: a checkpoint.
        adapter: a PEFT adapter.
        out: the folder to make, or to make anew.
        options: more of the command's options.

    Raises:
        RegraftError: the merge failed; the error is the one the command reported.
    """
    regraft = [sys.executable, "-m", "regraft"]
    arguments = [str(base), str(adapter), "-o", str(out), "--overwrite", "--json", *options]
    return run_measured([*regraft, "merge", *arguments])


def run_unmerge(merged: Path, out: Path) -> Measured:
    """Run ``regraft unmerge`` and measure it.

    Raises:
        RegraftError: it failed; the error is the one the command reported.
    """
    regraft = [sys.executable, "-m", "regraft"]
    return run_measured([*regraft, "unmerge", str(merged), "-o", str(out), "--overwrite", "--json"])


def same_files(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names = [{str(p.relative_to(f)) for p in f.rglob("*")} for f in (folder, other)]
    return names[0] == names[1] and all(
        filecmp.cmp(folder / name, other / name, shallow=False)
        for name in names[0]
        if (folder / name).is_file()
    )


def run_measured(command: list[str]) -> Measured:
    """Run a command that prints a JSON object, and measure the process."""
    with tempfile.TemporaryDirectory(prefix="regraft-demo-") as scratch:
        report = Path(scratch) / "measured.json"
        launcher = [sys.executable, "-m", "regraft.demo.steps.measure", str(report)]
        done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise _failure(done)
        return Measured(json.loads(done.stdout), **json.loads(report.read_text(encoding="utf-8")))


def _failure(done: subprocess.CompletedProcess[str]) -> RegraftError:
    """Return the error that a failed command reported as JSON, or else its last words."""
    try:
        reported = json.loads(done.stdout)["error"]
        problems = [Problem(**problem) for problem in reported["problems"]]
        kind = getattr(errors, reported["type"], RegraftError)
    except (ValueError, KeyError, TypeError):
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return RegraftError("the command failed", where="regraft", found=words[-1])
    error: RegraftError = kind(problems)
    return error


def time_copy(folder: Path, scratch: Path) -> float:
    """Return the seconds that a plain copy of ``folder`` to disk takes; the copy is removed."""
    shutil.rmtree(scratch, ignore_errors=True)
    start = time.perf_counter()
    shutil.copytree(folder, scratch)
    for file in scratch.rglob("*"):
        (sync_folder if file.is_dir() else sync_path)(file)
    taken = time.perf_counter() - start
    shutil.rmtree(scratch)
    return taken
