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
from regraft.formats.files.watching import watched
from regraft.formats.hub import locate
from regraft.merging.another_base import notes_of_another_base, warn
from regraft.merging.files.publish import (
    SLACK_BYTES,
    check_output,
    check_space,
    free_bytes,
    out_path,
    replaced_inputs,
)
from regraft.merging.inputs.base import open_base, open_base_headers, see
from regraft.merging.inputs.dequantized_view import check_scales
from regraft.merging.planning.base_drift import TrainedOn
from regraft.merging.planning.options import (
    AdapterArg,
    Coding,
    base_named_by,
    choices_of,
    open_inputs,
    parse_adapters,
    read_adapters,
    refuse_swapped,
)
from regraft.merging.planning.plan import Plan
from regraft.merging.planning.planner import Choices, make_plan, settled
from regraft.merging.planning.quantized_output import KEEP
from regraft.merging.planning.report import CheckReport
from regraft.progress import Progress, tell
from regraft.system.memory import peak_memory

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
    trained_on: str | Path | None = None,
    peft_version: str | None = None,
    undo: bool | None = None,
    keep_adapter: bool = True,
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
        out: the folder to make; it appears whole or not at all.
        dtype: dtype of all floating-point tensors; by default each keeps the base's. A quantized
            weight becomes a plain one of the dtype that its format computes in.
        shard_size: largest weight file, such as ``"5GB"``; by default the base's files are kept.
        max_memory: cap on resident memory, whatever the size of the model.
        threads: worker threads; by default three more than there are cores at hand.
        overwrite: replace ``out``, once the new one is complete, if it holds a model already.
        quantize: ``"keep"``: a quantized base stays in its format, with its scales. Or the format
            that linear layers are put into: ``"nf4"``, ``"fp4"``, ``"int8"`` or ``"fp8"``.
        rounding: how values become codes: ``"stochastic"``, which keeps the deltas on average (by
            default where the base's format is kept), or ``"nearest"``.
        seed: which random bits that takes; the same seed gives the same bytes on any machine.
        double_quant: quantize the scales of ``nf4`` or ``fp4`` too.
        trained_on: the base that the adapters were trained on, where it is another one, such as
            the 4-bit version of this one. It changes no byte: the receipt says for each tensor how
            far apart the two are, against the delta.
        peft_version: the release of PEFT that trained adapters whose config does not say it, such
            as ``"0.18.0"``. Only square stacks of experts need it: PEFT 0.19 turned them round.
        undo: keep in ``out/regraft/undo`` what :func:`unmerge` and :func:`swap` need. By default
            it is kept, unless weights are put into another quantized format: that would take a copy
            of them.
        keep_adapter: keep a copy of the adapters there too; else they have to be given then.
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
    place = out_path(out)
    inputs = replaced_inputs(place, base, adapters, trained_on)
    check_output(place, inputs, overwrite=overwrite)  # before anything is fetched from the Hub
    coding = Coding(quantize, rounding, seed, double_quant)
    choices = choices_of(
        dtype, shard_size, max_memory, threads, undo, keep_adapter, coding,
        peft_version,
    )  # fmt: skip
    wanted = parse_adapters(adapters)
    tell(progress, "read", 0)
    base = base_named_by(wanted, token) if base is None else base
    refuse_swapped(base, wanted)
    named = base
    checkpoint, opened = open_inputs(
        lambda: open_base(locate(named, kind="base", token=token)), wanted, token, peft_version
    )
    made = _plan(
        checkpoint, opened, choices, place, overwrite=overwrite,
        trained_on=_trained_on(trained_on, token),
    )  # fmt: skip
    if made.quantization is not None:
        check_scales(made.quantization)
    check_space(place, made.disk_bytes)

    from regraft.merging.building import build
    from regraft.merging.files.staging import workplace
    from regraft.merging.undo.keeping import Keeping

    with workplace(place, overwrite=overwrite) as work:
        called = command or call_of("merge", made.base.source, made)
        return build(
            made, work, _inputs(made), called, lambda: _used(started, made),
            keeping=Keeping(keep_adapter) if made.options["undo"] else None, progress=progress,
        )  # fmt: skip


def _inputs(made: Plan) -> list[Path]:
    """Return the files that decide what a merge writes."""
    weights = [shard.path for shard in made.base.shards]
    sides = [] if made.base.single_file else [p for p in made.base.root.iterdir() if p.is_file()]
    if made.trained_on is not None:
        weights += [shard.path for shard in made.trained_on.base.shards]
    adapters = [path for adapter in made.adapters for path in Path(adapter.root).iterdir()]
    return [*weights, *sides, *(path for path in adapters if path.is_file())]


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
    peft_version: str | None = None,
    undo: bool | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Return what :func:`merge` would do, from headers alone; nothing is written.

    Of a base on the Hub too, only headers are read. Disk space is reported, not asked for.

    Raises:
        RegraftError: what :func:`merge` would raise of its inputs, and of ``out`` if it is given.
    """
    coding = Coding(quantize, rounding, seed, double_quant)
    choices = choices_of(
        dtype, shard_size, max_memory, threads, undo, coding=coding, peft_version=peft_version
    )
    wanted = parse_adapters(adapters)
    tell(progress, "read", 0)
    base = base_named_by(wanted, token) if base is None else base
    refuse_swapped(base, wanted)
    named = base
    checkpoint, opened = open_inputs(
        lambda: open_base_headers(named, token), wanted, token, peft_version
    )
    place = out_path(out) if out is not None else None
    made = _plan(checkpoint, opened, choices, place, overwrite=overwrite)
    return replace(made, warnings=(*made.warnings, *_said_of_sides(made)))


def _said_of_sides(made: Plan) -> tuple[str, ...]:
    from regraft.merging.finalize import sides_of

    return sides_of(made).warnings


def _plan(
    base: Checkpoint,
    opened: Sequence[tuple[AdapterFiles, float]],
    choices: Choices,
    out: Path | None,
    *,
    overwrite: bool,
    trained_on: TrainedOn | None = None,
) -> Plan:
    read = read_adapters(opened)
    plain, quantization = see(base, choices.dtype)
    choices = settled(choices, quantization)
    made = make_plan(plain, read, choices, out, quantization=quantization, trained_on=trained_on)
    notes = notes_of_another_base(read, plain, quantization)
    warn(notes, stacklevel=4)
    made = replace(made, warnings=(*made.warnings, *notes))
    if out is None:
        return made
    files = [shard.path for shard in base.shards] if base.single_file else [base.root]
    check_output(out, [*files, *(Path(a.root) for a in read)], overwrite=overwrite)
    disk = {"needed": made.disk_bytes + SLACK_BYTES, "free": free_bytes(out)}
    return replace(made, disk=disk)


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


@watched(to_the_end=True)
def check(
    base: str | Path | None,
    adapters: AdapterArg | Sequence[AdapterArg],
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    max_memory: str | int = "512MiB",
    peft_version: str | None = None,
    token: str | None = None,
) -> CheckReport:
    """Say whether adapters would merge into a base, with everything that stands in the way.

    Reads headers, and of an adapter that carries a fingerprint a few values of the base. NaN in an
    adapter, which headers do not show, is found by the merge itself.

    Of a base on the Hub too, only headers are read.

    Raises:
        UsageError: the call contradicts itself.
        InputError: the base or an adapter cannot be opened at all.
        EnvironmentShortfall: an input cannot be read, or needs an optional package.
    """
    coding = Coding(quantize)
    choices = choices_of(
        dtype, None, max_memory, None, None, coding=coding, peft_version=peft_version
    )
    wanted = parse_adapters(adapters)
    base = base_named_by(wanted, token) if base is None else base
    refuse_swapped(base, wanted)
    named = base
    checkpoint, opened = open_inputs(
        lambda: open_base_headers(named, token), wanted, token, peft_version
    )
    read, problems = [], list[Problem]()
    for files, weight in opened:
        try:
            read.append(read_adapter(files, weight))
        except RegraftError as error:
            problems += error.problems
    try:
        plain, quantization = see(checkpoint, choices.dtype)
        choices = settled(choices, quantization)
        made = make_plan(plain, read, choices, None, quantization=quantization)
        made = replace(made, warnings=(*made.warnings, *_said_of_sides(made)))
    except RegraftError as error:
        return CheckReport(False, (*problems, *error.problems))
    if problems:
        return CheckReport(False, tuple(problems), made.warnings)
    notes = notes_of_another_base(read, plain, quantization)
    warn(notes, stacklevel=3)
    summary = {**made.totals(), "memory": made.memory}
    return CheckReport(True, (), (*made.warnings, *notes), summary)


def call_of(verb: str, base: str, made: Plan) -> str:
    """Return the Python call that carries a plan out, for its receipt."""
    adapters = ", ".join(repr((a.source, a.weight)) for a in made.adapters)
    format = made.options.get("quantize")
    usual = {
        "dtype": None, "shard_size": None, "undo": format in (None, KEEP), "seed": 0,
        "rounding": "stochastic" if format == KEEP else "nearest", "double_quant": False,
    }  # fmt: skip
    chosen = "".join(f", {n}={v!r}" for n, v in made.options.items() if v != usual.get(n))
    return f"regraft.{verb}({base!r}, [{adapters}], {made.out!r}{chosen})"


def _used(started: float, made: Plan) -> tuple[float, int, int]:
    """Return seconds, peak resident bytes and threads."""
    return time.perf_counter() - started, peak_memory(), made.threads
