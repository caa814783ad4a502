"""Where a merged model keeps what a step of the merge makes, whoever wrote the files.

Another tool may write other files, names of another version of transformers, experts in one tensor
or in many, and a tied tensor once or twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.merging.inputs.base_index import BaseIndex, StoredPart, overlap
from regraft.merging.planning.plan import Step
from regraft.names import NameMap, Piece
from regraft.numerics.arrays import Bytes
from regraft.tensors import DTYPES, TensorSpec, nbytes_of


@dataclass(frozen=True)
class Place:
    """The bytes of a tensor: one range of a file, or several one after the other.

    Attributes:
        dtype: safetensors dtype.
        shape: dimensions as the merge has them, unless ``parts`` is one tensor of another shape.
        parts: the ranges in order, as tensors of their own.
        names: the tensors they are of.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[TensorSpec, ...]
    names: tuple[str, ...]

    def read(self, files: FilePool, offset: int, buffer: Bytes) -> None:
        """Fill ``buffer`` from a byte offset.

        Raises:
            RegraftError: something could not be read.
        """
        done = 0
        for part in self.parts:
            low = max(offset + done, 0)
            if done < buffer.size and low < part.nbytes:
                count = min(part.nbytes - low, buffer.size - done)
                files.read_into(part, low, buffer[done : done + count].data)
                done += count
            offset -= part.nbytes


def whole(spec: TensorSpec) -> Place:
    """Return the place that is one tensor."""
    return Place(spec.dtype, spec.shape, (spec,), (spec.name,))


class Places:
    """Finds what a merge makes in the files of a merged model.

    Args:
        merged: the merged model.
        base: the base, whose names the steps of the merge have.
        config: the config that tells how names are to be read, if the merged model has none.
    """

    def __init__(self, merged: Checkpoint, base: Checkpoint) -> None:
        config = merged.config or base.config
        names = NameMap.for_config(config)
        self.merged = merged
        self._index = BaseIndex(merged, names)
        self._base = BaseIndex(base, names)

    def find(self, step: Step) -> Place | str:
        """Return where a step's tensor is; ``""`` if nowhere, else why it cannot be compared."""
        if step.name in self.merged.tensors:
            return whole(self.merged.tensors[step.name])
        if (twin := self._twin(step.name)) is not None:
            return whole(twin)
        pieces = self._base.names.pieces(step.name)
        if len(pieces) != 1 or pieces[0].chunks > 1:
            return "" if not self._related(pieces) else _CANNOT
        return self._by_piece(step, pieces[0])

    def _twin(self, name: str) -> TensorSpec | None:
        """Return the tensor that stands for ``name`` too, because the two are tied."""
        parameters = [piece.parameter for piece in self._index.names.pieces(name)]
        source = self._index.aliases.get(parameters[0]) if len(parameters) == 1 else None
        held = self._index.holding(source) if source else ()
        return held[0].spec if len(held) == 1 and held[0].piece.whole else None

    def _related(self, pieces: Iterable[Piece]) -> list[StoredPart]:
        """Return the tensors that hold some of the same parameters."""
        return [
            held
            for piece in pieces
            for held in self._index.holding(piece.parameter)
            if overlap(piece, held.piece)
        ]

    def _by_piece(self, step: Step, piece: Piece) -> Place | str:
        found = self._related([piece])
        if not found:
            return ""
        if len(found) == 1 and _same_part(found[0].piece, piece):
            return whole(found[0].spec)
        if any(_moves(held.piece) for held in found) or _moves(piece):
            return _CANNOT
        if len(found) == 1 and found[0].piece.whole:
            return self._slice(step, piece, found[0].spec)
        if piece.whole:
            return _joined(step, found)
        return _CANNOT

    def _slice(self, step: Step, piece: Piece, fused: TensorSpec) -> Place | str:
        """Return one expert's part of a tensor that holds all of them."""
        if piece.expert is None or len(fused.shape) != 3 or len(step.shape) != 2:
            return _CANNOT
        first = self._base.part_offset(piece.parameter, piece) if piece.parts > 1 else 0
        if fused.shape[2] != step.shape[1] or first + step.shape[0] > fused.shape[1]:
            return _CANNOT
        row = nbytes_of(fused.dtype, (fused.shape[2],))
        start = (piece.expert * fused.shape[1] + first) * row
        size = step.shape[0] * row
        if start + size > fused.nbytes:
            return _CANNOT
        part = replace(fused, shape=step.shape, start=fused.start + start, nbytes=size)
        return Place(fused.dtype, step.shape, (part,), (fused.name,))

    def extra(self, places: Iterable[Place | str], steps: Mapping[str, Step]) -> list[Step | str]:
        """Return what the merged model has besides: twins of a tie as steps, others by name."""
        used = {name for place in places if isinstance(place, Place) for name in place.names}
        found: list[Step | str] = []
        for name in self.merged.tensors:
            if name not in used:
                twin = steps.get(self._tied_to(name) or "")
                found.append(replace(twin, name=name) if twin else name)
        return found

    def _tied_to(self, name: str) -> str | None:
        """Return the base's tensor that a tensor would be a copy of, by a tie of the model."""
        source = self._base.names.tied.get(name)
        held = self._base.holding(source) if source else ()
        return held[0].spec.name if held else None


_CANNOT = "it is laid out in another way, which is not undone"


def _same_part(held: Piece, wanted: Piece) -> bool:
    """Whether two tensors are the same part of the same parameter, prefix aside."""
    return replace(held, parameter="") == replace(wanted, parameter="")


def _moves(piece: Piece) -> bool:
    """Whether a tensor's bytes stand in another order than its parameter's."""
    return piece.transposed or bool(piece.unsupported) or piece.axis != 0 or piece.chunks > 1


def _joined(step: Step, found: list[StoredPart]) -> Place | str:
    """Return the place that several tensors are together, expert by expert and part by part."""
    found = sorted(found, key=lambda held: (held.piece.expert or 0, held.piece.part))
    dtypes = {held.spec.dtype for held in found}
    elements = sum(held.spec.numel for held in found)
    if len(dtypes) > 1 or elements * DTYPES[step.dtype].bits != step.nbytes * 8:
        return _CANNOT
    parts = tuple(held.spec for held in found)
    return Place(parts[0].dtype, step.shape, parts, tuple(spec.name for spec in parts))
