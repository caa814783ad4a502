"""Quantized weights from plain ones, with the bytes that the formats' own libraries make.

Two passes over a weight, tile by tile, in any order and from any thread. The first takes in the
largest magnitude of each block; from these come the scales. The second makes the codes:

    maker = MAKERS["nf4"](dtype="BF16")
    outputs = maker.outputs(name, shape)          # what will be stored, known beforehand
    making = maker.begin(name, shape)
    making.gather(tile, values)                   # for every tile
    small = making.finish()                       # scales and such, as bytes by role
    making.encode(tile, values)                   # for every tile: bytes of codes

Only scales are held in memory. The formulas, all in float32 with one rounding each:

``nf4``, ``fp4`` (bitsandbytes 0.50, ``quantize_4bit`` on a CPU)
    ``absmax = max |w|`` of 64 elements of the flat weight; the level nearest to
    ``w * (1 / max(absmax, 1e-38))``, the lower one halfway; in a last block that is not full
    ``absmax = max(absmax, 1e-38)`` and ``w / absmax``. Codes are of the exact scales, also where
    the stored ones are quantized: ``offset = mean(absmax)``, summed as torch does on one thread
    (:func:`~regraft.quant.making_kernels.torch_sum`; with more threads torch itself splits the sum
    from 32768 scales on), then ``absmax - offset`` in blocks of 256 to 8 bits.
``int8`` (bitsandbytes' ``int8_vectorwise_quant`` on what ``Int8Params`` hands it)
    ``w`` to float16; ``SCB = max |w|`` of a row; ``round(w * ((1 / SCB) * 127))``, half to even.
``fp8`` (transformers' ``Fp8Quantize``)
    ``factor = (1 / max |w|) * 448`` of a block of 128 by 128, 1 for zeros; ``E4M3(w * factor)``,
    half to even; ``weight_scale_inv = 1 / factor``. Where that factor would be infinite (largest
    magnitudes below 1.4e-36, of which transformers makes NaN) it is 1 too.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from regraft.errors import NumericError
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.formats import fp8, int8
from regraft.quant.formats.bitsandbytes import LEVELS, MARK, FourBit, Nested
from regraft.quant.formats.fp8 import Fp8
from regraft.quant.formats.int8 import Int8
from regraft.quant.grid import NO_ZEROS, Codes, Levels
from regraft.quant.making_kernels import (
    LUT_SIZE,
    e4m3_codes,
    eight_bit_codes,
    four_bit_codes,
    int8_codes,
    magnitudes,
    torch_sum,
)
from regraft.quant.packing import packed_nibbles
from regraft.quant.weight import Block, Codec, QuantizedWeight
from regraft.tensors import DTYPES, TensorSpec

_NESTED_BLOCK = 256
_E4M3_MAX = np.float32(448)
_SMALLEST = np.float32(1.4e-36)
"""Magnitudes from which on 448 over them is finite."""

_LONGEST_NUMBER = 24
"""Characters of the longest float64 in JSON."""


class Output(NamedTuple):
    """A stored tensor that a weight becomes: name, safetensors dtype, shape, role."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str


class Maker(Protocol):
    """A format that weights can be put into. Frozen: it holds settings only."""

    @property
    def name(self) -> str:
        """The format's name, such as ``nf4``."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the format's own library would quantize a weight of this shape."""

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[Output, ...]:
        """Return the stored tensors that a weight becomes; the role of the codes is ``codes``."""

    def begin(self, name: str, shape: tuple[int, ...]) -> Making:
        """Return the state of one weight that is being made."""

    def weight(self, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        """Return how a weight will be stored, without its parts."""

    def config(self) -> dict[str, Any]:
        """Return ``quantization_config`` as transformers writes it, modules left plain not named.

        Which ones are is said under ``llm_int8_skip_modules`` (bitsandbytes, 4 bits too) or
        ``modules_to_not_convert`` (fp8).
        """


class _Part(NamedTuple):
    """The scales that reach into a block: their rows and columns, and where in a run it begins."""

    lines: slice
    columns: slice
    first_row: int
    first: int


class Making:
    """One weight that is being made.

    Attributes:
        name, shape: of the weight.
        rows, columns: of the matrix as scales see it; where they run over rows' ends it is one row.
        run, row_run: columns and rows that share a scale.
        absmax: float32 ``(ceil rows / row_run, ceil columns / run)``, the largest magnitudes.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], matrix: tuple[int, int], run: tuple[int, int]
    ) -> None:
        self.name, self.shape = name, shape
        self.rows, self.columns = matrix
        self.row_run, self.run = run
        size = -(-self.rows // self.row_run), -(-self.columns // self.run)
        self.absmax: Floats = np.zeros(size, np.float32)
        self._merging = threading.Lock()

    def gather(self, at: Block, values: Floats) -> None:
        """Take in the values of a block, float32 ``(rows * columns,)``. Safe from any thread."""
        at = self._seen(at)
        part = self._part(at)
        into = self.absmax[part.lines, part.columns]
        found = np.zeros(into.shape, np.uint32)
        magnitudes(
            values, at.height, at.width, into.shape[1], self.run, self.row_run, part.first,
            part.first_row, found.ravel(),
        )  # fmt: skip
        bits = into.view(np.uint32)
        with self._merging:
            np.maximum(bits, found, out=bits)

    def finish(self) -> Mapping[str, Bytes]:
        """Return the stored tensors but for the codes, by role, after all blocks were gathered.

        Raises:
            NumericError: the weight holds NaN or infinity (for ``int8``, in float16).
        """
        raise NotImplementedError

    def encode(self, at: Block, values: Floats) -> Bytes:
        """Return the bytes of a block's codes, rounded to nearest.

        A block of 4-bit codes begins with a whole byte, as ``codec.row_grain`` has it.
        """
        return self._nearest(at, values)

    def start_codes(self, at: Block, values: Floats) -> Codes:
        """Return a block rounded to nearest, with its scales as they are read back.

        From there :func:`regraft.quant.rounding.codes_for` rounds to the grid, and ``codec.pack``
        makes bytes.
        """
        raise NotImplementedError

    @property
    def codec(self) -> Codec:
        """How the finished weight is stored."""
        raise NotImplementedError

    def weight(self, dtype: str, parts: Mapping[str, TensorSpec]) -> QuantizedWeight:
        """Return the finished weight, for given stored tensors."""
        return QuantizedWeight(self.name, self.shape, dtype, self.codec, parts)

    def _nearest(self, at: Block, values: Floats) -> Bytes:
        raise NotImplementedError

    def _seen(self, at: Block) -> Block:
        """Return a block of the weight in the matrix that scales see."""
        if self.rows != 1 or not self.shape:
            return at
        first = at.rows[0] * self.shape[-1] + at.columns[0]
        return Block((0, 1), (first, first + at.height * at.width))

    def _part(self, seen: Block) -> _Part:
        rows, columns = seen.rows, seen.columns
        if rows[1] > self.rows or columns[1] > self.columns:  # what is compiled does not look
            raise ValueError(f"{seen} lies outside of {self.name}: {self.rows} x {self.columns}")
        return _Part(
            slice(rows[0] // self.row_run, -(-rows[1] // self.row_run)),
            slice(columns[0] // self.run, -(-columns[1] // self.run)),
            rows[0] % self.row_run,
            columns[0] % self.run,
        )

    def _check_finite(self) -> None:
        bad = int(self.absmax.size - np.count_nonzero(np.isfinite(self.absmax)))
        if bad:
            raise self._not_finite(f"{bad} of {self.absmax.size} blocks with others")

    def _not_finite(self, found: str) -> NumericError:
        return NumericError(
            "a weight that is to be quantized holds NaN or infinity",
            where=f"tensor {self.name!r}",
            expected="finite numbers in every block",
            found=found,
            hint="Leave this weight plain, or look where its values come from",
        )


def _bytes(values: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values).ravel().view(np.uint8)


def _count(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


# -- 4 bits ----------------------------------------------------------------------------------------


@cache
def _bounds(kind: str) -> tuple[Floats, npt.NDArray[np.uint32]]:
    """Return what lies halfway between levels, and the codes as steps from one to the next.

    Of the two zeros of FP4 code 0 is the lower one.
    """
    values = LEVELS[kind].values
    order = np.argsort(values, kind="stable").astype(np.uint32)
    bounds = (values[order[:-1]] + values[order[1:]]) / np.float32(2)
    return bounds.astype(np.float32), np.diff(order, prepend=np.uint32(0))


@cache
def dynamic_map() -> Floats:
    """Return the 256 levels for scales of 8 bits: ``create_dynamic_map`` of bitsandbytes.

    For each of seven powers of ten, means of even steps from 0.1 to 1, as torch's ``linspace`` has
    them: from the nearer end, multiplied and added with one rounding.
    """
    found = [np.array([0, 1], np.float32)]
    low, high = np.float32(0.1), np.float32(1)
    for i in range(7):
        n = 2**i + 1
        step, k = np.float64(np.float32((high - low) / np.float32(n - 1))), np.arange(n)
        steps = np.where(k < n // 2, low + step * k, high - step * (n - 1 - k)).astype(np.float32)
        means = (steps[:-1] + steps[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        found += [means, -means]
    return np.sort(np.concatenate(found)).astype(np.float32)


@cache
def _lut() -> Bytes:
    """Return the code of each of 65536 even steps from -1 to 1."""
    table = dynamic_map()
    i = np.arange(LUT_SIZE, dtype=np.float32)
    steps = (i + i) / np.float32(LUT_SIZE - 1) - np.float32(1)
    between = (table[:-1] + table[1:]) * np.float32(0.5)
    return np.searchsorted(between, steps, side="left").astype(np.uint8)


@dataclass(frozen=True)
class FourBitMaker:
    """NF4 and FP4.

    Attributes:
        name: ``nf4`` or ``fp4``.
        dtype: safetensors dtype of the model, which its state names.
        nested: whether scales are quantized ("double quantization").
        blocksize: elements that share a scale.
    """

    name: str
    dtype: str = "BF16"
    nested: bool = False
    blocksize: int = 64

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether there is anything to quantize; it may have any shape."""
        return _count(shape) > 0 and len(shape) > 0

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[Output, ...]:
        """Return codes, scales, maps and state, in the order of a state dict."""
        count = _count(shape)
        blocks = -(-count // self.blocksize)
        found = [
            Output(name, "U8", ((count + 1) // 2, 1), "codes"),
            Output(f"{name}.absmax", "U8" if self.nested else "F32", (blocks,), "absmax"),
            Output(f"{name}.quant_map", "F32", (16,), "quant_map"),
        ]
        if self.nested:
            outer = -(-blocks // _NESTED_BLOCK)
            found.append(Output(f"{name}.nested_absmax", "F32", (outer,), "nested_absmax"))
            found.append(Output(f"{name}.nested_quant_map", "F32", (256,), "nested_quant_map"))
        length = len(self.state(shape, 0.0 if self.nested else None))
        return (*found, Output(f"{name}{MARK}{self.name}", "U8", (length,), "state"))

    def state(self, shape: tuple[int, ...], offset: float | None) -> bytes:
        """Return ``quant_state`` as bitsandbytes writes it.

        Spaces after it make its length the same for every offset, as it has to be known before the
        offset is. JSON allows them, and bitsandbytes reads it as JSON.
        """
        state = {
            "quant_type": self.name, "blocksize": self.blocksize,
            "dtype": DTYPES[self.dtype].config_name, "shape": list(shape),
        }  # fmt: skip
        if offset is None:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32"}
        longest = len(json.dumps(state | {"nested_offset": 0})) - 1 + _LONGEST_NUMBER
        return json.dumps(state | {"nested_offset": offset}).encode().ljust(longest)

    def begin(self, name: str, shape: tuple[int, ...]) -> Making:
        """Return the state of one weight that is being made."""
        return _FourBitMaking(self, name, shape)

    def weight(self, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        """Return how a weight will be stored, without its parts and the scales of its scales."""
        return QuantizedWeight(name, shape, self.dtype, FourBit(self.name, self.blocksize), {})

    def config(self) -> dict[str, Any]:
        """Return ``quantization_config`` as transformers writes it."""
        return _bitsandbytes_config(
            load_in_4bit=True, bnb_4bit_quant_type=self.name,
            bnb_4bit_use_double_quant=self.nested,
            bnb_4bit_compute_dtype=DTYPES[self.dtype].config_name,
        )  # fmt: skip


def _bitsandbytes_config(**settings: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "_load_in_4bit": False, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False, "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0, "load_in_4bit": False, "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }  # fmt: skip
    said = {f"_{key}": value for key, value in settings.items() if f"_{key}" in usual}
    return usual | settings | said


class _FourBitMaking(Making):
    def __init__(self, maker: FourBitMaker, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(name, shape, (1, _count(shape)), (1, maker.blocksize))
        self.maker = maker
        self._codec = FourBit(maker.name, maker.blocksize)
        self._read_back = self.absmax[0]

    def finish(self) -> Mapping[str, Bytes]:
        self._check_finite()
        maker, absmax = self.maker, self.absmax[0]
        if self.columns % self.run:
            absmax[-1] = max(absmax[-1], np.float32(1e-38))
        small = {"quant_map": _bytes(LEVELS[maker.name].values)}
        if not maker.nested:
            state = maker.state(self.shape, None)
            return small | {"absmax": _bytes(absmax), "state": np.frombuffer(state, np.uint8)}
        return small | self._nest(absmax)

    def _nest(self, absmax: Floats) -> dict[str, Bytes]:
        """Quantize the scales themselves."""
        offset = np.float32(np.float32(torch_sum(absmax)) / np.float32(absmax.size))
        if not np.isfinite(offset):
            raise self._not_finite("the sum of its scales beyond float32")
        codes = np.empty(absmax.size, np.uint8)
        outer = np.empty(-(-absmax.size // _NESTED_BLOCK), np.float32)
        table = dynamic_map()
        eight_bit_codes(absmax - offset, _NESTED_BLOCK, _lut(), codes, outer)
        scale = table[codes] * np.repeat(outer, _NESTED_BLOCK)[: absmax.size]
        self._read_back = (scale + offset).astype(np.float32)
        self._codec = FourBit(self.maker.name, self.run, Nested(_NESTED_BLOCK, float(offset)))
        state = self.maker.state(self.shape, float(offset))
        return {
            "absmax": codes, "nested_absmax": _bytes(outer), "nested_quant_map": _bytes(table),
            "state": np.frombuffer(state, np.uint8),
        }  # fmt: skip

    @property
    def codec(self) -> Codec:
        return self._codec

    def encode(self, at: Block, values: Floats) -> Bytes:
        seen = self._seen(at)
        assert seen.columns[0] % 2 == 0
        codes = self._nearest(at, values)
        if codes.size % 2:
            assert seen.columns[1] == self.columns
            codes = np.append(codes, LEVELS[self.maker.name].zero)
        return packed_nibbles(codes, high_first=True)

    def _nearest(self, at: Block, values: Floats) -> Bytes:
        seen = self._seen(at)
        part = self._part(seen)
        full = self.columns // self.run * self.run
        codes = np.empty(seen.width, np.uint8)
        four_bit_codes(
            values, self.absmax[0, part.columns], self.run, part.first,
            min(max(full - seen.columns[0], 0), seen.width), *_bounds(self.maker.name), codes,
        )  # fmt: skip
        return codes

    def start_codes(self, at: Block, values: Floats) -> Codes:
        part = self._part(self._seen(at))
        scales = self._read_back[part.columns]
        return Codes(
            self._nearest(at, values), 1, values.size, LEVELS[self.maker.name], scales, NO_ZEROS,
            scales.size, self.run, first=part.first,
        )  # fmt: skip


# -- 8 bits ----------------------------------------------------------------------------------------


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
        return len(shape) == 2 and _count(shape) > 0

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[Output, ...]:
        """Return codes, scales, and the number of the format, in the order of a state dict."""
        module = name.removesuffix(".weight")
        return (
            Output(name, "I8", shape, "codes"),
            Output(f"{module}.SCB", "F32", (shape[0],), "scales"),
            Output(f"{module}.weight_format", "U8", (), "format"),
        )

    def begin(self, name: str, shape: tuple[int, ...]) -> Making:
        """Return the state of one weight that is being made."""
        return _Int8Making(name, shape)

    def weight(self, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        """Return how a weight will be stored, without its parts."""
        return QuantizedWeight(name, shape, self.dtype, Int8(), {})

    def config(self) -> dict[str, Any]:
        """Return ``quantization_config`` as transformers writes it."""
        return _bitsandbytes_config(load_in_8bit=True)


class _Matrix(Making):
    """A weight whose scales know its rows."""

    def __init__(self, name: str, shape: tuple[int, ...], run: tuple[int, int]) -> None:
        width = shape[-1]
        super().__init__(name, shape, (_count(shape) // width, width), run)
        self.scales = self.absmax

    levels: Levels

    def _seen(self, at: Block) -> Block:
        return at

    def start_codes(self, at: Block, values: Floats) -> Codes:
        part = self._part(at)
        scales = np.ascontiguousarray(self.scales[part.lines, part.columns])
        return Codes(
            self._nearest(at, values), at.height, at.width, self.levels, scales.ravel(), NO_ZEROS,
            scales.shape[1], self.run, self.row_run, part.first, part.first_row,
        )  # fmt: skip


class _Int8Making(_Matrix):
    levels = int8.LEVELS

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(name, shape, (1, shape[-1]))

    def finish(self) -> Mapping[str, Bytes]:
        with np.errstate(over="ignore"):
            self.absmax[:] = self.absmax.astype(np.float16)
        self._check_finite()
        return {"scales": _bytes(self.absmax), "format": np.zeros(1, np.uint8)}

    @property
    def codec(self) -> Codec:
        return Int8()

    def _nearest(self, at: Block, values: Floats) -> Bytes:
        codes = np.empty(values.size, np.uint8)
        int8_codes(values, at.height, at.width, self.absmax[at.rows[0] : at.rows[1], 0], codes)
        return codes


# -- fp8 -------------------------------------------------------------------------------------------


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
        if len(shape) < 2 or not _count(shape):
            return False
        whole = shape[-2] % self.block[0] == 0 and shape[-1] % self.block[1] == 0
        return whole or (self.ragged and len(shape) == 2)

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[Output, ...]:
        """Return codes and scales."""
        blocks = (-(-shape[-2] // self.block[0]), -(-shape[-1] // self.block[1]))
        return (
            Output(name, "F8_E4M3", shape, "codes"),
            Output(f"{name}_scale_inv", "F32", (*shape[:-2], *blocks), "scales"),
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


class _Fp8Making(_Matrix):
    levels = fp8.LEVELS

    def __init__(self, name: str, shape: tuple[int, ...], run: tuple[int, int]) -> None:
        super().__init__(name, shape, run)
        self.factors = np.ones_like(self.absmax)

    def finish(self) -> Mapping[str, Bytes]:
        self._check_finite()
        some = self.absmax >= _SMALLEST
        self.factors[some] = np.float32(1) / self.absmax[some] * _E4M3_MAX
        self.scales = np.float32(1) / self.factors
        return {"scales": _bytes(self.scales)}

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


def _four_bits(kind: str) -> Callable[..., Maker]:
    def make(**settings: Any) -> Maker:
        return FourBitMaker(kind, **settings)

    return make


MAKERS: dict[str, Callable[..., Maker]] = {
    "nf4": _four_bits("nf4"), "fp4": _four_bits("fp4"), "int8": Int8Maker, "fp8": Fp8Maker,
}  # fmt: skip
"""Every format that weights can be put into. All take ``dtype``; 4 bits take ``nested`` too."""
