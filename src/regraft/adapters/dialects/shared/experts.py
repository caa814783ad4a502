"""Stacks of experts as one linear layer for each expert and matrix, and back.

transformers keeps the experts of a layer in two stacks, ``experts.gate_up_proj`` and
``experts.down_proj``; checkpoints have each matrix under its own name, ``experts.3.gate_proj`` (or
``w1``). Dialects have stacks of single matrices. What stands between all of them is a linear layer
for each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from regraft.adapters.dialects.form import LoraModule, Moved, PlainAdapter
from regraft.adapters.dialects.shared.base_facts import hidden_size, needed
from regraft.errors import Problem, UnsupportedError
from regraft.formats.checkpoint import Checkpoint
from regraft.names import NameMap, Piece

EXPERT = re.compile(r"(?P<owner>.+)\.experts\.(?P<number>\d+)\.(?P<leaf>\w+)")
"""The name of one matrix of one expert."""

ROLES = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
"""What the matrices of an expert are, by the names that checkpoints have."""

_OTHER_EXPERT = re.compile(r"\.experts\.\w+\.\d+$|\.experts\.\d+\.")
"""Other names of one expert's matrix, such as Unsloth's ``experts.gate_up_projs.3``."""

_W = {"gate": "w1", "up": "w3", "down": "w2"}
_PROJ = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_WITH_W = ("block_sparse_moe", "feed_forward")
"""Owners of experts whose matrices are called w1, w2 and w3 (Mixtral, LFM2)."""

_MERGE = "Merge it (`regraft merge`), and use the merged model"


def leaf_of(owner: str, role: str, base: Checkpoint | None = None) -> str:
    """Return what checkpoints call a matrix of an expert.

    Args:
        owner: the module that has the experts, such as ``model.layers.0.mlp``.
        role: ``gate``, ``up`` or ``down``.
        base: the model, where it is known; else the owner's name tells.
    """
    if base is not None and base.config is not None:
        names = NameMap.for_config(base.config)
        for leaf in (_PROJ[role], _W[role]):
            if _piece_of(names, f"{owner}.experts.0.{leaf}") is not None:
                return leaf
    return (_W if owner.rpartition(".")[2] in _WITH_W else _PROJ)[role]


def _piece_of(names: NameMap, module: str) -> Piece | None:
    """Return the slice of a stack that a matrix of an expert is by its name."""
    found = names.pieces(f"{module}.weight")
    if len(found) != 1 or found[0].expert is None or found[0].unsupported:
        return None
    return found[0]


def single_experts(adapter: PlainAdapter, base: Checkpoint | None) -> PlainAdapter:
    """Return an adapter whose stacks of experts are linear layers, one for each matrix.

    Raises:
        UsageError: there are stacks, and no base.
        UnsupportedError: it cannot be told how one lies, or the model has no names for its experts.
    """
    if all(module.kind != "experts" for module in adapter.modules):
        return adapter
    known = needed(base, "it says how stacks of experts lie")
    names, made, problems = NameMap.for_config(known.config), list[LoraModule](), list[Problem]()
    for module in adapter.modules:
        if module.kind != "experts":
            made.append(module)
            continue
        found = _singles(module, names, hidden_size(known))
        if isinstance(found, Problem):
            problems.append(found)
        else:
            made += found
    if problems:
        raise UnsupportedError(problems)
    return replace(adapter, modules=tuple(made))


@dataclass(frozen=True)
class _Matrix:
    """A matrix of each expert: its name in checkpoints, and which part of the stack it is."""

    leaf: str
    piece: Piece


def _singles(module: LoraModule, names: NameMap, hidden: int) -> list[LoraModule] | Problem:
    owner, _, parameter = module.name.rpartition(".")
    found = [
        _Matrix(leaf, piece)
        for leaf in ROLES
        if (piece := _piece_of(names, f"{owner}.0.{leaf}")) and piece.parameter == module.name
    ]
    if not found or len(found) != found[0].piece.parts or any(m.piece.axis for m in found):
        return Problem("the experts of this model have no names of their own", module.name,
                       "a model whose checkpoints have them one by one", hint=_MERGE)  # fmt: skip
    inner = "down" not in parameter  # of gate and up the inputs are as wide as the model
    straight = (module.a.shape[2] if inner else module.b.shape[1]) == hidden
    swapped = (module.b.shape[1] if inner else module.a.shape[2]) == hidden
    if straight == swapped:
        return Problem("it cannot be told by its sizes how this stack of experts lies", module.name,
                       f"one side of {hidden}", f"A {module.a.shape}, B {module.b.shape}",
                       _MERGE)  # fmt: skip
    a, b = (module.a, module.b) if straight else (module.b.transposed, module.a.transposed)
    return [
        replace(module, name=f"{owner}.{expert}.{matrix.leaf}", a=a.at(expert), kind="linear",
                b=_part(b.at(expert), matrix.piece))
        for expert in range(a.shape[0]) for matrix in found
    ]  # fmt: skip


def _part(b: Moved, piece: Piece) -> Moved:
    height = b.shape[0] // piece.parts
    return b.rows(piece.part * height, (piece.part + 1) * height)


@dataclass(frozen=True)
class Stack:
    """The same matrix of all experts of a layer.

    Attributes:
        owner: the module that has the experts.
        role: ``gate``, ``up`` or ``down``.
        members: the matrix of each expert, the first one's first.
    """

    owner: str
    role: str
    members: tuple[LoraModule, ...]


def by_stack(
    modules: Iterable[LoraModule],
) -> tuple[list[LoraModule], list[Stack], list[Problem]]:
    """Return modules that are no experts, stacks of those that are, and what cannot be a stack."""
    plain, problems = list[LoraModule](), list[Problem]()
    numbered: dict[tuple[str, str], dict[int, LoraModule]] = defaultdict(dict)
    for module in modules:
        match = EXPERT.fullmatch(module.name)
        if match is None and not _OTHER_EXPERT.search(module.name):
            plain.append(module)
        elif match is None or match["leaf"] not in ROLES:
            problems.append(Problem("the experts have gate and up in one matrix, or names that are "
                                    "not known", module.name, hint=_MERGE))  # fmt: skip
        else:
            held = numbered[match["owner"], ROLES[match["leaf"]]]
            other = held.setdefault(int(match["number"]), module)
            if other is not module:
                problems.append(Problem("two modules of the adapter are one matrix of an expert",
                                        other.name, "one", module.name, _MERGE))  # fmt: skip
    counts = {owner: 0 for owner, _ in numbered}
    for (owner, _), members in numbered.items():
        counts[owner] = max(counts[owner], *(number + 1 for number in members))
    stacks = []
    for (owner, role), members in numbered.items():
        ordered = [members[number] for number in sorted(members)]
        trouble = list(_trouble(owner, role, members, counts[owner], ordered))
        problems += trouble
        if not trouble:
            stacks.append(Stack(owner, role, tuple(ordered)))
    return plain, stacks, problems


def _trouble(
    owner: str,
    role: str,
    members: dict[int, LoraModule],
    count: int,
    ordered: Sequence[LoraModule],
) -> Iterator[Problem]:
    where = f"{owner}.experts, {role}"
    missing = [str(number) for number in range(count) if number not in members]
    if missing:
        yield Problem("a stack of experts has to have all of them", where,
                      f"experts 0 to {count - 1}", f"none for {', '.join(missing[:8])}",
                      _MERGE)  # fmt: skip
    first = ordered[0]
    if any((m.a.shape, m.b.shape) != (first.a.shape, first.b.shape) for m in ordered):
        yield Problem("the experts of a stack have to be of one size", where, hint=_MERGE)
