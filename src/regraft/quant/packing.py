"""How codes lie in bytes: nibbles, and the 32-bit words of GPTQ and AWQ."""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.numerics.arrays import Bytes
from regraft.numerics.compiling import njit
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


@njit(**ENTRY)
def turn_nibbles(
    packed: Any, stride_: int, begin_: int, end_: int, width_: int, at_: int, out: Any
) -> None:
    """Unpack columns of 4-bit codes, low half first, into rows.

    Sixteen rows at a time, so that what is read and what is written stay in the first cache.

    Args:
        packed: uint8 ``(rows, stride)``, flat.
        stride_: bytes in a row.
        begin_, end_: columns, in codes.
        width_, at_: ``out[(column - begin) * width + at + row]`` is set.
        out: uint8, flat.
    """
    stride, width, at, one = np.uintp(stride_), np.uintp(width_), np.uintp(at_), np.uintp(1)
    begin, end, rows = np.uintp(begin_), np.uintp(end_), np.uintp(packed.shape[0] // stride_)
    some = np.uintp(16)
    for b in range((rows + some - one) // some):
        low, high = b * some, min((b + one) * some, rows)
        for c in range(begin, end):
            shift, line = np.uint8((c & one) * np.uintp(4)), (c - begin) * width + at
            for r in range(low, high):
                byte = packed[r * stride + (c >> one)]
                out[line + r] = (byte >> shift) & np.uint8(15)
