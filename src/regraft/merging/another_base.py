"""Was an adapter trained on this base? Told from files, by the few values it carries of its own.

The names in a fingerprint are those of a running model. The name map tells what they are in the
files: the same tensor, one part of a fused tensor, or several tensors that transformers joins. What
cannot be told so is left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from regraft.adapters.fingerprint import Fingerprint, Verdict, mismatch, parsed, places_of, verdict
from regraft.adapters.model import Adapter
from regraft.errors import BaseMismatchWarning, redacted
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.merging.inputs.base_index import BaseIndex, ResolvedName, StoredPart
from regraft.merging.inputs.dequantized_view import Quantization
from regraft.merging.inputs.source import FileSource, Source
from regraft.merging.undo.strange_bases import notes_of_strange_base
from regraft.names import NameMap
from regraft.quant.formats.gguf import UNQUANTIZED
from regraft.tensors import TensorSpec

LEAST = 16
"""Fewer values than this say nothing, unless a fingerprint has no more."""

_KINDS = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip


@dataclass(frozen=True)
class _Sample:
    """Places of one stored tensor that a parameter's places lie at.

    Attributes:
        spec: the tensor.
        which: which of the parameter's places these are: bool ``(n,)``.
        flat: where they lie, as elements of the tensor in row-major order.
    """

    spec: TensorSpec
    which: np.ndarray
    flat: np.ndarray


def notes_of_another_base(
    adapters: Sequence[Adapter], base: Checkpoint, quantization: Quantization | None,
    stored: Source | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """Return what to say of adapters that carry another base's fingerprint, or name another kind
    of base, or are in this one already.

    Args:
        adapters: the adapters.
        base: the base; of a quantized one its plain weights.
        quantization: how the base is quantized, if it is.
        stored: what its stored tensors are read from; its files, by default.

    Raises:
        RegraftError: a value cannot be read.
    """
    carrying = [adapter for adapter in adapters if adapter.fingerprint is not None]
    strange = notes_of_strange_base(adapters, base) if stored is None else []
    if not carrying:
        return tuple(strange)
    with FilePool() as files:
        source = stored or FileSource(files)
        seen = SeenBase(base, quantization, source, at_hand=stored is not None)
        other = [
            mismatch(adapter.label, adapter.settings.base_model_name_or_path, base.source)
            for adapter in carrying
            if seen.compare(adapter.fingerprint or "") == "another"
        ]
    return (*other, *strange)


def warn(notes: Sequence[str], *, stacklevel: int) -> None:
    """Issue the notes as warnings, as an adapter's on a live model are."""
    for note in notes:
        warnings.warn(redacted(note), BaseMismatchWarning, stacklevel=stacklevel + 1)


class SeenBase:
    """A base whose values are asked for one by one."""

    def __init__(
        self, base: Checkpoint, quantization: Quantization | None, stored: Source, *, at_hand: bool
    ) -> None:
        self._index = BaseIndex(base, NameMap.for_config(base.config))
        self._quantization, self._at_hand = quantization, at_hand
        self._source = stored
        if quantization is not None:
            from regraft.merging.inputs.stacking import plain_values

            self._source = plain_values(quantization, stored)

    def compare(self, text: str) -> Verdict:
        """Return what this base is to the one that a fingerprint was taken of."""
        fingerprint = parsed(text)
        if fingerprint is None:
            return "unknown"
        there, here, coded = [], [], fingerprint.coded
        for (name, shape), before in zip(
            fingerprint.shapes.items(), fingerprint.values, strict=True
        ):
            for sample in self._samples(name, shape):
                there.append(before[sample.which])
                here.append(self._values(sample))
                coded = coded or self._is_coded(sample.spec)
        found = sum(map(len, here))
        if not found or found < min(LEAST, sum(map(len, fingerprint.values))):
            return "unknown"
        return verdict(np.concatenate(there), np.concatenate(here), coded=coded)

    def compared(self, fingerprint: Fingerprint) -> int:
        """Return how many values of a fingerprint this base can be compared by."""
        samples = (self._samples(*each) for each in fingerprint.shapes.items())
        return sum(sample.flat.size for found in samples for sample in found)

    def _samples(self, name: str, shape: tuple[int, ...]) -> Iterator[_Sample]:
        finds = self._index.find(name)
        if len(finds) != 1 or not finds[0].piece.whole:
            return
        for held in finds[0].held:
            sample = _sample(finds[0], held, shape)
            if sample is not None and sample.flat.size and self._is_readable(held.spec):
                yield sample

    def _is_readable(self, spec: TensorSpec) -> bool:
        """Whether a tensor's values are here: of a base on the Hub, headers alone may be."""
        return spec.dtype in _KINDS and (self._at_hand or spec.path.is_file())

    def _is_coded(self, spec: TensorSpec) -> bool:
        if self._quantization is None:
            return False
        weights, stack = self._quantization.weights, self._quantization.stacks.get(spec.name)
        name = stack.members[0].name if stack is not None else spec.name
        return name in weights and weights[name].codec.name not in UNQUANTIZED

    def _values(self, sample: _Sample) -> np.ndarray:
        spec, found = sample.spec, []
        for place in sample.flat.tolist():
            raw = np.empty(spec.itemsize, np.uint8)
            self._source.read(spec, place * spec.itemsize, raw)
            found.append(raw)
        with np.errstate(all="ignore"):
            values: np.ndarray = np.concatenate(found).view(_KINDS[spec.dtype]).astype(np.float32)
        self._source.release(spec)
        return values


def _sample(found: ResolvedName, held: StoredPart, shape: tuple[int, ...]) -> _Sample | None:
    """Return the places of a parameter that lie in a stored tensor; None where that is not known.

    Args:
        found: where the parameter's name leads.
        held: the tensor, and which part of the parameter it is.
        shape: the parameter's, where the fingerprint was taken.
    """
    piece, there = held.piece, held.spec.shape
    operations = (piece.parts > 1) + (piece.chunks > 1) + piece.transposed
    if piece.unsupported or operations > 1 or not shape:
        return None
    at = list(np.unravel_index(places_of(math.prod(shape)), shape))
    which = np.ones(len(at[0]), bool)
    sizes = list(shape)
    if piece.expert is not None:
        which &= at.pop(0) == piece.expert
        sizes.pop(0)
    if piece.parts > 1:
        begin = _begin(found, held)
        if begin is None or piece.axis >= len(there):
            return None
        at[piece.axis] = at[piece.axis] - begin
        sizes[piece.axis] = there[piece.axis]
        which &= (at[piece.axis] >= 0) & (at[piece.axis] < there[piece.axis])
    if piece.chunks > 1:
        at[piece.chunk_axis] = at[piece.chunk_axis] + piece.chunk * sizes[piece.chunk_axis]
        sizes[piece.chunk_axis] *= piece.chunks
    if piece.transposed and not (piece.check_shape and tuple(sizes) == there):
        at[-2:], sizes[-2:] = at[:-3:-1], sizes[:-3:-1]
    if len(there) != len(sizes) or tuple(sizes[1:]) != there[1:]:
        return None
    which &= at[0] < there[0]  # a vocabulary may have grown since, or been cut
    inside = tuple(axis[which] for axis in at)
    return _Sample(held.spec, which, np.asarray(np.ravel_multi_index(inside, there), np.int64))


def _begin(found: ResolvedName, held: StoredPart) -> int | None:
    """Return where a part of a joined parameter begins along its axis; None if parts lack."""
    piece = held.piece
    parts = {h.piece.part: h for h in found.held if h.piece.expert == piece.expert}
    if sorted(parts) != list(range(piece.parts)):
        return None
    return sum(parts[number].spec.shape[piece.axis] for number in range(piece.part))
