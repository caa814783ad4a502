"""``verify``: are these the files of the receipt, and is this the merge?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.concurrency import default_threads
from regraft.errors import EnvironmentShortfall, FormatError, InputError, UsageError
from regraft.formats.checkpoint import Checkpoint, open_checkpoint
from regraft.formats.files.watching import watched
from regraft.formats.hub import Located, locate
from regraft.formats.layout import RECEIPT, looks_like, receipt_path
from regraft.merging.inputs.base import open_base, whole_gguf
from regraft.merging.inputs.dequantized_view import GGUF
from regraft.merging.inputs.opening import AdapterArg, parse_adapters
from regraft.merging.options import MergeOptions, parse_dtype
from regraft.progress import Progress
from regraft.verifying.inputs import (
    BaseWithAdapters,
    Inputs,
    find_inputs,
    is_that_base,
    not_of_receipt,
)
from regraft.verifying.receipts import ReceiptCheck, check_receipt
from regraft.verifying.report import FINE, Difference, TensorVerdict, VerifyReport, overall

if TYPE_CHECKING:
    from regraft.merging.files.receipt import Receipt
    from regraft.verifying.recompute import Judgement


@watched(to_the_end=True)
def verify(
    merged: str | Path,
    *,
    base: str | Path | None = None,
    adapters: AdapterArg | Sequence[AdapterArg] | None = None,
    prompts: str | Path | None = None,
    receipt_only: bool = False,
    max_memory: str | int = "512MiB",
    threads: int | None = None,
    peft_version: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Say whether a merged model is what it should be.

    A model that regraft merged is held against its receipt: every bit of the folder. With ``base``
    and ``adapters`` the merge is done again and compared, whatever tool wrote the model. What is
    not given of the two is taken from where the receipt says that it was; what is not on this
    machine is said, and then the receipt alone decides.

    Args:
        merged: the merged model: a folder, a weights file, or a Hub id.
        base: the base it should be made from.
        adapters: the adapters it should be made with, as for :func:`regraft.merge`.
        prompts: a file of prompts, to compare the answers of base + adapters and of the merged
            model too; needs ``regraft[torch]`` and memory for a whole model in float32.
        receipt_only: do not do the merge again with what the receipt names.
        max_memory: cap on resident memory, whatever the size of the model, but for prompts.
        threads: worker threads; by default three more than there are cores at hand.
        peft_version: as for :func:`regraft.merge`; by default as it was for this merge.
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
    asked = MergeOptions.of(max_memory=max_memory, threads=threads, peft_version=peft_version)
    options = replace(asked, threads=asked.threads or default_threads())
    if receipt_only:
        _check_alone(merged, base, wanted, prompts)
    located = locate(merged, kind="merged", token=token)
    inputs = Inputs(None)
    if not receipt_only:
        inputs = find_inputs(located.path, base, wanted, peft_version, token)
        _check_complete(merged, base, wanted, inputs)
    if prompts is not None:
        _check_prompts(prompts, inputs)
    check = _against_receipt(located, options, progress, needed=inputs.recipe is None)
    if inputs.recipe is None:
        return _report(located.source, check, None, inputs.said)
    try:
        opened = _opened(located)
    except InputError as error:
        if check is None or not check.differences:
            raise
        check.notes.append(f"the merge was not done again: {error.problems[0]}")
        return _report(located.source, check, None)
    coded = _as_coded(options, inputs.receipt, in_gguf=opened.container == GGUF)
    judged, said = _judged(opened, inputs, coded, check, progress)
    report = _report(located.source, check, judged, said)
    if prompts is None or judged is None:
        return report
    return _with_answers(report, opened, inputs.recipe, prompts, options, progress)


def _opened(located: Located) -> Checkpoint:
    """Open a merged model; of a GGUF file that regraft merged its blocks, as they are stored.

    Raises:
        RegraftError: it is none, or is malformed.
    """
    in_gguf = looks_like(located.path) == "gguf" and receipt_path(located.path).is_file()
    return whole_gguf(open_base(located)) if in_gguf else open_checkpoint(located)


def _check_alone(
    merged: str | Path, base: str | Path | None, adapters: Sequence[tuple[str, float]],
    prompts: str | Path | None,
) -> None:  # fmt: skip
    given = {"--base": base, "--adapter": adapters, "--prompts": prompts}
    if named := [option for option, value in given.items() if value]:
        raise UsageError(
            "the receipt alone is compared with nothing else", where=str(merged),
            expected="--receipt-only by itself", found=", ".join(named),
        )  # fmt: skip


def _check_complete(
    merged: str | Path, base: str | Path | None, adapters: Sequence[tuple[str, float]],
    inputs: Inputs,
) -> None:  # fmt: skip
    """Refuse a base without adapters, or the other way round, if no receipt names the rest."""
    if inputs.recipe is None and (base is not None or adapters):
        raise UsageError(
            "a base and its adapters have to be given together", where=str(merged),
            expected="both --base and --adapter, or a receipt that names the other",
            found=inputs.said, hint="Name the base and every adapter, to have the merge done again",
        )  # fmt: skip


def _judged(
    merged: Checkpoint, inputs: Inputs, options: MergeOptions, check: ReceiptCheck | None,
    progress: Progress | None,
) -> tuple[Judgement | None, str]:  # fmt: skip
    """Do the merge again and compare; return also what to say of the inputs.

    What lies where the receipt says the base was may be another model by now. Where the files are
    those of the receipt and the merge is not, the digests of the base tell.

    Raises:
        RegraftError: it cannot be done with what was named.
    """
    assert inputs.recipe is not None
    base = inputs.recipe[0]
    other = f"the merge was not done again: {base.source} is not the base that was merged any more"
    try:
        judged = _again(merged, inputs.recipe, options, progress)
    except InputError as error:
        if inputs.record is None:
            raise
        why = f"the merge was not done again: {error.problems[0]}"
        return None, why if is_that_base(base, inputs.record) else other
    differs = any(tensor.verdict != "exact" for tensor in judged.tensors)
    clean = check is not None and not check.differences
    if differs and clean and inputs.record and not is_that_base(base, inputs.record):
        return None, other
    if judged.another_base:
        from regraft.merging.another_base import warn  # which needs compiled code

        warn(judged.another_base, stacklevel=4)
    strange = not_of_receipt(inputs) if differs and clean else []
    return judged, "; ".join(filter(None, [inputs.said, *strange]))


def _check_prompts(prompts: str | Path, inputs: Inputs) -> None:
    """Raise what can be said of prompts before anything that takes long."""
    if inputs.recipe is None:
        raise UsageError(
            "prompts need a base and its adapters", where="--prompts",
            expected="--base and --adapter, whose answers are those to compare with",
            found=inputs.said,
        )  # fmt: skip
    from regraft.verifying.prompting.prompts import check_prompts

    check_prompts(prompts)


def _against_receipt(
    located: Located, options: MergeOptions, progress: Progress | None, *, needed: bool
) -> ReceiptCheck | None:
    """Hold a folder against its receipt; return None where there is none and none is needed."""
    from regraft.merging.files.receipt import read_receipt

    path = receipt_path(located.path)
    if not os.path.lexists(path):
        if needed:
            raise _no_receipt(located)
        return None
    try:
        receipt = read_receipt(path)
    except FormatError as error:
        if needed:
            raise
        return ReceiptCheck([Difference(RECEIPT, "", error.problems[0].what)])
    check = check_receipt(located.path, receipt, threads=options.threads or 1, progress=progress)
    check.differences += _unusable_undo(located.path, receipt, check)
    return check


def _unusable_undo(folder: Path, receipt: Receipt, check: ReceiptCheck) -> list[Difference]:
    """Return what is wrong with a manifest of the undo that the receipt has just so."""
    from regraft.merging.undo.manifest import MANIFEST, UNDO, read_manifest, undo_of

    name = f"{UNDO}/{MANIFEST}"
    kept = (undo_of(folder) / MANIFEST).is_file()
    if not kept or any(found.file == name for found in check.differences):
        return []
    try:
        read_manifest(folder, receipt)
    except InputError as error:
        problem = error.problems[0]
        return [Difference(name, "", f"{problem.what}: {problem.found}")]
    return []


def _no_receipt(located: Located) -> InputError:
    folder = located.path.is_dir()
    if looks_like(located.path) == "adapter":
        return InputError(
            "is not a merged model", where=located.source, expected="a full model",
            found="an adapter", hint="Name the merged model, and this with --adapter",
        )  # fmt: skip
    return InputError(
        "there is no receipt to verify it by",
        where=located.source,
        expected=RECEIPT if folder else "a folder with its receipt",
        found="a model that regraft did not merge" if folder else "a file",
        hint="Give the base and the adapters it should be made of: --base BASE --adapter ADAPTER",
    )


def _as_coded(options: MergeOptions, receipt: Receipt | None, *, in_gguf: bool) -> MergeOptions:
    """Return options with the method and the quantization that a merged model's receipt has."""
    recorded = receipt.options if receipt is not None else {}
    if "method" in recorded:
        of_method = {name: recorded[name] for name in ("method", "density", "seed")}
        options = replace(options, **of_method)
    if recorded.get("quantize") is None:
        return options
    return replace(
        options,
        quantize=recorded["quantize"],
        rounding=recorded["rounding"],
        seed=recorded["seed"],
        double_quant=recorded.get("double_quant", False),
        dtype=parse_dtype(recorded["dtype"], blocks=True) if in_gguf else options.dtype,
    )  # fmt: skip


def _again(
    merged: Checkpoint, recipe: BaseWithAdapters, options: MergeOptions, progress: Progress | None
) -> Judgement:
    """Do the merge again and compare."""
    from regraft.verifying.recompute import judge

    return judge(merged, *recipe, options, progress)


_LOST = (
    "as every tensor is the merge, rounding to the dtype they are stored in lost what is missing: "
    "a merge with --dtype float32 keeps it"
)


def _with_answers(
    report: VerifyReport, merged: Checkpoint, recipe: BaseWithAdapters, prompts: str | Path,
    options: MergeOptions, progress: Progress | None,
) -> VerifyReport:  # fmt: skip
    """Add to a report how the answers to prompts agree."""
    from regraft.verifying.prompting.prompts import compare_prompts

    try:
        answers = compare_prompts(merged, *recipe, prompts, options, progress=progress)
    except (InputError, EnvironmentShortfall) as error:
        if report.verdict != "different":
            raise
        note = f"answers to prompts were not compared: {error.problems[0]}"
        return replace(report, warnings=(*report.warnings, note))
    said = [answers.conclusion()]
    narrow = any(spec.dtype in ("BF16", "F16") for spec in merged.tensors.values())
    if report.ok and narrow and answers.verdict == "different":
        said.append(_LOST)
    complete = report.verdict != "unjudged" or any(t.verdict == "unjudged" for t in report.tensors)
    verdict = overall(report.differences, report.tensors, answers, complete=complete)
    return replace(
        report,
        ok=verdict in ("exact", "rounding"),
        verdict=verdict,
        conclusions=(*report.conclusions, *said),
        warnings=(*report.warnings, *answers.notes),
        prompts=answers,
    )


def _report(
    source: str, check: ReceiptCheck | None, judged: Judgement | None, inputs: str = ""
) -> VerifyReport:
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
        from regraft.verifying.summary import conclude

        tensors, said = conclude(judged.tensors, judged.touched)
        if any(tensor.verdict not in FINE for tensor in tensors):
            sentences, inputs = [*sentences, *filter(None, [inputs])], ""  # what explains the rest
        sentences += said
        differences += tuple(Difference("config.json", "", what) for what in judged.config)
        warnings += judged.warnings + judged.another_base
        checked["judged"] = sum(tensor.verdict != "unjudged" for tensor in tensors)
    sentences += [inputs] if inputs else []
    verdict = overall(differences, tensors, complete=check is None or check.complete)
    return VerifyReport(
        source, verdict in ("exact", "rounding"), verdict, tuple(sentences), differences, tensors,
        checked, warnings,
    )  # fmt: skip


_COUNTED = ("files", "headers", "tensors", "bytes")


def _of_receipt(check: ReceiptCheck) -> str:
    count = len(check.differences)
    if not count and not check.complete:
        return "the tensors are those of the receipt, which does not speak of the other files"
    if not count:
        return "the files are those of the receipt"
    return f"the files are not those of the receipt: {count} difference{'s' * (count > 1)}"
