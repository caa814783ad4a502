"""The uniform form: one rank, one scale, for engines that know no other.

Scales are multiplied into B in float64, and B is stored in its own dtype where that holds every
product exactly, else in float32. Ranks are filled up with zeros, which add nothing. Where both
sides of a tie have the same factors, they still have: the output layer's A is the embedding's B.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from regraft.adapters.dialects.form import Bits, LoraModule, Moved, PlainAdapter
from regraft.adapters.dialects.shared.tied import mirrored
from regraft.deltas.rounding import decode, encode
from regraft.formats.files.reading import FilePool
from regraft.tensors import DTYPES


class UniformError(ValueError):
    """An adapter has no uniform form; the message says why."""


def uniform_form(adapter: PlainAdapter) -> tuple[PlainAdapter, float]:
    """Return an adapter with one rank and the scale 1 for all modules, and its relative error.

    The error is that of B, in the Frobenius norm: 0 where every product is exact, else the
    rounding to float32.

    Raises:
        UniformError: a product is beyond float32, or below it; the message names its module.
        FormatError, InputError, AccessError: a tensor cannot be read.
    """
    rank = max((module.rank for module in adapter.modules), default=1)
    made, errors, norms, tied = [], 0.0, 0.0, mirrored(adapter)
    with FilePool() as files:
        for module in adapter.modules:
            turned = module.name in tied
            new, error, norm = _folded(_turned(module) if turned else module, rank, files)
            made.append(_turned(new) if turned else new)
            errors, norms = errors + error, norms + norm
    return replace(adapter, modules=tuple(made)), (errors / norms) ** 0.5 if norms else 0.0


def _turned(module: LoraModule) -> LoraModule:
    """Return a module with its factors transposed, in each other's place."""
    return replace(module, a=module.b.transposed, b=module.a.transposed)


def _folded(module: LoraModule, rank: int, files: FilePool) -> tuple[LoraModule, float, float]:
    scale = module.scale
    values = _values(module.b, files)
    exact = values.astype(np.float64) * scale
    _check_range(module, values, exact)
    dtype = module.b.dtype if _holds(exact, module.b.dtype) else "F32"
    stored = decode(encode(exact.astype(np.float32).ravel(), dtype), dtype).astype(np.float64)
    error = float(np.sum((stored - exact.ravel()) ** 2))
    b = _scaled(module.b, scale, dtype)
    bias = None if module.bias is None else _folded_bias(module, module.bias, files)
    axis = 0 if module.kind != "experts" else 1
    a = _filled(module.a, axis, rank)
    b = _filled(b, 1 if module.kind != "experts" else 2, rank)
    folded = replace(module, rank=rank, scale=1.0, a=a, b=b, bias=bias)
    return folded, error, float(np.sum(exact**2))


def _folded_bias(module: LoraModule, bias: Moved, files: FilePool) -> Moved:
    values = _values(bias, files)
    exact = values.astype(np.float64) * module.scale
    _check_range(module, values, exact)
    return _scaled(bias, module.scale, bias.dtype if _holds(exact, bias.dtype) else "F32")


def _check_range(module: LoraModule, values: np.ndarray, exact: np.ndarray) -> None:
    """Refuse products that no float32 holds: they would become infinite, or all of them nothing.

    Args:
        module: the module.
        values: what is scaled.
        exact: the products, in float64, where they may have become nothing already.

    Raises:
        UniformError: there is one that is too large, or none that is large enough.
    """
    largest = np.abs(exact).max(initial=0.0, where=np.isfinite(exact))
    if largest > np.finfo(np.float32).max:
        raise UniformError(f"{module.name}: {largest:.3g}, its scale times B, is beyond float32")
    if largest < np.finfo(np.float32).tiny and module.scale and np.any(values):
        raise UniformError(
            f"{module.name}: its scale ({module.scale:.3g}) times B is below what float32 holds"
        )


def _values(tensor: Moved, files: FilePool) -> np.ndarray:
    return decode(tensor.bits(files).reshape(-1).view(np.uint8), tensor.dtype).reshape(tensor.shape)


def _holds(exact: np.ndarray, dtype: str) -> bool:
    with np.errstate(over="ignore"):
        there = decode(encode(exact.astype(np.float32).ravel(), dtype), dtype)
    return bool(np.array_equal(there.astype(np.float64), exact.ravel()))


def _scaled(tensor: Moved, scale: float, dtype: str) -> Moved:
    def times(bits: Bits) -> Bits:
        raw = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
        values = decode(raw, tensor.dtype).astype(np.float64) * scale
        unsigned = f"<u{DTYPES[dtype].bits // 8}"
        return encode(values.astype(np.float32), dtype).view(unsigned).reshape(tensor.shape)

    made = tensor.then(tensor.shape, times)
    return replace(made, dtype=dtype)


def _filled(tensor: Moved, axis: int, rank: int) -> Moved:
    missing = rank - tensor.shape[axis]
    if not missing:
        return tensor
    widths = [(0, missing if each == axis else 0) for each in range(len(tensor.shape))]
    shape = tuple(rank if each == axis else size for each, size in enumerate(tensor.shape))
    return tensor.then(shape, lambda bits: np.pad(bits, widths))
