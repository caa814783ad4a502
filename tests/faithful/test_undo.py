"""Every merge can be taken back to the base's exact bytes, whatever was merged into what.

The whole matrix of cases, dtypes of the base and dtypes of the output is run by
``scripts/torture/undo.py``; here each case gets one combination, so that all are met.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

import regraft
from faithful.harness import Case, Workshop
from faithful.test_architectures import CASES
from merging.toys import tree

DTYPES = ("bfloat16", "float16", "float32")
COMBINATIONS = tuple(product(DTYPES, (None, *DTYPES)))


def inputs_of(case: Case, workshop: Workshop, dtype: str) -> tuple[Path, list[Path]]:
    """Return a base of another dtype, and the case's adapters."""
    return workshop.base(case.architecture, dtype, case.sharded), workshop.adapters(case)


def weighted(case: Case, adapters: list[Path]) -> list[tuple[Path, float]]:
    """Return the adapters with the case's weights."""
    return list(zip(adapters, case.weights or [1.0] * len(adapters), strict=True))


def round_trip(case: Case, workshop: Workshop, dtype: str, out_dtype: str | None) -> Path:
    """Merge and un-merge; return what is left of the merge. Fail if a byte of the base differs.

    One thread does it: a second costs more than such a model takes.
    """
    base, adapters = inputs_of(case, workshop, dtype)
    merged, back = workshop.fresh("merged"), workshop.fresh("back")
    regraft.merge(base, weighted(case, adapters), merged, dtype=out_dtype, threads=1)
    regraft.unmerge(merged, back, threads=1)
    assert tree(back) == tree(base)
    return merged


def swap_equals_merge(case: Case, workshop: Workshop, dtype: str, merged: Path) -> None:
    """Fail unless swapping the last adapter in alone gives what merging it alone gives.

    That merge takes as many threads as usual: their number does not show.
    """
    base, adapters = inputs_of(case, workshop, dtype)
    swapped, fresh = workshop.fresh("swapped"), workshop.fresh("fresh")
    regraft.swap(merged, adapters[-1], swapped, threads=1)
    regraft.merge(base, adapters[-1], fresh)
    found, expected = tree(swapped), tree(fresh)
    assert found.keys() == expected.keys()
    differing = [name for name in found if found[name] != expected[name]]
    assert set(differing) <= {"README.md", "regraft/receipt.json"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_was_merged_is_unmerged_to_the_same_bytes(case: Case, workshop: Workshop) -> None:
    dtype, out_dtype = COMBINATIONS[CASES.index(case) % len(COMBINATIONS)]
    merged = round_trip(case, workshop, dtype, out_dtype)
    if CASES.index(case) % 3 == 0:
        swap_equals_merge(case, workshop, dtype, merged)
