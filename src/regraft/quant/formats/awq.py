"""AWQ in the layout "gemm": 4 bits, eight outputs to a word, groups of inputs.

    w[i, o] = (q[i, o] - zero[i // group_size, o]) * scales[i // group_size, o]

a whole number and a product that is rounded once to the dtype of the scales; the model has the
weight transposed, (out, in). Nibbles of a word, the lowest first, are its outputs 0, 2, 4, 6, 1, 3,
5, 7. Zeros lie as codes do, and are read whatever ``zero_point`` says: AutoAWQ cannot write weights
without them, and GPTQModel writes them for symmetric weights as well.

Lin et al. 2023, arXiv:2306.00978; ``dequantize_gemm`` of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes
from regraft.quant.bit_packing import (
    pack_awq,
    scales_of,
    transposed,
    unpack_awq,
    unpack_awq_rows,
    window,
)
from regraft.quant.formats.bitsandbytes import not_finite
from regraft.quant.formats.fitting import DAMAGED, Unfit, is_count, misfits, unsupported
from regraft.quant.grid import Codes, Levels
from regraft.quant.weight import Block, FoundWeights, QuantizedWeight, Read, Stored, missing
from regraft.tensors import WORKING_DTYPES, TensorSpec

LEVELS = Levels.of(np.arange(16))

_EACH = 8
"""Outputs in a word."""


@dataclass(frozen=True)
class Awq:
    """An AWQ weight.

    Attributes:
        group_size: inputs that share a scale and a zero.
    """

    group_size: int
    name: str = "awq-4bit"
    is_writable: bool = True
    stores_transposed: bool = True

    def row_grain(self, weight: QuantizedWeight) -> int:
        """Return 1: an input begins with a word."""
        del weight
        return 1

    def block(self, weight: QuantizedWeight, at: Block, read: Read) -> Codes:
        """Return the codes of a block, with scales and zeros of its groups."""
        inputs, outputs = (at.rows, at.columns) if weight.as_stored else (at.columns, at.rows)
        groups = (inputs[0] // self.group_size, -(-inputs[1] // self.group_size))
        scales = scales_of(read, weight.parts["scales"], groups, outputs)
        zeros = _unpacked(read, weight.parts["zeros"], groups, outputs).astype(np.float32)
        first = inputs[0] % self.group_size
        if weight.as_stored:
            codes = _unpacked(read, weight.codes, inputs, outputs)
            return Codes(
                codes.ravel(), at.height, at.width, LEVELS, scales.ravel(), zeros.ravel(),
                at.width, 1, row_run=self.group_size, first_row=first,
            )  # fmt: skip
        return Codes(
            _unpacked_rows(read, weight.codes, inputs, outputs), at.height, at.width, LEVELS,
            transposed(scales).ravel(), transposed(zeros).ravel(), scales.shape[0],
            self.group_size, first=first,
        )  # fmt: skip

    def pack(self, weight: QuantizedWeight, at: Block, codes: Bytes) -> Bytes:
        """Return the words of whole rows."""
        assert weight.as_stored
        assert at.width == weight.matrix[1]
        out = np.empty(codes.size // _EACH, np.uint32)
        pack_awq(codes.view(np.uint64), out)
        return out.view(np.uint8)

    def place(self, weight: QuantizedWeight, at: Block) -> tuple[int, int]:
        """Return where the words of whole rows lie."""
        assert weight.as_stored
        line = at.width // 2
        return at.rows[0] * line, at.height * line

    def trouble(self, weight: QuantizedWeight, read: Read) -> list[Problem]:
        """Return scales that are no finite numbers."""
        spec = weight.parts["scales"]
        scales = scales_of(read, spec, (0, spec.shape[0]), (0, spec.shape[1]))
        return not_finite(spec, scales.ravel())


def _words(
    read: Read, spec: TensorSpec, rows: tuple[int, int], outputs: tuple[int, int]
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint32]], slice]:
    """Return the words that hold a range of outputs, and where in them it lies."""
    begin, end = outputs[0] // _EACH, -(-outputs[1] // _EACH)
    inside = slice(outputs[0] - begin * _EACH, outputs[1] - begin * _EACH)
    return window(read, spec, rows, (begin, end), np.uint32), inside


def _unpacked(
    read: Read, spec: TensorSpec, rows: tuple[int, int], outputs: tuple[int, int]
) -> Bytes:
    """Return codes (rows, outputs), as they are stored."""
    words, inside = _words(read, spec, rows, outputs)
    codes = np.empty((words.shape[0], words.shape[1] * _EACH), np.uint8)
    unpack_awq(words.ravel(), codes.reshape(-1).view(np.uint64))
    return np.ascontiguousarray(codes[:, inside])


def _unpacked_rows(
    read: Read, spec: TensorSpec, inputs: tuple[int, int], outputs: tuple[int, int]
) -> Bytes:
    """Return codes (outputs, inputs), flat, as the model has them."""
    words, inside = _words(read, spec, inputs, outputs)
    width = words.shape[0]
    codes = np.empty((words.shape[1] * _EACH, width), np.uint8)
    unpack_awq_rows(transposed(words).ravel(), width, codes.reshape(-1))
    return codes[inside].ravel()


# -- finding them ----------------------------------------------------------------------------------

_ENDINGS = {"codes": "qweight", "zeros": "qzeros", "scales": "scales"}


def find(stored: Stored) -> FoundWeights:
    """Find all AWQ weights of a checkpoint; every one has a ``qweight``."""
    size, problems = _group_size(stored)
    weights = list[QuantizedWeight]()
    for module in [] if problems else _modules(stored):
        try:
            weights.append(_weight(stored, module, size))
        except Unfit as unfit:
            problems += unfit.problems
    return FoundWeights(tuple(weights), tuple(problems))


def _modules(stored: Stored) -> list[str]:
    marks = (".qweight", ".qzeros")
    return sorted({name.rpartition(".")[0] for name in stored.tensors if name.endswith(marks)})


def _group_size(stored: Stored) -> tuple[int | None, list[Problem]]:
    """Return what the config says of groups (-1: a whole column), and what is not supported."""
    config = stored.config
    bits = config.get("bits", config.get("w_bit"))
    size = config.get("group_size", config.get("q_group_size"))
    kind = str(config.get("version") or config.get("format") or "gemm").lower()
    problems = list[Problem]()
    if bits is not None and (type(bits) is not int or bits != 4):
        problems.append(unsupported(stored, "AWQ has 4 bits", "4", bits))
    if size is not None and not (is_count(size) or (type(size) is int and size == -1)):
        problems.append(unsupported(stored, "not a group size", "-1, or 1 and above", size))
    if kind != "gemm":
        what = "the way that AWQ weights are packed is not supported"
        problems.append(unsupported(stored, what, "version gemm", kind))
    return size, problems


def _weight(stored: Stored, module: str, size: int | None) -> QuantizedWeight:
    """Return one weight, its parts checked against each other and the config.

    Raises:
        Unfit: they do not fit.
    """
    name = f"{module}.weight"
    roles = {role: f"{module}.{ending}" for role, ending in _ENDINGS.items()}
    if lacking := missing(stored, name, roles.values()):
        raise Unfit(lacking)
    parts = {role: stored.tensors[key] for role, key in roles.items()}
    _check_ranks(stored, parts)
    inputs, words = parts["codes"].shape
    outputs, count = words * _EACH, parts["scales"].shape[0]
    each = -(-inputs // count) if size is None else inputs if size == -1 else size
    groups = f"groups of {each} of {inputs} inputs"
    count = -(-inputs // each)
    problems = misfits(
        stored,
        [
            (parts["codes"], ["I32"], (inputs, words), ""),
            (parts["zeros"], ["I32"], (count, words), groups),
            (parts["scales"], WORKING_DTYPES, (count, outputs), groups),
        ],
    )
    if inputs % each and not problems:
        where = f"{stored.where}, tensor {parts['codes'].name!r}"
        what = "the inputs of a weight are no whole number of groups"
        expected = f"a multiple of {each}"
        problems = [Problem(what, where, expected, str(inputs), DAMAGED)]
    if problems:
        raise Unfit(problems)
    return QuantizedWeight(name, (outputs, inputs), parts["scales"].dtype, Awq(each), parts)


def _check_ranks(stored: Stored, parts: Mapping[str, TensorSpec]) -> None:
    """Refuse parts that are no matrices, or are empty.

    Raises:
        Unfit: some are.
    """
    problems = [
        Problem("a part of a quantized weight is not a matrix",
                f"{stored.where}, tensor {spec.name!r}", "2 dimensions, not empty",
                str(spec.shape), DAMAGED)
        for spec in parts.values()
        if len(spec.shape) != 2 or not spec.numel
    ]  # fmt: skip
    if problems:
        raise Unfit(problems)
