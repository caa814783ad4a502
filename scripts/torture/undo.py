"""Merge and un-merge every case of the tests in every dtype, and compare the base byte for byte.

    python -m torture.undo [--every N] [--processes N] [--json]

The cases are those of ``tests/faithful``: architectures times features of PEFT's LoRA. Each is
merged into a base of three dtypes, into an output of four, and un-merged; in one combination of
each case the adapter is also swapped for itself at another weight and compared with a fresh merge.
Then the same of quantized bases: each kind, into plain values, kept in its codes, and made anew.
It ends with 1 when a byte differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2] / "tests"


def main() -> int:
    """Run the matrix and print what came of it."""
    options = _options()
    os.environ |= {"HF_HUB_OFFLINE": "1", "REGRAFT_CACHE": ""}  # every byte is read and hashed
    sys.path.insert(0, str(TESTS))
    started = time.perf_counter()
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        shares = [(i, options.processes, options.every) for i in range(options.processes)]
        counts, failures = Counter[str](), list[str]()
        for found, bad in pool.map(run_share, shares):
            counts += found
            failures += bad
    seconds = time.perf_counter() - started
    result = {**counts, "failures": failures, "seconds": round(seconds)}
    print(json.dumps(result, indent=2) if options.json else _table(counts, failures, seconds))
    return 1 if failures else 0


def run_share(share: tuple[int, int, int]) -> tuple[Counter[str], list[str]]:
    """Run every n-th case: its number among the processes, their number, and the stride."""
    number, processes, every = share
    sys.path.insert(0, str(TESTS))
    import torch
    import transformers

    tests = import_module("faithful.test_undo")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    counts, failures = run_quantized(number, processes, every)
    with tempfile.TemporaryDirectory(prefix="regraft-undo-") as folder:
        workshop = tests.Workshop(Path(folder))
        for case in tests.CASES[::every][number::processes]:
            counts["cases"] += 1
            for place, (dtype, out_dtype) in enumerate(tests.COMBINATIONS):
                what = f"{case.id}, {dtype} to {out_dtype or 'the same'}"
                failures += _attempt(workshop, case, dtype, out_dtype, what, counts, place == 0)
    return counts, failures


OUTPUTS: dict[str, dict[str, Any]] = {
    "plain": {}, "float32": {"dtype": "float32"}, "float16": {"dtype": "float16"},
    "kept, stochastic": {"quantize": "keep", "seed": 3},
    "kept, nearest": {"quantize": "keep", "rounding": "nearest"},
    "nf4": {"quantize": "nf4", "undo": True},
}  # fmt: skip
"""What a quantized base is merged into."""


def run_quantized(
    number: int, processes: int, every: int
) -> tuple[Counter[str], list[str]]:  # fmt: skip
    """Merge into quantized bases and un-merge, each kind by each output by each adapter."""
    bases, coding = (import_module(f"merging.{n}") for n in ("quantized_bases", "test_coding"))
    counts, failures = Counter[str](), list[str]()
    matrix = list(product(bases.BASES, coding.CASES, OUTPUTS))[::every][number::processes]
    for kind, case, output in matrix:
        with tempfile.TemporaryDirectory(prefix="regraft-undo-") as place:
            folder = Path(place)
            base = bases.write_quantized(folder / "base", kind, coding.BIASES)
            try:
                _quantized(base, coding.CASES[case](folder), folder, OUTPUTS[output])
                counts["quantized, merged and un-merged"] += 1
            except Exception as error:  # whatever it is, it is a failure to be counted
                what = f"{type(error).__name__}: {str(error)[:200]}"
                failures.append(f"{kind}, {case}, {output}: {what}")
    return counts, failures


def _quantized(base: Path, adapters: Any, folder: Path, output: dict[str, Any]) -> None:
    """Merge, un-merge, and swap; fail if a byte differs."""
    import regraft

    undo = import_module("merging.test_undo")
    regraft.merge(base, adapters, folder / "out", **output)
    undo.assert_restores(base, folder / "out", folder)
    regraft.swap(folder / "out", adapters, folder / "swapped", quantize="keep")
    regraft.merge(base, adapters, folder / "fresh", quantize="keep")
    assert undo.comparable(folder / "swapped") == undo.comparable(folder / "fresh"), "swap differs"


def _attempt(
    workshop: Any, case: Any, dtype: str, out_dtype: str | None, what: str, counts: Counter[str],
    swap: bool,
) -> list[str]:  # fmt: skip
    """Do one combination; return what went wrong."""
    tests = import_module("faithful.test_undo")
    try:
        merged = tests.round_trip(case, workshop, dtype, out_dtype)
        counts["merged and un-merged"] += 1
        if swap:
            tests.swap_equals_merge(case, workshop, dtype, merged)
            counts["swapped"] += 1
        shutil.rmtree(merged)
    except Exception as error:  # whatever it is, it is a failure to be counted
        return [f"{what}: {type(error).__name__}: {str(error)[:200]}"]
    return []


def _table(counts: Counter[str], failures: list[str], seconds: float) -> str:
    lines = [f"{name}: {number}" for name, number in counts.items()]
    lines += [f"failures: {len(failures)}", *(f"  {each}" for each in failures)]
    return "\n".join([*lines, f"{seconds:.0f} s"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merge and un-merge everything in every dtype.")
    parser.add_argument("--every", type=int, default=1, help="take only every N-th case")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
