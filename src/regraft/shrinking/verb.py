"""The verb that makes an adapter smaller.

open -> read pairs -> compare copies -> look at every value -> choose ranks -> measure -> write

Nothing is written before all of it is known to work out. Factors are computed twice, to be measured
and to be written: they take milliseconds, and need not be kept in memory that way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from regraft.adapters.dialects.peft import read_adapter
from regraft.adapters.model import Adapter
from regraft.adapters.wrappers import plain_config
from regraft.deltas.ranks.blas_threads import one_thread
from regraft.errors import AdapterError, NumericError, Problem, UsageError
from regraft.formats.adapter_files import AdapterFiles, adapter_folder
from regraft.formats.checkpoint import open_checkpoint
from regraft.formats.files.inside import read_whole, refuse_outside
from regraft.formats.files.reading import FilePool, typed_os_errors
from regraft.formats.files.watching import watched
from regraft.formats.hub import locate
from regraft.formats.layout import ADAPTER_CONFIG, ADAPTER_SAFE
from regraft.formats.problems import capped
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.files.publish import copy_file, write_file, write_pieces
from regraft.merging.files.side_files import CARD, SideFiles, adapter_side_files, json_bytes
from regraft.merging.inputs.any_dialect import dialect_at, open_adapter
from regraft.merging.inputs.base import open_base
from regraft.merging.options import parse_dtype
from regraft.progress import Progress, ProgressMeter, tell
from regraft.shrinking.card import shrunk_card
from regraft.shrinking.config import with_one_scale, with_ranks
from regraft.shrinking.copies import Copy, compare, copies_in
from regraft.shrinking.factors import measured, read_stored, reduced, squared_values
from regraft.shrinking.forms import (
    Form,
    is_uniform,
    refuse_uniform,
    scaled_by_config,
    uniform_forms,
    why_not_uniform,
)
from regraft.shrinking.report import EmbeddingCopy, ShrinkReport, ShrunkModule, overall_error
from regraft.shrinking.targets import (
    Pair,
    by_key,
    ranks_by_energy,
    ranks_by_size,
    read_pairs,
    refuse_reduction,
)
from regraft.shrinking.telling import error_warning, scale_note, uniform_note
from regraft.shrinking.tensors import (
    Item,
    content,
    dtypes_of,
    header_of,
    items_of,
    overflow_of,
    scan,
    too_large,
)
from regraft.system.memory import peak_memory
from regraft.tensors import DTYPES


@watched()
def shrink(
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    rank: int | None = None,
    energy: float | None = None,
    uniform: bool | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> ShrinkReport:
    """Write an adapter anew: in fewer bits, at a lower rank, without copies of the base's tensors.

    The rank is lowered by the singular value decomposition of each delta, which gives the best
    approximation of that rank (Eckart and Young 1936). What every delta is multiplied by stays, in
    the config, or in B where the form is uniform.

    Args:
        adapter: a folder in PEFT's format, its weights file, or a Hub id ``org/name[@revision]``.
        out: the folder to make; it appears whole or not at all.
        dtype: dtype of the factors: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        rank: the highest rank of a module; lower ones stay as they are, or are filled up with
            zeros where the form is uniform.
        energy: instead of ``rank``: the share of each delta's squared Frobenius norm to keep, above
            0 and up to 1; every module gets the smallest rank that does.
        uniform: True: write the uniform form, in which every scale is multiplied into B, all
            modules have one rank, and ``lora_alpha`` is ``r``, so that programs which read no
            patterns and no ``use_rslora`` (vLLM, llama.cpp) are right too. False: keep scales in
            the config. None: the uniform form where ``rank`` is given, such programs would
            otherwise be wrong, and the adapter has one.
        base: the base it was trained on; copies of its embeddings are then left out.
        overwrite: replace ``out``, once the new one is complete, if it holds an adapter.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.

    Returns:
        What became of every module and copy, and how far off it is.

    Raises:
        RegraftError: one of :mod:`regraft.errors`; ``out`` is then as it was before the call.
        UsageError: the call contradicts itself.
        AdapterError: the adapter contradicts itself, or holds NaN or infinity; lists every tensor.
        UnsupportedError: a feature that is not read, whose rank cannot be reduced, or that has no
            uniform form.
        NumericError: values are too large for the dtype; lists every tensor.
    """
    started = time.perf_counter()
    output = OutputFolder.asked_for(out, adapter, base, overwrite=overwrite, kind="adapter")
    choices = _choices(dtype, rank, energy, uniform)
    tell(progress, "read", 0)
    job = _opened(adapter, base, choices, token)
    output.check_inputs(job.inputs)
    with FilePool() as files, one_thread():
        told = ProgressMeter(progress, "shrink", job.work_bytes)
        lost = _looked_through(job, files, told)
        outcomes = _compared(job, token)
        dropped = {copy.name for copy in outcomes if copy.outcome == "dropped"}
        forms = _forms(job, _ranks(job, files))
        modules = _measured(
            job, forms, files, told, [p for n, p in lost.items() if n not in dropped]
        )
        dtypes = {name: kind for name, kind in job.dtypes.items() if name not in dropped}
        items = items_of(job.files, job.pairs, forms, dtypes)
        with typed_os_errors(job.files.root):
            sides = sum(path.stat().st_size for path in job.sides.files.values())
        output.check_space(_size(job, items) + sides)
        told.expect(sum(item.nbytes for item in items))
        report = _report(job, str(output.path), items, forms, modules, outcomes)
        card = _card(job, output.path, items, forms, report)
        _write(job, items, forms, files, card, output, told, progress)
    return replace(report, seconds=time.perf_counter() - started, peak_memory=peak_memory())


# -- opening ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ShrinkOptions:
    """The options, checked; ``dtype`` is safetensors' name."""

    dtype: str
    rank: int | None
    energy: float | None
    uniform: bool | None


@dataclass(frozen=True)
class _OpenedAdapter:
    """An adapter that is to be shrunk: files, factors, and the options of the call."""

    files: AdapterFiles
    adapter: Adapter
    pairs: list[Pair]
    copies: list[Copy]
    sides: SideFiles
    base: str | Path | None
    choices: _ShrinkOptions

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """What every tensor would be stored in, by name."""
        return dtypes_of(self.files, self.pairs, self.choices.dtype)

    @property
    def where(self) -> str:
        """How messages name the weights file."""
        return self.files.weights_shown

    @property
    def inputs(self) -> list[Path]:
        """What is read of this machine."""
        base = Path(os.path.expanduser(self.base)) if self.base is not None else None  # noqa: PTH111
        return [self.files.root, *([base] if base is not None and os.path.lexists(base) else [])]

    @property
    def work_bytes(self) -> int:
        """Bytes to look through, to measure and to write: what progress is counted in."""
        factors = [spec for pair in self.pairs for spec in (pair.target.a, pair.target.b)]
        read = sum(spec.nbytes for spec in (*self.files.tensors.values(), *factors))
        written = sum(
            spec.numel * DTYPES[self.dtypes[spec.name]].bits // 8
            for spec in self.files.tensors.values()
        )
        return read + written


def _choices(
    dtype: str, rank: int | None, energy: float | None, uniform: bool | None
) -> _ShrinkOptions:
    """Return the options, checked.

    Raises:
        UsageError: one is none, or two contradict each other.
    """
    problems = []
    if rank is not None and energy is not None:
        problems.append(Problem("rank and energy are two ways to say the same", "--energy",
                                "one of them", "both"))  # fmt: skip
    if rank is not None and rank < 1:
        problems.append(Problem("the rank has to be at least 1", "--rank", found=str(rank)))
    if energy is not None and not 0 < energy <= 1:
        problems.append(Problem("the energy has to be a share", "--energy", "above 0, up to 1",
                                f"{energy:g}"))  # fmt: skip
    if problems:
        raise UsageError(problems)
    return _ShrinkOptions(parse_dtype(dtype) or "BF16", rank, energy, uniform)


def _opened(
    adapter: str | Path, base: str | Path | None, choices: _ShrinkOptions, token: str | None
) -> _OpenedAdapter:
    """Open and read an adapter, from headers and its config.

    Raises:
        RegraftError: it cannot be read, or not be reduced.
    """
    located = locate(adapter, kind="adapter", token=token)
    in_need = base is not None and dialect_at(adapter_folder(located)[0]) is not None
    model = open_base(locate(str(base), kind="base", token=token)) if in_need else None
    files = open_adapter(located, model)
    read = read_adapter(files)
    pairs = read_pairs(read)
    if choices.rank is not None or choices.energy is not None:
        refuse_reduction(read, pairs, choices.rank)
    refuse_outside(files.root, ADAPTER_CONFIG)
    sides = adapter_side_files(files.root)
    return _OpenedAdapter(files, read, pairs, copies_in(files, read), sides, base, choices)


# -- before anything is written --------------------------------------------------------------------


def _looked_through(
    job: _OpenedAdapter, files: FilePool, told: ProgressMeter
) -> dict[str, Problem]:
    """Look at every value; return the refusal of each tensor, by name, that the dtype is too small
    for. Factors, and biases of B, are looked at once they have their new form.

    Raises:
        AdapterError: values are NaN or infinite; lists every such tensor.
    """
    problems, lost = list[Problem](), dict[str, Problem]()
    targets = [pair.target for pair in job.pairs]
    factors = {spec.name for t in targets for spec in (t.a, t.b, t.b_bias) if spec is not None}
    for name, spec in job.files.tensors.items():
        bad, beyond = scan(files, spec, job.dtypes[name])
        told.add(spec.nbytes)
        if bad:
            from regraft.merging.compute.factors import not_finite  # it brings the kernels along

            problems += not_finite(spec, bad).problems
        if beyond and name not in factors:
            lost[name] = too_large(name, job.where, beyond, job.dtypes[name])
    if problems:
        raise AdapterError(capped(problems, job.files.root))
    return lost


def _compared(job: _OpenedAdapter, token: str | None) -> tuple[EmbeddingCopy, ...]:
    """Say of every copy of an embedding what it is to the base's.

    Raises:
        RegraftError: the base cannot be opened or read.
    """
    if job.base is None or not job.copies:
        return tuple(EmbeddingCopy(c.spec.name, c.spec.nbytes, "not compared") for c in job.copies)
    checkpoint = open_checkpoint(locate(job.base, kind="base", token=token))
    outcomes = compare(job.copies, checkpoint)
    return tuple(
        EmbeddingCopy(copy.spec.name, copy.spec.nbytes, outcome)
        for copy, outcome in zip(job.copies, outcomes, strict=True)
    )


def _ranks(job: _OpenedAdapter, files: FilePool) -> list[int]:
    """Return the new rank of each pair."""
    if job.choices.energy is not None:
        squares = [squared_values(pair, read_stored(files, pair)) for pair in job.pairs]
        return ranks_by_energy(job.pairs, squares, job.choices.energy)
    if job.choices.rank is not None:
        return ranks_by_size(job.pairs, job.choices.rank)
    return [pair.rank for pair in job.pairs]


def _forms(job: _OpenedAdapter, ranks: Sequence[int]) -> list[Form]:
    """Return what each pair becomes.

    Raises:
        UnsupportedError: the uniform form was asked for, and the adapter has none.
    """
    asked, settings = job.choices.uniform, job.adapter.settings
    kept = scaled_by_config(ranks)
    if asked is False or (asked is None and job.choices.rank is None):
        return kept
    if asked is None and not scale_note(_config(job, kept), job.pairs, ranks):
        return kept
    if is_uniform(settings, job.pairs, ranks):
        return kept
    reason = why_not_uniform(settings, job.pairs)
    if reason and asked:
        raise refuse_uniform(job.adapter.label, reason)
    return kept if reason else uniform_forms(job.pairs, ranks)


def _measured(
    job: _OpenedAdapter,
    forms: Sequence[Form],
    files: FilePool,
    told: ProgressMeter,
    problems: list[Problem],
) -> tuple[ShrunkModule, ...]:
    """Return how far the new factors of each pair are from its own.

    Raises:
        NumericError: values are too large for the dtype; lists every tensor, those of ``problems``
            among them.
    """
    dtype, modules = job.choices.dtype, []
    for pair, form in zip(job.pairs, forms, strict=True):
        stored = read_stored(files, pair)
        new = reduced(pair, stored, form, dtype)
        too_much = overflow_of(pair, new, dtype, job.where)
        problems += too_much
        if not too_much:
            modules.append(measured(pair, stored, new, form, dtype))
        told.add(stored.a.nbytes + stored.b.nbytes)
    if problems:
        raise NumericError(capped(problems, job.files.root))
    return tuple(modules)


# -- writing ---------------------------------------------------------------------------------------


def _write(
    job: _OpenedAdapter, items: Sequence[Item], forms: Sequence[Form], files: FilePool,
    card: bytes | None, output: OutputFolder, told: ProgressMeter, progress: Progress | None,
) -> None:  # fmt: skip
    """Write the output beside its place, and rename it into it.

    Raises:
        RegraftError: something cannot be read or written.
    """
    with output.work() as work:
        work.begin("shrink")
        work.keep_only(())  # nothing of an earlier try is taken over
        write_file(work.out / ADAPTER_CONFIG, _config_bytes(job, forms))
        for name, path in job.sides.files.items():
            copy_file(path, work.out / name)
        if card is not None:
            write_file(work.out / CARD, card)
        pieces = content(items, job.pairs, forms, job.files.metadata, files, told)
        write_pieces(work.out / ADAPTER_SAFE, pieces)
        tell(progress, "finish", _size(job, items))


def _card(
    job: _OpenedAdapter,
    place: Path,
    items: Sequence[Item],
    forms: Sequence[Form],
    report: ShrinkReport,
) -> bytes | None:
    specs = [item.stored for item in items]
    old = job.sides.files.get(CARD)
    return shrunk_card(str(place), old, _config(job, forms), specs, report)


def _config_bytes(job: _OpenedAdapter, forms: Sequence[Form]) -> bytes:
    """Return the new config; where nothing in it changed, the old one byte for byte."""
    if _is_as_before(job, forms) and plain_config(job.files.config) == job.files.config:
        return read_whole(job.files.root / ADAPTER_CONFIG)
    return json_bytes(_config(job, forms))


def _config(job: _OpenedAdapter, forms: Sequence[Form]) -> Mapping[str, Any]:
    """Return the new config."""
    if _is_as_before(job, forms):
        return plain_config(job.files.config)
    if any(form.folded is not None for form in forms):
        return with_one_scale(job.files.config, job.adapter.settings, forms[0].rank)
    ranks = by_key(job.pairs, [form.rank for form in forms])
    return with_ranks(job.files.config, job.adapter.settings, ranks)


def _is_as_before(job: _OpenedAdapter, forms: Sequence[Form]) -> bool:
    """Whether the adapter has these ranks and scales already."""
    return all(form.is_that_of(pair) for pair, form in zip(job.pairs, forms, strict=True))


def _size(job: _OpenedAdapter, items: Sequence[Item]) -> int:
    """Return the size of a weights file."""
    return len(header_of(items, job.files.metadata)) + sum(item.nbytes for item in items)


# -- the report ------------------------------------------------------------------------------------


def _report(
    job: _OpenedAdapter, output: str, items: Sequence[Item], forms: Sequence[Form],
    modules: tuple[ShrunkModule, ...], copies: tuple[EmbeddingCopy, ...],
) -> ShrinkReport:  # fmt: skip
    """Return the report, without the time that writing will take."""
    dtype = DTYPES[job.choices.dtype].config_name
    with typed_os_errors(job.files.root):
        before = (job.files.root / job.files.weights_file).stat().st_size
    return ShrinkReport(
        adapter=job.files.source,
        revision=job.files.revision,
        base=str(job.base) if job.base is not None else None,
        output=output,
        dtype=dtype,
        dtypes_before=_dtypes_before(job.pairs),
        rank=job.choices.rank,
        energy=job.choices.energy,
        uniform=any(form.folded is not None for form in forms),
        error=overall_error(modules),
        modules=modules,
        copies=copies,
        tensors=len(items),
        bytes_before=before,
        bytes_after=_size(job, items),
        files=tuple(sorted(job.sides.files)),
        left_out=_left_out(job),
        warnings=(*job.sides.left_out, *filter(None, [error_warning(modules, dtype)])),
        notes=(*_notes(job, copies), *filter(None, [_scale_note(job, forms)])),
        seconds=0.0,
        peak_memory=0,
    )


def _dtypes_before(pairs: Sequence[Pair]) -> tuple[str, ...]:
    found = {spec.dtype for pair in pairs for spec in (pair.target.a, pair.target.b)}
    return tuple(sorted(DTYPES[name].config_name for name in found))


def _left_out(job: _OpenedAdapter) -> tuple[str, ...]:
    """Return what lies in the adapter's folder and does not go along; folders end with a slash."""
    sides = {name.partition("/")[0] for name in job.sides.files}
    along = {ADAPTER_CONFIG, job.files.weights_file, *sides}
    with typed_os_errors(job.files.root):
        names = [f"{p.name}/" if p.is_dir() else p.name for p in job.files.root.iterdir()]
    return tuple(sorted(name for name in names if name.rstrip("/") not in along))


def _scale_note(job: _OpenedAdapter, forms: Sequence[Form]) -> str:
    if any(form.folded is not None for form in forms):
        return uniform_note(job.pairs, forms)
    return scale_note(_config(job, forms), job.pairs, [form.rank for form in forms])


def _notes(job: _OpenedAdapter, copies: Sequence[EmbeddingCopy]) -> tuple[str, ...]:
    notes = [_note_on_copies(copies, outcome) for outcome in _KEPT]
    if job.base is not None and not copies:
        notes.append("the adapter holds no copies of embeddings, so the base was not read")
    if any(pair.target.magnitude is not None for pair in job.pairs):
        notes.append(
            "the adapter has DoRA magnitudes: they are kept as they are, and the errors are those "
            "of the deltas, not of the weights that come of both"
        )
    return tuple(note for note in notes if note)


_KEPT = {
    "not compared": "may be the base's own: name the base (--base), and those that are it are left "
    "out",
    "differs": "differ from the base's, and are kept",
    "absent": "have no tensor in the base to compare with, and are kept",
    "incomparable": "are stored by the base in a form that is not compared, and are kept",
}
"""What to say of copies that are kept, by their outcome."""


def _note_on_copies(copies: Sequence[EmbeddingCopy], outcome: str) -> str:
    found = [copy for copy in copies if copy.outcome == outcome]
    if not found:
        return ""
    names = ", ".join(copy.name for copy in found[:4]) + ", ..." * (len(found) > 4)
    size = sum(copy.bytes for copy in found) / 1e6
    return f"embeddings that the adapter holds copies of ({names}; {size:.3g} MB) {_KEPT[outcome]}"
