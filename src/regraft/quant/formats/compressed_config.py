"""What the config of a compressed-tensors checkpoint says, and whether a weight agrees with it.

``config_groups`` has groups of modules, each with the arguments of its weights: ``num_bits``,
``type``, ``symmetric``, ``strategy`` with ``group_size`` or ``block_structure``, and sometimes a
``format``. Which modules a group means (class names, expressions) cannot be known from a checkpoint
alone, unless it names them one by one. So a weight has to agree with one group, whichever that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regraft.errors import Problem
from regraft.quant.formats.fitting import is_count, unsupported
from regraft.quant.weight import Stored

FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
"""Formats of weights that are read."""

_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_MIXED = "mixed-precision"
_BLOCK = (128, 128)


@dataclass(frozen=True)
class Seen:
    """What the tensors of a weight say of it.

    Attributes:
        formats: those that they may belong to.
        kind: ``int`` or ``float``.
        bits: what a code may have.
        outputs: rows.
        inputs: columns; None where only the number of words is known.
        width: columns of the stored codes.
        scales: shape of the scales.
        zeros: ``no zeros``, ``plain zeros`` or ``packed zeros``.
        each: inputs that the format has in a group; 0 for any number.
    """

    formats: tuple[str, ...]
    kind: str
    bits: tuple[int, ...]
    outputs: int
    inputs: int | None
    width: int
    scales: tuple[int, ...]
    zeros: str
    each: int

    def __str__(self) -> str:
        bits = " or ".join(map(str, self.bits))
        inputs = "" if self.inputs is None else f" by {self.inputs}"
        return (
            f"{self.formats[0]}, {self.kind} {bits} bits, {self.outputs}{inputs}, "
            f"scales {self.scales}, {self.zeros}"
        )


@dataclass(frozen=True)
class Scheme:
    """The arguments of the weights of a group of modules.

    Attributes:
        format: its format; None for any.
        kind, bits: what codes are.
        strategy: how far a scale reaches; None for whatever the tensors show.
        group_size: inputs that share a scale, for groups.
        block: outputs and inputs that share a scale, for blocks.
        symmetric: whether it has no zeros; None where that is not known.
        targets: what modules it means.
    """

    format: str | None
    kind: str
    bits: int
    strategy: str | None
    group_size: int
    block: tuple[int, int]
    symmetric: bool | None
    targets: tuple[str, ...] = ()

    def __str__(self) -> str:
        reach = self.strategy or "any strategy"
        if self.strategy in ("group", "tensor_group"):
            reach += f" of {self.group_size}"
        if self.strategy == "block":
            reach += f" of {self.block[0]} x {self.block[1]}"
        zeros = ", with zeros" if self.symmetric is False else ""
        return f"{self.format or 'any format'}, {self.kind} {self.bits} bits, {reach}{zeros}"

    def inputs_of(self, seen: Seen) -> int:
        """Return the columns of a weight; by its groups or else its words, if nothing says it."""
        if seen.inputs is not None:
            return seen.inputs
        if self.strategy in ("group", "tensor_group") and len(seen.scales) == 2:
            return seen.scales[1] * self.group_size
        return seen.width * 32 // self.bits

    def fits(self, seen: Seen) -> bool:
        """Return whether a weight can belong to the group."""
        if self.format is not None and self.format not in seen.formats:
            return False
        if self.kind != seen.kind or self.bits not in seen.bits:
            return False
        if seen.zeros == {False: "no zeros", True: "packed zeros", None: ""}[self.symmetric]:
            return False
        inputs = self.inputs_of(seen)
        if seen.formats[0] == "pack-quantized" and -(-inputs * self.bits // 32) != seen.width:
            return False
        run = self.reach(seen)[0]
        return run > 0 and (seen.each == 0 or run == seen.each)

    def reach(self, seen: Seen) -> tuple[int, int]:
        """Return inputs and outputs that share a scale; (0, 0) if the scales have another shape."""
        inputs, outputs, scales = self.inputs_of(seen), seen.outputs, seen.scales
        lone = len(scales) < 2 and _product(scales) == 1
        if self.strategy == "tensor" or (self.strategy is None and lone):
            return (inputs, outputs) if _product(scales) == 1 else (0, 0)
        if len(scales) != 2:
            return 0, 0
        if self.strategy == "channel":
            return (inputs, 1) if scales == (outputs, 1) else (0, 0)
        if self.strategy in ("group", "tensor_group"):
            whole = inputs == scales[1] * self.group_size and scales[0] == outputs
            return (self.group_size, 1) if whole else (0, 0)
        if self.strategy is None and scales[0] == outputs and inputs % scales[1] == 0:
            return inputs // scales[1], 1
        rows, columns = self.block
        blocks = (-(-outputs // rows), -(-inputs // columns))
        return (columns, rows) if scales == blocks else (0, 0)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


ANY = tuple(
    Scheme(None, kind, bits, None, 0, _BLOCK, None)
    for kind, bits in (("int", 4), ("int", 8), ("float", 4), ("float", 8))
)
"""What weights may be where the config says nothing."""


def check_formats(stored: Stored) -> list[Problem]:
    """Return what a config names that is not supported."""
    config, problems = stored.config, list[Problem]()
    said = config.get("format")
    if said is not None and said not in (*FORMATS, _MIXED, "dense"):
        what = "the way that weights are compressed is not supported"
        problems.append(unsupported(stored, what, ", ".join(FORMATS), said))
    sparsity = config.get("sparsity_config") or {}
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity
    if sparse != "dense":
        problems.append(unsupported(stored, "sparse weights are not supported", "dense", sparse))
    transforms = config.get("transform_config") or {}
    if not isinstance(transforms, Mapping) or transforms.get("config_groups"):
        what = "weights are rotated, and turned back while the model runs: that is not supported"
        problems.append(unsupported(stored, what, "no transform_config", transforms))
    return problems


def schemes_of(stored: Stored) -> tuple[tuple[Scheme, ...], list[Problem]]:
    """Return the groups of a config that have quantized weights, and what in them cannot be read.

    Groups by the names of presets, and no groups at all, say nothing: a weight is what its tensors
    are.
    """
    groups = stored.config.get("config_groups")
    if not groups:
        return ANY, []
    if not isinstance(groups, Mapping):
        return (), [unsupported(stored, "config_groups cannot be read", "groups by name", groups)]
    if any(isinstance(group, list) for group in groups.values()):
        return ANY, []
    schemes, problems = list[Scheme](), list[Problem]()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else group
        if weights is None:
            continue
        trouble = _trouble(group, weights)
        if trouble:
            what = f"the weights of {str(name)[:40]!r} in config_groups cannot be read"
            problems.append(unsupported(stored, what, *trouble))
        else:
            schemes.append(_scheme(group, weights, stored.config.get("format")))
    return tuple(schemes), problems


def _trouble(group: Any, weights: Any) -> tuple[str, object] | None:
    """Return what was expected and what found, if a group cannot be read."""
    if not isinstance(weights, Mapping):
        return "a group with 'weights'", group
    kind, bits = _lower(weights.get("type", "int")), weights.get("num_bits", 8)
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 4), ("float", 8)):
        return "int or float of 4 or 8 bits", f"{kind} of {bits} bits"
    form = group.get("format")
    if form is not None and form not in FORMATS:
        return f"format {', '.join(FORMATS)}", form
    strategy, size = _strategy(weights), weights.get("group_size")
    if strategy not in _STRATEGIES:
        return f"strategy {', '.join(_STRATEGIES)}", strategy
    if strategy in ("group", "tensor_group") and not is_count(size):
        return "a group_size", size
    if strategy == "block" and _block(weights) is None:
        return "a block_structure of two sizes", weights.get("block_structure")
    return None


def _scheme(group: Mapping[str, Any], weights: Mapping[str, Any], overall: Any) -> Scheme:
    """Return a group that was found to be readable."""
    form = group.get("format") or (overall if overall in FORMATS else None)
    targets, size = group.get("targets"), weights.get("group_size", 0)
    return Scheme(
        form, _lower(weights.get("type", "int")), int(weights.get("num_bits", 8)),
        _strategy(weights), int(size) if is_count(size) else 0, _block(weights) or _BLOCK,
        bool(weights.get("symmetric", True)),
        tuple(map(str, targets)) if isinstance(targets, list) else (),
    )  # fmt: skip


def _lower(value: Any) -> str:
    return str(value).lower()


def _strategy(weights: Mapping[str, Any]) -> str:
    """Return how far a scale reaches; as the library has it where it is not said."""
    said = weights.get("strategy")
    if said is not None:
        return _lower(said)
    size = weights.get("group_size")
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    said = weights.get("block_structure")
    if isinstance(said, str):
        said = [int(part) if part.isdecimal() else 0 for part in said[:40].split("x")]
    if isinstance(said, list) and len(said) == 2 and all(map(is_count, said)):
        return said[0], said[1]
    return None
