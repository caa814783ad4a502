"""Merge into a model of a trillion parameters and write the table of docs/benchmarks-huge.md.

    python -m benchmarks.huge [--format FORMAT] [--layers N] [--json] [--work DIR] [--page PAGE]

It needs root, a loop device and xfsprogs, some 30 GB of free disk (15 GB for FP8 alone) and up to
half an hour. It ends with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.huge import figures
from benchmarks.huge.kimi import FORMATS, Kimi
from benchmarks.huge.measure import Measured, measure, samples_of
from benchmarks.shared import models, page
from benchmarks.shared.figures import Figure
from benchmarks.shared.machine import ROOT, describe
from benchmarks.shared.running import clean, say, work_folder
from benchmarks.shared.xfs import NoXfsError, xfs

PAGE = ROOT / "docs" / "benchmarks-huge.md"
DISK_BYTES = 100 * 10**9
"""What the file system takes itself to have; the file grows with what is written."""

NEEDED = {"fp8": 15 * 10**9, "bf16": 28 * 10**9}
LAYERS = 61


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merge into a model of a trillion parameters.")
    parser.add_argument("--format", choices=FORMATS, help="one format alone")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"layers ({LAYERS})")
    parser.add_argument("--plans", type=int, default=3, help="dry runs (3)")
    parser.add_argument("--json", action="store_true", help="print every sample as JSON on stdout")
    parser.add_argument("--work", type=Path, help="folder for the image (a fresh one in .bench)")
    parser.add_argument("--page", type=Path, help=f"page to write (docs/{PAGE.name}, if whole)")
    options = parser.parse_args(arguments)
    whole = options.layers == LAYERS and options.format is None
    options.page = options.page or (PAGE if whole else None)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    work, ours = work_folder(options.work)
    formats = [options.format] if options.format else list(FORMATS)
    load = os.getloadavg()[0]
    try:
        found = [_measured(work, Kimi(name, options.layers), options.plans) for name in formats]
        machine = describe(work) | {"load before it began": f"{load:.1f}"}
    except NoXfsError as error:
        sys.exit(f"no file system that shares blocks: {error}")
    finally:
        clean(work, ours)
    shown = [figure for each in found for figure in figures.figures_of(each)]
    _finish(shown, found, machine, options)
    return int(any(figure.passed is False for figure in shown))


def _measured(work: Path, kimi: Kimi, plans: int) -> Measured:
    needed = NEEDED[kimi.format] * kimi.layers // LAYERS
    if why := models.room_for(work, needed):
        sys.exit(f"not enough disk: {why}")
    with xfs(work, DISK_BYTES) as place:
        return measure(place, kimi, plans, say)


def _finish(
    shown: Sequence[Figure], found: Sequence[Measured], machine: dict[str, str],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Write the page and print the table, or everything as JSON."""
    if options.page:
        command = shlex.join(["python", "-m", "benchmarks.huge"])
        content = page.section(shown, machine, command)
        page.write_page(options.page, content, figures.INTRODUCTION)
    if options.json:
        samples = {each.kimi.format: samples_of(each) for each in found}
        print(json.dumps(page.as_json(shown, machine, samples), indent=2))
    else:
        print(page.table(shown))


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
