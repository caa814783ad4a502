"""Measure adapters on live models against PEFT and write docs/benchmarks-live.md.

    python -m benchmarks.live [--quick] [--json] [--only NAME ...] [--rounds N] [--work DIR]

It needs some 10 GB of memory and 4 GB of free disk, takes about fifteen minutes, and wants the
machine to itself. It ends with 1 when a target is missed, unless it is ``--quick``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.live import figures, many, measure, models
from benchmarks.live.measure import Inputs, Running
from benchmarks.live.models import QUICK, Sizes
from benchmarks.live.timing import Times
from benchmarks.shared import page
from benchmarks.shared.figures import Figure
from benchmarks.shared.machine import ROOT, describe
from benchmarks.shared.models import room_for
from benchmarks.shared.running import say, versions, work_folder
from regraft.demo.quiet import quiet_libraries

PAGE = ROOT / "docs" / "benchmarks-live.md"
NEEDED_BYTES = 4 * 10**9
PARTS = ("load", "switch", "forward", "mixed", "merge", "load_merged", "cache", "threads")
ON_RUNNING = PARTS[:4]
LARGE, SMALL = PARTS[:6], PARTS[6:]


class Bench:
    """One run of the chosen measurements, and the figures from it."""

    def __init__(self, work: Path, sizes: Sizes, parts: Sequence[str]) -> None:
        self.work, self.sizes, self.parts = work, sizes, parts
        self.load = os.getloadavg()[0]
        self.figures: list[Figure] = []
        self.samples: dict[str, object] = {}

    def run(self) -> None:
        """Measure everything that was asked for."""
        if set(self.parts) & set(LARGE):
            self._large()
        if set(self.parts) & set(SMALL):
            self._small()

    def _large(self) -> None:
        say("writing the model and its adapters")
        inputs = self._inputs("large", measure.MIX, large=True)
        if set(self.parts) & set(ON_RUNNING):
            self._running(Running(inputs, self.sizes))
        gc.collect()
        if "merge" in self.parts:
            say("merge")
            merging = measure.merging(inputs, self.sizes)
            self._take("merge", asdict(merging), figures.merge_figures(merging))
        if "load_merged" in self.parts:
            say("load_merged")
            times = measure.load_merged(inputs, self.sizes)
            self._take("load_merged", times, figures.load_merged_figures(times))
        shutil.rmtree(self.work / "large")

    def _running(self, running: Running) -> None:
        parts: dict[str, tuple[Callable[[], Times], Callable[..., list[Figure]]]] = {
            "load": (running.load, figures.load_figures),
            "switch": (running.switch, figures.switch_figures),
            "forward": (running.forward, figures.forward_figures),
            "mixed": (running.mixed, figures.mixed_figures),
        }
        for name, (measured, shown) in parts.items():
            if name in self.parts:
                say(name)
                times = measured()
                self._take(name, times, shown(times))

    def _small(self) -> None:
        say("writing many adapters of a small model")
        count = self.sizes.cached_adapters if "cache" in self.parts else self.sizes.threads
        inputs = self._inputs("small", count, large=False)
        if "cache" in self.parts:
            say("cache")
            cached = many.cached(inputs, self.sizes)
            self._take("cache", asdict(cached), figures.cache_figures(cached))
        if "threads" in self.parts:
            say("threads")
            threaded = many.threaded(inputs, self.sizes)
            self._take("threads", asdict(threaded), figures.thread_figures(threaded))
        shutil.rmtree(self.work / "small")

    def _inputs(self, name: str, adapters: int, *, large: bool) -> Inputs:
        """Write a base and adapters for it."""
        folder, shape = self.work / name, self.sizes.shape if large else self.sizes.small
        base = models.base_folder(folder / "base", shape)
        names = [f"adapter{number}" for number in range(adapters)]
        model = models.load_base(base)
        made = models.make_adapters(model, folder / "adapters", names, self.sizes.rank)
        assert models.targets(made[names[0]]) == shape.layers * 7
        return Inputs(base, made)

    def _take(self, name: str, samples: object, found: Sequence[Figure]) -> None:
        self.samples[name] = samples
        self.figures += found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure adapters on live models.")
    parser.add_argument("--quick", action="store_true", help="tiny models, little of all, no page")
    parser.add_argument("--json", action="store_true", help="print every sample as JSON on stdout")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--rounds", type=int, help="rounds of short things (7, quick 2)")
    parser.add_argument("--work", type=Path, help="folder for the models (a fresh one in .bench)")
    parser.add_argument("--page", type=Path, help=f"page to write (docs/{PAGE.name}; quick: none)")
    options = parser.parse_args(arguments)
    whole = not options.quick and tuple(options.only) == PARTS
    options.page = options.page or (PAGE if whole else None)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    sizes = QUICK if options.quick else Sizes()
    sizes = replace(sizes, rounds=options.rounds or sizes.rounds)
    work, ours = work_folder(options.work)
    bench = Bench(work, sizes, options.only)
    try:
        why = "" if options.quick else room_for(work, NEEDED_BYTES)
        if why:
            sys.exit(f"not enough disk: {why}")
        with quiet_libraries():
            bench.run()
        finish(bench, options)
    finally:
        for name in ("large", "small"):
            shutil.rmtree(work / name, ignore_errors=True)
        if ours:
            shutil.rmtree(work, ignore_errors=True)
    return int(not options.quick and any(figure.passed is False for figure in bench.figures))


def finish(bench: Bench, options: argparse.Namespace) -> None:
    """Write the page and print the table, or everything as JSON."""
    machine = describe(bench.work) | versions()
    machine["load before it began"] = f"{bench.load:.1f} (above 0.2, the machine was not idle)"
    if options.page:
        command = ["python", "-m", "benchmarks.live", *(["--quick"] if options.quick else [])]
        command += ["--rounds", str(bench.sizes.rounds)]
        content = page.section(bench.figures, machine, shlex.join(command))
        page.write_page(options.page, content, figures.INTRODUCTION)
    if options.json:
        print(json.dumps(page.as_json(bench.figures, machine, bench.samples), indent=2))
    else:
        print(page.table(bench.figures))


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
