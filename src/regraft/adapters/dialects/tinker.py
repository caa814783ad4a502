"""Tinker's dialect: PEFT's files, with stacks of experts and an output layer of another name.

``experts.w1``, ``w2`` and ``w3`` are gate, down and up, with A (E, r, in) and B (E, out, r), where
one of the two may be of one expert, which all share; ``w3`` is empty where there is no gate, and w1
is up then. ``model.unembed_tokens`` is the output layer, or the embedding where they are tied;
``in_proj_q``, ``in_proj_k`` and ``in_proj_v`` are rows of ``in_proj_qkv`` (Qwen3.5). Facts:
tinker-cookbook 0.6.1, ``weights/_adapter.py`` and ``weights/_merge*.py``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from regraft.adapters.dialects.form import Bits, Moved, NewFile, PlainAdapter, joined, stacked
from regraft.adapters.dialects.shared.base_facts import model_type, needed, tied_sides
from regraft.adapters.dialects.shared.experts import Stack, by_stack, leaf_of, single_experts
from regraft.adapters.dialects.shared.gathering import Gathering, Parts
from regraft.adapters.dialects.shared.limits import magnitudes, refuse, unnamed, unsayable
from regraft.adapters.dialects.shared.once import NewTensors, modules_twice
from regraft.adapters.dialects.shared.peft_files import FACTOR, new_files, open_files
from regraft.adapters.dialects.shared.tied import as_one, as_two
from regraft.adapters.dialects.shared.widening import as_one_dtype
from regraft.errors import AdapterError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.layout import ADAPTER_SAFE
from regraft.formats.problems import capped

_PROGRAM = "Tinker"
_STACK = re.compile(r"(?P<owner>.+)\.experts\.(?P<leaf>w[123])")
_ROLES = {"w1": "gate", "w2": "down", "w3": "up"}
_SPLIT = re.compile(r"(?P<owner>.+)\.in_proj_(?P<part>[qkv])")
_HEAD = "unembed_tokens"
_VISION = "model.language_model."
_FUSED = ("gpt_oss", "llama4", "llama4_text")
"""Model types whose published gate and up are one matrix."""


def read(path: Path, base: Checkpoint | None) -> PlainAdapter:
    """Read Tinker's adapter; see :class:`regraft.adapters.dialects.registry.Reader`."""
    files = open_files(path)
    gathering = Gathering(files.weights)
    found = gathering.parts(files.tensors, FACTOR, "lora_A and lora_B")
    split: dict[str, dict[str, tuple[Moved, Moved]]] = defaultdict(dict)
    for name, parts in found.items():
        stack, piece = _STACK.fullmatch(name), _SPLIT.fullmatch(name)
        if stack is not None and _is_empty(parts):
            continue
        pair = gathering.pair(name, parts, ("lora_A", "lora_B"), (3,) if stack else (2,))
        if pair is None:
            continue
        if stack is not None:
            gated = not _is_empty(found.get(f"{stack['owner']}.experts.w3", {}))
            _add_stack(gathering, stack, pair, files.scale, base, gated=gated)
        elif piece is not None:
            split[_peft_name(piece["owner"], base)][piece["part"]] = pair
        else:
            gathering.add(_peft_name(name, base), *pair, files.scale, stored=name)
    for owner, pairs in split.items():
        _add_split(gathering, owner, pairs, files.scale)
    adapter = PlainAdapter(
        gathering.done(), base=files.base, task_type="CAUSAL_LM", metadata=files.metadata
    )
    return _with_head(adapter, base, files.weights)


def _is_empty(parts: Parts) -> bool:
    return bool(parts) and all(0 in spec.shape for spec in parts.values())


def _add_stack(
    gathering: Gathering,
    match: re.Match[str],
    pair: tuple[Moved, Moved],
    scale: float,
    base: Checkpoint | None,
    *,
    gated: bool,
) -> None:
    a, b = pair
    counts = {a.shape[0], b.shape[0]}
    if model_type(base) in _FUSED:
        gathering.refuse(f"{model_type(base)} has gate and up in one matrix, Tinker in two: merge "
                         "it with tinker-cookbook", match[0])  # fmt: skip
        return
    if counts == {1} or len(counts - {1}) > 1:
        gathering.refuse("factors are of different counts of experts", match[0],
                         "one count, or A or B of one that all share",
                         f"{a.shape}, {b.shape}")  # fmt: skip
        return
    owner = _peft_name(match["owner"], base)
    role = _ROLES[match["leaf"]] if gated or match["leaf"] != "w1" else "up"
    leaf = leaf_of(owner, role, base)
    for expert in range(max(counts)):
        gathering.add(
            f"{owner}.experts.{expert}.{leaf}", a.at(expert % a.shape[0]),
            b.at(expert % b.shape[0]), scale, stored=match[0],
        )  # fmt: skip


def _add_split(
    gathering: Gathering, owner: str, pairs: dict[str, tuple[Moved, Moved]], scale: float
) -> None:
    """Add q, k and v of one matrix as one module, of the three ranks together."""
    name = f"{owner}.in_proj_qkv"
    if len(pairs) < 3:
        gathering.refuse("rows of a fused matrix can be told only where all three are there",
                         name, "in_proj_q, in_proj_k and in_proj_v",
                         ", ".join(sorted(pairs)))  # fmt: skip
        return
    ordered = [pairs[part] for part in "qkv"]
    if any(a.shape[0] != b.shape[1] or a.shape[1] != ordered[0][0].shape[1] for a, b in ordered):
        gathering.refuse("factors do not fit each other", name, "one rank and width")
        return
    ranks = [a.shape[0] for a, _ in ordered]
    placed = [
        _between(b, sum(ranks[:number]), sum(ranks[number + 1 :]))
        for number, (_, b) in enumerate(ordered)
    ]
    a, b = joined(as_one_dtype([a for a, _ in ordered])), joined(as_one_dtype(placed))
    gathering.add(name, a, b, scale)


def _between(b: Moved, before: int, after: int) -> Moved:
    """Return B with columns of zeros on both sides of it."""

    def padded(bits: Bits) -> Bits:
        return np.pad(bits, [(0, 0), (before, after)])

    return b.then((b.shape[0], before + b.shape[1] + after), padded)


def _peft_name(name: str, base: Checkpoint | None) -> str:
    if base is None or name.startswith(_VISION) or not name.startswith("model."):
        return name
    sees = any(tensor.startswith(_VISION) for tensor in base.tensors)
    return _VISION + name.removeprefix("model.") if sees else name


def _with_head(adapter: PlainAdapter, base: Checkpoint | None, file: Path) -> PlainAdapter:
    """Return an adapter with transformers' name for its output layer.

    Where the base has none of its own, Tinker's own export adds to the embedding, and so to both.

    Raises:
        AdapterError: the adapter has several.
    """
    heads = [m for m in adapter.modules if m.name.rpartition(".")[2] in (_HEAD, "lm_head")]
    if problems := modules_twice((replace(m, name="lm_head") for m in heads), file):
        raise AdapterError(capped(problems, file))
    if not heads or heads[0].name.rpartition(".")[2] != _HEAD:
        return adapter
    sides = tied_sides(needed(base, f"it says whether {_HEAD} is the embedding too"))
    rest = tuple(module for module in adapter.modules if module not in heads)
    head = heads[0]
    if sides is None:
        return replace(adapter, modules=(*rest, replace(head, name="lm_head")))
    both = replace(head, name=sides[0], kind="embedding", a=head.b.transposed, b=head.a.transposed)
    return as_two(replace(adapter, modules=(*rest, both)), base)


# -- writing ---------------------------------------------------------------------------------------


def write(adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
    """Return an adapter's files as Tinker has them; all modules have one rank and scale."""
    adapter = as_one(single_experts(adapter, base), base)
    sides = tied_sides(base)
    problems = unsayable(adapter, _PROGRAM, ("linear", "embedding"))
    problems += magnitudes(adapter.modules, _PROGRAM)
    refuse(problems, ADAPTER_SAFE)
    plain, stacks, problems = by_stack(adapter.modules)
    unknown = [
        module.name for module in plain
        if module.name.endswith(".in_proj_qkv")
        or (module.kind == "embedding" and not (sides and module.name == sides[0]))
    ]  # fmt: skip
    refuse([*problems, *unnamed(unknown, _PROGRAM)], ADAPTER_SAFE)
    tensors, names = NewTensors(), list[str]()
    for module in plain:
        a, b, name = module.a, module.b, module.name.replace(_VISION, "model.", 1)
        if module.kind == "embedding":
            a, b, name = module.b.transposed, module.a.transposed, f"model.{_HEAD}"
        elif name == "lm_head":
            name = f"model.{_HEAD}"
        names.append(name)
        tensors.add({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    for stack in stacks:
        tensors.add(_of_stack(stack))
        names.append(f"{stack.owner}.experts")
    return new_files(adapter, tensors, names)


def _of_stack(stack: Stack) -> dict[str, Moved]:
    leaf = next(leaf for leaf, role in _ROLES.items() if role == stack.role)
    name = f"{stack.owner.replace(_VISION, 'model.', 1)}.experts.{leaf}"
    return {
        f"{name}.lora_A.weight": stacked(as_one_dtype([member.a for member in stack.members])),
        f"{name}.lora_B.weight": stacked(as_one_dtype([member.b for member in stack.members])),
    }
