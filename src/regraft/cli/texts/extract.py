"""The summary an extraction ends with, as text."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.cli.text import (
    memory,
    pairs,
    percent,
    plural,
    ranges,
    seconds,
    size,
    some_of,
    table,
)
from regraft.extracting.report import ExtractedModule, ExtractReport

_OFF = "|delta-delta'|/|delta|"

FARTHEST = 5
"""Modules listed under "farthest off"."""

SHOWN = 6
"""Names listed before the rest is counted."""


def render(report: ExtractReport) -> str:
    """Return the summary of an extraction."""
    parts = [_overview(report), _farthest(report.modules), f"extracted into {report.output}"]
    return "\n\n".join(part for part in parts if part)


def _overview(report: ExtractReport) -> str:
    ranks = sorted({module.rank for module in report.modules})
    found = f"{plural(len(report.modules), 'module')}, rank {ranges(ranks)}" if ranks else ""
    rows = [
        ("base", report.base),
        ("fine-tuned", report.tuned),
        ("factors", "the adapter that was merged, exactly" if report.exact else found),
        ("whole", some_of(report.whole, SHOWN)),
        ("left out", some_of(report.left_out, SHOWN)),
        ("unchanged", plural(report.unchanged, "tensor")),
        ("error", "" if report.exact else f"{_OFF} {percent(report.error)} over all modules"),
        ("uncertain", _uncertain(report)),
        ("size", size(report.bytes)),
        ("time", seconds(report.seconds)),
        ("memory", f"{memory(report.peak_memory)} at peak"),
    ]
    return pairs(rows)


def _uncertain(report: ExtractReport) -> str:
    if report.exact or not report.modules:
        return ""
    return f"{percent(report.uncertain)} of the difference is the rounding of TUNED"


def _farthest(modules: Sequence[ExtractedModule]) -> str:
    """Return a table of the modules whose factors are off by most, for their size."""
    off = sorted((m for m in modules if m.error > 0), key=lambda m: m.error, reverse=True)
    if not off:
        return ""
    rows: list[tuple[str, ...]] = [("farthest off", _OFF, "rounding of TUNED", "rank")]
    rows += [(m.name, percent(m.error), percent(m.uncertain), str(m.rank)) for m in off[:FARTHEST]]
    return table(rows, "lrrr")
