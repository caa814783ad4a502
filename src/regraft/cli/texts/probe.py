"""What a probe of a server found, as text."""

from __future__ import annotations

from regraft.cli.text import table
from regraft.probing.report import ProbeReport, PromptProbe

_WORDS = {
    "acts": "ok: the adapter acts",
    "acts as the base": "no: the server answers as the base; the adapter does nothing",
    "otherwise than expected": "no: the adapter acts, and otherwise than expected",
    "cannot be judged": "it cannot be judged whether the adapter acts",
}
_SHOWN = 32


def render(report: ProbeReport) -> str:
    """Return the verdict, a line for each prompt, and the notes."""
    head = ("prompt", "base", "adapter", "apart", "off")
    rows = [head, *map(_row, report.prompts)]
    lines = [_WORDS[report.verdict], "", table(rows, "lllrr")]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _row(each: PromptProbe) -> tuple[str, ...]:
    texts = (_short(each.prompt), _short(each.base), _short(each.adapter))
    return (*texts, _number(each.apart), _number(each.from_expected))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
