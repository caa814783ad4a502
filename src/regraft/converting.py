"""The verbs that only change how something is stored: convert, dequantize, quantize."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, overload

from regraft.errors import UnsupportedError, UsageError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import expanded, is_there, typed_os_errors
from regraft.formats.files.watching import watched
from regraft.formats.foreign import of_path
from regraft.formats.hub import locate
from regraft.formats.layout import looks_like
from regraft.formats.reference import parse_reference
from regraft.merging.calls import conversion_call
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.inputs.base import open_base, see
from regraft.merging.inputs.dequantized_view import Quantization, check_scales
from regraft.merging.options import KEEP, MergeOptions
from regraft.merging.planning.planner import make_plan
from regraft.merging.planning.quantized.quantized_output import resolved
from regraft.progress import Progress, tell

if TYPE_CHECKING:
    from typing import Unpack

    from regraft.merging.files.receipt import Receipt
    from regraft.translating import AdapterConversion

MAX_MEMORY = "512MiB"


class _OfAdapter(TypedDict, total=False):
    """What :func:`convert` takes of an adapter."""

    base: str | Path | None
    dialect: str | None
    overwrite: bool
    token: str | None
    progress: Progress | None


class _OfModel(TypedDict, total=False):
    """What :func:`convert` takes of a model."""

    max_memory: str | int
    threads: int | None
    overwrite: bool
    reflink: str
    digest_cache: bool
    token: str | None
    progress: Progress | None
    command: str | None


@overload
def convert(
    source: str | Path, out: str | Path, *, to: str, uniform: bool = ...,
    **more: Unpack[_OfAdapter],
) -> AdapterConversion: ...  # fmt: skip
@overload
def convert(
    source: str | Path, out: str | Path, *, uniform: Literal[True], to: str | None = ...,
    **more: Unpack[_OfAdapter],
) -> AdapterConversion: ...  # fmt: skip
@overload
def convert(
    source: str | Path, out: str | Path, *, dtype: str, shard_size: str | int | None = ...,
    **more: Unpack[_OfModel],
) -> Receipt: ...  # fmt: skip
@overload
def convert(
    source: str | Path, out: str | Path, *, shard_size: str | int, dtype: str | None = ...,
    **more: Unpack[_OfModel],
) -> Receipt: ...  # fmt: skip
@overload
def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    base: str | Path | None = None,
    dialect: str | None = None,
    uniform: bool = False,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    max_memory: str | int = MAX_MEMORY,
    threads: int | None = None,
    overwrite: bool = False,
    reflink: str = "auto",
    digest_cache: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Receipt | AdapterConversion: ...
def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    base: str | Path | None = None,
    dialect: str | None = None,
    uniform: bool = False,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    max_memory: str | int = MAX_MEMORY,
    threads: int | None = None,
    overwrite: bool = False,
    reflink: str = "auto",
    digest_cache: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Receipt | AdapterConversion:
    """Write an adapter in another dialect, or a model in another dtype or in other files.

    A model becomes safetensors, also where it was ``.bin``. Of an adapter every value stays, to the
    last bit, but where the uniform form is made. Of a model, tensors whose dtype stays keep their
    bytes; others are rounded to the nearest value.

    Args:
        source: a model: a folder, a single weights file, or a Hub id ``org/name[@revision]``. Or an
            adapter in any dialect that is read; it is one where one of the next four arguments is
            given, or where its files show it.
        out: the folder to make; it appears whole or not at all.
        to: the dialect to write an adapter in, such as ``"mlx"``; by default PEFT's.
        base: the model that an adapter is for; some dialects cannot be read or written without.
        dialect: what an adapter is written in; by default what its files show.
        uniform: give all modules of an adapter one rank and the scale 1, as engines need it that
            know no other: scales are multiplied into B, and ranks filled up with zeros.
        dtype: dtype of all floating-point tensors of a model, in the config too; by default each
            keeps its own.
        shard_size: largest weight file of a model, such as ``"5GB"``; by default the files are as
            they were.
        max_memory, threads, reflink, digest_cache: of a model, as in :func:`dequantize`.
        overwrite: replace ``out``, once the new one is complete, if it holds what is written.
        token, progress: as in :func:`dequantize`.
        command: of a model, how the receipt and the card say it was made.

    Returns:
        Of a model the receipt, as it is in ``out/regraft/receipt.json``; of an adapter what was
        done.

    Raises:
        UsageError: arguments for a model and for an adapter are given together, there is no such
            dialect, or it takes the base, and there is none.
        UnsupportedError: the model is quantized, or it would be written as it is; or the dialect
            cannot say what the adapter has, of which each tensor is named.
        RegraftError: another of :mod:`regraft.errors`; ``out`` is then as it was before the call.
    """
    options = MergeOptions.of(
        dtype=dtype, shard_size=shard_size, max_memory=max_memory, threads=threads,
        reflink=reflink, digest_cache=digest_cache,
    )  # fmt: skip
    for_adapters = {"to": to, "base": base, "from": dialect, "uniform": uniform or None}
    given = [name for name, value in for_adapters.items() if value is not None]
    if not given and not _is_adapter(source, token):
        return _convert(
            source, out, options, "convert", overwrite=overwrite, token=token,
            progress=progress, command=command,
        )  # fmt: skip
    of_models = {
        "dtype": dtype, "shard-size": shard_size, "threads": threads,
        "max-memory": None if max_memory == MAX_MEMORY else max_memory,
        "reflink": None if reflink == "auto" else reflink, "digest-cache": digest_cache or None,
    }  # fmt: skip
    _refuse_together(given, [name for name, value in of_models.items() if value is not None])
    from regraft.translating import convert_adapter

    return convert_adapter(
        source, out, to=to, base=base, dialect=dialect, uniform=uniform, overwrite=overwrite,
        token=token, progress=progress,
    )  # fmt: skip


def _is_adapter(source: str | Path, token: str | None) -> bool:
    """Whether the files of a source show an adapter, in whatever dialect."""
    path = expanded(source)
    if not is_there(path):
        if parse_reference(str(source)) is None:
            return False  # whoever opens it says that it is not there
        path = locate(source, kind="adapter", token=token).path  # a model's weights stay there
    with typed_os_errors(path):
        return looks_like(path) in ("adapter", "mlx-adapter") or of_path(path) is not None


def _refuse_together(of_adapters: Sequence[str], of_models: Sequence[str]) -> None:
    """Refuse what has no meaning for an adapter.

    Raises:
        UsageError: some of it is given.
    """
    if not of_models:
        return
    said = ", ".join(of_adapters)
    raise UsageError(
        f"{', '.join(of_models)}: this is of models, and what is converted is an adapter",
        where=of_models[0],
        expected=f"it without {said}" if said else "to, from, base or uniform",
        hint="An adapter's dtype is changed by `regraft shrink --dtype`",
    )


def dequantize(
    base: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    max_memory: str | int = "512MiB",
    threads: int | None = None,
    overwrite: bool = False,
    reflink: str = "auto",
    digest_cache: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Receipt:
    """Write a quantized model as a plain one.

    The values are those that the format's own library computes, byte for byte.

    Args:
        base: a folder, a single ``.safetensors`` or ``.gguf`` file, or a Hub id
            ``org/name[@revision]``.
        out: the folder to make; it appears whole or not at all.
        dtype: dtype of all floating-point tensors; by default a quantized weight gets the one that
            its format computes in, and the others keep theirs.
        shard_size: largest weight file, such as ``"5GB"``; by default the base's files are kept.
        max_memory: cap on resident memory, whatever the size of the model.
        threads: worker threads; by default three more than there are cores at hand.
        overwrite: replace ``out``, once the new one is complete, if it holds a model already.
        reflink: whether untouched tensors share blocks of the disk with the base; as in
            :func:`regraft.merge`.
        digest_cache: take the digests of tensors from earlier work, if their file is as it was; as
            there.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.
        command: how the receipt and the card say it was made.

    Returns:
        The receipt, as it is in ``out/regraft/receipt.json``.

    Raises:
        UnsupportedError: the model is not quantized, or in a way that is not known.
        RegraftError: another of :mod:`regraft.errors`; ``out`` is then as it was before the call.
    """
    options = MergeOptions.of(
        dtype=dtype, shard_size=shard_size, max_memory=max_memory, threads=threads,
        reflink=reflink, digest_cache=digest_cache,
    )  # fmt: skip
    return _convert(
        base, out, options, "dequantize", overwrite=overwrite, token=token,
        progress=progress, command=command,
    )  # fmt: skip


def quantize(
    base: str | Path,
    out: str | Path,
    to: str,
    *,
    double_quant: bool = False,
    rounding: str | None = None,
    seed: int = 0,
    shard_size: str | int | None = None,
    max_memory: str | int = "512MiB",
    threads: int | None = None,
    overwrite: bool = False,
    reflink: str = "auto",
    digest_cache: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Receipt:
    """Write a model with its linear layers quantized, as transformers does when it loads one.

    Embeddings and the output head stay as they are. Rounded to nearest, codes and scales of
    ``nf4`` and ``fp4`` are those that bitsandbytes makes on a CPU, byte for byte.

    Args:
        base: a folder, a single ``.safetensors`` file, or a Hub id ``org/name[@revision]``. Of a
            quantized model, what its codes stand for is quantized.
        out: the folder to make; it appears whole or not at all.
        to: ``"nf4"``, ``"fp4"``, ``"int8"`` (LLM.int8) or ``"fp8"`` (E4M3 in blocks of 128x128).
        double_quant: quantize the scales of ``nf4`` or ``fp4`` too.
        rounding: ``"nearest"`` (default) or ``"stochastic"``.
        seed: which random bits stochastic rounding takes.
        shard_size, max_memory, threads, overwrite, reflink, digest_cache: as in :func:`dequantize`.
        token, progress, command: as in :func:`dequantize`.

    Returns:
        The receipt, as it is in ``out/regraft/receipt.json``.

    Raises:
        UnsupportedError: the model is in this format already, or has no linear layer for it.
        NumericError: a weight holds NaN or infinity.
        RegraftError: another of :mod:`regraft.errors`; ``out`` is then as it was before the call.
    """
    options = MergeOptions.of(
        quantize=to, rounding=rounding, seed=seed, double_quant=double_quant,
        shard_size=shard_size, max_memory=max_memory, threads=threads, reflink=reflink,
        digest_cache=digest_cache,
    )  # fmt: skip
    return _convert(
        base, out, options, "quantize", overwrite=overwrite, token=token,
        progress=progress, command=command,
    )  # fmt: skip


@watched()
def _convert(
    base: str | Path, out: str | Path, options: MergeOptions, verb: str, *, overwrite: bool,
    token: str | None, progress: Progress | None, command: str | None,
) -> Receipt:  # fmt: skip
    """Write a model in another form: a merge without adapters, which keeps no undo."""
    started = time.perf_counter()
    folder = OutputFolder.asked_for(out, base, overwrite=overwrite)
    tell(progress, "read", 0)
    stored = open_base(locate(base, kind="base", token=token))
    plain, quantization = see(stored, options.dtype)
    check = _check_convertible if verb == "convert" else _check_wanted
    check(stored, quantization, options)
    if quantization is not None:
        check_scales(quantization)
    made = make_plan(plain, [], options, folder.path, quantization=quantization)
    inputs = [shard.path for shard in stored.shards] if stored.single_file else [stored.root]
    folder.check_inputs(inputs)
    made = replace(made, disk=folder.disk(made.disk_bytes))

    from regraft.merging.building import build, deciding_files, make_room

    reuse = make_room(made, folder, options)

    with folder.work() as work:
        called = command or conversion_call(verb, stored.source, made)
        return build(
            made, work, deciding_files(made), called, started, keeping=None, reuse=reuse,
            progress=progress,
        )  # fmt: skip


def _check_convertible(
    stored: Checkpoint, quantization: Quantization | None, options: MergeOptions
) -> None:
    """Refuse a model in codes, and to write a model as it is.

    Raises:
        UnsupportedError: it is one of these.
    """
    if quantization is not None:
        raise UnsupportedError(
            f"the model is quantized ({', '.join(quantization.formats)})", where=stored.source,
            expected="a model with plain weights",
            hint="`regraft dequantize` writes it as a plain one, with --dtype and --shard-size",
        )  # fmt: skip
    in_safetensors = all(shard.path.suffix == ".safetensors" for shard in stored.shards)
    if options.dtype is None and options.shard_size is None and in_safetensors:
        raise UnsupportedError(
            "there is nothing to convert: the weights are safetensors files already",
            where=stored.source, hint="Give --dtype or --shard-size",
        )  # fmt: skip


def _check_wanted(
    stored: Checkpoint, quantization: Quantization | None, options: MergeOptions
) -> None:
    """Refuse to do nothing.

    Raises:
        UnsupportedError: the model is as it is wanted already.
    """
    if options.quantize is None and quantization is None:
        raise UnsupportedError(
            "the model is not quantized", where=stored.source,
            hint="There is nothing to do; to change its dtype: regraft convert",
        )  # fmt: skip
    if resolved(options.quantize, quantization, double_quant=options.double_quant) == KEEP:
        raise UnsupportedError(
            "the model is in this format already", where=stored.source,
            found=str(options.quantize), hint="There is nothing to do",
        )  # fmt: skip
