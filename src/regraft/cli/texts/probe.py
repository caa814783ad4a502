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
    expected = any(each.from_expected is not None for each in report.prompts)
    head = ("prompt", "base", "adapter", "apart", *(("off",) if expected else ()))
    rows = [head, *(_row(each, expected) for each in report.prompts)]
    lines = [_WORDS[report.verdict], "", table(rows, "lllrr"[: len(head)]), "", _LEGEND]
    if expected:
        lines.append(_OFF.format(report.tolerance))
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


_LEGEND = (
    "apart: the largest difference of a log-probability of the first token between base and "
    "adapter;\nmore than 0.001 is another model's"
)
_OFF = "off: the same between the adapter and what was computed of the files; up to {:g} is allowed"


def _row(each: PromptProbe, expected: bool) -> tuple[str, ...]:
    texts = (_short(each.prompt), _short(each.base), _short(each.adapter))
    off = (_number(each.from_expected),) if expected else ()
    return (*texts, _number(each.apart), *off)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
