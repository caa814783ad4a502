"""Merge one adapter and print how far the merge has come.

python examples/merge_with_progress.py BASE ADAPTER OUT
"""

from __future__ import annotations

import sys

import regraft


def show(event: regraft.ProgressEvent) -> None:
    """Print one line per finished tensor. Calls come one at a time, from worker threads."""
    if event.tensor:
        print(f"{event.done / event.total:7.1%}  {event.tensor}")


def main(base: str, adapter: str, out: str) -> None:
    """Merge, and say what came out."""
    try:
        receipt = regraft.merge(base, adapter, out, progress=show)
    except regraft.RegraftError as error:
        sys.exit("\n".join(map(str, error.problems)))
    totals = receipt.totals
    print(f"{totals.merged} of {totals.tensors} tensors merged in {totals.seconds:.1f} s")
    print(f"|delta|/|W| {totals.relative_delta:.3%}, peak {totals.peak_memory / 2**20:.0f} MiB")


if __name__ == "__main__":
    if len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
