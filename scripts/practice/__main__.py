"""Try every case of every list, and write the counts into docs/faithfulness.md.

    PYTHONPATH=scripts python -m practice [--only TEXT] [--json FILE] [--write]

It ends with 1 if a case is wrong in silence or ends in an error that is not regraft's.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from practice.outcome import CRASHED, RIGHT, WRONG, Case, Outcome, outcome_of
from practice.page import GROUPS, counts_table, write_page


def _quiet() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    torch.set_num_threads(1)  # the models are tiny
    for name in ("bitsandbytes", "ContinuousBatchingLogger"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _chosen(only: str) -> Iterator[tuple[str, Case]]:
    for group, cases in GROUPS.items():
        for case in cases():
            if only in f"{group}: {case.name}":
                yield group, case


def _tried(only: str) -> Iterator[Outcome]:
    for group, case in _chosen(only):
        outcome = outcome_of(group, case)
        if outcome.kind != RIGHT:
            print(f"{outcome.kind}: {group}: {case.name}: {outcome.message}", flush=True)
        yield outcome


def main() -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has the text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome there")
    parser.add_argument("--write", action="store_true", help="write the counts into the docs")
    chosen = parser.parse_args()
    if chosen.write and chosen.only:
        parser.error("--write needs all cases; leave out --only")
    _quiet()
    outcomes = list(_tried(chosen.only))
    print(counts_table(outcomes))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    if chosen.write:
        write_page(outcomes)
    kinds = Counter(each.kind for each in outcomes)
    return int(kinds[WRONG] + kinds[CRASHED] > 0)


if __name__ == "__main__":
    sys.exit(main())
