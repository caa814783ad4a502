"""FP8 as DeepSeek and transformers store it: E4M3 codes with a scale for each block of a matrix.

    w = code * weight_scale_inv[row // block_rows, column // block_columns]        float32

and one rounding to the dtype of the model. A code is the number itself in E4M3 (no infinities, NaN
in 0x7f and 0xff, largest 448); "inv" because it is what the weight was divided by. DeepSeek-V3's
``weight_dequant``; ``Fp8Dequantize`` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.bitsandbytes import not_finite
from regraft.quant.grid import NO_ZEROS, Codes, Levels
from regraft.quant.weight import Block, QuantizedWeight, Read
from regraft.tensors import TensorSpec

LEVELS = Levels.of(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
"""All values of E4M3."""


@dataclass(frozen=True)
class Fp8:
    """E4M3 with scales.

    Attributes:
        run: rows and columns that share a scale. Weights of more than two dimensions are a stack of
            matrices; no block reaches over two of them.
    """

    run: tuple[int, int]
    name: str = "fp8"
    is_writable: bool = True
    stores_transposed: bool = False

    def row_grain(self, weight: QuantizedWeight) -> int:
        """Return 1: a code is a byte."""
        del weight
        return 1

    def block(self, weight: QuantizedWeight, at: Block, read: Read) -> Codes:
        """Return the codes of a block and the scales that reach into it."""
        codes = np.empty(at.height * at.width, np.uint8)
        read(weight.codes, self.place(weight, at)[0], codes)
        return self.codes(weight.shape, at, codes, self.scales(weight, at, read))

    def codes(self, shape: tuple[int, ...], at: Block, codes: Bytes, scales: Floats) -> Codes:
        """Return a block of codes with its scales, a row of them for each row of scales."""
        width = -(-at.columns[1] // self.run[1]) - at.columns[0] // self.run[1]
        row_run, first_row = self.run[0], self._line(shape, at.rows[0])[1]
        if shape[-2] % self.run[0]:
            row_run, first_row = 1, 0
        return Codes(
            codes, at.height, at.width, LEVELS, scales, NO_ZEROS, width, self.run[1], row_run,
            at.columns[0] % self.run[1], first_row,
        )  # fmt: skip

    def _line(self, shape: tuple[int, ...], row: int) -> tuple[int, int]:
        """Return the row of scales that serves a row, and how far that is in its run."""
        matrix, row = divmod(row, shape[-2])
        return matrix * -(-shape[-2] // self.run[0]) + row // self.run[0], row % self.run[0]

    def scales(self, weight: QuantizedWeight, at: Block, read: Read) -> Floats:
        """Return the scales of a block, row by row.

        Where the last run of rows of a matrix is short there is a row of scales for each row of the
        block, so that a block may reach over matrices.
        """
        shape, (rows, columns) = weight.shape, self.run
        low, high = self._line(shape, at.rows[0])[0], self._line(shape, at.rows[1] - 1)[0] + 1
        width = -(-shape[-1] // columns)
        scales = scale_values(weight.parts["scales"], low * width, high * width, read)
        part = scales.reshape(-1, width)[:, at.columns[0] // columns : -(-at.columns[1] // columns)]
        if shape[-2] % rows:
            lines = [self._line(shape, row)[0] - low for row in range(*at.rows)]
            part = part[lines]
        return np.ascontiguousarray(part).ravel()

    def pack(self, weight: QuantizedWeight, at: Block, codes: Bytes) -> Bytes:
        """Return the codes: they are bytes already."""
        del weight, at
        return codes

    def place(self, weight: QuantizedWeight, at: Block) -> tuple[int, int]:
        """Return offset and length of a block's codes."""
        return at.rows[0] * weight.matrix[1] + at.columns[0], at.height * at.width

    def trouble(self, weight: QuantizedWeight, read: Read) -> list[Problem]:
        """Return scales that are no finite numbers."""
        spec = weight.parts["scales"]
        return not_finite(spec, scale_values(spec, 0, spec.numel, read))


def scale_values(spec: TensorSpec, begin: int, end: int, read: Read) -> Floats:
    """Return stored scales as float32; bytes are exponents, that is E8M0."""
    raw = np.empty((end - begin) * spec.itemsize, np.uint8)
    read(spec, begin * spec.itemsize, raw)
    kinds = {
        "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "U8": np.dtype(ml_dtypes.float8_e8m0fnu),
    }  # fmt: skip
    return np.asarray(raw.view(kinds[spec.dtype]), np.float32)
