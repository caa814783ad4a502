"""One module of the new adapter: its rank, its factors, and how far off they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from regraft.combining.matching import Group, factors_of
from regraft.combining.report import CombinedModule
from regraft.deltas.methods.form import (
    Factors,
    Joint,
    MethodOptions,
    Reduced,
    cosines,
    inner_products,
)
from regraft.deltas.methods.registry import Method
from regraft.deltas.ranks.reduction import (
    Decomposition,
    Matrix,
    Vector,
    difference_norm,
    product_norm,
    smallest_rank,
    truncated,
)
from regraft.deltas.rounding import decode, encode
from regraft.formats.files.reading import FilePool

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


@dataclass(frozen=True)
class _Delta:
    """What a method makes of one matrix: factors, and their singular values where it was asked."""

    b: Matrix
    a: Matrix
    decomposed: Decomposition | None = None


def rank_of(group: Group, choices: Choices, files: FilePool) -> int:
    """Return the rank that a module gets: of a stack, the largest that one of its experts needs."""
    if not choices.method.has_rank:
        return sum(group.ranks) if choices.method.exact else group.ranks[0]
    if choices.rank is not None:
        return min(choices.rank, group.rank)
    made = [_made(Joint(factors), choices) for factors in factors_of(group, files)]
    return max(_needed(delta.decomposed, choices.energy) for delta in made)


def new_factors(group: Group, rank: int, choices: Choices, files: FilePool) -> NewFactors:
    """Return the factors of a module at a rank, rounded to the dtype, and how far off they are."""
    sides, norms, errors, squares, products = [], [], [], list[Vector](), []
    signs, own, lost = [], [], 0
    for factors in factors_of(group, files):
        joint = Joint(factors)
        delta = _made(joint, choices)
        b, a = _cut(delta, rank)
        stored_b, stored_a = _rounded(b, choices.dtype), _rounded(a, choices.dtype)
        lost += _not_finite(stored_b) + _not_finite(stored_a)
        sides.append((stored_b, stored_a))
        norms.append(product_norm(delta.b, delta.a))
        errors.append(_off(delta, stored_b, stored_a))
        squares.append(_squares(delta))
        products.append(inner_products(joint.own_cores))
        own.append([abs(f.weight) for f in factors])
        signs.append(_disagreement(factors))
    total = np.add.reduce(products)
    record = CombinedModule(
        name=group.name,
        kind=group.kind,
        adapters=tuple(part.adapter for part in group.parts),
        ranks=group.ranks,
        rank=rank,
        norms=tuple(np.sqrt(np.diag(total)) * np.array(own[0])),
        norm=math.hypot(*norms),
        error_norm=math.hypot(*errors),
        kept=_kept(squares, rank),
        cosines=_rows(cosines(total)),
        disagreement=_rows(np.mean(signs, axis=0)),
    )
    return NewFactors(
        np.stack([a for _, a in sides]), np.stack([b for b, _ in sides]), record, total, lost
    )


def _rows(matrix: Matrix) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)


def _made(joint: Joint, choices: Choices) -> _Delta:
    """Return what the method makes of the deltas of one matrix."""
    if choices.method.on_factors is not None:
        factors = choices.method.on_factors(joint, choices.options)
        return _Delta(factors.factor * factors.b, factors.a)
    assert choices.method.on_cores is not None  # a method has one or the other
    reduced = choices.method.on_cores(joint, choices.options)
    return _Delta(reduced.left @ reduced.core, reduced.right, _decomposed(reduced))


def _decomposed(reduced: Reduced) -> Decomposition:
    """Return the singular value decomposition of a delta, from its core.

    The sign of each triple is that of :func:`regraft.deltas.ranks.reduction.decompose`.
    """
    inner, s, outer = np.linalg.svd(reduced.core, full_matrices=False)
    u, vt = reduced.left @ inner, outer @ reduced.right
    largest = np.abs(u).argmax(axis=0)
    signs = np.where(u[largest, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    return Decomposition(u * signs, np.asarray(s, np.float64), vt * signs[:, None])


def _needed(decomposed: Decomposition | None, energy: float | None) -> int:
    """Return the rank that keeps a share of the squared norm; all of it but rounding, if None."""
    assert decomposed is not None  # the method leaves a choice of rank
    s = decomposed.s
    if energy is not None:
        return smallest_rank(s**2, energy)
    size = max(decomposed.u.shape[0], decomposed.vt.shape[1])
    above = s > size * np.finfo(np.float64).eps * s[0] if s.size else np.zeros(0, bool)
    return max(1, int(np.count_nonzero(above)))


def _cut(delta: _Delta, rank: int) -> tuple[Matrix, Matrix]:
    if delta.decomposed is None:
        return delta.b, delta.a
    return truncated(delta.decomposed, rank)


def _rounded(values: Matrix, dtype: str) -> np.ndarray:
    """Return values as they are once stored, in float32; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
        return decode(encode(single, dtype), dtype).reshape(values.shape)


def _not_finite(values: np.ndarray) -> int:
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def _off(delta: _Delta, b: np.ndarray, a: np.ndarray) -> float:
    if _not_finite(b) or _not_finite(a):
        return 0.0  # it is refused
    return difference_norm(delta.b, delta.a, b.astype(np.float64), a.astype(np.float64))


def _squares(delta: _Delta) -> Vector:
    return delta.decomposed.s**2 if delta.decomposed is not None else np.ones(1)


def _kept(squares: Sequence[Vector], rank: int) -> float:
    whole = sum(float(each.sum()) for each in squares)
    return sum(float(each[:rank].sum()) for each in squares) / whole if whole else 1.0


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
