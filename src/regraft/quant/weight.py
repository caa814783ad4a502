"""What a quantized weight of a checkpoint is, and what a codec has to do for it.

A checkpoint keeps a quantized weight in several stored tensors: codes, scales, sometimes zeros and
more. A :class:`QuantizedWeight` gathers them under the one name that the model knows it by. Its
:class:`Codec` turns any block of it into codes with their scales, and codes back into bytes. Where
codes do not lie on a grid, a :class:`Decoder` tells the values and no more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes, Floats
from regraft.tensors import TensorSpec

if TYPE_CHECKING:
    from regraft.quant.grid import Codes

ROUNDINGS = ("nearest", "stochastic")
"""How values become codes; see :func:`regraft.quant.rounding.requantize`."""

FORMATS = ("nf4", "fp4", "int8", "fp8")
"""Formats that plain weights can be put into; see :func:`regraft.quant.registry.maker_of`."""

Read = Callable[[TensorSpec, int, Bytes], None]
"""Fills a buffer with the bytes of a stored tensor that begin some bytes into it."""


@dataclass(frozen=True)
class Block:
    """A part of a weight seen as a matrix: whole rows, or a range of columns of one row.

    Attributes:
        rows, columns: half-open ranges.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.columns[1] - self.columns[0]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is stored as codes.

    Attributes:
        name: what the model calls it, such as ``model.layers.0.mlp.up_proj.weight``.
        shape: its dimensions in the model; with ``as_stored``, as its codes lie in the file.
        dtype: safetensors dtype that it has dequantized.
        codec: how it is stored.
        parts: its stored tensors, by their role; the role of the codes is ``codes``.
        as_stored: whether it is seen the way its codes lie, which for some formats is transposed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: Codec | Decoder
    parts: Mapping[str, TensorSpec]
    as_stored: bool = False

    @property
    def grid(self) -> Codec:
        """The codec of a format whose values lie on a grid.

        Raises:
            TypeError: it is none.
        """
        if isinstance(self.codec, Decoder):
            raise TypeError(f"the values of {self.codec.name} lie on no grid")
        return self.codec

    @property
    def codes(self) -> TensorSpec:
        """The stored tensor that holds the codes."""
        return self.parts["codes"]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; all dimensions but the last are rows."""
        width = self.shape[-1] if self.shape else 1
        count = 1
        for size in self.shape:
            count *= size
        return (count // width if width else 0, width)


class Codec(Protocol):
    """One way to store a weight. Frozen: it holds what the config says of the format, no state."""

    @property
    def name(self) -> str:
        """The format's name, such as ``nf4``."""

    @property
    def is_writable(self) -> bool:
        """Whether codes can be written back: the merged weight kept in the same format."""

    @property
    def stores_transposed(self) -> bool:
        """Whether codes lie as (in, out) where the model has (out, in)."""

    def row_grain(self, weight: QuantizedWeight) -> int:
        """Return how many rows (as stored) have to stay together when it is written."""

    def block(self, weight: QuantizedWeight, at: Block, read: Read) -> Codes:
        """Return the codes of a block with the scales that reach into it.

        Raises:
            RegraftError: something cannot be read.
        """

    def pack(self, weight: QuantizedWeight, at: Block, codes: Bytes) -> Bytes:
        """Return the bytes of a block's codes; ``weight`` is ``as_stored``."""

    def place(self, weight: QuantizedWeight, at: Block) -> tuple[int, int]:
        """Return where these bytes lie in the stored tensor: offset and length."""

    def trouble(self, weight: QuantizedWeight, read: Read) -> list[Problem]:
        """Return what is wrong with the contents of the parts that are no codes: NaN scales, say.

        It reads all of them, so it is asked once, before any work.
        """


class Decoder(ABC):
    """One way to store a weight in blocks that hold their own scales: their values are told.

    What is written is whole blocks; codes are known to whoever makes these.

    Frozen, as a :class:`Codec` is. It is a class, so that ``isinstance`` tells the two apart.
    """

    is_writable = False
    stores_transposed = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The format's name, such as ``Q4_K``."""

    @abstractmethod
    def values(self, weight: QuantizedWeight, at: Block, read: Read) -> Floats:
        """Return a block's values before they are rounded to the weight's dtype.

        Returns:
            float32 ``(at.height, at.width)``, contiguous; the caller's own.

        Raises:
            RegraftError: something cannot be read.
        """

    @abstractmethod
    def row_grain(self, weight: QuantizedWeight) -> int:
        """Return how many rows have to stay together when it is written; see :class:`Codec`."""

    @abstractmethod
    def place(self, weight: QuantizedWeight, at: Block) -> tuple[int, int]:
        """Return where a block's bytes lie in the stored tensor: offset and length."""

    def trouble(self, weight: QuantizedWeight, read: Read) -> list[Problem]:
        """Return what is wrong with the contents; none: scales lie among the codes."""
        del weight, read
        return []


@dataclass(frozen=True)
class FoundWeights:
    """What a format finds in a checkpoint.

    Attributes:
        weights: the quantized weights.
        problems: everything that is wrong with them, by tensor.
        skipped: stored tensors that belong to the format and to no weight that is read, such as
            scales of activations; they are left out when the model is dequantized.
    """

    weights: tuple[QuantizedWeight, ...] = ()
    problems: tuple[Problem, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A checkpoint as a format sees it.

    Attributes:
        tensors: its stored tensors by name.
        config: ``quantization_config`` (or ``compression_config``), {} for none.
        dtype: the safetensors dtype that the model's config names, None for none.
        read: reads them; None where only headers are at hand.
        where: what messages call it.
    """

    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    dtype: str | None
    read: Read | None
    where: str


Finder = Callable[[Stored], FoundWeights]
"""Finds the weights of one family of formats."""


def missing(stored: Stored, name: str, roles: Iterable[str]) -> list[Problem]:
    """Return a problem for each stored tensor that a weight needs and that is not there."""
    return [
        Problem(
            "a quantized weight lacks a part of it", f"{stored.where}, tensor {name!r}",
            f"{role!r} in one of the weight files", "nothing",
            "Download the missing file, or the whole model again",
        )
        for role in roles
        if role not in stored.tensors
    ]  # fmt: skip
