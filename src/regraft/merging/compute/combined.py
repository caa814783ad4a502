"""Deltas of a segment that become one by a method on their elements."""

from __future__ import annotations

import threading
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import numpy as np

from regraft.deltas.kernels.weights import Floats
from regraft.deltas.methods.bands import DenseDelta
from regraft.deltas.methods.elements import Elements, Member, Range, limits_of
from regraft.deltas.methods.form import MethodOptions
from regraft.deltas.methods.registry import METHODS
from regraft.deltas.views import Delta, View
from regraft.deltas.whole import Whole, whole_of
from regraft.merging.compute.requantize import noise_key
from regraft.merging.options import ElementMethod
from regraft.merging.planning.plan import Segment

Limits = MutableMapping[int, Range]
"""Which elements of a module's delta stay, by the ``id`` of a delta that is a part of it."""

Matrix = Callable[[View, int], Floats]


@dataclass(frozen=True)
class _Combined:
    """What the deltas of a segment become; ``first`` is the row of its module it begins with."""

    elements: Elements
    first: int


class CombinedSegments:
    """What the deltas of a step's segments become; safe to use from several threads."""

    def __init__(self, matrix: Matrix, limits: Limits) -> None:
        """Take what gives the adapters' tensors, and the limits that are known; more are added."""
        self._matrix, self._limits = matrix, limits
        self._lock = threading.Lock()  # held while limits are found: once for all threads
        self._kept: tuple[Segment, _Combined] | None = None

    def rows(self, segment: Segment, rows: tuple[int, int], columns: tuple[int, int]) -> Floats:
        """Return some rows of a segment, and a range of their columns, contiguous."""
        found = self._of(segment)
        low, high = (found.first + row - segment.rows[0] for row in rows)
        return found.elements.rows(low, high, columns)

    def _of(self, segment: Segment) -> _Combined:
        with self._lock:
            if self._kept is None or self._kept[0] is not segment:
                self._kept = None  # let go of the last segment's before making the next
                self._kept = (segment, self._made(segment))
            return self._kept[1]

    def _made(self, segment: Segment) -> _Combined:
        asked = segment.method
        assert asked is not None  # the segment's deltas are to become one
        wholes = [whole_of(delta) for delta in segment.deltas]
        members = [
            self._member(number, delta, whole, asked)
            for number, (delta, whole) in enumerate(zip(segment.deltas, wholes, strict=True))
        ]
        first = wholes[0].first + segment.rows[0] - segment.deltas[0].rows[0]
        elements = Elements(
            members, METHODS[asked.name], method_options(asked), transposed=wholes[0].transposed
        )
        return _Combined(elements, first)

    def _member(self, number: int, delta: Delta, whole: Whole, asked: ElementMethod) -> Member:
        assert delta.origin is not None  # the plan refuses others
        left, right = (self._matrix(view, delta.adapter) for view in (whole.left, whole.right))
        dense = DenseDelta(left, right, delta.origin.scale)
        if (limits := self._limits.get(id(delta))) is None:
            limits = limits_of(dense, METHODS[asked.name], method_options(asked))
            self._limits[id(delta)] = limits
        key = noise_key(asked.seed, f"{whole.name} {number}")
        return Member(dense, np.float32(delta.origin.weight), key, limits)


def method_options(asked: ElementMethod) -> MethodOptions:
    """Return what a method is told."""
    return MethodOptions(density=asked.density, seed=asked.seed)
