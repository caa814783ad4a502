"""Live weights that bitsandbytes has quantized, seen as the files of a checkpoint hold them.

Codes that a forward pass on a CPU has packed anew are turned back here, which is exact; scales that
it has rounded cannot be, so they are remembered while they are whole. The next forward pass packs
again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from regraft.errors import FormatError
from regraft.merging.inputs.source import WholeSource
from regraft.numerics.arrays import Bytes
from regraft.quant.formats.bitsandbytes import FourBit, Nested
from regraft.quant.formats.int8 import Int8
from regraft.quant.weight import Codec, QuantizedWeight
from regraft.runtime.in_place.weights import TensorMemory, bytes_of, check_at_hand, plain
from regraft.runtime.model.quantized_parameters import (
    Scales,
    has_lost_scales,
    is_packed,
    scales_of_8bit,
    scales_of_blocks,
)
from regraft.tensors import BY_CONFIG_NAME, TensorSpec, nbytes_of


class LiveQuantized(WholeSource):
    """A quantized parameter; a :class:`regraft.merging.inputs.source.Source` of its stored tensors.

    Attributes:
        module, leaf: the layer, and the attribute that the parameter is.
        weight: what it is.
    """

    def __init__(self, spec: TensorSpec, module: nn.Module, leaf: str, scales: Scales | None):
        """Take a parameter.

        Args:
            spec: its name, and its shape and dtype as a plain weight.
            module, leaf: where it is.
            scales: of a 4-bit weight, as they were before a forward pass; None if that is not
                known.

        Raises:
            UnsupportedError: it is offloaded.
            FormatError: its scales are no finite numbers.
        """
        self.module, self.leaf = module, leaf
        self._memory: TensorMemory | None = None
        check_at_hand(self.parameter, spec.name)
        state = getattr(self.parameter, "quant_state", None)
        self._scales = _known(state, scales) if state is not None else None
        codec: Codec
        if self._scales is not None:
            codec, parts = _four_bit(state, self._scales)
            codes = _spec(spec.name, "uint8", ((spec.numel + 1) // 2,))
        else:
            codec, parts = Int8(), {"scales": _needed_scales(module, self.parameter)}
            codes = _spec(spec.name, "int8", spec.shape)
        specs = {r: _spec(f"{spec.name}.{r}", str(t.dtype), t.shape) for r, t in parts.items()}
        at_hand = {r: t.detach().contiguous().cpu() for r, t in parts.items()}
        self._parts = {specs[role].name: bytes_of(t) for role, t in at_hand.items()}
        specs["codes"] = codes
        self.weight = QuantizedWeight(spec.name, spec.shape, spec.dtype, codec, specs)
        if problems := codec.trouble(self.weight, self.read):
            raise FormatError(problems)

    @property
    def parameter(self) -> Any:
        """The parameter as it is now."""
        return getattr(self.module, self.leaf)

    @property
    def nbytes(self) -> int:
        """The bytes that codes and scales take."""
        return sum(spec.nbytes for spec in self.weight.parts.values())

    def open(self) -> torch.Tensor:
        """Return the codes, in the order that files have them in, to be read and written."""
        parameter = self.parameter
        if self._scales is not None:
            _unpack(parameter, self._scales)
            codes = plain(parameter)
            codes = codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)
        else:
            _make_one(self.module, parameter)
            codes = plain(parameter)
        self._memory = TensorMemory(codes, self.weight.name)
        return codes

    def close(self) -> None:
        """Let go of the memory."""
        self._memory = None

    # -- as a source -----------------------------------------------------------------------------

    def read(self, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Fill a buffer with bytes of a stored tensor."""
        if spec.name in self._parts:
            buffer[:] = self._parts[spec.name][offset : offset + buffer.size]
        elif self._memory is not None:
            self._memory.read(offset, buffer)
        else:
            raise ValueError(f"{spec.name} is not open")


def _spec(name: str, dtype: str, shape: Iterable[int]) -> TensorSpec:
    kind, sizes = BY_CONFIG_NAME[dtype.removeprefix("torch.")].name, tuple(shape)
    return TensorSpec(name, kind, sizes, Path("memory"), 0, nbytes_of(kind, sizes))


# -- 8 bits ----------------------------------------------------------------------------------------


def _needed_scales(module: nn.Module, parameter: Any) -> torch.Tensor:
    """Return the scales of an 8-bit weight in float32.

    Raises:
        FormatError: there are none.
    """
    scales = scales_of_8bit(module, parameter)
    if scales is None:
        raise FormatError(
            "an 8-bit weight has no scales", where=type(module).__name__, expected="SCB",
            found="nothing", hint="Load the model again",
        )  # fmt: skip
    return scales.float()


def _make_one(module: nn.Module, parameter: Any) -> None:
    """Make the parameter hold the very codes that the layer computes with.

    They can be two tensors of equal content until the first forward pass makes them one.
    """
    state = getattr(module, "state", None)
    used = getattr(state, "CB", None)
    if used is not None:
        parameter.data = used
    elif getattr(parameter, "CB", None) is not None:
        parameter.CB = parameter.data


# -- 4 bits ----------------------------------------------------------------------------------------


def _four_bit(state: Any, scales: Scales) -> tuple[FourBit, dict[str, torch.Tensor]]:
    """Return how a 4-bit weight is stored, and its stored tensors but for the codes, by role."""
    parts = {"absmax": scales.absmax, "quant_map": state.code}
    nested = None
    if scales.nested:
        nested = Nested(scales.state2.blocksize, float(scales.offset or 0.0))
        parts |= {"nested_absmax": scales.state2.absmax, "nested_quant_map": scales.state2.code}
    return FourBit(state.quant_type, state.blocksize, nested), parts


def _known(state: Any, scales: Scales | None) -> Scales:
    """Return a state's scales as whole as they are known."""
    if not has_lost_scales(state):
        return Scales.of(state)
    if scales is not None and _are_of(scales, state):
        return scales
    return Scales(scales_of_blocks(state), False, None, None, state.original_dtype)


def _are_of(scales: Scales, state: Any) -> bool:
    """Whether a packed state's scales are these, rounded."""
    values, rows = scales_of_blocks(scales), state.absmax.shape[1]
    if values.numel() != state.absmax.numel():
        return False
    rounded = values.reshape(rows, -1).T.to(state.absmax.dtype)
    return bool(torch.equal(rounded, state.absmax))


def _unpack(parameter: Any, scales: Scales) -> None:
    """Put codes and scales back to what they were before a forward pass; nothing if none was."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = parameter.quant_state
    if not has_lost_scales(state):
        return
    if is_packed(state):
        codes_only = SimpleNamespace(
            packing_format_for_cpu=True, original_nested=False, original_dtype=scales.dtype,
            original_qshape=state.original_qshape,
            original_storage_type=getattr(state, "original_storage_type", None),
        )  # fmt: skip
        parameter.data, _ = _convert_weight_packed_for_cpu_inverse(parameter.data, codes_only)
    for field in fields(scales):
        setattr(state, field.name, getattr(scales, field.name))
    state.packing_format_for_cpu = False
