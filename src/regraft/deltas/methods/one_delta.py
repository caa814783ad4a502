"""What a method makes of the deltas of one matrix, and how it is cut to a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from regraft.deltas.methods.bands import DenseDelta
from regraft.deltas.methods.elements import Elements, Member, limits_of
from regraft.deltas.methods.form import Factors, Joint, MethodOptions, Reduced
from regraft.deltas.methods.registry import Method
from regraft.deltas.ranks.range_finder import approximate
from regraft.deltas.ranks.reduction import (
    Decomposition,
    Matrix,
    Vector,
    product_norm,
    smallest_rank,
    truncated,
)
from regraft.deltas.rounding import Floats


@dataclass(frozen=True)
class OneDelta:
    """A delta that can be cut to any rank.

    Attributes:
        squares: its leading squared singular values, the largest first; none where its factors stay
            as they are.
        square: its squared Frobenius norm.
        exact_rank: the rank that loses nothing but rounding; for one of no low rank, the rank that
            a sum of the deltas has.
        cut: gives factors (b, a) of a rank.
    """

    squares: Vector
    square: float
    exact_rank: int
    cut: Callable[[int], tuple[Matrix, Matrix]]

    def needed(self, energy: float | None) -> int:
        """Return the rank that keeps a share of the squared norm; :attr:`exact_rank` for None."""
        if energy is None or self.square == 0:
            return self.exact_rank
        rest = max(0.0, self.square - float(self.squares.sum()))
        return min(smallest_rank(np.append(self.squares, rest), energy), max(1, self.squares.size))

    def left_out(self, rank: int) -> float:
        """Return the squared norm of what a rank leaves out."""
        if not self.squares.size:
            return 0.0
        kept = float(self.squares[:rank].sum())
        inside = float(self.squares[rank:].sum())
        return max(inside, self.square - kept) if self._is_partial else inside

    @property
    def _is_partial(self) -> bool:
        """Whether there are singular values that are not known."""
        return self.square > float(self.squares.sum()) * (1 + 1e-9)


def one_delta(
    joint: Joint, method: Method, options: MethodOptions, keys: Sequence[int], rank: int | None,
    energy: float | None,
) -> OneDelta:  # fmt: skip
    """Return what a method makes of the deltas of one matrix.

    Args:
        joint: the factors, one pair for each adapter that has it.
        method: the method.
        options: what it is told.
        keys: one for each delta: tell its random bits from those of others.
        rank, energy: what will be asked of it, for methods whose outcome is of no low rank.
    """
    if method.on_factors is not None:
        return _as_it_is(method.on_factors(joint, options))
    if method.on_cores is not None:
        return _of_core(method.on_cores(joint, options))
    return _of_elements(joint.factors, method, options, keys, rank or joint.rank, energy)


def _as_it_is(factors: Factors) -> OneDelta:
    b, a = factors.factor * factors.b, factors.a
    return OneDelta(np.empty(0), product_norm(b, a) ** 2, factors.rank, lambda _: (b, a))


def _of_core(reduced: Reduced) -> OneDelta:
    """Return a delta by the singular value decomposition of its core.

    The sign of each triple is that of :func:`regraft.deltas.ranks.reduction.decompose`.
    """
    inner, s, outer = np.linalg.svd(reduced.core, full_matrices=False)
    u, vt = reduced.left @ inner, outer @ reduced.right
    largest = np.abs(u).argmax(axis=0)
    signs = np.where(u[largest, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    triples = Decomposition(u * signs, np.asarray(s, np.float64), vt * signs[:, None])
    size = max(u.shape[0], vt.shape[1])
    above = s > size * np.finfo(np.float64).eps * s[0] if s.size else np.zeros(0, bool)
    exact = max(1, int(np.count_nonzero(above)))
    return OneDelta(s**2, float(np.sum(s**2)), exact, partial(truncated, triples))


# -- methods on elements ---------------------------------------------------------------------------


def _of_elements(
    factors: Sequence[Factors], method: Method, options: MethodOptions, keys: Sequence[int],
    rank: int, energy: float | None,
) -> OneDelta:  # fmt: skip
    """Return the outcome of a method on elements, fitted by factors.

    For a share of the energy, as many triples are found as it takes.
    """
    combined = _elements(factors, method, options, keys)
    most = min(combined.shape)
    found = min(rank, most)
    while True:
        fit = approximate(combined.bands, combined.shape, found, seed=options.seed)
        squares = fit.triples.s**2
        enough = energy is None or float(squares[:found].sum()) >= energy * fit.square
        if enough or found == most:
            return OneDelta(squares, fit.square, found, partial(truncated, fit.triples))
        found = min(2 * found, most)


def _elements(
    factors: Sequence[Factors], method: Method, options: MethodOptions, keys: Sequence[int]
) -> Elements:
    """Return what a method makes of the elements."""
    members = []
    for each, key in zip(factors, keys, strict=True):
        delta = DenseDelta(_single(each.b), _single(each.a), float(np.float32(each.scale)))
        limits = limits_of(delta, method, options)
        members.append(Member(delta, np.float32(each.weight), key, limits))
    return Elements(members, method, options)


def _single(matrix: Matrix) -> Floats:
    return np.ascontiguousarray(matrix, np.float32)
