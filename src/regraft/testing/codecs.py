"""What every codec has to pass, whatever its format: blocks agree with the whole, bytes come back.

A test makes a checkpoint of one format with the format's own library (or from golden bytes), opens
it by :func:`stored`, and hands each weight and the library's values to :func:`check_codec`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regraft.deltas.kernels.weights import Weights
from regraft.formats.files.reading import FilePool
from regraft.formats.safetensors import read_header
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant import grid
from regraft.quant.rounding import codes_for
from regraft.quant.weight import ROUNDINGS, Block, Decoder, QuantizedWeight, Read, Stored
from regraft.tensors import TensorSpec, nbytes_of


def stored(
    paths: list[Path], config: Mapping[str, Any], dtype: str | None, files: FilePool
) -> Stored:
    """Return safetensors files as a format sees them."""
    tensors: dict[str, TensorSpec] = {}
    for path in paths:
        tensors |= read_header(path).tensors

    def read(spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        files.read_into(spec, offset, buffer.data)

    return Stored(tensors, config, dtype, read, str(paths[0].parent))


def values(weight: QuantizedWeight, at: Block, read: Read) -> Bytes:
    """Return a block dequantized, as the bytes of the weight's dtype."""
    raw = np.empty(nbytes_of(weight.dtype, (at.height, at.width)), np.uint8)
    if isinstance(weight.codec, Decoder):
        decoded = weight.codec.values(weight, at, read)
        assert decoded.shape == (at.height, at.width)
        sums = np.zeros(4, np.float64)
        Weights.of_bytes(raw, weight.dtype).take(Weights.of_floats(decoded.ravel()), sums)
        return raw
    block = weight.codec.block(weight, at, read)
    grid.values_of(block, *Weights.of_bytes(raw, weight.dtype).arguments)
    return raw


def whole(weight: QuantizedWeight) -> Block:
    """Return all of a weight as a block."""
    rows, columns = weight.matrix
    return Block((0, rows), (0, columns))


def check_codec(weight: QuantizedWeight, expected: Floats, read: Read) -> None:
    """Check a codec on one weight.

    Args:
        weight: as the format's ``find`` gives it.
        expected: what the format's own library dequantizes it to, ``weight.shape``, exact values of
            the weight's dtype.
        read: reads stored tensors.

    Raises:
        AssertionError: it fails.
    """
    assert weight.shape == expected.shape
    raw = values(weight, whole(weight), read)
    found = Weights.of_bytes(raw, weight.dtype).floats()
    wanted = np.ascontiguousarray(expected, np.float32).ravel()
    different = np.flatnonzero(found.view(np.uint32) != wanted.view(np.uint32))
    assert not different.size, (
        f"{weight.name}: {different.size} of {wanted.size} values differ, the first at "
        f"{different[0]}: {found[different[0]]!r}, not {wanted[different[0]]!r}"
    )
    _check_blocks(weight, raw, read)
    assert weight.codec.trouble(weight, read) == []
    if weight.codec.is_writable:
        _check_writing(weight, read)


def _check_blocks(weight: QuantizedWeight, raw: Bytes, read: Read) -> None:
    """Blocks have the bytes that the whole has, wherever they begin and end."""
    rows, columns = weight.matrix
    item = raw.size // max(rows * columns, 1)
    matrix = raw.reshape(rows, columns * item)
    cuts = {0, 1, rows // 3, rows // 2, rows - 1, rows}
    for low in sorted(cuts):
        for high in sorted(cuts):
            if 0 <= low < high <= rows:
                part = values(weight, Block((low, high), (0, columns)), read)
                assert np.array_equal(part, matrix[low:high].ravel()), (weight.name, low, high)
    for low, high in ((0, columns // 2), (columns // 3, columns), (columns // 2, columns // 2 + 1)):
        if low < high <= columns:
            row = rows - 1
            part = values(weight, Block((row, row + 1), (low, high)), read)
            assert np.array_equal(part, matrix[row, low * item : high * item]), (low, high)


def _check_writing(weight: QuantizedWeight, read: Read) -> None:
    """Codes are packed to the bytes they came from, and the grid's own values keep their codes."""
    from dataclasses import replace

    codec = weight.codec
    assert not isinstance(codec, Decoder)
    if codec.stores_transposed:
        turned = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
        weight = replace(weight, shape=turned, as_stored=True)
    rows, columns = weight.matrix
    original = np.empty(weight.codes.nbytes, np.uint8)
    read(weight.codes, 0, original)
    grain = codec.row_grain(weight)
    each = max(grain, rows // 3 // grain * grain)
    at = 0
    for first in range(0, rows, each):
        place = Block((first, min(first + each, rows)), (0, columns))
        block = codec.block(weight, place, read)
        offset, length = codec.place(weight, place)
        assert offset == at
        packed = codec.pack(weight, place, block.codes)
        assert np.array_equal(packed, original[offset : offset + length]), (weight.name, first)
        at += length
        _check_keeping(weight, block, place)
    assert at == original.size


def _check_keeping(weight: QuantizedWeight, block: grid.Codes, at: Block) -> None:
    raw = np.empty(nbytes_of(weight.dtype, (at.height, at.width)), np.uint8)
    view = Weights.of_bytes(raw, weight.dtype)
    grid.values_of(block, *view.arguments)
    for rounding in ROUNDINGS:
        sums = np.zeros(2, np.float64)
        kept = codes_for(
            block, view.kind, np.ascontiguousarray(view.floats()), rounding, 7, (0, at.width), sums
        )
        assert np.array_equal(kept, block.codes)
        assert not sums.any() or not math.isfinite(float(sums.sum()))
