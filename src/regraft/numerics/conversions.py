"""Weights as raw bits and as float32: the conversions that compiled loops are made of.

Arrays are 1-D and contiguous on purpose: with 2-D arrays LLVM has to assume that they overlap and
stops vectorizing. Weights travel as raw bits in two views of one buffer, ``x16`` (uint16) and
``x32`` (float32); a *kind* says which one is meant, so that one compiled function serves every
pair of dtypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.numerics.compiling import njit
from regraft.numerics.intrinsics import bits_of, float_of, float_to_half, half_to_float

F32, BF16, F16 = 0, 1, 2
KINDS = {"F32": F32, "BF16": BF16, "F16": F16}
"""Number of each working dtype, by its safetensors name."""

ENTRY: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
# Helpers are compiled into their callers, so they need no way in from Python and no cache of
# their own: that is a third of the time the first run takes to compile.
INNER: dict[str, Any] = {
    "_nrt": False,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


@njit(**INNER)
def decode(x16: Any, x32: Any, kind: int, at: Any, out: Any, to: Any, n: Any) -> None:
    """Set ``out[to:to + n]`` to ``n`` weights, as float32."""
    if kind == BF16:
        for j in range(n):
            out[to + j] = float_of(np.uint32(x16[at + j]) << np.uint32(16))
    elif kind == F16:
        for j in range(n):
            out[to + j] = half_to_float(x16[at + j])
    else:
        for j in range(n):
            out[to + j] = x32[at + j]


@njit(inline="always")
def rounded_bits(bits: Any) -> Any:
    """Return the bfloat16 nearest to a float32 given by its bits; of a NaN, anything.

    numba adds integers in 64 bits. Each sum is cut to 32, or half as many values were done at once.
    """
    half = np.uint32(np.uint32(0x7FFF) + np.uint32((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint32(np.uint32(bits + half) >> np.uint32(16))


@njit(inline="always")
def bfloat16_bits(value: Any) -> Any:
    """Round to bfloat16, to nearest even; a NaN keeps its sign and stays a NaN."""
    u = bits_of(value)
    nan = np.uint32((u >> np.uint32(16)) | np.uint32(0x40))
    is_nan = np.uint32(u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(nan if is_nan else rounded_bits(u))


@njit(**INNER)
def encode(values: Any, of: Any, kind: int, x16: Any, x32: Any, at: Any, n: Any) -> None:
    """Round ``n`` float32 values into a buffer."""
    if kind == BF16:
        for j in range(n):
            x16[at + j] = bfloat16_bits(values[of + j])
    elif kind == F16:
        for j in range(n):
            x16[at + j] = float_to_half(values[of + j])
    else:
        for j in range(n):
            x32[at + j] = values[of + j]
