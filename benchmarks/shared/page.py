"""The table of figures, and the page that it is put into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.shared.figures import Figure

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


VERDICTS: dict[bool | None, str] = {True: "pass", False: "miss", None: "-"}


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| what | measured | target | | from |", "|---|---|---|---|---|"]
    lines += [
        f"| {f.name} | {f.shown} | {f.target} | {VERDICTS[f.passed]} | {f.detail} |"
        for f in figures
    ]
    return "\n".join(lines)


def as_json(
    figures: Sequence[Figure], machine: Mapping[str, str], samples: Mapping[str, object]
) -> dict[str, object]:
    """Return everything, down to the single runs, as JSON-ready objects."""
    return {
        "machine": dict(machine),
        "figures": [asdict(figure) for figure in figures],
        "samples": dict(samples),
    }


def section(figures: Sequence[Figure], machine: Mapping[str, str], command: str) -> str:
    """Return what goes between the two markers of the page."""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    return f"{table(figures)}\n\n{facts}\n- command: `{command}`\n"


def write_page(path: Path, content: str, introduction: str) -> None:
    """Put the section into the page, which is begun if there is none."""
    page = path.read_text("utf-8") if path.exists() else introduction
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(replaced(page, content), encoding="utf-8")


def replaced(page: str, content: str) -> str:
    """Return a page with the text between its markers replaced; without markers it is added."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        before, after = page.rstrip() + "\n\n", "\n"
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"
