"""bitsandbytes' 4-bit formats, NF4 and FP4, with plain or quantized ("double", "nested") scales.

A weight (out, in) is taken flat and cut into blocks of ``blocksize`` elements, whatever its rows
are; each block has a scale, its largest magnitude ("absmax"). Codes are two to a byte, the first
one in the upper half; a last one without a partner gets the code of zero as one. Then

    absmax = nested_quant_map[absmax_u8] * nested_absmax[block // nested_blocksize]
    absmax = absmax + nested_offset                        where the scales are quantized
    w      = quant_map[code] * absmax                      float32, one rounding each
    w rounded once to the dtype that ``quant_state`` names

as bitsandbytes' ``dequantize_4bit`` has it. NF4: Dettmers et al. 2023, arXiv:2305.14314.

Made, they have the bytes of bitsandbytes 0.50 (``quantize_4bit`` on a CPU): ``absmax = max |w|`` of
64 elements of the flat weight; the level nearest to ``w * (1 / max(absmax, 1e-38))``, the lower one
halfway; in a last block that is not full ``absmax = max(absmax, 1e-38)`` and ``w / absmax``. Codes
are of the exact scales, also where the stored ones are quantized: ``offset = mean(absmax)``, summed
as torch does on one thread (:func:`~regraft.quant.making_kernels.torch_sum`; with more threads
torch itself splits the sum from 32768 scales on), then ``absmax - offset`` in blocks of 256 to 8
bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.formats.fitting import DAMAGED, Unfit
from regraft.quant.grid import NO_ZEROS, Codes, Levels
from regraft.quant.making import Making, StoredOutput, element_count, raw_bytes
from regraft.quant.making_kernels import LUT_SIZE, eight_bit_codes, four_bit_codes, torch_sum
from regraft.quant.packing import nibbles, packed_nibbles
from regraft.quant.weight import Block, Codec, FoundWeights, QuantizedWeight, Read, Stored, missing
from regraft.tensors import BY_CONFIG_NAME, DTYPES, WORKING_DTYPES, TensorSpec

MARK = ".quant_state.bitsandbytes__"
"""What comes between a weight's name and the kind of its codes in the name of its state."""

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes knows."""

_LARGEST_STATE = 64 * 2**10

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

_NESTED_BLOCK = 256
_LONGEST_NUMBER = 24
"""Characters of the longest float64 in JSON."""


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
                        "the levels that bitsandbytes has built in", hint=DAMAGED)
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
                f"{bad} of {spec.numel} are not", DAMAGED)
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


def find(stored: Stored) -> FoundWeights:
    """Find all NF4 and FP4 weights of a checkpoint; every one has a ``quant_state``."""
    weights, problems = list[QuantizedWeight](), list[Problem]()
    for key in stored.tensors:
        name, mark, kind = key.partition(MARK)
        if not mark:
            continue
        try:
            weights.append(_weight(stored, name, kind))
        except Unfit as unfit:
            problems += unfit.problems
    problems += _contradictions(stored, weights) if not problems else []
    return FoundWeights(tuple(weights), tuple(problems))


def _weight(stored: Stored, name: str, kind: str) -> QuantizedWeight:
    """Return one quantized weight, with its parts checked against its stored state.

    Raises:
        Unfit: they do not fit.
    """
    state = _state(stored, f"{name}{MARK}{kind}")
    roles = {"codes": name, "absmax": f"{name}.absmax", "quant_map": f"{name}.quant_map"}
    if "nested_offset" in state:
        roles |= {r: f"{name}.{r}" for r in ("nested_absmax", "nested_quant_map")}
    if lacking := missing(stored, name, roles.values()):
        raise Unfit(lacking)
    parts = {role: stored.tensors[key] for role, key in roles.items()}
    parts["state"] = stored.tensors[f"{name}{MARK}{kind}"]
    nested = None
    if "nested_offset" in state:
        nested = Nested(state["nested_blocksize"], float(np.float32(state["nested_offset"])))
    dtype = BY_CONFIG_NAME[state["dtype"]].name
    codec = FourBit(kind, state["blocksize"], nested)
    weight = QuantizedWeight(name, tuple(state["shape"]), dtype, codec, parts)
    if problems := _size_problems(weight, codec):
        raise Unfit(problems)
    return weight


def _state(stored: Stored, key: str) -> dict[str, Any]:
    """Return a weight's state.

    Raises:
        Unfit: it is not what bitsandbytes writes.
    """
    spec, kind = stored.tensors[key], key.rpartition("__")[2]
    where = f"{stored.where}, tensor {key!r}"
    if stored.read is None:
        what = "the shape of a quantized weight stands in the file, which is not at hand"
        raise Unfit([Problem(what, where, hint="Download the model and give its folder")])
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
        raise Unfit([Problem(what, where, expected, trouble[:120], DAMAGED)])
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
            f"{weight.parts[role].nbytes} bytes of {weight.parts[role].dtype}", DAMAGED,
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
                        f"tensors named ...{MARK}nf4", "none", DAMAGED)]  # fmt: skip
    if said is not None and kinds and kinds != [said]:
        return [Problem("the config names another kind of codes than the weights have", where,
                        str(said), ", ".join(kinds), DAMAGED)]  # fmt: skip
    return []


@cache
def _bounds(kind: str) -> tuple[Floats, Bytes]:
    """Return what lies halfway between levels, and the codes in the order of levels.

    Those of NF4 are in it, for which nothing is returned. Of the two zeros of FP4 code 0 is the
    lower one.
    """
    values = LEVELS[kind].values
    order = np.argsort(values, kind="stable").astype(np.uint8)
    bounds = (values[order[:-1]] + values[order[1:]]) / np.float32(2)
    same = np.array_equal(order, np.arange(16))
    return bounds.astype(np.float32), order[:0] if same else order


@cache
def dynamic_map() -> Floats:
    """Return the 256 levels for scales of 8 bits: ``create_dynamic_map`` of bitsandbytes.

    For each of seven powers of ten, means of even steps from 0.1 to 1, as torch's ``linspace`` has
    them: from the nearer end, multiplied and added with one rounding.
    """
    found = [np.array([0, 1], np.float32)]
    low, high = np.float32(0.1), np.float32(1)
    for i in range(7):
        n = 2**i + 1
        step, k = np.float64(np.float32((high - low) / np.float32(n - 1))), np.arange(n)
        steps = np.where(k < n // 2, low + step * k, high - step * (n - 1 - k)).astype(np.float32)
        means = (steps[:-1] + steps[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        found += [means, -means]
    return np.sort(np.concatenate(found)).astype(np.float32)


@cache
def _lut() -> Bytes:
    """Return the code of each of 65536 even steps from -1 to 1."""
    table = dynamic_map()
    i = np.arange(LUT_SIZE, dtype=np.float32)
    steps = (i + i) / np.float32(LUT_SIZE - 1) - np.float32(1)
    between = (table[:-1] + table[1:]) * np.float32(0.5)
    return np.searchsorted(between, steps, side="left").astype(np.uint8)


@dataclass(frozen=True)
class FourBitMaker:
    """NF4 and FP4.

    Attributes:
        name: ``nf4`` or ``fp4``.
        dtype: safetensors dtype of the model, which its state names.
        nested: whether scales are quantized ("double quantization").
        blocksize: elements that share a scale.
    """

    name: str
    dtype: str = "BF16"
    nested: bool = False
    blocksize: int = 64

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether there is anything to quantize; it may have any shape."""
        return element_count(shape) > 0 and len(shape) > 0

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[StoredOutput, ...]:
        """Return codes, scales, maps and state, in the order of a state dict."""
        count = element_count(shape)
        blocks = -(-count // self.blocksize)
        found = [
            StoredOutput(name, "U8", ((count + 1) // 2, 1), "codes"),
            StoredOutput(f"{name}.absmax", "U8" if self.nested else "F32", (blocks,), "absmax"),
            StoredOutput(f"{name}.quant_map", "F32", (16,), "quant_map"),
        ]
        if self.nested:
            outer = -(-blocks // _NESTED_BLOCK)
            found.append(StoredOutput(f"{name}.nested_absmax", "F32", (outer,), "nested_absmax"))
            found.append(
                StoredOutput(f"{name}.nested_quant_map", "F32", (256,), "nested_quant_map")
            )
        length = len(self.state(shape, 0.0 if self.nested else None))
        return (*found, StoredOutput(f"{name}{MARK}{self.name}", "U8", (length,), "state"))

    def state(self, shape: tuple[int, ...], offset: float | None) -> bytes:
        """Return ``quant_state`` as bitsandbytes writes it.

        Spaces after it make its length the same for every offset, as it has to be known before the
        offset is. JSON allows them, and bitsandbytes reads it as JSON.
        """
        state = {
            "quant_type": self.name, "blocksize": self.blocksize,
            "dtype": DTYPES[self.dtype].config_name, "shape": list(shape),
        }  # fmt: skip
        if offset is None:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32"}
        longest = len(json.dumps(state | {"nested_offset": 0})) - 1 + _LONGEST_NUMBER
        return json.dumps(state | {"nested_offset": offset}).encode().ljust(longest)

    def begin(self, name: str, shape: tuple[int, ...]) -> Making:
        """Return the state of one weight that is being made."""
        return _FourBitMaking(self, name, shape)

    def weight(self, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        """Return how a weight will be stored, without its parts and the scales of its scales."""
        return QuantizedWeight(name, shape, self.dtype, FourBit(self.name, self.blocksize), {})

    def config(self) -> dict[str, Any]:
        """Return ``quantization_config`` as transformers writes it."""
        return bitsandbytes_config(
            load_in_4bit=True, bnb_4bit_quant_type=self.name,
            bnb_4bit_use_double_quant=self.nested,
            bnb_4bit_compute_dtype=DTYPES[self.dtype].config_name,
        )  # fmt: skip


def bitsandbytes_config(**settings: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "_load_in_4bit": False, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False, "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0, "load_in_4bit": False, "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }  # fmt: skip
    said = {f"_{key}": value for key, value in settings.items() if f"_{key}" in usual}
    return usual | settings | said


class _FourBitMaking(Making):
    def __init__(self, maker: FourBitMaker, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(name, shape, (1, element_count(shape)), (1, maker.blocksize))
        self.maker = maker
        self._codec = FourBit(maker.name, maker.blocksize)
        self._read_back = self.absmax[0]

    def finish(self) -> Mapping[str, Bytes]:
        self._check_finite()
        maker, absmax = self.maker, self.absmax[0]
        if self.columns % self.run:
            absmax[-1] = max(absmax[-1], np.float32(1e-38))
        small = {"quant_map": raw_bytes(LEVELS[maker.name].values)}
        if not maker.nested:
            state = maker.state(self.shape, None)
            return small | {"absmax": raw_bytes(absmax), "state": np.frombuffer(state, np.uint8)}
        return small | self._nest(absmax)

    def _nest(self, absmax: Floats) -> dict[str, Bytes]:
        """Quantize the scales themselves."""
        offset = np.float32(np.float32(torch_sum(absmax)) / np.float32(absmax.size))
        if not np.isfinite(offset):
            raise self._not_finite("the sum of its scales beyond float32")
        codes = np.empty(absmax.size, np.uint8)
        outer = np.empty(-(-absmax.size // _NESTED_BLOCK), np.float32)
        table = dynamic_map()
        eight_bit_codes(absmax - offset, _NESTED_BLOCK, _lut(), codes, outer)
        scale = table[codes] * np.repeat(outer, _NESTED_BLOCK)[: absmax.size]
        self._read_back = (scale + offset).astype(np.float32)
        self._codec = FourBit(self.maker.name, self.run, Nested(_NESTED_BLOCK, float(offset)))
        state = self.maker.state(self.shape, float(offset))
        return {
            "absmax": codes,
            "nested_absmax": raw_bytes(outer),
            "nested_quant_map": raw_bytes(table),
            "state": np.frombuffer(state, np.uint8),
        }

    @property
    def codec(self) -> Codec:
        return self._codec

    def encode(self, at: Block, values: Floats) -> Bytes:
        seen = self._seen(at)
        assert seen.columns[0] % 2 == 0
        codes = self._nearest(at, values)
        if codes.size % 2:
            assert seen.columns[1] == self.columns
            codes = np.append(codes, LEVELS[self.maker.name].zero)
        return packed_nibbles(codes, high_first=True)

    def _nearest(self, at: Block, values: Floats) -> Bytes:
        seen = self._seen(at)
        part = self._part(seen)
        full = self.columns // self.run * self.run
        codes = np.empty(seen.width, np.uint8)
        four_bit_codes(
            values, self.absmax[0, part.columns], self.run, part.first,
            min(max(full - seen.columns[0], 0), seen.width), *_bounds(self.maker.name), codes,
        )  # fmt: skip
        return codes

    def start_codes(self, at: Block, values: Floats) -> Codes:
        part = self._part(self._seen(at))
        scales = self._read_back[part.columns]
        return Codes(
            self._nearest(at, values), 1, values.size, LEVELS[self.maker.name], scales, NO_ZEROS,
            scales.size, self.run, first=part.first,
        )  # fmt: skip
