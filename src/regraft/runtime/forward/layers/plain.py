"""The plain values of a module's weight, however the module keeps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regraft.errors import UnsupportedError
from regraft.quant.formats.int8 import LEVELS
from regraft.runtime.model.quantized_parameters import (
    is_4bit,
    is_8bit,
    is_packed,
    scales_of_8bit,
    scales_of_blocks,
)


def plain_weight(module: nn.Module, leaf: str, where: str = "") -> torch.Tensor:
    """Return a parameter's values; of a quantized weight those that its codes stand for.

    Args:
        module: the module that owns it.
        leaf: its name there.
        where: its full name, for messages.

    Returns:
        The parameter itself where it is plain, else a new tensor of the dtype it computes in.

    Raises:
        UnsupportedError: the values are not at hand.
    """
    parameter = _at_hand(module, leaf)
    if parameter is None:
        raise UnsupportedError(
            "this needs the weight's values, and they are not at hand", where=where or leaf,
            found=f"{type(module).__name__}, {leaf} on no device",
            hint="Load the model without offloading to the disk, or with a format that regraft "
            "reads (plain, bitsandbytes)",
        )  # fmt: skip
    if is_4bit(parameter):
        return _values_of_4bit(parameter)
    scales = scales_of_8bit(module, parameter) if is_8bit(parameter) else None
    if scales is not None:
        return _values_of_8bit(module, parameter, scales)
    return parameter


def _at_hand(module: nn.Module, leaf: str) -> torch.Tensor | None:
    parameter = getattr(module, leaf, None)
    if not isinstance(parameter, torch.Tensor):
        return None
    if parameter.device.type != "meta":
        return parameter
    offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    found = None if offloaded is None else offloaded[leaf]  # accelerate keeps them here
    return found if isinstance(found, torch.Tensor) and found.device.type != "meta" else None


def _values_of_4bit(parameter: Any) -> torch.Tensor:
    """Return map[code] * scale, in float32, rounded once (bitsandbytes' format)."""
    state, data = parameter.quant_state, parameter.data
    packed = data.reshape(-1).view(torch.uint8)
    if is_packed(state):
        codes = _codes_packed_for_cpu(packed, *state.shape)
    else:
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)
    codes = codes[: state.shape.numel()].long()
    scales = scales_of_blocks(state).repeat_interleave(state.blocksize)[: codes.numel()]
    values = state.code.to(codes.device).float()[codes] * scales
    return values.to(state.original_dtype if is_packed(state) else state.dtype).reshape(state.shape)


def _codes_packed_for_cpu(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the codes, row by row, of the packing that a forward pass on a CPU leaves behind.

    There, 32 rows by 2 columns are 32 bytes: the first 16 rows in the low halves.
    """
    groups = packed.reshape(rows // 32, columns // 2, 32)
    pairs = torch.cat((groups & 15, groups >> 4), dim=-1)
    return pairs.reshape(rows // 32, columns // 2, 32, 2).transpose(1, 2).reshape(-1)


def _values_of_8bit(module: nn.Module, parameter: Any, scales: torch.Tensor) -> torch.Tensor:
    used = getattr(getattr(module, "state", None), "CB", None)
    codes = parameter.data if used is None else used
    values = codes.float() * scales.float().unsqueeze(1) * LEVELS.post
    bias = getattr(module, "bias", None)
    dtype = bias.dtype if isinstance(bias, torch.Tensor) else torch.float16
    return values.to(dtype)
