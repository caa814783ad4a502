"""LLM.int8: bitsandbytes' 8-bit format, one scale for each output row.

    w = (code * SCB[row]) * 7.874015718698502e-3           float32, one rounding each

``SCB`` is the largest magnitude of a row; the constant is bitsandbytes' 1/127 (not the same bits as
a division by 127). Then one rounding to the dtype of the model. Dettmers et al. 2022,
arXiv:2208.07339; ``int8_vectorwise_dequant`` of bitsandbytes.

Made, they have the bytes of bitsandbytes' ``int8_vectorwise_quant`` on what ``Int8Params`` hands
it: ``w`` to float16; ``SCB = max |w|`` of a row; ``round(w * ((1 / SCB) * 127))``, half to even.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.formats.bitsandbytes import bitsandbytes_config, not_finite
from regraft.quant.grid import NO_ZEROS, Codes, Levels
from regraft.quant.making import Making, MatrixMaking, StoredOutput, element_count, raw_bytes
from regraft.quant.making_kernels import int8_codes
from regraft.quant.weight import Block, Codec, FoundWeights, QuantizedWeight, Read, Stored, missing
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


def find(stored: Stored) -> FoundWeights:
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
    return FoundWeights(tuple(weights), tuple(problems), tuple(skipped))


@dataclass(frozen=True)
class Int8Maker:
    """LLM.int8.

    Attributes:
        dtype: safetensors dtype of the model; the weights are rounded to float16 whatever it is.
    """

    dtype: str = "BF16"
    name: str = "int8"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is a matrix."""
        return len(shape) == 2 and element_count(shape) > 0

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[StoredOutput, ...]:
        """Return codes, scales, and the number of the format, in the order of a state dict."""
        module = name.removesuffix(".weight")
        return (
            StoredOutput(name, "I8", shape, "codes"),
            StoredOutput(f"{module}.SCB", "F32", (shape[0],), "scales"),
            StoredOutput(f"{module}.weight_format", "U8", (), "format"),
        )

    def begin(self, name: str, shape: tuple[int, ...]) -> Making:
        """Return the state of one weight that is being made."""
        return _Int8Making(name, shape)

    def weight(self, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        """Return how a weight will be stored, without its parts."""
        return QuantizedWeight(name, shape, self.dtype, Int8(), {})

    def config(self) -> dict[str, Any]:
        """Return ``quantization_config`` as transformers writes it."""
        return bitsandbytes_config(load_in_8bit=True)


class _Int8Making(MatrixMaking):
    levels = LEVELS

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(name, shape, (1, shape[-1]))

    def finish(self) -> Mapping[str, Bytes]:
        with np.errstate(over="ignore"):
            self.absmax[:] = self.absmax.astype(np.float16)
        self._check_finite()
        return {"scales": raw_bytes(self.absmax), "format": np.zeros(1, np.uint8)}

    @property
    def codec(self) -> Codec:
        return Int8()

    def _nearest(self, at: Block, values: Floats) -> Bytes:
        codes = np.empty(values.size, np.uint8)
        int8_codes(values, at.height, at.width, self.absmax[at.rows[0] : at.rows[1], 0], codes)
        return codes
