"""The verbs that take work back: unmerge, swap, and clean, for what interrupted work has left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adapters.dialects.peft import read_adapter
from regraft.adapters.model import Adapter
from regraft.errors import InputError, MismatchError, Problem, UnsupportedError, UsageError
from regraft.formats.checkpoint import Checkpoint, open_checkpoint
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.reading import FilePool
from regraft.formats.files.watching import watched
from regraft.formats.hub import Located, locate
from regraft.formats.layout import is_gguf, looks_like
from regraft.formats.problems import capped
from regraft.merging.another_base import notes_of_another_base, warn
from regraft.merging.calls import merge_call
from regraft.merging.files.leftovers import Leftover, find_leftovers, remove_leftover
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.files.publish import out_path
from regraft.merging.files.receipt import Receipt, read_receipt
from regraft.merging.files.staging import Workplace
from regraft.merging.inputs.base import see
from regraft.merging.inputs.dequantized_view import Quantization
from regraft.merging.inputs.expert_stacks import with_version
from regraft.merging.inputs.opening import AdapterArg, open_adapters, parse_adapters
from regraft.merging.options import SUM, MergeOptions, parse_dtype
from regraft.merging.planning.plan import Plan, Step
from regraft.merging.planning.planner import fit_memory, make_plan, settled
from regraft.merging.planning.report import UnmergeReport
from regraft.merging.planning.targets import Target, merge_targets, plan_digest, shared_bytes
from regraft.merging.undo.corrections import corrections_of
from regraft.merging.undo.keeping import (
    UndoSettings,
    base_shards,
    base_targets,
    side_files,
    stand_in,
)
from regraft.merging.undo.manifest import (
    PATCH,
    UNDO,
    Manifest,
    check_kept,
    check_undo,
    read_manifest,
)
from regraft.merging.undo.merged_adapters import check_adapter, open_kept, weights_of
from regraft.merging.undo.patch import PatchReader
from regraft.progress import Progress, tell
from regraft.system.memory import peak_memory
from regraft.tensors import TensorSpec

if TYPE_CHECKING:
    from regraft.merging.execution.scheduler import OpenSource, Reuse
    from regraft.merging.undo.restore import Restoration

RECEIPT = "regraft/receipt.json"


@watched()
def unmerge(
    merged: str | Path,
    out: str | Path,
    *,
    adapters: AdapterArg | Sequence[AdapterArg] | None = None,
    max_memory: str | int = "512MiB",
    threads: int | None = None,
    overwrite: bool = False,
    reflink: str = "auto",
    digest_cache: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Give back the base of a merged model, byte for byte, without the base.

    Every tensor is held against the digest that the receipt has of the base's.

    Args:
        merged: the folder that :func:`regraft.merge` or :func:`swap` wrote, or a Hub id.
        out: the folder to make; it appears whole or not at all.
        adapters: the adapters that were merged, in their order; needed where the merge was told
            to keep no copy of them.
        max_memory: cap on resident memory, whatever the size of the model.
        threads: worker threads; by default three more than there are cores at hand.
        overwrite: replace ``out``, once the new one is complete, if it holds a model already.
        reflink: whether untouched tensors share blocks of the disk with the merged model; as in
            :func:`regraft.merge`.
        digest_cache: take the digests of tensors that stay as they are from earlier work, if their
            file is as it was; as there.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.

    Raises:
        RegraftError: one of :mod:`regraft.errors`; ``out`` is then as it was before the call.
        MismatchError: weights, adapter or patch have been changed since; lists every tensor.
    """
    started = time.perf_counter()
    output = OutputFolder.asked_for(out, merged, adapters, overwrite=overwrite)
    options = MergeOptions.of(
        max_memory=max_memory, threads=threads, reflink=reflink, digest_cache=digest_cache
    )
    tell(progress, "read", 0)
    found = _open_merged(merged, adapters, token, "--adapter")
    output.check_inputs(found.inputs)

    from regraft.merging.building import rebuild, reuse_of

    reuse = reuse_of(found.merged, output, options)
    if not reuse.share:
        output.check_space(found.base_bytes)

    with output.work() as work, FilePool() as files:
        patch = PatchReader(found.folder / UNDO / PATCH, files)
        undone = _undone(found, work, patch, options)
        targets = base_targets(undone.stored, found.manifest, patch)
        output.check_space(found.base_bytes - _shared(targets, undone, reuse))
        shards = base_shards(targets)
        steps = [step for target in targets for step in target.steps]
        count, tile, memory = fit_memory(steps, options, undone.steps, room=undone.recipe.room)
        made = Plan(
            undone.stored, (), shards, {}, {}, memory, count, tile, (), out=str(output.path)
        )
        open_source = _opener(undone, found)
        rebuild(made, targets, work, found.files, open_source, progress, reuse=reuse)
        names = _write_side_files(found, work)
    return UnmergeReport(
        merged=found.located.source,
        base=found.receipt.base.source,
        output=str(output.path),
        files=tuple(sorted([*(target.name for target in targets), *names])),
        left_out=found.manifest.left_out,
        tensors=len(undone.stored.tensors),
        bytes_written=made.nbytes,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        threads=count,
    )


@watched()
def swap(
    merged: str | Path,
    adapters: AdapterArg | Sequence[AdapterArg],
    out: str | Path,
    *,
    merged_adapters: AdapterArg | Sequence[AdapterArg] | None = None,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    max_memory: str | int = "512MiB",
    threads: int | None = None,
    overwrite: bool = False,
    quantize: str | None = None,
    rounding: str | None = None,
    seed: int = 0,
    double_quant: bool = False,
    method: str = "sum",
    density: float | None = None,
    peft_version: str | None = None,
    undo: bool | None = None,
    keep_adapter: bool = True,
    reflink: str = "auto",
    digest_cache: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Receipt:
    """Take a merge back and merge other adapters, in one pass over the weights.

    The result is what :func:`regraft.merge` makes of the base and the new adapters, byte for byte.

    Args:
        merged: the folder that :func:`regraft.merge` or :func:`swap` wrote, or a Hub id.
        adapters: the new adapters, as in :func:`regraft.merge`.
        out: the folder to make; it appears whole or not at all.
        merged_adapters: the adapters that were merged, where no copy of them was kept.
        dtype, shard_size, max_memory, threads, overwrite: as in :func:`regraft.merge`.
        quantize, rounding, seed, double_quant, peft_version: as in :func:`regraft.merge`.
        method, density: as there; those of the new adapters.
        undo, keep_adapter, token, progress, command: as in :func:`regraft.merge`.
        reflink, digest_cache: as there, for the files of ``merged``.

    Returns:
        The receipt, as it is in ``out/regraft/receipt.json``; its base is the original one.

    Raises:
        RegraftError: one of :mod:`regraft.errors`; ``out`` is then as it was before the call.
        MismatchError: weights, adapter or patch have been changed since; lists every tensor.
    """
    started = time.perf_counter()
    output = OutputFolder.asked_for(out, merged, adapters, merged_adapters, overwrite=overwrite)
    options = MergeOptions.of(
        dtype=dtype, shard_size=shard_size, max_memory=max_memory, threads=threads,
        quantize=quantize, rounding=rounding, seed=seed, double_quant=double_quant,
        method=method, density=density, peft_version=peft_version, undo=undo,
        keep_adapter=keep_adapter, reflink=reflink, digest_cache=digest_cache,
    )  # fmt: skip
    wanted = parse_adapters(adapters)
    tell(progress, "read", 0)
    found = _open_merged(merged, merged_adapters, token, "--merged-adapter")
    # A merged model has its base's modules and sizes, which is all that a dialect needs to be read.
    opened = open_adapters(wanted, token, peft_version, found.merged)
    read = [read_adapter(files, weight) for files, weight in opened]
    output.check_inputs([*found.inputs, *(adapter.inputs for adapter in read)])

    from regraft.merging.building import adapter_files, build, reuse_of
    from regraft.merging.compute.context import FACTOR_CACHE
    from regraft.merging.compute.factors import FactorStore

    reuse = reuse_of(found.merged, output, options)
    if not reuse.share:
        output.check_space(found.base_bytes)
    with output.work() as work, FilePool() as files:
        patch = PatchReader(found.folder / UNDO / PATCH, files)
        undone = _undone(found, work, patch, options)
        base, quantization = undone.seen_as(options.dtype)
        base, unsure = _with_config(base, found)
        options = settled(options, quantization)
        made = make_plan(
            base, read, options, output.path, undone.steps, quantization=quantization,
            room=undone.recipe.room,
        )  # fmt: skip
        restored = _opener(undone, found)(files, FactorStore(files, FACTOR_CACHE))
        notes = notes_of_another_base(read, base, quantization, restored)
        warn(notes, stacklevel=3)
        made = replace(made, warnings=(*made.warnings, *unsure, *notes))
        output.check_space(made.disk_bytes - _shared(merge_targets(made), undone, reuse))
        called = command or merge_call("swap", found.located.source, made)
        return build(
            made, work, [*found.files, *adapter_files(read)], called, started,
            keeping=UndoSettings(keep_adapter, found.manifest.left_out) if options.undo else None,
            open_source=_opener(undone, found), reuse=reuse, progress=progress,
        )  # fmt: skip


def clean(
    folders: str | Path | Sequence[str | Path] = ".", *, dry_run: bool = False
) -> list[Leftover]:
    """Remove what interrupted work has left beside its outputs; return what there was.

    Work that is going on is left alone, and so is that of other users.

    Args:
        folders: folders to look in (not in those below them), or outputs.
        dry_run: only look.

    Raises:
        InputError: there is no such folder.
        AccessError: one cannot be looked into, or something cannot be removed.
    """
    places = [folders] if isinstance(folders, str | Path) else list(folders)
    found = find_leftovers([out_path(place) for place in places])
    if not dry_run:
        for leftover in found:
            if leftover.own and not leftover.busy:
                remove_leftover(leftover)
    return found


# -- opening a merged model ------------------------------------------------------------------------


@dataclass(frozen=True)
class _MergedModel:
    """A merged model that keeps an undo."""

    located: Located
    folder: Path
    receipt: Receipt
    manifest: Manifest
    merged: Checkpoint
    adapters: tuple[Adapter, ...]

    @property
    def inputs(self) -> list[Path]:
        """The folders that are read."""
        return [self.folder, *(adapter.inputs for adapter in self.adapters)]

    @property
    def base_bytes(self) -> int:
        """Bytes of the base's weight files."""
        return sum(file.size for file in self.manifest.files)

    @property
    def files(self) -> list[Path]:
        """The files that decide what comes out."""
        undo = [p for p in (self.folder / UNDO).rglob("*") if p.is_file()]
        weights = [shard.path for shard in self.merged.shards]
        sides = [p for p in self.folder.iterdir() if p.is_file()]
        adapters = [path for adapter in self.adapters for path in adapter.files]
        return [*undo, *weights, *sides, *adapters, self.folder / RECEIPT]


@dataclass(frozen=True)
class _Undone:
    """A merge that is being taken back: its base's stand-in, its plan, and how tensors follow."""

    base: Checkpoint
    quantization: Quantization | None
    steps: dict[str, Step]
    recipe: Restoration

    @property
    def stored(self) -> Checkpoint:
        """The base as it was on disk."""
        return self.base if self.quantization is None else self.quantization.stored

    def seen_as(self, dtype: str | None) -> tuple[Checkpoint, Quantization | None]:
        """Return the base as a merge with this ``dtype`` sees it; see :func:`see`."""
        seen = (self.base, self.quantization)
        return see(self.stored, dtype) if self.stored.container == "gguf" else seen


def _open_merged(
    merged: str | Path, adapters: AdapterArg | Sequence[AdapterArg] | None, token: str | None,
    option: str,
) -> _MergedModel:  # fmt: skip
    """Open a merged model: receipt, manifest, weights by their headers, the adapters merged."""
    located = locate(merged, kind="merged", token=token)
    folder = located.path
    if not folder.is_dir():
        raise _no_folder(folder, str(merged))
    _check_is_model(folder, str(merged))
    check_kept(folder)
    receipt = read_receipt(folder / RECEIPT)
    check_undo(folder, receipt.files)
    manifest = read_manifest(folder, receipt)
    merged_now = open_checkpoint(located)
    opened = _merged_adapters(folder, receipt, manifest, adapters, token, option, merged_now)
    return _MergedModel(located, folder, receipt, manifest, merged_now, tuple(opened))


def _check_is_model(folder: Path, source: str) -> None:
    """Refuse an adapter in the place of a merged model.

    Raises:
        InputError: it is one.
    """
    if looks_like(folder) == "adapter":
        raise InputError(
            "is not a merged model", where=source, expected="what regraft merge or swap wrote",
            found="an adapter", hint="Name the merged model first, then its new adapters",
        )  # fmt: skip


def _no_folder(path: Path, shown: str) -> InputError:
    """Return the error for a file in the place of a merged model."""
    if is_gguf(path):
        return InputError(
            "a GGUF file keeps nothing to take a merge back with", where=shown,
            expected="a folder that regraft merged",
            hint="Keep the base, or merge into a folder (-o without .gguf), which keeps an undo",
        )  # fmt: skip
    return InputError("is not a merged model", where=shown, expected="a folder")


def _merged_adapters(
    folder: Path, receipt: Receipt, manifest: Manifest,
    given: AdapterArg | Sequence[AdapterArg] | None, token: str | None, option: str,
    model: Checkpoint,
) -> list[Adapter]:  # fmt: skip
    """Return the adapters that were merged: the kept copies, or those that the call names.

    Dialects that cannot be read without the base are read with the merged model, which has its
    modules and sizes.

    Raises:
        UsageError: others are given, or with other weights.
        InputError: none are given and none were kept.
        MismatchError: tensors of one have changed since the merge.
    """
    weights = weights_of(receipt)
    merged = _listed([record.source for record in receipt.adapters], weights)
    if given is not None:
        pairs = parse_adapters(given)
        if [weight for _, weight in pairs] != weights:
            found = _listed(*zip(*pairs, strict=True))
            what = "these are not the adapters that were merged"
            raise UsageError(what, where=option, expected=merged, found=found)
        opened = [files for files, _ in open_adapters(pairs, token, base=model)]
    elif None in manifest.adapters:
        raise InputError(
            "the merge kept no copy of its adapters", where=str(folder / UNDO), expected=merged,
            hint=f"Give them with {option}",
        )  # fmt: skip
    else:
        opened = open_kept(folder, [str(name) for name in manifest.adapters], receipt)
    for files, record in zip(opened, receipt.adapters, strict=True):
        check_adapter(files, record)
    opened = [with_version(files, receipt.options.get("peft_version")) for files in opened]
    return [read_adapter(files, weight) for files, weight in zip(opened, weights, strict=True)]


def _listed(sources: Sequence[str], weights: Sequence[float]) -> str:
    """Return adapters as they are given on the command line."""
    return ", ".join(f"{s}={w:g}" for s, w in zip(sources, weights, strict=True))


def _undone(
    found: _MergedModel, work: Workplace, patch: PatchReader, options: MergeOptions
) -> _Undone:
    """Make the base's stand-in and plan the old merge on it again.

    Raises:
        UnsupportedError: this version of regraft plans that merge in another way.
    """
    from regraft.merging.undo.restore import Restoration
    from regraft.merging.undo.turned_codes import room_for

    folder = work.fresh_base()
    source = found.receipt.base
    base = stand_in(found.folder, found.manifest, patch, folder)
    base = replace(base, source=source.source, revision=source.revision)
    recorded = found.receipt.options
    old = replace(
        options, dtype=parse_dtype(recorded.get("dtype")), shard_size=None, threads=1,
        quantize=recorded.get("quantize"), rounding=recorded.get("rounding"),
        seed=recorded.get("seed", 0), double_quant=recorded.get("double_quant", False),
        peft_version=recorded.get("peft_version"), method=recorded.get("method", SUM),
        density=recorded.get("density"),
    )  # fmt: skip
    base, quantization = see(base, old.dtype)
    made = make_plan(base, found.adapters, old, None, quantization=quantization)
    if plan_digest(made) != found.manifest.plan:
        raise UnsupportedError(
            "this merge cannot be taken back by this version of regraft, or with these adapters",
            where=str(found.folder), expected=f"regraft {found.receipt.regraft}, which made it",
            hint=f"Run it with that version: pip install regraft=={found.receipt.regraft}",
        )  # fmt: skip
    steps = {step.name: step for step in made.steps if step.is_invertible}
    kept = {keep.original.name: keep for keep in corrections_of(made, found.manifest.format)}
    _check_merged(found, made)
    recipe = Restoration(
        steps, kept, found.merged.tensors, source.tensors, old.rounding or "stochastic", old.seed,
        room_for(kept.values(), options.max_memory),
    )  # fmt: skip
    return _Undone(base, quantization, steps, recipe)


def _shared(targets: Sequence[Target], undone: _Undone, reuse: Reuse) -> int:
    """Return the bytes of files to be made that are to share blocks with the merged model's."""

    def origin(step: Step) -> TensorSpec | None:
        own = step.source_adapter is not None
        return step.source if own else undone.recipe.origin(step.source)

    return shared_bytes(targets, origin) if reuse.share else 0


def _with_config(base: Checkpoint, found: _MergedModel) -> tuple[Checkpoint, list[str]]:
    """Return a base that was one file with the merged model's config, and what to say of that.

    The config lay beside that file and is none of the base's own, so an undo does not keep it.
    """
    path = found.folder / "config.json"
    if base.config is not None or not found.manifest.single_file or not path.is_file():
        return base, []
    note = (
        "config.json is the merged model's: of a base that is one file none is kept. If the "
        "adapters that were merged changed it (another vocabulary or head), correct it"
    )
    return replace(base, config=read_json_object(path)), [note]


def _check_merged(found: _MergedModel, made: Plan) -> None:
    """Refuse merged weights that lack a tensor, or have it in another shape or dtype.

    Raises:
        MismatchError: they do; lists every tensor.
    """
    problems, known = [], made.base.tensors.keys() | made.stored.tensors.keys()
    for step in made.steps:
        there = found.merged.tensors.get(step.name)
        expected = f"{step.dtype} {list(step.shape)}"
        has = f"{there.dtype} {list(there.shape)}" if there is not None else "nothing"
        if step.name in known and has != expected:
            what = "the merged weights are not those that the patch was made for"
            problems.append(Problem(what, f"tensor {step.name!r}", expected, has))
    if problems:
        raise MismatchError(capped(problems, found.folder))


def _opener(undone: _Undone, found: _MergedModel) -> OpenSource:
    from regraft.merging.undo.restore import RestoringSource

    path = found.folder / UNDO / PATCH
    return lambda files, store: RestoringSource(
        undone.recipe, PatchReader(path, files), files, store
    )


def _write_side_files(found: _MergedModel, work: Workplace) -> list[str]:
    from regraft.merging.files.publish import write_file

    names = []
    for name, content in side_files(found.folder, found.manifest):
        write_file(work.out / name, content)
        names.append(name)
    return names
