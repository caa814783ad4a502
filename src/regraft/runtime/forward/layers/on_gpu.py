"""Which work can go to the kernels for graphics processors; they are loaded when it first does."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def kernels() -> Any | None:
    """Return the module of kernels; None without triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("regraft.runtime.forward.layers.triton_kernels")


def can_run(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels take these tensors: all on one CUDA device, in a working dtype."""
    where = {tensor.device for tensor in tensors}
    return (
        len(where) == 1
        and where.pop().type == "cuda"
        and all(tensor.dtype in DTYPES for tensor in tensors)
        and kernels() is not None
    )


def can_take(x: Tensor, out: Tensor) -> bool:
    """Whether the kernels take a batch now; compiled code is better off with torch's products."""
    return x.dtype in DTYPES and out.dtype in DTYPES and not torch.compiler.is_compiling()


def grouped(
    pairs: Sequence[tuple[Tensor, Tensor]], rows: Sequence[int | None]
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return what adds each row's own update in place; None where the kernels cannot.

    Args:
        pairs: A (r, in) and B (out, r) with the scale in it.
        rows: for each row of a batch the number of its pair, or None.
    """
    factors = [factor for pair in pairs for factor in pair]
    found = kernels() if factors and can_run(factors) else None
    if found is None or len({factor.dtype for factor in factors}) != 1:
        return None
    return found.SegmentedLora(pairs, rows)  # type: ignore[no-any-return]
