"""What decides the demo's adapter; a change of any of it trains anew."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The settings of the training.

    Attributes:
        steps: optimizer steps.
        batch: sentences per step.
        learning_rate: its highest value, of AdamW.
        warmup: steps over which the learning rate rises.
        rank: of the LoRA adapter.
        alpha: its scale is alpha / rank.
        seed: of the data and of the adapter's first values.
    """

    steps: int = 24
    batch: int = 4
    learning_rate: float = 1e-3
    warmup: int = 3
    rank: int = 8
    alpha: int = 16
    seed: int = 0

    def warmed_and_decayed(self, step: int) -> float:
        """Return the factor on the learning rate: up over the warm-up, then down to zero."""
        return min(1.0, (step + 1) / self.warmup) * (1.0 - step / self.steps)
