"""What PiSSA and OLoRA took out of a weight when training began, found again from the weight."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]


def pissa_factors(weight: Matrix, rank: int, scale: float) -> tuple[Matrix, Matrix]:
    """Return (B0, A0) with ``scale * B0 @ A0`` the best rank-r approximation of ``weight``.

    PiSSA (Meng et al. 2024, arXiv:2404.02948) starts from the r largest singular values of
    W (out, in): B0 = U_r sqrt(S_r / scale), A0 = sqrt(S_r / scale) V_r^T.
    """
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[:rank] / np.float32(scale))
    return np.ascontiguousarray(u[:, :rank] * root), np.ascontiguousarray(root[:, None] * vt[:rank])


def olora_factors(weight: Matrix, rank: int, scale: float) -> tuple[Matrix, Matrix]:
    """Return (B0, A0) from a QR factorization: the first r columns of Q and rows of R.

    OLoRA (Büyükakyüz 2024, arXiv:2406.01775) starts from W (out, in) = Q R and, as PEFT does it,
    takes ``scale * Q_r @ R_r`` out of the base; ``scale`` does not enter the factors.
    """
    del scale
    q, r = np.linalg.qr(weight)
    return np.ascontiguousarray(q[:, :rank]), np.ascontiguousarray(r[:rank])


FACTORIZATIONS = {"pissa": pissa_factors, "olora": olora_factors}
"""By the name of the initialization."""
