"""Codes of four bits of which two stand for zero: which one it is, kept in a bit each.

The value of a code does not tell -0 from +0, and a number for each place would take more. So the
sign bits of all codes that are zero are kept one after the other, before what else is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.deltas.undo import compression
from regraft.numerics.arrays import Bytes

_SIGN = np.uint8(8)
"""The sign of a code of four bits; the others are its magnitude."""


def compress(stored: Bytes, told: Bytes) -> bytes:
    """Return what tells ``stored`` from ``told``, two codes a byte; nothing if equal."""
    places, codes = _zeros(told), _nibbles(stored).reshape(-1)
    signs = codes[places] == _SIGN
    difference = stored - _signed(told, places, signs)
    if not signs.any() and not difference.any():
        return b""
    return compression.compress(np.packbits(signs).tobytes() + difference.tobytes())


def restore(kept: bytes, told: Bytes) -> Bytes:
    """Return what :func:`compress` was given.

    Raises:
        ValueError: ``kept`` is none of its results for so many codes.
    """
    if not kept:
        return told
    places = _zeros(told)
    size = -(-places.size // 8)
    raw = np.frombuffer(compression.decompress(kept, size + told.size), np.uint8)
    signs = np.unpackbits(raw[:size], count=places.size).astype(bool)
    restored: Bytes = _signed(told, places, signs) + raw[size:]
    return restored


def most(size: int) -> int:
    """Return the most bytes that are kept of so many bytes of codes."""
    return compression.most_compressed(size + -(-size // 4))


def _nibbles(packed: Bytes) -> Bytes:
    """Return codes, the lower half of a byte first, (n, 2)."""
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def _zeros(told: Bytes) -> Any:
    """Return the places of codes that are told to be zero."""
    return np.flatnonzero(_nibbles(told).reshape(-1) == 0)


def _signed(told: Bytes, places: Any, signs: Any) -> Bytes:
    """Return codes with the signs of those that are zero."""
    negative = places[signs]
    found = told.copy()
    lower, upper = negative[negative % 2 == 0] // 2, negative[negative % 2 == 1] // 2
    found[lower] |= _SIGN
    found[upper] |= _SIGN << np.uint8(4)
    return found
