"""What every dialect reads into and writes from: an adapter as modules of plain matrices.

A dialect differs from PEFT in names, in how matrices lie, and in where the scale stands. None of
that changes a value: the tensors here are made of stored ones by moving their elements, so that
what one dialect says comes back from another to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from regraft.adapters.model import Origin
from regraft.formats.files.reading import FilePool
from regraft.tensors import DTYPES, TensorSpec, nbytes_of

Bits = npt.NDArray[Any]
"""Elements of a tensor as unsigned integers of their size, in the tensor's shape: never computed
with, so that every dtype moves alike."""

Move = Callable[..., Bits]
"""Makes the elements of a tensor of those of its sources, in their order."""

Kind = Literal["linear", "embedding", "convolution", "experts"]


@dataclass(frozen=True)
class Moved:
    """A tensor whose elements are those of stored tensors, in other places.

    Attributes:
        dtype: safetensors dtype, that of all sources.
        shape: its dimensions.
        sources: the stored tensors; none of a constant.
        move: makes its elements of theirs; a view will do.
    """

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[TensorSpec, ...]
    move: Move

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return nbytes_of(self.dtype, self.shape)

    def bits(self, files: FilePool) -> Bits:
        """Return its elements, contiguous.

        Raises:
            FormatError, InputError, AccessError: a source cannot be read.
            ValueError: the move gives another shape than it said.
        """
        sources = (bits_of(files, spec) for spec in self.sources)
        moved = np.asarray(self.move(*sources), order="C")  # keeps a number without dimensions
        if moved.shape != self.shape:
            raise ValueError(f"{self.sources[0].name}: {moved.shape} instead of {self.shape}")
        return moved

    def then(self, shape: tuple[int, ...], move: Callable[[Bits], Bits]) -> Moved:
        """Return the tensor that a further move makes of this one."""
        before = self.move
        return Moved(self.dtype, shape, self.sources, lambda *bits: move(before(*bits)))

    @property
    def transposed(self) -> Moved:
        """The same matrix, or stack of matrices, with its last two axes exchanged."""
        *stack, rows, columns = self.shape
        return self.then((*stack, columns, rows), lambda bits: bits.swapaxes(-1, -2))

    def rows(self, first: int, end: int) -> Moved:
        """Return some of its rows."""
        return self.then((end - first, *self.shape[1:]), lambda bits: bits[first:end])

    def at(self, index: int) -> Moved:
        """Return one matrix of a stack."""
        return self.then(self.shape[1:], lambda bits: bits[index])

    def reshaped(self, shape: tuple[int, ...]) -> Moved:
        """Return it with its elements, in their order, in another shape."""
        return self.then(shape, lambda bits: bits.reshape(shape))


@dataclass(frozen=True)
class Whole(Moved):
    """A tensor that takes the place of a parameter, and why it travels in the adapter.

    Attributes:
        origin: see :data:`regraft.adapters.model.Origin`. A copy of an embedding is the base's own
            parameter, and no module of ``modules_to_save``: LoRA can be on that embedding, too.
    """

    origin: Origin = "saved"


def whole_tensor(spec: TensorSpec, origin: Origin) -> Whole:
    """Return a stored tensor as one that takes the place of a parameter."""
    return Whole(spec.dtype, spec.shape, (spec,), lambda bits: bits, origin)


def origin_of(parameter: str, tensor: Moved) -> Origin:
    """Return why a tensor travels; of one that does not say, by its parameter's name."""
    if isinstance(tensor, Whole):
        return tensor.origin
    return "bias" if parameter.endswith(".bias") else "saved"


def as_stored(spec: TensorSpec) -> Moved:
    """Return a stored tensor as it is."""
    return Moved(spec.dtype, spec.shape, (spec,), lambda bits: bits)


def joined(parts: Sequence[Moved]) -> Moved:
    """Return tensors of one dtype below each other: their rows one after the other."""
    first = parts[0]
    if any(part.dtype != first.dtype for part in parts):
        raise ValueError(f"tensors of several dtypes: {', '.join(part.dtype for part in parts)}")
    counts = [len(part.sources) for part in parts]

    def move(*bits: Bits) -> Bits:
        found, at = [], 0
        for part, count in zip(parts, counts, strict=True):
            found.append(part.move(*bits[at : at + count]))
            at += count
        return np.concatenate(found)

    sources = tuple(spec for part in parts for spec in part.sources)
    height = sum(part.shape[0] for part in parts)
    return Moved(first.dtype, (height, *first.shape[1:]), sources, move)


def stacked(parts: Sequence[Moved]) -> Moved:
    """Return tensors of one dtype and shape as a stack, along a new first axis."""
    return joined([part.reshaped((1, *part.shape)) for part in parts])


def bits_of(files: FilePool, spec: TensorSpec) -> Bits:
    """Return a stored tensor's elements as unsigned integers, in its shape.

    Raises:
        FormatError, InputError, AccessError: it cannot be read.
    """
    raw = np.empty(spec.nbytes, np.uint8)
    files.read_into(spec, 0, raw.data)
    return raw.view(f"<u{DTYPES[spec.dtype].bits // 8}").reshape(spec.shape)


@dataclass(frozen=True)
class LoraModule:
    """One adapted module, whatever the dialect.

    Attributes:
        name: transformers' name of the module, such as ``model.layers.0.self_attn.q_proj``; of a
            stack of experts, that of the parameter.
        kind: ``linear``, ``convolution``, ``embedding`` or ``experts``.
        rank: r.
        scale: what B A is multiplied by, in float64.
        a: A: linear ``(r, in)``, convolution ``(r, in, *kernel)``, embedding ``(r, vocabulary)``,
            experts ``(experts, r, in)``.
        b: B: ``(out, r)``, ``(out, r, 1, ...)``, ``(dim, r)``, ``(experts, out, r)``.
        bias: B's bias ``(out,)``, if any.
        magnitude: DoRA's magnitudes ``(out,)``, if any.
    """

    name: str
    rank: int
    scale: float
    a: Moved
    b: Moved
    kind: Kind = "linear"
    bias: Moved | None = None
    magnitude: Moved | None = None

    @property
    def tensors(self) -> tuple[Moved, ...]:
        """Its tensors."""
        return tuple(t for t in (self.a, self.b, self.bias, self.magnitude) if t is not None)


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter without its dialect.

    Attributes:
        modules: adapted modules.
        whole: trained tensors by the parameter that they take the place of; see :class:`Whole`.
        token_rows: trained rows of embeddings by the embedding's module: row numbers and rows.
        base: what it calls its base, None for nothing.
        task_type: PEFT's word for what it was trained for, None for none.
        metadata: strings that travel with its tensors, such as the fingerprint of its base.
        ensure_weight_tying: whether what it adds to one side of tied embeddings is for both.
        config: PEFT's config of it, as far as that is known: what of it is still right is kept
            where the adapter is written in PEFT's format.
        notes: what a user should know of how it was read.
        needs_base: why its tensors, or their names, cannot be told without the base, as a sentence;
            "" where they can. All else of it holds, so that it can be described.
    """

    modules: tuple[LoraModule, ...]
    whole: Mapping[str, Moved] = field(default_factory=dict)
    token_rows: Mapping[str, tuple[tuple[int, ...], Moved]] = field(default_factory=dict)
    base: str | None = None
    task_type: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    ensure_weight_tying: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    needs_base: str = ""


@dataclass(frozen=True)
class NewFile:
    """A file of an adapter that is to be written.

    Attributes:
        name: its name in the folder.
        nbytes: its size.
        pieces: gives its bytes, front to back; tensors are read as they are asked for.
    """

    name: str
    nbytes: int
    pieces: Callable[[FilePool], Any]
