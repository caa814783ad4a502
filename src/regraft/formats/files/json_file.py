"""JSON files a stranger made: limits on size and depth, no key twice, typed errors."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from regraft.errors import FormatError
from regraft.formats.files.reading import note_content, open_regular, read_at
from regraft.formats.problems import DOWNLOAD_AGAIN, quoted

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64

_BYTES_PER_VALUE = 16
"""A file of more values than this allows takes many times its size once it is parsed."""


class DuplicateKeyError(ValueError):
    """A JSON object names the same key twice, so readers would disagree on its value."""


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; an ``object_pairs_hook`` for :func:`json.loads`.

    Raises:
        DuplicateKeyError: a key occurs twice.
    """
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise DuplicateKeyError(f"the key {quoted(twice)} occurs twice in one object")
    return fields


def read_json(
    path: Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH, unique: bool = True
) -> Any:
    """Return the value in a UTF-8 JSON file.

    A byte order mark at the beginning is passed over, as some editors write one. ``NaN`` and
    ``Infinity`` are accepted: published ``config.json`` files hold them.

    Args:
        path: the file.
        max_bytes: the largest file accepted.
        max_depth: how deep objects and lists may nest; ``{}`` has depth 1.
        unique: whether no key may occur twice in one object.

    Raises:
        FormatError: not UTF-8, not JSON, too large, too many values, too deep, or a key occurs
            twice.
        InputError: there is no such file.
        AccessError: the system refused to read it.
    """
    content = _content(path, max_bytes)
    return _parsed(str(path), content, max_bytes, max_depth, unique=unique)


def _parsed(where: str, content: bytes, max_bytes: int, max_depth: int, *, unique: bool) -> Any:
    try:
        _check_values(content, 1000 + max_bytes // _BYTES_PER_VALUE)
        value = json.loads(
            content.decode("utf-8-sig"), object_pairs_hook=unique_object if unique else dict
        )
        _check_depth(value, max_depth)
        if b"\\u" in content:  # only an escape can smuggle in half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(
            "cannot be read as JSON",
            where=where,
            expected=f"UTF-8 JSON, no key twice, at most {max_depth} levels deep",
            found=json_trouble(error),
            hint=DOWNLOAD_AGAIN,
        ) from None
    return value


def json_object_in(
    text: str, where: str, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> dict[str, Any]:
    """Return the JSON object in a text, such as a string of a file's header.

    Args:
        text: the text.
        where: the file, and what of it this is, for messages.
        max_bytes: the longest text accepted.
        max_depth: how deep objects and lists may nest.

    Raises:
        FormatError: as :func:`read_json`, and for any other value.
    """
    content = text.encode(errors="surrogatepass")
    if len(content) > max_bytes:
        raise _too_large(where, len(content), max_bytes)
    return _object(_parsed(where, content, max_bytes, max_depth, unique=True), where)


def read_json_object(
    path: Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> dict[str, Any]:
    """Return the object in a JSON file; raises as :func:`read_json`, and for any other value."""
    return read_object_and_bytes(path, max_bytes=max_bytes, max_depth=max_depth)[0]


def read_object_and_bytes(
    path: Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> tuple[dict[str, Any], bytes]:
    """Return the object in a JSON file and the file's content; raises as the above."""
    content = _content(path, max_bytes)
    value = _parsed(str(path), content, max_bytes, max_depth, unique=True)
    return _object(value, str(path)), content


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(
            "holds the wrong kind of JSON value",
            where=where,
            expected="an object, {...}",
            found=f"a {type(value).__name__}",
            hint=DOWNLOAD_AGAIN,
        )
    return value


def json_trouble(error: ValueError | RecursionError) -> str:
    """Return in a few words why :func:`json.loads` or its hooks gave up."""
    if isinstance(error, RecursionError):
        return "objects or lists nested too deep"
    if isinstance(error, UnicodeDecodeError):
        return f"a byte that is not UTF-8 at {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair in a string"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return str(error)


def _content(path: Path, max_bytes: int) -> bytes:
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > max_bytes:
            raise _too_large(str(path), size, max_bytes)
        content = read_at(fd, path, 0, size)
        note_content(path, content)
        return content
    finally:
        os.close(fd)


def _too_large(where: str, size: int, max_bytes: int) -> FormatError:
    return FormatError(
        "is too large for a JSON file of its kind",
        where=where,
        expected=f"at most {max_bytes} bytes",
        found=f"{size} bytes",
        hint="Check that this is the file you mean",
    )


def _check_values(content: bytes, limit: int) -> None:
    found = content.count(b",") + content.count(b"[") + content.count(b"{")
    if found > limit:
        raise ValueError(f"{found} brackets and commas, where at most {limit} are expected")


def _check_depth(value: Any, max_depth: int) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    depth = 0
    while level:
        depth += 1
        if depth > max_depth:
            raise ValueError(f"more than {max_depth} levels")
        children = (child for node in level for child in _children(node))
        level = [child for child in children if isinstance(child, (dict, list))]


def _children(node: dict[str, Any] | list[Any]) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node
