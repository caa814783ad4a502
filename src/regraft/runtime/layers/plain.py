"""The plain values of a module's weight, however the module keeps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regraft.errors import UnsupportedError

INT8 = 7.874015718698502e-3
"""bitsandbytes' constant for 1/127 in LLM.int8."""


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
    kind = type(parameter).__name__
    if kind == "Params4bit" and getattr(parameter, "quant_state", None) is not None:
        return _values_of_4bit(parameter)
    if kind == "Int8Params":
        return _values_of_8bit(module, parameter)
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
    """Return map[code] * absmax, in float32, rounded once (bitsandbytes' format)."""
    state, data = parameter.quant_state, parameter.data
    packed = data.reshape(-1).view(torch.uint8)
    if getattr(state, "packing_format_for_cpu", False):
        codes = _codes_packed_for_cpu(packed, *state.shape)
        absmax = state.absmax.T.reshape(-1).float()
    else:
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)
        absmax = _absmax_of_nested(state) if state.nested else state.absmax.float()
    codes = codes[: state.shape.numel()].long()
    scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    values = state.code.to(codes.device).float()[codes] * scales
    return values.to(state.dtype).reshape(state.shape)


def _absmax_of_nested(state: Any) -> torch.Tensor:
    inner = state.state2
    scales = inner.absmax.float().repeat_interleave(inner.blocksize)[: state.absmax.numel()]
    levels = inner.code.to(scales.device).float()[state.absmax.reshape(-1).long()]
    return levels * scales + state.offset


def _codes_packed_for_cpu(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the codes, row by row, of the packing that a forward pass on a CPU leaves behind.

    There, 32 rows by 2 columns are 32 bytes: the first 16 rows in the low halves.
    """
    groups = packed.reshape(rows // 32, columns // 2, 32)
    pairs = torch.cat((groups & 15, groups >> 4), dim=-1)
    return pairs.reshape(rows // 32, columns // 2, 32, 2).transpose(1, 2).reshape(-1)


def _values_of_8bit(module: nn.Module, parameter: Any) -> torch.Tensor:
    state = getattr(module, "state", None)
    codes = getattr(state, "CB", None)
    scales = getattr(state, "SCB", None)
    codes = parameter.data if codes is None else codes
    scales = parameter.SCB if scales is None else scales
    values = codes.float() * scales.float().unsqueeze(1) * INT8
    bias = getattr(module, "bias", None)
    dtype = bias.dtype if isinstance(bias, torch.Tensor) else torch.float16
    return values.to(dtype)
