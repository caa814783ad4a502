"""What methods share that take elements out: the smallest ones, or those of the rarer sign."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regraft.deltas.ranks.reduction import Matrix


def kept_count(size: int, density: float) -> int:
    """Return how many of ``size`` elements a density keeps: at least one, as in mergekit."""
    return min(size, max(1, int(density * size)))


def trimmed(matrix: Matrix, density: float) -> Matrix:
    """Return a matrix without its smallest elements; equal ones at the limit all stay."""
    count = kept_count(matrix.size, density)
    if count >= matrix.size:
        return matrix
    sizes = np.abs(matrix)
    limit = np.partition(sizes, matrix.size - count, axis=None)[matrix.size - count]
    return np.where(sizes >= limit, matrix, 0.0)


def elected(matrices: Sequence[Matrix]) -> Matrix:
    """Return the mean, element by element, of those that have the sign of the sum.

    Elections and disjoint means of TIES (Yadav et al. 2023, arXiv:2306.01708), with all deltas
    counting alike; their weights are in them. Zeros are in no mean.
    """
    total = np.add.reduce(list(matrices))
    agree = [np.sign(matrix) == np.where(total >= 0, 1.0, -1.0) for matrix in matrices]
    kept = np.add.reduce([np.where(a, m, 0.0) for a, m in zip(agree, matrices, strict=True)])
    return np.asarray(kept / np.maximum(np.add.reduce([a.astype(np.float64) for a in agree]), 1.0))


def ties_of(matrices: Sequence[Matrix], density: float) -> Matrix:
    """Return TIES of matrices: each trimmed, signs elected, the mean of those that agree."""
    return elected([trimmed(matrix, density) for matrix in matrices])
