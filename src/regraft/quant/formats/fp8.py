"""FP8 as DeepSeek and transformers store it: E4M3 codes with a scale for each block of a matrix.

    w = code * weight_scale_inv[row // block_rows, column // block_columns]        float32

and one rounding to the dtype of the model. A code is the number itself in E4M3 (no infinities, NaN
in 0x7f and 0xff, largest 448); "inv" because it is what the weight was divided by. DeepSeek-V3's
``weight_dequant``; ``Fp8Dequantize`` of transformers.

Scales come one for a block of the size that the config names, with short blocks at the ends, as
DeepSeek's code has it; or in a grid that divides the matrix evenly, as transformers has it: one for
each row (fbgemm) or one for all among them. Where a matrix is no whole number of the config's
blocks but can be divided evenly too, the config decides; transformers would divide.

Made, they have the bytes of transformers' ``Fp8Quantize``: ``factor = (1 / max |w|) * 448`` of a
block of 128 by 128, 1 for zeros; ``E4M3(w * factor)``, half to even; ``weight_scale_inv =
1 / factor``. Where that factor would be infinite (largest magnitudes below 1.4e-36, of which
transformers makes NaN) it is 1 too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.formats.bitsandbytes import not_finite
from regraft.quant.grid import NO_ZEROS, Codes, Levels
from regraft.quant.making import Making, MatrixMaking, StoredOutput, element_count, raw_bytes
from regraft.quant.making_kernels import e4m3_codes
from regraft.quant.weight import Block, Codec, FoundWeights, QuantizedWeight, Read, Stored
from regraft.tensors import WORKING_DTYPES, TensorSpec

LEVELS = Levels.of(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
"""All values of E4M3."""

_SCALES = ("{name}_scale_inv", "{name}_scale", "{module}.scale", "{module}.qscale_weight")
"""What the scales of a weight may be called; ``module`` is its name without ``.weight``."""

_ENDS = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight", "_scale_inv")
_NOT_READ = ("activation_scale", ".input_scale", ".input_scale_ub", ".qscale_act", ".k_scale",
             ".v_scale")  # fmt: skip
"""Ends of scales that are not of weights."""

_PACKED = ("I8", "U8", "F4")
_CODED = ("F8_E4M3", *_PACKED)
"""Dtypes of tensors that may have scales beside them."""

_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0", "U8")
_DAMAGED = "Download the model again, or name the 16-bit base"

_E4M3_MAX = np.float32(448)
_SMALLEST = np.float32(1.4e-36)
"""Magnitudes from which on 448 over them is finite."""


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


# -- finding them ----------------------------------------------------------------------------------


def find(stored: Stored) -> FoundWeights:
    """Find all FP8 weights of a checkpoint: each has scales beside it, in whatever file."""
    dtype = stored.dtype if stored.dtype in WORKING_DTYPES else "BF16"
    weights, problems = list[QuantizedWeight](), list[Problem]()
    skipped = tuple(name for name in stored.tensors if name.endswith(_NOT_READ))
    block = _block_of(stored)
    for name, codes in stored.tensors.items():
        if codes.dtype not in _CODED:
            continue
        scales = scales_of(stored, name)
        problems += _several_scales(stored, name) if codes.dtype == "F8_E4M3" else []
        if codes.dtype == "F8_E4M3" and scales is not None:
            run = run_of(codes.shape, scales, block)
            parts = {"codes": codes, "scales": scales}
            if run is None:
                problems.append(_no_fit(stored, parts, block))
            else:
                weights.append(QuantizedWeight(name, codes.shape, dtype, Fp8(run), parts))
        elif codes.dtype == "F8_E4M3":
            problems.append(_no_scales(stored, name))
        elif scales is not None and codes.dtype in _PACKED:
            problems.append(_packed(stored, codes))
    problems += _orphans(stored) if not problems else []
    return FoundWeights(tuple(weights), tuple(problems), skipped)


def scales_of(stored: Stored, name: str) -> TensorSpec | None:
    """Return the scales of a weight, None for none."""
    return next((stored.tensors[key] for key in _scale_names(stored, name)), None)


def _scale_names(stored: Stored, name: str) -> list[str]:
    module = name.removesuffix(".weight")
    names = [pattern.format(name=name, module=module) for pattern in _SCALES]
    return [key for key in names if key in stored.tensors]


def _several_scales(stored: Stored, name: str) -> list[Problem]:
    """Return the problem of a weight whose scales are there under several names."""
    names = _scale_names(stored, name)
    if len(names) < 2:
        return []
    return [
        Problem("an FP8 weight has scales under several names",
                f"{stored.where}, tensor {name!r}", "one of them", ", ".join(names), _DAMAGED)
    ]  # fmt: skip


def _block_of(stored: Stored) -> tuple[int, int] | None:
    """Return the rows and columns of a block that the config names, None for none."""
    said: Any = stored.config.get("weight_block_size")
    good = isinstance(said, list | tuple) and len(said) == 2
    if good and all(type(size) is int and size > 0 for size in said):
        return said[0], said[1]
    return None


def run_of(
    shape: tuple[int, ...], scales: TensorSpec, block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None if codes and scales do not fit.

    Args:
        shape: of the codes; the last two dimensions are a matrix.
        scales: as stored.
        block: as the config has it.
    """
    if len(shape) < 2 or not math.prod(shape) or scales.dtype not in _SCALE_DTYPES:
        return None
    rows, columns, stack = shape[-2], shape[-1], math.prod(shape[:-2])
    grid = scales.shape
    if scales.numel == 1 and stack == 1:
        grid = (*shape[:-2], 1, 1)
    elif len(shape) == 2 and grid == (rows,):
        grid = (rows, 1)
    if len(grid) != len(shape) or grid[:-2] != shape[:-2] or not math.prod(grid):
        return None
    if block is not None and grid[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
        return min(block[0], rows), min(block[1], columns)
    if rows % grid[-2] or columns % grid[-1]:
        return None
    return rows // grid[-2], columns // grid[-1]


def _no_fit(stored: Stored, parts: dict[str, TensorSpec], block: tuple[int, int] | None) -> Problem:
    codes, scales = parts["codes"], parts["scales"]
    return Problem(
        "codes and scales of an FP8 weight do not fit each other",
        f"{stored.where}, tensor {codes.name!r}",
        f"a matrix, and a floating-point scale for each {block or 'equal'} block of it",
        f"{codes.dtype} {codes.shape} and {scales.dtype} {scales.shape}", _DAMAGED,
    )  # fmt: skip


def _no_scales(stored: Stored, name: str) -> Problem:
    return Problem(
        "an FP8 weight has no scales", f"{stored.where}, tensor {name!r}",
        f"{name + '_scale_inv'!r} in one of the weight files", "nothing",
        "Download the missing file, or the whole model again",
    )  # fmt: skip


def _packed(stored: Stored, codes: TensorSpec) -> Problem:
    return Problem(
        "a weight of an FP8 model is stored in another format, which is not supported",
        f"{stored.where}, tensor {codes.name!r}", "F8_E4M3", f"{codes.dtype} with scales",
        "Name the 16-bit base the quantized one was made from",
    )  # fmt: skip


def _orphans(stored: Stored) -> list[Problem]:
    """Return scales whose weight is not there."""
    found = []
    for name in stored.tensors:
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end is None or name.endswith(_NOT_READ):
            continue
        owner = name.removesuffix(end)
        if end == ".scale" and stored.tensors[name].dtype not in ("F8_E8M0", "U8"):
            continue  # plain modules may have a parameter of that name
        if f"{owner}.weight" not in stored.tensors and owner not in stored.tensors:
            found.append(
                Problem("scales belong to no weight", f"{stored.where}, tensor {name!r}",
                        f"{owner + '.weight'!r} in one of the weight files", "nothing",
                        "Download the missing file, or the whole model again")
            )  # fmt: skip
    return found


@dataclass(frozen=True)
class Fp8Maker:
    """E4M3 in blocks.

    Attributes:
        dtype: safetensors dtype of the model.
        block: rows and columns that share a scale.
        ragged: whether weights that are no whole number of blocks are quantized too. DeepSeek's
            format has them; transformers leaves such weights plain, and reads them wrong or not.
    """

    dtype: str = "BF16"
    block: tuple[int, int] = (128, 128)
    ragged: bool = False
    name: str = "fp8"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is a matrix, or a stack of them, of whole blocks."""
        if len(shape) < 2 or not element_count(shape):
            return False
        whole = shape[-2] % self.block[0] == 0 and shape[-1] % self.block[1] == 0
        return whole or (self.ragged and len(shape) == 2)

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[StoredOutput, ...]:
        """Return codes and scales."""
        blocks = (-(-shape[-2] // self.block[0]), -(-shape[-1] // self.block[1]))
        return (
            StoredOutput(name, "F8_E4M3", shape, "codes"),
            StoredOutput(f"{name}_scale_inv", "F32", (*shape[:-2], *blocks), "scales"),
        )

    def begin(self, name: str, shape: tuple[int, ...]) -> Making:
        """Return the state of one weight that is being made."""
        return _Fp8Making(name, shape, self.block)

    def weight(self, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        """Return how a weight will be stored, without its parts."""
        return QuantizedWeight(name, shape, self.dtype, Fp8(self.block), {})

    def config(self) -> dict[str, Any]:
        """Return ``quantization_config`` as transformers writes it."""
        return {
            "activation_scheme": "dynamic", "modules_to_not_convert": None, "quant_method": "fp8",
            "weight_block_size": list(self.block),
        }  # fmt: skip


class _Fp8Making(MatrixMaking):
    levels = LEVELS

    def __init__(self, name: str, shape: tuple[int, ...], run: tuple[int, int]) -> None:
        super().__init__(name, shape, run)
        self.factors = np.ones_like(self.absmax)

    def finish(self) -> Mapping[str, Bytes]:
        self._check_finite()
        some = self.absmax >= _SMALLEST
        self.factors[some] = np.float32(1) / self.absmax[some] * _E4M3_MAX
        self.scales = np.float32(1) / self.factors
        return {"scales": raw_bytes(self.scales)}

    @property
    def codec(self) -> Codec:
        return Fp8((self.row_run, self.run))

    def _nearest(self, at: Block, values: Floats) -> Bytes:
        part = self._part(at)
        factors = np.ascontiguousarray(self.factors[part.lines, part.columns])
        codes = np.empty(values.size, np.uint8)
        e4m3_codes(
            values, at.height, at.width, factors.ravel(), factors.shape[1], self.run, self.row_run,
            part.first, part.first_row, codes,
        )  # fmt: skip
        return codes
