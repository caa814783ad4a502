"""Names of files and words of strangers, as text that can be stored, shown and pasted.

On Linux a name is bytes. Those that are not UTF-8 reach Python as lone surrogates
(``surrogateescape``), which neither JSON nor a terminal takes.
"""

from __future__ import annotations

import os
import re
import shlex

_SPELLED = re.compile(r"\\x[89a-f][0-9a-f]")
_ESCAPE = re.compile(rb"\\\\|\\x([89a-f][0-9a-f])")


def spelled(name: str) -> str:
    """Return a path's name as text that no other name has; of most names, the name itself.

    Bytes that are not UTF-8 become ``\\xff`` and the like. In their names, and in those that hold
    such letters anyway, a backslash is doubled, so that :func:`unspelled` tells them apart.
    """
    raw = _bytes(name)
    if _is_text(name) and not _SPELLED.search(name):
        return name
    return raw.replace(b"\\", b"\\\\").decode(errors="backslashreplace")


def unspelled(text: str) -> str:
    """Return the name that :func:`spelled` made a text of; of any other text, the text itself."""
    if not _SPELLED.search(text):
        return text
    raw = _ESCAPE.sub(
        lambda found: bytes.fromhex(found[1].decode()) if found[1] else b"\\",
        text.encode(errors="surrogatepass"),
    )
    name = os.fsdecode(raw)
    return name if spelled(name) == text else text


def plain_text(text: str) -> str:
    """Return a text with halves of surrogate pairs spelled out, so that it can be encoded."""
    return text if _is_text(text) else text.encode(errors="backslashreplace").decode()


def visible(text: str, keep: str = "") -> str:
    """Return a text with all that is no printable character spelled out, but for ``keep``."""
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def python_string(text: str) -> str:
    """Return a text as a literal of Python, in double quotes and on one line."""
    return '"' + visible(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def shell_word(text: str) -> str:
    """Return a text as one word of a shell (bash, zsh and their like), on one line.

    It is quoted where it has to be; what is not printable is spelled out, as in ``$'a\\nb'``.
    """
    if text.isprintable():
        quoted = shlex.quote(text)
        return f"'{text}'" if quoted.startswith("=") else quoted  # zsh expands =name
    return "$'" + "".join(map(_in_shell, text)) + "'"


def path_word(name: str) -> str:
    """Return a path as a word of a shell that no program takes for an option."""
    return shell_word(f"./{name}" if name.startswith("-") else name)


def _in_shell(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in _bytes(character))


def _bytes(text: str) -> bytes:
    """Return what a name is on the disk; of other surrogates, what Python calls them."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
