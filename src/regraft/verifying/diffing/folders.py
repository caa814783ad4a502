"""What differs beside the tensors: the configs, and the files that travel along."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regraft.formats.files.reading import open_regular, typed_os_errors
from regraft.merging.files.side_files import travels
from regraft.verifying.diffing.report import Change, ConfigChange, FileChange

_SETS = frozenset(("target_modules", "exclude_modules", "modules_to_save"))
_CHUNK = 2**20


def config_changes(x: Any, y: Any, path: tuple[str, ...]) -> Iterator[ConfigChange]:
    """Yield the differences of two JSON values, objects key by key."""
    if not (isinstance(x, Mapping) and isinstance(y, Mapping)):
        if not _equal(x, y, as_set=bool(path) and path[-1] in _SETS):
            yield ConfigChange(".".join(path), "changed", x, y)
        return
    for key in dict.fromkeys((*x, *y)):
        inner = (*path, key)
        if key not in y:
            yield ConfigChange(".".join(inner), "removed", x[key], None)
        elif key not in x:
            yield ConfigChange(".".join(inner), "added", None, y[key])
        else:
            yield from config_changes(x[key], y[key], inner)


def _equal(x: Any, y: Any, *, as_set: bool = False) -> bool:
    """Whether two JSON values mean the same: 1 is 1.0 but not true, and NaN is NaN.

    Args:
        x: a value.
        y: another.
        as_set: whether a list stands for a set; PEFT writes those in any order.
    """
    if isinstance(x, bool) or isinstance(y, bool):
        return x is y
    if isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y):
        return True
    if isinstance(x, list) and isinstance(y, list):
        if as_set:
            x, y = sorted(x, key=repr), sorted(y, key=repr)
        return len(x) == len(y) and all(map(_equal, x, y))
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        return x.keys() == y.keys() and all(_equal(x[key], y[key]) for key in x)
    return bool(x == y)


def file_changes(x: Path | None, y: Path | None) -> tuple[FileChange, ...]:
    """Return the files that travel with the weights and differ, in order of name."""
    if x is None or y is None:
        return ()
    ours, theirs = _side_files(x), _side_files(y)
    found: dict[str, Change] = {
        **dict.fromkeys(ours - theirs, "removed"),
        **dict.fromkeys(theirs - ours, "added"),
        **dict.fromkeys((n for n in ours & theirs if _differ(x / n, y / n)), "changed"),
    }
    return tuple(FileChange(name, found[name]) for name in sorted(found))


def _side_files(folder: Path) -> set[str]:
    with typed_os_errors(folder):
        return {p.name for p in folder.iterdir() if travels(p.name, code=True) and p.is_file()}


def _differ(x: Path, y: Path) -> bool:
    with (
        typed_os_errors(x),
        os.fdopen(open_regular(x), "rb") as one,
        os.fdopen(open_regular(y), "rb") as other,
    ):
        if os.fstat(one.fileno()).st_size != os.fstat(other.fileno()).st_size:
            return True
        while piece := one.read(_CHUNK):
            if piece != other.read(_CHUNK):
                return True
    return False
