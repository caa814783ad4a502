"""Codes in 32-bit words: streams of bits along a row or down a column, and AWQ's order of nibbles.

GPTQ, AWQ and compressed-tensors all fill little-endian words from the lowest bit on. 2, 4 and 8
bits divide a word; 3-bit codes run on from word to word, 32 of them in three words. So eight codes
are always ``bits`` whole bytes, and a stream is taken eight codes at a time: one uint64 of eight
codes, one to a byte, for ``bits`` bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.numerics.arrays import Bytes, Floats
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import ENTRY
from regraft.quant.weight import Read
from regraft.tensors import TensorSpec

Words = npt.NDArray[np.uint32]

_SHORT = 8 * 2**10
"""Bytes of a stored row that are read faster than they are skipped, once they are in memory."""

_BUFFER = 256 * 2**10
"""Bytes of short rows that are read at a time."""

_TILE = 16
"""Words to a cache line: what is transposed together."""


def lot_of(bits: int) -> tuple[int, int]:
    """Return codes and words of the shortest stream that ends with a word."""
    return (32, bits) if 32 % bits else (32 // bits, 1)


def words_for(count: int, bits: int) -> int:
    """Return the words that ``count`` codes take."""
    return -(-count * bits // 32)


# -- streams along a row ---------------------------------------------------------------------------


@njit(inline="always")
def _mask(width: Any, lanes: Any) -> Any:
    """Return ``width`` ones at the foot of each lane; ``lanes`` has a one at the foot of each."""
    return ((np.uint64(1) << width) - np.uint64(1)) * lanes


@njit(inline="always")
def _spread(x: Any, bits: Any) -> Any:
    """Return eight codes, one to a byte, of ``8 * bits`` bits."""
    b2, b4 = bits + bits, np.uint64(4) * bits
    x = (x | (x << (np.uint64(32) - b4))) & _mask(b4, np.uint64(0x0000000100000001))
    x = (x | (x << (np.uint64(16) - b2))) & _mask(b2, np.uint64(0x0001000100010001))
    return (x | (x << (np.uint64(8) - bits))) & _mask(bits, np.uint64(0x0101010101010101))


@njit(inline="always")
def _gather(x: Any, bits: Any) -> Any:
    """Return ``8 * bits`` bits of eight codes: the inverse of :func:`_spread`."""
    b2, b4 = bits + bits, np.uint64(4) * bits
    x = (x | (x >> (np.uint64(8) - bits))) & _mask(b2, np.uint64(0x0001000100010001))
    x = (x | (x >> (np.uint64(16) - b2))) & _mask(b4, np.uint64(0x0000000100000001))
    return (x | (x >> (np.uint64(32) - b4))) & _mask(b4 + b4, np.uint64(1))


@njit(**ENTRY)
def spread_items(packed: Any, bits_: int, out: Any) -> None:
    """Set ``out`` (uint64) to eights of codes, one for each item of ``8 * bits`` bits."""
    bits = np.uint64(bits_)
    for j in range(np.uintp(out.shape[0])):
        out[j] = _spread(np.uint64(packed[j]), bits)


@njit(**ENTRY)
def spread_threes(packed: Any, out: Any) -> None:
    """Set ``out`` (uint64) to eights of 3-bit codes, one for every three bytes."""
    for j in range(np.uintp(out.shape[0])):
        at = np.uintp(3) * j
        low = np.uint64(packed[at]) | (np.uint64(packed[at + np.uintp(1)]) << np.uint64(8))
        out[j] = _spread(low | (np.uint64(packed[at + np.uintp(2)]) << np.uint64(16)), np.uint64(3))


@njit(**ENTRY)
def gather_bytes(codes: Any, bits_: int, out: Any) -> None:
    """Set ``out`` (uint8) to the stream of eights of codes (uint64)."""
    bits = np.uint64(bits_)
    for j in range(np.uintp(codes.shape[0])):
        x = _gather(codes[j], bits)
        for i in range(np.uintp(bits_)):
            out[np.uintp(bits_) * j + i] = np.uint8(x >> (np.uint64(8) * np.uint64(i)))


def codes_of(words: Words, bits: int) -> Bytes:
    """Return the codes of a stream of whole words (and for 3 bits, of three at a time)."""
    if bits == 8:
        return words.view(np.uint8)
    out = np.empty(words.size * 32 // bits, np.uint8)
    if bits == 3:
        spread_threes(words.view(np.uint8), out.view(np.uint64))
    else:
        spread_items(words.view(np.uint16 if bits == 2 else np.uint32), bits, out.view(np.uint64))
    return out


def words_of(codes: Bytes, bits: int) -> Words:
    """Return the stream of codes that fill whole words."""
    if bits == 8:
        return codes.view(np.uint32)
    out = np.empty(codes.size * bits // 8, np.uint8)
    gather_bytes(codes.view(np.uint64), bits, out)
    return out.view(np.uint32)


# -- streams down a column -------------------------------------------------------------------------


@njit(**ENTRY)
def unpack_columns(words: Any, width_: int, bits: int, out: Any) -> None:
    """Set codes (n, width) of words (n * bits / 32, width), flat; each column is a stream."""
    width, mask = np.uintp(width_), np.uint32((1 << bits) - 1)
    for i in range(np.uintp(out.shape[0]) // width):
        bit = np.int64(i) * bits
        at = np.uintp(bit // 32) * width
        shift = np.uint32(bit % 32)
        to = i * width
        if bit % 32 + bits <= 32:
            for j in range(width):
                out[to + j] = np.uint8((words[at + j] >> shift) & mask)
        else:
            left = np.uint32(32) - shift
            for j in range(width):
                both = (words[at + j] >> shift) | (words[at + width + j] << left)
                out[to + j] = np.uint8(both & mask)


@njit(**ENTRY)
def pack_columns(codes: Any, width_: int, bits: int, out: Any) -> None:
    """Set words of codes, as :func:`unpack_columns` reads them; bits left over are zero."""
    width, mask = np.uintp(width_), np.uint32((1 << bits) - 1)
    out[:] = 0
    for i in range(np.uintp(codes.shape[0]) // width):
        bit = np.int64(i) * bits
        at = np.uintp(bit // 32) * width
        shift = np.uint32(bit % 32)
        of = i * width
        for j in range(width):
            out[at + j] |= (np.uint32(codes[of + j]) & mask) << shift
        if bit % 32 + bits > 32:
            left = np.uint32(32) - shift
            for j in range(width):
                out[at + width + j] |= (np.uint32(codes[of + j]) & mask) >> left


def codes_down(words: Words, width: int, bits: int, rows: int) -> Bytes:
    """Return codes ``(rows, width)``, flat, of words that hold them column by column."""
    out = np.empty(rows * width, np.uint8)
    unpack_columns(words.ravel(), width, bits, out)
    return out


def words_down(codes: Bytes, width: int, bits: int) -> Words:
    """Return the words of codes ``(rows, width)``, flat, column by column."""
    rows = codes.size // width
    out = np.empty(words_for(rows, bits) * width, np.uint32)
    pack_columns(codes, width, bits, out)
    return out


@njit(**ENTRY)
def transpose_words(words: Any, height_: int, width_: int, out: Any) -> None:
    """Set ``out`` (width, height) to ``words`` (height, width), both flat."""
    height, width, tile = np.uintp(height_), np.uintp(width_), np.uintp(_TILE)
    for low in range(np.uintp(0), width, tile):
        for first in range(np.uintp(0), height, tile):
            last = min(first + tile, height)
            for j in range(low, min(low + tile, width)):
                for i in range(first, last):
                    out[j * height + i] = words[i * width + j]


def transposed(words: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a matrix of 4-byte items transposed, and contiguous."""
    height, width = words.shape
    out = np.empty((width, height), words.dtype)
    transpose_words(words.ravel(), height, width, out.reshape(-1))
    return out


# -- AWQ -------------------------------------------------------------------------------------------


@njit(inline="always")
def _lanes(x: Any) -> Any:
    """Return four nibbles of 16 bits, one to a lane of 16."""
    x = (x | (x << np.uint64(24))) & np.uint64(0x000000FF000000FF)
    return (x | (x << np.uint64(12))) & np.uint64(0x000F000F000F000F)


@njit(**ENTRY)
def unpack_awq(words: Any, out: Any) -> None:
    """Set ``out`` (uint64) to eights of codes: nibbles of a word are columns 0 2 4 6 1 3 5 7."""
    for j in range(np.uintp(out.shape[0])):
        word = np.uint64(words[j])
        high = _lanes(word >> np.uint64(16))
        out[j] = _lanes(word & np.uint64(0xFFFF)) | (high << np.uint64(8))


@njit(**ENTRY)
def pack_awq(codes: Any, out: Any) -> None:
    """Set words of eights of codes (uint64): the inverse of :func:`unpack_awq`."""
    low_lanes = np.uint64(0x000F000F000F000F)
    for j in range(np.uintp(out.shape[0])):
        low, high = codes[j] & low_lanes, (codes[j] >> np.uint64(8)) & low_lanes
        low = (low | (low >> np.uint64(12))) & np.uint64(0x000000FF000000FF)
        high = (high | (high >> np.uint64(12))) & np.uint64(0x000000FF000000FF)
        low = (low | (low >> np.uint64(24))) & np.uint64(0xFFFF)
        high = (high | (high >> np.uint64(24))) & np.uint64(0xFFFF)
        out[j] = np.uint32(low | (high << np.uint64(16)))


@njit(**ENTRY)
def unpack_awq_rows(words: Any, width_: int, out: Any) -> None:
    """Set codes ``(8 * n, width)`` of words ``(n, width)``, flat: each word is eight rows."""
    width = np.uintp(width_)
    for c in range(np.uintp(words.shape[0]) // width):
        for k in range(np.uintp(8)):
            nibble = (k >> np.uintp(1)) + np.uintp(4) * (k & np.uintp(1))
            shift = np.uint32(4) * np.uint32(nibble)
            of, to = c * width, (np.uintp(8) * c + k) * width
            for j in range(width):
                out[to + j] = np.uint8((words[of + j] >> shift) & np.uint32(15))


# -- reading ---------------------------------------------------------------------------------------


def window(
    read: Read, spec: TensorSpec, rows: tuple[int, int], columns: tuple[int, int], dtype: Any,
    width: int | None = None,
) -> npt.NDArray[Any]:  # fmt: skip
    """Return a part of a stored matrix, as ``dtype``: one read if it is contiguous, or row by row.

    Args:
        read: reads stored tensors.
        spec: a matrix; a vector is one of one column.
        rows, columns: half-open ranges, inside of it.
        dtype: what it is seen as.
        width: items of ``dtype`` in a row, where they are not the tensor's own.
    """
    if width is None:
        width = spec.shape[1] if len(spec.shape) > 1 else 1
    height, count, item = rows[1] - rows[0], columns[1] - columns[0], np.dtype(dtype).itemsize
    out = np.empty((height, count), dtype)
    raw = out.reshape(-1).view(np.uint8).reshape(height, count * item)
    line, begin = width * item, (rows[0] * width + columns[0]) * item
    if count == width or height == 1:
        read(spec, begin, raw.reshape(-1))
    elif line > _SHORT:
        for i in range(height):
            read(spec, begin + i * line, raw[i])
    else:
        _read_lines(read, spec, rows[0] * line, line, columns[0] * item, raw)
    return out


def _read_lines(
    read: Read, spec: TensorSpec, begin: int, line: int, skip: int, out: npt.NDArray[np.uint8]
) -> None:
    """Set ``out`` to a part of each line, whole lines being read: many, for one call."""
    height, count = out.shape
    each = max(1, _BUFFER // line)
    buffer = np.empty((min(each, height), line), np.uint8)
    for i in range(0, height, each):
        lines = buffer[: min(each, height - i)]
        read(spec, begin + i * line, lines.reshape(-1))
        out[i : i + each] = lines[:, skip : skip + count]


STORED_AS: dict[str, Any] = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}
"""Dtypes that scales are read as."""


def floats_of(stored: npt.NDArray[Any]) -> Floats:
    """Return float32 values, exactly, of what was read as one of :data:`STORED_AS`."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(stored, np.float32)


def scales_of(
    read: Read, spec: TensorSpec, rows: tuple[int, int], columns: tuple[int, int]
) -> Floats:
    """Return a part of a matrix of scales, as float32."""
    return floats_of(window(read, spec, rows, columns, STORED_AS[spec.dtype]))
