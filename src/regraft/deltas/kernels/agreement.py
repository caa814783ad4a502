"""How a stored tensor X agrees with what a merge makes of W: the sums a judgement is made from.

With M the merged weight in float32 and m the same rounded to X's dtype, an element counts as within
rounding when \\|X - m\\| is at most

    t = h * (terms * max(|W|, |M|) + 16 * (|d| + spread)),     d = M - W

where h is half a unit in the last place of 1 in X's dtype. The first part is for roundings of the
weight: once when X was stored, and once per adapter for a tool that adds one after the other. The
second is for a delta that was itself computed in X's dtype; ``spread`` is the root mean square of
d, because the error of a sum of products goes with their size and not with that of their sum.

That is a bound for single elements, and wide. All together have to be much nearer: with an error e
of the delta, X and m fall on different sides of a rounding only at about e / unit of the elements,
so that the square of X - m is unit * e on average, and unit^2 / 4 more for each rounding besides.

How much of the delta X holds is the slope of X - W against d, over that of m - W. It is taken
where \\|d\\| is at least two units of the weight: a smaller delta is mostly lost in the rounding,
and what is left of it is no measure of its size.
"""
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.deltas.kernels.inner import BLOCK, ZERO, round_through
from regraft.deltas.kernels.weights import Floats, Weights
from regraft.numerics.compiling import njit
from regraft.numerics.conversions import BF16, ENTRY, F16, decode
from regraft.numerics.intrinsics import bits_of, float_of

_PIECE = 2**14
"""Elements taken at a time where numpy does the work."""

_TOO_ALIKE = 1e6
"""Condition above which deltas cannot be told apart."""

_SUMS = 11
_DD, _DELTA, _PLAIN, _EE, _UU, _NOISE, _SLOPE_DELTA, _SLOPE_PLAIN, _SLOPE_T, _WW, _N = range(_SUMS)
_CLEAR = 2.0
"""Units of the weight from which on a delta is measured."""

_COUNTS = 9
_TOTAL, _UNEQUAL, _BEYOND, _COARSE, _VISIBLE, _KEPT, _WILD, _ODD, _SHIFTED = range(_COUNTS)


@dataclass(frozen=True)
class Care:
    """How carefully the tool that made X is taken to have worked.

    Attributes:
        adapters: how many it added, one after the other.
        rank: the largest of theirs.
        roundings: of the weight that come besides, such as a conversion of the base before.
        spread: root mean square of the delta.
    """

    adapters: int = 1
    rank: int = 1
    roundings: int = 0
    spread: float = 0.0


@njit(**ENTRY)
def _agree(
    w16: Any, w32: Any, w_kind: int, x16: Any, x32: Any, x_kind: int, merged: Any, total: int,
    terms: Any, blur: Any, roundings: Any, spread: Any, sums: Any, largest: Any, counts: Any,
) -> None:  # fmt: skip
    """Add ``total`` elements to the sums and counts of :class:`Agreement`.

    Args:
        w16, w32, w_kind: W, as :mod:`regraft.deltas.kernels.inner` lays weights out.
        x16, x32, x_kind: X, likewise.
        merged: M, float32.
        terms: how many roundings of the weight are forgiven to one element.
        blur: error of the delta over h and its size.
        roundings: of the weight, that come besides.
        spread: root mean square of M - W.
        sums: float64 ``(2, _SUMS)`` flattened: of all elements, and of those that are not wild.
        largest: float64 ``(1,)``: the largest distance in units in the last place.
        counts: int64 ``(_COUNTS,)``.
    """
    ws, xs = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    ms, kept = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    digits, half, least = 23, 2.0**-24, 2.0**-149
    if x_kind == BF16:
        digits, half, least = 7, 2.0**-8, 2.0**-133
    if x_kind == F16:
        digits, half, least = 10, 2.0**-11, 2.0**-24
    block, count = np.uintp(BLOCK), np.uintp(total)
    for b in range((count + block - np.uintp(1)) // block):
        start = b * block
        n = min(block, count - start)
        decode(w16, w32, w_kind, start, ws, ZERO, n)
        decode(x16, x32, x_kind, start, xs, ZERO, n)
        for j in range(n):
            ms[j] = merged[start + j]
            kept[j] = ws[j]
        round_through(ms, ZERO, x_kind, n)
        round_through(kept, ZERO, x_kind, n)
        for j in range(n):
            w, x, m = np.float64(ws[j]), np.float64(xs[j]), np.float64(ms[j])
            exact = np.float64(merged[start + j])
            counts[_TOTAL] += 1
            if not (np.isfinite(w) and np.isfinite(x) and np.isfinite(m) and np.isfinite(exact)):
                same = x == m or (np.isnan(x) and np.isnan(m))
                counts[_ODD] += np.int64(not same)
                continue
            d, far, off = exact - w, x - w, x - m
            size = max(abs(w), abs(m))
            exponent = np.int64((bits_of(np.float32(size)) >> np.uint32(23)) & np.uint32(0xFF))
            unit = least
            if exponent > digits:
                unit = np.float64(float_of(np.uint32((exponent - digits) << 23)))
            unit = max(unit, least)
            reach = abs(d) + spread
            t = half * (terms * size + 16.0 * reach) + terms * least
            error = half * blur * reach
            noise = 2.0 * unit * error + 4.0 * error * error + roundings * unit * unit / 2.0
            apart = abs(off)
            counts[_UNEQUAL] += np.int64(apart > 0)
            counts[_BEYOND] += np.int64(apart > t)
            counts[_SHIFTED] += np.int64(xs[j] != kept[j])
            counts[_COARSE] += np.int64(apart > t + reach / 64.0)
            if ms[j] != kept[j]:
                counts[_VISIBLE] += 1
                counts[_KEPT] += np.int64(xs[j] == kept[j])
            if apart / unit > largest[0]:
                largest[0] = apart / unit
            wild = apart > 4.0 * abs(d) + t
            counts[_WILD] += np.int64(wild)
            for row in range(1 if wild else 2):
                at = row * _SUMS
                sums[at + _DD] += far * far
                sums[at + _DELTA] += far * d
                sums[at + _PLAIN] += d * d
                sums[at + _EE] += off * off
                sums[at + _UU] += unit * unit
                sums[at + _NOISE] += noise
                sums[at + _WW] += w * w
                sums[at + _N] += 1.0
                if abs(d) >= _CLEAR * unit:
                    sums[at + _SLOPE_DELTA] += far * d
                    sums[at + _SLOPE_PLAIN] += (m - w) * d
                    sums[at + _SLOPE_T] += t * t * d * d


@dataclass
class Agreement:
    """How X agrees with the merge; that of two pieces of a tensor adds up to that of both.

    Attributes:
        sums: per row (all elements, and all that are not wild): |X-W|^2, (X-W).d, |d|^2, |X-m|^2,
            unit^2, the square of X-m that is to be expected; where the delta can be measured
            (X-W).d, (m-W).d and (t d)^2; |W|^2; elements.
        largest: largest \\|X - m\\| in units in the last place of the larger of W and M.
        counts: elements; unequal; beyond rounding; beyond that of a delta of 16 bits; those that
            the merge changes visibly; those of them that X has as they were; wild ones, further
            off than four times their delta; NaN or infinite on one side only; not the base's.
    """

    sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2 * _SUMS, np.float64))
    largest: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(1, np.float64))
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_COUNTS, np.int64))

    def take(self, weight: Weights, stored: Weights, merged: Floats, care: Care) -> None:
        """Take a piece of a tensor in.

        Args:
            weight: W.
            stored: X.
            merged: M.
            care: how carefully X is taken to be made.
        """
        _agree(
            *weight.arguments, *stored.arguments, merged, merged.size,
            2.0 + 2.0 * care.adapters, 2.0 + math.sqrt(care.rank) / 2,
            float(care.roundings + care.adapters - 1), float(care.spread),
            self.sums, self.largest, self.counts,
        )  # fmt: skip

    @property
    def total(self) -> int:
        """Number of elements."""
        return int(self.counts[_TOTAL])

    @property
    def unequal(self) -> int:
        """Elements of another value than the merge gives."""
        return int(self.counts[_UNEQUAL] + self.counts[_ODD])

    @property
    def beyond(self) -> int:
        """Elements further off than rounding takes them."""
        return int(self.counts[_BEYOND] + self.counts[_ODD])

    @property
    def coarse(self) -> int:
        """Elements further off than rounding takes them if the delta had 16 bits."""
        return int(self.counts[_COARSE] + self.counts[_ODD])

    @property
    def ulps(self) -> float | None:
        """Largest distance in units in the last place; None if NaN or infinity is in between."""
        return None if self.counts[_ODD] else float(self.largest[0])

    @property
    def kept(self) -> float | None:
        """Share of what the merge changes that X holds unchanged; None if it changes nothing."""
        visible = int(self.counts[_VISIBLE])
        return int(self.counts[_KEPT]) / visible if visible else None

    @property
    def moved(self) -> float:
        """|X - W| / |W|, or over twice |d| if that is more: from 1/2 on X is not W with a delta."""
        size = max(float(self.sums[_WW]), 16 * float(self.sums[_PLAIN]))
        return math.sqrt(float(self.sums[_DD]) / size) if size > 0 else 0.0

    @property
    def apart(self) -> float:
        """|X - m| / |W|; 0 where W is all zero."""
        weight = float(self.sums[_WW])
        return math.sqrt(float(self.sums[_EE]) / weight) if weight > 0 else 0.0

    @property
    def _row(self) -> npt.NDArray[np.float64]:
        """The sums to go by: a few wild elements must not speak for the others."""
        few = 100 * int(self.counts[_WILD]) <= self.total
        return self.sums[_SUMS:] if few else self.sums[:_SUMS]

    def slope(self) -> tuple[float, float] | None:
        """Return how many times X holds the delta, and how far off that may be; None if unknown."""
        row = self._row
        if row[_SLOPE_PLAIN] <= 0:
            return None
        doubt = 3 * math.sqrt(float(row[_SLOPE_T])) / float(row[_SLOPE_PLAIN])
        return float(row[_SLOPE_DELTA] / row[_SLOPE_PLAIN]), 0.01 + doubt

    @property
    def shifted(self) -> float:
        """Share of the elements that are not the base's."""
        return int(self.counts[_SHIFTED]) / max(self.total, 1)

    @property
    def noisy(self) -> bool:
        """Whether X is further from the merge, all in all, than roundings take it."""
        row = self._row
        a_few = 10 * row[_UU] / max(row[_N], 1.0)
        return bool(row[_EE] > 3 * row[_NOISE] + a_few)

    @property
    def likeness(self) -> float:
        """Square of the correlation of X - W with the delta."""
        row = self._row
        sizes = row[_DD] * row[_PLAIN]
        return float(row[_DELTA] ** 2 / sizes) if sizes > 0 else 0.0

    def unexplained(self, times: float) -> float:
        """Return the squared distance of X from W + times * d, over what rounding may cause."""
        row = self._row
        left = row[_DD] - 2 * times * row[_DELTA] + times**2 * row[_PLAIN]
        may = row[_UU] + max(1.0, times**2) * (3 * row[_NOISE] + 1e-4 * row[_PLAIN])
        return float(max(left, 0.0) / may) if may > 0 else math.inf * float(left > 0)


@dataclass
class Fit:
    """How many times X holds each of several deltas: least squares, a piece at a time.

    Only elements count of which a delta is at least two units of the weight, as in
    :class:`Agreement`.

    Attributes:
        deltas: how many.
        kind: X's, a value of :data:`regraft.deltas.kernels.inner.KINDS`.
        products: of the deltas, and of X - W as the last, each with each.
        rest: the same over all elements.
        may: squared distance that rounding may cause.
    """

    deltas: int
    kind: int
    products: npt.NDArray[np.float64] = field(init=False)
    rest: npt.NDArray[np.float64] = field(init=False)
    may: float = 0.0
    count: int = 0

    def __post_init__(self) -> None:
        """Start with no element."""
        self.products = np.zeros((self.deltas + 1, self.deltas + 1))
        self.rest = np.zeros_like(self.products)

    def take(self, weight: Floats, stored: Floats, merged: Sequence[Floats]) -> None:
        """Take a piece of a tensor in: W, X, and what each adapter alone makes of W."""
        digits, half = {BF16: (7, 2.0**-8), F16: (10, 2.0**-11)}.get(self.kind, (23, 2.0**-24))
        for start in range(0, weight.size, _PIECE):
            cut = slice(start, start + _PIECE)
            w = weight[cut].astype(np.float64)
            rows = np.stack([m[cut] - w for m in merged] + [stored[cut] - w])
            fine = np.isfinite(rows).all(axis=0)
            rows, w = rows[:, fine], w[fine]
            size = np.maximum(np.abs(w), np.abs(w + rows[:-1].sum(axis=0)))
            unit = np.ldexp(1.0, np.frexp(size)[1] - 1 - digits)
            reach = np.abs(rows[:-1]).sum(axis=0)
            self.may += float(np.sum((half * ((2 + 2 * self.deltas) * size + 16 * reach)) ** 2))
            told = rows[:, np.abs(rows[:-1]).max(axis=0) >= _CLEAR * unit]
            self.products += told @ told.T
            self.rest += rows @ rows.T
            self.count += told.shape[1]

    def solve(self) -> tuple[tuple[tuple[float, float], ...], bool] | None:
        """Return times and doubt of each delta, and whether that explains X; None if unknown."""
        gram, towards = self.products[:-1, :-1], self.products[:-1, -1]
        scale = np.sqrt(np.diag(gram))
        if not self.count or not scale.all():
            return None
        likeness = gram / np.outer(scale, scale)
        if np.linalg.cond(likeness) > _TOO_ALIKE:
            return None
        inverse = np.linalg.inv(likeness) / np.outer(scale, scale)
        times = inverse @ towards
        noise = math.sqrt(self.may / self.count)
        doubt = 0.02 + 3 * noise * np.sqrt(np.diag(inverse))
        whole = np.append(times, -1.0)
        left, may = whole @ self.rest @ whole, self.may + 1e-4 * np.trace(self.rest[:-1, :-1])
        pairs = tuple(zip(map(float, times), map(float, doubt), strict=True))
        return pairs, bool(left <= may)
