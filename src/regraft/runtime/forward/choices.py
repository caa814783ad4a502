"""Adapters that answer together, as a call names them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from regraft.errors import UsageError

if TYPE_CHECKING:
    from regraft.runtime.forward.selection import Named

Choice = str | Sequence[str] | Mapping[str, float] | None
"""Adapters that answer together: a name, names, names with weights; None for no adapter."""


def listed(names: Named) -> str:
    """Return adapters with their weights, as messages name them."""
    shown = [repr(name) if weight == 1 else f"{name!r}: {weight:g}" for name, weight in names]
    return ", ".join(shown) or "none"


def named(adapters: Choice) -> Named:
    """Return adapters by name with their weights.

    Raises:
        UsageError: a weight is no finite number, or a name comes twice.
    """
    if adapters is None:
        return ()
    if isinstance(adapters, str):
        return ((adapters, 1.0),)
    if not isinstance(adapters, Mapping):
        if len(set(adapters)) < len(adapters):
            raise UsageError(
                "an adapter is named twice", where=", ".join(map(repr, adapters)),
                hint="Give it a weight instead: {name: 2.0}",
            )  # fmt: skip
        return tuple((name, 1.0) for name in adapters)
    for name, weight in adapters.items():
        if not _is_number(weight):
            raise UsageError(
                "an adapter's weight has to be a number", where=repr(name), found=repr(weight)[:40]
            )
    return tuple((name, float(weight)) for name, weight in adapters.items())


def _is_number(weight: object) -> bool:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        return False
    try:
        return math.isfinite(weight)
    except OverflowError:  # more than any float
        return False
