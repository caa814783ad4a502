"""Embeddings that are tied: what programs do that know one tensor for both sides.

PEFT gives each side factors of its own, of which one is the other's transposed
(``ensure_weight_tying``), or changes the input's side alone. A program in which the embedding is
the output layer too has one module, which changes both.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from regraft.adapters.dialects.form import LoraModule, PlainAdapter
from regraft.adapters.dialects.shared.base_facts import needed, tied_sides
from regraft.errors import Problem, UnsupportedError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
"""What input embeddings are called."""

HEADED = "embed_tokens"
"""The name of which ``ensure_weight_tying`` alone says that both sides are meant."""

_BOTH = "Train it with ensure_weight_tying=True, or merge it (`regraft merge`)"


def as_two(adapter: PlainAdapter, base: Checkpoint | None) -> PlainAdapter:
    """Return an adapter whose embedding stands for both sides of a tie as PEFT says it.

    Where the base is not known, the two sides are tied for all that is known, and where they are
    not, ``ensure_weight_tying`` means nothing.

    Raises:
        UsageError: the base is needed to say what the output layer is called.
    """
    found = [module for module in adapter.modules if module.kind == "embedding"]
    if not found:
        return adapter
    if base is None:
        if any(module.name.rpartition(".")[2] != HEADED for module in found):
            needed(base, f"it says whether {found[0].name} is its output layer too")
        return replace(adapter, ensure_weight_tying=True)
    sides = tied_sides(base)
    one = next((module for module in found if sides and module.name == sides[0]), None)
    if one is None or sides is None:
        return adapter
    head = replace(one, name=sides[1], kind="linear", a=one.b.transposed, b=one.a.transposed)
    return replace(adapter, modules=(*adapter.modules, head), ensure_weight_tying=True)


def as_one(adapter: PlainAdapter, base: Checkpoint | None) -> PlainAdapter:
    """Return an adapter in which the embedding stands for both sides of a tie.

    Raises:
        UsageError: it adapts an embedding, and there is no base to say whether it is tied.
        UnsupportedError: its two sides say different things.
    """
    if base is None and all(
        module.kind != "embedding" and module.name.rpartition(".")[2] != "lm_head"
        for module in adapter.modules
    ):
        return adapter
    sides = tied_sides(needed(base, "it says whether the embeddings are tied"))
    if sides is None:
        return replace(adapter, ensure_weight_tying=False)
    modules = {module.name: module for module in adapter.modules}
    one, other = modules.get(sides[0]), modules.pop(sides[1], None)
    if one is None and other is None:
        return adapter
    if other is None or one is None:
        if one is None or not adapter.ensure_weight_tying:
            raise _one_side(sides[0] if other is None else sides[1])
    elif not _same(one, other):
        raise _one_side(sides[1])
    return replace(adapter, modules=tuple(modules.values()), ensure_weight_tying=False)


def mirrored(adapter: PlainAdapter) -> frozenset[str]:
    """Return the output layers whose factors are those of an embedding, transposed.

    What is done to B of the embedding has to be done to A of such a layer.

    Raises:
        FormatError, InputError, AccessError: a tensor cannot be read.
    """
    embeddings = [module for module in adapter.modules if module.kind == "embedding"]
    return frozenset(
        module.name for module in adapter.modules
        if module.kind == "linear" and any(_same(one, module) for one in embeddings)
    )  # fmt: skip


def _same(one: LoraModule, other: LoraModule) -> bool:
    """Whether an output layer's factors are those of the embedding, each the other's transposed."""
    if (one.scale, one.magnitude, one.bias) != (other.scale, None, None):
        return False
    if other.magnitude is not None or other.bias is not None:
        return False
    pairs = ((one.a, other.b.transposed), (one.b, other.a.transposed))
    if any((x.dtype, x.shape) != (y.dtype, y.shape) for x, y in pairs):
        return False
    with FilePool() as files:
        return all(np.array_equal(x.bits(files), y.bits(files)) for x, y in pairs)


def _one_side(name: str) -> UnsupportedError:
    return UnsupportedError(
        [Problem("the base ties its embeddings, which are one tensor in this dialect, and the "
                 "adapter changes one side of the tie", name, hint=_BOTH)]
    )  # fmt: skip
