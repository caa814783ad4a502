"""The summary an un-merge ends with, as text."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.cli.text import pairs, plural, size
from regraft.cli.texts.receipt import peak, speed
from regraft.merging.planning.report import UnmergeReport
from regraft.tensors import parse_size

SHOWN = 8
"""Names of files listed before the rest is counted."""


def render(report: UnmergeReport, *, cap: str | int) -> str:
    """Return the summary of a finished un-merge.

    Args:
        report: what ``unmerge`` returned.
        cap: the memory cap it ran under, as given.
    """
    restored = f"{plural(report.tensors, 'tensor')}, {size(report.bytes_written)}"
    rows = [
        ("merged", report.merged),
        ("base", f"{report.base} (as the merge named it)"),
        ("restored", f"{restored}; every tensor has the digest of the base's"),
        ("files", _listed(report.files)),
        ("left out", _left_out(report.left_out)),
        ("time", speed(report.bytes_written, report.seconds, report.threads)),
        ("memory", peak(report.peak_memory, parse_size(cap))),
    ]
    return f"{pairs(rows)}\n\nun-merged into {report.output}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(names[:SHOWN])}{more}"


def _left_out(names: Sequence[str]) -> str:
    return f"{_listed(names)} (in the base's folder, but not kept by the merge)" if names else ""
