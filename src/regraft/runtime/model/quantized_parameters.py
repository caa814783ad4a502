"""What bitsandbytes keeps of a parameter that it has quantized, read and not changed.

For products on a CPU with AVX512 in bfloat16, bitsandbytes packs the codes of a ``Linear4bit`` anew
in its first forward pass, rounds the scales to bfloat16, and does without quantized scales. After
``state_dict()`` the codes are back in their order, and the scales still are those. Whoever reads a
4-bit weight has to reckon with all three states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn


def is_4bit(parameter: torch.Tensor) -> bool:
    """Whether a parameter is codes of 4 bits."""
    return getattr(getattr(parameter, "quant_state", None), "shape", None) is not None


def is_8bit(parameter: torch.Tensor) -> bool:
    """Whether a parameter is codes of 8 bits."""
    return type(parameter).__name__ == "Int8Params" and parameter.dtype == torch.int8


def plain_form(parameter: Any) -> tuple[tuple[int, ...], torch.dtype | None] | None:
    """Return shape and dtype of the plain weight behind a quantized one; None for other tensors.

    An 8-bit weight does not say its dtype.
    """
    if is_4bit(parameter):
        state = parameter.quant_state
        return tuple(state.shape), state.original_dtype if is_packed(state) else state.dtype
    return (tuple(parameter.shape), None) if is_8bit(parameter) else None


# -- 8 bits ----------------------------------------------------------------------------------------


def scales_of_8bit(module: nn.Module, parameter: Any) -> torch.Tensor | None:
    """Return the scales of rows: a forward pass moves them from the parameter to the layer."""
    own = getattr(parameter, "SCB", None)
    found = own if own is not None else getattr(getattr(module, "state", None), "SCB", None)
    return found if isinstance(found, torch.Tensor) else None


# -- 4 bits ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scales:
    """What packing for the CPU takes from the state of a 4-bit weight; attributes as there."""

    absmax: torch.Tensor
    nested: bool
    offset: torch.Tensor | None
    state2: Any
    dtype: torch.dtype

    @classmethod
    def of(cls, state: Any) -> Scales:
        """Return those of a state that is not packed."""
        return cls(*(getattr(state, field.name) for field in fields(cls)))


def is_packed(state: Any) -> bool:
    """Whether a weight is packed for products on the CPU."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def has_lost_scales(state: Any) -> bool:
    """Whether a state's scales are those of a packed weight: bfloat16, ``(blocks, rows)``.

    They still are after ``state_dict()`` has turned the codes back.
    """
    return is_packed(state) or (not state.nested and state.absmax.dim() == 2)


def scales_of_blocks(state: Any) -> torch.Tensor:
    """Return the scale of each block of a 4-bit weight, in the order of its elements: float32.

    Args:
        state: of a parameter, or its :class:`Scales`.
    """
    if has_lost_scales(state):
        return state.absmax.T.reshape(-1).float().contiguous()
    if not state.nested:
        return state.absmax.float()
    inner = state.state2
    scales = inner.absmax.float().repeat_interleave(inner.blocksize)[: state.absmax.numel()]
    levels = inner.code.to(scales.device).float()[state.absmax.reshape(-1).long()]
    values = levels * scales
    return values if state.offset is None else values + state.offset


def remembered(parameters: Mapping[str, tuple[nn.Module, str]]) -> dict[str, Scales]:
    """Return the scales that a forward pass would lose, by the parameter's name."""
    found = {}
    for name, (module, leaf) in parameters.items():
        state = getattr(getattr(module, leaf), "quant_state", None)
        if state is None or has_lost_scales(state) or state.absmax.device.type != "cpu":
            continue
        if getattr(module, "support_avx512bf16_for_cpu", False):
            found[name] = Scales.of(state)
    return found
