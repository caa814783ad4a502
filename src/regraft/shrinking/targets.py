"""The factors of an adapter with what its config says of them, and what rank each is to have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regraft.adapters.model import Adapter, LoraTarget
from regraft.adapters.settings import RESAVE, LoraSettings
from regraft.adapters.wrappers import plain_key
from regraft.deltas.ranks.reduction import Vector, smallest_rank
from regraft.errors import AdapterError, Problem, UnsupportedError
from regraft.formats.problems import capped, quoted
from regraft.merging.planning.match import EXPERT_ORDER, PEFT_EMBEDDINGS
from regraft.merging.planning.placement import (
    FactorSizes,
    Misfit,
    Placement,
    dora_on_stack,
    read_factors,
)
from regraft.shrinking.report import Layer

TIE = "both sides of a tie"
"""The group of modules that share their factors."""


@dataclass(frozen=True)
class Pair:
    """An adapted module or parameter: its factors, and what the config says of them.

    Attributes:
        target: the tensors.
        name: what messages and the report call it.
        keys: names in the config that are to give its rank and alpha; several where the file does
            not tell which of the parameters of one module this is.
        rank: r.
        scale: what B A is multiplied by.
        sizes: the sizes of the factors.
        group: pairs of one group have to get one rank: PEFT looks it up once for all of them, or
            the two sides of a tie share their factors, or the file does not tell them apart.
    """

    target: LoraTarget
    name: str
    keys: tuple[str, ...]
    rank: int
    scale: float
    sizes: FactorSizes
    group: str

    @property
    def layer(self) -> Layer:
        """What kind of layer it is."""
        if self.target.kind == "embedding":
            return "embedding"
        if self.sizes.experts > 1:
            return "experts"
        return "convolution" if self.sizes.kernel else "linear"


def read_pairs(adapter: Adapter) -> list[Pair]:
    """Return the adapted modules and parameters of an adapter, in the order of their names.

    Raises:
        AdapterError: factors contradict each other or the config; all of them at once.
    """
    deepest: dict[str, int] = defaultdict(int)
    for target in adapter.targets:
        deepest[target.module] = max(deepest[target.module], target.depth)
    pairs, problems = [], []
    for target in adapter.targets:
        try:
            pairs.append(_pair(adapter, target, deepest[target.module] + 1))
        except Misfit as misfit:
            problems.append(misfit.problem)
    if problems:
        raise AdapterError(capped(problems, adapter.files[1]))
    return sorted(pairs, key=lambda pair: (pair.target.module, -pair.target.depth))


def _pair(adapter: Adapter, target: LoraTarget, wrapped: int) -> Pair:
    keys = _keys(adapter.settings, target, wrapped)
    place = Placement(0, adapter, target, keys[0], by_parameter=keys[0] != target.module)
    sizes = read_factors(place, stacked=place.by_parameter)
    if sizes.experts > 1 and target.magnitude is not None:
        raise Misfit(dora_on_stack(place))
    _ = place.scale  # one that no float32 holds is refused, as by a merge
    name = keys[0] if len(keys) == 1 else _likely(target, keys, wrapped)
    scale = adapter.settings.scale_of(keys[0])
    return Pair(target, name, keys, sizes.rank, scale, sizes, _group(adapter.settings, target))


def _keys(settings: LoraSettings, target: LoraTarget, wrapped: int) -> tuple[str, ...]:
    """Return the config's names for a target: its module, or parameters of it.

    A module's parameters are wrapped one around the other, the one registered first innermost. The
    file has no names for them, so where the config treats all alike, all are meant.

    Raises:
        Misfit: the config does not, and the names are none whose order is known.
    """
    leaves = _leaves(settings, target.module, wrapped)
    if not leaves or (not target.depth and settings.targets(target.module)):
        return (target.module,)
    keys = tuple(f"{target.module}.{leaf}" for leaf in leaves)
    said = {
        (settings.rank_of(key), settings.alpha_of(key), settings.b_layout_of(key)) for key in keys
    }
    if len(said) == 1:
        return keys
    known = [leaf for leaf in EXPERT_ORDER if leaf in leaves]
    if len(known) != len(leaves) or wrapped != len(leaves):
        raise Misfit(_unknown_order(target, leaves))
    return (f"{target.module}.{known[wrapped - 1 - target.depth]}",)


def _leaves(settings: LoraSettings, module: str, wrapped: int) -> tuple[str, ...]:
    """Return the parameters of a module that are adapted, as far as the config tells.

    An entry without a module's name, such as ``down_proj``, means that parameter of any module that
    has it. Where as many entries name this module as are wrapped, they are the ones.
    """
    leaves = settings.parameters_of(module)
    named = tuple(leaf for leaf in leaves if _is_named(settings, f"{module}.{leaf}"))
    return named if len(named) == wrapped else leaves


def _is_named(settings: LoraSettings, parameter: str) -> bool:
    entries = [entry for entry in settings.target_parameters if "." in entry]
    return any(f".{parameter}".endswith(f".{entry}") for entry in entries)


def _unknown_order(target: LoraTarget, leaves: Sequence[str]) -> Problem:
    return Problem(
        "it cannot be told which of a module's parameters these factors belong to",
        target.a.name,
        "parameters of one rank, alpha and layout, or names that transformers has",
        ", ".join(map(quoted, leaves)),
        "Name each with its module in target_parameters, such as experts.down_proj; or merge it",
    )


def _likely(target: LoraTarget, keys: Sequence[str], wrapped: int) -> str:
    """Return the name of the parameter that this probably is."""
    leaves = {key.rpartition(".")[2] for key in keys}
    known = [leaf for leaf in EXPERT_ORDER if leaf in leaves]
    if len(known) == len(leaves) == wrapped:
        return f"{target.module}.{known[wrapped - 1 - target.depth]}"
    return target.module + ".base_layer" * target.depth


def _group(settings: LoraSettings, target: LoraTarget) -> str:
    """Return a key that is equal for targets which have to have one rank.

    nn.MultiheadAttention keeps its out_proj inside its own wrapper, and one rank for both.
    """
    tied = target.kind == "embedding" or target.module.rpartition(".")[2] in PEFT_EMBEDDINGS
    if settings.ensure_weight_tying and tied:
        return TIE
    return plain_key(target.a.name).partition(".lora_")[0].partition(".base_layer")[0]


def refuse_reduction(adapter: Adapter, pairs: Sequence[Pair], rank: int | None) -> None:
    """Refuse a lower rank for an adapter whose base is computed from the old one.

    Args:
        adapter: the adapter.
        pairs: its modules.
        rank: the rank asked for; None where the spectra decide.

    Raises:
        UnsupportedError: it is such an adapter, and a rank would become lower.
    """
    init = adapter.settings.init_lora_weights
    lower = [pair for pair in pairs if rank is None or pair.rank > rank]
    if lower and adapter.settings.begins_with_base:
        raise UnsupportedError(
            f"init_lora_weights={quoted(init)}: the rank cannot be reduced, as what was taken out "
            "of the base when training began is computed from it",
            where=f"{adapter.label}/adapter_config.json",
            expected="the rank as it is",
            found=f"a lower one for {len(lower)} of {len(pairs)} modules",
            hint=f"Change the dtype alone, or: {RESAVE.replace('merge', 'shrink')}",
        )


def ranks_by_size(pairs: Sequence[Pair], rank: int) -> list[int]:
    """Return the new rank of each pair: ``rank``, or its own where that is lower."""
    return [min(pair.rank, rank) for pair in pairs]


def ranks_by_energy(pairs: Sequence[Pair], squares: Sequence[Vector], energy: float) -> list[int]:
    """Return the smallest rank of each pair that keeps a share of its squared norm.

    Pairs of a group get the largest that one of them needs, or their own where that is lower.

    Args:
        pairs: the pairs.
        squares: the squared singular values of each, summed over its experts.
        energy: the share to keep.
    """
    needed: dict[str, int] = defaultdict(int)
    for pair, values in zip(pairs, squares, strict=True):
        needed[pair.group] = max(needed[pair.group], smallest_rank(values, energy))
    return [min(pair.rank, needed[pair.group]) for pair in pairs]


def new_alpha(alpha: float, rank: int, new: int, *, rslora: bool) -> float:
    """Return the alpha that keeps a scale of alpha / r (or over the root of r) as it is."""
    value = alpha * (new / rank) ** 0.5 if rslora else alpha * new / rank
    return int(value) if float(value).is_integer() else float(np.float64(value))


def by_key(pairs: Sequence[Pair], ranks: Sequence[int]) -> Mapping[str, int]:
    """Return the new rank by the config's names."""
    return {key: new for pair, new in zip(pairs, ranks, strict=True) for key in pair.keys}
