"""The verbs that take work back: unmerge, swap, and clean, for what interrupted work has left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adapters.dialects.peft import read_adapter
from regraft.errors import MismatchError, Problem, UnsupportedError, UsageError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.reading import FilePool
from regraft.formats.files.watching import watched
from regraft.formats.problems import capped
from regraft.merging.another_base import notes_of_another_base, warn
from regraft.merging.calls import merge_call
from regraft.merging.files.leftovers import Leftover, find_leftovers, remove_leftover
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.files.publish import Kind, out_path
from regraft.merging.files.receipt import Receipt
from regraft.merging.files.staging import Workplace
from regraft.merging.inputs.base import see
from regraft.merging.inputs.dequantized_view import Quantization
from regraft.merging.inputs.opening import AdapterArg, open_adapters, parse_adapters
from regraft.merging.options import SUM, MergeOptions, parse_dtype
from regraft.merging.planning.plan import Plan, Step
from regraft.merging.planning.planner import fit_memory, make_plan, settled
from regraft.merging.planning.quantized.gguf_output import (
    check_container,
    decoded_to,
    format_of,
    is_gguf_output,
)
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
from regraft.merging.undo.merged_model import MergedModel, base_name, open_merged
from regraft.merging.undo.patch import PatchReader
from regraft.progress import Progress, tell
from regraft.system.memory import peak_memory
from regraft.tensors import TensorSpec

if TYPE_CHECKING:
    from regraft.merging.execution.scheduler import OpenSource, Reuse
    from regraft.merging.undo.restore import Restoration


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
        merged: the folder or GGUF file that :func:`regraft.merge` or :func:`swap` wrote, or a Hub
            id.
        out: the folder to make; it appears whole or not at all. A name that ends in ``.gguf`` is
            one file, for a base that was one.
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
    kind = _kind_of(out)
    output = OutputFolder.asked_for(out, merged, adapters, overwrite=overwrite, kind=kind)
    options = MergeOptions.of(
        max_memory=max_memory, threads=threads, reflink=reflink, digest_cache=digest_cache
    )
    tell(progress, "read", 0)
    found = open_merged(merged, adapters, token, "--adapter")
    output.check_inputs(found.inputs)
    lone = base_name(output.path, found) if kind == "gguf" else None

    from regraft.merging.building import rebuild, reuse_of

    reuse = reuse_of(found.merged, output, options)
    if not reuse.share:
        output.check_space(found.base_bytes)

    with output.work() as work, FilePool() as files:
        patch = PatchReader(found.patch, files)
        undone = _undone(found, work, patch, options)
        targets = base_targets(undone.whole, found.manifest, patch, found.place)
        targets = [replace(target, name=lone or target.name) for target in targets]
        output.check_space(found.base_bytes - _shared(targets, undone, reuse))
        shards = base_shards(targets)
        steps = [step for target in targets for step in target.steps]
        count, tile, memory = fit_memory(steps, options, undone.steps, room=undone.recipe.room)
        made = Plan(
            undone.stored, (), shards, {}, {}, memory, count, tile, (), out=str(output.path)
        )
        open_source = _opener(undone, found)
        rebuild(made, targets, work, found.files, open_source, progress, reuse=reuse)
        names = [] if found.is_gguf else _write_side_files(found, work)
    return UnmergeReport(
        merged=found.located.source,
        base=found.receipt.base.source,
        output=str(output.path),
        files=tuple(sorted([*(target.name for target in targets), *names])),
        left_out=found.manifest.left_out,
        tensors=len(undone.whole.tensors),
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
        merged: the folder or GGUF file that :func:`regraft.merge` or :func:`swap` wrote, or a Hub
            id.
        adapters: the new adapters, as in :func:`regraft.merge`.
        out: the folder to make; it appears whole or not at all. A name that ends in ``.gguf`` is
            one file, as in :func:`regraft.merge`.
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
    output = OutputFolder.asked_for(
        out, merged, adapters, merged_adapters, overwrite=overwrite, kind=_kind_of(out)
    )
    quantize = format_of(out, quantize)
    options = MergeOptions.of(
        dtype=dtype, shard_size=shard_size, max_memory=max_memory, threads=threads,
        quantize=quantize, rounding=rounding, seed=seed, double_quant=double_quant,
        method=method, density=density, peft_version=peft_version, undo=undo,
        keep_adapter=keep_adapter, reflink=reflink, digest_cache=digest_cache,
    )  # fmt: skip
    wanted = parse_adapters(adapters)
    tell(progress, "read", 0)
    found = open_merged(merged, merged_adapters, token, "--merged-adapter")
    # A merged model has its base's modules and sizes, which is all that a dialect needs to be read.
    opened = open_adapters(wanted, token, peft_version, found.merged)
    read = [read_adapter(files, weight) for files, weight in opened]
    output.check_inputs([*found.inputs, *(adapter.inputs for adapter in read)])
    _check_container(output, found, options)

    from regraft.merging.building import adapter_files, build, reuse_of
    from regraft.merging.compute.context import FACTOR_CACHE
    from regraft.merging.compute.factors import FactorStore

    reuse = reuse_of(found.merged, output, options)
    if not reuse.share:
        output.check_space(found.base_bytes)
    with output.work() as work, FilePool() as files:
        patch = PatchReader(found.patch, files)
        undone = _undone(found, work, patch, options)
        base, quantization = undone.seen_as(decoded_to(undone.stored, options))
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


# -- a merge that is taken back -------------------------------------------------------------------


@dataclass(frozen=True)
class _Undone:
    """A merge that is being taken back: its base's stand-in, its plan, and how tensors follow.

    Attributes:
        base, quantization: the base as the merge saw it, and how it is quantized.
        whole: the base as it was on disk, with tensors that no weight is made of.
        steps: those of the merge that can be run backwards, by name.
        recipe: how the base's tensors follow.
    """

    base: Checkpoint
    quantization: Quantization | None
    whole: Checkpoint
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


def _kind_of(out: object) -> Kind:
    """Return what an output is, by its name."""
    return "gguf" if is_gguf_output(out) else "model"


def _check_container(output: OutputFolder, found: MergedModel, options: MergeOptions) -> None:
    """Refuse an output that is one GGUF file where what is swapped is none, and the other way.

    Raises:
        UnsupportedError, UsageError: it is.
    """
    if is_gguf_output(output.path) and not found.is_gguf:
        raise UsageError(
            "a GGUF file is swapped into one, and this is a folder", where=str(output.path),
            expected="a folder", found=str(found.place),
            hint="Take the merge back with regraft unmerge, and merge the base into a GGUF file",
        )  # fmt: skip
    if found.is_gguf:
        check_container(output.path, found.merged, options)


def _undone(
    found: MergedModel, work: Workplace, patch: PatchReader, options: MergeOptions
) -> _Undone:
    """Make the base's stand-in and plan the old merge on it again.

    Raises:
        UnsupportedError: this version of regraft plans that merge in another way.
    """
    from regraft.merging.undo.restore import Restoration
    from regraft.merging.undo.turned_codes import room_for

    folder = work.fresh_base()
    source = found.receipt.base
    base = stand_in(found.place, found.manifest, patch, folder)
    base = replace(base, source=source.source, revision=source.revision)
    recorded = found.receipt.options
    dtype = parse_dtype(recorded.get("dtype"), blocks=found.is_gguf)
    old = replace(
        options, dtype=dtype, shard_size=None, threads=1,
        quantize=recorded.get("quantize"), rounding=recorded.get("rounding"),
        seed=recorded.get("seed", 0), double_quant=recorded.get("double_quant", False),
        peft_version=recorded.get("peft_version"), method=recorded.get("method", SUM),
        density=recorded.get("density"),
    )  # fmt: skip
    base, quantization = see(base, decoded_to(base, old))
    made = make_plan(base, found.adapters, old, None, quantization=quantization)
    if plan_digest(made) != found.manifest.plan:
        raise UnsupportedError(
            "this merge cannot be taken back by this version of regraft, or with these adapters",
            where=str(found.place), expected=f"regraft {found.receipt.regraft}, which made it",
            hint=f"Run it with that version: pip install regraft=={found.receipt.regraft}",
        )  # fmt: skip
    steps = {step.name: step for step in made.steps if step.is_invertible}
    kept = {keep.original.name: keep for keep in corrections_of(made, found.manifest.format)}
    _check_merged(found, made)
    recipe = Restoration(
        steps, kept, found.merged.tensors, source.tensors, old.rounding or "stochastic", old.seed,
        room_for(kept.values(), options.max_memory),
    )  # fmt: skip
    return _Undone(base, quantization, made.stored, steps, recipe)


def _shared(targets: Sequence[Target], undone: _Undone, reuse: Reuse) -> int:
    """Return the bytes of files to be made that are to share blocks with the merged model's."""

    def origin(step: Step) -> TensorSpec | None:
        own = step.source_adapter is not None
        return step.source if own else undone.recipe.origin(step.source)

    return shared_bytes(targets, origin) if reuse.share else 0


def _with_config(base: Checkpoint, found: MergedModel) -> tuple[Checkpoint, list[str]]:
    """Return a base that was one file with the merged model's config, and what to say of that.

    The config lay beside that file and is none of the base's own, so an undo does not keep it.
    """
    path = found.place / "config.json"
    if base.config is not None or not found.manifest.single_file or not path.is_file():
        return base, []
    note = (
        "config.json is the merged model's: of a base that is one file none is kept. If the "
        "adapters that were merged changed it (another vocabulary or head), correct it"
    )
    return replace(base, config=read_json_object(path)), [note]


def _check_merged(found: MergedModel, made: Plan) -> None:
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
        raise MismatchError(capped(problems, found.place))


def _opener(undone: _Undone, found: MergedModel) -> OpenSource:
    from regraft.merging.undo.restore import RestoringSource

    return lambda files, store: RestoringSource(
        undone.recipe, PatchReader(found.patch, files), files, store
    )


def _write_side_files(found: MergedModel, work: Workplace) -> list[str]:
    from regraft.merging.files.publish import write_file

    names = []
    for name, content in side_files(found.place, found.manifest):
        write_file(work.out / name, content)
        names.append(name)
    return names
