"""What one named tensor is in terms of the current model's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


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
    operations: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]

    def pieces(self, match: Match) -> tuple[Piece, ...]:
        """Return what the matched tensor is: one piece per target."""
        pieces = [Piece(name) for name in self._parameters(match.parameter)]
        for operation in self.operations:
            step = _STEPS.get(operation["name"], _refuse)
            pieces = [step(self, operation, match, i, piece) for i, piece in enumerate(pieces)]
        return tuple(pieces)

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
    _: Conversion, operation: Mapping[str, Any], match: Match, __: int, piece: Piece
) -> Piece:
    """Stack matrices, one per expert, along a new first dimension."""
    if match.index is None or operation.get("dim", 0) != 0:
        return _unsupported(piece, operation)
    return replace(piece, expert=match.index)


def _concatenate(
    conversion: Conversion, operation: Mapping[str, Any], match: Match, _: int, piece: Piece
) -> Piece:
    """Join the tensors of all sources, or a counted number of shards, along ``dim``."""
    axis = operation.get("dim", 0) - (piece.expert is not None)
    part: int | None = match.source
    parts = len(conversion.sources)
    if "num_shards_attribute" in operation:
        part, parts = match.index, conversion.count(operation["num_shards_attribute"])
    if axis < 0 or part is None or part >= parts:
        return _unsupported(piece, operation)
    return replace(piece, part=part, parts=parts, axis=axis)


def _chunk(
    conversion: Conversion, operation: Mapping[str, Any], _: Match, target: int, piece: Piece
) -> Piece:
    """Cut the tensor into equal slices along ``dim``, one per target."""
    dim = operation.get("dim", 0)
    return replace(piece, chunk=target, chunks=len(conversion.targets), chunk_axis=dim)


def _transpose(
    _: Conversion, operation: Mapping[str, Any], __: Match, ___: int, piece: Piece
) -> Piece:
    """Swap the last two dimensions: of a matrix, or of a stack of them."""
    dims = {operation.get("dim0", 0), operation.get("dim1", 1)}
    if dims not in ({0, 1}, {1, 2}, {-1, -2}):
        return _unsupported(piece, operation)
    return replace(piece, transposed=True, check_shape=operation.get("check_dims", False))


def _permute_for_rope(
    conversion: Conversion, operation: Mapping[str, Any], _: Match, target: int, piece: Piece
) -> Piece:
    """Reorder rows for rotary embeddings, but only of the layers named, if any are."""
    layers = operation.get("permute_layer_names")
    name = conversion.targets[target]
    if layers is not None and not any(layer in name for layer in layers):
        return piece
    return _unsupported(piece, operation)


def _refuse(
    _: Conversion, operation: Mapping[str, Any], __: Match, ___: int, piece: Piece
) -> Piece:
    return _unsupported(piece, operation)


def _unsupported(piece: Piece, operation: Mapping[str, Any]) -> Piece:
    return replace(piece, unsupported=piece.unsupported or operation["name"])


_STEPS = {
    "MergeModulelist": _merge_module_list,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Transpose": _transpose,
    "PermuteForRope": _permute_for_rope,
}
"""The operations that regraft understands, by transformers' class name."""
