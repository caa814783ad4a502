"""Between stored bytes and numbers, in numpy: what needs no kernel needs no compiler either."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def decode(raw: Bytes, dtype: str) -> Floats:
    """Return stored values as float32, exactly.

    Args:
        raw: bytes of whole elements.
        dtype: one of :data:`regraft.tensors.WORKING_DTYPES`.
    """
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view(np.float16).astype(np.float32)


def encode(values: Floats, dtype: str) -> Bytes:
    """Return values as they are stored, rounded to nearest, ties to even.

    What is too large for the dtype becomes infinite. NaN is not expected.

    Args:
        values: float32, of any shape; they are taken row by row.
        dtype: one of :data:`regraft.tensors.WORKING_DTYPES`.
    """
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if dtype == "F32":
        return flat.view(np.uint8)
    if dtype == "BF16":
        bits = flat.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)
        return rounded.astype(np.uint16).view(np.uint8)
    with np.errstate(over="ignore"):  # what overflows is counted by whoever asked
        return flat.astype(np.float16).view(np.uint8)
