"""Odd values of JSON, and bytes with small changes: what mutated files are made with."""

from __future__ import annotations

import copy
import json
import random
from json.encoder import encode_basestring
from typing import Any


class Raw:
    """A piece of JSON as text."""

    def __init__(self, text: str) -> None:
        """Take the text."""
        self.text = text


class Pairs(list[tuple[Any, Any]]):
    """A JSON object as a list of pairs, so that it can hold a key twice."""


def to_json(value: Any) -> str:
    """Return JSON for a value that may hold :class:`Raw` and :class:`Pairs`."""
    if type(value) is str:
        return encode_basestring(value)
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, (dict, Pairs)):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ",".join(f"{to_json(key)}:{to_json(item)}" for key, item in pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(to_json, value)) + "]"
    return _number(value) if type(value) is int else json.dumps(value, ensure_ascii=False)


_TOO_LONG = 10**4000
"""From here on Python writes no digits."""


def _number(value: int) -> str:
    return str(value) if abs(value) < _TOO_LONG else f"1{'0' * 5000}"


ODD_NUMBERS: tuple[Any, ...] = (
    -1, -(2**63), 0, 1, 2, 3, 7, 255, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    10**9, 10**15, 10**30, 10**400, 10**4500, 1.0, 1.5, -0.0, 1e300, True, False, None, "1", "",
    Raw("-0"), Raw("1e0"), Raw("1E2"), Raw("1e400"), Raw("-1e400"), Raw("01"), Raw("+1"),
    Raw("0x10"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1_0"), Raw("1."), Raw(".5"),
    Raw("١"), [], {}, [1], [[1]], ["1"],
)  # fmt: skip

ODD_TEXTS: tuple[Any, ...] = (
    "", " ", "a", "..", "../x", "a/../../b", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\x1b[2J",
    "\x7f", "\x9b", "a\u202eb", "a\u2028b", "a\u200bb", "\ufeff", "é", "e\u0301", "权重",
    "\U0001f600", "x" * 300, "x" * 1025, "a." * 600, "__metadata__", "__proto__", "%s%n",
    "{0}", "$(id)", "1",
    Raw('"\\ud800"'), Raw('"\\udc00\\ud800"'), Raw('"\\u0061"'), Raw('"\\ud83d\\ude00"'),
    Raw('"\\u0000"'), Raw('"\\/"'), Raw('"\\q"'), Raw("'a'"), Raw('"\t"'), Raw("a"),
)  # fmt: skip

SOUND_VALUES: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**9, 10**15, 10**400, 1.0, 0.5, -0.0, 1e300, True,
    False, None, "1", "", [], {}, [1], ["a"], {"a": 1}, {"a": {"b": []}}, [[]], "../x", "x" * 1025,
    "a\0b", "\x1b[2J", "\u202e", "权重", [None], [True], [10**30], Raw("NaN"), Raw("1e400"),
)  # fmt: skip
"""Values of every kind that are JSON to any reader, for fields that expect another."""

ODD_VALUES: tuple[Any, ...] = (*ODD_NUMBERS, *ODD_TEXTS, [None], {"a": {"a": {}}}, [[], [[]]])


def pick(rng: random.Random, values: tuple[Any, ...]) -> Any:
    value = values[int(rng.random() * len(values))]
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value


def nested(depth: int, how: str = "[]") -> Raw:
    opening = how[0] if how == "[]" else '{"a":'
    return Raw(opening * depth + "1" + how[1] * depth)


_PIECES = (
    b"\xef\xbb\xbf", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b" ", b"\n", b"\t", b",", b":",
    b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u0000", b"\\ud800", b"-", b"+", b".", b"e9", b"0",
    b"9" * 30, b"null", b"true", b"NaN", b"/*x*/", b"//", b"#", b"'", b"{}", b"[]", b'"a":1,',
)  # fmt: skip


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return ``content`` with one to three small changes to its bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randint(0, len(changed))
        how = rng.randrange(7)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif how == 2:
            changed[at:at] = rng.choice(_PIECES)
        elif how == 3:
            del changed[at : at + rng.choice((1, 1, 2, 8))]
        elif how == 4:
            piece = changed[at : at + rng.randrange(1, 40)]
            to = rng.randint(0, len(changed))
            changed[to:to] = piece
        elif how == 5:
            changed[at : at + 1] = rng.choice(_PIECES)
        else:
            del changed[at:]
    return bytes(changed)
