"""How the readers of this package word what is wrong with a file a stranger made."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from regraft.errors import Problem, RegraftError

Item = TypeVar("Item")
Found = TypeVar("Found")

DOWNLOAD_AGAIN = "Download or copy the file again"
SHOWN_PROBLEMS = 50
MAX_NAME_LENGTH = 1024
SAFE_NAME = (
    f"printable text of at most {MAX_NAME_LENGTH} characters, without backslashes, that is no path "
    "upwards"
)
_SHOWN_CHARACTERS = 120
_UNSAFE_NAME = re.compile(
    "[\x00-\x1f\x7f\\\\]"
    r"|^$|^/|(?:^|/)\.\.(?:/|$)"
)


def quoted(text: object) -> str:
    """Return ``text`` in quotes, shortened, with nothing in it that could steer a terminal."""
    shown = text if isinstance(text, str) else reprlib.repr(text)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "..."
    if shown.isascii() and shown.isprintable():  # as nearly all names are, of very many tensors
        return f"'{shown}'"
    return "'" + "".join(map(_visible, shown)) + "'"


def _visible(character: str) -> str:
    if _is_invisible(character):
        return f"\\u{ord(character):04x}"
    return character


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def capped(problems: Sequence[Problem], where: Path) -> list[Problem]:
    """Return the first :data:`SHOWN_PROBLEMS` problems, and one more that counts the rest."""
    rest = len(problems) - SHOWN_PROBLEMS
    if rest <= 0:
        return list(problems)
    more = Problem(f"{rest} more problems of this kind are not shown", where=str(where))
    return [*problems[:SHOWN_PROBLEMS], more]


def of_each(function: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """Return what a function returns of each item; where it refuses some, all that is wrong.

    Raises:
        RegraftError: of the class of the first refusal, with the problems of all.
    """
    found: list[Found] = []
    refused: list[RegraftError] = []
    for item in items:
        try:
            found.append(function(item))
        except RegraftError as error:
            refused.append(error)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise type(refused[0])([problem for error in refused for problem in error.problems])
    return found


def is_unsafe_name(name: str) -> bool:
    """Return whether a tensor's name is empty, hides characters, or could act as a path upwards.

    So is one that is far longer than any model's: what is done with names can take time that grows
    with the square of their length.
    """
    if len(name) > MAX_NAME_LENGTH or _UNSAFE_NAME.search(name):
        return True
    return not name.isascii() and any(map(_is_invisible, name))
