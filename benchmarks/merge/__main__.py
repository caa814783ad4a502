"""Measure regraft against its targets and write the table of docs/benchmarks.md.

    python -m benchmarks.merge [--quick] [--json] [--pairs N] [--work DIR] [--keep]

It needs some 12 GB of free disk (25 GB with the memory figure at four times the size), takes five
to fifteen minutes, as the disk allows, and wants the machine to itself. It ends with 1 when a
target is missed.
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

from benchmarks.merge import figures, measure
from benchmarks.shared import models, page
from benchmarks.shared.figures import Figure, growth_figure, growth_name, missing
from benchmarks.shared.machine import ROOT, describe
from benchmarks.shared.process import Sample
from benchmarks.shared.running import SCALE, clean, say, work_folder

PAGE = ROOT / "docs" / "benchmarks.md"
LARGE_BYTES = 23 * 10**9
"""Base and output at four times the layers."""


class Bench:
    """One run of all measurements: what was measured so far, and the figures from it."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work, self.options = work, options
        self.load = os.getloadavg()[0]
        self.figures: list[Figure] = []
        self.samples: dict[str, list[Sample]] = {}
        self.undo_speeds: dict[str, dict[str, list[float]]] = {}

    def run(self) -> None:
        """Measure everything, the short things first."""
        self._startup()
        self._check()
        self._merges()

    def _startup(self) -> None:
        count = 5 if self.options.quick else 15
        say("start-up")
        self.samples["help"] = measure.measure_help(count)
        self.samples["tiny"] = measure.measure_tiny(self.work, count)
        compiled = measure.measure_compile(self.work, 1 if self.options.quick else 5)
        self.samples["compile, first"] = [first for first, _ in compiled]
        self.samples["compile, second"] = [second for _, second in compiled]
        self.figures += [
            figures.time_figure("`regraft --help`", self.samples["help"], figures.HELP_LIMIT),
            figures.time_figure(
                "merge of a tiny model, warm", self.samples["tiny"], figures.TINY_LIMIT
            ),
            figures.compile_figure(compiled),
        ]

    def _check(self) -> None:
        say("check of a 70B model's headers")
        samples = measure.measure_check(self.work, 3 if self.options.quick else 7)
        self.samples["check"] = samples
        name = "`regraft check`, headers of a 70B model"
        self.figures.append(figures.time_figure(name, samples, figures.CHECK_LIMIT))

    def _merges(self) -> None:
        say("writing the model")
        model = models.make_model(self.work / "scale1")
        say(f"{self.options.pairs} pairs of copy and merge")
        pairs = measure.measure_pairs(model, self.work, self.options.pairs)
        self.samples |= {"copy": pairs.copies, "merge": pairs.merges}
        say(f"{self.options.pairs} rounds of merge, merge with a patch, un-merge")
        undos = measure.measure_undos(model, self.work, self.options.pairs)
        self.samples |= {"plain": undos.plains, "undo": undos.merges, "unmerge": undos.unmerges}
        found = [figures.copy_figure(pairs), self._peft(model), figures.peak_figure(pairs.merges)]
        found += figures.undo_figures(undos) + self._undo_kinds()
        if not self.options.keep:
            models.remove(model.folder)
        self.figures = [*found, self._growth(pairs.merges), *self.figures]

    def _undo_kinds(self) -> list[Figure]:
        say("kinds of merges, and their way back in memory")
        self.undo_speeds = measure.measure_undo_speed(self.work, small=False)
        return figures.undo_kind_figures(self.undo_speeds)

    def _peft(self, model: models.Model) -> Figure:
        if self.options.quick:
            name = "merge against PEFT, times faster"
            return missing(name, "at least 10 x", "left out of a quick run")
        say("PEFT")
        samples = measure.measure_peft(model, self.work, self.options.peft_runs)
        self.samples["peft"] = samples
        return figures.peft_figure(samples, self.samples["merge"])

    def _growth(self, merges: Sequence[Sample]) -> Figure:
        why = models.room_for(self.work, LARGE_BYTES)
        if self.options.quick:
            why = "left out of a quick run"
        if why:
            return missing(growth_name(SCALE), "within 10%", why)
        say(f"a model with {SCALE} times the layers")
        large = measure.measure_large(self.work, SCALE)
        self.samples["large"] = [large]
        return growth_figure(merges, large, SCALE)

    def json(self, machine: dict[str, str]) -> dict[str, object]:
        runs: dict[str, object] = {
            name: [asdict(s) for s in samples] for name, samples in self.samples.items()
        }
        return page.as_json(self.figures, machine, runs | {"undo in memory": self.undo_speeds})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure regraft against its targets.")
    parser.add_argument(
        "--quick", action="store_true", help="fewer runs, no PEFT, no large model, no page"
    )
    parser.add_argument("--json", action="store_true", help="print every sample as JSON on stdout")
    parser.add_argument("--pairs", type=int, help="pairs of copy and merge (7, quick 2)")
    parser.add_argument("--peft-runs", type=int, default=2, help="merges by PEFT (2)")
    parser.add_argument("--work", type=Path, help="folder for the models (a fresh one in .bench)")
    parser.add_argument("--keep", action="store_true", help="leave the models for the next run")
    parser.add_argument("--page", type=Path, help=f"page to write (docs/{PAGE.name}; quick: none)")
    options = parser.parse_args(arguments)
    options.pairs = options.pairs or (2 if options.quick else 7)
    options.page = options.page or (None if options.quick else PAGE)
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
            clean(work, ours)
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
    return [*quick, "--pairs", str(options.pairs), "--peft-runs", str(options.peft_runs)]


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
