"""What a base looks like, in a few hundred bytes that travel with an adapter.

An adapter is a difference to one base, and on another it is noise. Names and shapes do not tell
bases of one family apart, so a few of the weights themselves are kept: of at most 16 of the adapted
parameters, 32 values each, as float32, at places that follow from the shape alone. Only these are
read, and of quantized weights only these are decoded.

The same base in another precision differs by rounding. What was measured on
normally distributed weights, as ‖a - b‖ / ‖a‖ over the values that are kept:

=======================================  ======
the same base, float32 to bfloat16       0.0016
float32 to float16                       0.0002
8 bits (bitsandbytes)                    0.0071
NF4 in blocks of 64                      0.091
the same, scales quantized too           0.091
FP4                                      0.12
fine-tuned, by 1% of the weights' norm   0.01
another base of the same shapes          1.4
=======================================  ======

So a base is "another" where a plain weight is off by more than a step of bfloat16 (2^-8 of the
value) in more than 2% of the places, and a quantized one where the norm is off by more than 0.5. By
the first rule a fine-tuned descendant is told from its ancestor; changes of 0.3% of the norm still
show. Behind the noise of 4 bits it is not.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from regraft.runtime.live_base import LiveBase
from regraft.runtime.quantized_parameters import (
    has_lost_scales,
    is_4bit,
    is_8bit,
    is_packed,
    plain_form,
    scales_of_8bit,
)

KEY = "regraft_base"
"""The key of a fingerprint in the header of an adapter's weights."""

Verdict = Literal["same", "other precision", "another", "unknown"]

PARAMETERS, VALUES = 16, 32
STEP = 2.0**-8
"""A step of bfloat16, relative to the value."""

TINY = 2.0**-24
"""A step of the smallest float16 values, which have no exponent to spare."""

SHARE_OFF = 0.02
CODED = 0.5

_VERSION = 1
_GOLDEN = 0.6180339887498949  # places k * golden mod 1 are spread evenly for any number of them
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
    chosen = _spread(sorted(readable), PARAMETERS)
    values = {name: sampled(readable[name]) for name in chosen}
    if not values:
        return None
    taken = np.concatenate(list(values.values()))
    fields = {
        "version": _VERSION,
        "coded": any(is_coded(readable[name]) for name in chosen),
        "sampled": {name: list(shape_of(readable[name])) for name in chosen},
        "values": base64.b64encode(taken.astype("<f4").tobytes()).decode(),
    }
    return json.dumps(fields, separators=(",", ":"))


def compare(fingerprint: str, base: LiveBase) -> Verdict:
    """Return what a base is to the one that a fingerprint was taken of.

    ``"same"``: the values are equal. ``"other precision"``: they differ by rounding. ``"unknown"``:
    they cannot be read here, with names and shapes as they should be, or this is no fingerprint
    that this version knows. ``"another"``: anything else.

    Args:
        fingerprint: as :func:`fingerprint_of` made it.
        base: the base that is here, with no adapter merged into it.
    """
    parsed = _parsed(fingerprint)
    if parsed is None:
        return "unknown"
    sampled_there, values, coded = parsed
    here = parameters_of(base, (_name_in(base, name) for name in sampled_there))
    if len(here) < len(sampled_there):
        return "another"
    there, found = [], []
    for (shape, before), parameter in zip(
        zip(sampled_there.values(), values, strict=True), here.values(), strict=True
    ):
        if shape_of(parameter) != tuple(shape):
            return "another"
        if _is_readable(parameter):
            coded = coded or is_coded(parameter)
            there.append(before)
            found.append(sampled(parameter))
    if not found:
        return "unknown"
    return verdict(np.concatenate(there), np.concatenate(found), coded=coded)


def verdict(there: np.ndarray, here: np.ndarray, *, coded: bool) -> Verdict:
    """Return what values of one base are to those of another at the same places.

    Args:
        there: float32 ``(n,)``.
        here: the same.
        coded: whether one of the bases is quantized.
    """
    if np.array_equal(there, here):
        return "same"
    a, b = there.astype(np.float64), here.astype(np.float64)
    if coded:
        close = float(np.linalg.norm(a - b)) <= CODED * max(float(np.linalg.norm(a)), TINY)
    else:
        off = np.abs(a - b) > STEP * np.maximum(np.abs(a), np.abs(b)) + TINY
        close = float(off.mean()) <= SHARE_OFF
    return "other precision" if close else "another"


def _parsed(text: str) -> tuple[dict[str, Sequence[int]], list[np.ndarray], bool] | None:
    """Return the shapes of the sampled parameters, their values, and whether they were coded.

    None for what is no fingerprint: it comes with the files of strangers.
    """
    try:
        fields: Any = json.loads(text)
        version, shapes = fields["version"], dict(fields["sampled"])
        raw = np.frombuffer(base64.b64decode(fields["values"], validate=True), "<f4")
        counts = [min(VALUES, math.prod(shape)) for shape in shapes.values()]
        coded = bool(fields["coded"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return None
    good = all(isinstance(count, int) and count > 0 for count in counts)
    if version != _VERSION or not counts or not good or sum(counts) != raw.size:
        return None
    return shapes, np.split(raw, np.cumsum(counts)[:-1]), coded


def _name_in(base: LiveBase, name: str) -> str:
    """Return a parameter's name in this base, which may be of another version of transformers."""
    if name in base.checkpoint.tensors or name in base.tied:
        return name
    found = base.index.find(name)
    held = [h.spec.name for f in found for h in f.held]
    return held[0] if len(held) == 1 else name


def _spread(names: Sequence[str], count: int) -> list[str]:
    """Return some of the names, evenly spread."""
    if len(names) <= count:
        return list(names)
    return [names[i * (len(names) - 1) // (count - 1)] for i in range(count)]


def places_of(numel: int, count: int = VALUES) -> np.ndarray:
    """Return where values are taken from a weight of ``numel``: int64 ``(min(count, numel),)``."""
    if numel <= count:
        return np.arange(numel, dtype=np.int64)
    steps = (np.arange(1, count + 1) * _GOLDEN) % 1.0
    return np.minimum((steps * numel).astype(np.int64), numel - 1)


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


def sampled(parameter: Parameter) -> np.ndarray:
    """Return the values of a parameter at :func:`places_of` its shape: float32 ``(n,)``."""
    numel = math.prod(shape_of(parameter))
    with torch.no_grad():
        places = torch.from_numpy(places_of(numel)).to(parameter.weight.device)
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
