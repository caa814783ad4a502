"""Checks that several engines share, made of their data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from regraft.engines.facts import Check, Settings
from regraft.engines.report import Finding
from regraft.engines.subject import Subject
from regraft.shrinking.targets import Pair

CLOSE = 1e-6
"""Scales that differ by less, relative to the larger one, are the same: engines hold float32."""


def rank_limit(option: str, default: int, largest: int | None, shown: str, way_out: str) -> Check:
    """Return the check that no rank is above what a server was started for.

    Args:
        option: the server's option that says it, as Python spells it.
        default: what it is where it is not given.
        largest: the most that it can be, None for no limit.
        shown: the option as the command line spells it.
        way_out: what to do about a rank above the largest one.
    """

    def check(subject: Subject, settings: Settings) -> Iterator[Finding]:
        limit = int(settings.get(option, default))
        highest = max((pair.rank for pair in subject.pairs), default=0)
        enough = largest is None or highest <= largest
        raised = f"Start the server with `{shown} N`, N at least {highest}; or: {way_out}"
        for pair in subject.pairs:
            if pair.rank > limit:
                because = f"its rank {pair.rank} is above {shown} {limit}"
                yield Finding("refuses", pair.name, because, raised if enough else way_out)

    return check


def scales(applied: Callable[[Subject, Pair], float], because: str, way_out: str) -> Check:
    """Return the check that a delta's scale is the one that an engine computes.

    Args:
        applied: what the engine multiplies a module's delta by.
        because: why that may be another number.
        way_out: what to do where it is.
    """

    def check(subject: Subject, settings: Settings) -> Iterator[Finding]:
        del settings
        for pair in subject.pairs:
            used = applied(subject, pair)
            if not math.isclose(used, pair.scale, rel_tol=CLOSE):
                yield Finding("other scale", pair.name, because, way_out, pair.scale, used)

    return check


def every_part(subject: Subject) -> list[str]:
    """Return the names of everything that an adapter brings."""
    return [
        *(pair.name for pair in subject.pairs),
        *(whole.parameter for whole in subject.adapter.whole),
        *(rows.module for rows in subject.adapter.token_rows),
    ]
