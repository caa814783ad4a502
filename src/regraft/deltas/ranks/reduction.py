"""The best approximation of a product B A by one of lower rank, without forming the product.

B (out, r) = Q_B R_B and A^T (in, r) = Q_A R_A, so B A = Q_B (R_B R_A^T) Q_A^T. The core in the
middle has at most r rows and columns; its singular values are those of B A, because Q_B and Q_A
have orthonormal columns. Cutting the sum of singular triples off after the k largest gives the best
approximation of rank k in the Frobenius norm (Eckart and Young 1936), and its error is the root of
the sum of the squares of what was cut off. All of it is done in float64, by LAPACK.

Norms of products and of differences of products are found in the same way, from triangular factors:
a difference B A - B' A' is the product of [B, -B'] and of A above A'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition of a product: ``u @ diag(s) @ vt``.

    Attributes:
        u: orthonormal columns, (out, n), where n is the least of out, in and r.
        s: singular values, n of them, the largest first.
        vt: orthonormal rows, (n, in).
    """

    u: Matrix
    s: Vector
    vt: Matrix


def decompose(b: Matrix, a: Matrix) -> Decomposition:
    """Return the decomposition of ``b @ a``.

    The sign of each triple is chosen so that the largest element of its column of ``u`` is
    positive: the product does not depend on it, and libraries differ.

    Args:
        b: (out, r).
        a: (r, in).
    """
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    inner, s, outer = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    u: Matrix = q_b @ inner
    vt: Matrix = outer @ q_a.T
    largest = np.abs(u).argmax(axis=0)
    signs = np.where(u[largest, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    return Decomposition(u * signs, np.asarray(s, np.float64), vt * signs[:, None])


def singular_values(b: Matrix, a: Matrix) -> Vector:
    """Return the singular values of ``b @ a``, (out, r) and (r, in), the largest first."""
    return np.asarray(np.linalg.svd(_core(b, a), compute_uv=False), np.float64)


def truncated(product: Decomposition, rank: int) -> tuple[Matrix, Matrix]:
    """Return (B', A'), (out, rank) and (rank, in), whose product is the best of that rank.

    The root of each singular value goes to either side, so that both are of one size. Where the
    product has fewer singular values than ``rank``, the rest of both is zero.
    """
    kept = min(rank, product.s.size)
    root = np.sqrt(product.s[:kept])
    b = np.zeros((product.u.shape[0], rank))
    a = np.zeros((rank, product.vt.shape[1]))
    b[:, :kept] = product.u[:, :kept] * root
    a[:kept] = root[:, None] * product.vt[:kept]
    return b, a


def smallest_rank(squares: Vector, energy: float) -> int:
    """Return the smallest rank that keeps a share of the squared Frobenius norm; at least 1.

    Args:
        squares: the squared singular values, the largest first; of several products that are to
            have one rank, their sums, place by place.
        energy: the share to keep, above 0 and up to 1.
    """
    sums = np.cumsum(squares)
    if not sums.size or sums[-1] == 0:
        return 1
    return int(np.searchsorted(sums, energy * sums[-1])) + 1


def kept_share(squares: Vector, rank: int) -> float:
    """Return the share of the squared norm that the ``rank`` largest keep; 1 where all are zero."""
    whole = float(squares.sum())
    return float(squares[:rank].sum()) / whole if whole else 1.0


def product_norm(b: Matrix, a: Matrix) -> float:
    """Return the Frobenius norm of ``b @ a``, (out, r) and (r, in)."""
    return float(np.linalg.norm(_core(b, a)))


def difference_norm(b: Matrix, a: Matrix, new_b: Matrix, new_a: Matrix) -> float:
    """Return the Frobenius norm of ``b @ a - new_b @ new_a``; the ranks may differ.

    It is right to about 1e-16 of the norms of the products.
    """
    return product_norm(np.hstack([b, -new_b]), np.vstack([a, new_a]))


def _core(b: Matrix, a: Matrix) -> Matrix:
    """Return a small matrix that has the singular values of ``b @ a``."""
    left: Matrix = np.asarray(np.linalg.qr(b, mode="r"))
    right: Matrix = np.asarray(np.linalg.qr(a.T, mode="r"))
    return left @ right.T
