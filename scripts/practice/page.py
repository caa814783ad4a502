"""The counts as a table of docs/faithfulness.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from practice import pairs, serving, together, training
from practice.outcome import KINDS, Case, Outcome

GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "PEFT's models and configs": pairs.cases,
    "adapters together on these models": together.cases,
    "Trainer": training.cases,
    "serving": serving.cases,
}
"""The lists, by the title of their row."""

PAGE = Path(__file__).parents[2] / "docs" / "faithfulness.md"
BEGIN, END = "<!-- practice: begin -->", "<!-- practice: end -->"


def counts_table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes per list, counted, as a Markdown table."""
    rows = [["list", "cases", *KINDS], ["---", *["---:"] * (len(KINDS) + 1)]]
    for group in dict.fromkeys(each.group for each in outcomes):
        kinds = Counter(each.kind for each in outcomes if each.group == group)
        rows.append([group, str(kinds.total()), *(str(kinds[kind]) for kind in KINDS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_page(outcomes: Sequence[Outcome]) -> None:
    """Put the counts into the docs, between the two marks."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    text = f"{head}{BEGIN}\n{counts_table(outcomes)}\n{END}{tail}"
    PAGE.write_text(text, encoding="utf-8")
