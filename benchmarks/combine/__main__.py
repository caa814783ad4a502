"""Measure combining and extracting against PEFT and mergekit; write docs/benchmarks-combine.md.

    python -m benchmarks.combine [--small] [--mergekit PYTHON] [--work DIR] [--page PAGE]

``--mergekit`` names the Python of an environment that has mergekit; without it that row is left
out. Eight adapters of a 7B model's shape, 32 layers, rank 16 on all linear layers, are combined;
PEFT does one layer of that, as all 32 take it hours. It takes some fifteen minutes and 3 GB of
disk. A missed target is reported, and is no error.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from benchmarks.combine.synthetic import RANK, Shape, write_adapters, write_models
from benchmarks.shared import page
from benchmarks.shared.figures import Figure, mib, missing
from benchmarks.shared.machine import ROOT, describe
from benchmarks.shared.process import Sample, measured
from benchmarks.shared.running import say, versions, work_folder

Made = TypeVar("Made")

PAGE = ROOT / "docs" / "benchmarks-combine.md"
ADAPTERS = 8
WHOLE, SMALL = Shape(4096, 11008, 32), Shape(256, 512, 2)
MODEL, SMALL_MODEL = Shape(2048, 5504, 2), Shape(128, 256, 1)
INTRODUCTION = """# Benchmarks of combining and extracting

Eight adapters of a 7B model's shape become one of rank 16, and an adapter comes out of a full
fine-tune, beside what PEFT and mergekit take. The values are random; the sizes are those of real
models.
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure combining and extracting.")
    parser.add_argument("--small", action="store_true", help="little of everything, and no page")
    parser.add_argument("--mergekit", type=Path, help="Python of an environment with mergekit")
    parser.add_argument("--work", type=Path, help="folder to work in (a fresh one in .bench)")
    parser.add_argument("--page", type=Path, help=f"page to write (docs/{PAGE.name}; small: none)")
    options = parser.parse_args(arguments)
    options.page = options.page or (None if options.small else PAGE)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    work, ours = work_folder(options.work)
    try:
        figures = [
            *combining(work, SMALL if options.small else WHOLE),
            *extracting(work, SMALL_MODEL if options.small else MODEL, options.mergekit),
        ]
        small = ["--small"] if options.small else []
        mergekit = ["--mergekit", "PYTHON"] if options.mergekit else []
        command = shlex.join(["python", "-m", "benchmarks.combine", *small, *mergekit])
        content = page.section(figures, describe(work) | versions(), command)
    finally:
        if ours:
            shutil.rmtree(work, ignore_errors=True)
    if options.page:
        page.write_page(options.page, content, INTRODUCTION)
    print(content)
    return 0


def combining(work: Path, shape: Shape) -> list[Figure]:
    """Return the figures of combining."""
    say("adapters")
    adapters = _apart(write_adapters, work / "adapters", shape, ADAPTERS)
    one_layer = Shape(shape.hidden, shape.inner, 1)
    few = _apart(write_adapters, work / "few", one_layer, ADAPTERS)
    say("regraft")
    whole, single = _combined(work, adapters), _combined(work, few)
    say("PEFT")
    seconds = work / "seconds"
    measured([
        sys.executable, str(Path(__file__).parent / "peft_svd.py"), str(shape.hidden),
        str(shape.inner), str(RANK), str(seconds), *map(str, few),
    ])  # fmt: skip
    theirs = float(seconds.read_text())
    each = whole.seconds / shape.layers
    return [
        Figure(f"combine {ADAPTERS} adapters, all {shape.layers} layers, svd to rank {RANK}",
               whole.seconds, f"{whole.seconds:.1f} s", "60 s", whole.seconds <= 60,
               f"CPU {whole.cpu_seconds:.0f} s; one layer by itself {single.seconds:.1f} s"),
        Figure("the same, peak memory", whole.peak_bytes, f"{mib(whole.peak_bytes)} MiB",
               "400 MiB", whole.peak_bytes <= 400 * 2**20, "mapped files included"),
        Figure("against PEFT, a layer", theirs / each, f"{theirs / each:.0f} x", "100 x",
               theirs >= 100 * each,
               f"PEFT {theirs:.1f} s a layer (svd_full_matrices=False), regraft {each:.2f} s"),
    ]  # fmt: skip


def _apart(function: Callable[..., Made], *arguments: object) -> Made:
    """Call a function in a process of its own: the memory of whoever measures counts too."""
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        return apart.submit(function, *arguments).result()


def _combined(work: Path, adapters: Sequence[Path]) -> Sample:
    return measured(_regraft(
        "combine", *map(str, adapters), "-o", str(work / "out"), "--method", "svd", "--rank",
        str(RANK), "--overwrite", "--quiet",
    ))  # fmt: skip


def _regraft(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "regraft", *arguments]


def extracting(work: Path, shape: Shape, mergekit: Path | None) -> list[Figure]:
    """Return the figures of extracting."""
    say("models")
    base, tuned = _apart(write_models, work / "models", shape)
    say("extract")
    out = str(work / "extracted")
    ours = measured(_regraft("extract", str(base), str(tuned), "-o", out, "--rank", "64",
                             "--dtype", "float32", "--overwrite", "--quiet"))  # fmt: skip
    name = f"extract rank 64, {shape.layers} layers of width {shape.hidden}"
    figures = [
        Figure(name, ours.seconds, f"{ours.seconds:.1f} s", "-", None,
               f"CPU {ours.cpu_seconds:.0f} s"),
        Figure("the same, peak memory", ours.peak_bytes, f"{mib(ours.peak_bytes)} MiB", "512 MiB",
               ours.peak_bytes <= 512 * 2**20, "mapped files included"),
    ]  # fmt: skip
    if mergekit is None:
        return [*figures, missing("against mergekit-extract-lora", "10 x", "no environment given")]
    say("mergekit")
    theirs = measured(_mergekit(mergekit, base, tuned, work / "theirs"))
    ratio = theirs.seconds / ours.seconds
    detail = f"{theirs.seconds:.1f} s, {mib(theirs.peak_bytes)} MiB; {_version(mergekit)}"
    return [*figures, Figure("against mergekit-extract-lora", ratio, f"{ratio:.1f} x", "10 x",
                             ratio >= 10, detail)]  # fmt: skip


def _mergekit(python: Path, base: Path, tuned: Path, out: Path) -> list[str]:
    tool = python.with_name("mergekit-extract-lora")
    return [
        str(tool), "--model", str(tuned), "--base-model", str(base), "--out-path", str(out),
        "--max-rank", "64", "--no-lazy-unpickle",
    ]  # fmt: skip


def _version(python: Path) -> str:
    found = subprocess.run(
        [python, "-c", "import importlib.metadata as m; print(m.version('mergekit'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return f"mergekit {found.stdout.strip()}"


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
