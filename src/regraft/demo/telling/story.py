"""What the demo tells its reader. Pure functions that return text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from regraft.demo.steps.compare import LogitComparison
from regraft.demo.steps.data import INSTRUCTION
from regraft.demo.steps.lessons import LESSONS, Lesson
from regraft.demo.telling.result import DemoResult, Training
from regraft.demo.telling.text import memory, milliseconds, percent, seconds, size, table

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


def task() -> str:
    """Return what the adapters are to learn."""
    examples = {each.name: each.held_out()[0] for each in LESSONS}
    width = max(map(len, examples)) + len("right for ")
    return indented(
        f'{"the prompt":<{width}}  "{INSTRUCTION}" and a sentence, such as',
        f"{'':<{width}}  {next(iter(examples.values())).sentence}",
        *(f"{f'right for {name}':<{width}}  {each.answer}" for name, each in examples.items()),
    )


def lesson(each: Lesson, folder: str) -> str:
    """Return the lines of Python with which one adapter is trained and saved."""
    settings = each.settings
    sizes = f"r={settings.rank}, lora_alpha={settings.alpha}"
    return "\n" + code(
        f'config = regraft.LoraConfig({sizes}, target_modules="all-linear")',
        f'adapters = regraft.attach(model, config, "{each.name}")',
        f"# {settings.steps} steps of {settings.batch} sentences: a plain loop on "
        "adapters.parameters()",
        f'regraft.save(model, "{folder}")',
    )


def trained(training: Training) -> str:
    """Return what the training of one adapter came to."""
    return indented(
        f"{training.modules} linear layers, {training.parameters / 1e6:.1f} M parameters, "
        f"loss from {training.first_loss:.2f} to {training.last_loss:.4f};",
        made_or_kept(training.kept, "trained and saved", training.seconds),
    )


def attaching(folders: Mapping[str, Path]) -> str:
    """Return the lines of Python that put adapters on a model."""
    return code(
        "adapters = regraft.attach(model)",
        *(f'adapters.load_adapter("{path}", "{name}")' for name, path in folders.items()),
    )


def rows(names: Sequence[str | None]) -> str:
    """Return the lines of Python that ask a batch with an adapter for each row."""
    listed = ", ".join(f'"{name}"' if name else "None" for name in names)
    return indented(f"One batch, each row with another adapter: adapters.rows([{listed}])")


def code(*lines: str) -> str:
    """Return lines of Python as they are typed."""
    return indented(*(f">>> {line}" for line in lines))


def answered(
    sentences: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    right: Mapping[str, Sequence[str]],
) -> str:
    """Return sentences with the answers of each model, marked right or wrong.

    Args:
        sentences: what was asked about.
        answers: by the model's label, its answer to each sentence.
        right: by the same label, the right answers; a label without any is always wrong.
    """
    width = max(map(len, answers))
    lines: list[str] = []
    for i, sentence in enumerate(sentences):
        lines.append(sentence)
        for model, texts in answers.items():
            mark = "right" if model in right and texts[i] == right[model][i] else "wrong"
            text = textwrap.shorten(texts[i], _ANSWER_WIDTH, placeholder=" ...")
            lines.append(f"  {model:<{width}}  {mark}  {text}")
    return indented(*lines)


def score(counts: Mapping[str, int], total: int) -> str:
    """Return how many sentences each model got right: ``base 0, fields 10``."""
    each = ", ".join(f"{name} {count}" for name, count in counts.items())
    return indented(f"Right to the letter, of {total} such sentences: {each}.")


def back_in_memory(restored: bool, tensors: int, changed: int, taken: float, undo: int) -> str:
    """Return what un-merging in memory gave, and what it took."""
    if not restored:
        return indented("The weights that came back are NOT the base's.")
    return indented(
        f"in {seconds(taken)}, with the help of {size(undo)} kept, the adapter included.",
        f"{changed} tensors had been changed; every bit of all {tensors} in state_dict() is back.",
    )


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
    """Return the section on un-merging: what came back, and its time and memory."""
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
        ("base in 4 bits", size(f.four_bits_bytes), "in memory; embeddings stay in float32"),
        *((f"adapter {name}", size(nbytes), "") for name, nbytes in f.adapter_bytes.items()),
        ("merged", size(f.merged_bytes), ""),
        ("kept to take it back", size(f.undo_bytes), percent(f.undo_bytes / f.merged_bytes)),
        ("get the model", seconds(f.get_model_seconds), _EARLIER if result.kept_base else ""),
        *(
            (f"train {name}", seconds(each.seconds), _EARLIER if each.kept else "")
            for name, each in result.training.items()
        ),
        ("load both adapters", milliseconds(f.load_adapters_seconds), ""),
        ("switch adapters", milliseconds(f.switch_seconds), ""),
        ("merge in memory", seconds(f.merge_in_memory_seconds), ""),
        ("un-merge in memory", seconds(f.unmerge_in_memory_seconds), ""),
        ("merge on files", seconds(f.merge_seconds), "the whole process, written through to disk"),
        ("un-merge on files", seconds(f.unmerge_seconds), "likewise"),
        ("plain copy of the base", seconds(f.copy_seconds), "likewise"),
        ("peak memory of the merge", memory(f.merge_peak_memory), "on files"),
        ("the whole demo", seconds(f.total_seconds), ""),
    ]
    return indented(table(rows))
