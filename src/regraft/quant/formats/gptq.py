"""GPTQ: 2, 3, 4 or 8 bits in 32-bit words, groups of inputs with scale and zero for each output.

    w[i, o] = scales[g[i], o] * (q[i, o] - zero[g[i], o])

an integer and a product that is rounded once to the dtype of the scales; the model has the weight
transposed, (out, in). ``g`` is ``g_idx``, any order of groups, or ``i // group_size`` without one.
Codes are streams of bits down the columns of ``qweight``, zeros along the rows of ``qzeros``.

Checkpoints of format ``gptq`` (v1) store zeros minus one, those of ``gptq_v2`` as they are. For v1
the one is added as GPTQModel adds it: for 2, 4 and 8 bits to the words as integers, so that a zero
that is all ones carries into the next one (that undoes how GPTQModel wrote them); for 3 bits to
each zero, which wraps. AutoGPTQ wraps in all cases; the two agree wherever no zero is all ones.

Frantar et al. 2022, arXiv:2210.17323; ``TorchLinear.dequantize_weight`` and
``convert_gptq_v1_to_v2_format_module`` of GPTQModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.errors import Problem
from regraft.numerics.arrays import Bytes, Floats
from regraft.quant.bit_packing import (
    codes_down,
    codes_of,
    lot_of,
    scales_of,
    transposed,
    window,
    words_down,
    words_for,
)
from regraft.quant.formats.bitsandbytes import not_finite
from regraft.quant.formats.fitting import DAMAGED, Unfit, is_count, misfits, unsupported
from regraft.quant.grid import Codes, Levels
from regraft.quant.weight import Block, FoundWeights, QuantizedWeight, Read, Stored, missing
from regraft.tensors import WORKING_DTYPES, TensorSpec

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")

LEVELS = {bits: Levels.of(np.arange(2**bits)) for bits in BITS}
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in every zero of a word."""

Groups = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Gptq:
    """A GPTQ weight.

    Attributes:
        bits: of a code.
        group_size: inputs in a group, where groups are in their natural order.
        adds_one: whether zeros are stored minus one.
    """

    bits: int
    group_size: int
    adds_one: bool
    is_writable: bool = True
    stores_transposed: bool = True

    @property
    def name(self) -> str:
        """The format's name with its bits."""
        return f"gptq-{self.bits}bit"

    def row_grain(self, weight: QuantizedWeight) -> int:
        """Return the inputs that share words."""
        del weight
        return lot_of(self.bits)[0]

    def block(self, weight: QuantizedWeight, at: Block, read: Read) -> Codes:
        """Return the codes of a block, with scales and zeros of its groups."""
        inputs, outputs = (at.rows, at.columns) if weight.as_stored else (at.columns, at.rows)
        groups = self._groups(weight, inputs, read)
        regular = self._is_regular(groups, inputs)
        low, high = int(groups.min()), int(groups.max()) + 1
        scales = scales_of(read, weight.parts["scales"], (low, high), outputs)
        zeros = self._zeros(weight, (low, high), outputs, read)
        if not weight.as_stored:
            scales, zeros = transposed(scales), transposed(zeros)
        if not regular:
            axis = 0 if weight.as_stored else 1
            scales, zeros = scales.take(groups - low, axis), zeros.take(groups - low, axis)
        codes = self._codes(weight, inputs, outputs, read)
        run, first = (self.group_size, inputs[0] % self.group_size) if regular else (1, 0)
        levels = LEVELS[self.bits]
        if weight.as_stored:
            return Codes(
                codes, at.height, at.width, levels, scales.ravel(), zeros.ravel(), at.width, 1,
                row_run=run, first_row=first,
            )  # fmt: skip
        return Codes(
            codes, at.height, at.width, levels, scales.ravel(), zeros.ravel(), scales.shape[1],
            run, first=first,
        )  # fmt: skip

    def _codes(
        self, weight: QuantizedWeight, inputs: tuple[int, int], outputs: tuple[int, int], read: Read
    ) -> Bytes:
        """Return codes of a range of inputs and outputs, as ``weight`` is seen."""
        lot, per_lot = lot_of(self.bits)
        begin, end = inputs[0] // lot, -(-inputs[1] // lot)
        rows = (begin * per_lot, end * per_lot)
        words = window(read, weight.codes, rows, outputs, np.uint32)
        low, high = inputs[0] - begin * lot, inputs[1] - begin * lot
        width = outputs[1] - outputs[0]
        if weight.as_stored:
            return codes_down(words, width, self.bits, high)[low * width :]
        codes = codes_of(transposed(words).ravel(), self.bits).reshape(width, -1)
        return np.ascontiguousarray(codes[:, low:high]).ravel()

    def _groups(self, weight: QuantizedWeight, inputs: tuple[int, int], read: Read) -> Groups:
        """Return the group of each input of a range."""
        if "groups" in weight.parts:
            return window(read, weight.parts["groups"], inputs, (0, 1), np.int32).ravel()
        return np.arange(*inputs, dtype=np.int32) // np.int32(self.group_size)

    def _is_regular(self, groups: Groups, inputs: tuple[int, int]) -> bool:
        return np.array_equal(groups, np.arange(*inputs, dtype=np.int32) // self.group_size)

    def _zeros(
        self, weight: QuantizedWeight, groups: tuple[int, int], outputs: tuple[int, int], read: Read
    ) -> Floats:
        """Return the zeros ``(groups, outputs)``."""
        lot, per_lot = lot_of(self.bits)
        begin, end = outputs[0] // lot, -(-outputs[1] // lot)
        columns = (begin * per_lot, end * per_lot)
        words = window(read, weight.parts["zeros"], groups, columns, np.uint32)
        if self.adds_one and self.bits in _ONES:
            words += np.uint32(_ONES[self.bits])
        codes = codes_of(words.ravel(), self.bits).reshape(words.shape[0], -1)
        codes = codes[:, outputs[0] - begin * lot : outputs[1] - begin * lot]
        if self.adds_one and self.bits not in _ONES:
            codes = (codes + np.uint8(1)) & np.uint8(2**self.bits - 1)
        return codes.astype(np.float32)

    def pack(self, weight: QuantizedWeight, at: Block, codes: Bytes) -> Bytes:
        """Return the words of whole rows; bits that belong to no input are zero."""
        assert weight.as_stored
        assert at.width == weight.matrix[1]
        return words_down(codes, at.width, self.bits).reshape(-1).view(np.uint8)

    def place(self, weight: QuantizedWeight, at: Block) -> tuple[int, int]:
        """Return where the words of whole rows lie."""
        lot, per_lot = lot_of(self.bits)
        assert weight.as_stored
        assert at.rows[0] % lot == 0
        line = 4 * at.width
        return at.rows[0] // lot * per_lot * line, words_for(at.height, self.bits) * line

    def trouble(self, weight: QuantizedWeight, read: Read) -> list[Problem]:
        """Return scales that are no finite numbers, and inputs of groups that are not there."""
        scales = weight.parts["scales"]
        count, width = scales.shape
        problems = not_finite(scales, scales_of(read, scales, (0, count), (0, width)).ravel())
        if "groups" in weight.parts:
            spec = weight.parts["groups"]
            groups = self._groups(weight, (0, spec.shape[0]), read)
            bad = int(np.count_nonzero((groups < 0) | (groups >= count)))
            if bad:
                problems.append(
                    Problem(
                        "inputs of a quantized weight belong to groups that are not there",
                        f"{spec.path}, tensor {spec.name!r}", f"0 to {count - 1}",
                        f"{bad} of {groups.size} inputs lie outside", DAMAGED,
                    )
                )  # fmt: skip
        return problems


# -- finding them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Said:
    """What the config says of all weights.

    Attributes:
        bits, group_size: None where it says nothing, or where weights have their own; a group size
            of -1 is a whole column.
        adds_one: whether zeros are stored minus one.
    """

    bits: int | None
    group_size: int | None
    adds_one: bool


_ENDINGS = {"codes": "qweight", "zeros": "qzeros", "scales": "scales"}


def find(stored: Stored) -> FoundWeights:
    """Find all GPTQ weights of a checkpoint; every one has a ``qweight``."""
    said, problems = _said(stored)
    weights = list[QuantizedWeight]()
    for key in [] if problems else _modules(stored):
        try:
            weights.append(_weight(stored, key, said))
        except Unfit as unfit:
            problems += unfit.problems
    return FoundWeights(tuple(weights), tuple(problems))


def _modules(stored: Stored) -> list[str]:
    """Return the modules that have a part of a GPTQ weight, in the order of their names."""
    marks = (".qweight", ".qzeros", ".g_idx")
    return sorted({name.rpartition(".")[0] for name in stored.tensors if name.endswith(marks)})


def _said(stored: Stored) -> tuple[_Said, list[Problem]]:
    """Return what the config says, and what in it is not supported."""
    config = stored.config
    bits, size = config.get("bits"), config.get("group_size")
    kind = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    problems = list[Problem]()
    if bits is not None and (type(bits) is not int or bits not in BITS):
        problems.append(unsupported(stored, "unknown number of bits", "2, 3, 4 or 8", bits))
    if size is not None and not (is_count(size) or (type(size) is int and size == -1)):
        problems.append(unsupported(stored, "not a group size", "-1, or 1 and above", size))
    if kind not in FORMATS or config.get("is_marlin_format"):
        found = "marlin" if config.get("is_marlin_format") else kind
        what = "the way that GPTQ weights are packed is not supported"
        problems.append(unsupported(stored, what, " or ".join(FORMATS), found))
    if str(config.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        what = "words of another size are not supported"
        problems.append(unsupported(stored, what, "pack_dtype int32", config["pack_dtype"]))
    if config.get("rotation"):
        what = "inputs are rotated while the model runs, which is not supported"
        problems.append(unsupported(stored, what, "no rotation", config["rotation"]))
    if _has_own(config):
        bits = size = None
    return _Said(bits, size, kind == "gptq"), problems


def _has_own(config: Mapping[str, Any]) -> bool:
    """Return whether modules may have bits and groups of their own (GPTQModel's ``dynamic``)."""
    return bool(config.get("dynamic"))


def _weight(stored: Stored, module: str, said: _Said) -> QuantizedWeight:
    """Return one weight, its parts checked against each other and the config.

    Raises:
        Unfit: they do not fit.
    """
    name = f"{module}.weight"
    roles = {role: f"{module}.{ending}" for role, ending in _ENDINGS.items()}
    if lacking := missing(stored, name, roles.values()):
        raise Unfit(lacking)
    parts = {role: stored.tensors[key] for role, key in roles.items()}
    if f"{module}.g_idx" in stored.tensors:
        parts["groups"] = stored.tensors[f"{module}.g_idx"]
    _check_ranks(stored, parts)
    bits = _bits(stored, name, parts, said)
    rows, outputs = parts["codes"].shape
    inputs = parts["groups"].shape[0] if "groups" in parts else rows * 32 // bits
    count = parts["scales"].shape[0]
    size = _group_size(inputs, count, said)
    if problems := _size_problems(stored, parts, (inputs, outputs), bits, size, said):
        raise Unfit(problems)
    codec = Gptq(bits, size, said.adds_one)
    return QuantizedWeight(name, (outputs, inputs), parts["scales"].dtype, codec, parts)


def _check_ranks(stored: Stored, parts: Mapping[str, TensorSpec]) -> None:
    """Refuse parts that are no matrices (the groups: no vector), or are empty.

    Raises:
        Unfit: some are.
    """
    problems = [
        Problem(
            "a part of a quantized weight has another number of dimensions",
            f"{stored.where}, tensor {spec.name!r}", f"{1 if role == 'groups' else 2}, not empty",
            str(spec.shape), DAMAGED,
        )
        for role, spec in parts.items()
        if len(spec.shape) != (1 if role == "groups" else 2) or not spec.numel
    ]  # fmt: skip
    if problems:
        raise Unfit(problems)


def _bits(stored: Stored, name: str, parts: Mapping[str, TensorSpec], said: _Said) -> int:
    """Return the bits of a code, from the config or else from the shapes.

    Raises:
        Unfit: neither says.
    """
    if said.bits is not None:
        return said.bits
    rows = parts["codes"].shape[0]
    if "groups" in parts:
        inputs = parts["groups"].shape[0]
        fitting = [bits for bits in BITS if words_for(inputs, bits) == rows]
    else:
        outputs, words = parts["codes"].shape[1], parts["zeros"].shape[1]
        fitting = [bits for bits in BITS if words_for(outputs, bits) == words]
    if len(fitting) != 1:
        what = "how many bits the codes of a weight have is not known"
        expected = "bits in the config, or g_idx that fits qweight"
        raise Unfit([Problem(what, f"{stored.where}, tensor {name!r}", expected, hint=DAMAGED)])
    return fitting[0]


def _group_size(inputs: int, count: int, said: _Said) -> int:
    """Return the inputs of a group: as the config says, or as the number of groups has it."""
    if said.group_size is None:
        return -(-inputs // count)
    return inputs if said.group_size == -1 else said.group_size


def _size_problems(
    stored: Stored, parts: Mapping[str, TensorSpec], shape: tuple[int, int], bits: int, size: int,
    said: _Said,
) -> list[Problem]:  # fmt: skip
    inputs, outputs = shape
    rows, count = words_for(inputs, bits), -(-inputs // size)
    if said.group_size is None and "groups" in parts:
        count = parts["scales"].shape[0]
    of = f"{inputs} inputs in {bits} bits"
    groups = f"{count} groups of {size} inputs"
    problems = misfits(
        stored,
        [
            (parts["codes"], ["I32"], (rows, outputs), of),
            (parts["zeros"], ["I32"], (count, words_for(outputs, bits)), groups),
            (parts["scales"], WORKING_DTYPES, (count, outputs), groups),
            *((parts[role], ["I32"], (inputs,), of) for role in ("groups",) if role in parts),
        ],
    )
    lot, per_lot = lot_of(bits)
    whole = {"codes": parts["codes"].shape[0], "zeros": parts["zeros"].shape[1]}
    problems += [
        Problem(
            f"codes of {bits} bits are cut off inside of a stream",
            f"{stored.where}, tensor {parts[role].name!r}", f"{lot} codes to {per_lot} words",
            f"{words} words", DAMAGED,
        )
        for role, words in whole.items()
        if words % per_lot
    ]  # fmt: skip
    return problems
