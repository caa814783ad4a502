"""Tensors of several dtypes as tensors of one, without a rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from regraft.adapters.dialects.form import Bits, Moved
from regraft.deltas.rounding import decode


def as_one_dtype(tensors: Sequence[Moved]) -> list[Moved]:
    """Return tensors of one dtype: theirs, or float32, which holds what the others hold."""
    if len({tensor.dtype for tensor in tensors}) <= 1:
        return list(tensors)
    return [tensor if tensor.dtype == "F32" else _in_float32(tensor) for tensor in tensors]


def _in_float32(tensor: Moved) -> Moved:
    def widened(bits: Bits) -> Bits:
        raw = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
        return decode(raw, tensor.dtype).view("<u4").reshape(tensor.shape)

    return replace(tensor.then(tensor.shape, widened), dtype="F32")
