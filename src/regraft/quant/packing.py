"""How codes lie in bytes: nibbles, and the 32-bit words of GPTQ and AWQ."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from regraft.numerics.arrays import Bytes
from regraft.numerics.conversions import ENTRY


@njit(**ENTRY)
def unpack_nibbles(packed: Any, high_first: bool, out: Any) -> None:
    """Set ``out`` to 4-bit codes, two to a byte; ``out`` may be one shorter than they are."""
    low, high = (np.uint8(4), np.uint8(0)) if high_first else (np.uint8(0), np.uint8(4))
    pairs = np.uintp(out.shape[0] // 2)
    for j in range(pairs):
        byte = packed[j]
        out[np.uintp(2) * j] = (byte >> low) & np.uint8(15)
        out[np.uintp(2) * j + np.uintp(1)] = (byte >> high) & np.uint8(15)
    if out.shape[0] % 2:
        out[out.shape[0] - 1] = (packed[pairs] >> low) & np.uint8(15)


@njit(**ENTRY)
def pack_nibbles(codes: Any, high_first: bool, out: Any) -> None:
    """Pack 4-bit codes, two to a byte; a missing last one is zero."""
    low, high = (np.uint8(4), np.uint8(0)) if high_first else (np.uint8(0), np.uint8(4))
    pairs = np.uintp(codes.shape[0] // 2)
    for j in range(pairs):
        a, b = codes[np.uintp(2) * j], codes[np.uintp(2) * j + np.uintp(1)]
        out[j] = np.uint8((a << low) | (b << high))
    if codes.shape[0] % 2:
        out[pairs] = np.uint8(codes[codes.shape[0] - 1] << low)


def nibbles(packed: Bytes, count: int, *, high_first: bool) -> Bytes:
    """Return ``count`` 4-bit codes from the first nibble of ``packed`` on."""
    out = np.empty(count, np.uint8)
    unpack_nibbles(packed, high_first, out)
    return out


def packed_nibbles(codes: Bytes, *, high_first: bool) -> Bytes:
    """Return 4-bit codes packed, two to a byte."""
    out = np.empty((codes.size + 1) // 2, np.uint8)
    pack_nibbles(codes, high_first, out)
    return out
