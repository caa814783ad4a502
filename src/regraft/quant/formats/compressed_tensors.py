"""compressed-tensors: the formats that llm-compressor writes and vLLM reads, but the sparse ones.

    w = (code - zero) * scale                    one product, rounded once to the dtype of the scale

A scale serves a group of inputs of an output, an output, a block, or the whole weight (out, in).

- ``pack-quantized``: whole numbers of 4 or 8 bits, stored with 2^(bits-1) added, from the lowest
  bits of 32-bit words on; rows end with a word. Zeros, where there are any, are packed likewise,
  but down the outputs. ``weight_g_idx``, which older versions of it wrote, says the group of
  each input.
- ``int-quantized``, ``float-quantized``, ``naive-quantized``: bytes, int8 or float8 (e4m3).
- ``nvfp4-pack-quantized``: float4 (e2m1), two to a byte, the lower half first; the scale of 16
  inputs is ``float8 / weight_global_scale``, a float32 division.
- ``mxfp4-pack-quantized``, ``mxfp8-quantized``: float4 or float8, and for 32 inputs a scale of
  2^(byte - 127).

The last three become BF16. Elsewhere the library's values have the dtype of the scales; if that is
F32 they become what the config says the model is, as transformers has it. The formulas are those of
``_dequantize`` in compressed-tensors' ``forward_helpers.py`` and of its compressors.

Which format a weight has is read off its tensors, and one of the config's groups has to agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.bit_packing import STORED_AS, codes_down, floats_of, window, words_for
from regraft.quant.formats.bitsandbytes import not_finite
from regraft.quant.formats.compressed_config import Scheme, Seen, check_formats, schemes_of
from regraft.quant.formats.fitting import DAMAGED, Unfit, config_where, misfits
from regraft.quant.grid import NO_ZEROS, Codes, Levels
from regraft.quant.packing import nibbles, packed_nibbles
from regraft.quant.weight import Block, FoundWeights, QuantizedWeight, Read, Stored, missing
from regraft.tensors import WORKING_DTYPES, TensorSpec

_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.nan).astype(np.float32)

LEVELS = {
    "int4": Levels.of(np.arange(16) - 8),
    "packed int8": Levels.of(np.arange(256) - 128),
    "int8": Levels.of(np.arange(256, dtype=np.uint8).view(np.int8)),
    "float8": Levels.of(_E4M3),
    "float4": Levels.of(np.concatenate([_E2M1, -_E2M1])),
}
"""What codes stand for, by how they are stored."""


@dataclass(frozen=True)
class Compressed:
    """A weight of compressed-tensors.

    Attributes:
        name: the format, with the bits where it has several.
        coding: a key of :data:`LEVELS`.
        run, row_run: inputs and outputs that share a scale.
    """

    name: str
    coding: str
    run: int
    row_run: int
    is_writable: bool = True
    stores_transposed: bool = False

    def row_grain(self, weight: QuantizedWeight) -> int:
        """Return 1: a row begins with a byte."""
        del weight
        return 1

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        return 4 if self.coding.endswith("4") else 8

    def _line(self, weight: QuantizedWeight) -> int:
        """Return the bytes of a row."""
        return weight.codes.nbytes // weight.matrix[0]

    def block(self, weight: QuantizedWeight, at: Block, read: Read) -> Codes:
        """Return the codes of a block, with the scales and zeros that reach into it."""
        codes = self._codes(weight, at, read)
        levels = LEVELS[self.coding]
        rows = (at.rows[0] // self.row_run, -(-at.rows[1] // self.row_run))
        groups = self._groups(weight, read)
        if groups is not None:
            mine = groups[at.columns[0] : at.columns[1]]
            columns = (int(mine.min()), int(mine.max()) + 1)
            scales = _scales(weight, rows, columns, read)[:, mine - columns[0]]
            zeros = _zeros(weight, rows, columns, self.bits, read)
            zeros = zeros[:, mine - columns[0]] if zeros.size else zeros
            return Codes(
                codes, at.height, at.width, levels, scales.ravel(), zeros.ravel(), at.width, 1
            )
        columns = (at.columns[0] // self.run, -(-at.columns[1] // self.run))
        scales = _scales(weight, rows, columns, read)
        zeros = _zeros(weight, rows, columns, self.bits, read)
        return Codes(
            codes, at.height, at.width, levels, scales.ravel(), zeros.ravel(), scales.shape[1],
            self.run, self.row_run, at.columns[0] % self.run, at.rows[0] % self.row_run,
        )  # fmt: skip

    def _codes(self, weight: QuantizedWeight, at: Block, read: Read) -> Bytes:
        line, each = self._line(weight), 8 // self.bits
        begin, end = at.columns[0] // each, -(-at.columns[1] // each)
        if at.columns == (0, weight.matrix[1]):
            end = line
        raw = window(read, weight.codes, at.rows, (begin, end), np.uint8, line)
        codes = raw.reshape(-1)
        if self.bits == 4:
            codes = nibbles(codes, codes.size * 2, high_first=False)
        low = at.columns[0] - begin * each
        width = (end - begin) * each
        if width == at.width:
            return codes
        return np.ascontiguousarray(codes.reshape(-1, width)[:, low : low + at.width]).ravel()

    def _groups(self, weight: QuantizedWeight, read: Read) -> npt.NDArray[np.int32] | None:
        """Return the group of each input, if that is not the natural one."""
        if "groups" not in weight.parts:
            return None
        groups = window(read, weight.parts["groups"], (0, weight.matrix[1]), (0, 1), np.int32)
        return None if (groups == -1).any() else groups.ravel()

    def pack(self, weight: QuantizedWeight, at: Block, codes: Bytes) -> Bytes:
        """Return the bytes of whole rows; bits at their ends that belong to no code are zero."""
        width = self._line(weight) * 8 // self.bits
        assert at.width == weight.matrix[1] or width == at.width
        if width != at.width:
            codes = np.pad(codes.reshape(-1, at.width), ((0, 0), (0, width - at.width))).ravel()
        return packed_nibbles(codes, high_first=False) if self.bits == 4 else codes

    def place(self, weight: QuantizedWeight, at: Block) -> tuple[int, int]:
        """Return where the bytes of whole rows lie."""
        line = self._line(weight)
        return at.rows[0] * line, at.height * line

    def trouble(self, weight: QuantizedWeight, read: Read) -> list[Problem]:
        """Return scales that are no finite numbers, and groups that are not there or not whole."""
        spec, problems = weight.parts["scales"], []
        if "global" in weight.parts:
            problems = _global_trouble(weight.parts["global"], read)
        rows, columns = _matrix(spec)
        if not problems:
            scales = _scales(weight, (0, rows), (0, columns), read)
            problems = not_finite(spec, scales.ravel())
        groups = self._groups(weight, read)
        if groups is not None:
            sizes = np.bincount(groups.clip(0, columns), minlength=columns)
            if groups.min() < 0 or sizes.size > columns or (sizes != self.run).any():
                where = f"{spec.path}, tensor {weight.parts['groups'].name!r}"
                what = "the groups of a quantized weight are not those of its scales"
                expected = f"{columns} groups of {self.run} inputs"
                problems.append(Problem(what, where, expected, "others", DAMAGED))
        return problems


def _matrix(spec: TensorSpec) -> tuple[int, int]:
    """Return rows and columns of scales; a lone one is a matrix as well."""
    return (spec.shape[0], spec.shape[1]) if len(spec.shape) == 2 else (spec.numel, 1)


def _global(spec: TensorSpec, read: Read) -> np.float32:
    value = np.empty(1, np.float32)
    read(spec, 0, value.view(np.uint8))
    return np.float32(value[0])


def _global_trouble(spec: TensorSpec, read: Read) -> list[Problem]:
    value = _global(spec, read)
    if np.isfinite(value) and value != 0:
        return []
    what, where = "scales cannot be divided by this", f"{spec.path}, tensor {spec.name!r}"
    return [Problem(what, where, "a finite number, not zero", str(value), DAMAGED)]


def _scales(
    weight: QuantizedWeight, rows: tuple[int, int], columns: tuple[int, int], read: Read
) -> Floats:
    """Return a part of the scales, as float32."""
    spec = weight.parts["scales"]
    width = _matrix(spec)[1]
    if spec.dtype in STORED_AS:
        return floats_of(window(read, spec, rows, columns, STORED_AS[spec.dtype], width))
    codes = window(read, spec, rows, columns, np.uint8, width)
    if spec.dtype == "U8":
        powers: Floats = _E8M0[codes]
        return powers
    scales: Floats = _E4M3[codes] / _global(weight.parts["global"], read)
    return scales


def _zeros(
    weight: QuantizedWeight, rows: tuple[int, int], columns: tuple[int, int], bits: int, read: Read
) -> Floats:
    """Return a part of the zeros, as float32; none where there are none."""
    if "zeros" not in weight.parts:
        return NO_ZEROS
    spec = weight.parts["zeros"]
    if spec.dtype == "I8":
        return window(read, spec, rows, columns, np.int8, _matrix(spec)[1]).astype(np.float32)
    each, width = 32 // bits, columns[1] - columns[0]
    begin = rows[0] // each
    words = window(read, spec, (begin, words_for(rows[1], bits)), columns, np.uint32)
    low, high = rows[0] - begin * each, rows[1] - begin * each
    codes = codes_down(words, width, bits, high)[low * width :]
    return codes.reshape(-1, width).astype(np.float32) - np.float32(2 ** (bits - 1))


# -- finding them ----------------------------------------------------------------------------------

_ROLES = {
    "scales": "weight_scale", "zeros": "weight_zero_point", "groups": "weight_g_idx",
    "shape": "weight_shape", "global": "weight_global_scale",
}  # fmt: skip
_OTHERS = tuple(
    f".{what}_{kind}"
    for what in ("input", "output", "q", "k", "v", "kv_cache")
    for kind in ("scale", "zero_point", "global_scale", "g_idx")
)
"""How tensors end that belong to activations and to the cache."""

_FLOAT_SCALES = WORKING_DTYPES
_KINDS: dict[tuple[str, str, str], tuple[str, ...]] = {
    **{("weight_packed", "I32", d): ("pack-quantized",) for d in _FLOAT_SCALES},
    **{("weight", "I8", d): ("int-quantized", "naive-quantized") for d in _FLOAT_SCALES},
    **{("weight", "F8_E4M3", d): ("float-quantized", "naive-quantized") for d in _FLOAT_SCALES},
    ("weight", "F8_E4M3", "U8"): ("mxfp8-quantized",),
    ("weight_packed", "U8", "F8_E4M3"): ("nvfp4-pack-quantized",),
    ("weight_packed", "U8", "U8"): ("mxfp4-pack-quantized",),
}
"""Formats by what codes are called, their dtype and that of their scales."""

_CODINGS = {"I8": "int8", "F8_E4M3": "float8", "U8": "float4"}


def find(stored: Stored) -> FoundWeights:
    """Find all weights of compressed-tensors in a checkpoint; every one has a ``weight_scale``."""
    problems = check_formats(stored)
    schemes, more = schemes_of(stored)
    problems += more
    weights = list[QuantizedWeight]()
    for module in [] if problems else _modules(stored):
        try:
            weights.append(_weight(stored, module, schemes))
        except Unfit as unfit:
            problems += unfit.problems
    skipped = tuple(name for name in stored.tensors if name.endswith(_OTHERS))
    return FoundWeights(tuple(weights), tuple(problems), skipped)


def _modules(stored: Stored) -> list[str]:
    marks = (".weight_packed", *(f".{role}" for role in _ROLES.values()))
    return sorted({name.rpartition(".")[0] for name in stored.tensors if name.endswith(marks)})


def _weight(stored: Stored, module: str, schemes: Iterable[Scheme]) -> QuantizedWeight:
    """Return one weight, its parts checked against each other and the config.

    Raises:
        Unfit: they do not fit.
    """
    name = f"{module}.weight"
    packed = f"{module}.weight_packed" in stored.tensors
    codes = f"{name}_packed" if packed else name
    if lacking := missing(stored, name, [codes, f"{name}_scale"]):
        raise Unfit(lacking)
    parts = {"codes": stored.tensors[codes]}
    for role, ending in _ROLES.items():
        if f"{module}.{ending}" in stored.tensors:
            parts[role] = stored.tensors[f"{module}.{ending}"]
    formats = _formats(stored, parts)
    if lacking := missing(stored, name, _needed(formats[0], module)):
        raise Unfit(lacking)
    ignored = stored.config.get("ignore")
    if isinstance(ignored, list) and module in ignored:
        what = "a quantized weight is one that the config says is none"
        where = f"{stored.where}, tensor {name!r}"
        raise Unfit([Problem(what, where, "not in 'ignore'", hint=DAMAGED)])
    seen = _seen(stored, parts, formats)
    scheme = _fitting(stored, module, seen, schemes)
    shape = (seen.outputs, scheme.inputs_of(seen))
    run, row_run = scheme.reach(seen)
    coding = _CODINGS.get(parts["codes"].dtype)
    if coding is None:
        coding = "int4" if scheme.bits == 4 else "packed int8"
    codec = Compressed(_name_of(formats, scheme), coding, run, row_run)
    if problems := _part_problems(stored, parts, shape, scheme.bits, codec):
        raise Unfit(problems)
    return QuantizedWeight(name, shape, _dtype(stored, parts), codec, parts)


def _needed(kind: str, module: str) -> list[str]:
    if kind == "pack-quantized":
        return [f"{module}.weight_shape"]
    return [f"{module}.weight_global_scale"] if kind == "nvfp4-pack-quantized" else []


def _name_of(formats: tuple[str, ...], scheme: Scheme) -> str:
    return f"{formats[0]}-{scheme.bits}bit" if formats[0] == "pack-quantized" else formats[0]


def _formats(stored: Stored, parts: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Return the formats that dtypes may belong to.

    Raises:
        Unfit: none.
    """
    codes, scales = parts["codes"], parts["scales"]
    ending = codes.name.rpartition(".")[2]
    formats = _KINDS.get((ending, codes.dtype, scales.dtype))
    if formats and len(codes.shape) == 2 and len(scales.shape) <= 2 and codes.numel * scales.numel:
        return formats
    raise Unfit(
        [
            Problem(
                "codes and scales of a weight belong to no known format",
                f"{stored.where}, tensor {codes.name!r}",
                "; ".join(f"{k[1]} {k[0]} with {k[2]}" for k in _KINDS if k[2] != "F32"),
                f"{codes.dtype} {codes.shape} with {scales.dtype} {scales.shape}", DAMAGED,
            )
        ]
    )  # fmt: skip


def _seen(stored: Stored, parts: Mapping[str, TensorSpec], formats: tuple[str, ...]) -> Seen:
    """Return what the shapes of a weight's parts say.

    Raises:
        Unfit: they contradict each other.
    """
    outputs, width = parts["codes"].shape
    inputs: int | None = None
    if parts["codes"].dtype != "I32":
        inputs = width * 2 if parts["codes"].dtype == "U8" else width
    elif stored.read is not None:
        inputs = _stored_inputs(stored, parts, stored.read)
    scales = parts["scales"].shape
    zeros = "no zeros"
    if "zeros" in parts:
        zeros = "packed zeros" if parts["zeros"].dtype == "I32" else "plain zeros"
    kind = "int" if parts["codes"].dtype in ("I32", "I8") else "float"
    bits = (4, 8) if parts["codes"].dtype == "I32" else (4 if parts["codes"].dtype == "U8" else 8,)
    each = {"nvfp4-pack-quantized": 16}.get(formats[0], 32 if parts["scales"].dtype == "U8" else 0)
    return Seen(formats, kind, bits, outputs, inputs, width, scales, zeros, each)


def _stored_inputs(stored: Stored, parts: Mapping[str, TensorSpec], read: Read) -> int:
    """Return the inputs that ``weight_shape`` names.

    Raises:
        Unfit: it is no shape of this weight.
    """
    spec, codes = parts["shape"], parts["codes"]
    wanted = [(spec, ("I64", "I32"), (2,), "the shape of a matrix")]
    if problems := misfits(stored, wanted):
        raise Unfit(problems)
    shape = np.empty(2, np.int64 if spec.dtype == "I64" else np.int32)
    read(spec, 0, shape.view(np.uint8))
    outputs, inputs = int(shape[0]), int(shape[1])
    words = [words_for(inputs, bits) for bits in (4, 8)] if 0 < inputs < 2**48 else []
    if outputs != codes.shape[0] or codes.shape[1] not in words:
        where = f"{stored.where}, tensor {spec.name!r}"
        what = "the shape of a weight is not that of its codes"
        found = f"{outputs} x {inputs}"
        raise Unfit([Problem(what, where, f"one that fits {codes.shape} words", found, DAMAGED)])
    return inputs


def _fitting(stored: Stored, module: str, seen: Seen, schemes: Iterable[Scheme]) -> Scheme:
    """Return the first group of the config that agrees with a weight.

    Raises:
        Unfit: none does.
    """
    schemes = list(schemes)
    named = [scheme for scheme in schemes if module in scheme.targets]
    for scheme in named or schemes:
        if scheme.fits(seen):
            return scheme
    what = "a weight fits no group of the config"
    where = f"{stored.where}, tensor {module + '.weight'!r}"
    expected = "; ".join(str(scheme) for scheme in (named or schemes)[:8])
    hint = f"Its scales, or {config_where(stored)}, are wrong. {DAMAGED}"
    raise Unfit([Problem(what, where, expected, str(seen), hint)])


def _part_problems(
    stored: Stored, parts: Mapping[str, TensorSpec], shape: tuple[int, int], bits: int,
    codec: Compressed,
) -> list[Problem]:  # fmt: skip
    outputs, inputs = shape
    scales = parts["scales"].shape
    wanted = list[tuple[TensorSpec, Iterable[str], tuple[int, ...], str]]()
    if "groups" in parts:
        wanted.append((parts["groups"], ("I32",), (inputs,), f"{inputs} inputs"))
    if "global" in parts:
        wanted.append((parts["global"], ("F32",), (1,), "one number"))
    if "zeros" in parts:
        zeros, reason = parts["zeros"], f"scales {scales}"
        if codec.name.startswith("pack") and zeros.dtype == "I32" and codec.row_run == 1:
            rows = words_for(outputs, bits)
            wanted.append((zeros, ("I32",), (rows, scales[-1]), reason))
        elif codec.coding.startswith("float"):
            where = f"{stored.where}, tensor {zeros.name!r}"
            return [Problem("zeros of float codes are not supported", where, hint=DAMAGED)]
        else:
            wanted.append((zeros, ("I8",), scales, reason))
    return misfits(stored, wanted)


def _dtype(stored: Stored, parts: Mapping[str, TensorSpec]) -> str:
    """Return what a weight is dequantized to."""
    dtype = parts["scales"].dtype
    if dtype == "F32" and stored.dtype in WORKING_DTYPES:
        return str(stored.dtype)
    return dtype if dtype in WORKING_DTYPES else "BF16"
