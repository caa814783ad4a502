"""The best low-rank approximation of a matrix that is seen a band of rows at a time.

A randomized range finder with power iterations (Halko, Martinsson and Tropp 2011, algorithms 4.4
and 5.1): a few passes over the bands, and nothing of the matrix' size in memory, only its number of
rows and columns times the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.deltas.ranks.reduction import Decomposition, Matrix

Bands = Callable[[], Iterable[tuple[int, npt.NDArray[Any]]]]
"""Gives a matrix from the front: the number of each band's first row, and the band. It is called
once for each pass."""

OVERSAMPLING = 16
PASSES = 4


@dataclass(frozen=True)
class Approximation:
    """The leading singular triples of a matrix.

    Attributes:
        triples: as many as were asked for, with some more that are less exact.
        square: the squared Frobenius norm of the matrix.
    """

    triples: Decomposition
    square: float

    def error(self, rank: int) -> float:
        """Return the Frobenius norm of what a rank leaves out."""
        kept = float(np.sum(self.triples.s[:rank] ** 2))
        return float(np.sqrt(max(0.0, self.square - kept)))


def approximate(
    bands: Bands, shape: tuple[int, int], rank: int, *, seed: int = 0, passes: int = PASSES
) -> Approximation:
    """Return the leading singular triples of a matrix.

    Args:
        bands: its rows.
        shape: (rows, columns).
        rank: how many triples are wanted; as many as the matrix has, where these are fewer.
        seed: of the random start; it changes the outcome by rounding alone where the spectrum falls
            off, and by little where it is flat.
        passes: of two products each over the matrix, before the last.
    """
    rows, columns = shape
    width = min(rank + OVERSAMPLING, rows, columns)
    right = np.random.default_rng(seed).standard_normal((columns, width))
    right = np.linalg.qr(right)[0]
    for _ in range(passes if width < min(shape) else 1):
        left, _ = _times(bands, right, rows)
        left = np.linalg.qr(left)[0]
        right, square = _times_transposed(bands, left, columns)
        right, small = np.linalg.qr(right)
    inner, s, outer = np.linalg.svd(small.T)
    u, vt = left @ inner, outer @ right.T
    kept = min(rank + OVERSAMPLING // 2, s.size)
    return Approximation(_signed(u[:, :kept], s[:kept], vt[:kept]), square)


def _signed(u: Matrix, s: Matrix, vt: Matrix) -> Decomposition:
    largest = np.abs(u).argmax(axis=0)
    signs = np.where(u[largest, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    return Decomposition(u * signs, s, vt * signs[:, None])


def _times(bands: Bands, right: Matrix, rows: int) -> tuple[Matrix, float]:
    """Return the matrix times ``right``, and its squared norm."""
    made, square = np.zeros((rows, right.shape[1])), 0.0
    for first, band in bands():
        made[first : first + band.shape[0]] = band @ right
        square += float(np.sum(np.square(band, dtype=np.float64)))
    return made, square


def _times_transposed(bands: Bands, left: Matrix, columns: int) -> tuple[Matrix, float]:
    """Return the transposed matrix times ``left``, and its squared norm."""
    made, square = np.zeros((columns, left.shape[1])), 0.0
    for first, band in bands():
        made += band.T @ left[first : first + band.shape[0]]
        square += float(np.sum(np.square(band, dtype=np.float64)))
    return made, square
