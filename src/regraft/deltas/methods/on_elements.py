"""Methods on the elements of the deltas, a band of rows at a time.

The outcome is of no low rank: it goes straight into a base, or is fitted by factors afterwards.
Weights are in it, and all of it is float32, deltas in their order: the same bytes everywhere.
Signs, sums and divisors are as mergekit has them, whose masks at equal limits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from regraft.deltas.methods.form import MethodOptions
from regraft.deltas.methods.pruning import kept_count
from regraft.deltas.rounding import Floats


@dataclass(frozen=True)
class Band:
    """Some whole rows of all deltas of a module.

    Attributes:
        deltas: float32 (rows, in), each with its adapter's scale.
        weights: the user's factors, float32.
        limits: of each delta the least and the greatest magnitude that stays; none where a method
            has no limits.
        draw: gives a float32 in [0, 1) for each element of a delta, by its number.
    """

    deltas: tuple[Floats, ...]
    weights: tuple[np.float32, ...]
    limits: tuple[tuple[np.float32, np.float32], ...]
    draw: Callable[[int], Floats]


Limits = Callable[[int, MethodOptions], tuple[int, int]]
"""From how many elements a delta has to the places, in the order of their magnitudes, of the least
and the greatest that stay."""


def largest(size: int, options: MethodOptions) -> tuple[int, int]:
    """Return the places of the largest elements, as many as the density says."""
    return size - kept_count(size, options.density), size - 1


def without_outliers(size: int, options: MethodOptions) -> tuple[int, int]:
    """Return the places of the largest elements but for the very largest, a share of ``gamma``."""
    kept, top = int(options.density * size), int(options.gamma * size)
    first = max(0, size - kept - top)
    return first, min(size, first + max(1, kept)) - 1


def magnitude_prune(band: Band, _: MethodOptions) -> Floats:
    """The weighted sum of each delta's largest elements."""
    return _sum(_weighted(band, _within(band)))


def breadcrumbs(band: Band, _: MethodOptions) -> Floats:
    """The weighted sum of each delta without its smallest elements and its outliers.

    Model Breadcrumbs (Davari and Belilovsky 2023, arXiv:2312.06795).
    """
    return _sum(_weighted(band, _within(band)))


def ties(band: Band, _: MethodOptions) -> Floats:
    """Each delta's largest elements; of each element the side that has more in sum, averaged.

    TIES (Yadav et al. 2023, arXiv:2306.01708). The mean is weighted.
    """
    pruned = _weighted(band, _within(band))
    agree = _agreeing(pruned)
    weights = _sum(
        [np.where(a, w, np.float32(0)) for a, w in zip(agree, band.weights, strict=True)]
    )
    weights[weights == 0] = 1
    return np.asarray(_chosen(pruned, agree) / weights, np.float32)


def dare(band: Band, options: MethodOptions) -> Floats:
    """The weighted sum of random elements of each delta, scaled up to what all would give.

    DARE (Yu et al. 2023, arXiv:2311.03099): each element stays with the probability ``density``,
    and is divided by it.
    """
    return _sum(_weighted(band, _drawn(band, options)))


def dare_ties(band: Band, options: MethodOptions) -> Floats:
    """Random elements of each delta, scaled up; of each element the side that has more in sum.

    DARE (arXiv:2311.03099) with the elections of TIES (arXiv:2306.01708), and a sum, as mergekit
    does it.
    """
    pruned = _weighted(band, _drawn(band, options))
    return _chosen(pruned, _agreeing(pruned))


def della(band: Band, options: MethodOptions) -> Floats:
    """Random elements, the larger ones of a row more likely; then as ``dare_ties``.

    DELLA (Deep, Bhardwaj and Poria 2024, arXiv:2406.11617): the probability to stay rises with the
    rank of an element's magnitude in its row, from ``density - epsilon`` to ``density + epsilon``,
    and what stays is divided by it.
    """
    kept = []
    for number, delta in enumerate(band.deltas):
        chance = _chances(delta, options)
        stays = band.draw(number) < chance
        kept.append(np.where(stays, delta / chance, np.float32(0)))
    pruned = _weighted(band, kept)
    return _chosen(pruned, _agreeing(pruned))


def _chances(delta: Floats, options: MethodOptions) -> Floats:
    """Return the probability of each element to stay, float32, by its rank in its row."""
    if options.density >= 1:
        return np.ones_like(delta)
    order = np.argsort(np.abs(delta), axis=1, kind="stable")
    ranks = np.empty(delta.shape, np.float32)
    steps = np.arange(delta.shape[1], dtype=np.float32)[None, :]
    np.put_along_axis(ranks, order, np.broadcast_to(steps, delta.shape), axis=1)
    ranks /= np.float32(max(1, delta.shape[1] - 1))
    spread = min(options.epsilon, 0.9 * options.density, 0.9 * (1 - options.density))
    low = np.float32(options.density - spread)
    return np.asarray(low + ranks * np.float32(2 * spread), np.float32)


def _within(band: Band) -> list[Floats]:
    """Return each delta with zeros where a magnitude is outside the limits."""
    kept = []
    for delta, (low, high) in zip(band.deltas, band.limits, strict=True):
        size = np.abs(delta)
        kept.append(np.where((size >= low) & (size <= high), delta, np.float32(0)))
    return kept


def _drawn(band: Band, options: MethodOptions) -> list[Floats]:
    """Return each delta with random elements alone, divided by the share that stays."""
    density = np.float32(options.density)
    if options.density >= 1:
        return list(band.deltas)
    return [
        np.where(band.draw(number) < density, delta / density, np.float32(0))
        for number, delta in enumerate(band.deltas)
    ]


def _weighted(band: Band, deltas: Sequence[Floats]) -> list[Floats]:
    return [delta * weight for delta, weight in zip(deltas, band.weights, strict=True)]


def _sum(deltas: Sequence[Floats]) -> Floats:
    total = deltas[0].copy()
    for delta in deltas[1:]:
        total += delta
    return total


def _agreeing(deltas: Sequence[Floats]) -> list[np.ndarray]:
    """Return of each delta where its sign is that of the sum; a sum of zero counts as positive."""
    positive = _sum(deltas) >= 0
    return [np.where(positive, delta > 0, delta < 0) for delta in deltas]


def _chosen(deltas: Sequence[Floats], agree: Sequence[np.ndarray]) -> Floats:
    return _sum([np.where(a, d, np.float32(0)) for a, d in zip(agree, deltas, strict=True)])
