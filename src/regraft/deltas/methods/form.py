"""What the methods are given, and what they return.

The deltas of one module are ``scale_i * B_i @ A_i``, of which none is formed. All of them lie in
the space that the stacked factors span: with ``[B_1 ... B_n] = Q_B R_B`` and ``[A_1; ...; A_n]^T =
Q_A R_A`` every delta is ``Q_B C_i Q_A^T``, where the core ``C_i`` has as many rows and columns as
the ranks have in sum. What is done to the cores is done to the deltas, because the columns of
``Q_B`` and ``Q_A`` are orthonormal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from regraft.deltas.ranks.reduction import Matrix, Vector

AT_ONCE = 2**15
"""Elements of each delta that are combined at a time, so that all of it stays in the cache."""


@dataclass(frozen=True)
class Factors:
    """The factors of one delta, ``scale * b @ a``, in float64.

    Attributes:
        b: (out, r).
        a: (r, in).
        scale: what the adapter multiplies their product by.
        weight: what the user does.
    """

    b: Matrix
    a: Matrix
    scale: float = 1.0
    weight: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return int(self.a.shape[0])

    @property
    def factor(self) -> float:
        """What their product is multiplied by in all."""
        return self.scale * self.weight


@dataclass(frozen=True)
class Reduced:
    """A delta in an orthonormal frame: ``left @ core @ right``.

    Attributes:
        left: orthonormal columns, (out, m).
        core: (m, k).
        right: orthonormal rows, (k, in).
    """

    left: Matrix
    core: Matrix
    right: Matrix


class Joint:
    """The deltas of one module in the frame that their factors span together."""

    def __init__(self, factors: Sequence[Factors]) -> None:
        """Take the factors; those of a module that an adapter leaves alone are left out."""
        self.factors = tuple(factors)

    @cached_property
    def _left(self) -> tuple[Matrix, Matrix]:
        q, r = np.linalg.qr(np.hstack([each.b for each in self.factors]))
        return q, r

    @cached_property
    def _right(self) -> tuple[Matrix, Matrix]:
        q, r = np.linalg.qr(np.vstack([each.a for each in self.factors]).T)
        return q.T, r.T

    @property
    def left(self) -> Matrix:
        """Orthonormal columns that span all B, (out, m)."""
        return self._left[0]

    @property
    def right(self) -> Matrix:
        """Orthonormal rows that span all A, (k, in)."""
        return self._right[0]

    @property
    def stacked_b(self) -> Matrix:
        """All B side by side in the frame, (m, ranks in sum)."""
        return self._left[1]

    @property
    def stacked_a(self) -> Matrix:
        """All A below each other in the frame, (ranks in sum, k)."""
        return self._right[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each delta."""
        return tuple(each.rank for each in self.factors)

    @property
    def rank(self) -> int:
        """The highest rank that a sum of the deltas can have."""
        return int(min(sum(self.ranks), self.left.shape[0], self.right.shape[1]))

    @cached_property
    def cores(self) -> tuple[Matrix, ...]:
        """Each delta in the frame, with its scale and weight, (m, k)."""
        return tuple(
            each.weight * own for each, own in zip(self.factors, self.own_cores, strict=True)
        )

    @cached_property
    def own_cores(self) -> tuple[Matrix, ...]:
        """Each delta in the frame as its adapter has it, without the user's weight."""
        ends = np.cumsum(self.ranks)
        parts = zip(self.factors, ends - self.ranks, ends, strict=True)
        return tuple(
            each.scale * (self.stacked_b[:, low:high] @ self.stacked_a[low:high])
            for each, low, high in parts
        )

    def reduced(self, core: Matrix) -> Reduced:
        """Return a delta of this frame."""
        return Reduced(self.left, core, self.right)


@dataclass(frozen=True)
class MethodOptions:
    """What a method may be told.

    Attributes:
        density: the share of elements that are kept, above 0 and up to 1.
        seed: which random bits are used where a method draws.
        gamma: the share of the largest elements that ``breadcrumbs`` takes out.
        epsilon: by how much ``della``'s share differs between the smallest and the largest.
        rank: the rank that is wanted, for methods that need to know; None for none.
    """

    density: float = 1.0
    seed: int = 0
    gamma: float = 0.01
    epsilon: float = 0.1
    rank: int | None = None


def inner_products(cores: Sequence[Matrix]) -> Matrix:
    """Return the inner products of deltas, (n, n), from their cores."""
    flat = np.stack([core.ravel() for core in cores])
    return np.asarray(flat @ flat.T, np.float64)


def cosines(products: Matrix) -> Matrix:
    """Return the cosines that inner products show; 0 beside a delta that is all zero."""
    norms: Vector = np.sqrt(np.diag(products))
    both = np.outer(norms, norms)
    return np.divide(products, both, out=np.zeros_like(both), where=both > 0)
