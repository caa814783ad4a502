"""Rows of q and k in two orders: as Llama was published, and as transformers has them.

Rotary embeddings turn pairs of values. In Llama's own weights the two of a pair are neighbours,
rows 2i and 2i + 1 of a head; transformers has them half a head apart, rows i and i + size / 2.
"""

from __future__ import annotations

from regraft.adapters.dialects.form import Bits, Moved


def as_transformers(tensor: Moved, heads: int) -> Moved:
    """Return rows in transformers' order, of a tensor whose pairs are neighbours."""
    return tensor.then(tensor.shape, lambda bits: _exchanged(bits, heads, neighbours=True))


def as_neighbours(tensor: Moved, heads: int) -> Moved:
    """Return rows with neighbours as pairs, of a tensor in transformers' order."""
    return tensor.then(tensor.shape, lambda bits: _exchanged(bits, heads, neighbours=False))


def fits(tensor: Moved, heads: int, size: int) -> bool:
    """Whether a tensor has as many rows as heads have."""
    return tensor.shape[0] == heads * size and size % 2 == 0


def _exchanged(bits: Bits, heads: int, *, neighbours: bool) -> Bits:
    half = bits.shape[0] // heads // 2
    inner = (half, 2) if neighbours else (2, half)
    return bits.reshape(heads, *inner, *bits.shape[1:]).swapaxes(1, 2).reshape(bits.shape)
