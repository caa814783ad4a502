"""The verbs on checkpoints: merge, plan, check. The command line is a thin layer on these."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adapters.dialects.peft import read_adapter
from regraft.errors import Problem, RegraftError
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import is_there
from regraft.formats.files.watching import watched
from regraft.formats.hub import locate
from regraft.merging.another_base import notes_of_another_base, warn
from regraft.merging.calls import merge_call
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.files.publish import Kind, out_path
from regraft.merging.inputs.base import open_base, see
from regraft.merging.inputs.dequantized_view import check_scales
from regraft.merging.inputs.opening import AdapterArg, open_named, parse_adapters, read_adapters
from regraft.merging.options import MergeOptions
from regraft.merging.planning.base_drift import TrainedOn
from regraft.merging.planning.plan import Plan
from regraft.merging.planning.planner import make_plan, settled
from regraft.merging.planning.quantized.gguf_output import (
    check_container,
    decoded_to,
    format_of,
    is_gguf_output,
)
from regraft.merging.planning.report import CheckReport
from regraft.merging.planning.targets import merge_targets, shared_bytes
from regraft.progress import Progress, tell

if TYPE_CHECKING:
    from regraft.merging.files.receipt import Receipt


@watched()
def merge(
    base: str | Path | None,
    adapters: AdapterArg | Sequence[AdapterArg],
    out: str | Path,
    *,
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
    trained_on: str | Path | None = None,
    peft_version: str | None = None,
    undo: bool | None = None,
    keep_adapter: bool = True,
    reflink: str = "auto",
    digest_cache: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Receipt:
    """Merge adapters into a base checkpoint; write a plain Hugging Face model to ``out``.

    Args:
        base: a folder, a single ``.safetensors`` or ``.gguf`` file, or a Hub id
            ``org/name[@revision]``; plain or quantized. None for the one that the adapters name in
            their configs.
        adapters: one adapter or several, each optionally with a weight; see :data:`AdapterArg`.
        out: the folder to make; it appears whole or not at all. A name that ends in ``.gguf`` is
            one file, for a base in GGUF; receipt and undo lie in ``out.gguf.regraft`` beside it.
        dtype: dtype of all floating-point tensors; by default each keeps the base's. A quantized
            weight becomes a plain one of the dtype that its format computes in. Of a GGUF file the
            type of all matrices, also ``"q8_0"``, ``"q5_1"``, ``"q5_0"``, ``"q4_1"``, ``"q4_0"``.
        shard_size: largest weight file, such as ``"5GB"``; by default the base's files are kept.
        max_memory: cap on resident memory, whatever the size of the model.
        threads: worker threads; by default three more than there are cores at hand.
        overwrite: replace ``out``, once the new one is complete, if it holds a model already.
        quantize: ``"keep"``: a quantized base stays in its format, with its scales. Or the format
            that linear layers are put into: ``"nf4"``, ``"fp4"``, ``"int8"`` or ``"fp8"``.
        rounding: how values become codes: ``"stochastic"``, which keeps the deltas on average (by
            default where the base's format is kept), or ``"nearest"``.
        seed: which random bits that takes, and a ``method`` that draws; the same seed gives the
            same bytes on any machine.
        double_quant: quantize the scales of ``nf4`` or ``fp4`` too.
        method: how the adapters' deltas become one: ``"sum"``, or element by element ``"ties"``,
            ``"dare"``, ``"dare_ties"``, ``"della"``, ``"breadcrumbs"`` or ``"magnitude_prune"``.
        density: the share of elements of each delta that such a method keeps, above 0 and up to 1;
            by default the method's own.
        trained_on: the base that the adapters were trained on, where it is another one, such as
            the 4-bit version of this one. It changes no byte: the receipt says for each tensor how
            far apart the two are, against the delta.
        peft_version: the release of PEFT that trained adapters whose config does not say it, such
            as ``"0.18.0"``. Only square stacks of experts need it: PEFT 0.19 turned them round.
        undo: keep in ``out/regraft/undo`` what :func:`unmerge` and :func:`swap` need. By default
            it is kept, unless weights are put into another quantized format, or with ``dtype`` into
            another type of a GGUF file: that would take a copy of them. Of a GGUF file it lies in
            ``out.gguf.regraft/undo``.
        keep_adapter: keep a copy of the adapters there too; else they have to be given then.
        reflink: whether untouched tensors share blocks of the disk with the base, which takes no
            time and no room: ``"auto"`` where the file system can (XFS, btrfs), ``"never"``, or
            ``"always"``, which refuses where it cannot. The bytes are the same.
        digest_cache: take the digests of tensors whose file is as it was from earlier work, and
            keep those of this work; the receipt says which were known. By default all is read and
            hashed: the times of a file do not tell of every change.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.
        command: how the receipt and the card say it was made.

    Returns:
        The receipt, as it is in ``out/regraft/receipt.json``.

    Raises:
        RegraftError: one of :mod:`regraft.errors`; ``out`` is then as it was before the call. If
            the machine fell short, what is done so far is kept: the same call goes on from there.
    """
    started = time.perf_counter()
    kind: Kind = "gguf" if is_gguf_output(out) else "model"
    folder = OutputFolder.asked_for(out, base, adapters, trained_on, overwrite=overwrite, kind=kind)
    quantize = format_of(out, quantize)
    options = MergeOptions.of(
        dtype=dtype, shard_size=shard_size, max_memory=max_memory, threads=threads,
        quantize=quantize, rounding=rounding, seed=seed, double_quant=double_quant,
        method=method, density=density, peft_version=peft_version, undo=undo,
        keep_adapter=keep_adapter, reflink=reflink, digest_cache=digest_cache,
    )  # fmt: skip
    wanted = parse_adapters(adapters)
    tell(progress, "read", 0)
    checkpoint, opened = open_named(base, wanted, token, peft_version)
    made = _plan(checkpoint, opened, options, folder, trained_on=_trained_on(trained_on, token))
    if made.quantization is not None:
        check_scales(made.quantization)

    from regraft.merging.building import build, deciding_files, make_room
    from regraft.merging.undo.keeping import UndoSettings

    reuse = make_room(made, folder, options)

    with folder.work() as work:
        called = command or merge_call("merge", made.base.source, made)
        return build(
            made, work, deciding_files(made), called, started,
            keeping=UndoSettings(keep_adapter) if made.options["undo"] else None, reuse=reuse,
            progress=progress,
        )  # fmt: skip


@watched(to_the_end=True)
def plan(
    base: str | Path | None,
    adapters: AdapterArg | Sequence[AdapterArg],
    out: str | Path | None = None,
    *,
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
    reflink: str = "auto",
    token: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Return what :func:`merge` would do, from headers alone; nothing is written.

    Of a base on the Hub too, only headers are read. Disk space is reported, not asked for: what
    shares blocks of the disk with the base (``reflink``) takes none.

    Raises:
        RegraftError: what :func:`merge` would raise of its inputs, and of ``out`` if it is given.
    """
    quantize = format_of(out, quantize)
    options = MergeOptions.of(
        dtype=dtype, shard_size=shard_size, max_memory=max_memory, threads=threads,
        quantize=quantize, rounding=rounding, seed=seed, double_quant=double_quant,
        method=method, density=density, peft_version=peft_version, undo=undo, reflink=reflink,
    )  # fmt: skip
    wanted = parse_adapters(adapters)
    tell(progress, "read", 0)
    checkpoint, opened = open_named(base, wanted, token, peft_version, headers_only=True)
    kind: Kind = "gguf" if is_gguf_output(out) else "model"
    folder = OutputFolder(out_path(out), overwrite, kind) if out is not None else None
    made = _plan(checkpoint, opened, options, folder)
    if folder is not None:
        folder.check_place()
        made = replace(made, disk=folder.disk(made.disk_bytes - _shared(made, folder, reflink)))
    return replace(made, warnings=(*made.warnings, *_said_of_sides(made)))


def _shared(made: Plan, folder: OutputFolder, reflink: str) -> int:
    """Return the bytes of an output that are to share blocks with files that are here.

    Raises:
        EnvironmentShortfall: blocks cannot be shared, and always shall be.
    """
    here = [shard.path for shard in made.stored.shards if is_there(shard.path)]
    share = bool(here) and folder.shares(here, reflink)
    return shared_bytes(merge_targets(made)) if share else 0


def _said_of_sides(made: Plan) -> tuple[str, ...]:
    from regraft.merging.planning.sides import sides_of

    return sides_of(made).warnings


def _plan(
    base: Checkpoint,
    opened: Sequence[tuple[AdapterFiles, float]],
    options: MergeOptions,
    folder: OutputFolder | None,
    *,
    trained_on: TrainedOn | None = None,
) -> Plan:
    if folder is not None:
        check_container(folder.path, base, options)
    read = read_adapters(opened)
    plain, quantization = see(base, decoded_to(base, options))
    options = settled(options, quantization)
    out = folder.path if folder is not None else None
    made = make_plan(plain, read, options, out, quantization=quantization, trained_on=trained_on)
    notes = notes_of_another_base(read, plain, quantization)
    warn(notes, stacklevel=4)
    made = replace(made, warnings=(*made.warnings, *notes))
    if folder is None:
        return made
    files = [shard.path for shard in base.shards] if base.single_file else [base.root]
    folder.check_inputs([*files, *(adapter.inputs for adapter in read)])
    return replace(made, disk=folder.disk(made.disk_bytes))


def _trained_on(other: str | Path | None, token: str | None) -> TrainedOn | None:
    """Open the base that adapters were trained on.

    Raises:
        RegraftError: it cannot be opened, or read as weights.
    """
    if other is None:
        return None
    found = TrainedOn(*see(open_base(locate(other, kind="base", token=token))))
    if found.quantization is not None:
        check_scales(found.quantization)
    return found


def check_opened(
    checkpoint: Checkpoint, opened: Sequence[tuple[AdapterFiles, float]], options: MergeOptions
) -> CheckReport:
    """Say whether adapters would merge into a base; see :func:`regraft.check`, which opens them.

    Raises:
        InputError: what is opened cannot be read.
    """
    read, problems = [], list[Problem]()
    for files, weight in opened:
        try:
            read.append(read_adapter(files, weight))
        except RegraftError as error:
            problems += error.problems
    try:
        plain, quantization = see(checkpoint, decoded_to(checkpoint, options))
        options = settled(options, quantization)
        made = make_plan(plain, read, options, None, quantization=quantization)
        made = replace(made, warnings=(*made.warnings, *_said_of_sides(made)))
    except RegraftError as error:
        return CheckReport(False, (*problems, *error.problems))
    if problems:
        return CheckReport(False, tuple(problems), made.warnings)
    notes = notes_of_another_base(read, plain, quantization)
    warn(notes, stacklevel=4)  # the frame that calls regraft.check, past what watches its inputs
    summary = {**made.totals(), "memory": made.memory}
    return CheckReport(True, (), (*made.warnings, *notes), summary)
