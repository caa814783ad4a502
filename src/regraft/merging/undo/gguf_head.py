"""The head of a GGUF base, kept by what it has besides the head of the file that was made from it.

Both have the same metadata but for a key or two, and a tokenizer is megabytes of it. So the bytes
are kept that lie between a beginning and an end which both heads have.
"""

from __future__ import annotations

import struct

_FIXED = 24
"""Magic, version and two counts, which are kept as they are."""

_LENGTHS = "<QQQ"


def shortened(content: bytes, like: bytes) -> bytes:
    """Return what is kept of bytes that begin with a head, given another head."""
    own, other = content[_FIXED:], like[_FIXED:]
    most = min(len(own), len(other))
    begin = _alike(own, other, most)
    end = _alike(own[begin:][::-1], other[begin:][::-1], most - begin)
    lengths = struct.pack(_LENGTHS, len(own), begin, end)
    return content[:_FIXED] + lengths + own[begin : len(own) - end]


def _alike(one: bytes, other: bytes, most: int) -> int:
    """Return how many bytes two begin with alike."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def lengthened(kept: bytes, like: bytes) -> bytes:
    """Return the bytes of which :func:`shortened` made others.

    Raises:
        ValueError: it made no such bytes.
    """
    start = _FIXED + struct.calcsize(_LENGTHS)
    if len(kept) < start:
        raise ValueError("no lengths")
    size, begin, end = struct.unpack(_LENGTHS, kept[_FIXED:start])
    other, between = like[_FIXED:], kept[start:]
    if begin > len(other) or end > len(other) or begin + end + len(between) != size:
        raise ValueError("lengths that do not fit")
    return kept[:_FIXED] + other[:begin] + between + other[len(other) - end :]
