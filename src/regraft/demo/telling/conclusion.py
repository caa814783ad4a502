"""The result of a demo, put together from what its sections found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.demo.state import DemoFolder
from regraft.demo.steps.compare import LogitComparison
from regraft.demo.steps.lessons import LESSONS, MERGED
from regraft.demo.steps.merging import Measured
from regraft.demo.steps.model import Base, weight_bytes
from regraft.demo.telling.result import DemoResult, Figures, Question, Training

if TYPE_CHECKING:
    from regraft.demo.steps.live import Answers, InMemory, Switched


@dataclass(frozen=True)
class DemoFindings:
    """What the sections of a demo found; the names are those of :class:`DemoResult`."""

    folder: DemoFolder
    base: Base
    training: Mapping[str, Training]
    sentences: Sequence[str]
    right: Answers
    switched: Switched
    rows: Mapping[str, str]
    load_seconds: float
    four_bits: Answers
    four_bits_bytes: int
    in_memory: InMemory
    merging: Measured
    merged: Sequence[str]
    logits: LogitComparison
    float32_logits: LogitComparison
    restored: bool
    unmerging: Measured
    copy_seconds: float
    total_seconds: float


def conclude(found: DemoFindings) -> DemoResult:
    """Return the result."""
    folder = found.folder
    return DemoResult(
        folder=folder.path,
        base=found.base.path,
        adapters={lesson.name: folder.adapter(lesson.name) for lesson in LESSONS},
        merged=folder.merged,
        merged_adapter=MERGED.name,
        source=found.base.source,
        kept_base=found.base.kept,
        training=found.training,
        questions=tuple(_question(found, at) for at in range(len(found.sentences))),
        rows=found.rows,
        restored_in_memory=found.in_memory.restored,
        logits=found.logits,
        float32_logits=found.float32_logits,
        restored=found.restored,
        figures=_figures(found),
    )


def _question(found: DemoFindings, at: int) -> Question:
    return Question(
        sentence=found.sentences[at],
        right=_each(found.right, at),
        base=found.switched.base[at],
        adapters=_each(found.switched.adapters, at),
        four_bits=_each(found.four_bits, at),
        merged_in_memory=found.in_memory.answers[at],
        merged=found.merged[at],
    )


def _each(answers: Answers, at: int) -> dict[str, str]:
    return {name: texts[at] for name, texts in answers.items()}


def _figures(found: DemoFindings) -> Figures:
    folder, in_memory = found.folder, found.in_memory
    return Figures(
        base_bytes=weight_bytes(found.base.path),
        four_bits_bytes=found.four_bits_bytes,
        adapter_bytes={each.name: weight_bytes(folder.adapter(each.name)) for each in LESSONS},
        merged_bytes=weight_bytes(folder.merged),
        undo_bytes=found.merging.answer["totals"]["undo_bytes"],
        undo_in_memory_bytes=in_memory.undo_bytes,
        get_model_seconds=found.base.seconds,
        load_adapters_seconds=found.load_seconds,
        switch_seconds=found.switched.switch_seconds,
        merge_in_memory_seconds=in_memory.merge_seconds,
        unmerge_in_memory_seconds=in_memory.unmerge_seconds,
        merge_seconds=found.merging.seconds,
        unmerge_seconds=found.unmerging.seconds,
        copy_seconds=found.copy_seconds,
        total_seconds=found.total_seconds,
        merge_peak_memory=found.merging.peak_memory,
    )
