"""What a tensor in a file is: its name, dtype, shape, and where its bytes lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DType:
    """One element type of the safetensors format.

    Attributes:
        name: safetensors' name, such as ``"BF16"``.
        bits: bits per element.
        config_name: the name transformers' ``config.json`` and torch use, such as ``"bfloat16"``.
        is_float: whether it is a floating-point type.
    """

    name: str
    bits: int
    config_name: str
    is_float: bool


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("BOOL", 8, "bool", False),
        DType("U8", 8, "uint8", False),
        DType("I8", 8, "int8", False),
        DType("I16", 16, "int16", False),
        DType("U16", 16, "uint16", False),
        DType("I32", 32, "int32", False),
        DType("U32", 32, "uint32", False),
        DType("I64", 64, "int64", False),
        DType("U64", 64, "uint64", False),
        DType("F8_E5M2", 8, "float8_e5m2", True),
        DType("F8_E4M3", 8, "float8_e4m3fn", True),
        DType("F8_E8M0", 8, "float8_e8m0fnu", True),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", True),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", True),
        DType("F4", 4, "float4_e2m1fn_x2", True),
        DType("F6_E2M3", 6, "float6_e2m3fn", True),
        DType("F6_E3M2", 6, "float6_e3m2fn", True),
        DType("F16", 16, "float16", True),
        DType("BF16", 16, "bfloat16", True),
        DType("F32", 32, "float32", True),
        DType("F64", 64, "float64", True),
        DType("C64", 64, "complex64", False),
    )
}
"""Every dtype the safetensors format knows, by its name there."""

DTYPE_ALIASES = {
    "fp32": "float32", "float": "float32", "f32": "float32",
    "fp16": "float16", "half": "float16", "f16": "float16",
    "bf16": "bfloat16",
}  # fmt: skip
"""What else the dtypes are called whose weights are written; keys are in lower case."""

BY_CONFIG_NAME: dict[str, DType] = {d.config_name: d for d in DTYPES.values()}
"""The same dtypes by the name ``config.json`` uses."""

WORKING_DTYPES = ("F32", "BF16", "F16")
"""Dtypes whose weights regraft can add a delta to, and can write."""


VIRTUAL = -1
"""The offset of a tensor that has no bytes of its own: it is computed when it is asked for."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor inside a file, known from headers alone.

    Attributes:
        name: the tensor's name in the file.
        dtype: a key of :data:`DTYPES`.
        shape: its dimensions; ``()`` is a scalar.
        path: the file that holds it.
        start: absolute byte offset of its first byte in ``path``; :data:`VIRTUAL` for none.
        nbytes: length in bytes. The bytes are row-major, contiguous and little-endian.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_virtual(self) -> bool:
        """Whether it has no bytes in the file, such as a quantized weight as plain values."""
        return self.start < 0

    @property
    def itemsize(self) -> int:
        """Bytes per element; only meaningful for dtypes of whole bytes."""
        return DTYPES[self.dtype].bits // 8


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes a tensor of ``dtype`` and ``shape`` takes, rounded up to a whole one."""
    return (math.prod(shape) * DTYPES[dtype].bits + 7) // 8


_UNITS = {"": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9}
_UNITS |= {"T": 10**12, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str | int) -> int:
    """Return bytes for ``"512MiB"``, ``"5GB"`` (decimal, as in transformers), or a plain number.

    Raises:
        ValueError: the text is not a positive size.
    """
    if isinstance(text, int):
        value = text
    else:
        stripped = text.strip().upper()
        digits = stripped.rstrip("KMGTIB ")
        unit = stripped[len(digits) :].strip()
        if unit not in _UNITS:
            raise ValueError(f"not a size: {text!r}; write for example 512MiB or 5GB")
        try:
            value = int(float(digits) * _UNITS[unit])
        except (ValueError, OverflowError):
            raise ValueError(f"not a size: {text!r}; write for example 512MiB or 5GB") from None
    if value <= 0:
        raise ValueError(f"not a positive size: {text!r}")
    return value
