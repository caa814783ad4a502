"""The verb that gets an adapter out of a fine-tuned model.

open both -> pair tensors -> fit each difference -> write
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from regraft.adapters.dialects.as_peft import write
from regraft.adapters.dialects.form import NewFile, PlainAdapter
from regraft.errors import Problem, UsageError
from regraft.extracting.card import extracted_card
from regraft.extracting.differences import Sides
from regraft.extracting.fitting import Wanted
from regraft.extracting.kept import kept_adapters, written_from_kept
from regraft.extracting.making import Extracted, Spool, chosen_by, extracted, unmatched
from regraft.extracting.pairing import pairs_of
from regraft.extracting.report import ExtractReport, overall, warnings_of
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.files.watching import watched
from regraft.formats.hub import locate
from regraft.formats.layout import ADAPTER_SAFE
from regraft.merging.compute.context import seen_through
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.files.publish import copy_file, write_file, write_pieces
from regraft.merging.files.side_files import CARD, tokenizer_files
from regraft.merging.files.staging import Workplace
from regraft.merging.inputs.base import open_base, see
from regraft.merging.inputs.dequantized_view import Quantization
from regraft.merging.inputs.source import FileSource, Source
from regraft.merging.options import parse_dtype
from regraft.progress import Progress, ProgressMeter, tell
from regraft.system.memory import peak_memory
from regraft.tensors import DTYPES

DEFAULT_RANK = 64
_SPOOL = "factors"


@watched()
def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    modules: Sequence[str] | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> ExtractReport:
    """Get an adapter out of a fine-tuned model: low-rank factors of what it adds to its base.

    Both models are read a band of rows at a time. The factors are the leading singular triples,
    found by a randomized range finder (Halko, Martinsson and Tropp 2011). Norms, biases and other
    tensors that are no matrices travel whole, and so do embeddings that grew or are tied. From a
    merge that keeps its adapters (``regraft merge``) the adapter comes out exactly.

    Args:
        base: the model that was fine-tuned; plain or quantized.
        tuned: the fine-tuned model.
        out: the folder to make, in PEFT's format; it appears whole or not at all.
        rank: the rank of the factors; by default 64, where nothing else is said.
        energy: instead: the share of each difference's squared norm to keep.
        max_error: instead: the largest relative error of each difference, in the Frobenius norm.
        modules: names of modules, or ends of them such as ``"q_proj"``; all changed ones if None.
        dtype: dtype of the factors: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        seed: of the range finder's start.
        overwrite: replace ``out``, once the new one is complete, if it holds an adapter.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.

    Returns:
        What became of every tensor, and how far off the adapter is.

    Raises:
        RegraftError: one of :mod:`regraft.errors`; ``out`` is then as it was before the call.
        UsageError: the call contradicts itself, or nothing differs.
        MismatchError: the models are not of one kind; lists every tensor.
    """
    started = time.perf_counter()
    output = OutputFolder.asked_for(out, base, tuned, overwrite=overwrite, kind="adapter")
    wanted = _wanted(rank, energy, max_error)
    stored = parse_dtype(dtype) or "BF16"
    tell(progress, "read", 0)
    models = [open_base(locate(each, kind="base", token=token)) for each in (base, tuned)]
    output.check_inputs([path for model in models for path in _paths(model)])
    exact = None if _said(rank, energy, max_error, modules) else kept_adapters(*models)
    if exact is not None:
        report = written_from_kept(exact, output, progress)
    else:
        report = _fitted(models, output, wanted, stored, modules, seed, progress)
    return replace(
        report, base=str(base), tuned=str(tuned), output=str(output.path),
        seconds=time.perf_counter() - started, peak_memory=peak_memory(),
    )  # fmt: skip


def _said(*choices: object) -> bool:
    return any(choice is not None for choice in choices)


def _paths(model: Checkpoint) -> list[Path]:
    return [shard.path for shard in model.shards] if model.single_file else [model.root]


def _wanted(rank: int | None, energy: float | None, max_error: float | None) -> Wanted:
    """Return how good the factors have to be.

    Raises:
        UsageError: it is said in several ways, or out of range.
    """
    problems = []
    said = {"--rank": rank, "--energy": energy, "--max-error": max_error}
    given = [name for name, value in said.items() if value is not None]
    if len(given) > 1:
        problems.append(Problem("these are ways to say the same", ", ".join(given), "one of them",
                                f"{len(given)}"))  # fmt: skip
    if rank is not None and rank < 1:
        problems.append(Problem("the rank has to be at least 1", "--rank", found=str(rank)))
    if energy is not None and not 0 < energy <= 1:
        problems.append(Problem("the energy has to be a share", "--energy", "above 0, up to 1",
                                f"{energy:g}"))  # fmt: skip
    if max_error is not None and not 0 < max_error < 1:
        problems.append(Problem("the error has to be a share", "--max-error", "between 0 and 1",
                                f"{max_error:g}"))  # fmt: skip
    if problems:
        raise UsageError(problems)
    return Wanted(rank if given else DEFAULT_RANK, energy, max_error)


def _fitted(
    models: Sequence[Checkpoint], output: OutputFolder, wanted: Wanted, dtype: str,
    modules: Sequence[str] | None, seed: int, progress: Progress | None,
) -> ExtractReport:  # fmt: skip
    """Fit all differences and write the adapter.

    Raises:
        UsageError: a name in ``modules`` is nobody's, or nothing differs.
        RegraftError: something cannot be read or written.
    """
    (base, base_codes), (tuned, tuned_codes) = (see(model) for model in models)
    pairs = pairs_of(base, tuned)
    if strange := list(unmatched(modules, pairs)):
        raise UsageError(
            "no module has this name, or ends in it", where="modules", expected="names of modules, "
            "such as q_proj", found=", ".join(strange), hint="`regraft inspect` lists them",
        )  # fmt: skip
    told = ProgressMeter(progress, "extract", sum(pair.tuned.nbytes for pair in pairs))
    with FilePool() as files, output.work() as work:
        work.begin("extract")
        work.keep_only(())
        sides = Sides(_source(files, base_codes), _source(files, tuned_codes))
        spool = Spool(work.folder / _SPOOL)
        found = extracted(pairs, sides, wanted, dtype, seed, chosen_by(modules), spool, told)
        _refuse_nothing(found, models)
        plain = found.plain(_name_of(models[0]), _task_of(tuned))
        new = write(plain, base)
        report = _report(found, plain, new, wanted, dtype)
        tokenizer = {} if tuned.single_file else dict(tokenizer_files(tuned.root))
        size = sum(file.nbytes for file in new)
        output.check_space(size + sum(path.stat().st_size for path in tokenizer.values()))
        _write(work, new, files)
        for name, path in tokenizer.items():
            copy_file(path, work.out / name)
        write_file(work.out / CARD, extracted_card(str(output.path), plain, report))
        (work.folder / _SPOOL).unlink()
        tell(progress, "finish", size)
    return report


def _source(files: FilePool, codes: Quantization | None) -> Source:
    return seen_through(codes, FileSource(files))


def _name_of(model: Checkpoint) -> str:
    """Return what the adapter's config calls its base."""
    return model.source


_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip


def _task_of(model: Checkpoint) -> str | None:
    """Return PEFT's word for what a model's class does."""
    classes = (model.config or {}).get("architectures") or [""]
    ends = (task for end, task in _TASKS.items() if str(classes[0]).endswith(end))
    return next(ends, None)


def _refuse_nothing(found: Extracted, models: Sequence[Checkpoint]) -> None:
    if not found.modules and not found.whole:
        raise UsageError(
            "there is nothing to extract: no tensor that was asked for differs from the base's",
            where=models[1].source, expected="a fine-tuned model", found="the base's own values",
            hint="Is TUNED the fine-tuned model, and BASE the one it was made from?",
        )  # fmt: skip


def _write(work: Workplace, new: Sequence[NewFile], files: FilePool) -> None:
    for file in new:
        write_pieces(work.out / file.name, file.pieces(files))


def _report(
    found: Extracted, plain: PlainAdapter, new: Sequence[NewFile], wanted: Wanted, dtype: str
) -> ExtractReport:
    modules = tuple(found.records)
    return ExtractReport(
        base="", tuned="", output="", exact=False,
        dtype=DTYPES[dtype].config_name,
        rank=wanted.rank, energy=wanted.energy, max_error=wanted.max_error,
        modules=modules,
        whole=tuple(plain.whole),
        left_out=tuple(found.left_out),
        unchanged=found.unchanged,
        error=overall(modules, [module.error_norm for module in modules]),
        uncertain=overall(modules, [module.uncertain_norm for module in modules]),
        bytes=next(file.nbytes for file in new if file.name == ADAPTER_SAFE),
        warnings=warnings_of(modules, found.left_out, wanted.rank),
        seconds=0.0, peak_memory=0,
    )  # fmt: skip
