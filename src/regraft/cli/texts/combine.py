"""The summary a combination ends with, as text."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.cli.text import memory, pairs, percent, plural, ranges, seconds, size, table
from regraft.combining.report import CombinedModule, CombineReport

_OFF = "|delta-delta'|/|delta|"

FARTHEST = 5
"""Modules listed under "farthest off"."""


def render(report: CombineReport) -> str:
    """Return the summary of a combination."""
    parts = [
        _overview(report), _between(report), _farthest(report.modules), report.advice,
        "\n".join(f"note: {note}" for note in report.notes), _end(report),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _overview(report: CombineReport) -> str:
    named = zip(report.adapters, report.weights, strict=True)
    told = "".join(f", {name} {value:g}" for name, value in report.options.items())
    ranks = sorted({module.rank for module in report.modules})
    rows = [
        ("adapters", ", ".join(f"{name} x {weight:g}" for name, weight in named)),
        ("method", f"{report.method}{told}"),
        ("modules", f"{len(report.modules)}, rank {ranges(ranks)}" if ranks else ""),
        ("error", f"{_OFF} {percent(report.error)} over all modules, rounding included"),
        ("size", f"{size(report.bytes)}, {plural(report.tensors, 'tensor')} of {report.dtype}"),
        ("time", seconds(report.seconds)),
        ("memory", f"{memory(report.peak_memory)} at peak"),
    ]  # fmt: skip
    return pairs(rows)


def _between(report: CombineReport) -> str:
    """Return a table of how each two adapters stand to each other."""
    names, n = report.adapters, len(report.adapters)
    if n < 2:
        return ""
    rows: list[tuple[str, ...]] = [("between", "cosine", "signs differ")]
    rows += [
        (f"{names[j]} and {names[i]}", f"{report.cosines[i][j]:.3f}",
         percent(report.disagreement[i][j]))
        for i in range(n) for j in range(i)
    ]  # fmt: skip
    return table(rows, "lrr")


def _farthest(modules: Sequence[CombinedModule]) -> str:
    """Return a table of the modules whose delta is off by most, for its size."""
    off = sorted((m for m in modules if m.error > 1e-6), key=lambda m: m.error, reverse=True)
    if not off:
        return ""
    rows: list[tuple[str, ...]] = [("farthest off", _OFF, "rank", "kept")]
    rows += [(m.name, percent(m.error), _rank(m), percent(m.kept)) for m in off[:FARTHEST]]
    return table(rows, "lrrr")


def _rank(module: CombinedModule) -> str:
    before = sum(module.ranks)
    return str(module.rank) if before == module.rank else f"{before} -> {module.rank}"


def _end(report: CombineReport) -> str:
    return f"combined into {report.output}" if report.output else "dry run: nothing was written"
