"""Methods on the factors themselves: ``cat``, and what PEFT does, under names that say so.

PEFT's methods of these kinds merge all A, and all B, and not the deltas: the product of two sums
has terms between the B of one adapter and the A of another, which no adapter had. They are here for
people who need the same result.
"""

from __future__ import annotations

import math

import numpy as np

from regraft.deltas.methods.form import Factors, Joint, MethodOptions
from regraft.deltas.methods.pruning import trimmed
from regraft.deltas.ranks.reduction import Matrix


def cat(joint: Joint, _: MethodOptions) -> Factors:
    """The factors of all deltas one after the other: the exact sum, at the sum of their ranks."""
    b = np.hstack([each.factor * each.b for each in joint.factors])
    return Factors(b, np.vstack([each.a for each in joint.factors]))


def peft_linear(joint: Joint, _: MethodOptions) -> Factors:
    """What PEFT's ``combination_type="linear"`` gives: sums of A and of B, weighted by roots."""
    a, b = _weighted(joint)
    return Factors(np.add.reduce(b), np.add.reduce(a))


def peft_magnitude_prune(joint: Joint, options: MethodOptions) -> Factors:
    """What PEFT's ``"magnitude_prune"`` gives: as ``peft_linear``, of the largest elements."""
    a, b = _weighted(joint, options.density)
    return Factors(np.add.reduce(b), np.add.reduce(a))


def peft_ties(joint: Joint, options: MethodOptions) -> Factors:
    """What PEFT's ``"ties"`` gives: TIES of all A, and of all B.

    Signs are elected without the weights, and the mean is over how many agree.
    """
    roots = _roots(joint)
    a = _peft_ties([each.a for each in joint.factors], [r for r, _ in roots], options.density)
    b = _peft_ties([each.b for each in joint.factors], [r for _, r in roots], options.density)
    return Factors(b, a)


def _roots(joint: Joint) -> list[tuple[float, float]]:
    """Return by what A and B are multiplied: the root of the scale, its sign on A's side."""
    roots = [math.sqrt(abs(each.factor)) for each in joint.factors]
    return [
        (math.copysign(root, each.factor), root)
        for root, each in zip(roots, joint.factors, strict=True)
    ]


def _weighted(joint: Joint, density: float = 1.0) -> tuple[list[Matrix], list[Matrix]]:
    both = list(zip(joint.factors, _roots(joint), strict=True))
    return (
        [trimmed(each.a, density) * of_a for each, (of_a, _) in both],
        [trimmed(each.b, density) * of_b for each, (_, of_b) in both],
    )


def _peft_ties(matrices: list[Matrix], weights: list[float], density: float) -> Matrix:
    kept = [trimmed(matrix, density) for matrix in matrices]
    majority = np.where(np.add.reduce(kept) >= 0, 1.0, -1.0)
    agree = [np.sign(matrix) == majority for matrix in kept]
    total = np.add.reduce(
        [np.where(a, m * w, 0.0) for a, m, w in zip(agree, kept, weights, strict=True)]
    )
    return np.asarray(total / np.maximum(np.add.reduce([a.astype(np.float64) for a in agree]), 1.0))
