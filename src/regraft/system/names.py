"""Which names a file can have here, and which of them the file system takes for the same."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

_RESERVED = re.compile(
    r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[0-9¹²³])\s*(?:\.|\Z)", re.I
)
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')


def trouble_of_name(name: str, separator: str = os.sep) -> str:
    """Return why no file can have a name here, "" if one can: Windows has rules for that.

    Args:
        name: the last part of a path.
        separator: between the parts of paths here; a backslash tells of Windows' rules.
    """
    if separator != "\\":
        return ""
    if _RESERVED.match(name):
        return "is a device's name"
    if found := _FORBIDDEN.search(name):
        return f"holds {found[0]!r}"
    return "ends in a dot or a space" if name != name.rstrip(". ") else ""


def same_names(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of names that differ in case or the composition of letters alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def are_one(folder: Path, one: str, other: str) -> bool:
    """Whether two names of a folder that is there would be one file: it is tried.

    Raises:
        OSError: the system refused.
    """
    probe = folder / f"probe-{_flat(one)}"
    probe.touch()
    try:
        return os.path.lexists(folder / f"probe-{_flat(other)}")
    finally:
        probe.unlink()


def taken_by(path: Path) -> str | None:
    """Return the name of the file that is at a path under another name; None if there is none.

    Raises:
        OSError: the system refused.
    """
    if not os.path.lexists(path):
        return None
    names = [entry.name for entry in path.parent.iterdir()]
    same = [name for name in names if _folded(name) == _folded(path.name)]
    here = [name for name in same if _composed(name) == _composed(path.name)]
    return same[0] if same and not here else None


def _flat(name: str) -> str:
    return name.replace("/", "-")


def _folded(name: str) -> str:
    return _composed(_composed(name).casefold())


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
