"""Patterns of ranks and alphas that PEFT's lookup turns into given values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from regraft.adapters.patterns import Expressions, FirstMatch, is_plain

_Value = TypeVar("_Value", int, float)


def patterns(values: Mapping[str, _Value], default: _Value) -> dict[str, _Value]:
    """Return the patterns by which PEFT's lookup gives every name its value.

    The first pattern that matches a name, or what follows one of its dots, wins. A name can end
    with another one, and a dot stands for any character. So longer names come first, and of those
    of one length the ones with fewer dots; then nobody's own name comes after one that matches it
    too. A name whose value is the default needs a pattern only where another one's would match it.

    Args:
        values: by name.
        default: the value of names that no pattern matches.
    """
    ordered = sorted(values, key=lambda name: (-len(name), name.count("."), name))
    needed = {name for name in ordered if values[name] != default}
    while True:
        named = [name for name in ordered if name in needed]
        found = {_as_pattern(name): values[name] for name in named}
        lookup = FirstMatch(tuple(found.items()), Expressions("the new config"))
        wrong = {name for name in ordered if lookup.find(name, default) != values[name]}
        if not wrong - needed:
            return found
        needed |= wrong


def _as_pattern(name: str) -> str:
    """Return an expression that matches a name; plain ones stay, as they are looked up fast."""
    return name if is_plain(name) else re.escape(name)
