"""Figures as the demo shows them."""

from __future__ import annotations

from collections.abc import Sequence


def size(nbytes: float) -> str:
    """Return bytes in decimal megabytes: ``"269.1 MB"``."""
    return f"{nbytes / 1e6:.1f} MB"


def memory(nbytes: float) -> str:
    """Return bytes in MiB, the unit of ``--max-memory``: ``"212 MiB"``."""
    return f"{nbytes / 2**20:.0f} MiB"


def seconds(value: float) -> str:
    """Return a duration: ``"2.3 s"``."""
    return f"{value:.1f} s"


def milliseconds(value: float) -> str:
    """Return a short duration: ``"0.02 ms"``."""
    return f"{1000 * value:.2g} ms" if value < 0.1 else f"{1000 * value:.0f} ms"


def percent(share: float) -> str:
    """Return a share of one with two digits that count: ``"0.031%"``."""
    return f"{100 * share:.2g}%"


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return rows of label, figure and remark in columns; the figures end at the same place."""
    labels = max(len(label) for label, _, _ in rows)
    figures = max(len(figure) for _, figure, _ in rows)
    return "\n".join(
        f"{label:<{labels}}  {figure:>{figures}}  {remark}".rstrip()
        for label, figure, remark in rows
    )
