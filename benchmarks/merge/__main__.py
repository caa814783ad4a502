"""Measure regraft against its targets and write the table of a page in docs.

    python -m benchmarks.merge [--quick] [--only PART] [--json] [--pairs N] [--work DIR] [--keep]

It needs some 12 GB of free disk (25 GB with the memory figure at four times the size), takes ten to
twenty minutes, as the disk allows, and wants the machine to itself. The rows on XFS ask for root, a
loop device and xfsprogs, or are left out. It ends with 1 when a target is missed.

To measure as an older processor would, compile for it: ``NUMBA_CPU_NAME=nehalem
NUMBA_CPU_FEATURES=+sse4.2 python -m benchmarks.merge --only copy``. The table says so.
Processors with AVX-512 have their figures in docs/benchmarks.md, all others in benchmarks-avx2.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.merge import disk, figures, measure
from benchmarks.shared import models, page
from benchmarks.shared.figures import Figure, growth_figure, growth_name, missing
from benchmarks.shared.machine import ROOT, describe, instruction_set
from benchmarks.shared.process import Sample
from benchmarks.shared.running import SCALE, clean, say, work_folder
from benchmarks.shared.xfs import NoXfsError

MODEL = "scale1"
"""The folder of the model that most rows are measured on."""

WIDE, PLAIN = (ROOT / "docs" / f"benchmarks{kind}.md" for kind in ("", "-avx2"))
"""The page of processors with AVX-512, and that of all others."""

LARGE_BYTES = 23 * 10**9
"""Base and output at four times the layers."""


class Bench:
    """One run of all measurements: what was measured so far, and the figures from it."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work, self.options = work, options
        self.load = os.getloadavg()[0]
        self.samples: dict[str, list[Sample]] = {}
        self._found: dict[str, list[Figure]] = {}
        self.undo_speeds: dict[str, dict[str, list[float]]] = {}

    @property
    def figures(self) -> list[Figure]:
        """The figures so far, in the order of the table."""
        return [figure for part in PARTS for figure in self._found.get(part, [])]

    def run(self) -> None:
        """Measure everything that was asked for, the short things first."""
        measure.warm_up(self.work)
        for part in self.options.only or RUN_ORDER:
            self._found[part] = PARTS[part](self)
        if not self.options.keep:
            models.remove(self.work / MODEL)

    def startup(self) -> list[Figure]:
        count = 5 if self.options.quick else 15
        say("start-up")
        self.samples["help"] = measure.measure_help(count)
        self.samples["tiny"] = measure.measure_tiny(self.work, count)
        compiled = measure.measure_compile(self.work, 1 if self.options.quick else 5)
        self.samples["compile, first"] = [first for first, _ in compiled]
        self.samples["compile, second"] = [second for _, second in compiled]
        tiny = "merge of a tiny model, warm"
        return [
            figures.time_figure("`regraft --help`", self.samples["help"], figures.HELP_LIMIT),
            figures.time_figure(tiny, self.samples["tiny"], figures.TINY_LIMIT),
            figures.compile_figure(compiled),
        ]

    def check(self) -> list[Figure]:
        say("check of a 70B model's headers")
        samples = measure.measure_check(self.work, 3 if self.options.quick else 7)
        self.samples["check"] = samples
        name = "`regraft check`, headers of a 70B model"
        return [figures.time_figure(name, samples, figures.CHECK_LIMIT)]

    def copy(self) -> list[Figure]:
        model = self._model()
        say(f"{self.options.pairs} pairs of copy and merge")
        pairs = measure.measure_pairs(model, self.work, self.options.pairs)
        self.samples |= {"copy": pairs.copies, "merge": pairs.merges}
        return [figures.copy_figure(pairs), figures.peak_figure(pairs.merges)]

    def raw(self) -> list[Figure]:
        model = self._model()
        say(f"{self.options.pairs} pairs of raw write and merge")
        found = disk.measure_raw(model, self.work, self.options.pairs)
        self.samples |= {"raw write": found.writes, "merge beside raw write": found.merges}
        return [figures.raw_figure(found)]

    def undo(self) -> list[Figure]:
        model = self._model()
        say(f"{self.options.pairs} rounds of merge, merge with a patch, un-merge")
        undos = measure.measure_undos(model, self.work, self.options.pairs)
        self.samples |= {"plain": undos.plains, "undo": undos.merges, "unmerge": undos.unmerges}
        return figures.undo_figures(undos)

    def kinds(self) -> list[Figure]:
        say("kinds of merges, and their way back in memory")
        self.undo_speeds = measure.measure_undo_speed(self.work, small=self.options.quick)
        return figures.undo_kind_figures(self.undo_speeds)

    def peft(self) -> list[Figure]:
        if self.options.quick:
            name = "merge against PEFT, times faster"
            return [missing(name, "at least 10 x", "left out of a quick run")]
        model, merges = self._model(), self._merges()
        say("PEFT")
        samples = measure.measure_peft(model, self.work, self.options.peft_runs)
        self.samples["peft"] = samples
        return [figures.peft_figure(samples, merges)]

    def growth(self) -> list[Figure]:
        why = models.room_for(self.work, LARGE_BYTES)
        if self.options.quick:
            why = "left out of a quick run"
        if why:
            return [missing(growth_name(SCALE), "within 10%", why)]
        merges = self._merges()
        say(f"a model with {SCALE} times the layers")
        large = measure.measure_large(self.work, SCALE)
        self.samples["large"] = [large]
        return [growth_figure(merges, large, SCALE)]

    def reflink(self) -> list[Figure]:
        """Measure an adapter on q and v where blocks are shared."""
        count = min(self.options.pairs, 3)
        say(f"{count} rounds on XFS, digests read, and {count} with digests known")
        try:
            found = disk.measure_shared(self.work, count, self.options.shape)
        except NoXfsError as error:
            return [missing(figures.REFLINK, "at most 1.1 x", str(error))]
        self.samples |= {"copy on XFS": found.copies}
        self.samples |= {f"{name} on XFS": samples for name, samples in found.samples.items()}
        return figures.shared_figures(found)

    def _model(self) -> models.Model:
        return models.make_model(self.work / MODEL, *self.options.shape)

    def _merges(self) -> list[Sample]:
        """Return merges of the model; measured here where no other part has."""
        if "merge" not in self.samples:
            self.copy()
        return self.samples["merge"]

    def json(self, machine: dict[str, str]) -> dict[str, object]:
        runs: dict[str, object] = {
            name: [asdict(s) for s in samples] for name, samples in self.samples.items()
        }
        return page.as_json(self.figures, machine, runs | {"undo in memory": self.undo_speeds})


PARTS = {
    "copy": Bench.copy, "raw": Bench.raw, "peft": Bench.peft, "undo": Bench.undo,
    "kinds": Bench.kinds, "growth": Bench.growth, "reflink": Bench.reflink,
    "startup": Bench.startup, "check": Bench.check,
}  # fmt: skip
"""What can be measured alone, in the order of the table."""

RUN_ORDER = ("startup", "check", "copy", "raw", "undo", "kinds", "peft", "growth", "reflink")


def page_of(instructions: str) -> Path:
    """Return the page of a processor's figures."""
    return WIDE if instructions.startswith("avx512") else PLAIN


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure regraft against its targets.")
    parser.add_argument(
        "--quick", action="store_true", help="fewer runs, no PEFT, no large model, no page"
    )
    parser.add_argument(
        "--only", action="append", choices=PARTS, metavar="PART",
        help=f"measure one part alone, and write no page; of {', '.join(PARTS)}; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print every sample as JSON on stdout")
    parser.add_argument("--pairs", type=int, help="pairs of copy and merge (7, quick 2)")
    parser.add_argument("--peft-runs", type=int, default=2, help="merges by PEFT (2)")
    parser.add_argument("--work", type=Path, help="folder for the models (a fresh one in .bench)")
    parser.add_argument("--shape", help="model to imitate (qwen2.5-1.5b); others write no page")
    parser.add_argument("--keep", action="store_true", help="leave the models for the next run")
    parser.add_argument("--page", type=Path, help="page to write (of the processor's, if whole)")
    options = parser.parse_args(arguments)
    options.pairs = options.pairs or (2 if options.quick else 7)
    options.shape = ("--shape", options.shape) if options.shape else ()
    partly = options.quick or options.only or options.shape
    options.page = options.page or (None if partly else page_of(instruction_set()))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    work, ours = work_folder(options.work)
    bench = Bench(work, options)
    try:
        if why := models.room_for(work, 10 * 10**9):
            sys.exit(f"not enough disk: {why}")
        bench.run()
        finish(bench, options)
    finally:
        if not options.keep:
            clean(work, ours, ("raw", "back"))
    return int(any(figure.passed is False for figure in bench.figures))


def finish(bench: Bench, options: argparse.Namespace) -> None:
    """Write the page and print the table, or everything as JSON."""
    machine = describe(bench.work)
    machine["load before it began"] = f"{bench.load:.1f} (above 0.2, the machine was not idle)"
    if options.page:
        command = shlex.join(["python", "-m", "benchmarks.merge", *_shown_arguments(options)])
        content = page.section(bench.figures, machine, command)
        page.write_page(options.page, content, figures.INTRODUCTION)
    if options.json:
        print(json.dumps(bench.json(machine), indent=2))
    else:
        print(page.table(bench.figures))


def _shown_arguments(options: argparse.Namespace) -> list[str]:
    """Return the arguments that decide the figures; folders are nobody's business."""
    quick = ["--quick"] if options.quick else []
    only = [word for part in options.only or () for word in ("--only", part)]
    return [
        *quick,
        *only,
        *options.shape,
        "--pairs",
        str(options.pairs),
        "--peft-runs",
        str(options.peft_runs),
    ]


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
