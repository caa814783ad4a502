"""The verb that makes one adapter of several.

open -> match modules -> make each, measured -> write

Nothing is written before all of it is known to work out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.dialects.as_peft import config_of, tensors_of, write
from regraft.adapters.dialects.form import NewFile, PlainAdapter
from regraft.adapters.dialects.shared.experts import single_experts
from regraft.combining.card import combined_card
from regraft.combining.inputs import Inputs, open_inputs
from regraft.combining.making import Maker, new_adapter, size_of
from regraft.combining.matching import Group, matched, replaced
from regraft.combining.outcome import Choices, NewFactors
from regraft.combining.report import (
    CombineReport,
    advice,
    overall_cosines,
    overall_disagreement,
    overall_error,
)
from regraft.deltas.methods.registry import Method
from regraft.deltas.ranks.blas_threads import one_thread
from regraft.errors import UsageError
from regraft.formats.files.reading import FilePool
from regraft.formats.files.watching import watched
from regraft.formats.layout import ADAPTER_SAFE
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.files.publish import copy_file, write_file, write_pieces
from regraft.merging.files.side_files import CARD, adapter_side_files
from regraft.merging.inputs.opening import AdapterArg
from regraft.merging.options import combining_options, parse_dtype
from regraft.progress import Progress, ProgressMeter, tell
from regraft.system.memory import peak_memory
from regraft.tensors import DTYPES, TensorSpec


@watched()
def combine(
    adapters: AdapterArg | Sequence[AdapterArg],
    out: str | Path | None,
    *,
    method: str = "sum",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: str = "float32",
    base: str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> CombineReport:
    """Make one adapter of several, which may differ in rank, targets, dtype and dialect.

    What is combined is deltas, ``scale * B A``, each with its adapter's weight; never factors by
    themselves, unless a method's name says so. The new adapter's scale is 1 everywhere.

    Args:
        adapters: two or more, each optionally with a weight: ``"path=0.7"`` or ``(path, 0.7)``.
        out: the folder to make, in PEFT's format; it appears whole or not at all. None with
            ``dry_run``.
        method: one of :data:`regraft.deltas.methods.registry.METHODS`.
        rank: the new rank; a module gets less where its deltas have less. By default the smallest
            that loses nothing but rounding.
        energy: instead of ``rank``: the share of each delta's squared Frobenius norm to keep, above
            0 and up to 1.
        density: the share of elements that a method keeps which takes elements out.
        seed: which random bits are used where a method draws.
        dtype: dtype of the factors: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        base: the base they are for: some dialects, and stacks of experts, take it; and adapters
            that have no module in common are combined only if it is named.
        dry_run: return the report and write nothing.
        overwrite: replace ``out``, once the new one is complete, if it holds an adapter.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.

    Returns:
        What became of every module, and how the adapters stand to each other.

    Raises:
        RegraftError: one of :mod:`regraft.errors`; ``out`` is then as it was before the call.
        UsageError: the call contradicts itself.
        MismatchError: the adapters are for other bases, or have nothing in common.
        UnsupportedError: something of theirs cannot be combined; lists every module.
        NumericError: values are too large for the dtype; lists every module.
    """
    started = time.perf_counter()
    output = _output(out, adapters, base, overwrite=overwrite, dry_run=dry_run)
    known, told_method = combining_options(
        method, rank=rank, energy=energy, density=density, seed=seed
    )
    choices = Choices(known, told_method, rank, energy, parse_dtype(dtype) or "F32")
    tell(progress, "read", 0)
    inputs = open_inputs(adapters, base, token)
    if output is not None:
        output.check_inputs(inputs.paths)
    groups = matched(inputs, method, known)
    _check_rank(groups, known, rank)
    with FilePool() as files, one_thread():
        rest = replaced(inputs, files)
        told = ProgressMeter(progress, "combine", sum(map(size_of, groups)))
        maker = Maker(groups, choices, files)
        made = maker.measured(told, inputs.adapters[0].files.root)
        plain = single_experts(new_adapter(inputs, groups, maker, rest), inputs.base)
        new = write(plain, inputs.base)
        told_of = _Call(inputs, method, choices, base, None if output is None else output.path)
        report = _report(told_of, made, plain, new)
        if output is not None:
            _write(output, inputs, plain, new, report, files, told, progress)
    return replace(report, seconds=time.perf_counter() - started, peak_memory=peak_memory())


# -- the call --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """What the report repeats of the call."""

    inputs: Inputs
    method: str
    choices: Choices
    base: str | Path | None
    out: Path | None


def _output(
    out: str | Path | None, adapters: object, base: object, *, overwrite: bool, dry_run: bool
) -> OutputFolder | None:
    """Return the folder to make; None where nothing is to be written.

    Raises:
        UsageError: there is none, and something is to be written.
    """
    if dry_run:
        return None
    if out is None:
        raise UsageError(
            "there is no folder to write to", where="out", expected="the name of a folder",
            found="none", hint="Give one (-o OUT), or --dry-run for the report alone",
        )  # fmt: skip
    return OutputFolder.asked_for(out, adapters, base, overwrite=overwrite, kind="adapter")


def _check_rank(groups: Sequence[Group], method: Method, rank: int | None) -> None:
    """Refuse a rank that no module can have.

    Raises:
        UsageError: it is one.
    """
    highest = max((method.highest_rank(g.ranks, g.sizes) for g in groups), default=0)
    if rank is not None and rank > highest:
        raise UsageError(
            "the rank is above what there is", where="--rank", expected=f"at most {highest}, the "
            "highest rank that the method's outcome has", found=str(rank),
            hint="Leave it out: the smallest rank that loses nothing is the default",
        )  # fmt: skip


# -- what was done ---------------------------------------------------------------------------------


def _report(
    call: _Call, made: Sequence[NewFactors], plain: PlainAdapter, new: Sequence[NewFile]
) -> CombineReport:
    """Return the report, without the time that writing will take."""
    modules = tuple(each.record for each in made)
    count = len(call.inputs.adapters)
    between = overall_cosines(modules, [each.products for each in made], count)
    signs = overall_disagreement(modules, count)
    options: dict[str, Any] = {}
    if call.choices.method.density is not None:
        options["density"] = call.choices.options.density
    if call.choices.rank is not None:
        options["rank"] = call.choices.rank
    if call.choices.energy is not None:
        options["energy"] = call.choices.energy
    return CombineReport(
        adapters=call.inputs.labels,
        weights=tuple(adapter.weight for adapter in call.inputs.adapters),
        base=None if call.base is None else str(call.base),
        output=None if call.out is None else str(call.out),
        method=call.method,
        options=options,
        dtype=DTYPES[call.choices.dtype].config_name,
        modules=modules,
        tensors=len(tensors_of(plain)),
        bytes=next(file.nbytes for file in new if file.name == ADAPTER_SAFE),
        error=overall_error(modules),
        cosines=_rows(between),
        disagreement=_rows(signs),
        advice=advice(between, signs),
        notes=_notes(call.inputs),
        seconds=0.0,
        peak_memory=0,
    )


def _rows(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)


def _notes(inputs: Inputs) -> tuple[str, ...]:
    """Return what is good to know of the adapters."""
    notes = [note for adapter in inputs.adapters for note in adapter.files.notes]
    named = {a.label: a.plain.base for a in inputs.adapters if a.plain.base}
    if len(set(named.values())) > 1:
        shown = ", ".join(f"{label}: {base}" for label, base in named.items())
        notes.append(f"the adapters name their base in several ways ({shown})")
    return tuple(dict.fromkeys(notes))


# -- writing ---------------------------------------------------------------------------------------


def _write(
    output: OutputFolder, inputs: Inputs, plain: PlainAdapter, new: Sequence[NewFile],
    report: CombineReport, files: FilePool, told: ProgressMeter, progress: Progress | None,
) -> None:  # fmt: skip
    """Write the output beside its place, and rename it into it.

    Raises:
        RegraftError: something cannot be read or written.
    """
    sides = _side_files(inputs)
    output.check_space(
        sum(file.nbytes for file in new) + sum(path.stat().st_size for path in sides.values())
    )
    told.expect(sum(file.nbytes for file in new))
    specs = [
        TensorSpec(name, moved.dtype, moved.shape, output.path, 0, moved.nbytes)
        for name, moved in tensors_of(plain).items()
    ]
    with output.work() as work:
        work.begin("combine")
        work.keep_only(())  # nothing of an earlier try is taken over
        for file in new:
            write_pieces(work.out / file.name, _counted(file.pieces(files), told))
        for name, path in sides.items():
            copy_file(path, work.out / name)
        card = combined_card(str(output.path), config_of(plain), specs, report)
        write_file(work.out / CARD, card)
        tell(progress, "finish", sum(file.nbytes for file in new))


def _side_files(inputs: Inputs) -> dict[str, Path]:
    """Return the tokenizer's files and such, of the first adapter that has each."""
    found: dict[str, Path] = {}
    for adapter in inputs.adapters:
        for name, path in adapter_side_files(adapter.files.root).files.items():
            if name != CARD:
                found.setdefault(name, path)
    return found


def _counted(pieces: Any, told: ProgressMeter) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        told.add(len(piece))
