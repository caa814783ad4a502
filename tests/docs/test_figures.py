"""Figures that the pages name in passing are those of the benchmarks' pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LIVE, QLORA = DOCS / "benchmarks-live.md", DOCS / "benchmarks-qlora.md"
MEASURED = r"^\s*([\d,.]+)"
"""The first cell after the name of what was measured."""

KL_OF_TASK = r"^(?:[^|]*\|){2}\s*([\d.]+)"
"""The third cell after the name of the model."""


class Figure(NamedTuple):
    """What a page says, and the range of what may have been measured for it."""

    page: Path
    words: str
    source: Path
    row: str
    """How the row begins."""
    cell: str
    """A pattern of what follows the name, its group the number."""
    low: float
    high: float


LOADING = "load an adapter from warm disk onto the running model, against PEFT's `load_adapter`"
SWITCHING = "switch adapters (`set_adapter`) against PEFT"
MERGING = "merge in memory (`merge_adapter`) against PEFT"
THREADS = "wrong outputs of 16 threads with an adapter each, 10,000 calls"
PROMPT, TOKEN = (
    f"mixed {what}: 8 adapters in 8 rows against one adapter" for what in ("prompt 8 x 32", "token")
)
EIGHT = "a batch of eight adapters takes about as long as one of a single adapter"
NEAREST, STOCHASTIC = "`--quantize nf4`", "`--quantize nf4 --rounding stochastic`"

FIGURES = [
    Figure(ROOT / "README.md", "loads 10 x faster", LIVE, LOADING, MEASURED, 9.5, 10.5),
    Figure(ROOT / "README.md", "merges 4 x", LIVE, MERGING, MEASURED, 3.5, 4.5),
    Figure(ROOT / "README.md", "switches 7,600 x", LIVE, SWITCHING, MEASURED, 7550, 7650),
    Figure(ROOT / "README.md", "get 0 of 10,000 answers wrong", LIVE, THREADS, MEASURED, 0, 0),
    Figure(
        *(DOCS / "how-to-live.md", "a few microseconds"),
        *(LIVE, SWITCHING, r"against ([\d.]+) µs", 2, 10),
    ),
    Figure(DOCS / "how-to-live.md", EIGHT, LIVE, PROMPT, MEASURED, 0.85, 1.15),
    Figure(DOCS / "how-to-live.md", EIGHT, LIVE, TOKEN, MEASURED, 0.85, 1.15),
    Figure(
        *(DOCS / "how-to-quantized.md", "KL divergence of 0.017 with nearest rounding"),
        *(QLORA, NEAREST, KL_OF_TASK, 0.0165, 0.0175),
    ),
    Figure(
        *(DOCS / "how-to-quantized.md", "of 0.12 with stochastic"),
        *(QLORA, STOCHASTIC, KL_OF_TASK, 0.115, 0.125),
    ),
]


def text_of(page: Path) -> str:
    """Return the words of a page, each parted from the next by one space."""
    return " ".join(page.read_text(encoding="utf-8").split())


def measured(figure: Figure) -> float:
    """Return the number in the one row that begins as the figure says."""
    start = rf"^\| {re.escape(figure.row)}(?:, [^|]*)? \|(.*)$"
    rows = re.findall(start, figure.source.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 1, f"{len(rows)} rows of {figure.source.name} begin with {figure.row!r}"
    number = re.search(figure.cell, rows[0])
    assert number, rows[0]
    return float(number[1].replace(",", ""))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.page.stem}: {f.words}")
def test_a_figure_is_the_one_that_was_measured(figure: Figure) -> None:
    assert figure.words in text_of(figure.page)
    assert figure.low <= measured(figure) <= figure.high
