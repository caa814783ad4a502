"""Measure work on 4-bit models against its peers and write docs/benchmarks-quantized.md.

    python -m benchmarks.quantized [--small] [--json] [--rounds N] [--work DIR] [--keep]

The peers are transformers with PEFT and bitsandbytes, and bitsandbytes alone; all on the CPU. It
needs some 25 GB of free disk, takes about ten minutes, and wants the machine to itself. It ends
with 1 when a target is missed, unless it is ``--small``.
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

from benchmarks.quantized import figures
from benchmarks.shared import models, page
from benchmarks.shared.figures import Figure
from benchmarks.shared.machine import ROOT, describe
from benchmarks.shared.models import Model, once, regraft
from benchmarks.shared.process import Sample, measured
from benchmarks.shared.running import SCALE, clean, say, versions, work_folder

HERE = Path(__file__).resolve().parent

PAGE = ROOT / "docs" / "benchmarks-quantized.md"
NEEDED_BYTES = 22 * 10**9
"""The base at four times the layers, 16 bits and 4, and a merge of it."""

OFFLINE = {"HF_HUB_OFFLINE": "1"}


class Bench:
    """One run of all measurements, and the figures from it."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work, self.options, self.load = work, options, os.getloadavg()[0]
        self.samples: dict[str, list[Sample]] = {}
        self.calls: dict[str, list[float]] = {}
        self.speeds: dict[str, dict[str, float]] = {}
        self.figures: list[Figure] = []

    def run(self) -> None:
        """Measure everything, and make the figures."""
        self._speeds()
        say("writing the model")
        model = models.make_model(self.work / "scale1", *self._shape())
        small = quantized(model, self.work / "nf4")
        self._merges(small)
        models.remove(small.folder)
        self._quantizing(model)
        if not self.options.keep:
            models.remove(model.folder)
        large = self._large()
        self.figures = [
            *figures.merge_figures(self.samples),
            figures.peak_figure(self.samples),
            figures.growth_figure(self.samples["merge"], large, SCALE),
            *figures.quantize_figures(self.samples, self.calls, self.speeds),
            *figures.speed_figures(self.speeds),
        ]

    def _shape(self) -> list[str]:
        return ["--shape", "tiny"] if self.options.small else []

    def _speeds(self) -> None:
        say("speeds in memory")
        out = self.work / "speeds.json"
        small = ["--small"] if self.options.small else []
        measured([sys.executable, str(HERE / "decode_speed.py"), str(out), *small])
        self.speeds = json.loads(out.read_text())
        out.unlink()

    def _merges(self, model: Model) -> None:
        out = self.work / "out"
        merge = models.merge_command(model, out)
        script = str(HERE / "peft_merge.py")
        peft = [sys.executable, script, str(model.base), str(model.adapter), str(out)]
        jobs = {"merge": merge, "no undo": [*merge, "--no-undo"], "peft": peft}
        self._in_turns("merges out of 4 bits", jobs, model)

    def _quantizing(self, model: Model) -> None:
        out = self.work / "out"
        ours = regraft("quantize", model.base, "-o", out, "--to", "nf4")
        theirs = [
            sys.executable, str(HERE / "bitsandbytes_quantize.py"), str(model.base), str(out),
            str(self.work / "calls.json"),
        ]  # fmt: skip
        jobs = {
            "quantize": ours,
            "bitsandbytes": theirs,
            "quantize, double": [*ours, "--double-quant"],
            "bitsandbytes, double": [*theirs, "--double-quant"],
        }
        self._in_turns("quantizing", jobs, model)

    def _in_turns(self, what: str, jobs: dict[str, list[str]], model: Model) -> None:
        """Run each command once a round; which one goes first rotates."""
        names = list(jobs)
        for number in range(self.options.rounds):
            say(f"{what}, round {number + 1} of {self.options.rounds}")
            first = number % len(names)
            for name in names[first:] + names[:first]:
                sample = once(jobs[name], model, self.work / "out", OFFLINE)
                self.samples.setdefault(name, []).append(sample)
                self._note_calls(name)

    def _note_calls(self, name: str) -> None:
        """Take up what a run of bitsandbytes says of its calls."""
        path = self.work / "calls.json"
        if path.exists():
            self.calls.setdefault(name, []).append(json.loads(path.read_text())["seconds"])
            path.unlink()

    def _large(self) -> Sample:
        say(f"a model with {SCALE} times the layers")
        plain = models.make_model(self.work / f"scale{SCALE}", "--scale", str(SCALE),
                                   *self._shape())  # fmt: skip
        large = quantized(plain, self.work / "large")
        models.remove(plain.base)
        sample = once(models.merge_command(large, self.work / "out"), large, self.work / "out")
        self.samples["large"] = [sample]
        models.remove(large.folder)
        models.remove(plain.folder)
        return sample

    def json(self, machine: dict[str, str]) -> dict[str, object]:
        """Return everything as JSON-ready objects."""
        runs: dict[str, object] = {n: [asdict(s) for s in each] for n, each in self.samples.items()}
        runs |= {"seconds in quantize_4bit": self.calls, "speeds": self.speeds}
        return page.as_json(self.figures, machine, runs)


def quantized(model: Model, folder: Path) -> Model:
    """Return the same model in NF4, with the same adapter."""
    made = Model(folder)
    models.remove(folder)
    folder.mkdir()
    measured(regraft("quantize", model.base, "-o", made.base, "--to", "nf4"))
    made.adapter.symlink_to(model.adapter.resolve())
    return made


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure work on 4-bit models.")
    parser.add_argument("--small", action="store_true", help="tiny models, one round, no page")
    parser.add_argument("--json", action="store_true", help="print every sample as JSON on stdout")
    parser.add_argument("--rounds", type=int, help="rounds of all commands (2, small 1)")
    parser.add_argument("--work", type=Path, help="folder for the models (a fresh one in .bench)")
    parser.add_argument("--keep", action="store_true", help="leave the model for the next run")
    parser.add_argument("--page", type=Path, help=f"page to write (docs/{PAGE.name}; small: none)")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.small else 2)
    options.page = options.page or (None if options.small else PAGE)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    work, ours = work_folder(options.work)
    bench = Bench(work, options)
    try:
        why = "" if options.small else models.room_for(work, NEEDED_BYTES)
        if why:
            sys.exit(f"not enough disk: {why}")
        bench.run()
        finish(bench, options)
    finally:
        if not options.keep:
            clean(work, ours, ("nf4", "large"))
    return int(not options.small and any(figure.passed is False for figure in bench.figures))


def finish(bench: Bench, options: argparse.Namespace) -> None:
    """Write the page and print the table, or everything as JSON."""
    machine = describe(bench.work) | versions()
    machine["load before it began"] = f"{bench.load:.1f} (above 0.2, the machine was not idle)"
    if options.page:
        small = ["--small"] if options.small else []
        command = ["python", "-m", "benchmarks.quantized", *small, "--rounds", str(options.rounds)]
        content = page.section(bench.figures, machine, shlex.join(command))
        page.write_page(options.page, content, figures.INTRODUCTION)
    if options.json:
        print(json.dumps(bench.json(machine), indent=2))
    else:
        print(page.table(bench.figures))


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
