"""Methods on the cores of the deltas: no matrix of a weight's size is ever formed.

All of it is done in float64, by LAPACK.
"""

from __future__ import annotations

import numpy as np

from regraft.deltas.methods.form import Joint, MethodOptions, Reduced
from regraft.deltas.methods.pruning import ties_of
from regraft.deltas.ranks.reduction import Matrix


def svd(joint: Joint, _: MethodOptions) -> Reduced:
    """The weighted sum of the deltas, w1 s1 B1 A1 + w2 s2 B2 A2 + ..., exactly.

    Cut to a rank by its singular values it is the best approximation of that rank (Eckart and
    Young 1936).
    """
    return joint.reduced(np.add.reduce(joint.cores))


def knots(joint: Joint, options: MethodOptions) -> Reduced:
    """TIES in the space that all deltas share.

    KnOTS (Stoica et al. 2024, arXiv:2410.19735): of the deltas side by side, ``[D_1 ... D_n] =
    U S [V_1 ... V_n]^T``, the parts ``S V_i^T`` are merged by TIES, element by element, and ``U``
    takes the outcome back.
    """
    cores = joint.cores
    inner, s, outer = np.linalg.svd(np.hstack(cores), full_matrices=False)
    scaled = s[:, None] * outer
    width = joint.right.shape[0]
    parts = [scaled[:, i * width : (i + 1) * width] @ joint.right for i in range(len(cores))]
    merged = ties_of(parts, options.density)
    q, r = np.linalg.qr(merged.T)
    return Reduced(joint.left @ inner, np.asarray(r.T), np.asarray(q.T))


def tsv(joint: Joint, _: MethodOptions) -> Reduced:
    """Each delta's singular vectors, made orthogonal to those of the others.

    TSV-Merge (Gargiulo et al. 2024, arXiv:2412.00081): the singular vectors of all deltas side by
    side become the nearest matrices with orthonormal columns, and each singular value stays. Each
    delta keeps its rank, or its share of the matrix' rank where the ranks are more in sum.
    """
    share = max(1, joint.rank // len(joint.cores))
    left, values, right = [], [], []
    for core, rank in zip(joint.cores, joint.ranks, strict=True):
        u, s, vt = np.linalg.svd(core, full_matrices=False)
        kept = min(rank, share) if sum(joint.ranks) > joint.rank else min(rank, s.size)
        left.append(u[:, :kept])
        values.append(s[:kept])
        right.append(vt[:kept])
    u, vt = _orthonormal(np.hstack(left)), _orthonormal(np.vstack(right).T).T
    return joint.reduced((u * np.concatenate(values)) @ vt)


def iso(joint: Joint, _: MethodOptions) -> Reduced:
    """The sum of the deltas with all singular values alike.

    Iso-C (Marczak et al. 2025, arXiv:2502.04959): each singular value becomes the mean of them all.
    The mean is that of as many as the ranks are in sum, since a sum of adapters has no others; the
    paper's is over a full matrix, as full fine-tunes are.
    """
    u, s, vt = np.linalg.svd(np.add.reduce(joint.cores), full_matrices=False)
    kept = s > np.finfo(np.float64).eps * max(joint.left.shape[0], joint.right.shape[1]) * s[:1]
    u, s, vt = u[:, kept], s[kept], vt[kept]
    return joint.reduced((u * (s.mean() if s.size else 0.0)) @ vt)


def core_space(joint: Joint, options: MethodOptions) -> Reduced:
    """TIES on the cores of the deltas, in the bases that all factors share.

    Core Space (Panariello et al. 2025, arXiv:2509.17786): the reference bases are the left singular
    vectors of all B side by side, and the right ones of all A below each other.
    """
    u = np.linalg.svd(joint.stacked_b, full_matrices=False)[0]
    vt = np.linalg.svd(joint.stacked_a, full_matrices=False)[2]
    merged = ties_of([u.T @ core @ vt.T for core in joint.cores], options.density)
    return Reduced(joint.left @ u, merged, vt @ joint.right)


def compress_then_merge(joint: Joint, options: MethodOptions) -> Reduced:
    """Deltas projected onto shared bases of the wanted rank, and merged there by TIES.

    Compress then Merge (He et al. 2026, arXiv:2606.03723). The bases are the leading left singular
    vectors of the deltas side by side, and the leading right ones of the deltas below each other:
    those that lose the least of all deltas' squared norms. Without a rank, that of the largest
    delta is meant.
    """
    rank = options.rank or max(joint.ranks)
    u = np.linalg.svd(np.hstack(joint.cores), full_matrices=False)[0][:, :rank]
    vt = np.linalg.svd(np.vstack(joint.cores), full_matrices=False)[2][:rank]
    merged = ties_of([u.T @ core @ vt.T for core in joint.cores], options.density)
    return Reduced(joint.left @ u, merged, vt @ joint.right)


def _orthonormal(columns: Matrix) -> Matrix:
    """Return the nearest matrix with orthonormal columns (Procrustes; Schoenemann 1966)."""
    p, _, q = np.linalg.svd(columns, full_matrices=False)
    return np.asarray(p @ q)
