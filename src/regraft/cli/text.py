"""Numbers and tables as people read them. Pure functions: nothing here prints."""

from __future__ import annotations

import math
from collections.abc import Sequence

_THOUSANDS = ("", "k", "M", "G", "T", "P")


def _scaled(value: float, names: Sequence[str]) -> str:
    """Return ``value`` with three digits and the decimal prefix that fits."""
    power = 0
    while value >= 999.5 and power < len(names) - 1:
        value /= 1000
        power += 1
    if power == 0 or value >= 99.95:
        digits = f"{value:.0f}"
    else:
        digits = f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    return f"{digits} {names[power]}".rstrip()


def size(nbytes: float) -> str:
    """Return bytes in decimal units, as disks are sold: ``"3.09 GB"``."""
    return _scaled(nbytes, [f"{prefix}B" for prefix in _THOUSANDS])


def memory(nbytes: float) -> str:
    """Return bytes in MiB, the unit of ``--max-memory``: ``"312 MiB"``."""
    return f"{nbytes / 2**20:.0f} MiB"


def count(value: float) -> str:
    """Return a number of parameters: ``"1.54 B"`` is 1.54 thousand million."""
    return _scaled(value, ("", "k", "M", "B", "T"))


def plural(number: int, noun: str) -> str:
    """Return ``"1 shard"`` or ``"2 shards"``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def percent(share: float | None) -> str:
    """Return a share of one as a percentage with three digits that count."""
    if share is None or not math.isfinite(share):
        return "-"
    value = 100 * share
    if value == 0 or value >= 99.95:
        return f"{value:.0f}%"
    return f"{value:.2g}%" if value < 0.1 else f"{value:.3g}%"


def seconds(value: float) -> str:
    """Return a duration: ``"0.31 s"``, ``"12.4 s"`` or ``"3 min 20 s"``."""
    if value >= 120:
        return f"{int(value) // 60} min {int(value) % 60} s"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def table(rows: Sequence[Sequence[str]], align: str, indent: str = "") -> str:
    """Return ``rows`` in aligned columns.

    Args:
        rows: cells, all rows of the same length.
        align: one letter per column, ``l`` (left) or ``r`` (right).
        indent: put before each line.
    """
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(indent + _line(row, widths, align).rstrip() for row in rows)


def _line(row: Sequence[str], widths: Sequence[int], align: str) -> str:
    cells = zip(row, widths, align, strict=True)
    return "  ".join(c.ljust(width) if side == "l" else c.rjust(width) for c, width, side in cells)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Return labels and values in two columns, without the rows whose value is empty."""
    return table([row for row in rows if row[1]], "ll")


def printable(text: str, keep: str = "\n") -> str:
    """Return ``text`` with control characters spelled out, but for those to ``keep``.

    Names of tensors come from strangers' files: one must not move the cursor of a terminal.
    """
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted distinct numbers as ``"0..3,7"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def some_of(names: Sequence[str], shown: int) -> str:
    """Return how many names there are, and the first of them: ``"3: a, b and 1 more"``; "" of none.

    Args:
        names: the names.
        shown: how many are listed before the rest is counted.
    """
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)}: {', '.join(names[:shown])}{more}"
