"""The summary a shrink ends with, as text."""

from __future__ import annotations

from collections import Counter
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
from regraft.shrinking.report import EmbeddingCopy, ShrinkReport, ShrunkModule

FARTHEST = 5
"""Modules listed under "farthest off"."""

SHOWN = 8
"""Names of files listed before the rest is counted."""


def render(report: ShrinkReport) -> str:
    """Return the summary of a finished shrink."""
    parts = [_overview(report), _farthest(report.modules), _notes(report.notes), _end(report)]
    return "\n\n".join(part for part in parts if part)


def _overview(report: ShrinkReport) -> str:
    revision = f" at {report.revision}" if report.revision else ""
    rows = [
        ("adapter", f"{report.adapter}{revision}"),
        ("dtype", _dtypes(report)),
        ("rank", _ranks(report.modules)),
        ("error", _error(report)),
        ("copies", _copies(report.copies)),
        ("size", _sizes(report)),
        ("files", some_of(report.files, SHOWN)),
        ("left out", some_of(report.left_out, SHOWN)),
        ("time", seconds(report.seconds)),
        ("memory", f"{memory(report.peak_memory)} at peak"),
    ]
    return pairs(rows)


def _dtypes(report: ShrinkReport) -> str:
    before = " and ".join(report.dtypes_before)
    return report.dtype if before in ("", report.dtype) else f"{before} -> {report.dtype}"


def _ranks(modules: Sequence[ShrunkModule]) -> str:
    """Return the ranks before and after: ``"64 modules: 16 -> 3..5,8 (4.2 on average)"``."""
    if not modules:
        return ""
    before, after = ([m.rank_before for m in modules], [m.rank_after for m in modules])
    text = f"{plural(len(modules), 'module')}: {ranges(sorted(set(before)))}"
    if before == after:
        return f"{text}, as before"
    mean = sum(after) / len(after)
    average = f" ({mean:.1f} on average)" if len(set(after)) > 1 else ""
    return f"{text} -> {ranges(sorted(set(after)))}{average}"


def _error(report: ShrinkReport) -> str:
    if not report.modules:
        return ""
    return f"|delta-delta'|/|delta| {percent(report.error)} over all modules, rounding included"


def _copies(copies: Sequence[EmbeddingCopy]) -> str:
    """Return the copies of embeddings by what became of them."""
    taken: Counter[str] = Counter()
    for copy in copies:
        taken["dropped" if copy.outcome == "dropped" else "kept"] += copy.bytes
    count = Counter("dropped" if copy.outcome == "dropped" else "kept" for copy in copies)
    reason = {"dropped": "the base's own", "kept": "see below"}
    return ", ".join(
        f"{plural(count[what], 'embedding')} {what}, {size(taken[what])} ({reason[what]})"
        for what in ("dropped", "kept")
        if count[what]
    )


def _sizes(report: ShrinkReport) -> str:
    before, after = report.bytes_before, report.bytes_after
    share = percent(after / before) if before else "-"
    return f"{size(before)} -> {size(after)} ({share}), {plural(report.tensors, 'tensor')}"


def _farthest(modules: Sequence[ShrunkModule]) -> str:
    """Return a table of the modules whose delta is off by most, for its size."""
    off = sorted((m for m in modules if m.error > 0), key=lambda m: m.error, reverse=True)
    if not off:
        return ""
    rows: list[tuple[str, ...]] = [("farthest off", "|delta-delta'|/|delta|", "rank", "kept")]
    rows += [(m.name, percent(m.error), _rank(m), percent(m.kept)) for m in off[:FARTHEST]]
    return table(rows, "lrrr")


def _rank(module: ShrunkModule) -> str:
    if module.rank_before == module.rank_after:
        return str(module.rank_after)
    return f"{module.rank_before} -> {module.rank_after}"


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(f"note: {note}" for note in notes)


def _end(report: ShrinkReport) -> str:
    return f"shrunk into {report.output}"
