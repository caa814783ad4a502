"""Measure what survives of a QLoRA adapter in a 4-bit model; write docs/benchmarks-qlora.md.

    python -m benchmarks.qlora [--small] [--json] [--work DIR] [--page PAGE]

A real model, SmolLM2-135M-Instruct, and adapters trained on the demo's task. It takes less than
ten minutes, 6 GB of memory and as much disk. A missed target is reported, and is no error.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# Before torch is imported: its threads spin while they wait, which hurts on a busy machine.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch

from benchmarks.qlora import figures, measure
from benchmarks.qlora.figures import Measured
from benchmarks.qlora.models import Family, Sizes, on_four_bits, on_sixteen_bits, smollm2
from benchmarks.shared import page
from benchmarks.shared.machine import ROOT, describe
from benchmarks.shared.running import say, versions, work_folder
from regraft.demo.quiet import quiet_libraries

PAGE = ROOT / "docs" / "benchmarks-qlora.md"
SMALL = Sizes(steps=2, seeds=(0,), sentences=2)
THREADS = 2


def measured(family: Family, asked: measure.Texts) -> list[Measured]:
    """Measure every model of a family against its exact merge."""
    exact = measure.seen(measure.plain_model(family.exact), asked)
    rows = [
        figures.measured("the exact merge, float32", exact, exact),
        figures.measured(
            "no adapter", measure.seen(measure.plain_model(family.base), asked), exact
        ),
    ]
    for each in family.candidates:
        say(f"{family.title}: {each.folder.name}")
        measure.four_bit_model(each.folder)  # it loads, whole
        values = measure.dequantized(each.folder)
        found = figures.measured(
            each.group, measure.seen(measure.plain_model(values), asked), exact
        )
        share, noise = each.survived, each.noise
        if share is None or noise is None:
            share, noise = measure.kept(family.base, family.exact, values)
        patch = None if each.undo_bytes is None else each.undo_bytes / _weights(each.folder)
        rows.append(found.with_receipt(share, noise, each.undo_bytes, patch))
        shutil.rmtree(values)
    return rows


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def agreement(folder: Path, asked: measure.Texts) -> figures.Agreement:
    """Compare a model as bitsandbytes computes it with its values in bfloat16 and in float32."""
    few = measure.Texts(asked.task[:4], asked.prose[:1])
    values = measure.dequantized(folder)
    exact = measure.seen(measure.plain_model(values), few)
    plain = measure.seen(measure.plain_model(values).bfloat16(), few)
    theirs = measure.seen(measure.four_bit_model(folder), few)
    shutil.rmtree(values)
    return figures.agreement(exact, plain, theirs)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what survives of a QLoRA adapter.")
    parser.add_argument("--small", action="store_true", help="little of everything, and no page")
    parser.add_argument("--json", action="store_true", help="print everything as JSON on stdout")
    parser.add_argument("--work", type=Path, help="folder for the models (a fresh one in .bench)")
    parser.add_argument("--page", type=Path, help=f"page to write (docs/{PAGE.name}; small: none)")
    options = parser.parse_args(arguments)
    options.page = options.page or (None if options.small else PAGE)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    work, ours = work_folder(options.work)
    started = time.perf_counter()
    try:
        with quiet_libraries():
            torch.set_num_threads(THREADS)
            found = _run(work, SMALL if options.small else Sizes())
        _finish(found, options, work, time.perf_counter() - started)
    finally:
        if ours:
            shutil.rmtree(work, ignore_errors=True)
    return 0


def _run(work: Path, sizes: Sizes) -> figures.Found:
    base = smollm2(work).path
    asked = measure.texts(measure.tokenizer_of(base), sizes.sentences)
    tables, agreed = [], None
    for make in (on_four_bits, on_sixteen_bits):
        say(f"models: {make.__name__.replace('_', ' ')}")
        family = make(base, work, sizes)
        tables.append((family, measured(family, asked)))
        agreed = agreed or agreement(family.candidates[-1].folder, asked)
    assert agreed is not None
    return figures.Found(tables, agreed, asked)


def _finish(found: figures.Found, options: argparse.Namespace, work: Path, seconds: float) -> None:
    machine = describe(work) | versions() | {"it took": f"{seconds:.0f} s"}
    small = ["--small"] if options.small else []
    command = shlex.join(["python", "-m", "benchmarks.qlora", *small])
    content = figures.section(found, machine, command)
    if options.page:
        page.write_page(options.page, content, figures.INTRODUCTION)
    if options.json:
        rows = {family.title: [asdict(row) for row in rows] for family, rows in found.tables}
        print(json.dumps({"machine": machine, "rows": rows}, indent=2))
    else:
        print(content)


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
