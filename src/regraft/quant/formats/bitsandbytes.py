"""bitsandbytes' 4-bit formats, NF4 and FP4, with plain or quantized ("double", "nested") scales.

A weight (out, in) is taken flat and cut into blocks of ``blocksize`` elements, whatever its rows
are; each block has a scale, its largest magnitude ("absmax"). Codes are two to a byte, the first
one in the upper half; a last one without a partner gets the code of zero as one. Then

    absmax = nested_quant_map[absmax_u8] * nested_absmax[block // nested_blocksize]
    absmax = absmax + nested_offset                        where the scales are quantized
    w      = quant_map[code] * absmax                      float32, one rounding each
    w rounded once to the dtype that ``quant_state`` names

as bitsandbytes' ``dequantize_4bit`` has it. NF4: Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.grid import NO_ZEROS, Codes, Levels
from regraft.quant.packing import nibbles, packed_nibbles
from regraft.quant.weight import Block, Found, QuantizedWeight, Read, Stored, missing
from regraft.tensors import BY_CONFIG_NAME, WORKING_DTYPES, TensorSpec

MARK = ".quant_state.bitsandbytes__"
"""What comes between a weight's name and the kind of its codes in the name of its state."""

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes knows."""

_LARGEST_STATE = 64 * 2**10
_DAMAGED = "Download the model again, or quantize it again"

NF4 = Levels.of(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
_POSITIVE = [0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
             0.3333333432674408, 0.5, 0.1666666716337204, 0.25]  # fmt: skip
FP4 = Levels.of([*_POSITIVE, 0.0, *(-level for level in _POSITIVE[1:])])
LEVELS = {"nf4": NF4, "fp4": FP4}
"""What the codes of each kind stand for."""


@dataclass(frozen=True)
class Nested:
    """How scales are quantized: 8-bit codes into a map, blocks of them with scales of their own.

    Attributes:
        blocksize: scales in a block.
        offset: the mean of the scales, which was taken off before; a float32.
    """

    blocksize: int
    offset: float


@dataclass(frozen=True)
class FourBit:
    """NF4 or FP4.

    Attributes:
        name: ``nf4`` or ``fp4``.
        blocksize: elements that share a scale.
        nested: how the scales are quantized; None where they are not.
    """

    name: str
    blocksize: int
    nested: Nested | None = None
    is_writable: bool = True
    stores_transposed: bool = False

    def row_grain(self, weight: QuantizedWeight) -> int:
        """Return 2 where a row ends inside a byte."""
        return 1 + weight.matrix[1] % 2

    def block(self, weight: QuantizedWeight, at: Block, read: Read) -> Codes:
        """Return the codes and scales of a range of the flat weight."""
        first, count = _flat(weight, at)
        raw = np.empty((first + count + 1) // 2 - first // 2, np.uint8)
        read(weight.codes, first // 2, raw)
        codes = nibbles(raw, count + first % 2, high_first=True)[first % 2 :]
        begin, end = first // self.blocksize, -(-(first + count) // self.blocksize)
        scales = self.scales(weight, begin, end, read)
        return Codes(
            codes, 1, count, LEVELS[self.name], scales, NO_ZEROS, end - begin, self.blocksize,
            first=first % self.blocksize,
        )  # fmt: skip

    def scales(self, weight: QuantizedWeight, begin: int, end: int, read: Read) -> Floats:
        """Return the scales of blocks ``begin`` to ``end``."""
        parts = weight.parts
        if self.nested is None:
            return _floats(parts["absmax"], begin, end, read)
        codes = np.empty(end - begin, np.uint8)
        read(parts["absmax"], begin, codes)
        size = self.nested.blocksize
        low = begin // size
        outer = _floats(parts["nested_absmax"], low, -(-end // size), read)
        table = _floats(parts["nested_quant_map"], 0, 256, read)
        scale = table[codes] * outer[np.arange(begin, end) // size - low]
        return np.asarray(scale + np.float32(self.nested.offset), np.float32)

    def pack(self, weight: QuantizedWeight, at: Block, codes: Bytes) -> Bytes:
        """Return codes two to a byte; a block has to begin with a whole byte."""
        assert _flat(weight, at)[0] % 2 == 0
        if codes.size % 2:
            codes = np.append(codes, LEVELS[self.name].zero)
        return packed_nibbles(codes, high_first=True)

    def place(self, weight: QuantizedWeight, at: Block) -> tuple[int, int]:
        """Return offset and length of a block's bytes."""
        first, count = _flat(weight, at)
        return first // 2, (count + 1) // 2

    def trouble(self, weight: QuantizedWeight, read: Read) -> list[Problem]:
        """Return scales that are no finite numbers, and a map that is not the format's."""
        parts, problems = weight.parts, []
        table = _floats(parts["quant_map"], 0, 16, read)
        if not np.array_equal(table, LEVELS[self.name].values):
            problems.append(
                Problem(f"the map is not that of {self.name}", _at(parts["quant_map"]),
                        "the levels that bitsandbytes has built in", hint=_DAMAGED)
            )  # fmt: skip
        plain = ["absmax"] if self.nested is None else ["nested_absmax", "nested_quant_map"]
        for role in plain:
            values = np.empty(parts[role].numel, np.float32)
            read(parts[role], 0, values.view(np.uint8))
            problems += not_finite(parts[role], values)
        return problems


def not_finite(spec: TensorSpec, scales: Floats) -> list[Problem]:
    """Return a problem if scales hold NaN or infinity."""
    bad = int(scales.size - np.count_nonzero(np.isfinite(scales)))
    if not bad:
        return []
    return [
        Problem("scales of a quantized weight are NaN or infinite", _at(spec), "finite numbers",
                f"{bad} of {spec.numel} are not", _DAMAGED)
    ]  # fmt: skip


def _at(spec: TensorSpec) -> str:
    return f"{spec.path}, tensor {spec.name!r}"


def _flat(weight: QuantizedWeight, at: Block) -> tuple[int, int]:
    """Return the first element of a block in the flat weight, and how many it has."""
    return at.rows[0] * weight.matrix[1] + at.columns[0], at.height * at.width


def _floats(spec: TensorSpec, begin: int, end: int, read: Read) -> Floats:
    values: Floats = np.empty(end - begin, np.float32)
    read(spec, 4 * begin, values.view(np.uint8))
    return values


# -- finding them ----------------------------------------------------------------------------------


def find(stored: Stored) -> Found:
    """Find all NF4 and FP4 weights of a checkpoint; every one has a ``quant_state``."""
    weights, problems = list[QuantizedWeight](), list[Problem]()
    for key in stored.tensors:
        name, mark, kind = key.partition(MARK)
        if not mark:
            continue
        try:
            weights.append(_weight(stored, name, kind))
        except _Unfit as unfit:
            problems += unfit.problems
    problems += _contradictions(stored, weights) if not problems else []
    return Found(tuple(weights), tuple(problems))


class _Unfit(Exception):  # noqa: N818  (collected, and raised as a typed error)
    def __init__(self, problems: list[Problem]) -> None:
        super().__init__()
        self.problems = problems


def _weight(stored: Stored, name: str, kind: str) -> QuantizedWeight:
    """Return one weight, its parts checked against its state.

    Raises:
        _Unfit: they do not fit.
    """
    state = _state(stored, f"{name}{MARK}{kind}")
    roles = {"codes": name, "absmax": f"{name}.absmax", "quant_map": f"{name}.quant_map"}
    if "nested_offset" in state:
        roles |= {r: f"{name}.{r}" for r in ("nested_absmax", "nested_quant_map")}
    if lacking := missing(stored, name, roles.values()):
        raise _Unfit(lacking)
    parts = {role: stored.tensors[key] for role, key in roles.items()}
    parts["state"] = stored.tensors[f"{name}{MARK}{kind}"]
    nested = None
    if "nested_offset" in state:
        nested = Nested(state["nested_blocksize"], float(np.float32(state["nested_offset"])))
    dtype = BY_CONFIG_NAME[state["dtype"]].name
    codec = FourBit(kind, state["blocksize"], nested)
    weight = QuantizedWeight(name, tuple(state["shape"]), dtype, codec, parts)
    if problems := _size_problems(weight, codec):
        raise _Unfit(problems)
    return weight


def _state(stored: Stored, key: str) -> dict[str, Any]:
    """Return a weight's state.

    Raises:
        _Unfit: it is not what bitsandbytes writes.
    """
    spec, kind = stored.tensors[key], key.rpartition("__")[2]
    where = f"{stored.where}, tensor {key!r}"
    if stored.read is None:
        what = "the shape of a quantized weight stands in the file, which is not at hand"
        raise _Unfit([Problem(what, where, hint="Download the model and give its folder")])
    raw = np.empty(min(spec.nbytes, _LARGEST_STATE), np.uint8)
    stored.read(spec, 0, raw)
    try:
        state = json.loads(raw.tobytes())
        trouble = _state_trouble(state, kind)
    except (ValueError, RecursionError) as error:
        trouble = str(error)
    if trouble:
        expected = "quant_type, blocksize, dtype and shape as bitsandbytes writes them"
        what = "the state of a quantized weight cannot be read"
        raise _Unfit([Problem(what, where, expected, trouble[:120], _DAMAGED)])
    checked: dict[str, Any] = state
    return checked


def _state_trouble(state: Any, kind: str) -> str:
    """Return what is wrong with a state; nothing if it is right."""
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    shape, nested = state.get("shape"), "nested_offset" in state
    dtype = BY_CONFIG_NAME.get(str(state.get("dtype")))
    outer = state.get("nested_blocksize")
    checks = {
        "quant_type": kind in LEVELS and state.get("quant_type") == kind,
        "blocksize": state.get("blocksize") in BLOCKSIZES,
        "dtype": dtype is not None and dtype.name in WORKING_DTYPES,
        "shape": isinstance(shape, list) and 1 <= len(shape) <= 8 and all(map(_is_size, shape)),
        "nested_blocksize": not nested or (_is_size(outer) and int(outer or 0) <= 2**20),
        "nested_dtype": not nested or state.get("nested_dtype") == "float32",
        "nested_offset": not nested or _is_finite(state["nested_offset"]),
    }
    return ", ".join(f"{n} {state.get(n)!r}" for n, good in checks.items() if not good)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**48


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= float(np.finfo(np.float32).max)


def _size_problems(weight: QuantizedWeight, codec: FourBit) -> list[Problem]:
    count = math.prod(weight.shape)
    blocks = -(-count // codec.blocksize)
    wanted: dict[str, tuple[str | None, int]] = {
        "codes": (None, (count + 1) // 2),
        "quant_map": ("F32", 64),
    }
    if codec.nested is None:
        wanted["absmax"] = ("F32", 4 * blocks)
    else:
        outer = -(-blocks // codec.nested.blocksize)
        wanted |= {"absmax": ("U8", blocks), "nested_absmax": ("F32", 4 * outer)}
        wanted["nested_quant_map"] = ("F32", 1024)
    return [
        Problem(
            f"a quantized weight of shape {weight.shape}, in blocks of {codec.blocksize}, has a "
            "part of another size",
            _at(weight.parts[role]), f"{nbytes} bytes of {dtype or 'codes'}",
            f"{weight.parts[role].nbytes} bytes of {weight.parts[role].dtype}", _DAMAGED,
        )
        for role, (dtype, nbytes) in wanted.items()
        if weight.parts[role].nbytes != nbytes or dtype not in (None, weight.parts[role].dtype)
    ]  # fmt: skip


def _contradictions(stored: Stored, weights: list[QuantizedWeight]) -> list[Problem]:
    """Return what the config says of the weights that they are not."""
    config = stored.config
    where = f"{stored.where}, config.json: quantization_config"
    said = config.get("bnb_4bit_quant_type")
    kinds = sorted({weight.codec.name for weight in weights})
    if config.get("load_in_4bit") and not weights:
        return [Problem("the config says that weights are in 4 bits, and none is", where,
                        f"tensors named ...{MARK}nf4", "none", _DAMAGED)]  # fmt: skip
    if said is not None and kinds and kinds != [said]:
        return [Problem("the config names another kind of codes than the weights have", where,
                        str(said), ", ".join(kinds), _DAMAGED)]  # fmt: skip
    return []
