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

MOST_PASSES = 24

_ENOUGH = 5e-5
"""Passes end when the next one finds less than this share of the squared error more: the error is
then within a thousandth of the least there is, unless the spectrum hides what it has."""


@dataclass(frozen=True)
class Approximation:
    """The leading singular triples of a matrix.

    Attributes:
        triples: as many as were asked for, or as there are.
        square: the squared Frobenius norm of the matrix.
    """

    triples: Decomposition
    square: float

    def error(self, rank: int) -> float:
        """Return the Frobenius norm of what a rank leaves out."""
        kept = float(np.sum(self.triples.s[:rank] ** 2))
        return float(np.sqrt(max(0.0, self.square - kept)))


def approximate(bands: Bands, shape: tuple[int, int], rank: int, *, seed: int = 0) -> Approximation:
    """Return the leading singular triples of a matrix.

    Passes go on until the next one would find no more that counts. They multiply in float32; the
    last one, whose outcome is returned, in float64.

    Args:
        bands: its rows.
        shape: (rows, columns).
        rank: how many triples are wanted; as many as the matrix has, where these are fewer.
        seed: of the random start; it changes the outcome by rounding alone where the spectrum falls
            off, and by little where it is flat.
    """
    rows, columns = shape
    width = min(rank + OVERSAMPLING, rows, columns)
    start = np.random.default_rng(seed).standard_normal((columns, width))
    right, found = np.linalg.qr(start)[0], 0.0
    for _ in range(MOST_PASSES):
        left = np.linalg.qr(_times(bands, right, rows))[0]
        right, square = _times_transposed(bands, left, columns, np.float32)
        right, small = np.linalg.qr(right)
        kept = float(np.sum(np.linalg.svd(small, compute_uv=False)[:rank] ** 2))
        if width == min(shape) or kept - found <= _ENOUGH * max(0.0, square - kept):
            break
        found = kept
    right, square = _times_transposed(bands, left, columns, np.float64)
    right, small = np.linalg.qr(right)
    inner, s, outer = np.linalg.svd(small.T)
    u, vt = left @ inner, outer @ right.T
    kept_triples = min(rank, s.size)
    return Approximation(_signed(u[:, :kept_triples], s[:kept_triples], vt[:kept_triples]), square)


def _signed(u: Matrix, s: Matrix, vt: Matrix) -> Decomposition:
    largest = np.abs(u).argmax(axis=0)
    signs = np.where(u[largest, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    return Decomposition(u * signs, s, vt * signs[:, None])


def _times(bands: Bands, right: Matrix, rows: int) -> Matrix:
    """Return the matrix times ``right``, multiplied in float32."""
    made, single = np.zeros((rows, right.shape[1])), right.astype(np.float32)
    for first, band in bands():
        made[first : first + band.shape[0]] = band.astype(np.float32, copy=False) @ single
    return made


def _times_transposed(
    bands: Bands, left: Matrix, columns: int, dtype: type[np.floating[Any]]
) -> tuple[Matrix, float]:
    """Return the transposed matrix times ``left``, and its squared norm.

    Args:
        bands: the matrix.
        left: orthonormal columns, (rows, width).
        columns: of the matrix.
        dtype: what the products are formed in; they are added up in float64.
    """
    made, square = np.zeros((columns, left.shape[1])), 0.0
    for first, band in bands():
        part = left[first : first + band.shape[0]].astype(dtype, copy=False)
        made += band.astype(dtype, copy=False).T @ part
        square += float(np.sum(np.square(band, dtype=np.float64)))
    return made, square
