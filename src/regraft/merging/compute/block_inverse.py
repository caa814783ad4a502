"""What the blocks of a merged GGUF weight tell of those that they were made of.

Blocks of plain numbers come back as those of any merge do, once their rows are in the model's
order. Of codes, the merge is done again from the merged ones: as far as it moves these, it has
moved those before. That fails at the ends of a grid and where levels are not evenly spaced, and
there codes are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from regraft.deltas.kernels.weights import Bytes, Floats, Weights
from regraft.merging.compute.requantize import Again, noise_key
from regraft.merging.planning.plan import Step
from regraft.merging.planning.tiles import Tile, row_grain
from regraft.quant.formats.gguf import GgufDecoder
from regraft.quant.weight import Block, QuantizedWeight

_STRIP = 2**17
"""Elements whose codes are told together, if rows are not longer."""


def decoder_of(weight: QuantizedWeight) -> GgufDecoder:
    """Return how a weight in GGUF is stored."""
    if not isinstance(weight.codec, GgufDecoder):
        raise TypeError("a weight in GGUF is wanted")
    return weight.codec


def first_number(weight: QuantizedWeight, at: Block) -> int:
    """Return the number of a block's first element as stored; of whole heads it is the model's."""
    width = weight.shape[-1] if len(weight.shape) > 1 else 1
    return at.rows[0] * width + at.columns[0]


def in_stored_order(weight: QuantizedWeight, at: Block, raw: Bytes) -> Bytes:
    """Return a block's bytes, row by row as the model has them, in the order they are stored in."""
    order = decoder_of(weight).stored_order(weight, at)
    if order is None:
        return np.ascontiguousarray(raw)
    return np.ascontiguousarray(raw.reshape(at.height, -1)[order]).reshape(-1)


def in_model_order(weight: QuantizedWeight, at: Block, raw: Bytes) -> Bytes:
    """Return a block's bytes, row by row as they are stored, in the order the model has them in."""
    order = decoder_of(weight).stored_order(weight, at)
    if order is None:
        return np.ascontiguousarray(raw)
    lines = raw.reshape(at.height, -1)
    found = np.empty_like(lines)
    found[order] = lines
    return found.reshape(-1)


def whole_rows(step: Step) -> int:
    """Return the rows that come back together: whole units, and whole heads."""
    return math.lcm(step.units.rows, row_grain(step))


def strips(step: Step, at: Block) -> Iterator[Block]:
    """Yield a block in pieces whose codes are told together."""
    grain = whole_rows(step)
    each = max(_STRIP // max(at.width, 1) // grain * grain, grain)
    for first in range(*at.rows, each):
        yield Block((first, min(first + each, at.rows[1])), at.columns)


def codes_before(
    step: Step, at: Block, blocks: Bytes, rounding: str, seed: int, again: Again
) -> Bytes:
    """Return the codes that a merge has probably made blocks of, uint8 in their order.

    Args:
        step: the step that made them; the type has codes on a grid.
        at: which part of the weight they are: whole heads.
        blocks: the merged bytes.
        rounding: of :data:`regraft.quant.weight.ROUNDINGS`.
        seed: of the merge.
        again: does the step's arithmetic.
    """
    from regraft.quant.formats.gguf_rounding import GRIDS, codes_in, rounded  # compiled; only here

    weight = step.coded
    assert weight is not None
    decoder, tile = decoder_of(weight), Tile(0, "rows", at.rows, at.columns, 0, 0, 0, 0)
    was = decoder.decoded(blocks)
    there = in_model_order(weight, at, was.view(np.uint8)).view(np.float32)
    values: Floats = np.empty_like(there)
    again(tile, Weights.of_floats(there), Weights.of_floats(values))
    values = in_stored_order(weight, at, values.view(np.uint8)).view(np.float32)
    moved, _ = rounded(
        decoder.type, blocks, was, values, rounding, noise_key(seed, weight.name),
        first_number(weight, at), np.zeros(2, np.float64),
    )  # fmt: skip
    codes, after = (codes_in(decoder.type, b).astype(np.int16) for b in (blocks, moved))
    told: Bytes = np.clip(2 * codes - after, 0, GRIDS[decoder.type].most).astype(np.uint8)
    return told
