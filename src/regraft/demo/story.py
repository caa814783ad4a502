"""What the demo tells its reader. Pure functions that return text."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.demo.compare import LogitComparison
from regraft.demo.data import INSTRUCTION, Example
from regraft.demo.result import DemoResult
from regraft.demo.text import memory, percent, seconds, size, table

_EARLIER = "kept from an earlier run"


def heading(number: int, title: str) -> str:
    """Return the heading of a section."""
    return f"\n{number}. {title}"


def indented(*lines: str) -> str:
    """Return lines as the body of a section."""
    return "\n".join(f"   {line}" if line else "" for line in "\n".join(lines).split("\n"))


def made_or_kept(kept: bool, made: str, taken: float) -> str:
    """Return ``made`` with its time, or that an earlier run did it."""
    return f"{_EARLIER}, where it took {seconds(taken)}" if kept else f"{made} in {seconds(taken)}"


def task(example: Example) -> str:
    """Return what the adapter is to learn."""
    return indented(
        f'the prompt     "{INSTRUCTION}" and a sentence, such as',
        f"               {example.sentence}",
        f"right answer   {example.answer}",
    )


def answered(examples: Sequence[Example], answers: dict[str, Sequence[str]]) -> str:
    """Return sentences with the answers of each model, marked right or wrong."""
    width = max(map(len, answers))
    lines: list[str] = []
    for i, example in enumerate(examples):
        lines.append(example.sentence)
        for model, texts in answers.items():
            mark = "right" if texts[i] == example.answer else "wrong"
            lines.append(f"  {model:<{width}}  {mark}  {texts[i]}")
    return indented(*lines)


def agreement(logits: LogitComparison) -> str:
    """Return how far the merged model's logits are from the adapter model's."""
    return indented(
        f"Logits of both models at all {logits.positions} positions, computed in float32:",
        f"  largest difference   {logits.largest_difference:.3g}, which is "
        f"{percent(logits.relative_difference)} of their range ({logits.value_range:.3g})",
        f"  most likely token    the same at {logits.same_top} of {logits.positions} positions",
        "The merged weights are stored in bfloat16, as the base's are: the difference is that",
        "one rounding.",
    )


def figures(result: DemoResult) -> str:
    """Return the closing table: sizes, times, memory."""
    f = result.figures
    rows = [
        ("base", size(f.base_bytes), ""),
        ("adapter", size(f.adapter_bytes), ""),
        ("merged", size(f.merged_bytes), ""),
        ("get the model", seconds(f.get_model_seconds), _EARLIER if result.kept_base else ""),
        ("train", seconds(f.train_seconds), _EARLIER if result.kept_adapter else ""),
        ("merge", seconds(f.merge_seconds), "the whole process, written through to disk"),
        ("plain copy of the base", seconds(f.copy_seconds), "likewise"),
        ("peak memory of the merge", memory(f.merge_peak_memory), ""),
        ("the whole demo", seconds(f.total_seconds), ""),
    ]
    return indented(table(rows))
