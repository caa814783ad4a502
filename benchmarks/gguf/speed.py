"""Time merges into GGUF against llama.cpp's export-lora and quantize.

    python -m benchmarks.gguf.speed WORK TOOLS OUT.json [--large] [--rounds N]

WORK has ``TYPE.gguf`` and the adapters of :mod:`benchmarks.gguf.models`. With ``--large`` it is a
larger model of random weights, which is made beside them. It is a process of its own, as whoever
measures has to stay small.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gguf.names import LARGE, SMALL, THREADS, TYPES
from benchmarks.shared import models
from benchmarks.shared.models import make_model, regraft
from benchmarks.shared.process import Sample, measured
from benchmarks.shared.running import say

SHAPE = "half-smollm2-1.7b"


@dataclass(frozen=True)
class Job:
    """A base, and an adapter in PEFT's form and in llama.cpp's."""

    model: str
    type: str
    base: Path
    adapter: Path
    converted: Path


def small_jobs(work: Path, steps: int) -> list[Job]:
    """Return merges of the adapters that were trained."""
    return [
        _job(SMALL, kind, work / f"{kind}.gguf", work / f"{kind}-{steps}" / "adapter-fields",
             work / f"{kind}-plain")
        for kind in TYPES
    ]  # fmt: skip


def large_jobs(work: Path, tools: Path) -> list[Job]:
    """Return merges into a model of random weights, made where it is not there yet."""
    large = make_model(work / "large", "--shape", SHAPE, "--rank", "16")
    plain = work / "large.gguf"
    if not plain.exists():
        measured(regraft("export", large.base, "-o", plain, "--type", "f16",
                         "--like", work / "f16.gguf"))  # fmt: skip
    found = []
    for kind in TYPES:
        base = work / f"large-{kind}.gguf"
        if not base.exists():
            measured([str(tools / "llama-quantize"), str(plain), str(base), kind, THREADS])
        found.append(_job(LARGE, kind, base, large.adapter, large.base))
    return found


def _job(model: str, kind: str, base: Path, adapter: Path, plain: Path) -> Job:
    out = base.with_name(f"{base.stem}-adapter")
    if not out.exists():
        measured(regraft("convert", adapter, "-o", out, "--to", "gguf", "--base", plain))
    return Job(model, kind, base, adapter, next(out.glob("*.gguf")))


def ours(job: Job, out: Path) -> Sample:
    """Merge with regraft."""
    return measured(regraft("merge", job.base, job.adapter, "-o", out))


def theirs(job: Job, tools: Path, out: Path) -> list[Sample]:
    """Merge with llama.cpp: into F16, and that into the base's type."""
    merged = out.with_name(f"f16-{out.name}")
    first = [str(tools / "llama-export-lora"), "-m", str(job.base), "--lora", str(job.converted),
             "-o", str(merged), "-t", THREADS]  # fmt: skip
    second = [str(tools / "llama-quantize"), str(merged), str(out), job.type, THREADS]
    found = [measured(first), measured(second)]
    merged.unlink()
    return found


def rounds(job: Job, tools: Path, work: Path, count: int) -> dict[str, object]:
    """Run both in turns; which one goes first alternates."""
    mine, peers = [], []
    for number in range(count):
        say(f"{job.model}, {job.type}, round {number + 1} of {count}")
        for turn in (number % 2, (number + 1) % 2):
            out = work / f"out-{job.base.stem}.gguf"
            if turn:
                peers.append([asdict(each) for each in theirs(job, tools, out)])
            else:
                mine.append(asdict(ours(job, out)))
            out.unlink()
            models.remove(Path(f"{out}.regraft"))
    return {"model": job.model, "type": job.type, "regraft": mine, "llama.cpp": peers}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time merges into GGUF.")
    parser.add_argument("work", type=Path)
    parser.add_argument("tools", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of the small model's adapter")
    parser.add_argument("--large", action="store_true", help="the larger model")
    options = parser.parse_args(arguments)
    work, tools = options.work.resolve(), options.tools.resolve()
    jobs = large_jobs(work, tools) if options.large else small_jobs(work, options.steps)
    found = []
    for job in jobs:
        found.append(rounds(job, tools, work, options.rounds))
        options.out.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
