"""GGUF's types of blocks: values of any range of a weight, as the ``gguf`` package decodes them.

A row is a number of blocks one after the other, and each block has its own scales, so whole rows
and ranges of one row are decoded alone. Two things that llama.cpp does to a model when it converts
it are taken back here: it puts rows of queries and keys in another order, and it adds a constant to
norms.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.weight import Block, Decoder, QuantizedWeight, Read

TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
"""Types that are decoded. NVFP4 is not: a second scale of it is in a tensor of its own."""

UNQUANTIZED = ("F32", "F16", "BF16")
"""Types that are plain numbers, by the names that safetensors has for them too."""

GRIDDED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip
"""Types whose codes lie on a grid, under the scales of their blocks; see
:mod:`regraft.quant.formats.gguf_rounding`."""

_PIECE = 2**17
"""Elements decoded together: what lies between blocks and values stays in the second cache."""


@dataclass(frozen=True)
class GgufDecoder(Decoder):
    """Blocks of one ggml type.

    Attributes:
        type: of :data:`TYPES`.
        heads: how many heads the rows were rearranged in, see :func:`stored_rows`; 0 for not.
        added: what was added to each value, and is taken off again, in float32.
    """

    type: str
    heads: int = 0
    added: float = 0.0

    @property
    def name(self) -> str:
        """The type's name."""
        return self.type

    def row_grain(self, weight: QuantizedWeight) -> int:
        """Return the rows of a head, where these are rearranged; see :class:`Decoder`."""
        return weight.shape[0] // self.heads if self.heads else 1

    def place(self, weight: QuantizedWeight, at: Block) -> tuple[int, int]:
        """Return where a block's bytes lie in the stored tensor; a vector's elements are rows."""
        elements, nbytes = block_size(self.type)
        width = weight.shape[-1] if len(weight.shape) > 1 else 1
        first, count = at.rows[0] * width + at.columns[0], at.height * at.width
        return first // elements * nbytes, count // elements * nbytes

    def stored_order(self, weight: QuantizedWeight, at: Block) -> npt.NDArray[np.intp] | None:
        """Return which of a block's rows is stored as its first, second and so on; None for all
        in their order.

        Args:
            weight: the weight.
            at: whole heads, where rows are rearranged.
        """
        if not self.heads:
            return None
        places = stored_rows(at.rows, weight.shape[0], self.heads) - at.rows[0]
        return np.argsort(places)

    def decoded(self, raw: Bytes) -> Floats:
        """Return the values of whole blocks as they are stored, flat, less what was added."""
        values = self._decode(raw)
        if self.added:
            values -= np.float32(self.added)
        return values

    def values(self, weight: QuantizedWeight, at: Block, read: Read) -> Floats:
        """Return a block's values, float32 ``(at.height, at.width)``; see :class:`Decoder`."""
        if self.heads and len(weight.shape) == 1:
            values = self._rearranged(weight, at, read)
        else:
            values = self._matrix(weight, at, read)
        if self.added:
            values -= np.float32(self.added)
        return values

    def _matrix(self, weight: QuantizedWeight, at: Block, read: Read) -> Floats:
        """Decode the blocks that a range of columns reaches into, and cut off what is beside it."""
        elements, _ = block_size(self.type)
        first, last = at.columns[0] // elements, -(-at.columns[1] // elements)
        decoded = self._decode(self._raw(weight, at.rows, (first, last), read))
        wide = decoded.reshape(at.height, (last - first) * elements)
        low = at.columns[0] - first * elements
        return np.ascontiguousarray(wide[:, low : low + at.width])

    def _rearranged(self, weight: QuantizedWeight, at: Block, read: Read) -> Floats:
        """Decode a range of a bias, whose elements are what rows of a weight are."""
        whole = self._matrix(weight, Block(at.rows, (0, weight.shape[0])), read)
        order = stored_rows(at.columns, weight.shape[0], self.heads)
        return np.ascontiguousarray(whole[:, order])

    def _raw(
        self, weight: QuantizedWeight, rows: tuple[int, int], blocks: tuple[int, int], read: Read
    ) -> Bytes:
        """Return the bytes of a range of blocks of a range of rows: uint8 ``(rows, bytes)``.

        Rearranged rows are read with those between them, which is at most a head more.
        """
        if not self.heads or len(weight.shape) == 1 or rows[0] == rows[1]:
            return self._read(weight, rows, blocks, read)
        order = stored_rows(rows, weight.matrix[0], self.heads)
        low, high = int(order.min()), int(order.max()) + 1
        return self._read(weight, (low, high), blocks, read)[order - low]

    def _read(
        self, weight: QuantizedWeight, rows: tuple[int, int], blocks: tuple[int, int], read: Read
    ) -> Bytes:
        """Return the same, of rows as they are stored."""
        elements, nbytes = block_size(self.type)
        row_bytes = weight.matrix[1] // elements * nbytes
        low, high = blocks[0] * nbytes, blocks[1] * nbytes
        single = rows[1] - rows[0] == 1
        raw = np.empty((rows[1] - rows[0], high - low if single else row_bytes), np.uint8)
        read(weight.codes, rows[0] * row_bytes + (low if single else 0), raw.reshape(-1))
        return raw if single else raw[:, low:high]

    def _decode(self, raw: Bytes) -> Floats:
        """Return the values of rows of blocks, flat."""
        elements, nbytes = block_size(self.type)
        flat = np.ascontiguousarray(raw).reshape(-1)
        out = np.empty(flat.size // nbytes * elements, np.float32)
        step = max(1, _PIECE // elements)
        with np.errstate(all="ignore"):
            for at in range(0, flat.size // nbytes, step):
                piece = flat[at * nbytes : (at + step) * nbytes]
                out[at * elements : (at + step) * elements] = _dequantize(piece, self.type)
        return out


def keeps(name: str) -> bool:
    """Whether merged values can be kept in a type: rounded once, or to its codes."""
    return name in (*UNQUANTIZED, *GRIDDED)


def stored_rows(rows: tuple[int, int], count: int, heads: int) -> npt.NDArray[np.intp]:
    """Return where llama.cpp puts rows of queries or keys: it turns halves of a head into pairs.

    Transformers rotates element d of a head with element d + half, llama.cpp 2 d with 2 d + 1. So
    row (head, part, d) is stored as (head, d, part); see ``LlamaModel.permute`` in llama.cpp's
    ``convert_hf_to_gguf.py``.

    Args:
        rows: half-open range of the model's rows.
        count: number of all rows, a multiple of twice ``heads``.
        heads: number of heads.
    """
    row = np.arange(*rows)
    size = count // heads
    head, place = np.divmod(row, size)
    part, d = np.divmod(place, size // 2)
    order: npt.NDArray[np.intp] = head * size + d * 2 + part
    return order


@functools.cache
def block_size(name: str) -> tuple[int, int]:
    """Return elements and bytes of a block of a ggml type."""
    gguf = _package()
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return int(elements), int(nbytes)


def made_blocks(values: Floats, name: str) -> Bytes:
    """Return blocks of values, flat, as the ``gguf`` package makes them."""
    gguf = _package()
    kind = gguf.GGMLQuantizationType[name]
    found: Bytes = gguf.quants.quantize(values.reshape(1, -1), kind)
    return found.reshape(-1)


def _dequantize(raw: Bytes, name: str) -> Floats:
    """Return the values of blocks, flat."""
    gguf = _package()
    values: Floats = gguf.quants.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType[name])
    return values.reshape(-1)


@functools.cache
def _package() -> Any:
    """Return the ``gguf`` package, which opening a ``.gguf`` file has imported already."""
    import gguf
    import gguf.quants

    return gguf
