"""How the readers of this package word what is wrong with a file a stranger made."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from regraft.errors import Problem

DOWNLOAD_AGAIN = "Download or copy the file again"
SHOWN_PROBLEMS = 50
SAFE_NAME = "printable text without backslashes that is no path upwards"
_SHOWN_CHARACTERS = 120
_UNSAFE_NAME = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\\\\]"
    r"|^$|^/|(?:^|/)\.\.(?:/|$)"
)


def quoted(text: object) -> str:
    """Return ``text`` in quotes, shortened, with nothing in it that could steer a terminal."""
    shown = text if isinstance(text, str) else reprlib.repr(text)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "..."
    return "'" + "".join(map(_visible, shown)) + "'"


def _visible(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"\\u{ord(character):04x}"
    return character


def capped(problems: Sequence[Problem], where: Path) -> list[Problem]:
    """Return the first :data:`SHOWN_PROBLEMS` problems, and one more that counts the rest."""
    rest = len(problems) - SHOWN_PROBLEMS
    if rest <= 0:
        return list(problems)
    more = Problem(f"{rest} more problems of this kind are not shown", where=str(where))
    return [*problems[:SHOWN_PROBLEMS], more]


def is_unsafe_name(name: str) -> bool:
    """Return whether a tensor's name is empty, hides characters, or could act as a path upwards."""
    return _UNSAFE_NAME.search(name) is not None
