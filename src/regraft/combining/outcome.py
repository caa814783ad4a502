"""One module of the new adapter: its rank, its factors, and how far off they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from regraft.combining.matching import Group, factors_of
from regraft.combining.report import CombinedModule
from regraft.deltas.methods.form import Factors, Joint, MethodOptions, cosines, inner_products
from regraft.deltas.methods.one_delta import OneDelta, one_delta
from regraft.deltas.methods.registry import Method
from regraft.deltas.ranks.reduction import Matrix, difference_norm
from regraft.deltas.rounding import decode, encode
from regraft.formats.files.reading import FilePool
from regraft.merging.compute.requantize import delta_keys

SAMPLED_ROWS = 64
"""Rows of a delta whose signs are compared; smaller ones are looked at whole."""


@dataclass(frozen=True)
class Choices:
    """How a combination is made.

    Attributes:
        method: the method.
        options: what it is told.
        rank: the rank of each module, or as much of it as the module can have; None for another
            rule.
        energy: the share of each module's squared norm to keep; None for all of it.
        dtype: safetensors' name of what the factors are stored in.
    """

    method: Method
    options: MethodOptions
    rank: int | None
    energy: float | None
    dtype: str


@dataclass(frozen=True)
class NewFactors:
    """The new factors of one module, as they will be stored, and the record of it.

    Attributes:
        a: float32, (experts, r, in).
        b: float32, (experts, out, r).
        record: what became of the module.
        products: the inner products of the adapters' deltas, without weights.
        lost: how many values are too large for the dtype.
    """

    a: np.ndarray
    b: np.ndarray
    record: CombinedModule
    products: Matrix
    lost: int


def measured(group: Group, choices: Choices, files: FilePool) -> tuple[int, NewFactors]:
    """Return the rank that a module gets, and its factors; of a stack, experts have one rank.

    Raises:
        NotFinite: a factor holds NaN or infinity.
    """
    if group.experts > 1:  # one expert's delta is in memory at a time
        rank = _rank_of(group, choices, made_of(group, choices, files))
        return rank, new_factors(group, rank, choices, made_of(group, choices, files))
    made = list(made_of(group, choices, files))
    rank = _rank_of(group, choices, made)
    return rank, new_factors(group, rank, choices, made)


def _rank_of(group: Group, choices: Choices, made: Iterable[tuple[Joint, OneDelta]]) -> int:
    """Return the rank of a module: of a stack, the largest that one of its experts needs."""
    if not choices.method.has_rank:
        return sum(group.ranks) if choices.method.exact else group.ranks[0]
    if choices.rank is not None:
        return min(choices.rank, choices.method.highest_rank(group.ranks, group.sizes))
    return max(delta.needed(choices.energy) for _, delta in made)


def made_of(group: Group, choices: Choices, files: FilePool) -> Iterator[tuple[Joint, OneDelta]]:
    """Yield the factors of each expert, and what the method makes of their deltas."""
    for expert, factors in enumerate(factors_of(group, files)):
        joint, method, options = Joint(factors), choices.method, choices.options
        keys = delta_keys(options.seed, group.name, expert, len(factors))
        yield joint, one_delta(joint, method, options, keys, choices.rank, choices.energy)


def new_factors(
    group: Group, rank: int, choices: Choices, made: Iterable[tuple[Joint, OneDelta]]
) -> NewFactors:
    """Return the factors of a module at a rank, rounded to the dtype, and how far off they are.

    Args:
        group: the module.
        rank: its rank.
        choices: how it is made.
        made: as :func:`made_of` gives it.
    """
    sides, squares, errors, kept, products = [], [], [], [], []
    signs, own, lost = [], [], 0
    for joint, delta in made:
        b, a = delta.cut(rank)
        stored_b, stored_a = _rounded(b, choices.dtype), _rounded(a, choices.dtype)
        lost += _not_finite(stored_b) + _not_finite(stored_a)
        sides.append((stored_b, stored_a))
        squares.append(delta.square)
        errors.append(math.hypot(math.sqrt(delta.left_out(rank)), _off(b, a, stored_b, stored_a)))
        kept.append(delta.square - delta.left_out(rank))
        products.append(inner_products(joint.own_cores))
        own.append([abs(f.weight) for f in joint.factors])
        signs.append(_disagreement(joint.factors))
    total = np.add.reduce(products)
    record = CombinedModule(
        name=group.name,
        kind=group.kind,
        adapters=tuple(part.adapter for part in group.parts),
        ranks=group.ranks,
        rank=rank,
        norms=tuple(np.sqrt(np.diag(total)) * np.array(own[0])),
        norm=math.sqrt(sum(squares)),
        error_norm=math.hypot(*errors),
        kept=sum(kept) / sum(squares) if any(squares) else 1.0,
        cosines=_rows(cosines(total)),
        disagreement=_rows(np.mean(signs, axis=0)),
    )
    return NewFactors(
        np.stack([a for _, a in sides]), np.stack([b for b, _ in sides]), record, total, lost
    )


def _rows(matrix: Matrix) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)


def _rounded(values: Matrix, dtype: str) -> np.ndarray:
    """Return values as they are once stored, in float32; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
        return decode(encode(single, dtype), dtype).reshape(values.shape)


def _not_finite(values: np.ndarray) -> int:
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def _off(b: Matrix, a: Matrix, stored_b: np.ndarray, stored_a: np.ndarray) -> float:
    """Return the norm of what rounding does to a product; 0 of what is refused."""
    if _not_finite(stored_b) or _not_finite(stored_a):
        return 0.0
    return difference_norm(b, a, stored_b.astype(np.float64), stored_a.astype(np.float64))


# -- signs -----------------------------------------------------------------------------------------


def _disagreement(factors: Sequence[Factors]) -> Matrix:
    """Return of each two deltas the share of elements, zero in neither, whose signs differ.

    Of a large delta :data:`SAMPLED_ROWS` rows are looked at, evenly spread.
    """
    out = factors[0].b.shape[0]
    rows = np.unique(np.linspace(0, out - 1, min(out, SAMPLED_ROWS)).astype(np.int64))
    signs = [np.sign(each.scale * (each.b[rows] @ each.a)).ravel() for each in factors]
    found = np.zeros((len(signs), len(signs)))
    for i, j in _below_diagonal(len(signs)):
        both = signs[i] * signs[j]
        count = np.count_nonzero(both)
        found[i, j] = found[j, i] = np.count_nonzero(both < 0) / count if count else 0.0
    return found


@lru_cache
def _below_diagonal(n: int) -> tuple[tuple[int, int], ...]:
    return tuple(_pairs(n))


def _pairs(n: int) -> Iterator[tuple[int, int]]:
    for i in range(n):
        for j in range(i):
            yield i, j
