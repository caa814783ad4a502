"""Values rounded to codes of GGUF's blocks, under the scales that the blocks have.

Of a type whose codes lie on a grid once its scales are known, a :class:`Grid` says where in a block
the codes are and how they are packed. The types with tables of points in several dimensions (IQ1 to
IQ3) and the ternary ones have none.

Which bytes a type has where is in ggml's ``ggml-common.h`` and in the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from regraft.numerics.arrays import Bytes, Floats, Sums
from regraft.quant.formats import gguf_blocks as layouts
from regraft.quant.formats.gguf_blocks import Blocks
from regraft.quant.gguf_kernels import round_evenly, round_to_levels
from regraft.quant.rounding import account
from regraft.quant.weight import ROUNDINGS

Scales = Callable[[Blocks], tuple[Floats, Floats]]
"""Returns scale and offset of each part of blocks, flat."""

_PIECE = 2**16
"""Elements rounded together: what lies between stays in the second cache."""


@dataclass(frozen=True)
class Grid:
    """A type of blocks whose codes lie on a grid.

    Attributes:
        elements, nbytes: of a block.
        begin, end: where in a block its codes are.
        unpack: returns codes, uint8 (n, elements), of these bytes of blocks.
        pack: returns the bytes of codes.
        scales: returns the scales of parts.
        low: the level of code 0.
        least, most: the codes that are written.
        levels: a table of levels in ascending order, where they are no whole numbers from ``low``.
    """

    elements: int
    nbytes: int
    begin: int
    end: int
    unpack: Callable[[Blocks], Blocks]
    pack: Callable[[Blocks], Blocks]
    scales: Scales
    low: float = 0.0
    least: int = 0
    most: int = 15
    levels: Floats | None = None


def rounded(
    kind: str, stored: Bytes, was: Floats, values: Floats, rounding: str, key: int, index: int,
    sums: Sums,
) -> tuple[Bytes, int]:  # fmt: skip
    """Return blocks of a type whose codes are those of values, and how many codes changed.

    Args:
        kind: of :data:`GRIDS`.
        stored: the bytes of blocks, which have scales and the codes to start from.
        was: float32, what the blocks stand for, in their order.
        values: float32 likewise, what they are to stand for.
        rounding: of :data:`regraft.quant.weight.ROUNDINGS`.
        key: says which random bits are used.
        index: the number of the first element in its tensor.
        sums: as in :func:`regraft.quant.rounding.requantize`, added to.
    """
    grid = GRIDS[kind]
    blocks = stored.reshape(-1, grid.nbytes).copy()
    each, changed = max(_PIECE // grid.elements, 1), 0
    for low in range(0, len(blocks), each):
        part = blocks[low : low + each]
        at = slice(low * grid.elements, (low + len(part)) * grid.elements)
        codes = np.ascontiguousarray(grid.unpack(part[:, grid.begin : grid.end])).reshape(-1)
        new, after = np.empty(codes.size, np.uint8), np.empty(codes.size, np.float32)
        _round(
            grid, part, codes, was[at], values[at], ROUNDINGS.index(rounding), np.uint64(key),
            np.uint64(index + at.start), new, after,
        )  # fmt: skip
        account(was[at], values[at], after, sums)
        changed += int(np.count_nonzero(new != codes))
        part[:, grid.begin : grid.end] = grid.pack(new.reshape(-1, grid.elements))
    return blocks.reshape(-1), changed


def codes_in(kind: str, blocks: Bytes) -> Bytes:
    """Return the codes of blocks of a type, uint8 in their order; of :data:`GRIDS`."""
    grid = GRIDS[kind]
    rows = blocks.reshape(-1, grid.nbytes)
    return np.ascontiguousarray(grid.unpack(rows[:, grid.begin : grid.end])).reshape(-1)


def with_codes(kind: str, blocks: Bytes, codes: Bytes) -> Bytes:
    """Return blocks with other codes under their scales; what :func:`codes_in` gives back."""
    grid = GRIDS[kind]
    rows = blocks.reshape(-1, grid.nbytes).copy()
    rows[:, grid.begin : grid.end] = grid.pack(codes.reshape(-1, grid.elements))
    return rows.reshape(-1)


def _round(
    grid: Grid, blocks: Blocks, codes: Bytes, was: Floats, values: Floats, rounding: int,
    key: np.uint64, index: np.uint64, new: Bytes, after: Floats,
) -> None:  # fmt: skip
    scales, offsets = grid.scales(blocks)
    size = codes.size // max(scales.size, 1)
    if grid.levels is not None:
        round_to_levels(
            codes, scales, size, grid.levels, was, values, rounding, key, index, new, after
        )
        return
    round_evenly(
        codes, scales, offsets, size, np.float32(grid.low), grid.least, grid.most, was, values,
        rounding, key, index, new, after,
    )  # fmt: skip


# -- codes -----------------------------------------------------------------------------------------


def _nibbles(content: Blocks) -> Blocks:
    return np.concatenate([content & 15, content >> 4], axis=1)


def _five_bits(content: Blocks) -> Blocks:
    high = np.unpackbits(np.ascontiguousarray(content[:, :4]), axis=1, bitorder="little")
    codes: Blocks = _nibbles(content[:, 4:]) | (high << 4)
    return codes


def _bytes(content: Blocks) -> Blocks:
    codes: Blocks = content + np.uint8(128)
    return codes


def _nibbles_k(content: Blocks, width: int = 32) -> Blocks:
    rows = content.reshape(len(content), -1, 1, width)
    return np.concatenate([rows & 15, rows >> 4], axis=2).reshape(len(content), -1)


def _twos(content: Blocks) -> Blocks:
    """Return two bits of each of 256 codes, as ``pairs_of_bits`` packs them."""
    rows = content.reshape(len(content), 2, 1, 32)
    return np.concatenate([(rows >> s) & 3 for s in (0, 2, 4, 6)], axis=2).reshape(-1, 256)


def _one(content: Blocks) -> Blocks:
    """Return one bit of each of 256 codes, as ``upper_bits`` packs them."""
    bits = np.concatenate([(content >> i) & 1 for i in range(8)], axis=1)
    return bits.reshape(-1, 256)


def _codes_k3(content: Blocks) -> Blocks:
    codes: Blocks = _twos(content[:, 32:]) | (_one(content[:, :32]) << 2)
    return codes


def _codes_k5(content: Blocks) -> Blocks:
    codes: Blocks = _nibbles_k(content[:, 32:]) | (_one(content[:, :32]) << 4)
    return codes


def _codes_k6(content: Blocks) -> Blocks:
    codes: Blocks = _nibbles_k(content[:, :128], 64) | (_twos(content[:, 128:]) << 4)
    return codes


def _pack_xs(codes: Blocks) -> Blocks:
    pairs = codes.reshape(-1, 8, 2, 16)
    packed: Blocks = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    return packed


def _codes_xs(content: Blocks) -> Blocks:
    return _nibbles_k(content, 16)


# -- scales ----------------------------------------------------------------------------------------


def _scales_xs(blocks: Blocks) -> tuple[Floats, Floats]:
    """Return the scales of IQ4_XS: six bits each, for eight parts."""
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    lower = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    upper = np.concatenate([(high >> (2 * i)) & 3 for i in range(8)], axis=1).astype(np.uint8)
    numbers = (lower | (upper << 4)).astype(np.float32) - np.float32(32)
    with np.errstate(all="ignore"):
        scales = (layouts.half(blocks, 0)[:, None] * numbers).ravel()
    return scales, np.zeros(scales.size, np.float32)


_FOUR_BITS: Floats = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
"""Levels of IQ4_NL and IQ4_XS."""

GRIDS: dict[str, Grid] = {
    "Q4_0": Grid(32, 18, 2, 18, _nibbles, layouts.pack_4, layouts.one_scale, -8),
    "Q4_1": Grid(32, 20, 4, 20, _nibbles, layouts.pack_4, layouts.scale_and_offset),
    "Q5_0": Grid(32, 22, 2, 22, _five_bits, layouts.pack_5, layouts.one_scale, -16, 0, 31),
    "Q5_1": Grid(32, 24, 4, 24, _five_bits, layouts.pack_5, layouts.scale_and_offset, 0, 0, 31),
    # ggml writes no -128: some of its products of eight-bit numbers have no room for it.
    "Q8_0": Grid(32, 34, 2, 34, _bytes, layouts.pack_8, layouts.one_scale, -128, 1, 255),
    "Q2_K": Grid(256, 84, 16, 80, _twos, layouts.pairs_of_bits, layouts.K2.scales, 0, 0, 3),
    "Q3_K": Grid(256, 110, 0, 96, _codes_k3, layouts.pack_k3, layouts.K3.scales, -4, 0, 7),
    "Q4_K": Grid(256, 144, 16, 144, _nibbles_k, layouts.pack_k4, layouts.K4.scales),
    "Q5_K": Grid(256, 176, 16, 176, _codes_k5, layouts.pack_k5, layouts.K5.scales, 0, 0, 31),
    "Q6_K": Grid(256, 210, 0, 192, _codes_k6, layouts.pack_k6, layouts.K6.scales, -32, 0, 63),
    "IQ4_NL": Grid(32, 18, 2, 18, _nibbles, layouts.pack_4, layouts.one_scale, levels=_FOUR_BITS),
    "IQ4_XS": Grid(256, 136, 8, 136, _codes_xs, _pack_xs, _scales_xs, levels=_FOUR_BITS),
}
"""Types whose codes can be rounded to."""
