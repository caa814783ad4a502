"""Words of strangers in Markdown: none of them ends a table, a block of code, or a line."""

from __future__ import annotations

import re

from regraft.formats.files.text import visible

_TICKS = re.compile("`+")
_MARKS = re.compile(r"[\\`*<>\[\]|&~!#]|(?<![^\W_])_|_(?![^\W_])")


def prose(text: str) -> str:
    """Return a text that reads the same in a line of Markdown, whatever marks it holds."""
    return _MARKS.sub(lambda found: f"\\{found[0]}", visible(text))


def code(text: str) -> str:
    """Return a text as code in a line; "" for nothing."""
    return _code(visible(text))


def cell(text: str) -> str:
    """Return a text as code in a cell of a table, which a bar would end."""
    return _code(visible(text).replace("|", "\\x7c" if "\\" in text else "\\|"))


def _code(shown: str) -> str:
    ticks = _fence(shown, 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{space}{shown}{space}{ticks}" if shown else ""


def block(content: str, language: str = "") -> str:
    """Return lines as a block of code that ends where they do."""
    fence = _fence(content, 3)
    return f"{fence}{language}\n{visible(content, keep=chr(10))}\n{fence}"


def _fence(content: str, least: int) -> str:
    """Return more backticks than stand together anywhere in a text, and at least so many."""
    longest = max(map(len, _TICKS.findall(content)), default=0)
    return "`" * (max(least, longest + 1) if longest >= least else least)
