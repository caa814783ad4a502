"""Factors of a difference: the smallest rank that does what was asked, rounded and measured."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from regraft.deltas.ranks.blas_threads import one_thread
from regraft.deltas.ranks.range_finder import Approximation, approximate
from regraft.deltas.ranks.reduction import Matrix, difference_norm, truncated
from regraft.deltas.rounding import decode, encode
from regraft.extracting.differences import Difference

FIRST_RANK = 16
"""The rank that is tried first where a share or an error is asked for; then twice as much."""


@dataclass(frozen=True)
class Wanted:
    """How good the factors have to be; one of the three is given.

    Attributes:
        rank: their rank, or as much of it as the matrix has.
        energy: the share of the squared norm to keep.
        max_error: the largest relative error, in the Frobenius norm.
    """

    rank: int | None
    energy: float | None
    max_error: float | None

    @property
    def share(self) -> float | None:
        """The share of the squared norm to keep; None where a rank was asked for."""
        if self.max_error is not None:
            return 1.0 - self.max_error**2
        return self.energy


@dataclass(frozen=True)
class Fit:
    """The leading singular triples of a difference, and how many of them are taken."""

    approximation: Approximation
    rank: int


LARGE = 2**22
"""Elements of a matrix from which on several threads of the linear algebra library are worth it."""


def fitted(difference: Difference, wanted: Wanted, seed: int) -> Fit:
    """Return the triples of a difference, as many as are wanted."""
    rows, columns = difference.shape
    with one_thread() if rows * columns < LARGE else nullcontext():
        return _fitted(difference, wanted, seed)


def _fitted(difference: Difference, wanted: Wanted, seed: int) -> Fit:
    most = min(difference.shape)
    if wanted.share is None:
        rank = min(wanted.rank or most, most)
        return Fit(approximate(difference.bands, difference.shape, rank, seed=seed), rank)
    rank = min(FIRST_RANK, most)
    while True:
        found = approximate(difference.bands, difference.shape, rank, seed=seed)
        kept = np.cumsum(found.triples.s**2)
        reached = np.flatnonzero(kept >= wanted.share * found.square * (1 - 1e-12))
        if reached.size or rank == most:
            return Fit(found, int(reached[0]) + 1 if reached.size else rank)
        rank = min(2 * rank, most)


@dataclass(frozen=True)
class Factors:
    """Factors as they will be stored, of the matrix as its weight is stored.

    Attributes:
        left: float32 (rows, r).
        right: float32 (r, columns).
        error_norm: Frobenius norm of what they are off by.
    """

    left: np.ndarray
    right: np.ndarray
    error_norm: float


def factors_of(fit: Fit, rank: int, dtype: str) -> Factors:
    """Return a fit's factors at a rank, rounded to a dtype; more than it has are zeros."""
    left, right = truncated(fit.approximation.triples, rank)
    stored = [_rounded(side, dtype) for side in (left, right)]
    rounding = difference_norm(left, right, *(side.astype(np.float64) for side in stored))
    return Factors(stored[0], stored[1], math.hypot(fit.approximation.error(rank), rounding))


def _rounded(values: Matrix, dtype: str) -> np.ndarray:
    single = values.astype(np.float32)
    return decode(encode(single, dtype), dtype).reshape(values.shape)
