"""Stored blocks of a GGUF weight told from its values, a chunk of rows at a time."""

from __future__ import annotations

import numpy as np

from regraft.deltas.kernels.weights import Bytes, Floats, Weights
from regraft.merging.compute.requantize import ValuesOf
from regraft.quant.formats.gguf import GgufDecoder, stored_rows
from regraft.quant.formats.gguf_blocks import LAYOUTS, differences, restored
from regraft.quant.weight import Block, QuantizedWeight

_CHUNK = 2**16
"""Elements whose blocks are kept together, if rows are not longer."""


def can_tell_blocks(weight: QuantizedWeight) -> bool:
    """Whether there is a layout by which the blocks of a weight are told from its values."""
    codec = weight.codec
    if not isinstance(codec, GgufDecoder) or codec.added or len(weight.shape) != 2:
        return False
    layout = LAYOUTS.get(codec.type)
    return layout is not None and not weight.shape[1] % layout.elements


def chunk_bytes(weight: QuantizedWeight) -> int:
    """Return the bytes of the blocks that are kept together: those of a number of rows.

    Where llama.cpp rearranged the rows of heads, these are whole heads.
    """
    decoder, (rows, width) = _decoder(weight), weight.matrix
    head = rows // decoder.heads if decoder.heads else 1
    each = max(_CHUNK // (width * head), 1) * head
    return min(each, rows) * (weight.codes.nbytes // rows)


def block_differences(
    weight: QuantizedWeight, begin: int, stored: Bytes, values: ValuesOf
) -> Bytes:
    """Return what tells the blocks of a chunk, from byte ``begin`` on, from their values."""
    found = _values(weight, begin, stored.size, values)
    return differences(_decoder(weight).type, stored, found, weight.dtype)


def told_blocks(weight: QuantizedWeight, begin: int, kept: Bytes, values: ValuesOf) -> Bytes:
    """Return the blocks of which :func:`block_differences` was taken."""
    found = _values(weight, begin, kept.size, values)
    return restored(_decoder(weight).type, kept, found, weight.dtype)


def _decoder(weight: QuantizedWeight) -> GgufDecoder:
    assert isinstance(weight.codec, GgufDecoder)
    return weight.codec


def _values(weight: QuantizedWeight, begin: int, size: int, values: ValuesOf) -> Floats:
    """Return the values of a chunk in the order in which its blocks are stored."""
    rows, width = weight.matrix
    line = weight.codes.nbytes // rows
    low, high = begin // line, (begin + size) // line
    raw = values(Block((low, high), (0, width)))
    if _decoder(weight).heads:
        lines = raw.reshape(high - low, -1)
        raw = np.empty_like(lines)
        raw[stored_rows((low, high), rows, _decoder(weight).heads) - low] = lines
    return Weights.of_bytes(raw.reshape(-1), weight.dtype).floats()
