"""Quantized weights from plain ones, with the bytes that the formats' own libraries make.

Two passes over a weight, tile by tile, in any order and from any thread. The first takes in the
largest magnitude of each block; from these come the scales. The second makes the codes:

    maker = maker_of("nf4", dtype="BF16")          # of regraft.quant.registry
    outputs = maker.outputs(name, shape)          # what will be stored, known beforehand
    making = maker.begin(name, shape)
    making.gather(tile, values)                   # for every tile
    small = making.finish()                       # scales and such, as bytes by role
    making.encode(tile, values)                   # for every tile: bytes of codes

Only scales are held in memory. Each format's file says the formula; all are in float32 with one
rounding each.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from regraft.errors import NumericError
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.grid import NO_ZEROS, Codes, Levels
from regraft.quant.making_kernels import magnitudes
from regraft.quant.weight import Block, Codec, QuantizedWeight
from regraft.tensors import TensorSpec


class StoredOutput(NamedTuple):
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

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[StoredOutput, ...]:
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
        self._merging = threading.Lock()  # magnitudes only grow, so the order does not matter

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


class MatrixMaking(Making):
    """A weight whose scales know its rows."""

    def __init__(self, name: str, shape: tuple[int, ...], run: tuple[int, int]) -> None:
        width = shape[-1]
        super().__init__(name, shape, (element_count(shape) // width, width), run)
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


def raw_bytes(values: npt.NDArray[Any]) -> Bytes:
    """Return the bytes of an array, in its own order."""
    return np.ascontiguousarray(values).ravel().view(np.uint8)


def element_count(shape: tuple[int, ...]) -> int:
    """Return how many elements a tensor of a shape has."""
    return math.prod(shape)
