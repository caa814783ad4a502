"""``verify``: are these the files of the receipt, and is this the merge?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adapters.dialects.peft import read_adapter
from regraft.adapters.model import Adapter
from regraft.errors import EnvironmentShortfall, FormatError, InputError, UsageError
from regraft.formats.checkpoint import Checkpoint, open_checkpoint
from regraft.formats.hub import Located, locate
from regraft.formats.layout import RECEIPT
from regraft.merging.bases import open_base
from regraft.merging.events import Progress
from regraft.merging.planning import Choices, default_threads
from regraft.merging.recipe import AdapterArg, choices_of, open_adapters, parse_adapters
from regraft.verifying.receipts import ReceiptCheck, check_receipt
from regraft.verifying.report import Difference, TensorVerdict, VerifyReport, overall

if TYPE_CHECKING:
    from regraft.verifying.judge import Judgement


def verify(
    merged: str | Path,
    *,
    base: str | Path | None = None,
    adapters: AdapterArg | Sequence[AdapterArg] | None = None,
    prompts: str | Path | None = None,
    max_memory: str | int = "512MiB",
    threads: int | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Say whether a merged model is what it should be.

    A model that regraft merged is held against its receipt: every bit of the folder. With ``base``
    and ``adapters`` the merge is done again and compared, whatever tool wrote the model.

    Args:
        merged: the merged model: a folder, a weights file, or a Hub id.
        base: the base it should be made from.
        adapters: the adapters it should be made with, as for :func:`regraft.merge`.
        prompts: a file of prompts, to compare the answers of base + adapters and of the merged
            model too; needs ``regraft[torch]`` and memory for a whole model in float32.
        max_memory: cap on resident memory, whatever the size of the model, but for prompts.
        threads: worker threads; by default three more than there are cores at hand.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.

    Returns:
        The report; differences are in it, not raised.

    Raises:
        UsageError: the call contradicts itself.
        InputError: it cannot be judged: there is no receipt and no base, the receipt is not as it
            was written, base and adapters do not fit, something cannot be opened, or the model
            is none that answers prompts.
        EnvironmentShortfall: something cannot be read, does not fit under the memory cap, or (for
            prompts) a package is missing.
    """
    wanted = parse_adapters(adapters) if adapters else []
    asked = choices_of(None, None, max_memory, threads)
    choices = replace(asked, threads=asked.threads or default_threads())
    if (base is None) != (not wanted):
        raise UsageError(
            "a base and its adapters have to be given together", where=str(merged),
            expected="both --base and --adapter, or neither",
            hint="Name the base and every adapter, to have the merge done again",
        )  # fmt: skip
    if prompts is not None:
        _check_prompts(prompts, base)
    located = locate(merged, kind="merged", token=token)
    check = _against_receipt(located, choices, progress, needed=base is None)
    if base is None:
        return _report(located.source, check, None)
    try:
        opened = open_checkpoint(located)
    except InputError as error:
        if check is None or not check.differences:
            raise
        check.notes.append(f"the merge was not done again: {error.problems[0]}")
        return _report(located.source, check, None)
    recipe = _recipe(base, wanted, token)
    coded = _as_coded(choices, located.path)
    judged = _again(opened, recipe, coded, progress)
    if judged.another_base:
        from regraft.merging.another_base import warn  # which needs compiled code

        warn(judged.another_base, stacklevel=2)
    report = _report(located.source, check, judged)
    if prompts is None:
        return report
    return _with_answers(report, opened, recipe, prompts, choices, progress)


def _check_prompts(prompts: str | Path, base: str | Path | None) -> None:
    """Raise what can be said of prompts before anything that takes long."""
    if base is None:
        raise UsageError(
            "prompts need a base and its adapters", where="--prompts",
            expected="--base and --adapter, whose answers are those to compare with",
        )  # fmt: skip
    from regraft.verifying.prompts import check_prompts

    check_prompts(prompts)


def _against_receipt(
    located: Located, choices: Choices, progress: Progress | None, *, needed: bool
) -> ReceiptCheck | None:
    """Hold a folder against its receipt; return None where there is none and none is needed."""
    from regraft.merging.receipt import read_receipt

    path = located.path / RECEIPT
    if not located.path.is_dir() or not os.path.lexists(path):
        if needed:
            raise _no_receipt(located)
        return None
    try:
        receipt = read_receipt(path)
    except FormatError as error:
        if needed:
            raise
        return ReceiptCheck([Difference(RECEIPT, "", error.problems[0].what)])
    return check_receipt(located.path, receipt, threads=choices.threads or 1, progress=progress)


def _no_receipt(located: Located) -> InputError:
    folder = located.path.is_dir()
    return InputError(
        "there is no receipt to verify it by",
        where=located.source,
        expected=RECEIPT if folder else "a folder with its receipt",
        found="a model that regraft did not merge" if folder else "a file",
        hint="Give the base and the adapters it should be made of: --base BASE --adapter ADAPTER",
    )


_Recipe = tuple[Checkpoint, list[Adapter]]
"""The base and the adapters that a model should be made of."""


def _recipe(base: str | Path, adapters: Sequence[tuple[str, float]], token: str | None) -> _Recipe:
    checkpoint = open_base(locate(base, kind="base", token=token))
    opened = open_adapters(adapters, token)
    return checkpoint, [read_adapter(files, weight) for files, weight in opened]


def _as_coded(choices: Choices, folder: Path) -> Choices:
    """Return choices with how a merged model's receipt says that it was quantized."""
    from regraft.merging.receipt import read_receipt

    if not os.path.lexists(folder / RECEIPT):
        return choices
    try:
        options = read_receipt(folder / RECEIPT).options
    except FormatError:  # which has been told already
        return choices
    if options.get("quantize") is None:
        return choices
    return replace(
        choices,
        quantize=options["quantize"],
        rounding=options["rounding"],
        seed=options["seed"],
        double_quant=options.get("double_quant", False),
    )


def _again(
    merged: Checkpoint, recipe: _Recipe, choices: Choices, progress: Progress | None
) -> Judgement:
    """Do the merge again and compare."""
    from regraft.verifying.judge import judge

    return judge(merged, *recipe, choices, progress)


_LOST = (
    "as every tensor is the merge, rounding to the dtype they are stored in lost what is missing: "
    "a merge with --dtype float32 keeps it"
)


def _with_answers(
    report: VerifyReport, merged: Checkpoint, recipe: _Recipe, prompts: str | Path,
    choices: Choices, progress: Progress | None,
) -> VerifyReport:  # fmt: skip
    """Add to a report how the answers to prompts agree."""
    from regraft.verifying.prompts import compare_prompts

    try:
        answers = compare_prompts(merged, *recipe, prompts, choices, progress=progress)
    except (InputError, EnvironmentShortfall) as error:
        if report.verdict != "different":
            raise
        note = f"answers to prompts were not compared: {error.problems[0]}"
        return replace(report, warnings=(*report.warnings, note))
    said = [answers.conclusion()]
    narrow = any(spec.dtype in ("BF16", "F16") for spec in merged.tensors.values())
    if report.ok and narrow and answers.verdict == "different":
        said.append(_LOST)
    verdict = overall(report.differences, report.tensors, answers)
    return replace(
        report,
        ok=verdict in ("exact", "rounding"),
        verdict=verdict,
        conclusions=(*report.conclusions, *said),
        warnings=(*report.warnings, *answers.notes),
        prompts=answers,
    )


def _report(source: str, check: ReceiptCheck | None, judged: Judgement | None) -> VerifyReport:
    differences = tuple(check.differences) if check else ()
    checked: dict[str, int] = {}
    warnings: tuple[str, ...] = ()
    sentences: list[str] = []
    if check is not None:
        checked = {name: getattr(check, name) for name in _COUNTED}
        warnings = tuple(check.notes)
        sentences.append(_of_receipt(check))
    tensors: tuple[TensorVerdict, ...] = ()
    if judged is not None:
        from regraft.verifying.conclusions import conclude

        tensors, said = conclude(judged.tensors, judged.touched)
        sentences += said
        differences += tuple(Difference("config.json", "", what) for what in judged.config)
        warnings += judged.warnings + judged.another_base
        checked["judged"] = sum(tensor.verdict != "unjudged" for tensor in tensors)
    verdict = overall(differences, tensors)
    return VerifyReport(
        source, verdict in ("exact", "rounding"), verdict, tuple(sentences), differences, tensors,
        checked, warnings,
    )  # fmt: skip


_COUNTED = ("files", "headers", "tensors", "bytes")


def _of_receipt(check: ReceiptCheck) -> str:
    count = len(check.differences)
    if not count:
        return "the files are those of the receipt"
    return f"the files are not those of the receipt: {count} difference{'s' * (count > 1)}"
