"""The answer of ``clean``, as text and as JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from regraft.cli.text import plural, size, table
from regraft.merging.files.leftovers import Leftover

_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def render(found: Sequence[Leftover], *, dry_run: bool) -> str:
    """Return what was found as a table, and the sum of what was removed.

    Args:
        found: what ``clean`` returned.
        dry_run: whether it only looked.
    """
    if not found:
        return "nothing to clean"
    now = time.time()
    rows = [("folder", "output", "size", "age", "state")]
    rows += [
        (each.path, each.output, size(each.bytes), age(now - each.modified), state(each, dry_run))
        for each in found
    ]
    idle = [each for each in found if each.own and not each.busy]
    done = "would be removed" if dry_run else "removed"
    total = f"{plural(len(idle), 'folder')}, {size(sum(each.bytes for each in idle))} {done}"
    return f"{table(rows, 'llrrl')}\n\n{total}"


def payload(found: Sequence[Leftover], *, dry_run: bool) -> dict[str, Any]:
    """Return the same as JSON-ready objects."""
    return {"leftovers": [asdict(each) | {"state": state(each, dry_run)} for each in found]}


def state(leftover: Leftover, dry_run: bool) -> str:
    """Return what became of a folder."""
    if leftover.busy:
        return "in use"
    if not leftover.own:
        return "another user's"
    return "would be removed" if dry_run else "removed"


def age(seconds: float) -> str:
    """Return how long ago, in the largest unit that fits: ``"3 hours"``."""
    whole = max(int(seconds), 0)
    name, length = next((unit for unit in _UNITS if whole >= unit[1]), _UNITS[-1])
    return plural(whole // length, name)
