"""The rooms of the package, and how much of each is called by tests that were traced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def rooms_of(package: Path) -> dict[str, list[str]]:
    """Return the modules of each folder of a package, as paths below the package.

    A module that only re-exports (``__init__``) counts as none: nothing in it can be called.
    """
    rooms: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        if path.name != "__init__.py":
            name = path.relative_to(package).as_posix()
            rooms.setdefault(name.rpartition("/")[0] or ".", []).append(name)
    return dict(sorted(rooms.items()))


def files_called(calls: Mapping[str, tuple[float, Iterable[str]]]) -> set[str]:
    """Return the files with a function that a test called; import time alone does not count.

    Args:
        calls: what ``mutants.tracing`` writes: by test, its seconds and ``file:qualified name``.
    """
    named = (name for _, functions in calls.values() for name in functions)
    return {
        file for file, _, function in (name.partition(":") for name in named)
        if function != "<module>"
    }  # fmt: skip


def shares(rooms: Mapping[str, Sequence[str]], called: set[str]) -> dict[str, tuple[int, int]]:
    """Return of each room how many of its modules are called, and how many it has."""
    return {room: (sum(f in called for f in files), len(files)) for room, files in rooms.items()}


def table(found: Mapping[str, tuple[int, int]]) -> str:
    """Return a line for each room."""
    width = max(map(len, found))
    return "\n".join(f"{room:{width}}  {some} of {all_}" for room, (some, all_) in found.items())
