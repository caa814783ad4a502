"""Give regraft hostile files by the million, and say what became of them.

    python -m torture.hostile

reads 1,000,000 mutated safetensors headers beside the reference parser, and 100,000 each of mutated
adapter configs, indexes, model configs, pairs of files with odd tensors, and PyTorch files beside
PyTorch. It un-merges 10,000 merged models in which something was changed, and merges 10,000 bases
and adapters with other cards, tokenizers and templates. It takes about half an hour on two cores.
It exits with 1 if a file that the reference parser refuses was accepted, if a file was read in
another way than the reference reads it, if anything but the base or the same weights came out, if
an error was not a typed one, or if memory grew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.pool import Pool

from regraft.testing.hostile.files import run_headers, run_json, run_tensors
from regraft.testing.hostile.folders import run_merges, run_sides
from regraft.testing.hostile.pickles import run_pickles
from regraft.testing.hostile.report import FuzzReport

MAX_GROWTH = 32 * 2**20
"""Bytes by which a process may grow after the first tenth of its cases: caches fill up."""

RUNS: dict[str, Callable[[int, str], FuzzReport]] = {
    "headers": run_headers,
    "adapter configs": partial(run_json, kind="adapter"),
    "indexes": partial(run_json, kind="index"),
    "model configs": partial(run_json, kind="config"),
    "odd tensors": run_tensors,
    "PyTorch files": run_pickles,
    "merged folders": run_merges,
    "side files": run_sides,
}
FOLDERS = ("merged folders", "side files")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all, print a table, and return the exit code."""
    options = _options(arguments)
    counts = dict.fromkeys(RUNS, options.configs) | {"headers": options.headers}
    counts |= dict.fromkeys(FOLDERS, options.folders)
    reports = {}
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for name, count in counts.items():
            if count:
                reports[name] = _run(pool, name, count, options.seed, options.processes)
                if not options.json:
                    print(_told(name, reports[name]), flush=True)
    if options.json:
        print(json.dumps({name: report.to_json() for name, report in reports.items()}, indent=2))
    return int(any(_is_bad(report) for report in reports.values()))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--headers", type=int, default=1_000_000, help="safetensors headers")
    parser.add_argument("--configs", type=int, default=100_000, help="files of each other kind")
    parser.add_argument("--folders", type=int, default=10_000, help="merges and un-merges")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same files")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args(arguments)


def _run(pool: Pool, name: str, count: int, seed: int, processes: int) -> FuzzReport:
    """Deal the cases of one kind out to all processes."""
    started = time.perf_counter()
    shares = [count // processes + (i < count % processes) for i in range(processes)]
    tasks = [(name, share, f"{seed}.{i}") for i, share in enumerate(shares) if share]
    first, *others = pool.starmap(_share, tasks, chunksize=1)
    for other in others:
        first.add(other)
    first.seconds = time.perf_counter() - started
    return first


def _share(name: str, count: int, seed: str) -> FuzzReport:
    return RUNS[name](count, seed)


def _is_bad(report: FuzzReport) -> bool:
    return bool(report.failed) or report.growth > MAX_GROWTH


def _told(name: str, report: FuzzReport) -> str:
    """Return what became of one kind of file, in a few lines."""
    headers = report.kind == "headers"
    rows = {
        f"{name}": f"{report.count:,} in {report.seconds:.0f} s, "
        f"slowest {1000 * report.slowest:.0f} ms, memory grew {report.growth / 2**20:.1f} MiB",
        "accepted by both" if headers else "accepted": f"{report.accepted:,}",
        "refused by both" if headers else "refused": f"{report.refused:,}",
    }
    if headers:
        rows["refused by regraft alone"] = f"{report.stricter.total():,}"
        rows["accepted by regraft alone"] = f"{report.lenient:,}"
    rows["wrong outcomes"] = f"{report.differing:,}"
    rows["errors that are not typed"] = f"{report.untyped:,}"
    rows["errors that say too little"] = f"{report.unsound:,}"
    lines = [f"{label:<28}{value}" for label, value in rows.items()]
    counted = report.stricter if headers else report.reasons
    lines += [f"{'':<28}{n:>9,}  {reason}" for reason, n in counted.most_common(8)]
    lines += [f"  FAILED: {json.dumps(asdict(failure))}" for failure in report.failures]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
