"""What one named tensor is in terms of the current model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Operation = Mapping[str, Any]
Fields = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """Which part of a model's parameter one named tensor is (or, for a fused tensor, holds).

    Attributes:
        parameter: canonical name, as the current transformers model calls the parameter.
        expert: index along dim 0 of a stacked parameter, when the tensor is one expert of it.
        part: the tensor is the ``part``-th of ``parts`` tensors concatenated along ``axis``.
        parts: how many those are; they need not be of equal size.
        axis: counted within one expert's matrix where ``expert`` is set.
        chunk: the other way round: the parameter is the ``chunk``-th of ``chunks`` equal slices
            of the tensor along ``chunk_axis``.
        chunks: how many those are.
        chunk_axis: the axis they are cut along.
        transposed: the parameter is the tensor with its last two dimensions swapped.
        check_shape: ``transposed`` holds only where the tensor's shape is not the parameter's
            already (both layouts are found under one name).
        unsupported: the conversion on the way that regraft does not undo, such as ``Interleave``;
            ``parameter`` is right all the same.
    """

    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    axis: int = 0
    chunk: int = 0
    chunks: int = 1
    chunk_axis: int = 0
    transposed: bool = False
    check_shape: bool = False
    unsupported: str = ""

    @property
    def whole(self) -> bool:
        """Whether the tensor is the parameter, as it is."""
        return self == Piece(self.parameter)


@dataclass(frozen=True)
class Match:
    """A tensor's name met one source pattern of a conversion.

    Attributes:
        parameter: the name after the first target pattern took the source's place.
        source: index of the source pattern.
        index: the number that stood for the pattern's ``*``; None without one.
    """

    parameter: str
    source: int
    index: int | None


@dataclass(frozen=True)
class Conversion:
    """A chain of operations from tensors of ``sources`` to parameters of ``targets``.

    Attributes:
        sources: source patterns, in the order their tensors are concatenated.
        targets: target patterns, in the order a fused tensor is cut.
        operations: steps as data, each with its ``name`` and parameters.
        config: the model's configuration, for operations that read a count from it.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: Sequence[Operation]
    config: Mapping[str, Any]

    def pieces(self, match: Match) -> tuple[Piece, ...]:
        """Return what the matched tensor is: one piece per target."""
        names = self._parameters(match.parameter)
        return tuple(self._piece(name, target, match) for target, name in enumerate(names))

    def _piece(self, name: str, target: int, match: Match) -> Piece:
        fields: Fields = {"parameter": name}
        for operation in self.operations:
            step = _STEPS.get(operation["name"])
            changes = step(self, operation, match, target, fields) if step else None
            fields |= _refusal(operation, fields) if changes is None else changes
        return Piece(**fields)

    def _parameters(self, first: str) -> list[str]:
        """Return the name of each target's parameter, given the first one's."""
        if len(self.targets) == 1:
            return [first]
        head, _, tail = first.partition(self.targets[0])
        return [head + target + tail for target in self.targets]

    def count(self, attribute: str) -> int:
        """Return a number from the (text) configuration, 0 when it does not say."""
        text = self.config.get("text_config")
        for config in (text if isinstance(text, Mapping) else {}, self.config):
            if isinstance(config.get(attribute), int):
                return int(config[attribute])
        return 0


def _merge_module_list(
    _: Conversion, operation: Operation, match: Match, __: int, ___: Fields
) -> Fields | None:
    """Stack matrices, one per expert, along a new first dimension."""
    if match.index is None or operation.get("dim", 0) != 0:
        return None
    return {"expert": match.index}


def _concatenate(
    conversion: Conversion, operation: Operation, match: Match, _: int, fields: Fields
) -> Fields | None:
    """Join the tensors of all sources, or a counted number of shards, along ``dim``."""
    axis = operation.get("dim", 0) - ("expert" in fields)
    part: int | None = match.source
    parts = len(conversion.sources)
    if "num_shards_attribute" in operation:
        part, parts = match.index, conversion.count(operation["num_shards_attribute"])
    if axis < 0 or part is None or part >= parts:
        return None
    return {"part": part, "parts": parts, "axis": axis}


def _chunk(
    conversion: Conversion, operation: Operation, _: Match, target: int, __: Fields
) -> Fields | None:
    """Cut the tensor into equal slices along ``dim``, one per target."""
    dim = operation.get("dim", 0)
    return {"chunk": target, "chunks": len(conversion.targets), "chunk_axis": dim}


def _transpose(
    _: Conversion, operation: Operation, __: Match, ___: int, ____: Fields
) -> Fields | None:
    """Swap the last two dimensions: of a matrix, or of a stack of them."""
    if {operation.get("dim0", 0), operation.get("dim1", 1)} not in ({0, 1}, {1, 2}, {-1, -2}):
        return None
    return {"transposed": True, "check_shape": operation.get("check_dims", False)}


def _permute_for_rope(
    conversion: Conversion, operation: Operation, _: Match, target: int, __: Fields
) -> Fields | None:
    """Reorder rows for rotary embeddings, but only of the layers named, if any are."""
    layers = operation.get("permute_layer_names")
    name = conversion.targets[target]
    spared = layers is not None and not any(layer in name for layer in layers)
    return {} if spared else None


def _refusal(operation: Operation, fields: Fields) -> Fields:
    """Name the operation as the one that is not undone, unless an earlier one was."""
    return {"unsupported": fields.get("unsupported") or operation["name"]}


_Step = Callable[[Conversion, Operation, Match, int, Fields], Fields | None]

_STEPS: dict[str, _Step] = {
    "MergeModulelist": _merge_module_list,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Transpose": _transpose,
    "PermuteForRope": _permute_for_rope,
}
"""What each operation adds to a piece, by transformers' class name; None where it is not undone."""
