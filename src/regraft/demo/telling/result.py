"""All the figures of a demo run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft.demo.steps.compare import LogitComparison


@dataclass(frozen=True)
class Training:
    """What the training of one adapter came to.

    Attributes:
        steps: optimizer steps.
        seconds: time it took, when it was done.
        first_loss: loss of the first step's sentences, before any update.
        last_loss: loss of the last step's sentences.
        parameters: trained parameters.
        modules: linear layers that were adapted.
        kept: whether an earlier run of the demo trained it.
    """

    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    parameters: int
    modules: int
    kept: bool = False


@dataclass(frozen=True)
class Question:
    """One held-out sentence and what the models made of it.

    Attributes:
        sentence: what was asked about.
        right: the right answer in each adapter's form, by the adapter's name.
        base: the base's answer.
        adapters: each adapter's, live on the base.
        four_bits: each adapter's, live on the base in 4 bits.
        merged_in_memory: that of the model in memory while an adapter was merged into it.
        merged: that of the model that was merged on files.
    """

    sentence: str
    right: Mapping[str, str]
    base: str
    adapters: Mapping[str, str]
    four_bits: Mapping[str, str]
    merged_in_memory: str
    merged: str


@dataclass(frozen=True)
class Figures:
    """Sizes in bytes, times in seconds, and memory in bytes.

    ``get_model_seconds`` is that of the run that did it. ``four_bits_bytes`` is the memory that
    the weights of the base in 4 bits take; ``undo_bytes`` what the merge on files keeps for the
    way back, and ``undo_in_memory_bytes`` the one in memory.
    """

    base_bytes: int
    four_bits_bytes: int
    adapter_bytes: Mapping[str, int]
    merged_bytes: int
    undo_bytes: int
    undo_in_memory_bytes: int
    get_model_seconds: float
    load_adapters_seconds: float
    switch_seconds: float
    merge_in_memory_seconds: float
    unmerge_in_memory_seconds: float
    merge_seconds: float
    unmerge_seconds: float
    copy_seconds: float
    total_seconds: float
    merge_peak_memory: int


@dataclass(frozen=True)
class DemoResult:
    """All that a demo measured. Figures of each adapter are by the adapter's name.

    Attributes:
        folder: the demo's folder.
        base: the base model's folder.
        adapters: the trained adapters' folders.
        merged: the merged model's folder.
        merged_adapter: name of the adapter that was merged, in memory and on files.
        source: where the base came from.
        kept_base: whether an earlier run got the base.
        training: what the training of each adapter came to.
        questions: every held-out sentence, with all answers.
        rows: what one batch answered to one sentence: a row for the base, by the name
            ``"base"``, and one for each adapter.
        restored_in_memory: whether every bit of the base was back after ``unmerge_adapter``.
        logits: the merged model's logits against those of the base with the adapter live.
        float32_logits: the same for a merge that keeps float32: no rounding to the base's dtype.
        restored: whether the base came back out of the merged model's folder, byte for byte.
        figures: sizes, times, memory.
    """

    folder: Path
    base: Path
    adapters: Mapping[str, Path]
    merged: Path
    merged_adapter: str
    source: str
    kept_base: bool
    training: Mapping[str, Training]
    questions: tuple[Question, ...]
    rows: Mapping[str, str]
    restored_in_memory: bool
    logits: LogitComparison
    float32_logits: LogitComparison
    restored: bool
    figures: Figures

    @property
    def base_right(self) -> int:
        """Sentences that the base gets right, to the letter, in any of the forms."""
        return sum(question.base in question.right.values() for question in self.questions)

    @property
    def adapters_right(self) -> dict[str, int]:
        """Sentences that each live adapter gets right, to the letter."""
        return self._right(lambda question: question.adapters)

    @property
    def four_bits_right(self) -> dict[str, int]:
        """Sentences that each adapter gets right on the base in 4 bits, to the letter."""
        return self._right(lambda question: question.four_bits)

    def _right(self, answers: Callable[[Question], Mapping[str, str]]) -> dict[str, int]:
        return {
            name: sum(answers(each)[name] == each.right[name] for each in self.questions)
            for name in self.adapters
        }

    @property
    def merged_right(self) -> int:
        """Sentences that the merged model gets right, to the letter."""
        name = self.merged_adapter
        return sum(question.merged == question.right[name] for question in self.questions)

    @property
    def same_answers(self) -> int:
        """Sentences that the merged model and the live adapter answer alike, to the letter."""
        name = self.merged_adapter
        return sum(question.merged == question.adapters[name] for question in self.questions)

    @property
    def same_answers_in_memory(self) -> int:
        """The same for the model in memory while the adapter was merged into it."""
        name = self.merged_adapter
        return sum(q.merged_in_memory == q.adapters[name] for q in self.questions)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-ready objects, the derived counts included."""
        made = asdict(self)
        paths: dict[str, Any] = {name: str(made[name]) for name in ("folder", "base", "merged")}
        paths["adapters"] = {name: str(path) for name, path in self.adapters.items()}
        derived: dict[str, Any] = {name: getattr(self, name) for name in _COUNTS}
        for name in ("logits", "float32_logits"):
            comparison = getattr(self, name)
            derived[name] = made[name] | {share: getattr(comparison, share) for share in _SHARES}
        return made | paths | derived | {"questions": list(made["questions"])}


_COUNTS = (
    "base_right", "adapters_right", "four_bits_right", "merged_right", "same_answers",
    "same_answers_in_memory",
)  # fmt: skip
_SHARES = ("relative_difference", "agreement")
