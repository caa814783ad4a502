"""From the sums over one tensor to what is the matter with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from regraft.deltas.kernels.agreement import Agreement
from regraft.verifying.report import Kind

FEW = 0.01
"""Share of elements that may be off while the tensor still is the merge but for these."""

_LIKE = 0.03
"""Square of the correlation with the delta from which on a tensor holds it at another scale."""

_DOUBTFUL = 0.5
"""A slope that may be further off than this says nothing."""


@dataclass(frozen=True)
class Facts:
    """What is known of a tensor before it is looked at.

    Attributes:
        touched: whether an adapter has a say in it.
        converted: whether it is stored in a dtype that cannot hold all of the base's values.
        loose: how far the slope may be off besides, for deltas that also scale the weight.
        scales: what else its scale might have been taken for: the factor, and how to say it.
    """

    touched: bool
    converted: bool
    loose: float = 0.0
    scales: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """What is the matter with one tensor; the attributes of a ``TensorVerdict``."""

    verdict: Kind
    ulps: float | None = None
    coefficient: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Shares:
    """How many times a tensor holds each adapter's delta.

    Attributes:
        times: one per adapter that has a delta there, with how far off it may be.
        labels: the adapters' names.
        explained: whether that accounts for all of it, rounding aside.
    """

    times: tuple[tuple[float, float], ...]
    labels: tuple[str, ...] = field(default=())
    explained: bool = False


def untouched(facts: Facts, found: Agreement) -> Diagnosis:
    """Judge a tensor that no adapter has a say in."""
    if found.unequal == 0:
        return Diagnosis("rounding", 0.0, note="only the signs of zeros (or NaN) differ")
    if facts.converted and found.beyond == 0:
        return Diagnosis("rounding", found.ulps)
    share = _relative(found)
    note = f"no adapter touches it, but {_elements(found.unequal, found.total)} differ{share}"
    return Diagnosis("changed", found.ulps, None, note)


def _relative(found: Agreement) -> str:
    return f" (by {found.apart:.2g} of the weight's norm)" if found.apart else ""


def touched(facts: Facts, found: Agreement, shares: Shares | None = None) -> Diagnosis:
    """Judge a tensor that has a delta, or that an adapter brings.

    Args:
        facts: what is known of it.
        found: the sums.
        shares: how much of each of several adapters' deltas it holds.
    """
    slope = found.slope()
    if slope is not None:
        slope = (slope[0], slope[1] + facts.loose)
    if slope is not None and slope[1] > _DOUBTFUL:
        slope = None
    known = slope[0] if slope else None
    if shares is not None and shares.explained and (off := _uneven(shares)):
        return Diagnosis(off[0], found.ulps, known, off[1])
    lost = found.kept is not None and found.kept >= (0.999 if slope else 0.9)
    lost = lost and found.unexplained(0.0) <= 1
    if not lost and (slope is None or abs(slope[0] - 1) <= slope[1]):
        return _at_the_right_scale(found, known)
    none = slope is not None and abs(slope[0]) <= slope[1] and found.unexplained(0.0) <= 1
    if lost or (none and (facts.converted or found.shifted <= FEW)):
        return Diagnosis("missing", found.ulps, 0.0 if lost else known, "the delta is missing")
    if slope and found.unexplained(slope[0]) <= 1 and found.likeness >= _LIKE:
        return _scaled(facts, found, slope)
    return _unlike(found, known)


def _at_the_right_scale(found: Agreement, known: float | None) -> Diagnosis:
    if found.beyond == 0 and not found.noisy:
        return Diagnosis("rounding", found.ulps, known)
    if found.coarse == 0 and found.beyond > FEW * found.total:
        note = "the delta was computed with 16 bits"
        return Diagnosis("rounding", found.ulps, known, note)
    return _unlike(found, known)


def _unlike(found: Agreement, known: float | None) -> Diagnosis:
    if found.beyond <= max(FEW * found.total, 1) and not found.noisy:
        note = f"the merge, but for {_elements(found.beyond, found.total)}"
        return Diagnosis("elements", found.ulps, known, note)
    many = _elements(found.unequal, found.total)
    if found.moved > 0.5:
        return Diagnosis("other", found.ulps, None, f"another weight altogether: {many} are off")
    note = f"the base's weight with something else added: {many} are off"
    if known is not None and abs(known - 1) < 0.05:
        note = f"the delta is there, and something else too: {many} are off"
    return Diagnosis("another-adapter", found.ulps, known, note)


def _scaled(facts: Facts, found: Agreement, slope: tuple[float, float]) -> Diagnosis:
    times, doubt = slope
    if abs(times - 2) <= max(doubt, 0.05):
        return Diagnosis("twice", found.ulps, times, "the delta was applied twice")
    note = f"the delta is there {_times(times)}"
    fits = [(abs(times - factor), said) for factor, said in facts.scales if _near(times, factor)]
    if fits:
        note += f": {min(fits)[1]}"
    return Diagnosis("scale", found.ulps, times, note)


def _near(times: float, factor: float) -> bool:
    return abs(times - factor) <= 0.03 * max(abs(factor), 0.1) and abs(factor - 1) > 0.03


def _times(times: float) -> str:
    return f"{times:.3g} times" if times >= 0 else f"{times:.3g} times (subtracted)"


def _uneven(shares: Shares) -> tuple[Kind, str] | None:
    """Return what is wrong if some adapter's delta is not there once, and others are."""
    found = []
    for (times, doubt), label in zip(shares.times, shares.labels, strict=True):
        if abs(times - 1) <= doubt:
            continue
        if abs(times) <= doubt:
            found.append(f"{label} is missing")
        elif abs(times - 2) <= max(doubt, 0.05):
            found.append(f"{label} is in it twice")
        else:
            found.append(f"{label} is in it {_times(times)}")
    alike = max(t for t, _ in shares.times) - min(t for t, _ in shares.times)
    if not found or (len(found) == len(shares.times) and alike < 0.02):
        return None
    only_missing = all(text.endswith("missing") for text in found)
    return ("adapter-missing" if only_missing else "scale"), "; ".join(found)


def _elements(count: int, total: int) -> str:
    return f"{count} of {total} elements"


def other_scales(
    scale: float, rank: int, alpha: float, weight: float, *, rslora: bool
) -> tuple[tuple[float, str], ...]:
    """Return what a delta's scale may be taken for, as a factor on the right one.

    Args:
        scale: the right one, ``weight * alpha / r`` or ``weight * alpha / sqrt(r)``.
        rank: r of the module.
        alpha: alpha of the config, without patterns.
        weight: the user's weight.
        rslora: whether the scale is that of rsLoRA.
    """
    if not scale or not rank:
        return ()
    root = math.sqrt(rank)
    right, wrong = ("alpha/sqrt(r)", "alpha/r") if rslora else ("alpha/r", "alpha/sqrt(r)")
    found: Sequence[tuple[float, str]] = (
        (1 / root if rslora else root, f"{wrong} was taken for {right}"),
        (1 / scale, "the scale was left out"),
        (weight / scale if weight != 1 else 1.0, "only the weight was taken for the scale"),
        (alpha / scale, "alpha was not divided by r"),
        (1 / weight if weight else 0.0, f"the weight {weight:g} was left out"),
        (weight, f"the weight {weight:g} was applied twice"),
        (-1.0, "it was subtracted"),
    )
    return tuple(each for each in found if abs(each[0] - 1) > 0.03)
