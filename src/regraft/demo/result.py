"""All the figures of a demo run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft.demo.compare import LogitComparison


@dataclass(frozen=True)
class Question:
    """One held-out sentence and what the three models made of it."""

    sentence: str
    right: str
    base: str
    adapter: str
    merged: str


@dataclass(frozen=True)
class Figures:
    """Sizes in bytes, times in seconds, and memory in bytes.

    ``get_model_seconds`` and ``train_seconds`` are those of the run that did it.
    """

    base_bytes: int
    adapter_bytes: int
    merged_bytes: int
    get_model_seconds: float
    train_seconds: float
    merge_seconds: float
    copy_seconds: float
    total_seconds: float
    merge_peak_memory: int
    undo_bytes: int
    unmerge_seconds: float


@dataclass(frozen=True)
class DemoResult:
    """What a demo made, and what it found.

    Attributes:
        folder: the demo's folder.
        base: the base model's folder.
        adapter: the trained adapter's folder.
        merged: the merged model's folder.
        source: where the base came from.
        kept_base: whether an earlier run got the base.
        kept_adapter: whether an earlier run trained the adapter.
        first_loss: at the first step of training.
        last_loss: at the last step of training.
        questions: every held-out sentence, with all answers.
        logits: the merged model's logits against the live adapter model's.
        float32_logits: the same for a merge that keeps float32: no rounding to the base's dtype.
        restored: whether the base came back out of the merged model, byte for byte.
        figures: sizes, times, memory.
    """

    folder: Path
    base: Path
    adapter: Path
    merged: Path
    source: str
    kept_base: bool
    kept_adapter: bool
    first_loss: float
    last_loss: float
    questions: tuple[Question, ...]
    logits: LogitComparison
    float32_logits: LogitComparison
    restored: bool
    figures: Figures

    @property
    def base_right(self) -> int:
        """Sentences that the base gets right, to the letter."""
        return sum(question.base == question.right for question in self.questions)

    @property
    def adapter_right(self) -> int:
        """Sentences that the live adapter model gets right, to the letter."""
        return sum(question.adapter == question.right for question in self.questions)

    @property
    def merged_right(self) -> int:
        """Sentences that the merged model gets right, to the letter."""
        return sum(question.merged == question.right for question in self.questions)

    @property
    def same_answers(self) -> int:
        """Sentences that the merged and the adapter model answer alike, to the letter."""
        return sum(question.merged == question.adapter for question in self.questions)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-ready objects, the derived counts included."""
        made = asdict(self)
        paths = {name: str(made[name]) for name in ("folder", "base", "adapter", "merged")}
        counts = ("base_right", "adapter_right", "merged_right", "same_answers")
        derived: dict[str, Any] = {name: getattr(self, name) for name in counts}
        shares = ("relative_difference", "agreement")
        for name in ("logits", "float32_logits"):
            comparison = getattr(self, name)
            derived[name] = made[name] | {share: getattr(comparison, share) for share in shares}
        return made | paths | derived | {"questions": list(made["questions"])}
