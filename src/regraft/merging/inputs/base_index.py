"""Finding the base's tensors behind a name an adapter uses."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property

from regraft.adapters.wrappers import PARALLEL, without_wrappers
from regraft.formats.checkpoint import Checkpoint
from regraft.merging.inputs.single_experts import as_slice, piece_of, stacks_of, unwrapped
from regraft.names import NameMap, Piece
from regraft.names.conv1d import is_conv1d
from regraft.tensors import TensorSpec

# Looking for similar names is slow; a hostile file could have every name differ from the others.
_MAX_SHAPES, _MAX_SEARCHES, _LONGEST_SEARCHED = 500, 20, 200


@dataclass(frozen=True)
class StoredPart:
    """A tensor of the base, and which part of a model's parameter it is."""

    spec: TensorSpec
    piece: Piece


@dataclass(frozen=True)
class ResolvedName:
    """Where a name leads.

    Attributes:
        piece: which part of a model's parameter the name means.
        held: the base's tensors that hold some of it.
        alias: the parameter's own name when the base holds it only under another name, because
            the two are tied; None otherwise.
    """

    piece: Piece
    held: tuple[StoredPart, ...]
    alias: str | None = None

    @property
    def common(self) -> ResolvedName:
        """The same find, meaning what both sides of a tie share rather than one side of it."""
        return replace(self, alias=None)


class BaseIndex:
    """The tensors of a base by every name they can be asked for."""

    def __init__(
        self, base: Checkpoint, names: NameMap, transposed: frozenset[str] = frozenset()
    ) -> None:
        """Take a base; ``transposed`` are its tensors that lie (in, out) though nobody says so."""
        self.base = base
        self.transposed = transposed
        self.names = names.for_names(base.tensors)
        self.by_parameter: dict[str, list[StoredPart]] = defaultdict(list)
        for name, spec in base.tensors.items():
            for piece in self._pieces(name):
                self.by_parameter[piece.parameter].append(StoredPart(spec, piece))
        self.aliases = self._absent_ties()
        self._near: dict[str, list[str]] = {}

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        pieces = self.names.pieces(name)
        if pieces == (Piece(name),) and (single := as_slice(self.names, name)):
            pieces = (single,)
        if name not in self.transposed:
            return pieces
        return tuple(replace(piece, transposed=not piece.transposed) for piece in pieces)

    def _absent_ties(self) -> dict[str, str]:
        """Return the tied parameters that the base leaves out, with the parameter they share."""
        ties = {}
        for target, source in self.names.tied_now.items():
            if target not in self.by_parameter and self.holding(source):
                ties[target] = source
        return ties

    def is_conv1d(self, module: str) -> bool | None:
        """Whether a module stores its weight as (in, out); None when the model is not known."""
        kind = (self.base.config or {}).get("model_type")
        return is_conv1d(kind if isinstance(kind, str) else None, module)

    def is_transposed(self, module: str) -> bool | None:
        """Whether an experts module stores (in, out) matrices; None when the model is not known."""
        return self.names.is_transposed(module)

    def holding(self, parameter: str) -> tuple[StoredPart, ...]:
        """Return the tensors of a parameter, whether or not the base has its model's prefix."""
        prefix = f"{self.names.base_model_prefix}."
        for name in (parameter, parameter.removeprefix(prefix), prefix + parameter):
            if name in self.by_parameter:
                return tuple(self.by_parameter[name])
        return ()

    def find(self, name: str) -> tuple[ResolvedName, ...]:
        """Return what a full parameter name means in this base: nothing, or one or more finds."""
        if exact := self._exact(name):
            return (exact,)
        for pieces in (self.names.targets(name), *self.names.canonical_candidates(name)):
            found = [self._of_piece(piece) for piece in pieces]
            if any(found):
                return tuple(f for f in found if f is not None)
        if expert := self._expert(name):
            return expert
        if plain := unwrapped(self.names, name):
            return self.find(plain)
        # What DataParallel puts in front, where the base has no module of that name.
        return self.find(name.removeprefix(PARALLEL)) if name.startswith(PARALLEL) else ()

    def _expert(self, name: str) -> tuple[ResolvedName, ...]:
        """Return what a name of one expert means, where the model keeps a stack of them."""
        for stack, expert in stacks_of(name):
            for whole in self.find(stack):
                module = whole.piece.parameter.rpartition(".")[0]
                piece = piece_of(whole.piece, expert, self.is_transposed(module))
                held = tuple(h for h in whole.held if overlap(piece, h.piece))
                axes = 2 if name.endswith(".bias") else 3
                if held and all(
                    h.piece.expert is not None or len(h.spec.shape) == axes for h in held
                ):
                    return (ResolvedName(piece, held),)
        return ()

    def _exact(self, name: str) -> ResolvedName | None:
        spec = self.base.tensors.get(name)
        pieces = self.names.pieces(name) if spec is not None else ()
        if spec is None or any(p.transposed or p.unsupported for p in pieces):
            return None
        held = StoredPart(spec, Piece(name, transposed=name in self.transposed))
        return ResolvedName(Piece(name), (held,))

    def _of_piece(self, piece: Piece) -> ResolvedName | None:
        held = tuple(
            h for h in self.by_parameter.get(piece.parameter, ()) if overlap(piece, h.piece)
        )
        if held:
            return ResolvedName(piece, held)
        if piece.parameter in self.aliases:
            return ResolvedName(piece, self.holding(self.aliases[piece.parameter]), piece.parameter)
        return None

    def part_offset(self, parameter: str, piece: Piece) -> int:
        """Return the row at which a part of a concatenated parameter begins."""
        before = [
            _height(h.spec)
            for h in self.by_parameter[parameter]
            if h.piece.expert == piece.expert and h.piece.part < piece.part
        ]
        return sum(before)

    def part_total(self, parameter: str, piece: Piece) -> int:
        """Return the rows that all parts of a concatenated parameter have together."""
        rows = [
            _height(h.spec) for h in self.by_parameter[parameter] if h.piece.expert == piece.expert
        ]
        return sum(rows)

    def nearest(self, name: str, count: int = 3) -> list[str]:
        """Return the base's names most like ``name``, for messages."""
        shape = _numberless(name)
        if shape not in self._near:
            if len(self._near) >= _MAX_SEARCHES:
                return []
            close = difflib.get_close_matches(shape, list(self._shapes), n=count, cutoff=0.4)
            self._near[shape] = [self._shapes[c] for c in close]
        return self._near[shape]

    @cached_property
    def wrapped(self) -> str | None:
        """One of the base's names in which training left a wrapper; None where there is none."""
        names = self.base.tensors
        if all(name.startswith(PARALLEL) for name in names):
            return next(iter(names), None)
        return next((name for name in names if without_wrappers(name) != name), None)

    @cached_property
    def _shapes(self) -> dict[str, str]:
        """One name for each shape of name (numbers aside), so that a search stays short."""
        shapes: dict[str, str] = {}
        for name in self.base.tensors:
            if len(name) <= _LONGEST_SEARCHED and len(shapes) < _MAX_SHAPES:
                shapes.setdefault(_numberless(name), name)
        return shapes


def _height(spec: TensorSpec) -> int:
    return spec.shape[0] if spec.shape else 1


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def overlap(wanted: Piece, held: Piece) -> bool:
    """Whether two parts of one parameter have elements in common."""
    experts = wanted.expert is None or held.expert is None or wanted.expert == held.expert
    parts = wanted.parts == 1 or held.parts == 1 or wanted.part == held.part
    return experts and parts


def nearest_hint(index: BaseIndex, name: str) -> str:
    """Return a hint that lists the base's names most like ``name``."""
    if wrapped := index.wrapped:
        return (
            f"Training left a wrapper in the base's names ({wrapped}), by which transformers does "
            "not find them either. Save the base again from the model without it"
        )
    near = index.nearest(name)
    if not near:
        return "Is this the base the adapter was trained on?"
    return "The base's nearest names: " + ", ".join(near)
