"""The summary an export ends with, as text."""

from __future__ import annotations

from regraft.cli.text import pairs, plural, seconds, size
from regraft.exporting.report import ExportReport

SHOWN = 8
"""Names of files listed before the rest is counted."""


def render(report: ExportReport) -> str:
    """Return the summary of a finished export."""
    rows = [
        ("model", report.model),
        ("for", report.engine),
        ("kind", report.architecture),
        ("tensors", _types(report)),
        ("tokenizer", report.tokenizer),
        ("config", ", ".join(report.changes)),
        ("files", _listed(report.files)),
        ("size", size(report.nbytes)),
        ("time", seconds(report.seconds)),
    ]
    return f"{pairs(rows)}\n\nwritten: {report.output}"


def _types(report: ExportReport) -> str:
    """Return how many tensors have each type: ``"211 BF16, 61 F32"``."""
    return ", ".join(f"{number} {kind}" for kind, number in report.types.items())


def _listed(names: tuple[str, ...]) -> str:
    rest = len(names) - SHOWN
    shown = ", ".join(names[:SHOWN])
    return shown if rest <= 0 else f"{shown} and {plural(rest, 'other')}"
