"""The fingerprint of a running model: values of its parameters, read one by one.

What a fingerprint is and what it tells is said in :mod:`regraft.adapters.fingerprint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from regraft.adapters.fingerprint import (
    KEY,
    Fingerprint,
    Verdict,
    grown,
    parsed,
    places_of,
    spread,
    verdict,
)
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.quantized_parameters import (
    has_lost_scales,
    is_4bit,
    is_8bit,
    is_packed,
    plain_form,
    scales_of_8bit,
)

__all__ = ["KEY", "Parameter", "compare", "fingerprint_of", "parameters_of", "sampled"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a running model.

    Attributes:
        module: that has it.
        weight: the parameter, which may be packed codes.
    """

    module: nn.Module
    weight: torch.Tensor


def parameters_of(base: LiveBase, names: Iterable[str]) -> dict[str, Parameter]:
    """Return parameters of a base by name; names that it does not have are left out."""
    found = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = base.modules.get(path)
        weight = getattr(module, leaf, None)
        if module is not None and isinstance(weight, torch.Tensor):
            found[name] = Parameter(module, weight)
    return found


def fingerprint_of(parameters: Mapping[str, Parameter]) -> str | None:
    """Return the fingerprint of a base, as compact JSON; None if no weight of it can be read.

    Args:
        parameters: those that an adapter changes, by name.
    """
    readable = {n: p for n, p in parameters.items() if _is_readable(p)}
    chosen = spread(sorted(readable))
    if not chosen:
        return None
    return Fingerprint(
        {name: shape_of(readable[name]) for name in chosen},
        tuple(sampled(readable[name]) for name in chosen),
        any(is_coded(readable[name]) for name in chosen),
    ).to_text()


def compare(fingerprint: str, base: LiveBase, rename: Callable[[str], str] = str) -> Verdict:
    """Return what a base is to the one that a fingerprint was taken of.

    Args:
        fingerprint: as :func:`fingerprint_of` made it.
        base: the base that is here, with no adapter merged into it.
        rename: gives this base's name for a parameter of the one that was trained on, where all
            names of the adapter begin otherwise here.
    """
    taken = parsed(fingerprint)
    if taken is None:
        return "unknown"
    here = parameters_of(base, (_name_in(base, rename(name)) for name in taken.shapes))
    if len(here) < len(taken.shapes):
        return "another"
    there, found, coded = [], [], taken.coded
    for shape, before, parameter in zip(
        taken.shapes.values(), taken.values, here.values(), strict=True
    ):
        common = grown(shape, shape_of(parameter))
        if common is None:
            return "another"
        if _is_readable(parameter):
            coded = coded or is_coded(parameter)
            there.append(before[common])
            found.append(sampled(parameter, places_of(math.prod(shape))[common]))
    if not sum(map(len, found)):
        return "unknown"
    return verdict(np.concatenate(there), np.concatenate(found), coded=coded)


def _name_in(base: LiveBase, name: str) -> str:
    """Return a parameter's name in this base, which may be of another version of transformers."""
    if name in base.checkpoint.tensors or name in base.tied:
        return name
    found = base.index.find(name)
    held = [h.spec.name for f in found for h in f.held]
    return held[0] if len(held) == 1 else name


# -- reading ---------------------------------------------------------------------------------------


def shape_of(parameter: Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter's plain weight."""
    form = plain_form(parameter.weight)
    return form[0] if form is not None else tuple(parameter.weight.shape)


def is_coded(parameter: Parameter) -> bool:
    """Whether a parameter is quantized."""
    return plain_form(parameter.weight) is not None


def _is_readable(parameter: Parameter) -> bool:
    weight = parameter.weight
    if weight.is_meta or weight.numel() == 0:
        return False
    if is_8bit(weight):
        return scales_of_8bit(parameter.module, weight) is not None
    return is_4bit(weight) or weight.dtype in _FLOATS


def sampled(parameter: Parameter, at: np.ndarray | None = None) -> np.ndarray:
    """Return the values of a parameter at places in row-major order: float32 ``(n,)``.

    Args:
        parameter: the parameter.
        at: the places; by default :func:`places_of` its shape.
    """
    if at is None:
        at = places_of(math.prod(shape_of(parameter)))
    with torch.no_grad():
        places = torch.from_numpy(at).to(parameter.weight.device)
        if is_4bit(parameter.weight):
            values = _four_bit(parameter.weight, places)
        elif is_8bit(parameter.weight):
            values = _eight_bit(parameter, places)
        else:
            values = _at(parameter.weight, places)
        found: np.ndarray = values.float().cpu().numpy()
    return found


def _at(weight: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return elements by their place in row-major order, without a copy of the weight."""
    return weight.detach()[torch.unravel_index(places, tuple(weight.shape))]


def _four_bit(weight: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return values of a 4-bit weight: code * scale, as bitsandbytes dequantizes it."""
    state: Any = weight.quant_state
    packed = weight.detach().view(torch.uint8).reshape(-1)
    codes = state.code.to(places.device)[_codes(packed, state, places)]
    values = codes * _scales(state, places)
    return values if is_packed(state) else values.to(state.dtype)


def _codes(packed: torch.Tensor, state: Any, places: torch.Tensor) -> torch.Tensor:
    """Return codes; two lie in a byte, the first in the upper half.

    Where bitsandbytes has packed them for a CPU, those of 32 rows and 2 columns are 64 in a row, of
    which the first 32 are the lower halves of 32 bytes.
    """
    if not is_packed(state):
        both = packed[places // 2].long()
        return torch.where(places % 2 == 0, both >> 4, both & 15)
    rows, columns = places // state.shape[-1], places % state.shape[-1]
    group = (rows // 32) * (state.shape[-1] // 2) + columns // 2
    within = (rows % 32) * 2 + columns % 2
    both = packed[group * 32 + within % 32].long()
    return torch.where(within < 32, both & 15, both >> 4)


def _scales(state: Any, places: torch.Tensor) -> torch.Tensor:
    """Return the scales of the blocks that places lie in; they may be quantized themselves."""
    if has_lost_scales(state):
        rows, columns = places // state.shape[-1], places % state.shape[-1]
        lost: torch.Tensor = state.absmax[columns // state.blocksize, rows].float()
        return lost
    blocks = places // state.blocksize
    scales: torch.Tensor = state.absmax[blocks]
    if not state.nested:
        return scales.float()
    outer = state.state2
    return outer.code[scales.long()] * outer.absmax[blocks // outer.blocksize] + state.offset


def _eight_bit(parameter: Parameter, places: torch.Tensor) -> torch.Tensor:
    """Return values of a bitsandbytes 8-bit weight: code * scale of the row / 127."""
    codes = _at(parameter.weight, places).float()
    rows = places // parameter.weight.shape[-1]
    scales: Any = scales_of_8bit(parameter.module, parameter.weight)
    return codes * scales.to(places.device)[rows].float() / 127
