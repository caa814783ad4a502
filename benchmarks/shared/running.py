"""A run of measurements: where it works, what it says, what it is held against."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.shared.machine import ROOT

SCALE = 4
"""How many times the layers a model has that memory is measured on a second time."""


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


def work_folder(chosen: Path | None) -> tuple[Path, bool]:
    """Return the folder to work in, and whether it was made for this run alone."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        return chosen, False
    parent = ROOT / ".bench"
    parent.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="run-", dir=parent)), True


def clean(work: Path, ours: bool, more: Sequence[str] = ()) -> None:
    """Remove what was measured; of a folder that was here before, only what a run puts there."""
    for name in ("out", "merged", "numba", "tiny", "70b", "scale1", f"scale{SCALE}", *more):
        shutil.rmtree(work / name, ignore_errors=True)
    if ours:
        shutil.rmtree(work, ignore_errors=True)
        if not any(work.parent.iterdir()):
            work.parent.rmdir()


def versions() -> dict[str, str]:
    """Return the versions of the peers."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    return {"peers": ", ".join(f"{name} {version(name)}" for name in names)}
