"""The verb that writes an adapter in another dialect, or in the form that engines take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from regraft.adapters.dialects.form import (
    Bits,
    LoraModule,
    PlainAdapter,
    as_stored,
    whole_tensor,
)
from regraft.adapters.dialects.peft import read_adapter
from regraft.adapters.dialects.registry import DIALECTS, Dialect
from regraft.adapters.dialects.uniform import UniformError, uniform_form
from regraft.adapters.model import Adapter
from regraft.adapters.settings import LoraSettings
from regraft.adapters.wrappers import plain_config
from regraft.errors import AdapterError, Problem, UnsupportedError, UsageError
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.files.watching import watched
from regraft.formats.hub import locate
from regraft.formats.problems import capped
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.files.publish import copy_file, write_pieces
from regraft.merging.files.side_files import CARD, adapter_side_files
from regraft.merging.inputs.any_dialect import open_adapter
from regraft.merging.inputs.base import open_base, see
from regraft.progress import Progress, ProgressMeter, tell
from regraft.shrinking.copies import compare, copies_in
from regraft.shrinking.targets import TIE, Pair, read_pairs

PEFT = "peft"


@dataclass(frozen=True)
class AdapterConversion:
    """What :func:`convert_adapter` did.

    Attributes:
        adapter: as the user named it.
        output: the folder that was made.
        dialect: what the adapter was written in.
        to: what it is written in now.
        modules: how many modules it adapts.
        tensors: how many tensors it has, of each.
        uniform: whether scales were multiplied into B, and ranks filled up.
        error: relative error of B, 0 where every value is the same to the last bit.
        files: the files that were written.
        notes: what the user should know.
        seconds: how long it took.
    """

    adapter: str
    output: str
    dialect: str
    to: str
    modules: int
    tensors: int
    uniform: bool
    error: float
    files: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


@watched()
def convert_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    base: str | Path | None = None,
    dialect: str | None = None,
    uniform: bool = False,
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> AdapterConversion:
    """Write an adapter in another dialect; every value stays, to the last bit.

    Where the dialect has one rank and one scale for all modules, an adapter that has several is
    written in the uniform form: scales are multiplied into B, and ranks filled up with zeros.

    Args:
        adapter: a folder or file in any dialect that is read, or a Hub id.
        out: the folder to make; it appears whole or not at all.
        to: the dialect to write, of :data:`regraft.adapters.dialects.registry.DIALECTS`; PEFT's if
            None.
        base: the model that it is for; some dialects cannot be read or written without.
        dialect: what the adapter is written in; None for what its files show.
        uniform: write the uniform form in any case.
        overwrite: replace ``out``, once the new one is complete, if it holds an adapter.
        token: Hub token.
        progress: called as work proceeds.

    Raises:
        UnsupportedError: the dialect cannot say what the adapter has; each tensor is named.
        UsageError: there is no such dialect, or the base is needed.
        RegraftError: another of :mod:`regraft.errors`; ``out`` is then as it was before the call.
    """
    started = time.perf_counter()
    target = _target(to or PEFT)
    _refuse_file(out)
    folder = OutputFolder.asked_for(out, adapter, base, overwrite=overwrite, kind="adapter")
    tell(progress, "read", 0)
    model = open_base(locate(base, kind="base", token=token)) if base is not None else None
    opened = open_adapter(locate(adapter, kind="adapter", token=token), model, dialect)
    if opened.dialect == PEFT and to is None and not uniform:
        raise _nothing_to_do(opened)
    read = read_adapter(opened)
    seen = None if model is None else see(model, None)[0]
    plain, error = plain_adapter(opened, read), 0.0
    left_out: tuple[str, ...] = ()
    if target.name != PEFT:
        plain, left_out = _without_copies(plain, opened, read, seen)
    is_folded = uniform or not target.takes(plain)
    if is_folded:
        plain, error = _folded(plain, opened)
    new = target.writer(plain, seen)
    folder.check_inputs([read.inputs, *_files_of(model)])
    sides = adapter_side_files(opened.root).files
    folder.check_space(sum(f.nbytes for f in new) + sum(p.stat().st_size for p in sides.values()))
    told = ProgressMeter(progress, "convert", sum(file.nbytes for file in new))
    with FilePool() as files, folder.work() as work:
        work.begin("convert")
        work.keep_only(())
        for file in new:
            write_pieces(work.out / file.name, _counted(file.pieces(files), told))
        for name, path in sides.items():
            if name != CARD:
                copy_file(path, work.out / name)
        tell(progress, "finish", 0)
    return AdapterConversion(
        opened.source, str(folder.path), opened.dialect, target.name, len(plain.modules),
        sum(len(module.tensors) for module in plain.modules) + len(plain.whole)
        + len(plain.token_rows),
        is_folded, error, tuple(file.name for file in new),
        (*opened.notes, *left_out, *target.notes),
        time.perf_counter() - started,
    )  # fmt: skip


def _files_of(model: Checkpoint | None) -> list[Path]:
    """Return the folder of a model, or its files where these were named alone."""
    if model is None:
        return []
    return [shard.path for shard in model.shards] if model.single_file else [model.root]


def _refuse_file(out: str | Path) -> None:
    """Refuse the name of a file for the folder.

    Raises:
        UsageError: it is one.
    """
    suffix = Path(out).suffix
    if suffix in (".gguf", ".safetensors", ".bin", ".pt"):
        raise UsageError(
            "OUT is a folder, and this is the name of a file", where="out", found=str(out),
            expected="the name of a folder, in which the adapter's files are made",
            hint=f"Write for example {str(out).removesuffix(suffix)}",
        )  # fmt: skip


def _nothing_to_do(opened: AdapterFiles) -> UnsupportedError:
    return UnsupportedError(
        "there is nothing to convert: the adapter is in PEFT's format already",
        where=opened.weights_shown, hint="Say what to write it in, with --to, or give --uniform",
    )  # fmt: skip


def _counted(pieces: Any, told: ProgressMeter) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        told.add(len(piece))


def _target(name: str) -> Dialect:
    found = DIALECTS.get(name)
    if found is None or not found.writes:
        known = ", ".join(name for name, dialect in DIALECTS.items() if dialect.writes)
        raise UsageError("there is no such dialect of adapters to write", where="to",
                         expected=known, found=name)  # fmt: skip
    return found


def _folded(plain: PlainAdapter, opened: AdapterFiles) -> tuple[PlainAdapter, float]:
    try:
        return uniform_form(plain)
    except UniformError as error:
        raise UnsupportedError(
            f"the adapter has no uniform form: {error}", where=opened.weights_shown,
            hint="Merge it (`regraft merge`), and serve the merged model",
        ) from None  # fmt: skip


def _without_copies(
    plain: PlainAdapter, opened: AdapterFiles, read: Adapter, base: Checkpoint | None
) -> tuple[PlainAdapter, tuple[str, ...]]:
    """Return an adapter without the base's own embeddings, which PEFT saves along, and notes."""
    copies = copies_in(opened, read) if base is not None else []
    if base is None or not copies:
        return plain, ()
    outcomes = compare(copies, base)
    equal = {c.parameter for c, how in zip(copies, outcomes, strict=True) if how == "dropped"}
    whole = {name: tensor for name, tensor in plain.whole.items() if name not in equal}
    notes = [f"{name} has the base's own values, and is left out" for name in sorted(equal)]
    return replace(plain, whole=whole), tuple(notes)


# -- PEFT's files as plain modules -----------------------------------------------------------------


def plain_adapter(files: AdapterFiles, adapter: Adapter) -> PlainAdapter:
    """Return an adapter in PEFT's format without its dialect.

    Raises:
        AdapterError: factors contradict each other or the config.
        UnsupportedError: what it means cannot be said by modules with a rank and a scale.
    """
    settings = adapter.settings
    problems = []
    if settings.begins_with_base:
        problems.append(
            Problem(f"init_lora_weights {settings.init_lora_weights!r} changes the base",
                    files.config_shown, hint="Convert it with PEFT (save_pretrained with "
                    "path_initial_model_for_weight_conversion) first")
        )  # fmt: skip
    if problems:
        raise UnsupportedError(capped(problems, files.root))
    pairs = read_pairs(adapter)
    _check_targeted(settings, pairs, files)
    return PlainAdapter(
        modules=tuple(map(_module, pairs)),
        whole={each.parameter: whole_tensor(each.spec, each.origin) for each in adapter.whole},
        token_rows={
            each.module: (each.indices, as_stored(each.spec)) for each in adapter.token_rows
        },
        base=settings.base_model_name_or_path,
        task_type=settings.task_type,
        metadata={key: value for key, value in files.metadata.items() if key != "format"},
        ensure_weight_tying=settings.ensure_weight_tying,
        config=plain_config(files.config),
    )


def _check_targeted(settings: LoraSettings, pairs: Sequence[Pair], files: AdapterFiles) -> None:
    """Refuse factors that the config does not target: written anew, they would begin to act.

    Raises:
        AdapterError: there are some; lists all.
    """
    problems = [
        Problem("the adapter has factors for a module that its config does not target",
                f"{files.source}: {pair.name}", "a module that target_modules selects",
                hint="PEFT would ignore them in silence; mend target_modules in the config")
        for pair in pairs
        if pair.keys[0] == pair.target.module
        and not settings.targets(pair.name)
        and not settings.targets(pair.name.removesuffix(".out_proj"))
        and pair.group != TIE
    ]  # fmt: skip
    if problems:
        raise AdapterError(capped(problems, files.root))


def _module(pair: Pair) -> LoraModule:
    target, sizes = pair.target, pair.sizes
    a, b = as_stored(target.a), as_stored(target.b)
    kind, name = pair.layer, target.module
    if kind == "experts":
        name = pair.name
        a = a.reshaped((sizes.experts, sizes.rank, sizes.inputs))
        b = b.then((sizes.experts, sizes.out, sizes.rank), _by_expert(pair))
    bias = None if target.b_bias is None else as_stored(target.b_bias)
    magnitude = None if target.magnitude is None else as_stored(target.magnitude)
    return LoraModule(name, sizes.rank, pair.scale, a, b, kind, bias, magnitude)


def _by_expert(pair: Pair) -> Any:
    """Return the move from a stack's B, (out, r * experts), to (experts, out, r)."""
    sizes = pair.sizes

    def move(bits: Bits) -> Bits:
        if sizes.by_expert:
            return bits.reshape(sizes.out, sizes.experts, sizes.rank).transpose(1, 0, 2)
        return bits.reshape(sizes.out, sizes.rank, sizes.experts).transpose(2, 0, 1)

    return move
