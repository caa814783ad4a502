"""Measure what survives of an adapter in a GGUF file; write docs/benchmarks-gguf.md.

    python -m benchmarks.gguf --llama-cpp FOLDER [--small] [--json] [--work DIR] [--page PAGE]

FOLDER has what ``python -m benchmarks.gguf.build FOLDER`` makes. The model is
SmolLM2-135M-Instruct, the adapters are trained on the demo's task. It takes up to an hour, 6 GB of
memory and 12 GB of disk. A missed target is reported, and is no error.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch is imported: its threads spin while they wait, which hurts on a busy machine.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch

from benchmarks.gguf import figures, measure, models
from benchmarks.gguf.build import PACKAGE, VERSION
from benchmarks.gguf.models import Base, Family, Sizes
from benchmarks.gguf.names import THREADS
from benchmarks.qlora.figures import Measured, measured
from benchmarks.qlora.measure import Texts, divergence, texts, tokenizer_of
from benchmarks.shared import page
from benchmarks.shared.machine import ROOT, describe
from benchmarks.shared.running import say, versions, work_folder
from regraft.demo.quiet import quiet_libraries

PAGE = ROOT / "docs" / "benchmarks-gguf.md"
SMALL = Sizes(steps=(2,), seeds=(0,), sentences=2)
ROUNDS = 3


def rows_of(family: Family, asked: Texts, tools: Path, work: Path) -> list[Measured]:
    """Measure every model of a family against the first."""
    exact, rows = None, []
    for each in family.candidates:
        say(f"{figures.title(family)}: {each.group}")
        seen = measure.seen(tools, each.path, asked, work)
        exact = exact or seen
        row = measured(each.group, seen, exact)
        rows.append(row.with_receipt(each.survived, each.noise, None, None))
    return rows


def floor(base: Base, asked: Texts, tools: Path, work: Path) -> float:
    """Return what computing from codes adds: the KL of a base and its values in F16."""
    values, codes = (measure.seen(tools, path, asked, work) for path in (base.values, base.path))
    return divergence(values.task, codes.task)


def speeds(work: Path, tools: Path, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Time merges in a process of its own, which stays small."""
    out, found = work / "speeds.json", list[dict[str, Any]]()
    command = [sys.executable, "-m", "benchmarks.gguf.speed", str(work), str(tools), str(out)]
    for more in (["--steps", str(steps)], ["--large"]):
        subprocess.run([*command, "--rounds", str(rounds), *more], check=True, cwd=ROOT)
        found += json.loads(out.read_text())
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what survives in a GGUF file.")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of its programs")
    parser.add_argument("--small", action="store_true", help="little of everything, and no page")
    parser.add_argument("--json", action="store_true", help="print everything as JSON on stdout")
    parser.add_argument("--work", type=Path, help="folder for the models (a fresh one in .bench)")
    parser.add_argument("--page", type=Path, help=f"page to write (docs/{PAGE.name}; small: none)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"pairs of merges ({ROUNDS})")
    parser.add_argument("--steps", type=int, nargs="*", help="of training, an adapter for each")
    options = parser.parse_args(arguments)
    options.page = options.page or (None if options.small else PAGE)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    work, ours = work_folder(options.work)
    started, load = time.perf_counter(), os.getloadavg()[0]
    sizes = SMALL if options.small else Sizes()
    if options.steps:
        sizes = Sizes(tuple(options.steps), sizes.seeds, sizes.sentences)
    try:
        with quiet_libraries():
            torch.set_num_threads(int(THREADS))
            found = _run(work.resolve(), options.llama_cpp.resolve(), sizes, options.rounds)
        facts = {"it took": f"{time.perf_counter() - started:.0f} s",
                 "load before it began": f"{load:.1f}"}  # fmt: skip
        _finish(found, options, describe(work) | versions() | facts)
    finally:
        if ours:
            shutil.rmtree(work, ignore_errors=True)
    return 0


def _run(work: Path, tools: Path, sizes: Sizes, rounds: int) -> figures.Found:
    bases = models.bases(work, tools)
    asked = texts(tokenizer_of(bases[0].plain), sizes.sentences)
    families = [
        models.family(base, steps, work, tools, sizes) for base in bases for steps in sizes.steps
    ]
    tables = [(family, rows_of(family, asked, tools, work)) for family in families]
    floors = {base.type: floor(base, asked, tools, work) for base in bases}
    timed = speeds(work, tools, sizes.steps[0], rounds)
    return figures.Found(tables, floors, timed, asked)


def _finish(found: figures.Found, options: argparse.Namespace, machine: dict[str, str]) -> None:
    machine |= {"llama.cpp": f"that of {PACKAGE} {VERSION}, for this processor, 2 threads"}
    more = ["--small"] if options.small else []
    if options.steps:
        more += ["--steps", *map(str, options.steps)]
    command = shlex.join(["python", "-m", "benchmarks.gguf", "--llama-cpp", "FOLDER", *more])
    content = figures.section(found, machine, command)
    if options.page:
        page.write_page(options.page, content, figures.INTRODUCTION)
    if options.json:
        rows = {figures.title(f): [asdict(row) for row in rows] for f, rows in found.tables}
        print(json.dumps({"machine": machine, "rows": rows, "speeds": list(found.speeds)}))
    else:
        print(content)


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
