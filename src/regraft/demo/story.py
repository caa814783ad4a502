"""What the demo tells its reader. Pure functions that return text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from regraft.demo.compare import LogitComparison
from regraft.demo.data import INSTRUCTION, Example
from regraft.demo.result import DemoResult
from regraft.demo.text import memory, percent, seconds, size, table

_EARLIER = "kept from an earlier run"

FLOAT32_TOLERANCE = 1e-4
"""Two float32 computations of the same function stay this close, as a share of the range."""

_ANSWER_WIDTH = 70
"""A longer answer, which is a wrong one, is shown up to here."""


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
            text = textwrap.shorten(texts[i], _ANSWER_WIDTH, placeholder=" ...")
            lines.append(f"  {model:<{width}}  {mark}  {text}")
    return indented(*lines)


def agreement(stored: LogitComparison, float32: LogitComparison) -> str:
    """Return how far the merged model's logits are from the adapter model's.

    Args:
        stored: of the model merged in the base's dtype.
        float32: of the same merge kept in float32, which leaves the last rounding out.
    """
    return indented(
        f"Logits of the two models at all {stored.positions} positions of prompts and answers",
        f"(the adapter model's span {stored.value_range:.3g} from lowest to highest):",
        table(
            [
                ("  largest difference", *_difference(stored)),
                ("  merged in float32 instead", *_difference(float32)),
            ]
        ),
        _cause(float32),
    )


def _cause(float32: LogitComparison) -> str:
    if float32.relative_difference <= FLOAT32_TOLERANCE:
        return "So what differs is the one rounding to the base's dtype, and nothing else."
    share = percent(float32.relative_difference)
    return f"That is MORE than the rounding to the base's dtype: {share} is left without it."


def _difference(logits: LogitComparison) -> tuple[str, str]:
    share = f"{percent(logits.relative_difference)} of the range"
    same = f"same top token at {logits.same_top} of {logits.positions}"
    return f"{logits.largest_difference:.2g}", f"{share}; {same}"


def taken_back(identical: bool, taken: float, undo_bytes: int) -> str:
    """Return what un-merging gave, and what it took."""
    if not identical:
        return indented("The folder that came back is NOT the base's.")
    return indented(
        f"Every file of the base came back byte for byte, in {seconds(taken)}, with the help of "
        f"{size(undo_bytes)} kept."
    )


def figures(result: DemoResult) -> str:
    """Return the closing table: sizes, times, memory."""
    f = result.figures
    rows = [
        ("base", size(f.base_bytes), ""),
        ("adapter", size(f.adapter_bytes), ""),
        ("merged", size(f.merged_bytes), ""),
        ("kept to take it back", size(f.undo_bytes), percent(f.undo_bytes / f.merged_bytes)),
        ("get the model", seconds(f.get_model_seconds), _EARLIER if result.kept_base else ""),
        ("train", seconds(f.train_seconds), _EARLIER if result.kept_adapter else ""),
        ("merge", seconds(f.merge_seconds), "the whole process, written through to disk"),
        ("un-merge", seconds(f.unmerge_seconds), "likewise"),
        ("plain copy of the base", seconds(f.copy_seconds), "likewise"),
        ("peak memory of the merge", memory(f.merge_peak_memory), ""),
        ("the whole demo", seconds(f.total_seconds), ""),
    ]
    return indented(table(rows))
