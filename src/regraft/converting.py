"""The verbs that change how a model is stored, and nothing else: convert, dequantize, quantize."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.errors import UnsupportedError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.watching import watched
from regraft.formats.hub import locate
from regraft.merging.calls import conversion_call
from regraft.merging.files.output_folder import OutputFolder
from regraft.merging.inputs.base import open_base, see
from regraft.merging.inputs.dequantized_view import Quantization, check_scales
from regraft.merging.options import KEEP, MergeOptions
from regraft.merging.planning.planner import make_plan
from regraft.merging.planning.quantized_output import resolved
from regraft.progress import Progress, tell

if TYPE_CHECKING:
    from regraft.merging.files.receipt import Receipt


def convert(
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
    """Write a model in another dtype, in other files, or as safetensors instead of ``.bin``.

    Tensors whose dtype stays keep their bytes; others are rounded to the nearest value.

    Args:
        base: a folder, a single weights file, or a Hub id ``org/name[@revision]``.
        out: the folder to make; it appears whole or not at all.
        dtype: dtype of all floating-point tensors, in the config too; by default each keeps its
            own.
        shard_size: largest weight file, such as ``"5GB"``; by default the base's files are kept.
        max_memory, threads, overwrite, reflink, digest_cache: as in :func:`dequantize`.
        token, progress, command: as in :func:`dequantize`.

    Returns:
        The receipt, as it is in ``out/regraft/receipt.json``.

    Raises:
        UnsupportedError: the model is quantized, or would be written as it is.
        RegraftError: another of :mod:`regraft.errors`; ``out`` is then as it was before the call.
    """
    options = MergeOptions.of(
        dtype=dtype, shard_size=shard_size, max_memory=max_memory, threads=threads,
        reflink=reflink, digest_cache=digest_cache,
    )  # fmt: skip
    return _convert(
        base, out, options, "convert", overwrite=overwrite, token=token,
        progress=progress, command=command,
    )  # fmt: skip


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
