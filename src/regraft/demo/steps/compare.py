"""How far apart two models' logits are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
"""Logits of a number of positions, (positions, vocabulary)."""


@dataclass(frozen=True)
class LogitComparison:
    """The logits of a merged model against those of the live adapter model.

    Attributes:
        positions: positions compared, over all sentences.
        largest_difference: the largest absolute difference of any logit.
        value_range: largest minus smallest logit of the live model.
        same_top: positions at which both models hold the same next token the most likely.
    """

    positions: int
    largest_difference: float
    value_range: float
    same_top: int

    @property
    def relative_difference(self) -> float:
        """The largest difference as a share of the range."""
        return self.largest_difference / self.value_range if self.value_range else 0.0

    @property
    def agreement(self) -> float:
        """The share of positions with the same most likely token."""
        return self.same_top / self.positions


def compare_logits(live: Logits, merged: Logits) -> LogitComparison:
    """Compare two models' logits at the same positions.

    Args:
        live: the adapter model's, (positions, vocabulary), at least one position.
        merged: the merged model's, of the same shape.

    Raises:
        ValueError: the shapes differ, or there is nothing to compare.
    """
    if live.shape != merged.shape or live.size == 0:
        raise ValueError(f"logits of {live.shape} and {merged.shape} cannot be compared")
    return LogitComparison(
        positions=live.shape[0],
        largest_difference=float(np.abs(live - merged).max()),
        value_range=float(live.max() - live.min()),
        same_top=int((live.argmax(axis=1) == merged.argmax(axis=1)).sum()),
    )
