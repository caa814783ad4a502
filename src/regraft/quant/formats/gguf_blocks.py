"""GGUF's blocks told from the values that they stand for, and what is kept where that fails.

A block is told in stages, each a range of its bytes: first its scales from its values, then scales
of parts from these and the values, then codes from all of them. A stage is held against the truth
before the next one begins, so an error does not go on. The differences are mostly zeros.

Which bytes a type has where is in ggml's ``ggml-common.h`` and in the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.numerics.arrays import Bytes, Floats
from regraft.numerics.conversions import KINDS
from regraft.quant.telling_kernels import ends, tell_codes, tell_pairs, tell_scales

Blocks = npt.NDArray[Any]
"""Bytes of blocks (n, bytes)."""


@dataclass(frozen=True)
class Values:
    """The values of blocks, float32 (n, elements), and the number of the dtype that they have."""

    matrix: Floats
    kind: int

    def parts(self, size: int) -> Floats:
        """Return them part by part, flat."""
        assert self.matrix.shape[1] % size == 0
        return self.matrix.reshape(-1)

    def ends(self, size: int) -> tuple[Floats, Floats, Floats]:
        """Return lowest, highest and farthest value of each part of ``size`` values."""
        low, high, far = (np.empty(self.matrix.size // size, np.float32) for _ in range(3))
        ends(self.parts(size), size, low, high, far)
        return low, high, far


Tell = Callable[[Blocks, Values], Blocks]
"""Returns the bytes of a stage, given blocks whose earlier stages are right, and their values."""


@dataclass(frozen=True)
class Stage:
    """A range of the bytes of a block.

    Attributes:
        begin, end: the range.
        item: bytes of an integer in it; differences are those of integers.
        tell: tells it; None for bytes that nothing tells.
    """

    begin: int
    end: int
    item: int
    tell: Tell | None


@dataclass(frozen=True)
class Layout:
    """A type of blocks: values and bytes of a block, and how it is told."""

    elements: int
    nbytes: int
    stages: tuple[Stage, ...]

    def differences(self, blocks: Blocks, values: Values) -> Blocks:
        """Return what tells blocks from their values, (n, bytes) as the blocks."""
        found = np.empty_like(blocks)
        for stage in self.stages:
            told = self._told(stage, blocks, values)
            there = _integers(blocks[:, stage.begin : stage.end], stage.item)
            found[:, stage.begin : stage.end] = _zigzag(there - told).view(np.uint8)
        return found

    def blocks(self, differences: Blocks, values: Values) -> Blocks:
        """Return the blocks of which :meth:`differences` was taken."""
        found = np.zeros_like(differences)
        for stage in self.stages:
            told = self._told(stage, found, values)
            kept = _integers(differences[:, stage.begin : stage.end], stage.item)
            found[:, stage.begin : stage.end] = (told + _unzigzag(kept)).view(np.uint8)
        return found

    def _told(self, stage: Stage, blocks: Blocks, values: Values) -> Any:
        if stage.tell is None:
            return np.zeros((len(blocks), 1), f"<u{stage.item}")
        return _integers(stage.tell(blocks, values), stage.item)


def _integers(content: Blocks, item: int) -> Any:
    return np.ascontiguousarray(content).view(f"<u{item}")


def _zigzag(difference: Any) -> Any:
    """Return differences as unsigned integers that are small where these are."""
    one, last = (difference.dtype.type(x) for x in (1, 8 * difference.itemsize - 1))
    return np.ascontiguousarray((difference << one) ^ (~(difference >> last) + one))


def _unzigzag(coded: Any) -> Any:
    one = coded.dtype.type(1)
    return (coded >> one) ^ (~(coded & one) + one)


# -- scales of blocks, float16 ---------------------------------------------------------------------


def half(blocks: Blocks, at: int) -> Floats:
    """Return the float16 at a place of each block, as float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32).ravel()


def _as_half(values: Floats) -> Blocks:
    with np.errstate(all="ignore"):
        rounded = np.where(np.isfinite(values), values, np.float32(0)).astype("<f2")
    return np.ascontiguousarray(rounded).view(np.uint8).reshape(-1, 2)


def _farthest_over(code: float) -> Tell:
    """Return what tells a scale from the value that is furthest from zero and has this code."""

    def tell(blocks: Blocks, values: Values) -> Blocks:
        del blocks
        return _as_half(values.ends(values.matrix.shape[1])[2] / np.float32(code))

    return tell


def _largest_over(code: float) -> Tell:
    """Return what tells a scale from the largest magnitude, which has this code."""

    def tell(blocks: Blocks, values: Values) -> Blocks:
        del blocks
        farthest: Floats = np.abs(values.ends(values.matrix.shape[1])[2])
        return _as_half(farthest / np.float32(code))

    return tell


def _spread_over(top: float) -> Tell:
    """Return what tells a scale from the ends of a block, which have codes 0 and ``top``."""

    def tell(blocks: Blocks, values: Values) -> Blocks:
        del blocks
        low, high, _ = values.ends(values.matrix.shape[1])
        with np.errstate(all="ignore"):
            return _as_half((high - low) / np.float32(top))

    return tell


def _lowest(blocks: Blocks, values: Values) -> Blocks:
    """Tell an offset, which is the lowest value."""
    del blocks
    return _as_half(values.ends(values.matrix.shape[1])[0])


# -- scales of parts -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """Scales of parts, which are whole numbers of a block's scale.

    Attributes:
        count: parts in a block.
        d, low_d: where the block's scales are; the second is that of offsets, None for none.
        read: returns these numbers (n, count), and those of offsets, of the bytes of blocks.
        write: returns the stage's bytes of them.
        codes: what the farthest value may have; of lowest and highest value, pairs.
        low, high: the lowest and highest code.
        least, most: bounds of the numbers.
    """

    count: int
    d: int
    low_d: int | None
    read: Callable[[Blocks], tuple[Any, Any]]
    write: Callable[[Any, Any], Blocks]
    codes: tuple[float, ...]
    low: float
    high: float
    least: float
    most: float

    def tell(self, blocks: Blocks, values: Values) -> Blocks:
        """Tell the numbers of all parts."""
        size = values.matrix.shape[1] // self.count
        low, high, far = values.ends(size)
        found, offsets = (np.zeros(low.size, np.int32) for _ in range(2))
        units, parts = half(blocks, self.d), values.parts(size)
        codes, limit = np.array(self.codes, np.float32), np.float32(self.most)
        top, kind = np.float32(self.high), values.kind
        if self.low_d is None:
            tell_scales(
                parts, far, size, units, self.count, codes, np.float32(self.low), top,
                np.float32(self.least), limit, kind, found,
            )  # fmt: skip
        else:
            lows = half(blocks, self.low_d)
            tell_pairs(
                parts, low, high, size, units, lows, self.count, codes, top, limit, kind, found,
                offsets,
            )  # fmt: skip
        return self.write(found.reshape(-1, self.count), offsets.reshape(-1, self.count))

    def scales(self, blocks: Blocks) -> tuple[Floats, Floats]:
        """Return scale and offset of each part, flat."""
        numbers, offsets = self.read(blocks)
        with np.errstate(all="ignore"):
            scales = half(blocks, self.d)[:, None] * numbers.astype(np.float32)
            if self.low_d is None:
                return scales.ravel(), np.zeros(scales.size, np.float32)
            lows = half(blocks, self.low_d)[:, None] * offsets.astype(np.float32)
        return scales.ravel(), lows.ravel()


def _read_k4(blocks: Blocks) -> tuple[Any, Any]:
    """Return the numbers of Q4_K and Q5_K: six bits each, for eight parts."""
    first, second, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    steps = np.concatenate([first & 63, (both & 15) | ((first >> 2) & 0x30)], axis=1)
    lows = np.concatenate([second & 63, (both >> 4) | ((second >> 2) & 0x30)], axis=1)
    return steps, lows


def _write_k4(steps: Any, lows: Any) -> Blocks:
    steps, lows = steps.astype(np.uint8), lows.astype(np.uint8)
    first = steps[:, :4] | ((steps[:, 4:] >> 4) << 6)
    second = lows[:, :4] | ((lows[:, 4:] >> 4) << 6)
    return np.concatenate([first, second, (steps[:, 4:] & 15) | (lows[:, 4:] << 4)], axis=1)


def _read_k2(blocks: Blocks) -> tuple[Any, Any]:
    return blocks[:, :16] & 15, blocks[:, :16] >> 4


def _write_k2(steps: Any, lows: Any) -> Blocks:
    written: Blocks = steps.astype(np.uint8) | (lows.astype(np.uint8) << 4)
    return written


def _read_k3(blocks: Blocks) -> tuple[Any, Any]:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    lower = np.concatenate([low & 15, low >> 4], axis=1)
    upper = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    return (lower | (upper << 4)).astype(np.int32) - 32, None


def _write_k3(steps: Any, lows: Any) -> Blocks:
    del lows
    numbers = (steps + 32).astype(np.uint8)
    lower, upper = numbers & 15, numbers >> 4
    high = [upper[:, 4 * i : 4 * i + 4] << (2 * i) for i in range(4)]
    return np.concatenate(
        [lower[:, :8] | (lower[:, 8:] << 4), high[0] | high[1] | high[2] | high[3]], axis=1
    )


def _read_k6(blocks: Blocks) -> tuple[Any, Any]:
    return np.ascontiguousarray(blocks[:, 192:208]).view(np.int8), None


def _write_k6(steps: Any, lows: Any) -> Blocks:
    del lows
    return np.ascontiguousarray(steps.astype(np.int8)).view(np.uint8)


def _pairs(top: float) -> tuple[float, ...]:
    """Return the codes that the ends of a part have, the likely ones first."""
    return (0, top, 0, top - 1, 1, top, 0, top - 2, 1, top - 1, 2, top)


def _far(low: float) -> tuple[float, ...]:
    """Return the codes that the farthest value has, the likely ones first."""
    high = -low - 1
    return (low, low + 1, high, high - 1, low + 2, high - 2, low + 3, high - 3)


K2 = _Parts(16, 80, 82, _read_k2, _write_k2, (0, 3, 0, 2, 1, 3, 0, 1), 0, 3, 0, 15)
K3 = _Parts(16, 108, None, _read_k3, _write_k3, (-4, -3, 3, 2, -2, -1, 1), -4, 3, -32, 31)
K4 = _Parts(8, 0, 2, _read_k4, _write_k4, _pairs(15), 0, 15, 0, 63)
K5 = _Parts(8, 0, 2, _read_k4, _write_k4, _pairs(31), 0, 31, 0, 63)
K6 = _Parts(16, 208, None, _read_k6, _write_k6, _far(-32), -32, 31, -128, 127)


# -- codes -----------------------------------------------------------------------------------------

Pack = Callable[[Blocks], Blocks]
"""Returns the bytes of codes (n, elements)."""


def _codes(scales: Callable[[Blocks], tuple[Floats, Floats]], low: float, high: float,
           pack: Pack) -> Tell:  # fmt: skip
    """Return what tells codes, given what gives scale and offset of each part."""

    def tell(blocks: Blocks, values: Values) -> Blocks:
        each, lows = scales(blocks)
        out = np.empty(values.matrix.size, np.uint8)
        size = out.size // each.size
        tell_codes(
            values.parts(size), each, lows, size, np.float32(low), np.float32(high), out
        )  # fmt: skip
        return pack(out.reshape(values.matrix.shape))

    return tell


def one_scale(blocks: Blocks) -> tuple[Floats, Floats]:
    scales = half(blocks, 0)
    return scales, np.zeros(scales.size, np.float32)


def scale_and_offset(blocks: Blocks) -> tuple[Floats, Floats]:
    return half(blocks, 0), -half(blocks, 2)


def pack_4(codes: Blocks) -> Blocks:
    packed: Blocks = codes[:, :16] | (codes[:, 16:] << 4)
    return packed


def pack_5(codes: Blocks) -> Blocks:
    high = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate([high, pack_4(codes & 15)], axis=1)


def pack_8(codes: Blocks) -> Blocks:
    packed: Blocks = codes - np.uint8(128)
    return packed


def pack_k4(codes: Blocks) -> Blocks:
    pairs = codes.reshape(-1, 4, 2, 32)
    packed: Blocks = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    return packed


def upper_bits(codes: Blocks, shift: int) -> Blocks:
    """Return one bit of each of 256 codes: bit ``i`` of byte ``j`` is that of code 32 i + j."""
    bits = ((codes >> shift) & 1).reshape(-1, 8, 32)
    return np.packbits(bits, axis=1, bitorder="little").reshape(-1, 32)


def pack_k5(codes: Blocks) -> Blocks:
    return np.concatenate([upper_bits(codes, 4), pack_k4(codes & 15)], axis=1)


def pairs_of_bits(codes: Blocks) -> Blocks:
    """Return two bits of each of 256 codes: four rows of 32 codes to 32 bytes."""
    rows = codes.reshape(-1, 2, 4, 32)
    packed = rows[:, :, 0] | (rows[:, :, 1] << 2) | (rows[:, :, 2] << 4) | (rows[:, :, 3] << 6)
    found: Blocks = packed.reshape(-1, 64)
    return found


def pack_k3(codes: Blocks) -> Blocks:
    return np.concatenate([upper_bits(codes, 2), pairs_of_bits(codes & 3)], axis=1)


def pack_k6(codes: Blocks) -> Blocks:
    lower = (codes & 15).reshape(-1, 2, 2, 64)
    low = (lower[:, :, 0] | (lower[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([low, pairs_of_bits(codes >> 4)], axis=1)


# -- types -----------------------------------------------------------------------------------------


def _plain(dtype: Any) -> Layout:
    """Return the layout of plain numbers, which are their own values."""

    def tell(blocks: Blocks, values: Values) -> Blocks:
        del blocks
        with np.errstate(all="ignore"):
            numbers = np.where(values.matrix == values.matrix, values.matrix, np.float32(0))
            found = np.ascontiguousarray(numbers.astype(dtype)).view(np.uint8)
        return found.reshape(len(values.matrix), -1)

    item = np.dtype(dtype).itemsize
    return Layout(1, item, (Stage(0, item, item, tell),))


def _plain_bfloat16() -> Layout:
    def tell(blocks: Blocks, values: Values) -> Blocks:
        del blocks
        upper = (values.matrix.view(np.uint32) >> 16).astype("<u2")
        return np.ascontiguousarray(upper).view(np.uint8).reshape(len(upper), -1)

    return Layout(1, 2, (Stage(0, 2, 2, tell),))


LAYOUTS: dict[str, Layout] = {
    "F32": _plain("<f4"),
    "F16": _plain("<f2"),
    "BF16": _plain_bfloat16(),
    "Q4_0": Layout(32, 18, (
        Stage(0, 2, 2, _farthest_over(-8)), Stage(2, 18, 1, _codes(one_scale, -8, 7, pack_4)),
    )),
    "Q5_0": Layout(32, 22, (
        Stage(0, 2, 2, _farthest_over(-16)), Stage(2, 22, 1, _codes(one_scale, -16, 15, pack_5)),
    )),
    "Q8_0": Layout(32, 34, (
        Stage(0, 2, 2, _largest_over(127)), Stage(2, 34, 1, _codes(one_scale, -128, 127, pack_8)),
    )),
    "Q4_1": Layout(32, 20, (
        Stage(0, 2, 2, _spread_over(15)), Stage(2, 4, 2, _lowest),
        Stage(4, 20, 1, _codes(scale_and_offset, 0, 15, pack_4)),
    )),
    "Q5_1": Layout(32, 24, (
        Stage(0, 2, 2, _spread_over(31)), Stage(2, 4, 2, _lowest),
        Stage(4, 24, 1, _codes(scale_and_offset, 0, 31, pack_5)),
    )),
    "Q2_K": Layout(256, 84, (
        Stage(80, 84, 2, None), Stage(0, 16, 1, K2.tell),
        Stage(16, 80, 1, _codes(K2.scales, 0, 3, pairs_of_bits)),
    )),
    "Q3_K": Layout(256, 110, (
        Stage(108, 110, 2, None), Stage(96, 108, 1, K3.tell),
        Stage(0, 96, 1, _codes(K3.scales, -4, 3, pack_k3)),
    )),
    "Q4_K": Layout(256, 144, (
        Stage(0, 4, 2, None), Stage(4, 16, 1, K4.tell),
        Stage(16, 144, 1, _codes(K4.scales, 0, 15, pack_k4)),
    )),
    "Q5_K": Layout(256, 176, (
        Stage(0, 4, 2, None), Stage(4, 16, 1, K5.tell),
        Stage(16, 176, 1, _codes(K5.scales, 0, 31, pack_k5)),
    )),
    "Q6_K": Layout(256, 210, (
        Stage(208, 210, 2, None), Stage(192, 208, 1, K6.tell),
        Stage(0, 192, 1, _codes(K6.scales, -32, 31, pack_k6)),
    )),
}  # fmt: skip
"""Types that are told; those with tables of points in several dimensions are not."""

_PIECE = 2**16
"""Elements told together: what lies between values and blocks stays in the second cache."""


def differences(kind: str, stored: Bytes, values: Floats, dtype: str) -> Bytes:
    """Return what tells blocks of a type from their values.

    Args:
        kind: of :data:`LAYOUTS`.
        stored: the bytes of blocks.
        values: float32, what they stand for, in the order of the blocks.
        dtype: safetensors dtype that the values were rounded to.

    Returns:
        As many bytes as the blocks have, byte by byte of a block: first the first ones of all.
    """
    layout = LAYOUTS[kind]
    blocks = stored.reshape(-1, layout.nbytes)
    found = np.empty((layout.nbytes, len(blocks)), np.uint8)
    for low, high, part in _pieces(layout, values, dtype):
        found[:, low:high] = layout.differences(blocks[low:high], part).T
    return found.reshape(-1)


def restored(kind: str, kept: Bytes, values: Floats, dtype: str) -> Bytes:
    """Return the blocks of which :func:`differences` was taken."""
    layout = LAYOUTS[kind]
    turned = kept.reshape(layout.nbytes, -1)
    found = np.empty((turned.shape[1], layout.nbytes), np.uint8)
    for low, high, part in _pieces(layout, values, dtype):
        found[low:high] = layout.blocks(np.ascontiguousarray(turned[:, low:high].T), part)
    return found.reshape(-1)


def _pieces(layout: Layout, values: Floats, dtype: str) -> Any:
    matrix, each = values.reshape(-1, layout.elements), max(_PIECE // layout.elements, 1)
    for low in range(0, len(matrix), each):
        part = matrix[low : low + each]
        unsigned = np.where(part == 0, np.float32(0), part)  # an undo does not tell -0 from +0
        yield low, low + len(part), Values(unsigned, KINDS[dtype])
