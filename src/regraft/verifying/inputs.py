"""What ``verify`` is asked, made ready: adapters with weights, choices, threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.errors import UsageError
from regraft.merging.planning import Choices, default_threads
from regraft.tensors import parse_size

AdapterArg = str | Path | tuple[str | Path, float]
"""An adapter: a path or Hub id, ``"path=0.5"``, or ``(path, 0.5)``."""


def parse_adapters(adapters: AdapterArg | Sequence[AdapterArg] | None) -> list[tuple[str, float]]:
    """Return ``(source, weight)`` for every adapter, however it was given.

    Raises:
        UsageError: a weight is not a finite number.
    """
    if adapters is None:
        return []
    if isinstance(adapters, str | Path) or _is_pair(adapters):
        adapters = [adapters]  # type: ignore[list-item]
    return [_parse_adapter(adapter) for adapter in adapters]  # type: ignore[arg-type]


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)


def _parse_adapter(adapter: AdapterArg) -> tuple[str, float]:
    if isinstance(adapter, tuple):
        return str(adapter[0]), _weight(adapter[1], str(adapter[0]))
    text = str(adapter)
    if "=" not in text or Path(text).exists():
        return text, 1.0
    source, _, weight = text.rpartition("=")
    return source, _weight(weight, text)


def _weight(value: float | str, where: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = float("nan")
    if weight != weight or weight in (float("inf"), float("-inf")):
        raise UsageError(
            "an adapter's weight has to be a number", where=where, expected="ADAPTER=WEIGHT",
            found=f"weight {value!r}", hint="Write for example ./adapter=0.5",
        )  # fmt: skip
    return weight


def parse_choices(max_memory: str | int, threads: int | None) -> Choices:
    """Return the choices for doing the merge again.

    Raises:
        UsageError: the size is none, or there is no thread.
    """
    try:
        size = parse_size(max_memory)
    except (ValueError, OverflowError) as error:
        raise UsageError(str(error), where="--max-memory") from None
    if threads is not None and threads < 1:
        raise UsageError("threads has to be at least 1", where="--threads", found=str(threads))
    return Choices(None, None, size, threads or default_threads())
