"""Checks that several engines share, made of their data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files

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


@cache
def _kinds() -> dict[str, frozenset[str]]:
    text = files("regraft.engines").joinpath("model_kinds.json").read_text("utf-8")
    return {engine: frozenset(kinds) for engine, kinds in json.loads(text).items()}


def has_model(engine: str, kind: str | None) -> bool:
    """Whether an engine has models of a kind, by the name that it looks for; True if none is known.

    Args:
        engine: its name, a key of ``model_kinds.json``.
        kind: the class of transformers, or the model type for mlx-lm.
    """
    return kind is None or kind in _kinds()[engine]


def model_is_known(engine: str, kind: Callable[[Subject], str | None]) -> Check:
    """Return the check that an engine has models of the base's kind.

    Args:
        engine: its name.
        kind: what the engine calls the kind of a base.
    """

    def check(subject: Subject, settings: Settings) -> Iterator[Finding]:
        del settings
        found = kind(subject)
        if not has_model(engine, found):
            because = f"it has no model of the kind {found}"
            yield from (
                Finding("refuses", name, because, ANOTHER_ENGINE) for name in every_part(subject)
            )

    return check


ANOTHER_ENGINE = "Serve the model with an engine that has it; merging does not help here"


def every_part(subject: Subject) -> list[str]:
    """Return the names of everything that an adapter brings."""
    return [
        *(pair.name for pair in subject.pairs),
        *(whole.parameter for whole in subject.adapter.whole),
        *(rows.module for rows in subject.adapter.token_rows),
    ]
