"""MXFP4 as transformers stores the experts of gpt-oss: 4-bit floats, a power of two for each 32.

A parameter (experts, in, out) of the model, such as ``...experts.gate_up_proj``, is stored as
``..._blocks``, U8 (experts, out, in / 32, 16), and ``..._scales``, U8 (experts, out, in / 32). A
byte holds two codes of E2M1 along ``in``, the first one in its lower half.

    w = level[code] * 2^(scale - 127)

exactly, and one rounding to the dtype of the model: ``convert_moe_packed_tensors`` of transformers.
To have all scales in float32 they are halved here, and levels are doubled. A scale of 255 is NaN by
the standard (Open Compute Project, Microscaling Formats (MX) Specification 1.0); transformers takes
it for 2^128; it is refused.

Codes lie as (experts, out, in). A block of the model's matrix takes a column of bytes from each
output row, so whole rows are read, a piece at a time, and turned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.formats.bitsandbytes import not_finite
from regraft.quant.grid import NO_ZEROS, Codes, Levels
from regraft.quant.packing import nibbles, packed_nibbles, turn_nibbles
from regraft.quant.weight import Block, FoundWeights, QuantizedWeight, Read, Stored, missing
from regraft.tensors import WORKING_DTYPES

RUN = 32
"""Codes that share a scale."""

_POSITIVE = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
LEVELS = Levels.of([*_POSITIVE, *(-level for level in _POSITIVE)])
"""All values of E2M1, doubled."""

_NAN = 255
_PIECE = 2**20
"""Bytes of codes that are read at a time to be turned."""

_BLOCKS, _SCALES = "_blocks", "_scales"
_DAMAGED = "Download the model again, or name the 16-bit base"


@dataclass(frozen=True)
class Mxfp4:
    """MXFP4.

    Attributes:
        is_writable: whether codes can be written back. They can where a weight that is
            ``as_stored`` is (experts, out, in), that is, each matrix turned by itself.
    """

    name: str = "mxfp4"
    is_writable: bool = False
    stores_transposed: bool = True

    def row_grain(self, weight: QuantizedWeight) -> int:
        """Return 1: a stored row is whole blocks of 32 codes."""
        del weight
        return 1

    def block(self, weight: QuantizedWeight, at: Block, read: Read) -> Codes:
        """Return the codes of a block with the scales that reach into it."""
        if weight.as_stored:
            return _straight(weight, at, read)
        return _turned(weight, at, read)

    def pack(self, weight: QuantizedWeight, at: Block, codes: Bytes) -> Bytes:
        """Return codes two to a byte; a block has to begin with a whole byte."""
        assert weight.as_stored
        assert at.columns[0] % 2 == 0
        return packed_nibbles(codes, high_first=False)

    def place(self, weight: QuantizedWeight, at: Block) -> tuple[int, int]:
        """Return offset and length of a block's bytes."""
        first = at.rows[0] * weight.matrix[1] + at.columns[0]
        return first // 2, at.height * at.width // 2

    def trouble(self, weight: QuantizedWeight, read: Read) -> list[Problem]:
        """Return scales that are no finite numbers."""
        spec = weight.parts["scales"]
        raw = np.empty(spec.nbytes, np.uint8)
        read(spec, 0, raw)
        return not_finite(spec, np.where(raw == _NAN, np.float32(np.nan), np.float32(1)))


def _powers(exponents: Bytes) -> Floats:
    """Return ``2^(exponent - 128)``, half of what an exponent stands for."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128).astype(np.float32)


def _straight(weight: QuantizedWeight, at: Block, read: Read) -> Codes:
    """Return a block of a weight that is seen as it is stored: (experts, out, in)."""
    width = weight.matrix[1]
    first, count = at.rows[0] * width + at.columns[0], at.height * at.width
    raw = np.empty((first + count + 1) // 2 - first // 2, np.uint8)
    read(weight.codes, first // 2, raw)
    codes = nibbles(raw, count + first % 2, high_first=False)[first % 2 :]
    low, high = at.columns[0] // RUN, -(-at.columns[1] // RUN)
    exponents = np.empty(at.height * (width // RUN), np.uint8)
    read(weight.parts["scales"], at.rows[0] * (width // RUN), exponents)
    scales = _powers(exponents).reshape(at.height, -1)[:, low:high]
    return Codes(
        codes, at.height, at.width, LEVELS, np.ascontiguousarray(scales).ravel(), NO_ZEROS,
        high - low, RUN, first=at.columns[0] % RUN,
    )  # fmt: skip


def _turned(weight: QuantizedWeight, at: Block, read: Read) -> Codes:
    """Return a block of the model's matrix, whose rows are (expert, in) and columns out.

    Rows of a matrix are whole runs of 32, so runs of rows do not reach over experts.
    """
    inputs = weight.shape[-2]
    codes = np.empty((at.height, at.width), np.uint8)
    lines = slice(at.rows[0] // RUN, -(-at.rows[1] // RUN))
    scales = np.empty((lines.stop - lines.start, at.width), np.float32)
    row = at.rows[0]
    while row < at.rows[1]:
        expert, first = divmod(row, inputs)
        end = min(at.rows[1] - expert * inputs, inputs)
        _turn_codes(weight, expert, (first, end), at, read, codes[row - at.rows[0] :])
        groups = first // RUN, -(-end // RUN)
        into = expert * (inputs // RUN) + groups[0] - lines.start
        part = _scales_of(weight, expert, at.columns, read)[:, groups[0] : groups[1]]
        scales[into : into + groups[1] - groups[0]] = part.T
        row = expert * inputs + end
    return Codes(
        codes.ravel(), at.height, at.width, LEVELS, scales.ravel(), NO_ZEROS, at.width, 1, RUN,
        first_row=at.rows[0] % RUN,
    )  # fmt: skip


def _scales_of(
    weight: QuantizedWeight, expert: int, columns: tuple[int, int], read: Read
) -> Floats:
    """Return the scales of some output rows of an expert, ``(columns, in / 32)``."""
    inputs, outputs = weight.shape[-2:]
    exponents = np.empty((columns[1] - columns[0]) * (inputs // RUN), np.uint8)
    first = (expert * outputs + columns[0]) * (inputs // RUN)
    read(weight.parts["scales"], first, exponents)
    return _powers(exponents).reshape(-1, inputs // RUN)


def _turn_codes(
    weight: QuantizedWeight, expert: int, rows: tuple[int, int], at: Block, read: Read,
    out: Bytes,
) -> None:  # fmt: skip
    """Set the codes of some rows of one expert."""
    inputs, outputs = weight.shape[-2:]
    stride = inputs // 2
    each = max(1, _PIECE // stride)
    for low in range(at.columns[0], at.columns[1], each):
        high = min(low + each, at.columns[1])
        raw = np.empty((high - low) * stride, np.uint8)
        read(weight.codes, (expert * outputs + low) * stride, raw)
        turn_nibbles(raw, stride, *rows, at.width, low - at.columns[0], out.reshape(-1))


# -- finding them ----------------------------------------------------------------------------------


def find(stored: Stored) -> FoundWeights:
    """Find all MXFP4 weights of a checkpoint: each is blocks and scales of one name."""
    dtype = stored.dtype if stored.dtype in WORKING_DTYPES else "BF16"
    weights, problems = list[QuantizedWeight](), list[Problem]()
    for key, blocks in stored.tensors.items():
        name = key.removesuffix(_BLOCKS)
        if name == key:
            continue
        if lacking := missing(stored, name, [name + _SCALES]):
            problems += lacking
            continue
        scales = stored.tensors[name + _SCALES]
        fits = blocks.dtype == scales.dtype == "U8" and len(blocks.shape) == 4
        if not fits or blocks.shape != (*scales.shape, RUN // 2) or not math.prod(blocks.shape):
            problems.append(
                Problem("blocks and scales of an MXFP4 weight do not fit each other",
                        f"{stored.where}, tensor {key!r}",
                        "U8 (experts, out, in / 32, 16) and U8 (experts, out, in / 32)",
                        f"{blocks.dtype} {blocks.shape} and {scales.dtype} {scales.shape}",
                        _DAMAGED)
            )  # fmt: skip
            continue
        experts, outputs, groups, _ = blocks.shape
        shape = experts, groups * RUN, outputs
        weights.append(
            QuantizedWeight(name, shape, dtype, Mxfp4(), {"codes": blocks, "scales": scales})
        )
    return FoundWeights(tuple(weights), tuple(problems + _orphans(stored)))


def _orphans(stored: Stored) -> list[Problem]:
    """Return problems for scales that have no blocks."""
    names = [key.removesuffix(_SCALES) for key in stored.tensors if key.endswith("_proj_scales")]
    return [problem for name in names for problem in missing(stored, name, [name + _BLOCKS])]
