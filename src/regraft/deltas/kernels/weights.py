"""A run of stored weights in memory, seen the way the kernels want it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.deltas.kernels import merge as kernels
from regraft.numerics.arrays import Bytes, Floats, Sums

__all__ = ["Bytes", "Floats", "Sums", "Weights"]

_NO16: npt.NDArray[np.uint16] = np.empty(0, np.uint16)
_NO32: Floats = np.empty(0, np.float32)


@dataclass(frozen=True)
class Weights:
    """Weights of one working dtype, as views of a buffer: changing them changes the buffer.

    Attributes:
        x16: the values' 16-bit patterns, empty for float32.
        x32: the values, empty for the 16-bit dtypes.
        kind: a value of :data:`regraft.deltas.kernels.merge.KINDS`.
    """

    x16: npt.NDArray[np.uint16]
    x32: Floats
    kind: int

    @classmethod
    def of_bytes(cls, raw: Bytes, dtype: str) -> Weights:
        """View a buffer of whole elements of a working dtype."""
        kind = kernels.KINDS[dtype]
        if kind == kernels.F32:
            return cls(_NO16, raw.view(np.float32), kind)
        return cls(raw.view(np.uint16), _NO32, kind)

    @classmethod
    def of_floats(cls, values: Floats) -> Weights:
        """View float32 values."""
        return cls(_NO16, values, kernels.F32)

    @property
    def arguments(self) -> tuple[Any, Any, int]:
        """The three arguments by which kernels take weights."""
        return self.x16, self.x32, self.kind

    @property
    def bits(self) -> npt.NDArray[Any]:
        """The values' patterns, as unsigned integers; a view."""
        return self.x32.view(np.uint32) if self.kind == kernels.F32 else self.x16

    @property
    def sign_bit(self) -> Any:
        """The pattern of -0."""
        return np.uint32(1 << 31) if self.kind == kernels.F32 else np.uint16(1 << 15)

    def cut(self, start: int, count: int) -> Weights:
        """View ``count`` elements from ``start``."""
        if self.kind == kernels.F32:
            return Weights(self.x16, self.x32[start : start + count], self.kind)
        return Weights(self.x16[start : start + count], self.x32, self.kind)

    def floats(self) -> Floats:
        """Return the values as float32, exactly."""
        if self.kind == kernels.F32:
            return self.x32
        if self.kind == kernels.BF16:
            return (self.x16.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.x16.view(np.float16).astype(np.float32)

    def take(self, source: Weights, sums: Sums) -> None:
        """Fill with the values of ``source``, rounded if the dtype differs; count as kernels do."""
        if self.kind == source.kind:
            self.x16[:], self.x32[:] = source.x16, source.x32
        else:
            count = source.x16.size or source.x32.size
            kernels.convert(*source.arguments, *self.arguments, count, sums)
