"""LLM.int8: bitsandbytes' 8-bit format, one scale for each output row.

    w = (code * SCB[row]) * 7.874015718698502e-3           float32, one rounding each

``SCB`` is the largest magnitude of a row; the constant is bitsandbytes' 1/127 (not the same bits as
a division by 127). Then one rounding to the dtype of the model. Dettmers et al. 2022,
arXiv:2208.07339; ``int8_vectorwise_dequant`` of bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes
from regraft.quant.formats.bitsandbytes import not_finite
from regraft.quant.grid import NO_ZEROS, Codes, Levels
from regraft.quant.weight import Block, Found, QuantizedWeight, Read, Stored, missing
from regraft.tensors import WORKING_DTYPES

LEVELS = Levels.of(np.arange(256, dtype=np.uint8).view(np.int8), post=7.874015718698502e-3)
"""All values of int8. bitsandbytes itself writes -127 to 127."""


@dataclass(frozen=True)
class Int8:
    """LLM.int8."""

    name: str = "int8"
    is_writable: bool = True
    stores_transposed: bool = False

    def row_grain(self, weight: QuantizedWeight) -> int:
        """Return 1: a code is a byte."""
        del weight
        return 1

    def block(self, weight: QuantizedWeight, at: Block, read: Read) -> Codes:
        """Return the codes of a block and the scales of its rows."""
        width = weight.matrix[1]
        codes = np.empty(at.height * at.width, np.uint8)
        read(weight.codes, at.rows[0] * width + at.columns[0], codes)
        scales = np.empty(at.height, np.float32)
        read(weight.parts["scales"], 4 * at.rows[0], scales.view(np.uint8))
        return Codes(codes, at.height, at.width, LEVELS, scales, NO_ZEROS, 1, at.width)

    def pack(self, weight: QuantizedWeight, at: Block, codes: Bytes) -> Bytes:
        """Return the codes: they are bytes already."""
        del weight, at
        return codes

    def place(self, weight: QuantizedWeight, at: Block) -> tuple[int, int]:
        """Return offset and length of a block's codes."""
        return at.rows[0] * weight.matrix[1] + at.columns[0], at.height * at.width

    def trouble(self, weight: QuantizedWeight, read: Read) -> list[Problem]:
        """Return scales that are no finite numbers."""
        scales = np.empty(weight.parts["scales"].numel, np.float32)
        read(weight.parts["scales"], 0, scales.view(np.uint8))
        return not_finite(weight.parts["scales"], scales)


def find(stored: Stored) -> Found:
    """Find all LLM.int8 weights of a checkpoint: each has an ``SCB`` beside it."""
    dtype = stored.dtype if stored.dtype in WORKING_DTYPES else "F16"
    weights, problems = list[QuantizedWeight](), list[Problem]()
    skipped = [name for name in stored.tensors if name.endswith(".weight_format")]
    for key in stored.tensors:
        module, mark, rest = key.rpartition(".SCB")
        if not mark or rest:
            continue
        name = f"{module}.weight"
        if lacking := missing(stored, name, [name]):
            problems += lacking
            continue
        codes, scales = stored.tensors[name], stored.tensors[key]
        fits = codes.dtype == "I8" and len(codes.shape) == 2 and scales.dtype == "F32"
        if not fits or scales.numel != codes.shape[0]:
            problems.append(
                Problem("codes and scales of an 8-bit weight do not fit each other",
                        f"{stored.where}, tensor {name!r}", "I8 (out, in) and F32 (out)",
                        f"{codes.dtype} {codes.shape} and {scales.dtype} {scales.shape}",
                        "Download the model again")
            )  # fmt: skip
            continue
        weights.append(
            QuantizedWeight(name, codes.shape, dtype, Int8(), {"codes": codes, "scales": scales})
        )
    if stored.config.get("load_in_8bit") and not weights and not problems:
        problems.append(
            Problem("the config says that weights are in 8 bits, and none is",
                    f"{stored.where}, config.json: quantization_config", "tensors named ...SCB",
                    "none", "Download the model again")
        )  # fmt: skip
    return Found(tuple(weights), tuple(problems), tuple(skipped))
